"""Measures by name: each a combination of a geometry, directions, a profile and a reduce.

``measure(objective, θ, generator) -> Estimate``. A new combination is one function here and one row in ``MEASURES``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bnsharp.checks import flag, one_of, positive, unknown
from bnsharp.composites import LargestRadius, Measured, OnCriterion, error_rate, normalized_logits
from bnsharp.directions import Ascend, Draw
from bnsharp.errors import InputError
from bnsharp.estimation import DEFAULT_SEED, Measure, Sampling
from bnsharp.geometry import BoxBall, Elementwise, Euclidean, Filters, Geometry, Groups, Groupwise
from bnsharp.laws import SEGMENTS, Ball, Box, Gaussian, Law, Sphere, Uniform
from bnsharp.maps import Subspace
from bnsharp.pacbayes import pac_bayes
from bnsharp.profiles import Line, Rise
from bnsharp.reduce import FreeEnergy, Maximum, Mean, PowerMean
from bnsharp.second_order import (
    CERTIFY,
    fisher_rao,
    hessian_top,
    hessian_trace,
    largest_eigenvalue,
    relative_flatness,
    relative_top,
    relative_trace,
    spherical_top,
)

__all__ = [
    "DEFAULT_SEED", "MEASURES", "THOROUGH", "Measure", "MeasureSpec", "Measured", "Sampling", "adaptive",
    "adaptive_average", "bn_ball", "bn_entropy", "bn_gaussian", "bn_random_line", "bn_sharpness", "build_measure",
    "epsilon_sharpness", "filter_normalized", "fisher_rao", "gaussian", "hessian_top", "hessian_trace", "keskar",
    "largest_sigma", "largest_sigma_accuracy", "lebesgue_ball", "local_entropy", "pac_bayes", "relative_flatness",
    "relative_top", "relative_trace", "spherical_top",
]

THOROUGH = Ascend(steps=15, restarts=16, screen=5, keep=8, polish=40, tolerance=1e-5)
"""How BN-Sharpness is searched for where nothing else is said."""


# ---------------------------------------------------------------- BN-Sharpness and the BN form of each law


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
    law: str = "uniform",
    certify: int | None = None,
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
        law: of t: ``"uniform"`` on ``[−δ, δ]``, or ``"normal"`` with standard deviation δ.
        certify: eigenvalue solves for an upper bound near a minimum; by default 10 in a thorough search, else none.

    Raises:
        InputError: δ ≤ 0, p < 1, negative steps, or any of them not finite; an unknown law.
    """
    one_of("law", law, SEGMENTS)
    search = THOROUGH if steps is None else Ascend(steps)
    given: dict[str, Any] = {"restarts": restarts, "polish": polish}
    return Measure(
        Groupwise(groups, rest=rest),
        replace(
            search, rule=rule, coordinates=coordinates, **{k: v for k, v in given.items() if v is not None}
        ),
        Line(SEGMENTS[law](delta), p, nodes),
        Maximum(),
        certify=(CERTIFY if steps is None else 0) if certify is None else certify,
    )


def bn_ball(groups: Groups, *, delta: float = 1e-2, draws: int = 100, p: float | None = None,
            rest: str = "tensor") -> Measure:
    """Mean rise over ``Π_i {‖v_i‖ ≤ δ‖θ_i‖}``, or the L^p norm of ``|rise|``: Lebesgue-ball sharpness, BN form.

    "For each measure μ a corresponding BN sharpness" (Yi et al. 2019, appendix C). Invariant under ``T_a``.
    """
    return _averaged(Groupwise(groups, delta, rest), Ball(), draws, p)


def bn_gaussian(groups: Groups, *, sigma: float = 1e-2, draws: int = 100, rest: str = "tensor") -> Measure:
    """``E L(θ+v) − L(θ)``, ``v_i ~ N(0, σ²‖θ_i‖²/d_i · I)``: expected sharpness, BN form. Invariant under ``T_a``."""
    positive("sigma", sigma)
    return Measure(Groupwise(groups, sigma, rest), Draw(Gaussian(), draws), Rise(), Mean())


