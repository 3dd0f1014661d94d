"""Measures taken along training: values, errors, ``η·λ_max``, effective learning rates, and what they cost.

A tracked measure is what ``bnsharp measure RUN --examples N --precision float32 --seed SEED`` would give with the same
options: batch statistics, plain cross-entropy, the first N training examples without augmentation. Its random numbers
are the same at every epoch, so that a curve moves with the network and not with the draws. It costs the run time and
nothing else: training's own numbers are the same with and without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnsharp import params as P
from bnsharp.checkpoint import METRICS, TIMING, RunFolder
from bnsharp.data import ImageData
from bnsharp.errors import InputError, NotFiniteError
from bnsharp.experiments.config import RunConfig
from bnsharp.groups import ScaleGroups
from bnsharp.measures import MEASURES, Measured, build_measure
from bnsharp.objective import Objective
from bnsharp.types import Estimate, Params, TrackingContext

CHEAP: dict[str, int] = {"steps": 3, "draws": 20, "certify": 0, "iterations": 30, "halvings": 8}
"""Largest values of these options while tracking, where a measure has them and nothing else is asked for."""

EVALUATIONS = "tracking_evaluations"
"""Losses, gradients and Hessian products spent on an epoch's tracking; never part of ``gradient_evaluations``."""

TRIED = 8
"""Examples on which tracked measures are tried before a run starts."""

TRIAL: dict[str, int] = {
    "steps": 0, "restarts": 0, "polish": 0, "draws": 2, "nodes": 3, "certify": 0, "iterations": 2, "halvings": 1,
    "pilot": 1,
}
"""Largest values of these options in that trial, which only asks whether a measure can be taken."""

DERIVED: dict[str, dict[str, Callable[[TrackingContext, float], float]]] = {
    # gradient descent at rate η on a quadratic is stable below η·λ_max = 2 (Cohen et al. 2021, arXiv:2103.00065)
    "hessian_top": {"lr_hessian_top": lambda context, value: context.lr * value},
}
"""What else is recorded with a measure: column → ``(context, value) -> number``."""

RATES = ("effective_lr_mean", "effective_lr_min", "effective_lr_max")


@dataclass(frozen=True)
class Tracked:
    """The tracker of a run (:data:`bnsharp.types.Tracker`): every measure, and effective learning rates.

    Attributes:
        measures: by name.
        objective: ``module -> Objective`` on the examples that are tracked.
        groups: scale groups of the network.
        seed: of every measure's random numbers, at every epoch.
        trials: short forms of the measures for :meth:`attempt`; None takes the measures.
    """

    measures: Mapping[str, Measured]
    objective: Callable[[nn.Module], Objective]
    groups: ScaleGroups
    seed: int
    trials: Mapping[str, Measured] | None = None

    def __call__(self, module: nn.Module, context: TrackingContext) -> dict[str, float]:
        """``NAME``, ``NAME_stderr``, ``NAME_error``, derived columns, ``effective_lr_*``, ``tracking_evaluations``.

        A measure whose perturbed losses are not finite is NaN: training goes on.
        """
        objective, theta = self.objective(module), P.parameters(module)
        columns: dict[str, float] = {}
        spent = 0
        for name, measure in self.measures.items():
            before = sum(objective.evaluations.values())
            estimate = self._estimate(measure, objective, theta)
            columns |= _columns(name, estimate, context)
            counted = {} if estimate is None else estimate.evaluations  # under another criterion, say
            spent += sum(counted.values()) or sum(objective.evaluations.values()) - before
        return columns | effective_rates(self.groups, theta, context.lr) | {EVALUATIONS: spent}

    def _estimate(self, measure: Measured, objective: Objective, theta: Params) -> Estimate | None:
        try:
            return measure(objective, theta, P.seeded(self.seed, P.first(theta).device))
        except NotFiniteError:
            return None

    def attempt(self, module: nn.Module, objective: Objective) -> None:
        """Take every measure once, so that one that cannot be taken is told before training starts.

        Raises:
            InputError: what a measure says of its options or of the network; a network that it cannot be taken of (one
                without second derivatives, say).
        """
        for name, measure in (self.measures if self.trials is None else self.trials).items():
            try:
                self._estimate(measure, objective, P.parameters(module))
            except RuntimeError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
                raise InputError(f"{name} cannot be taken of {type(module).__name__} ({reason}); expected a measure "
                                 "that can: leave it out of track") from error


