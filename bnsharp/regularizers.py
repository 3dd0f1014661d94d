"""Regularisers: what a measure does to the gradient that training descends.

A regulariser is a pair: ``init(θ) -> state`` and ``step(objectives, θ, weight=, state=, generator=) -> Step``. It
returns the gradient to descend, so that any ``torch.optim`` optimizer and schedule works underneath. ``objectives[0]``
is the loss on the step's batch; a second one, if given, is a fresh batch for the regulariser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import at_least, one_of, positive
from bnsharp.directions import Ascend
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.geometry import Elementwise, Euclidean, GroupBall
from bnsharp.measures import DEFAULT_SEED, Measure
from bnsharp.profiles import Anchor, Rise
from bnsharp.reduce import Maximum, Reduce
from bnsharp.scores import ExactScore, SecantScore
from bnsharp.types import Params, Scored, State, Step


class Regularizer(Protocol):
    """``init`` and ``step`` with explicit state."""

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


def _gradients(objectives: Sequence[AbstractObjective]) -> int:
    return sum(o.evaluations["gradients"] for o in {id(o): o for o in objectives}.values())


# ---------------------------------------------------------------- gradients of a penalty


def _score_all(score: SecantScore | ExactScore, u: Any) -> Scored:
    """Scores of every direction: a batch at once, a sequence made on demand one by one."""
    if not isinstance(u, P.Lazy):
        return score(u, last=True)
    parts = [score(P.batch(u[i]), last=True) for i in range(len(u))]

    def join(items: list[Any]) -> Any:
        if items[0] is None:
            return None
        if isinstance(items[0], Tensor):
            return torch.cat(items)
        return P.make({k: join([x[k] for x in items]) for k in items[0].keys()}, (len(u),))

    return Scored(*(join([getattr(p, name) for p in parts]) for name in ("value", "gradient", "extra")))


def _reduced(reduce: Reduce, values: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced value and its derivative ``w [n]`` with respect to each value."""
    leaf = values.detach().requires_grad_()
    with torch.enable_grad():
        value = reduce(leaf)[0]
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _weighted(weights: Tensor, x: Params) -> Params:
    """``Σ_i w_i x_i`` over a batch."""
    if len(weights) == 1:
        return P.scaled(P.pick(x, 0), weights[0])
    return P.make({k: torch.tensordot(weights.to(v.dtype), v, dims=1) for k, v in x.items()})


def _secant_scores(measure: Measure, anchor: Anchor, generator: torch.Generator) -> tuple[SecantScore, Any, Scored]:
    frame = measure.geometry.at(anchor.params)
    score = SecantScore(measure.profile, frame, anchor)
    found = measure.directions(score, frame, generator)
    return score, found.u, found.scored if found.scored is not None else _score_all(score, found.u)


def _two_point(measure: Measure, anchor: Anchor, generator: torch.Generator) -> tuple[Tensor, Params]:
    """``κ·sign(f(δ))·(∇L(θ+δv) − ∇L(θ))``: the gradient of ``κ|f(δ)|`` with v constant."""
    score, _, scored = _secant_scores(measure, anchor, generator)
    value, w = _reduced(measure.reduce, scored.value)
    c = w * score.kappa * scored.extra["sign"]
    return value, P.combine(1.0, _weighted(c, scored.extra["gradient"]), -c.sum(), anchor.gradient)


def _central(measure: Measure, anchor: Anchor, generator: torch.Generator) -> tuple[Tensor, Params]:
    """``κ·sign(f(δ) − f(−δ))·(∇L(θ+δv) − ∇L(θ−δv))/2``; one gradient more per direction."""
    score, u, scored = _secant_scores(measure, anchor, generator)
    other = _score_all(score, P.Lazy(P.count(u), lambda i: P.scaled(P.pick(u, i), -1.0)))
    value, w = _reduced(measure.reduce, scored.value)
    odd = scored.extra["rise"] - other.extra["rise"]
    sign = torch.where(odd < 0, -1.0, 1.0).to(odd.dtype) if measure.profile.absolute else torch.ones_like(odd)
    half = P.combine(0.5, scored.extra["gradient"], -0.5, other.extra["gradient"])
    return value, _weighted(w * score.kappa * sign, half)


