"""Measuring a trained network before and after a rescaling that does not change its function."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from bnsharp import measures
from bnsharp import params as P
from bnsharp.checks import one_of, suggest, whole
from bnsharp.data import ImageData
from bnsharp.deflation import is_trace
from bnsharp.errors import InputError
from bnsharp.estimation import Measure, Sampling
from bnsharp.experiments.config import parse_setting
from bnsharp.experiments.objectives import MEASURED_AT_ONCE, objective_of, probe_batch
from bnsharp.groups import ScaleGroups, scale_groups
from bnsharp.modes import exact_norms
from bnsharp.objective import Objective
from bnsharp.types import Estimate, Params


@dataclass(frozen=True)
class Rescaling:
    """The network θ and an equal one, ``T_a θ`` with a log-uniform in [0.1, 10]; factors drawn from ``seed``."""

    low: float = 0.1
    high: float = 10.0
    seed: int = 0

    def __call__(self, groups: ScaleGroups, params: Params) -> Params:
        generator = P.seeded(self.seed, P.first(params).device)
        return groups.rescale(params, groups.random_factors(params, generator, self.low, self.high))


def doubled(module: nn.Module) -> Params:
    """The parameters in float64."""
    return P.pmap(torch.Tensor.double, P.parameters(module))


def before_and_after(
    module: nn.Module,
    data: ImageData,
    groups: ScaleGroups,
    *,
    delta: float,
    steps: int,
    restarts: int,
    sigma: float,
    draws: int = 100,
    seed: int = 0,
    line: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """BN-Sharpness and Gaussian sharpness of θ and of a rescaled equal, λ_max, and the loss along the sharpest line.

    On all training images with the labels trained on, batch statistics, float64, every normalizer's eps negligible (so
    that the rescaled network is the same function).

    Args:
        delta, steps, restarts: of BN-Sharpness. sigma, draws: of the Gaussian.
        seed: of the rescaling, draws, random starts and Lanczos.
        line: points of the loss along ``θ + t v``, ``|t| ≤ 2δ``, v the sharpest direction; 0 leaves it out.
        tick: called after each part.
    """
    objective = objective_of(module, data, dtype=torch.float64)
    theta = doubled(module)
    other = Rescaling(seed=seed)(groups, theta)
    compared = {
        "bn_sharpness": measures.bn_sharpness(groups, delta=delta, steps=steps, restarts=restarts),
        "gaussian": measures.gaussian(sigma=sigma, draws=draws),
    }
    top = measures.hessian_top(certify=0)
    generator = functools.partial(P.seeded, seed, P.first(theta).device)
    result: dict[str, Any] = {}
    with exact_norms(module):
        with torch.no_grad():
            loss = objective(theta)
            result["loss"] = float(loss)
            result["loss_change"] = abs(float(objective(other) - loss))
        sharpest: Params | None = None
        for name, measure in compared.items():
            for when, point in (("", theta), ("_rescaled", other)):
                estimate = measure(objective, point, generator())
                result |= {f"{name}{when}": estimate.value, f"{name}{when}_stderr": estimate.stderr,
                           f"{name}{when}_error": estimate.error}
                sharpest = estimate.direction if sharpest is None else sharpest
                tick()
        estimate = top(objective, theta, generator())
        result |= {"hessian_top": estimate.value, "hessian_top_error": estimate.error}
        if line and sharpest is not None:
            t = torch.linspace(-2 * delta, 2 * delta, line, dtype=torch.float64)
            with torch.no_grad():
                result |= {"line_t": t.tolist(), "line_loss": objective.along(theta, sharpest, t).tolist()}
        tick()
    return result


def sharpness(
    module: nn.Module,
    data: ImageData,
    groups: ScaleGroups,
    *,
    delta: float,
    steps: int,
    restarts: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Training loss, BN-Sharpness and λ_max as :func:`before_and_after` takes them, of the network as it is."""
    objective, theta = objective_of(module, data, dtype=torch.float64), doubled(module)
    taken = {
        "bn_sharpness": measures.bn_sharpness(groups, delta=delta, steps=steps, restarts=restarts),
        "hessian_top": measures.hessian_top(certify=0),
    }
    result: dict[str, Any] = {}
    with exact_norms(module):
        with torch.no_grad():
            result["loss"] = float(objective(theta))
        for name, measure in taken.items():
            estimate = measure(objective, theta, P.seeded(seed, P.first(theta).device))
            result |= {name: estimate.value, f"{name}_error": estimate.error}
            tick()
    return result


PARTS = {"before_and_after": 5, "sharpness": 2}
"""How often each of these functions ticks."""


