"""Laws: how unit directions u are drawn in a ball, and how t is distributed on a segment.

Coordinate laws (Gaussian, Rademacher) have ``E u_j² = 1`` in a joint ball and in a box, and ``E ‖u_i‖² = 1``,
that is ``1/d_i`` per coordinate, in a groupwise ball.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import positive
from bnsharp.partition import Partition
from bnsharp.quadrature import SegmentLaw
from bnsharp.types import Params


class HasPartition(Protocol):
    """What a law needs of a ball: its groups, and the standard deviation of one coordinate."""

    def partition(self, like: Params) -> Partition: ...

    def coordinate_std(self, like: Params) -> Params: ...


class Law(Protocol):
    """One draw ``u`` in ``ball``, in the shape of ``like``."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params: ...


DRAWN_IN = torch.float32
"""All draws are made in this precision and then cast, so that a seed gives the same perturbation in every precision."""


def _normal(like: Params, generator: torch.Generator) -> Params:
    return P.pmap(
        lambda x: torch.randn(x.shape, generator=generator, dtype=DRAWN_IN, device=x.device).to(x.dtype), like
    )


def _uniform(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=DRAWN_IN, device=like.device).to(like.dtype)


@dataclass(frozen=True)
class Sphere:
    """Uniform on the unit sphere of each group of the ball."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params:
        return ball.partition(like).normalize(_normal(like, generator))


@dataclass(frozen=True)
class Ball:
    """Uniform in the unit ball of each group: a point of the sphere times ``U^{1/d_i}``."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params:
        partition = ball.partition(like)
        u = partition.normalize(_normal(like, generator))
        sizes = partition.sizes(like)
        lengths = _uniform(sizes.shape, sizes, generator) ** (1 / sizes)
        return partition.scale(u, lengths)


@dataclass(frozen=True)
class Box:
    """Uniform on ``[−1, 1]`` per coordinate."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params:
        return P.pmap(lambda x: 2 * _uniform(x.shape, x, generator) - 1, like)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal coordinates."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params:
        return P.pmap(lambda x, s: s * x, _normal(like, generator), ball.coordinate_std(like))


@dataclass(frozen=True)
class Rademacher:
    """Independent signs."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params:
        def signs(x: Tensor) -> Tensor:
            return torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1

        return P.pmap(lambda x, s: s * signs(x), like, ball.coordinate_std(like))


@dataclass(frozen=True)
class Uniform:
    """t uniform on ``[−δ, δ]``: the law of BN-Sharpness (Yi et al. 2019, eq. 4).

    A law of t has a unit (``reach``), a density of ``|t|``, and moments ``E |t|^p``: see
    :class:`bnsharp.quadrature.SegmentLaw`.
    """

    delta: float

    extent: ClassVar[float] = 1.0
    is_bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("delta", self.delta)

    @property
    def reach(self) -> float:
        """The largest ``|t|``."""
        return self.delta

    @property
    def standard(self) -> Uniform:
        return Uniform(1.0)

    def density(self, t: Tensor) -> Tensor:
        """Density of ``|t|`` on ``[0, reach]``."""
        return torch.full_like(t, 1.0 / self.delta)

    def moment(self, p: float) -> float:
        """``E |t|^p = δ^p / (p + 1)``."""
        return self.delta**p / (p + 1)


@dataclass(frozen=True)
class Normal:
    """``t ~ N(0, σ²)``; its two-point form is taken at ``t = σ``."""

    sigma: float

    extent: ClassVar[float] = 12.0
    """The density beyond 12 σ is below 1e-31."""
    is_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("sigma", self.sigma)

    @property
    def reach(self) -> float:
        """The standard deviation of t."""
        return self.sigma

    @property
    def standard(self) -> Normal:
        return Normal(1.0)

    def density(self, t: Tensor) -> Tensor:
        """Density of ``|t|``: ``√(2/π)/σ · exp(−t²/(2σ²))``."""
        return math.sqrt(2 / math.pi) / self.sigma * torch.exp(-0.5 * (t / self.sigma) ** 2)

    def moment(self, p: float) -> float:
        """``E |t|^p = σ^p 2^{p/2} Γ((p+1)/2)/√π``."""
        return self.sigma**p * 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)


SEGMENTS: dict[str, Callable[[float], SegmentLaw]] = {"uniform": Uniform, "normal": Normal}
"""Laws of t by name, built from their reach."""
