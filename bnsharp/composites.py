"""Functions over measures: a measure under another criterion, and the largest radius that a network bears.

They are called as measures are: ``(objective, θ, generator) -> Estimate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import positive, whole
from bnsharp.errors import InputError, NotFiniteError
from bnsharp.estimation import DEFAULT_SEED, ONCE, Measure, Sampling, check
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.objective import Objective
from bnsharp.types import Estimate, Params

Criterion = Callable[[Any, Any], Tensor]


class Measured(Protocol):
    """What can be measured: slots put together, or a function over them."""

    def __call__(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
        sampling: Sampling = ...,
    ) -> Estimate: ...

    def cost(self) -> int: ...


# ---------------------------------------------------------------- criteria


def zero_one(output: Tensor, y: Tensor) -> Tensor:
    """The error rate, ``E 1[argmax_k z_k ≠ y]``: piecewise constant in θ, for measures that take no gradient."""
    return (output.argmax(1) != y).to(output.dtype).mean()


def error_rate(criterion: Criterion) -> Criterion:
    """The error rate in the place of any criterion."""
    return zero_one


def normalized_logits(criterion: Criterion) -> Criterion:
    """The criterion of logits centred and scaled per example, ``(z − z̄)/√(1/K Σ (z_k − z̄)²)`` (2302.07011, eq. 5).

    It removes the freedom to change a cross-entropy by scaling the last layer.
    """

    def normalized(output: Tensor, y: Tensor) -> Tensor:
        centred = output - output.mean(-1, keepdim=True)
        # a norm has a gradient, 0, where all logits are equal
        size = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(output.shape[-1])
        return criterion(centred * P.safe_reciprocal(size), y)

    return normalized


@dataclass(frozen=True)
class OnCriterion:
    """A measure of the same network under another criterion.

    Args:
        measure: what is measured.
        change: the objective's criterion ↦ the one measured.

    Raises:
        InputError: a plain function, which has no criterion.
    """

    measure: Measured
    change: Callable[[Criterion], Criterion]

    def __call__(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
        sampling: Sampling = ONCE,
    ) -> Estimate:
        return self.measure(self._changed(objective), params, generator, sampling)

    def penalty(self, objective: AbstractObjective | LossFunction, params: Params,
                generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`bnsharp.Measure.penalty`, of measures that have one."""
        if not isinstance(self.measure, Measure):
            raise InputError(f"{type(self.measure).__name__} has no gradient; expected a measure made of slots")
        return self.measure.penalty(self._changed(objective), params, generator)

    def cost(self) -> int:
        return self.measure.cost()

    def _changed(self, objective: AbstractObjective | LossFunction) -> Objective:
        if not isinstance(objective, Objective):
            raise InputError(
                f"another criterion needs a network's output, and got a {type(objective).__name__}; expected "
                "bnsharp.Objective(module, criterion, data)"
            )
        return objective.with_criterion(self.change(objective.criterion))


# ---------------------------------------------------------------- largest radius

NEAR = 1.25
"""The measure's slope at the radius found is taken between the radius over this factor and times it."""


@dataclass(frozen=True)
class LargestRadius:
    """The largest radius at which a measure is at most ``rise``, by bisection (Jiang et al. 2020, appendix).

    Every radius is tried with the same draws, which makes the measure a smooth function of the radius. Bisection is in
    the logarithm, between ``smallest`` and ``largest``; flatness in Jiang's sense is ``1/radius²``.

    ``Estimate``: ``value`` the radius; ``stderr`` that of the measure over its slope in the radius; ``error`` half the
    last bracket (``stderr`` is infinite outside); a target error is not sampled for, only compared with; ``converged``
    False where even ``largest`` is borne (the value is a lower bound) or ``smallest`` is not (an upper one).

    Args:
        measure: radius ↦ measure.
        rise: what is borne, in units of the measure; > 0.
        largest, smallest: the bracket.
        halvings: of its logarithm.

    Raises:
        InputError: a rise or bracket that is not positive and in order, fewer than one halving.
    """

    measure: Callable[[float], Measure]
    rise: float = 0.1
    largest: float = 2.0
    smallest: float = 1e-5
    halvings: int = 15

    def __post_init__(self) -> None:
        for name in ("rise", "largest", "smallest"):
            positive(name, getattr(self, name))
        whole("halvings", self.halvings)
        if self.smallest >= self.largest:
            raise InputError(f"smallest={self.smallest:g}, largest={self.largest:g}; expected smallest < largest")

    def __call__(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
        sampling: Sampling = ONCE,
    ) -> Estimate:
        objective = as_objective(objective)
        check(objective, params)
        generator = P.seeded(DEFAULT_SEED, P.first(params).device) if generator is None else generator
        state, before = generator.get_state(), objective.evaluations.copy()
        quiet = replace(sampling, on_estimate=None, target=None)

        def at(radius: float) -> Estimate:
            generator.set_state(state)
            try:
                return self.measure(radius)(objective, params, generator, quiet)
            except NotFiniteError:  # more than anything that is borne
                return Estimate(math.inf, math.inf, math.inf)

        low, high = self.smallest, self.largest
        below, above = at(low), at(high)
        inside = below.value <= self.rise < above.value
        if not inside:
            low = high = self.largest if above.value <= self.rise else self.smallest
            below = above = above if above.value <= self.rise else below
        for _ in range(self.halvings if inside else 0):
            middle = math.sqrt(low * high)
            estimate = at(middle)
            if estimate.value <= self.rise:
                low, below = middle, estimate
            else:
                high, above = middle, estimate
        # over a factor wide enough that the jumps of an error rate even out
        slope = (at(NEAR * low).value - at(low / NEAR).value) / (low * (NEAR - 1 / NEAR)) if inside else math.inf
        spent = objective.evaluations - before
        found = replace(
            below,
            value=low,
            # outside the bracket only a bound is known
            stderr=below.stderr / slope if inside and slope > 0 else math.inf,
            error=(high - low) / 2,
            stderr_data=None,
            converged=inside,
            evaluations={k: spent.get(k, 0) for k in ("gradients", "losses", "products")},
        )
        if sampling.target is None or not inside:
            return found
        return replace(found, converged=found.half_width <= sampling.target * low)

    def cost(self) -> int:
        return (self.halvings + 4) * self.measure(self.largest).cost()
