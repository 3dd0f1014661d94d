"""The gradient ``∇S`` of a penalty, four ways: what a regulariser adds to ``∇L``.

Each is a function of a :class:`Search`: a measure at one θ, and where its directions come from in this step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.directions import Directions
from bnsharp.geometry import Frame
from bnsharp.measures import Measure
from bnsharp.reduce import Reduce, derivative, is_identity
from bnsharp.scores import ExactScore, SecantScore
from bnsharp.types import Found, Params, Scored


@dataclass(frozen=True)
class Search:
    """One step's problem.

    Attributes:
        measure: what is penalised.
        anchor: the objective at θ.
        generator: source of random directions.
        directions: in place of the measure's own (a direction that is used again); None takes those.
        slope: in unit coordinates, where an ascent starts; None is the loss's own slope.
        keep: whether the direction itself is wanted afterwards.
    """

    measure: Measure
    anchor: Anchor
    generator: torch.Generator
    directions: Directions | None = None
    slope: Params | None = None
    keep: bool = True

    @cached_property
    def frame(self) -> Frame:
        """The measure's geometry at θ."""
        return self.measure.geometry.at(self.anchor.params)

    def summit(self, factor: float) -> Params | None:
        """``θ + factor·v`` where v is not searched for and not wanted itself; else None."""
        shifted = getattr(self.directions or self.measure.directions, "shifted", None)
        if shifted is None or self.keep or self.slope is not None:
            return None
        return shifted(self.anchor.gradient, factor, self.frame, self.generator)  # type: ignore[no-any-return]

    def directed(self, score: SecantScore | ExactScore) -> Found:
        """Directions, scored where they were searched."""
        return (self.directions or self.measure.directions)(score, self.frame, self.generator)

    def scored(self, score: SecantScore | ExactScore, found: Found) -> Scored:
        """The scores of all directions found."""
        return found.scored if found.scored is not None else _score_all(score, found.u)

    def find(self, score: SecantScore | ExactScore) -> tuple[Found, Scored]:
        """Directions, all of them scored."""
        found = self.directed(score)
        return found, self.scored(score, found)


@dataclass(frozen=True)
class Whole:
    """``∇S`` as it is."""

    dense: Params

    def norm(self) -> Tensor:
        return P.norm(self.dense)

    def added_to(self, gradient: Params, factor: Tensor | float) -> Params:
        """``gradient + factor·∇S``."""
        return P.combine(1.0, gradient, factor, self.dense)


@dataclass(frozen=True)
class Difference:
    """``∇S = c (far − near)``, two gradients: a step needs only its sum with one of them, and its norm."""

    c: Tensor | float
    far: Params
    near: Params

    @cached_property
    def dense(self) -> Params:
        return P.times_difference(self.c, self.far, self.near)

    def norm(self) -> Tensor:
        size = self.c.abs() if isinstance(self.c, Tensor) else abs(self.c)
        return size * P.distance(self.far, self.near)

    def added_to(self, gradient: Params, factor: Tensor | float) -> Params:
        """``gradient + factor·∇S``; ``far`` itself where that is the sum."""
        if gradient is self.near:
            return P.lerp(self.near, self.far, factor * self.c)
        return P.combine(1.0, gradient, factor, self.dense)


@dataclass(frozen=True)
class Slope:
    """``S`` and ``∇S``, with the directions they were taken from and their scores (None for a single one).

    ``directions`` is None where the direction was not kept (:attr:`Search.keep`).
    """

    value: Tensor
    change: Whole | Difference
    directions: Any
    scored: Scored | None

    @property
    def gradient(self) -> Params:
        """``∇S``."""
        return self.change.dense

    @property
    def u(self) -> Params | None:
        """The sharpest direction, None where it was not kept or directions are drawn on demand."""
        if self.directions is None or isinstance(self.directions, P.Lazy):
            return None
        return P.pick(self.directions, 0 if self.scored is None else int(self.scored.value.argmax()))


def _score_all(score: SecantScore | ExactScore, u: Any) -> Scored:
    """Scores of every direction: a batch at once, a sequence made on demand one by one."""
    if not isinstance(u, P.Lazy):
        return score(P.stack(u) if isinstance(u, list) else u, last=True)
    parts = [score(P.batch(u[i]), last=True) for i in range(len(u))]

    def join(items: list[Any]) -> Any:
        if items[0] is None:
            return None
        if isinstance(items[0], Tensor):
            return torch.cat(items)
        return P.make({k: join([x[k] for x in items]) for k in items[0].keys()}, (len(u),))

    return Scored(*(join([getattr(p, name) for p in parts]) for name in ("value", "gradient", "extra")))


