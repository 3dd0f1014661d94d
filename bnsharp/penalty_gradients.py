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
from bnsharp.directions import Directions
from bnsharp.geometry import Frame
from bnsharp.measures import Measure
from bnsharp.profiles import Anchor
from bnsharp.reduce import derivative
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
    """

    measure: Measure
    anchor: Anchor
    generator: torch.Generator
    directions: Directions | None = None
    slope: Params | None = None

    @cached_property
    def frame(self) -> Frame:
        """The measure's geometry at θ."""
        return self.measure.geometry.at(self.anchor.params)

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
class Slope:
    """``S`` and ``∇S``, with the directions they were taken from and their scores (None for a single one)."""

    value: Tensor
    gradient: Params
    directions: Any
    scored: Scored | None

    @property
    def u(self) -> Params | None:
        """The sharpest direction, None where directions are drawn on demand."""
        if isinstance(self.directions, P.Lazy):
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


def _two_point(search: Search) -> Slope:
    """``κ·sign(f(δ))·(∇L(θ+δv) − ∇L(θ))``: the gradient of ``κ|f(δ)|`` with v constant."""
    score = SecantScore(search.measure.profile, search.frame, search.anchor, search.slope)
    found = search.directed(score)
    if found.scored is None and isinstance(found.u, list) and len(found.u) == 1:
        f, sign, gradient = score.at(found.u[0])
        value, w = derivative(search.measure.reduce, (score.kappa * sign * f).unsqueeze(0))
        r = P.times_difference(w[0] * score.kappa * sign, gradient, search.anchor.gradient)
        return Slope(value, r, found.u, None)
    scored = search.scored(score, found)
    value, w = derivative(search.measure.reduce, scored.value)
    c = w * score.kappa * scored.extra["sign"]
    r = P.combine(1.0, weighted(c, scored.extra["gradient"]), -c.sum(), search.anchor.gradient)
    return Slope(value, r, found.u, scored)


def _central(search: Search) -> Slope:
    """``κ·sign(f(δ) − f(−δ))·(∇L(θ+δv) − ∇L(θ−δv))/2``; one gradient more per direction."""
    score, found, scored = _secant(search)
    other = _score_all(score, P.Lazy(P.count(found.u), lambda i: P.scaled(P.pick(found.u, i), -1.0)))
    value, w = derivative(search.measure.reduce, scored.value)
    odd = scored.extra["rise"] - other.extra["rise"]
    sign = torch.where(odd < 0, -1.0, 1.0).to(odd.dtype) if score.profile.absolute else torch.ones_like(odd)
    half = P.combine(0.5, scored.extra["gradient"], -0.5, other.extra["gradient"])
    return Slope(value, weighted(w * score.kappa * sign, half), found.u, scored)


def _tangent(search: Search) -> Slope:
    """The two-point gradient without its component along θ_i on every scale-invariant group."""
    slope, params = _two_point(search), search.anchor.params
    return replace(slope, gradient=search.measure.geometry.ball.invariant(params).project(slope.gradient, params))


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
    return Slope(value, r, found.u, scored)


GRADIENTS: dict[str, Callable[[Search], Slope]] = {
    "two-point": _two_point,
    "central": _central,
    "tangent": _tangent,
    "exact": _exact,
}