def _columns(name: str, estimate: Estimate | None, context: TrackingContext) -> dict[str, float]:
    value, stderr, error = (math.nan,) * 3 if estimate is None else (estimate.value, estimate.stderr, estimate.error)
    derived = {column: of(context, value) for column, of in DERIVED.get(name, {}).items()}
    return {name: value, f"{name}_stderr": stderr, f"{name}_error": error, **derived}


def effective_rates(groups: ScaleGroups, theta: Params, lr: float) -> dict[str, float]:
    """Mean, least and largest ``η/‖θ_i‖²`` over the scale-invariant groups; none without such groups.

    A step of size η on an invariant group turns it as a step of size ``η/‖θ_i‖²`` turns a unit vector (van Laarhoven
    2017, arXiv:1706.05350, section 2). Groups of norm 0 are left out.
    """
    norms = groups.resolve(theta).partition.norms(theta).double()
    rates = lr / norms[norms > 0] ** 2
    if not len(rates):
        return {}
    return dict(zip(RATES, (float(rates.mean()), float(rates.min()), float(rates.max())), strict=True))


def tracked_options(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Every option of every tracked measure: those asked for, else cheap ones, else the measure's own.

    Raises:
        InputError: an unknown measure (with the nearest known one).
    """
    return {name: _cheap(name) | config.track_options.get(name, {}) for name in config.track}


def _cheap(name: str) -> dict[str, Any]:
    if name not in MEASURES:
        build_measure(name)  # raises
    return _at_most(MEASURES[name].options(), CHEAP)


def _at_most(options: dict[str, Any], largest: Mapping[str, int]) -> dict[str, Any]:
    """The options, none of those in ``largest`` above its value there."""
    return options | {k: v if options[k] is None else min(v, options[k]) for k, v in largest.items() if k in options}


def tracker(
    config: RunConfig, groups: ScaleGroups, data: ImageData,
    objective: Callable[[nn.Module, ImageData, int], Objective],
) -> Tracked | None:
    """The configuration's tracker; None where nothing is tracked.

    Raises:
        InputError: an unknown measure or option, options out of range.
    """
    if not config.track:
        return None
    chosen, n = tracked_options(config), tracked_examples(config, data)
    built = {name: build_measure(name, groups, **options) for name, options in chosen.items()}
    trials = {name: build_measure(name, groups, **_at_most(options, TRIAL)) for name, options in chosen.items()}
    return Tracked(built, lambda module: objective(module, data, n), groups, config.seed, trials)


MOST_EXAMPLES = 2000
"""Examples that are tracked on unless told otherwise, at most."""


def tracked_examples(config: RunConfig, data: ImageData) -> int:
    """On how many training examples measures are tracked."""
    return config.track_examples or min(MOST_EXAMPLES, len(data.train_labels))


def cost(folder: RunFolder) -> tuple[int, float] | None:
    """Evaluations and seconds that a run's tracking took so far, from its records; None where it tracked nothing."""
    spent = [r[EVALUATIONS] for r in folder.records(METRICS) if EVALUATIONS in r]
    seconds = [r["tracking_seconds"] for r in folder.records(TIMING) if "tracking_seconds" in r]
    return (sum(spent), sum(seconds)) if spent else None


def tracked_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """What tracking wrote into a record, without errors and cost: for displays."""
    shown = {*MEASURES, *RATES, *(column for columns in DERIVED.values() for column in columns)}
    return {k: v for k, v in record.items() if k in shown} if EVALUATIONS in record else {}
