"""Regularisers: what a measure does to the gradient that training descends.

The values are :class:`Penalty` (``L + λS``), :class:`Averaged` (one gradient per step), :class:`Smoothing` and
:class:`LocalEntropy` (which replace the loss), and wrappers of regularisers; the functions below are the published
sharpness-aware steps as combinations of them. The protocol is in :mod:`bnsharp.penalties`.
"""

from __future__ import annotations

from bnsharp.checks import positive
from bnsharp.directions import Ascend
from bnsharp.errors import InputError
from bnsharp.geometry import Elementwise, Euclidean, Geometry
from bnsharp.measures import Measure
from bnsharp.penalties import Averaged, Penalty, Plain, Regularizer, check_weight
from bnsharp.penalty_gradients import GRADIENTS
from bnsharp.profiles import Rise
from bnsharp.reduce import Maximum
from bnsharp.smoothings import LocalEntropy, Smoothing
from bnsharp.starts import Start, Steepest, Unusual, Warm
from bnsharp.wrappers import Chunked, Look, SurrogateGap

__all__ = [
    "GRADIENTS", "Averaged", "Chunked", "LocalEntropy", "Look", "Penalty", "Plain", "Regularizer", "Smoothing", "Start",
    "Steepest", "SurrogateGap", "Unusual", "Warm", "asam", "check_weight", "friendly_sam", "gsam", "look_sam", "m_sam",
    "msam", "sam", "wsam_weight",
]


def _worst(geometry: Geometry) -> Measure:
    """The loss at the steepest point of a ball: the measure behind every sharpness-aware step."""
    return Measure(geometry, Ascend(0), Rise(), Maximum())


def sam(*, rho: float = 0.05) -> Penalty:
    """SAM: ``∇L(θ + ρ g/‖g‖)`` at weight 1 (Foret et al. 2021, eq. 2-3).

    Raises:
        InputError: ρ ≤ 0 or not finite.
    """
    positive("rho", rho)
    return Penalty(_worst(Euclidean(rho)))


def asam(*, rho: float = 0.5, eta: float = 0.01) -> Penalty:
    """ASAM: ``∇L(θ + ρ T²g/‖Tg‖)``, ``T = |θ| + η`` on every parameter, held fixed (Kwon et al. 2021, eq. 7).

    Raises:
        InputError: ρ ≤ 0, η < 0, or either not finite.
    """
    positive("rho", rho)
    return Penalty(_worst(Elementwise(rho, eta)))


def m_sam(*, rho: float = 0.05, chunks: int = 4) -> Chunked:
    """m-SAM: SAM on each of ``chunks`` equal parts of the batch, averaged (Foret et al. 2021, section 4.2)."""
    return Chunked(sam(rho=rho), chunks)


def wsam_weight(gamma: float) -> float:
    """The weight at which SAM is WSAM, ``λ = γ/(1−γ)`` (Yue et al. 2023, eq. 6, coupled); γ = ½ is SAM.

    Raises:
        InputError: γ outside [0, 1).
    """
    if not (isinstance(gamma, int | float) and 0 <= gamma < 1):
        raise InputError(f"gamma={gamma!r}; expected 0 <= gamma < 1")
    return gamma / (1 - gamma)


def friendly_sam(*, rho: float = 0.05, sigma: float = 1.0, decay: float = 0.9) -> Penalty:
    """FriendlySAM: ``∇L(θ + ρ d/‖d‖)``, ``d = g − σ m``, m an average of past g (Li et al. 2024); σ = 0 is SAM."""
    positive("rho", rho)
    return Penalty(_worst(Euclidean(rho)), start=Unusual(sigma, decay))


def look_sam(*, rho: float = 0.05, every: int = 10, alpha: float = 0.7) -> Look:
    """LookSAM: a SAM step every k, its part across g used again in between (Liu et al. 2022, algorithm 1)."""
    return Look(sam(rho=rho), every, alpha)


def gsam(*, rho: float = 0.05, alpha: float = 0.4) -> SurrogateGap:
    """GSAM with a constant ρ: SAM's gradient less ``α (g − proj_{g'} g)`` (Zhuang et al. 2022); α = 0 is SAM."""
    return SurrogateGap(sam(rho=rho), alpha)


def msam(*, rho: float = 0.3, momentum: float = 0.9) -> Regularizer:
    """Momentum-SAM: ``∇L(θ − ρ m/‖m‖)``, m SGD's momentum of past gradients: one gradient (Becker et al. 2024).

    ρ = 0 is the plain loss.
    """
    if rho == 0:
        return Plain()
    positive("rho", rho)
    return Averaged(_worst(Euclidean(rho)), momentum, descent=True)