def bn_entropy(groups: Groups, *, gamma: float = 1e4, beta: float = 1.0, draws: int = 100,
               rest: str = "tensor") -> Measure:
    """``−(1/β) log E exp(−β(L(θ+v) − L(θ)))``, ``v_i ~ N(0, ‖θ_i‖²/(γ d_i) · I)``: local entropy, BN form."""
    positive("gamma", gamma)
    return Measure(Groupwise(groups, gamma**-0.5, rest), Draw(Gaussian(), draws), Rise(), FreeEnergy(beta))


def bn_random_line(groups: Groups, *, delta: float = 1e-2, p: float = 2.0, draws: int = 100, nodes: int = 8,
                   rest: str = "tensor", law: str = "uniform") -> Measure:
    """BN-Sharpness averaged over v uniform on Φ(θ) in the place of its maximum: a lower bound of it."""
    one_of("law", law, SEGMENTS)
    return Measure(Groupwise(groups, rest=rest), Draw(Sphere(), draws), Line(SEGMENTS[law](delta), p, nodes), Mean())


# ---------------------------------------------------------------- random perturbations of fixed size


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
    return _averaged(geometry, Box() if isinstance(geometry.ball, BoxBall) else Ball(), draws, p)


def _averaged(geometry: Geometry, law: Law, draws: int, p: float | None) -> Measure:
    """The mean of the rise, or the L^p norm of its absolute value."""
    if p is None:
        return Measure(geometry, Draw(law, draws), Rise(), Mean())
    return Measure(geometry, Draw(law, draws), Rise(is_absolute=True), PowerMean(p))


def local_entropy(*, gamma: float = 1e4, beta: float = 1.0, draws: int = 100) -> Measure:
    """``−(1/β) log E exp(−β(L(θ+v) − L(θ)))``, ``v ~ N(0, I/γ)`` (Chaudhari et al. 2017, eq. 3, relative to L(θ)).

    ``−log ∫ exp(−L(x) − γ/2‖x−θ‖²) dx`` but for L(θ) and the Gaussian's constant. The average is dominated by few draws
    where the loss falls: read ``Estimate.effective_samples`` before trusting it.

    Raises:
        InputError: γ ≤ 0, β ≤ 0, fewer than one draw.
    """
    positive("gamma", gamma)
    return Measure(Euclidean(gamma**-0.5), Draw(Gaussian(), draws), Rise(), FreeEnergy(beta))


def largest_sigma(*, rise: float = 0.1, draws: int = 10, largest: float = 2.0, halvings: int = 15) -> LargestRadius:
    """The largest σ at which Gaussian sharpness is at most ``rise`` (Jiang et al. 2020: flatness is ``1/σ²``)."""
    return LargestRadius(functools.partial(_gaussian_of, draws=draws), rise, largest, halvings=halvings)


def largest_sigma_accuracy(*, drop: float = 0.1, draws: int = 10, largest: float = 2.0,
                           halvings: int = 15) -> OnCriterion:
    """The largest σ at which the mean accuracy drops by at most ``drop`` (Jiang et al. 2020, 1912.02178).

    Raises:
        InputError: a drop that is not in (0, ∞); measured on a plain function.
    """
    return OnCriterion(largest_sigma(rise=drop, draws=draws, largest=largest, halvings=halvings), error_rate)


def _gaussian_of(sigma: float, draws: int) -> Measure:
    return gaussian(sigma=sigma, draws=draws)


def filter_normalized(*, delta: float = 0.1, p: float = 2.0, draws: int = 100, nodes: int = 8) -> Measure:
    """The loss along filter-normalized random directions (Li et al. 2018): ``E (E_t |L(θ+tv) − L(θ)|^p)^{1/p}``.

    ``v ← v‖w‖/‖v‖`` per output filter of every parameter with two or more dimensions; the others are held. t is uniform
    on ``[−δ, δ]``.
    """
    geometry = Groupwise(Filters())
    return Measure(geometry, Draw(Sphere(), draws), Line(Uniform(delta), p, nodes), Mean())


