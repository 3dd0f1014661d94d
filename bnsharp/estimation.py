"""A measure — geometry, directions, profile, reduce — and how its value is taken: errors, precision, sampling.

``measure(objective, θ, generator) -> Estimate``; ``measure.penalty(objective, θ, generator)`` is the same number,
differentiable in θ with the directions' unit coordinates held fixed (Danskin).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.balls import JointBall
from bnsharp.bounds import upper_bound
from bnsharp.checks import one_of, positive, whole
from bnsharp.deflation import Deflation, deflated, plus
from bnsharp.directions import Directions
from bnsharp.errors import InputError, NotDifferentiableError, NotFiniteError
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.geometry import Frame, Geometry
from bnsharp.precision import CHECKED, rounding_error
from bnsharp.profiles import Profile
from bnsharp.reduce import Reduce
from bnsharp.scores import ExactScore
from bnsharp.types import Estimate, Evaluated, Found, Params

DEFAULT_SEED = 0
"""The seed used where no generator is given: measuring twice gives the same number."""
ROUND = 32
"""Draws evaluated between two looks at the sampling error: what an interruption can lose."""
LONGEST = 100
"""With a target error, sampling stops at this many times the measure's draws."""
ROUNDING = 1e-3
"""A value in low precision is taken again in float64 when its rounding error exceeds this fraction of it."""
SOLVE = 30
"""Products that an eigenvalue solve takes, about."""


@dataclass(frozen=True)
class Sampling:
    """How long to sample, and in what precision.

    Raises:
        InputError: a target that is no positive number; an unknown ``rounding``, or a modelled one with ``promote``;
            a negative ``deflate``.

    Attributes:
        target: sample on until the interval's half width is at most this fraction of the value; None takes the
            measure's own number of draws. Never fewer than those, and at most ``LONGEST`` times as many.
        promote: whether a value whose rounding error is too large is taken again in float64.
        rounding: ``"measured"``: the rounding error of a value in low precision is its difference to float64 at a few
            directions, which cost more than the value itself where there are few. ``"modelled"``: a bound for losses
            that are rounded once, ``4ε(1 + |L|)`` each; rounding inside a network can exceed it.
        on_estimate: called with every estimate so far, about every ``ROUND`` draws.
        deflate: for traces (a mean of ``vᵀHv`` over independent coordinates): as many products go first into a basis of
            the sharpest directions, whose part of the trace is then exact, and the draws see what is left
            (:mod:`bnsharp.deflation`); 0 draws only.
    """

    target: float | None = None
    promote: bool = True
    on_estimate: Callable[[Estimate], None] | None = None
    rounding: str = "measured"
    deflate: int = 0

    def __post_init__(self) -> None:
        if self.target is not None:
            positive("target", self.target)
        whole("deflate", self.deflate, 0)
        one_of("rounding", self.rounding, ("measured", "modelled"))
        if self.promote and self.rounding == "modelled":
            raise InputError("promote=True with rounding='modelled'; expected a rounding error that is measured: pass "
                             "promote=False to keep the precision")


ONCE = Sampling()
"""The measure's own number of draws."""


