"""Measures of second order: the Hessian's and the Gauss–Newton matrix's forms in every geometry."""

from __future__ import annotations

from bnsharp.checks import one_of
from bnsharp.directions import Ascend, Directions, Draw, Lanczos, Own
from bnsharp.errors import InputError
from bnsharp.estimation import Measure
from bnsharp.geometry import Euclidean, Geometry, GroupBall, GroupNorms, Groups, Groupwise, JointBall, Together
from bnsharp.laws import Rademacher
from bnsharp.maps import NeuronMix
from bnsharp.profiles import Curvature, GaussNewton
from bnsharp.reduce import Maximum, Mean

CERTIFY = 10
"""Eigenvalue solves spent on an upper bound of a thorough search, at most."""


def hessian_top(
    *, geometry: Geometry | None = None, iterations: int = 60, tolerance: float | None = None,
    restarts: int | None = None, certify: int = CERTIFY,
) -> Measure:
    """``max vᵀHv`` over ``‖u‖ = 1`` in the geometry's ball: λ_max of the Hessian by default.

    A joint ball is solved by Lanczos (algebraically largest eigenvalue, residual as error); a product of spheres has no
    eigenvalue problem and is searched by ``iterations`` ascent steps from several starts, which is a lower bound.

    Args:
        geometry: ``‖v‖ = 1`` by default.
        iterations: Lanczos or ascent steps, at most.
        tolerance: relative residual of Lanczos (1e-4 by default), or the ascent's relative progress in five steps at
            which it ends (0: it does not).
        restarts: random starts of an ascent (4 by default).
        certify: eigenvalue solves for the upper bound.

    Raises:
        InputError: restarts for a joint ball, where nothing is searched.
    """
    geometry = Euclidean(1.0) if geometry is None else geometry
    directions: Directions
    if isinstance(geometry.ball, JointBall):
        if restarts is not None:
            raise InputError(f"restarts={restarts!r}; expected none: a joint ball is an eigenvalue problem, no search")
        directions = Lanczos(iterations, 1e-4 if tolerance is None else tolerance)
    else:
        directions = Ascend(iterations, 4 if restarts is None else restarts, tolerance=tolerance or 0.0)
    return Measure(geometry, directions, Curvature(), Maximum(), certify)


def largest_eigenvalue(*, iterations: int = 60, tolerance: float = 1e-4, certify: int = CERTIFY) -> Measure:
    """λ_max of the Hessian: :func:`hessian_top` without a geometry, which needs no search."""
    return hessian_top(iterations=iterations, tolerance=tolerance, certify=certify)


def relative_top(groups: Groups, *, ball: str = "groupwise", rest: str = "tensor", iterations: int = 60,
                 tolerance: float | None = None, restarts: int | None = None, certify: int = CERTIFY) -> Measure:
    """λ_max relative to group norms: ``max vᵀHv`` over ``‖v_i‖ = ‖θ_i‖``; invariant under ``T_a``.

    Args:
        ball: ``"groupwise"`` (``‖v_i‖ = ‖θ_i‖`` for each group: the second-order limit of BN-Sharpness) or ``"joint"``
            (``Σ_i ‖v_i‖²/‖θ_i‖² = 1``: the largest eigenvalue of ``NHN``, as Rangamani et al. 2021 per layer).
    """
    group_ball = GroupBall(groups, rest)
    balls = {"groupwise": group_ball, "joint": JointBall()}
    one_of("ball", ball, balls)
    geometry = Geometry(GroupNorms(group_ball), balls[ball])
    return hessian_top(
        geometry=geometry, iterations=iterations, tolerance=tolerance, restarts=restarts, certify=certify
    )


def spherical_top(*, iterations: int = 60, tolerance: float = 1e-4) -> Measure:
    """Spherical sharpness ``‖θ‖² λ_max(H)`` (Lyu et al. 2022): invariant under one factor for all parameters."""
    geometry = Groupwise(Together())
    return Measure(
        Geometry(geometry.scale, JointBall()), Lanczos(iterations, tolerance), Curvature(), Maximum(), CERTIFY
    )


def hessian_trace(*, geometry: Geometry | None = None, draws: int = 100) -> Measure:
    """``E vᵀHv`` over Rademacher draws: ``tr H`` by default; ``Σ_i ‖θ_i‖²/d_i tr H_ii`` in a groupwise geometry."""
    geometry = Euclidean(1.0) if geometry is None else geometry
    return Measure(geometry, Draw(Rademacher(), draws), Curvature(), Mean())


def relative_trace(groups: Groups, *, draws: int = 100, rest: str = "tensor") -> Measure:
    """``Σ_i ‖θ_i‖²/d_i · tr H_ii``: the trace relative to group norms; invariant under ``T_a``."""
    return hessian_trace(geometry=Groupwise(groups, rest=rest), draws=draws)


def fisher_rao() -> Measure:
    """Fisher–Rao norm ``θᵀ G θ`` (Liang et al. 2019, definition 2), G the Gauss–Newton matrix.

    For cross-entropy G is the Fisher information of the model. For a network of L positively homogeneous layers without
    biases it is ``L² E zᵀ(∇²_z ℓ)z``.
    """
    return Measure(Euclidean(1.0), Own(), GaussNewton(), Mean())


def relative_flatness(*, layer: str | None = None, draws: int = 100) -> Measure:
    """Relative flatness ``Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}`` of one layer's neurons (Petzka et al. 2021, definition 3).

    Args:
        layer: name of the layer's weight; None is the last weight.
        draws: of Rademacher mixtures of the neurons.

    Raises:
        InputError: no such layer.
    """
    return Measure(Geometry(NeuronMix(layer), JointBall()), Draw(Rademacher(), draws), Curvature(), Mean())
