"""Measures: a geometry, directions, a profile and a reduce, and the named combinations of them.

``measure(objective, θ, generator) -> Estimate``; ``measure.penalty(objective, θ, generator)`` is the same number,
differentiable in θ with the directions' unit coordinates held fixed (Danskin). Below this file nothing knows a
measure's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import positive, unknown
from bnsharp.directions import Ascend, Directions, Draw, Given, Lanczos
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.geometry import Elementwise, Euclidean, Geometry, Groups, Groupwise, JointBall
from bnsharp.laws import Ball, Box, Gaussian, Law, Rademacher, Uniform
from bnsharp.profiles import Anchor, Curvature, ExactScore, Line, Profile, Rise
from bnsharp.reduce import Maximum, Mean, PowerMean, Reduce
from bnsharp.types import Estimate, Found, Params

THOROUGH = Ascend(steps=15, restarts=16, screen=5, keep=8, polish=40, tolerance=1e-5)
"""How BN-Sharpness is searched for where nothing else is said."""

DEFAULT_SEED = 0
"""The seed used where no generator is given: measuring twice gives the same number."""


@dataclass(frozen=True)
class Measure:
    """A perturbation measure: any combination of the four slots."""

    geometry: Geometry
    directions: Directions
    profile: Profile
    reduce: Reduce

    def __call__(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """Measure at θ.

        Args:
            objective: an objective, or a plain function of parameters.
            params: θ; its dtype is the precision of the measurement.
            generator: source of every random number; None is a generator seeded with 0.

        Raises:
            InputError: non-finite parameters or loss, a module that stays random when measured.
        """
        objective = as_objective(objective)
        params = P.pmap(torch.Tensor.detach, params)
        self._check(objective, params)
        before = objective.evaluations.copy()
        anchor = Anchor(objective, params)
        found = self.search(anchor, generator)
        frame = self.geometry.at(params)
        v = P.Lazy(P.count(found.u), lambda i: frame.place(P.pick(found.u, i)))
        known = self.profile.evaluate(anchor, v)
        values, errors = known.values, known.errors
        if not bool(values.isfinite().all()):
            raise InputError(
                f"the loss is not finite at {int((~values.isfinite()).sum())} of {len(values)} perturbed points; "
                "expected finite losses: make the perturbation smaller"
            )
        value, stderr, effective = self.reduce(values)
        searched = not isinstance(found.u, P.Lazy)
        unit = P.pick(found.u, int(values.argmax())) if searched else None
        spent = objective.evaluations - before
        return Estimate(
            value=float(value),
            stderr=float(stderr),
            error=float(errors.max()) + found.error,
            direction=None if unit is None else self.geometry.place(unit, params),
            unit=unit,
            effective_samples=float(effective),
            evaluations={k: spent.get(k, 0) for k in ("gradients", "losses", "products")},
            statistics=objective.statistics,
            batch_size=objective.batch_size,
        )

    def cost(self) -> int:
        """Losses, gradients and products that one measurement takes, about: for progress displays."""
        if isinstance(self.directions, Draw | Given):
            return 1 + self.directions.cost() * self.profile.cost()
        return 2 + 2 * self.directions.cost() * self.profile.coarse().cost() + 2 * self.profile.cost()

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
        v = P.Lazy(n, lambda i: self.geometry.place(P.pmap(torch.Tensor.detach, P.pick(found.u, i)), params))
        return self.reduce(self.profile(objective, params, v))[0]

    def search(self, anchor: Anchor, generator: torch.Generator | None) -> Found:
        """The directions at the anchor; a search is scored by the profile, with fewer points on a line."""
        frame = self.geometry.at(anchor.params)
        score = ExactScore(self.profile.coarse(), frame, anchor)
        if generator is None:
            generator = P.seeded(DEFAULT_SEED, P.first(anchor.params).device)
        return self.directions(score, frame, generator)

    def _check(self, objective: AbstractObjective, params: Params) -> None:
        for name, value in params.items():
            if not bool(value.isfinite().all()):
                raise InputError(f"parameter {name!r} holds NaN or infinite values; expected finite parameters")
        objective.check(params)


def bn_sharpness(
    groups: Groups,
    *,
    delta: float = 1e-2,
    p: float = 2.0,
    steps: int | None = None,
    restarts: int | None = None,
    polish: int | None = None,
    nodes: int = 8,
    rest: str = "tensor",
    rule: str = "alternate",
    coordinates: str = "unit",
) -> Measure:
    """BN-Sharpness ``max_{v∈Φ(θ)} (1/(2δ) ∫_{−δ}^{δ} |L(θ+tv) − L(θ)|^p dt)^{1/p}`` (Yi et al. 2019, definition 1).

    ``Φ(θ) = {v: ‖v_i‖ = ‖θ_i‖}``: invariant under rescaling of every scale group. The search gives a lower bound of the
    maximum.

    Args:
        groups: scale groups, ``bnsharp.scale_groups(module, x)``.
        delta: half length δ of the segment, relative to the group norms; δ > 0.
        p: exponent, p ≥ 1.
        steps: ascent steps from the gradient's direction and nothing else ("SGDS-n", n + 1 scores). None is a thorough
            search, ``THOROUGH``: random starts and polishing too; it reaches 99% of brute force on small networks.
        restarts, polish, rule, coordinates: see :class:`bnsharp.directions.Ascend`; 0 by default where steps are given.
        nodes: quadrature nodes on each half segment.
        rest: parameters in no scale group: one group per tensor (``"tensor"``) or one group (``"joint"``, the paper).

    Raises:
        InputError: δ ≤ 0, p < 1, negative steps, or any of them not finite.
    """
    search = THOROUGH if steps is None else Ascend(steps)
    given = {"restarts": restarts, "polish": polish}
    return Measure(
        Groupwise(groups, rest=rest),
        replace(
            search, rule=rule, coordinates=coordinates, **{k: v for k, v in given.items() if v is not None}
        ),
        Line(Uniform(delta), p, nodes),
        Maximum(),
    )


def gaussian(*, sigma: float = 1e-2, draws: int = 100) -> Measure:
    """Expected sharpness ``E L(θ+σε) − L(θ)``, ``ε ~ N(0, I)`` (Neyshabur et al. 2017).

    Raises:
        InputError: σ ≤ 0 or not finite, fewer than one draw.
    """
    positive("sigma", sigma)
    return Measure(Euclidean(sigma), Draw(Gaussian(), draws), Rise(), Mean())


def lebesgue_ball(*, delta: float = 1e-2, draws: int = 100, p: float | None = None, ball: str = "joint") -> Measure:
    """Mean rise over the ball ``‖v‖ ≤ δ`` or box ``|v_j| ≤ δ`` (Wen et al. 2018), or the L^p norm of ``|rise|``.

    Args:
        delta: radius of the ball, or half width of the box.
        draws: uniform draws.
        p: None for the mean of ``L(θ+v) − L(θ)``; else ``(E |L(θ+v) − L(θ)|^p)^{1/p}``.
        ball: ``"joint"`` or ``"box"``.

    Raises:
        InputError: δ ≤ 0 or not finite, p < 1, fewer than one draw, an unknown ball.
    """
    positive("delta", delta)
    geometry = Euclidean(delta, ball)
    law: Law = Ball() if isinstance(geometry.ball, JointBall) else Box()
    if p is None:
        return Measure(geometry, Draw(law, draws), Rise(), Mean())
    return Measure(geometry, Draw(law, draws), Rise(is_absolute=True), PowerMean(p))


def epsilon_sharpness(
    *, delta: float = 1e-2, steps: int = 10, restarts: int = 0, relative: bool = False
) -> Measure:
    """δ-sharpness ``max_{‖v‖≤δ} L(θ+v) − L(θ)``, over ``1 + L(θ)`` if ``relative`` (Keskar et al. 2017).

    Not invariant under rescaling: shrinking one normalized filter makes it grow.
    """
    positive("delta", delta)
    return Measure(Euclidean(delta), Ascend(steps, restarts), Rise(relative=relative), Maximum())


def adaptive(*, rho: float = 0.05, eta: float = 0.0, steps: int = 10, restarts: int = 0) -> Measure:
    """Adaptive sharpness ``max L(θ+v) − L(θ)``, ``‖v ⊘ (|θ|+η)‖ ≤ ρ`` (Kwon et al. 2021, eq. 3)."""
    positive("rho", rho)
    return Measure(Elementwise(rho, eta), Ascend(steps, restarts), Rise(), Maximum())


def hessian_top(
    *, geometry: Geometry | None = None, iterations: int = 60, tolerance: float = 1e-4, restarts: int = 4
) -> Measure:
    """``max vᵀHv`` over the geometry's ball: λ_max of the Hessian for the default ``‖v‖ ≤ 1``.

    A joint ball is solved by Lanczos (algebraically largest eigenvalue, residual as error); a product of balls has no
    eigenvalue problem and is searched by ``iterations`` ascent steps from several starts, which is a lower bound.
    """
    geometry = Euclidean(1.0) if geometry is None else geometry
    directions: Directions = (
        Lanczos(iterations, tolerance) if isinstance(geometry.ball, JointBall) else Ascend(iterations, restarts)
    )
    return Measure(geometry, directions, Curvature(), Maximum())


def hessian_trace(*, geometry: Geometry | None = None, draws: int = 100) -> Measure:
    """``E vᵀHv`` over Rademacher draws: ``tr H`` by default; ``Σ_i ‖θ_i‖²/d_i tr H_ii`` in a groupwise geometry."""
    geometry = Euclidean(1.0) if geometry is None else geometry
    return Measure(geometry, Draw(Rademacher(), draws), Curvature(), Mean())



@dataclass(frozen=True)
class MeasureSpec:
    """A named measure for listings and commands: its builder, and whether rescaling scale groups leaves it alone."""

    build: Callable[..., Measure]
    summary: str
    source: str
    needs_groups: bool = False
    invariant: bool = False

    def options(self) -> dict[str, Any]:
        """The builder's options with their defaults, those of plain types."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "geometry"}