@dataclass(frozen=True)
class Measure:
    """A perturbation measure: any combination of the four slots.

    Args:
        geometry: which perturbations are allowed.
        directions: drawn, searched or given.
        profile: what is read off the loss along each.
        reduce: many values to one.
        certify: eigenvalue solves spent on an upper bound of a searched maximum (:mod:`bnsharp.bounds`); 0 gives none.

    Raises:
        InputError: a negative ``certify``, Lanczos for what is no quadratic form on a joint ball.
    """

    geometry: Geometry
    directions: Directions
    profile: Profile
    reduce: Reduce
    certify: int = 0

    def __post_init__(self) -> None:
        whole("certify", self.certify, 0)
        joint = isinstance(self.geometry.ball, JointBall)
        if getattr(self.directions, "needs_form", False) and not (self.profile.is_form and joint):
            raise InputError(
                f"directions={type(self.directions).__name__} with {type(self.profile).__name__} on "
                f"{type(self.geometry.ball).__name__}; expected a quadratic form (Curvature, GaussNewton) on a joint "
                "ball: search with Ascend"
            )

    def __call__(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
        sampling: Sampling = ONCE,
    ) -> Estimate:
        """Measure at θ.

        Args:
            objective: an objective, or a plain function of parameters.
            params: θ; its dtype is the precision of the measurement.
            generator: source of every random number; None is a generator seeded with 0.
            sampling: a target error, promotion to float64.

        Raises:
            InputError: non-finite parameters or loss, a module that stays random when measured.
        """
        objective = as_objective(objective)
        params = P.pmap(torch.Tensor.detach, params)
        check(objective, params)
        if generator is None:
            generator = P.seeded(DEFAULT_SEED, P.first(params).device)
        objective.engines_taken.clear()
        before, state = objective.evaluations.copy(), generator.get_state()
        run = _Run(self, objective, params, generator)
        estimate = run.finish(sampling)
        low = torch.finfo(P.first(params).dtype).eps > torch.finfo(torch.float64).eps
        if low and sampling.rounding == "measured":
            values, units = run.checked()
            del run  # with its gradient, its graph and what its search has kept
            rounding = rounding_error(values, units, self.profile, self.geometry, objective, params)
            if rounding is None:  # no float64 here: the modelled error stands
                pass
            elif sampling.promote and not rounding <= ROUNDING * abs(estimate.value):
                generator.set_state(state)
                run = _Run(self, objective, P.pmap(Tensor.double, params), generator)
                estimate = replace(run.finish(sampling), promoted=True)
            else:
                estimate = replace(estimate, error=estimate.error + rounding)
        spent = objective.evaluations - before
        return replace(estimate, evaluations={k: spent.get(k, 0) for k in ("gradients", "losses", "products")})

    def cost(self) -> int:
        """Losses, gradients and products that one measurement takes, about: for progress displays."""
        if self.directions.is_drawn:
            return 1 + self.directions.cost() * self.profile.cost()
        search = 2 * self.directions.cost() * self.profile.coarse().cost()
        return 2 + search + 2 * self.profile.cost() + SOLVE * self.certify

    def penalty(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The measure as a scalar, differentiable in ``params``; directions found at ``params`` detached."""
        objective = as_objective(objective)
        fixed = P.pmap(torch.Tensor.detach, params)
        found = self.search(Anchor(objective, fixed), generator)
        n = P.count(found.u)

        def moving(i: int) -> Params:
            return self.directions.moving(P.pmap(torch.Tensor.detach, P.pick(found.u, i)), self.geometry, params)

        v = P.Lazy(n, moving)
        return self.reduce(self.profile(objective, params, v))[0]

    def search(self, anchor: Anchor, generator: torch.Generator | None) -> Found:
        """The directions at the anchor; a search is scored by the profile, with fewer points on a line."""
        return self._find(anchor, self.geometry.at(anchor.params), generator)

    def _find(self, anchor: Anchor, frame: Frame, generator: torch.Generator | None) -> Found:
        score = ExactScore(self.profile.coarse(), frame, anchor)
        if getattr(self.directions, "needs_form", False):
            self.profile.prepare(anchor)
        if generator is None:
            generator = P.seeded(DEFAULT_SEED, P.first(anchor.params).device)
        return self.directions(score, frame, generator)


def check(objective: AbstractObjective, params: Params) -> None:
    """Raise :class:`InputError` unless θ is finite and the objective fit for measuring."""
    for name, value in params.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"parameter {name!r} holds NaN or infinite values; expected finite parameters")
    objective.check(params)


class _Run:
    """One measurement at one θ in one precision: directions found, then values of more and more of them."""

    def __init__(self, measure: Measure, objective: AbstractObjective, params: Params, generator: torch.Generator):
        self.measure, self.objective, self.generator = measure, objective, generator
        self.anchor, self.frame = Anchor(objective, params), measure.geometry.at(params)
        self.values: list[Evaluated] = []
        self.deflation: Deflation | None = None
        self.base: Evaluated | None = None

    def finish(self, sampling: Sampling) -> Estimate:
        """The last estimate: when the draws are used up, or the target is met."""
        last: Estimate | None = None
        if sampling.deflate:
            self._deflate(sampling.deflate)
        for estimate in self._estimates(sampling.target):
            last = estimate
            if sampling.on_estimate is not None:
                sampling.on_estimate(estimate)
        assert last is not None
        return last

    def _estimates(self, target: float | None) -> Iterator[Estimate]:
        directions = self.measure.directions
        if not directions.is_drawn:
            self.found = self.measure._find(self.anchor, self.frame, self.generator)
            if self.found.known is not None and self.objective.batches_seen == 1:  # several: each one's part is wanted
                self.values.append(self.found.known)
            else:
                self._evaluate(range(P.count(self.found.u)))
            yield self._searched(target)
            return
        least = directions.cost()
        most = least if target is None else LONGEST * least
        score = ExactScore(self.measure.profile, self.frame, self.anchor)
        self.found = directions.times(most // least)(score, self.frame, self.generator)
        done = 0
        while done < most:
            stop = min(done + ROUND, least if done < least else most)
            self._evaluate(range(done, stop))
            done = stop
            estimate = self._estimate(target, draws=done)
            yield estimate
            if done >= least and estimate.converged is not False:
                return

    def _deflate(self, rank: int) -> None:
        measure = self.measure
        slots = (measure.directions, measure.profile, measure.reduce)
        self.deflation, self.base = deflated(*slots, self.anchor, self.frame, rank, self.generator)

    def _evaluate(self, indices: range) -> None:
        units = P.Lazy(len(indices), lambda i: _unit(self.found.u, self.deflation, indices[i]))
        known = self.measure.profile.evaluate(self.anchor, self._placed(units))
        bad = int((~known.values.isfinite()).sum())
        if bad:
            raise NotFiniteError(
                f"the loss is not finite at {bad} of {len(known.values)} perturbed points; "
                "expected finite losses: make the perturbation smaller"
            )
        self.values.append(known)

    def _placed(self, u: P.Lazy) -> P.Lazy:
        return P.Lazy(len(u), lambda i: self.frame.place(u[i]))

    def _reduced(self) -> tuple[float, float, float, float, float | None]:
        """Value, standard error, effective samples, numerical error, standard error over batches."""
        evaluated = self.values if self.base is None else [plus(k, self.base) for k in self.values]
        values = torch.cat([k.values for k in evaluated]).cpu().double()
        errors = torch.cat([k.errors for k in evaluated])
        value, stderr, effective = self.measure.reduce(values)
        if not self.measure.directions.is_drawn:  # nothing was sampled
            stderr = torch.zeros_like(stderr)
        rests = [k.left_out for k in evaluated]
        data = None
        if all(rest is not None for rest in rests):
            rows = torch.cat(rests, 1).cpu().double()  # type: ignore[arg-type]
            left_out = torch.stack([self.measure.reduce(row)[0] for row in rows])
            data = float(((len(left_out) - 1) * left_out.var(correction=0)).sqrt())
        return float(value), float(stderr), float(effective), float(errors.max()) + self.found.error, data

    def _estimate(self, target: float | None, **more: object) -> Estimate:
        value, stderr, effective, error, data = self._reduced()
        estimate = Estimate(
            value=value, stderr=stderr, error=error, effective_samples=effective, stderr_data=data,
            statistics=self.objective.statistics, batch_size=self.objective.batch_size,
            examples=self.objective.examples, batches=max(1, self.objective.batches_seen),
            precision=str(P.first(self.anchor.params).dtype).removeprefix("torch."),
            engine=self.objective.engine_used,
            **more,  # type: ignore[arg-type]
        )
        if target is None:
            return estimate
        return replace(estimate, converged=estimate.half_width <= target * abs(value))

    def _searched(self, target: float | None) -> Estimate:
        values = torch.cat([k.values for k in self.values])
        unit = P.pick(self.found.u, int(values.argmax()))
        estimate = self._estimate(
            target, unit=unit, direction=self.frame.place(unit), restarts=self.found.restarts
        )
        if not self.measure.certify:
            return estimate
        try:
            upper = upper_bound(
                self.measure.profile, self.anchor, self.frame, unit, estimate.value, self.generator,
                self.measure.certify,
            )
        except NotDifferentiableError:  # the value takes first derivatives alone
            upper = None
        return replace(estimate, upper=None if upper is None else max(upper, estimate.value))

    def checked(self) -> tuple[Tensor, P.Lazy]:
        """Values ``[n]`` at the few directions that float64 is compared at, and those; they do not hold the run."""
        values = torch.cat([k.values for k in self.values])
        n = len(values)
        picks = list(range(min(CHECKED, n))) if self.measure.directions.is_drawn else [int(values.argmax())]
        u, deflation = self.found.u, self.deflation
        return values[picks], P.Lazy(len(picks), lambda i: _unit(u, deflation, picks[i]))


def _unit(u: Any, deflation: Deflation | None, i: int) -> Params:
    """Unit direction i: a draw without its part in what is known already."""
    unit = P.pick(u, i)
    return unit if deflation is None else deflation.project(unit)
