"""A measure as a subject of checks: what its author declares, and readings of it as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.directions import Given, Own
from bnsharp.evaluation import as_objective
from bnsharp.groups import ScaleGroups
from bnsharp.measures import Measure
from bnsharp.testing.check import calling, require
from bnsharp.testing.strategies import Quadratic
from bnsharp.types import Params

PROPERTIES: dict[str, str] = {
    "offset": "L + c has the same value",
    "homogeneous": "c L has c times the value, c > 0",
    "two-sided": "θ + v ↦ L(θ − v) has the same value",
    "nonnegative": "the value is never negative",
    "sampled": "the value is random, and .stderr is its standard error",
    "searched": "the value is a maximum found by a search, and .unit (or .direction) is where",
}
"""What a measure can declare beyond invariance."""

ClosedForm = Callable[[Tensor, Tensor, Params, ScaleGroups], float | tuple[float, float]]


@dataclass(frozen=True)
class Reading:
    """A measured value as plain numbers."""

    value: float
    stderr: float
    error: float
    unit: Params | None
    direction: Params | None

    def slack(self, other: Reading, rtol: float, *, stated: bool = False, spread: bool = False) -> float:
        """What two readings of one quantity may differ by.

        Rounding; if ``stated`` their numerical errors, which two evaluations of one formula share and do not need;
        if ``spread`` 6 standard errors, which the same draws do not need.
        """
        errors = self.error + other.error if stated else 0.0
        sampling = 6 * math.hypot(self.stderr, other.stderr) if spread else 0.0
        require(math.isfinite(sampling), "an infinite standard error leaves nothing to compare: draw more")
        return rtol * max(abs(self.value), abs(other.value)) + 1e-13 + errors + sampling


def mean_of(readings: list[Reading]) -> Reading:
    """The mean of independent readings, its standard error, and their largest numerical error."""
    n = len(readings)
    stderr = math.sqrt(math.fsum(r.stderr**2 for r in readings)) / n
    return Reading(math.fsum(r.value for r in readings) / n, stderr, max(r.error for r in readings), None, None)


@dataclass(frozen=True)
class Declared:
    """What a measure's author says about it; see :func:`check_measure`."""

    build: Callable[[ScaleGroups], Any]
    name: str
    invariant: frozenset[str] = frozenset()
    not_invariant: frozenset[str] = frozenset()
    properties: frozenset[str] = frozenset()
    closed_form: ClosedForm | None = None
    powers: Callable[[ScaleGroups, float], Any] | None = None
    hold: Callable[[Any, Params], Any] | None = None
    start: Callable[[Any, Any, Params], Params] | None = None
    has_penalty: bool = False
    rtol: float = 1e-6
    examples: int = 2

    def made(self, groups: ScaleGroups) -> Any:
        """The measure for these groups."""
        with calling(f"{self.name}: building it"):
            measure = self.build(groups)
        require(callable(measure), f"{self.name}: build returned {type(measure).__name__}; expected a callable")
        return measure

    def read(self, measure: Any, objective: Any, params: Params, seed: int = 0) -> Reading:
        """Measure with a generator of this seed."""
        with calling(f"{self.name}: measuring"):
            estimate = measure(objective, params, torch.Generator().manual_seed(seed))
        require(
            hasattr(estimate, "value"),
            f"{self.name}: a measurement returned {type(estimate).__name__}; expected an object with .value",
        )
        value, stderr, error = (float(getattr(estimate, k, 0.0) or 0.0) for k in ("value", "stderr", "error"))
        for what, number in (("value", value), ("error", error)):
            require(math.isfinite(number), f"{self.name}: {what} is {number}; expected a finite number")
        # an infinite standard error is an honest one: that of a single draw
        require(stderr >= 0 and error >= 0, f"{self.name}: stderr {stderr:.3g}, error {error:.3g}; expected both >= 0")
        return Reading(value, stderr, error, getattr(estimate, "unit", None), getattr(estimate, "direction", None))

    def value(self, groups: ScaleGroups, objective: Any, params: Params, seed: int = 0) -> Reading:
        """Build and measure."""
        return self.read(self.made(groups), objective, params, seed)

    def penalty(self, measure: Any, objective: Any, params: Params, seed: int = 0) -> tuple[float, Params]:
        """``measure.penalty`` and its gradient in ``params``."""
        leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
        with calling(f"{self.name}: the penalty"):
            value = measure.penalty(objective, P.make(leaves), torch.Generator().manual_seed(seed))
            require(isinstance(value, Tensor) and value.ndim == 0, f"{self.name}: the penalty is no scalar tensor")
            require(value.requires_grad, f"{self.name}: the penalty does not depend on the parameters by autograd")
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradient = P.make({k: g.detach() for k, g in zip(leaves, grads, strict=True)})
        finite = all(bool(g.isfinite().all()) for g in gradient.values())
        require(finite, f"{self.name}: the penalty's gradient is not finite")
        return float(value.detach()), gradient

    def held(self, measure: Any, reading: Reading) -> Any:
        """The measure with the direction found held; the measure itself where directions do not depend on θ."""
        return measure if self.hold is None or reading.unit is None else self.hold(measure, reading.unit)


def hold_unit(measure: Measure, unit: Params) -> Measure:
    """The same measure along one given direction, in unit coordinates; itself where the direction is θ's own."""
    if isinstance(measure.directions, Own):
        return measure
    return replace(measure, directions=Given(unit))


def steepest_start(measure: Measure, objective: Any, params: Params) -> Params:
    """``argmax_u ⟨∂L/∂u, u⟩``, where searches start."""
    frame = measure.geometry.at(params)
    gradient = as_objective(objective).value_and_grad(params)[1]
    return frame.steepest(frame.pull(gradient), lambda: P.zeros_like(frame.like))


def closed_form_of(declared: Declared, loss: Quadratic) -> tuple[float, float]:
    """The interval in which the value must lie."""
    assert declared.closed_form is not None
    with calling(f"{declared.name}: closed_form"):
        given = declared.closed_form(loss.A, loss.b, loss.theta, loss.groups)
        low, high = given if isinstance(given, tuple) else (given, given)
    return float(low), float(high)
