"""Measuring a trained network before and after a rescaling that does not change its function."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnsharp import measures
from bnsharp import params as P
from bnsharp.checks import suggest
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.config import parse_setting
from bnsharp.experiments.run import objective_of, probe_batch
from bnsharp.groups import ScaleGroups, scale_groups
from bnsharp.modes import exact_norms
from bnsharp.types import Params


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
    top = measures.hessian_top()
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


PARTS = 5
"""How often :func:`before_and_after` ticks."""


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


def measure_all(
    module: nn.Module,
    data: ImageData,
    options: dict[str, dict[str, Any]],
    *,
    examples: int | None = None,
    statistics: str = "batch",
    precision: str = "float64",
    exact: bool = False,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda total: None,
    on_measure: Callable[[str], None] = lambda name: None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """The named measures of a network on its training data: value, stderr, error, upper, seconds and on what.

    ``on_start`` is told about how many evaluations there will be, ``advance`` of each, ``on_measure`` the name begun.

    Raises:
        InputError: bad options, a network that does not take the data.
    """
    dtypes = {"float64": torch.float64, "float32": torch.float32}
    if precision not in dtypes:
        raise InputError(f"precision={precision!r}; expected float64 or float32")
    objective = objective_of(module, data, examples, statistics=statistics, dtype=dtypes[precision])
    theta = P.pmap(lambda p: p.to(dtypes[precision]), P.parameters(module))
    needed = any(measures.MEASURES[name].needs_groups for name in options)
    try:
        groups = scale_groups(module, probe_batch(data)) if needed else None
        with torch.no_grad():
            objective(theta)
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{type(module).__name__} does not take {data.name}'s inputs of shape {data.input_shape} and "
                         f"{len(data.classes)} classes ({str(error).splitlines()[0][:100]})") from error
    built = {name: measures.build_measure(name, groups, **chosen) for name, chosen in options.items()}
    results: dict[str, Any] = {}
    on_start(sum(measure.cost() for measure in built.values()))
    objective.on_evaluation = advance
    with exact_norms(module) if exact else nullcontext():
        for name, measure in built.items():
            on_measure(name)
            started = time.perf_counter()
            estimate = measure(objective, theta, P.seeded(seed, P.first(theta).device))
            results[name] = {
                "value": estimate.value, "stderr": estimate.stderr, "error": estimate.error, "upper": estimate.upper,
                "seconds": time.perf_counter() - started, "statistics": estimate.statistics,
                "batch_size": estimate.batch_size, "precision": precision, "exact_norms": exact,
                "evaluations": estimate.evaluations,
                "options": {**measures.MEASURES[name].options(), **options[name]},
            }
            advance(max(0, measure.cost() - sum(estimate.evaluations.values())))
    return results