MEASURES: dict[str, MeasureSpec] = {
    "bn_sharpness": MeasureSpec(
        bn_sharpness, "L^p norm of the loss rise along the sharpest direction, relative to each filter's norm",
        "Yi et al. 2019, definition 1", needs_groups=True, invariant=True,
    ),
    "gaussian": MeasureSpec(gaussian, "mean loss rise under Gaussian noise of size sigma", "Neyshabur et al. 2017"),
    "lebesgue_ball": MeasureSpec(
        lebesgue_ball, "mean loss rise over a ball (or box) of radius delta", "Wen et al. 2018"
    ),
    "epsilon_sharpness": MeasureSpec(
        epsilon_sharpness, "largest loss rise found in a ball of radius delta", "Keskar et al. 2017"
    ),
    "adaptive": MeasureSpec(adaptive, "largest loss rise, each weight perturbed in proportion", "Kwon et al. 2021"),
    "hessian_top": MeasureSpec(hessian_top, "largest Hessian eigenvalue, by Lanczos", "Lanczos 1950"),
    "hessian_trace": MeasureSpec(hessian_trace, "Hessian trace, by Rademacher draws", "Hutchinson 1989"),
}


def build_measure(name: str, groups: Groups | None = None, **options: Any) -> Measure:
    """The named measure with these options.

    Raises:
        InputError: an unknown name or option (with the nearest known one), scale groups missing.
    """
    if name not in MEASURES:
        raise unknown("measure", name, MEASURES)
    spec = MEASURES[name]
    known = spec.options()
    for key in options:
        if key not in known:
            raise unknown(f"option of {name}", key, known)
    if spec.needs_groups and groups is None:
        raise InputError(f"measure {name!r} needs the network's scale groups: pass bnsharp.scale_groups(module, x)")
    return spec.build(*((groups,) if spec.needs_groups else ()), **options)