# ---------------------------------------------------------------- largest rise in a ball


def epsilon_sharpness(
    *, delta: float = 1e-2, steps: int = 10, restarts: int = 0, relative: bool = False, certify: int = 1
) -> Measure:
    """δ-sharpness ``max_{‖v‖≤δ} L(θ+v) − L(θ)``, over ``1 + L(θ)`` if ``relative`` (Keskar et al. 2017).

    Not invariant under rescaling: shrinking one normalized filter makes it grow.
    """
    positive("delta", delta)
    return Measure(Euclidean(delta), Ascend(steps, restarts), Rise(relative=relative), Maximum(), certify)


def keskar(*, epsilon: float = 1e-3, subspace: int | None = None, steps: int = 10, restarts: int = 0,
           seed: int = 0) -> Measure:
    """``(max_y L(θ+y) − L(θ))/(1 + L(θ))``, ``|y_j| ≤ ε(|θ_j| + 1)`` (Keskar et al. 2017, eq. 3-4; there in per cent).

    Args:
        epsilon: ε > 0; 1e-3 or 5e-4 in the paper.
        subspace: None for the full space; else the dimension of a random subspace, ``y = A z``,
            ``|z_j| ≤ ε(|(A⁺θ)_j| + 1)`` (100 in the paper).
        steps, restarts: of the search; the paper takes ten iterations of L-BFGS-B.
        seed: of A.
    """
    scale = Elementwise(epsilon, 1.0, "box") if subspace is None else Geometry(
        Subspace(subspace, epsilon, 1.0, seed), BoxBall()
    )
    return Measure(scale, Ascend(steps, restarts), Rise(relative=True), Maximum())


def adaptive(
    *, rho: float = 0.05, eta: float = 0.0, steps: int = 10, restarts: int = 0, ball: str = "joint",
    normalize_logits: bool = False, certify: int = 0,
) -> Measured:
    """Adaptive sharpness ``max L(θ+v) − L(θ)``, ``‖v ⊘ (|θ|+η)‖ ≤ ρ`` (Kwon et al. 2021, eq. 3).

    Args:
        rho: ρ > 0.
        eta: η ≥ 0.
        ball: ``"joint"`` (ℓ2) or ``"box"`` (ℓ∞; Andriushchenko et al. 2023).
        normalize_logits: of the loss of centred, unit-size logits (ibid., section 3.2).
    """
    positive("rho", rho)
    measure = Measure(Elementwise(rho, eta, ball), Ascend(steps, restarts), Rise(), Maximum(), certify)
    return _of_logits(measure, normalize_logits)


def adaptive_average(*, rho: float = 0.1, draws: int = 20, normalize_logits: bool = False) -> Measured:
    """``E L(θ + ρ|θ|⊙ε) − L(θ)``, ``ε ~ N(0, I)`` (Andriushchenko et al. 2023, eq. 2, average case)."""
    positive("rho", rho)
    return _of_logits(Measure(Elementwise(rho), Draw(Gaussian(), draws), Rise(), Mean()), normalize_logits)


def _of_logits(measure: Measure, normalize: bool) -> Measured:
    flag("normalize_logits", normalize)
    return OnCriterion(measure, normalized_logits) if normalize else measure


# ---------------------------------------------------------------- by name


