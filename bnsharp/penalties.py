"""Penalties ``L + λ S``: a measure's gradient added to the loss's, and the step that needs only one gradient.

A regulariser is a pair: ``init(θ) -> state`` and ``step(objectives, θ, weight=, state=, generator=) -> Step``. It
returns the gradient to descend, so that any ``torch.optim`` optimizer and schedule works underneath. ``objectives[0]``
is the loss on the step's batch; the others, if given, are fresh batches for the regulariser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.balls import GroupBall
from bnsharp.checks import at_least, flag, one_of, positive, whole
from bnsharp.directions import Ascend, Given
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.laws import Sphere
from bnsharp.measures import DEFAULT_SEED, Measure
from bnsharp.penalty_gradients import GRADIENTS, Search, Slope
from bnsharp.starts import Start, Steepest, count, counted, fraction, packed, unpacked
from bnsharp.types import Params, State, Step


class Regularizer(Protocol):
    """``init`` and ``step`` with explicit state: tensors only, so that it can be checkpointed."""

    def init(self, params: Params) -> State: ...

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step: ...


def check_weight(weight: float) -> None:
    """Raise :class:`InputError` unless λ is finite and not negative."""
    at_least("weight", weight, 0)


def gradients(objectives: Sequence[AbstractObjective]) -> int:
    """Gradients that these objectives have evaluated so far, products with second derivatives among them."""
    once = {id(o): o for o in objectives}.values()
    return sum(o.evaluations["gradients"] + o.evaluations["products"] for o in once)


def unknown_value(like: Tensor) -> Tensor:
    """NaN: what a step did not compute."""
    return like.new_full((), float("nan"))


@dataclass(frozen=True)
class Plain:
    """No regulariser: the gradient of the loss."""

    def init(self, params: Params) -> State:
        return {}

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        check_weight(weight)
        loss, gradient = objectives[0].value_and_grad(params)
        zero = torch.zeros_like(loss)
        return Step(loss, zero, gradient, 1, state, zero, plain=gradient)


@dataclass(frozen=True)
class Penalty:
    """``L + λ S`` for any measure S.

    Args:
        measure: what is penalised; its geometry and directions are used as they are.
        gradient: how ``∇S`` is taken.

            - ``"two-point"``: ``κ·sign(f(δ))·(∇L(θ+δv) − ∇L(θ))`` (Yi et al. 2019, proposition 1), the search scored by
              ``|f(δ)|`` from losses already computed;
            - ``"central"``: ``κ·sign·(∇L(θ+δv) − ∇L(θ−δv))/2``;
            - ``"tangent"``: two-point without its component along each scale-invariant group, which would otherwise
              push the group's norm up;
            - ``"exact"``: the derivative of S with ``v = s(θ) ⊙ u`` moving with θ, the search scored by S itself;
              orthogonal to θ_i on every scale-invariant group.
        clip: largest norm of ``∇S``; None does not clip.
        start: where the search for the sharpest direction begins (:mod:`bnsharp.starts`).
        reuse: steps for which a direction found is used, in unit coordinates (Yi et al. 2019, algorithm 1, inner loop).

    ``weight`` λ = 1/κ with the two-point gradient and the loss's own batch is a sharpness-aware step in the measure's
    geometry (``sam`` has κ = 1).

    Raises:
        InputError: an unknown gradient, clip ≤ 0, ``"tangent"`` without scale groups, λ < 0 or not finite, a start or
            reuse with a measure that draws its directions, a start that nothing would ever move.
    """

    measure: Measure
    gradient: str = "two-point"
    clip: float | None = None
    start: Start = field(default_factory=Steepest)
    reuse: int = 1

    def __post_init__(self) -> None:
        one_of("gradient", self.gradient, GRADIENTS)
        whole("reuse", self.reuse)
        if self.clip is not None:
            positive("clip", self.clip)
        if not isinstance(self.measure, Measure):
            raise InputError(
                f"a penalty of {type(self.measure).__name__}; expected a bnsharp.Measure (geometry, directions, "
                "profile, reduce): a function over measures has no gradient of its own"
            )
        if self.gradient == "tangent" and not isinstance(self.measure.geometry.ball, GroupBall):
            raise InputError("gradient='tangent' projects along scale groups; expected a groupwise geometry")
        if self.gradient != "exact":
            self.measure.profile.secant()
        searches = isinstance(self.measure.directions, Ascend)
        if not searches and (self.start != Steepest() or self.reuse > 1):
            raise InputError(
                f"start={type(self.start).__name__}, reuse={self.reuse} with {type(self.measure.directions).__name__}; "
                "expected a measure that searches its direction: pass one with Ascend"
            )
        if isinstance(self.measure.directions, Ascend) and not (self.start.moves or self.measure.directions.steps):
            raise InputError("a warm start with 0 search steps keeps its first direction for ever; expected steps >= 1")

    def init(self, params: Params) -> State:
        state = self.start.init(params)
        if self.reuse > 1:
            state = {**state, "steps": count(0), **packed("held", P.zeros_like(params))}
        return state

    def penalty(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Params]:
        """``(S, ∇S)``, before any clipping, as at a first step; generator None is one seeded with 0."""
        generator = P.seeded(DEFAULT_SEED, P.first(params).device) if generator is None else generator
        slope, _ = self._slope(Anchor(as_objective(objective), params), self.init(params), generator)
        return slope.value, slope.gradient

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        check_weight(weight)
        before = gradients(objectives)
        loss, gradient = objectives[0].value_and_grad(params)
        anchor = Anchor(objectives[1], params) if len(objectives) > 1 else Anchor(objectives[0], params, loss, gradient)
        slope, state = self._slope(anchor, state, generator)
        size = slope.change.norm()
        factor = weight if self.clip is None else weight * (self.clip / size.clamp(min=self.clip))
        ratio = P.safe_divide(factor * size, P.norm(gradient))
        total = slope.change.added_to(gradient, factor)
        return Step(loss, slope.value, total, gradients(objectives) - before, state, ratio, plain=gradient)

    def _slope(self, anchor: Anchor, state: State, generator: torch.Generator) -> tuple[Slope, State]:
        """``S``, ``∇S``, and the state after."""
        take, search = GRADIENTS[self.gradient], Search(self.measure, anchor, generator, keep=self.reuse > 1)
        steps = counted(state) if self.reuse > 1 else 0
        if steps % self.reuse:
            held = Given(unpacked(state, "held", search.frame.like))
            slope = take(Search(self.measure, anchor, generator, directions=held))
            return slope, {**state, "steps": count(steps + 1)}
        if self.start != Steepest():
            slope_at, begin = self.start.slope(search.frame, anchor, state), self.start.begin(search.frame, state)
            directions = self.measure.directions
            if begin is not None and isinstance(directions, Ascend):
                directions = replace(directions, begin=begin)
            search = Search(self.measure, anchor, generator, directions, slope_at)
        slope = take(search)
        after = self.start.after(state, anchor, slope.u)
        if self.reuse > 1:
            assert slope.u is not None
            after = {**after, "steps": count(steps + 1), **packed("held", slope.u)}
        return slope, after


@dataclass(frozen=True)
class Averaged:
    """``∇L(θ + δ v)``, v the steepest direction of an average of past gradients: **one** gradient per step.

    This is the two-point penalty at ``c = λκ = 1`` with ``sign(a) = +1`` and the direction of the average instead of
    the gradient's. The average ``m ← β m + (1−β) ∇L(θ+δv)`` collects what is evaluated anyway; at the first step it is
    empty and the gradient at θ is taken. The loss reported is ``L(θ+δv)``; penalty and ratio are not known (NaN).

    ``descent`` puts v on the side that the step goes to, as momentum-SAM does (Becker et al. 2024, arXiv:2401.12033,
    where β is the optimizer's momentum: both averages point in one direction).

    Args:
        measure: its geometry and the two-point form of its profile; directions ``Ascend(0)``.
        averaging: β in [0, 1).
        descent: take −v.

    Raises:
        InputError: β outside [0, 1), a measure with another search, a weight at which c is not 1.
    """

    measure: Measure
    averaging: float = 0.9
    descent: bool = False

    def __post_init__(self) -> None:
        fraction("averaging", self.averaging)
        flag("descent", self.descent)
        self.measure.profile.secant()
        if self.measure.directions != Ascend(0):
            raise InputError(
                f"directions={self.measure.directions}; expected Ascend(0): with one gradient per step there is "
                "nothing to search with"
            )

    def init(self, params: Params) -> State:
        return {"known": count(0), **packed("average", P.zeros_like(params))}

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        kappa, delta = self.measure.profile.secant()
        if not abs(weight * kappa - 1) <= 1e-6:
            raise InputError(
                f"weight={weight:g} with one gradient per step; expected weight={1 / kappa:.9g}, at which c = 1: the "
                "gradient at θ is never taken"
            )
        if len(objectives) > 1:
            raise InputError("a second batch with one gradient per step; expected the loss's own batch alone")
        average, point = unpacked(state, "average", params), params
        if counted(state, "known"):
            frame, factor = self.measure.geometry.at(params), -delta if self.descent else delta
            point = frame.summit(average, factor, lambda: Sphere()(frame.ball, frame.like, generator))
        loss, gradient = objectives[0].value_and_grad(point)
        average = P.combine(self.averaging, average, 1 - self.averaging, gradient)
        nothing = unknown_value(loss)
        return Step(loss, nothing, gradient, 1, {"known": count(1), **packed("average", average)}, nothing)