def weighted(weights: Tensor, x: Params) -> Params:
    """``Σ_i w_i x_i`` over a batch."""
    if len(weights) == 1:
        return P.scaled(P.pick(x, 0), weights[0])
    return P.make({k: torch.tensordot(weights.to(v.dtype), v, dims=1) for k, v in x.items()})


def _secant(search: Search) -> tuple[SecantScore, Found, Scored]:
    score = SecantScore(search.measure.profile, search.frame, search.anchor, search.slope)
    return score, *search.find(score)


def _of_one(reduce: Reduce, f: Tensor, slope: float) -> tuple[Tensor, Tensor | float]:
    """The reduced value of ``slope·f`` alone, and its derivative with respect to f."""
    score = slope * f
    if is_identity(reduce):
        return score, slope
    value, w = derivative(reduce, score.unsqueeze(0))
    return value, w[0] * slope


def _two_point(search: Search) -> Slope:
    """``κ·sign(f(δ))·(∇L(θ+δv) − ∇L(θ))``: the gradient of ``κ|f(δ)|`` with v constant."""
    score = SecantScore(search.measure.profile, search.frame, search.anchor, search.slope)
    point = search.summit(score.delta)
    found = search.directed(score) if point is None else Found(None)
    if point is None and found.scored is None and isinstance(found.u, list) and len(found.u) == 1:
        point = search.frame.points(found.u[0], score.delta)
    if point is not None:
        f, sign, gradient = score.at(point)
        value, c = _of_one(search.measure.reduce, f, score.kappa * sign)
        return Slope(value, Difference(c, gradient, search.anchor.gradient), found.u, None)
    scored = search.scored(score, found)
    value, w = derivative(search.measure.reduce, scored.value)
    c = w * score.kappa * scored.extra["sign"]
    if len(c) == 1:
        far = P.pick(scored.extra["gradient"], 0)
        return Slope(value, Difference(c[0], far, search.anchor.gradient), found.u, scored)
    r = P.combine(1.0, weighted(c, scored.extra["gradient"]), -c.sum(), search.anchor.gradient)
    return Slope(value, Whole(r), found.u, scored)


def _central(search: Search) -> Slope:
    """``κ·sign(f(δ) − f(−δ))·(∇L(θ+δv) − ∇L(θ−δv))/2``; one gradient more per direction."""
    score, found, scored = _secant(search)
    other = _score_all(score, P.Lazy(P.count(found.u), lambda i: P.scaled(P.pick(found.u, i), -1.0)))
    value, w = derivative(search.measure.reduce, scored.value)
    odd = scored.extra["rise"] - other.extra["rise"]
    sign = torch.where(odd < 0, -1.0, 1.0).to(odd.dtype) if score.profile.absolute else torch.ones_like(odd)
    half = P.combine(0.5, scored.extra["gradient"], -0.5, other.extra["gradient"])
    return Slope(value, Whole(weighted(w * score.kappa * sign, half)), found.u, scored)


def _tangent(search: Search) -> Slope:
    """The two-point gradient without its component along θ_i on every scale-invariant group."""
    slope, params = _two_point(search), search.anchor.params
    return replace(slope, change=Whole(search.measure.geometry.ball.invariant(params).project(slope.gradient, params)))


def _exact(search: Search) -> Slope:
    """``∇_θ S`` with the unit direction u held and ``v = s(θ) ⊙ u`` moving with θ."""
    measure, anchor = search.measure, search.anchor
    score = ExactScore(measure.profile, search.frame, anchor, keep_gradient=True, slope=search.slope)
    found, scored = search.find(score)
    value, w = derivative(measure.reduce, scored.value)
    r = weighted(w, scored.extra["d_theta"])
    for i, wi in enumerate(w):
        if bool(wi != 0):
            u = P.pick(found.u, i)
            moved = P.pullback(
                lambda x, u=u: measure.directions.moving(u, measure.geometry, x),  # type: ignore[misc]
                anchor.params, P.pick(scored.extra["d_v"], i),
            )
            r = P.combine(1.0, r, wi, moved)
    return Slope(value, Whole(r), found.u, scored)


GRADIENTS: dict[str, Callable[[Search], Slope]] = {
    "two-point": _two_point,
    "central": _central,
    "tangent": _tangent,
    "exact": _exact,
}