def options_for(names: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options per measure from ``key=value`` (every measure that has the option) and ``measure.key=value``.

    Raises:
        InputError: an unknown measure or option, an option that none of the measures has.
    """
    for name in names:
        if name not in measures.MEASURES:
            measures.build_measure(name)  # raises
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in (parse_setting(s) for s in settings):
        target, dot, option = key.partition(".")
        if dot and target not in chosen:
            raise InputError(f"setting {key!r}: {target!r} is not among the measures {', '.join(names)}"
                             + suggest(target, names))
        option = option if dot else key
        takers = [target] if dot else [n for n in names if option in measures.MEASURES[n].options()]
        if not takers:
            known = sorted({o for n in names for o in measures.MEASURES[n].options()})
            raise InputError(f"no measure asked for has the option {option!r}; expected one of {', '.join(known)}"
                             + suggest(option, known))
        for taker in takers:
            chosen[taker][option] = value
    return chosen


@dataclass(frozen=True)
class Setting:
    """On what and how measures are taken.

    Attributes:
        examples: the first so many training examples, all by default.
        batch_size: examples per batch; the data is streamed batch by batch.
        statistics: of normalizers, ``"batch"`` or ``"running"``.
        precision: ``"float64"`` or ``"float32"``.
        promote: whether a float32 value with too large a rounding error is taken again in float64.
        exact: with every normalizer's eps negligible.
        seed: of draws and random starts.
        target: relative half width of the interval to sample to; None takes each measure's own number of draws.
        engine: ``"loop"`` or ``"vmap"``.
        deflate: products spent on the sharpest directions of each trace among the measures, see
            :class:`bnsharp.Sampling`.

    Raises:
        InputError: an unknown precision, a negative ``deflate``.
    """

    examples: int | None = None
    batch_size: int = MEASURED_AT_ONCE
    statistics: str = "batch"
    precision: str = "float64"
    promote: bool = True
    exact: bool = False
    seed: int = 0
    target: float | None = None
    engine: str = "loop"
    deflate: int = 0

    def __post_init__(self) -> None:
        one_of("precision", self.precision, DTYPES)
        whole("deflate", self.deflate, 0)


DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Quiet:
    """What a measurement tells its caller: nothing. Subclass it, or pass an object with these methods."""

    def start(self, total: int) -> None:
        """About how many evaluations on a batch there will be."""

    def note(self, text: str) -> None:
        """The measure begun, and its value so far."""

    def advance(self, n: int) -> None:
        """So many evaluations are done."""


def measure_each(
    module: nn.Module, data: ImageData, options: dict[str, dict[str, Any]], setting: Setting, show: Any = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(name, record)`` of each measure as it is finished: value, errors, seconds, and what it was taken on.

    Interrupted by Ctrl-C, it gives the record of the draws done so far, marked ``interrupted``, and then stops with
    :class:`KeyboardInterrupt`.

    Raises:
        InputError: bad options, a network that does not take the data, ``deflate`` with no trace to take.
    """
    show = Quiet() if show is None else show
    objective = objective_of(
        module, data, setting.examples, statistics=setting.statistics, dtype=DTYPES[setting.precision],
        batch_size=setting.batch_size, engine=setting.engine,
    )
    theta = P.pmap(lambda p: p.to(DTYPES[setting.precision]), P.parameters(module))
    needed = any(measures.MEASURES[name].needs_groups for name in options)
    try:
        groups = scale_groups(module, probe_batch(data)) if needed else None
        with torch.no_grad():
            objective(theta)
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{type(module).__name__} does not take {data.name}'s inputs of shape {data.input_shape} and "
                         f"{len(data.classes)} classes ({str(error).splitlines()[0][:100]})") from error
    built = {name: measures.build_measure(name, groups, **chosen) for name, chosen in options.items()}
    deflated = {name: setting.deflate if _is_trace(measure) else 0 for name, measure in built.items()}
    if setting.deflate and not any(deflated.values()):
        raise InputError(f"deflate={setting.deflate} with {', '.join(built)}; expected a trace among the measures: add "
                         "hessian_trace or relative_trace")
    # how long a target takes nobody knows
    known = sum(deflated[name] + measure.cost() for name, measure in built.items()) * objective.batches_seen
    show.start(known if setting.target is None else 0)
    objective.on_evaluation = show.advance
    for name, measure in built.items():
        given = {**measures.MEASURES[name].options(), **options[name]}
        record = _record(name, measure, objective, theta, setting, deflated[name], show)
        yield name, record | {"options": given, "deflate": deflated[name]}


def _is_trace(measure: measures.Measured) -> bool:
    return isinstance(measure, Measure) and is_trace(measure.directions, measure.profile, measure.reduce)


def _record(
    name: str, measure: measures.Measured, objective: Objective, theta: Params, setting: Setting, deflate: int,
    show: Any,
) -> dict[str, Any]:
    show.note(name)
    so_far: list[Estimate] = []

    def keep(estimate: Estimate) -> None:
        so_far[:] = [estimate]
        if setting.target is not None:
            show.note(f"{name} {estimate.value:.4g} ± {estimate.half_width:.1g}")

    started, interrupted = time.perf_counter(), False
    sampling = Sampling(setting.target, setting.promote, keep, deflate=deflate)
    with exact_norms(objective.module) if setting.exact else nullcontext():
        try:
            estimate = measure(objective, theta, P.seeded(setting.seed, P.first(theta).device), sampling)
        except KeyboardInterrupt:
            if not so_far:
                raise
            estimate, interrupted = so_far[0], True
    seconds = time.perf_counter() - started
    show.advance(max(0, deflate + measure.cost() - sum(estimate.evaluations.values())) * objective.batches_seen)
    return record_of(estimate) | {"seconds": seconds, "exact_norms": setting.exact, "interrupted": interrupted}


def record_of(estimate: Estimate) -> dict[str, Any]:
    """An estimate as plain values: all of it but the direction."""
    left_out = ("direction", "unit")
    plain = {f.name: getattr(estimate, f.name) for f in fields(estimate) if f.name not in left_out}
    return plain | {
        "half_width": estimate.half_width, "interval": list(estimate.interval), "spread": estimate.spread,
    }


def measure_all(
    module: nn.Module, data: ImageData, options: dict[str, dict[str, Any]], setting: Setting = Setting(),
    show: Any = None,
) -> dict[str, Any]:
    """:func:`measure_each` to its end."""
    return dict(measure_each(module, data, options, setting, show))