def _tangent(measure: Measure, anchor: Anchor, generator: torch.Generator) -> tuple[Tensor, Params]:
    """The two-point gradient without its component along θ_i on every scale-invariant group."""
    value, r = _two_point(measure, anchor, generator)
    return value, measure.geometry.ball.invariant(anchor.params).project(r, anchor.params)


def _exact(measure: Measure, anchor: Anchor, generator: torch.Generator) -> tuple[Tensor, Params]:
    """``∇_θ S`` with the unit direction u held and ``v = s(θ) ⊙ u`` moving with θ."""
    frame = measure.geometry.at(anchor.params)
    score = ExactScore(measure.profile, frame, anchor, keep_gradient=True)
    found = measure.directions(score, frame, generator)
    scored = found.scored if found.scored is not None else _score_all(score, found.u)
    value, w = _reduced(measure.reduce, scored.value)
    r = _weighted(w, scored.extra["d_theta"])
    for i, wi in enumerate(w):
        if bool(wi != 0):
            d_v = P.pick(scored.extra["d_v"], i)
            r = P.combine(1.0, r, wi, measure.geometry.moving(P.pick(found.u, i), d_v, anchor.params))
    return value, r


GRADIENTS: dict[str, Callable[[Measure, Anchor, torch.Generator], tuple[Tensor, Params]]] = {
    "two-point": _two_point,
    "central": _central,
    "tangent": _tangent,
    "exact": _exact,
}


# ---------------------------------------------------------------- regularisers


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
        loss, gradient = objectives[0].value_and_grad(params)
        zero = torch.zeros_like(loss)
        return Step(loss, zero, gradient, 1, state, zero)


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

    ``weight`` λ = 1/κ with the two-point gradient and the loss's own batch is a sharpness-aware step in the measure's
    geometry (``sam`` has κ = 1).

    Raises:
        InputError: an unknown gradient, clip ≤ 0, ``"tangent"`` without scale groups, λ < 0 or not finite.
    """

    measure: Measure
    gradient: str = "two-point"
    clip: float | None = None

    def __post_init__(self) -> None:
        one_of("gradient", self.gradient, GRADIENTS)
        if self.clip is not None:
            positive("clip", self.clip)
        if self.gradient == "tangent" and not isinstance(self.measure.geometry.ball, GroupBall):
            raise InputError("gradient='tangent' projects along scale groups; expected a groupwise geometry")
        if self.gradient != "exact":
            self.measure.profile.secant()

    def init(self, params: Params) -> State:
        return {}

    def penalty(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Params]:
        """``(S, ∇S)``, before any clipping; generator None is one seeded with 0."""
        generator = P.seeded(DEFAULT_SEED, P.first(params).device) if generator is None else generator
        return self._penalty(Anchor(as_objective(objective), params), generator)

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
        before = _gradients(objectives)
        loss, gradient = objectives[0].value_and_grad(params)
        anchor = Anchor(objectives[1], params) if len(objectives) > 1 else Anchor(objectives[0], params, loss, gradient)
        value, r = self._penalty(anchor, generator)
        size = P.norm(r)
        factor = weight if self.clip is None else weight * (self.clip / size.clamp(min=self.clip))
        ratio = P.safe_divide(factor * size, P.norm(gradient))
        total = P.combine(1.0, gradient, factor, r)
        return Step(loss, value, total, _gradients(objectives) - before, state, ratio)

    def _penalty(self, anchor: Anchor, generator: torch.Generator) -> tuple[Tensor, Params]:
        return GRADIENTS[self.gradient](self.measure, anchor, generator)


def sam(*, rho: float = 0.05) -> Penalty:
    """SAM: ``∇L(θ + ρ g/‖g‖)`` at weight 1 (Foret et al. 2021, eq. 2-3).

    Raises:
        InputError: ρ ≤ 0 or not finite.
    """
    positive("rho", rho)
    return Penalty(Measure(Euclidean(rho), Ascend(0), Rise(), Maximum()))


def asam(*, rho: float = 0.5, eta: float = 0.01) -> Penalty:
    """ASAM: ``∇L(θ + ρ T²g/‖Tg‖)``, ``T = |θ| + η`` on every parameter, held fixed (Kwon et al. 2021, eq. 7).

    Raises:
        InputError: ρ ≤ 0, η < 0, or either not finite.
    """
    positive("rho", rho)
    return Penalty(Measure(Elementwise(rho, eta), Ascend(0), Rise(), Maximum()))
