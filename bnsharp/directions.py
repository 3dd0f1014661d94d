"""Directions: which perturbations are tried. Draw and integrate, ascend to the sharpest, or take given ones.

Each is a frozen value called as ``(score, frame, generator) -> Found``, the frame being the geometry at θ.
``score(u [n])`` gives the values, the gradients ``∂/∂u`` and whatever its owner wants kept of the best direction, so
that training pays for nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import at_least, one_of, positive, whole
from bnsharp.errors import InputError
from bnsharp.geometry import Frame, Geometry
from bnsharp.lanczos import top_eigenpair
from bnsharp.laws import Law, Sphere
from bnsharp.types import Evaluated, Found, Params, Scored


class SearchScore(Protocol):
    """What a search maximises, and the gradient ``∂L/∂u`` at ``u = 0`` from which it starts.

    One that scores a single point u as well, without a batch dimension, says so by ``takes_points = True``.
    """

    def slope(self) -> Params: ...

    def __call__(self, u: Params, last: bool = False) -> Scored: ...


class Directions(Protocol):
    """``(score, frame, generator) -> Found``, the frame being the geometry at θ."""

    @property
    def is_drawn(self) -> bool:
        """Whether the directions are independent draws, of which there could be more."""
        ...

    def moving(self, u: Params, geometry: Geometry, params: Params) -> Params:
        """``v`` as a function of θ, for derivatives."""
        ...

    def times(self, factor: int) -> Directions:
        """``factor`` times as many draws, the first ones the same; itself where nothing is drawn."""
        ...

    def __call__(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> Found: ...

    def cost(self) -> int:
        """Directions tried, at most: for progress displays."""
        ...


class Placed:
    """How directions move with θ."""

    needs_form: ClassVar[bool] = False
    """Whether the score must be a quadratic form of u on a joint ball."""

    def moving(self, u: Params, geometry: Geometry, params: Params) -> Params:
        """``v`` as a function of θ: the unit direction u is held."""
        return geometry.place(u, params)


class Fixed(Placed):
    """What directions that are no draws have in common."""

    is_drawn: ClassVar[bool] = False

    def times(self, factor: int) -> Self:
        return self


@dataclass(frozen=True)
class Draw(Placed):
    """``n`` independent draws of a law; each is remade from its own seed when asked for, never n at once."""

    law: Law
    n: int

    def __post_init__(self) -> None:
        whole("draws", self.n)

    is_drawn: ClassVar[bool] = True

    def times(self, factor: int) -> Draw:
        return replace(self, n=factor * self.n)

    def cost(self) -> int:
        return self.n

    def __call__(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> Found:
        like, ball = frame.like, frame.ball
        seeds, device = P.random_seeds(generator, self.n), P.first(like).device
        return Found(
            P.Lazy(self.n, lambda i: self.law(ball, like, P.seeded(seeds[i], device)))  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Given(Fixed):
    """Directions given in unit coordinates: a batch ``[n]`` or one point."""

    u: Params

    def cost(self) -> int:
        return P.count(self.u) if self.u.batch_size else 1

    def __call__(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> Found:
        return Found(self.u if self.u.batch_size else P.batch(self.u))


@dataclass(frozen=True)
class Own(Fixed):
    """The parameters themselves: ``v = θ`` (``u = θ ⊘ s(θ)``, 0 where the scale is 0), for norms along θ."""

    def cost(self) -> int:
        return 1

    def moving(self, u: Params, geometry: Geometry, params: Params) -> Params:
        """θ itself, whatever the scale does."""
        return params

    def __call__(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> Found:
        if frame.linear is not None:
            raise InputError("a geometry with coordinates of its own does not hold θ; expected a diagonal scale")
        return Found(P.batch(P.pmap(lambda p, s: p * P.safe_reciprocal(s), frame.params, frame.scale)))


@dataclass(frozen=True)
class Climb:
    """Where a batch of searches (or one, without a batch dimension) stands: current and best points, their scores."""

    u: Params
    scored: Scored
    best: Params
    best_scored: Scored
    rate: Tensor
    power: Tensor  # [n] bool: the next step is a power step
    moved: Tensor  # [n] bool: the best point has changed since a power step from it failed

    @property
    def count(self) -> int:
        return len(self.best_scored.value)

    def select(self, indices: Tensor) -> Climb:
        """The searches of these indices."""
        return Climb(*(P.take(getattr(self, f.name), indices) for f in fields(self)))


Rule = Callable[["Ascend", Climb, Frame], Params]


@dataclass(frozen=True)
class Ascend(Fixed):
    """Search for the sharpest direction on the sphere of the geometry's ball, keeping the best one seen.

    Start: ``argmax_u ⟨∂L/∂u, u⟩`` ("steepest", Yi et al. 2019, eq. 6), random for groups whose gradient is negligible;
    ``restarts`` more starts are uniform on the sphere. After ``screen`` steps only the ``keep`` best go on: near a
    minimum the steepest start alone often ends in a poor local maximum. Steps by ``rule``:

    - ``"riemannian"`` (eq. 12-14, 17): ``u_i ← (u_i + η√K g_i/‖g‖)/‖·‖``, g the tangent gradient, η halved when the
      score falls;
    - ``"power"``: ``u_i ← g_i/‖g_i‖``, no step size;
    - ``"alternate"``: from the best point, power steps while they raise the score, then Riemannian steps while they do,
      and so on: neither rule alone is enough on every landscape.

    Every step costs one score per start. With ``tolerance`` > 0 the search ends early, once five steps together have
    raised the best score by less than this fraction. ``polish`` more scores go to L-BFGS on the logarithm of the score
    of each direction kept, in unconstrained coordinates ``u_i = w_i/‖w_i‖``. ``coordinates="ambient"`` takes the
    paper's literal step on v with one scalar step size, which is not equivariant under ``T_a``; ``"unit"`` is.

    ``begin``, a point of the ball, is where the first search starts in place of the steepest start.

    Raises:
        InputError: negative steps or restarts, an unknown rule or coordinates, a rate that is not in (0, ∞).
    """

    steps: int = 0
    restarts: int = 0
    rule: str = "alternate"
    rate: float = 0.5
    coordinates: str = "unit"
    screen: int = 3
    keep: int = 2
    tolerance: float = 0.0
    polish: int = 0
    begin: Params | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole("steps", self.steps, 0)
        whole("restarts", self.restarts, 0)
        whole("screen", self.screen, 1)
        whole("keep", self.keep, 1)
        at_least("tolerance", self.tolerance, 0)
        whole("polish", self.polish, 0)
        one_of("rule", self.rule, RULES)
        one_of("coordinates", self.coordinates, ("unit", "ambient"))
        positive("rate", self.rate)

    def cost(self) -> int:
        starts, screened = self.restarts + 1, min(self.steps, self.screen)
        return starts * (screened + 1) + min(starts, self.keep) * (self.steps - screened + self.polish)

    def starts(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> list[Params]:
        """The steepest start and the random ones."""

        def sphere() -> Params:
            return Sphere()(frame.ball, frame.like, generator)

        first = frame.steepest(score.slope(), sphere) if self.begin is None else self.begin
        return [first, *(frame.ball.power(s, s) for s in (sphere() for _ in range(self.restarts)))]

    def shifted(self, gradient: Params, factor: float, frame: Frame, generator: torch.Generator) -> Params | None:
        """``θ + factor·v`` for the steepest v of ``∂L/∂v``; None where there is more to do than to take that."""
        if self.steps or self.restarts or self.begin is not None:
            return None
        return frame.summit(gradient, factor, lambda: Sphere()(frame.ball, frame.like, generator))

    def __call__(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> Found:
        starts = self.starts(score, frame, generator)
        if not self.steps and not self.restarts:
            return Found(starts)
        n = len(starts)
        alone = n == 1 and not self.polish and getattr(score, "takes_points", False)  # no batch of one to wrap
        u = starts[0] if alone else P.stack(starts)
        scored = score(u, last=self.steps == 0)
        flags = torch.ones_like(scored.value, dtype=torch.bool)
        climb = Climb(u, scored, u, scored, torch.full_like(scored.value, self.rate), flags, flags)
        history = [float(climb.best_scored.value.max())]
        for step in range(self.steps):
            if step == self.screen and n > self.keep:
                climb = climb.select(climb.best_scored.value.topk(self.keep).indices)
            candidate = RULES[self.rule](self, climb, frame)
            scored = score(candidate, last=step == self.steps - 1 and not self.polish)
            climb = self._advance(climb, candidate, scored)
            history.append(float(climb.best_scored.value.max()))
            if self._settled(history):
                break
        if alone:
            best = replace(climb.best_scored, gradient=None)
            return Found(P.batch(climb.best), P.batch(best), restarts=(history[-1],))
        restarts = climb.best_scored.value
        if self.polish:
            ends = [_polish(score, frame, climb.select(i[None]), self.polish) for i in torch.arange(climb.count)]
            restarts = torch.cat([end.best_scored.value for end in ends])
            climb = max(ends, key=lambda end: float(end.best_scored.value))
        return Found(climb.best, climb.best_scored, restarts=tuple(restarts.tolist()))

    def _settled(self, history: list[float]) -> bool:
        recent = history[self.screen :][-6:]
        return self.tolerance > 0 and len(recent) == 6 and recent[-1] - recent[0] <= self.tolerance * abs(recent[-1])

    def walk(self, at: Climb, frame: Frame) -> Params:
        """A Riemannian step from the best point."""
        return frame.uphill(at.best, at.best_scored.slope, at.rate, self.coordinates == "ambient")

    def _advance(self, climb: Climb, candidate: Params, scored: Scored) -> Climb:
        better = scored.value > climb.best_scored.value
        fell = scored.value <= climb.scored.value
        return Climb(
            candidate,
            scored,
            P.where(better, candidate, climb.best),
            _choose(better, scored, climb.best_scored),
            # a fallen power step says nothing about the Riemannian step's size
            torch.where(fell & ~(climb.power & (self.rule == "alternate")), climb.rate / 2, climb.rate),
            torch.where(better, climb.power, ~climb.power & climb.moved),
            torch.where(better, ~climb.power, climb.moved & ~climb.power),
        )


def _polish(score: SearchScore, frame: Frame, climb: Climb, evaluations: int) -> Climb:
    """L-BFGS (SciPy's) on ``−log S`` over w, ``u_i = w_i/‖w_i‖``, from the best direction; keeps the best one seen."""
    from scipy.optimize import minimize  # takes longer to import than all of this package

    like, best, best_scored = P.pick(climb.best, 0), climb.best, climb.best_scored

    def negative_log(w: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, best_scored
        raw = P.batch(P.unflatten(torch.from_numpy(w), like))
        u = frame.ball.retract(raw)
        scored = score(u)
        if bool(scored.value[0] > best_scored.value[0]):
            best, best_scored = u, scored
        value = float(scored.value[0])
        if not value > 0:
            return math.inf, np.zeros_like(w)
        slope = frame.ball.back(raw, u, scored.gradient)
        return -math.log(value), P.flatten(P.scaled(P.pick(slope, 0), -1 / value)).double().cpu().numpy()

    start = P.flatten(like).double().cpu().numpy()
    minimize(negative_log, start, jac=True, method="L-BFGS-B", options={"maxfun": evaluations, "maxiter": evaluations})
    return replace(climb, best=best, best_scored=best_scored)


def _choose(condition: Tensor, a: Scored, b: Scored) -> Scored:
    return Scored(*(P.where(condition, getattr(a, name), getattr(b, name)) for name in ("value", "gradient", "extra")))


def _riemannian(search: Ascend, at: Climb, frame: Frame) -> Params:
    return search.walk(at, frame)


def _power(search: Ascend, at: Climb, frame: Frame) -> Params:
    return frame.ball.power(at.u, at.scored.slope)


def _alternate(search: Ascend, at: Climb, frame: Frame) -> Params:
    if not bool(at.power.any()):
        return search.walk(at, frame)
    jump = frame.ball.power(at.best, at.best_scored.slope)
    return jump if bool(at.power.all()) else P.where(at.power, jump, search.walk(at, frame))


RULES: dict[str, Rule] = {"riemannian": _riemannian, "power": _power, "alternate": _alternate}


@dataclass(frozen=True)
class Lanczos(Fixed):
    """The largest eigenvalue of ``M`` for a quadratic score ``uᵀMu`` on a joint ball (:mod:`bnsharp.lanczos`).

    ``error`` of what it finds is the residual ``‖M u − λ u‖``: an eigenvalue lies within it. It stops when the residual
    is below ``tolerance·|λ|`` or after ``iterations`` products, all basis vectors being kept.

    It starts at the gradient, which lies mostly in the span of the sharpest directions (Gur-Ari et al. 2018), plus
    as much of a random direction, so that no eigenvector is out of reach.
    """

    iterations: int = 60
    tolerance: float = 1e-4
    needs_form: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole("iterations", self.iterations)
        positive("tolerance", self.tolerance)

    def cost(self) -> int:
        return self.iterations + 1

    def __call__(self, score: SearchScore, frame: Frame, generator: torch.Generator) -> Found:
        def by_gradient(q: Params) -> Params:
            return P.scaled(P.pick(score(P.batch(q)).gradient, 0), 0.5)

        apply = getattr(score, "image", by_gradient)

        start, slope = Sphere()(frame.ball, frame.like, generator), score.slope()
        start = P.combine(1.0, start, P.safe_reciprocal(P.norm(slope)), slope)
        top = top_eigenpair(apply, start, self.iterations, self.tolerance)
        value = P.norm(start).new_tensor([top.value])
        rounding = 8 * torch.finfo(value.dtype).eps * math.hypot(top.value, top.residual)
        return Found(P.batch(top.vector), error=top.residual, known=Evaluated(value, value.new_tensor([rounding])))