@dataclass(frozen=True)
class MeasureSpec:
    """A named measure for listings and commands: its builder, and whether rescaling scale groups leaves it alone.

    ``invariant`` holds for the default options (adaptive sharpness is invariant at η = 0 only).
    """

    build: Callable[..., Measured]
    summary: str
    source: str
    needs_groups: bool = False
    invariant: bool = False

    def options(self) -> dict[str, Any]:
        """The builder's options with their defaults, those of plain types."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "geometry"}


def _spec(build: Callable[..., Measured], summary: str, source: str, *, invariant: bool = False) -> MeasureSpec:
    """Builders that take scale groups take them first."""
    first = next(iter(inspect.signature(build).parameters), "")
    return MeasureSpec(build, summary, source, first == "groups", invariant)


MEASURES: dict[str, MeasureSpec] = {
    "bn_sharpness": _spec(
        bn_sharpness, "L^p norm of the loss rise along the sharpest direction, relative to each filter's norm",
        "Yi et al. 2019, definition 1", invariant=True,
    ),
    "bn_ball": _spec(
        bn_ball, "mean loss rise over balls relative to each filter's norm", "Yi et al. 2019, appendix C",
        invariant=True,
    ),
    "bn_gaussian": _spec(
        bn_gaussian, "mean loss rise under Gaussian noise relative to each filter's norm", "Yi et al. 2019, appendix C",
        invariant=True,
    ),
    "bn_entropy": _spec(
        bn_entropy, "free energy of Gaussian noise relative to each filter's norm", "Yi et al. 2019, appendix C",
        invariant=True,
    ),
    "bn_random_line": _spec(
        bn_random_line, "L^p norm of the loss rise along a random direction, relative to each filter's norm",
        "Yi et al. 2019, appendix C", invariant=True,
    ),
    "epsilon_sharpness": _spec(
        epsilon_sharpness, "largest loss rise found in a ball of radius delta", "Keskar et al. 2017"
    ),
    "keskar": _spec(
        keskar, "largest loss rise over 1 + L in a box relative to each weight, or in a random subspace of it",
        "Keskar et al. 2017, eq. 3-4",
    ),
    "adaptive": _spec(
        adaptive, "largest loss rise, each weight perturbed in proportion", "Kwon et al. 2021", invariant=True
    ),
    "adaptive_average": _spec(
        adaptive_average, "mean loss rise, each weight perturbed in proportion", "Andriushchenko et al. 2023",
        invariant=True,
    ),
    "gaussian": _spec(gaussian, "mean loss rise under Gaussian noise of size sigma", "Neyshabur et al. 2017"),
    "lebesgue_ball": _spec(lebesgue_ball, "mean loss rise over a ball (or box) of radius delta", "Wen et al. 2018"),
    "local_entropy": _spec(local_entropy, "free energy of Gaussian noise of size gamma^-1/2", "Chaudhari et al. 2017"),
    "filter_normalized": _spec(
        filter_normalized, "L^p norm of the loss rise along filter-normalized random directions", "Li et al. 2018"
    ),
    "largest_sigma": _spec(
        largest_sigma, "largest Gaussian noise that raises the loss by at most rise", "Jiang et al. 2020"
    ),
    "largest_sigma_accuracy": _spec(
        largest_sigma_accuracy, "largest Gaussian noise that lowers the accuracy by at most drop", "Jiang et al. 2020"
    ),
    "hessian_top": _spec(largest_eigenvalue, "largest Hessian eigenvalue, by Lanczos", "Lanczos 1950"),
    "relative_top": _spec(
        relative_top, "largest curvature of a perturbation relative to each filter's norm", "Rangamani et al. 2021",
        invariant=True,
    ),
    "spherical_top": _spec(spherical_top, "largest Hessian eigenvalue times the squared norm", "Lyu et al. 2022"),
    "hessian_trace": _spec(hessian_trace, "Hessian trace, by Rademacher draws", "Hutchinson 1989"),
    "relative_trace": _spec(
        relative_trace, "Hessian trace relative to each filter's mean square", "Hutchinson 1989", invariant=True
    ),
    "relative_flatness": _spec(
        relative_flatness, "Hessian traces between a layer's neurons, weighted by their inner products",
        "Petzka et al. 2021",
    ),
    "fisher_rao": _spec(
        fisher_rao, "Gauss-Newton form of the parameters themselves", "Liang et al. 2019", invariant=True
    ),
    "pac_bayes": _spec(
        pac_bayes, "bound of the error rate under noise relative to each filter's norm", "McAllester 2003",
        invariant=True,
    ),
}


def build_measure(name: str, groups: Groups | None = None, **options: Any) -> Measured:
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
