"""Laws: how unit directions u are drawn in a ball, and how t is distributed on a segment.

Coordinate laws (Gaussian, Rademacher) have ``E u_j² = 1`` in a joint ball and in a box, and ``E ‖u_i‖² = 1``,
that is ``1/d_i`` per coordinate, in a groupwise ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import positive
from bnsharp.partition import Partition
from bnsharp.types import Params


class HasPartition(Protocol):
    """What a law needs of a ball: its groups, and the standard deviation of one coordinate."""

    def partition(self, like: Params) -> Partition: ...

    def coordinate_std(self, like: Params) -> Params: ...


class Law(Protocol):
    """One draw ``u`` in ``ball``, in the shape of ``like``."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params: ...


def _normal(like: Params, generator: torch.Generator) -> Params:
    return P.pmap(
        lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device), like
    )


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
        lengths = torch.rand(sizes.shape, generator=generator, dtype=sizes.dtype, device=sizes.device) ** (1 / sizes)
        return partition.scale(u, lengths)


@dataclass(frozen=True)
class Box:
    """Uniform on ``[−1, 1]`` per coordinate."""

    def __call__(self, ball: HasPartition, like: Params, generator: torch.Generator) -> Params:
        return P.pmap(
            lambda x: 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 1, like
        )


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

    A law of t says where ``|t|`` lives (``[0, reach]``), its density there, and ``E |t|^p``.
    """

    delta: float

    def __post_init__(self) -> None:
        positive("delta", self.delta)

    @property
    def reach(self) -> float:
        """The largest ``|t|``."""
        return self.delta

    def density(self, t: Tensor) -> Tensor:
        """Density of ``|t|`` on ``[0, reach]``."""
        return torch.full_like(t, 1.0 / self.delta)

    def moment(self, p: float) -> float:
        """``E |t|^p = δ^p / (p + 1)``."""
        return self.delta**p / (p + 1)
