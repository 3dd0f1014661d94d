"""Balls: the sets of unit directions u, and the groups of parameters that they are products over.

Joint (``‖u‖ ≤ 1``), groupwise (``‖u_i‖ ≤ 1`` for each group) or a box (``|u_j| ≤ 1``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.partition import Group, Partition
from bnsharp.types import Params

NEGLIGIBLE = 1e-12
"""A group's gradient is negligible when its norm is below this fraction of the sum over groups."""


class Groups(Protocol):
    """What a geometry needs of scale groups (``bnsharp.ScaleGroups``)."""

    @property
    def partition(self) -> Partition: ...

    def partition_with(self, params: Params, rest: str = "tensor") -> Partition: ...


@dataclass(frozen=True)
class Filters:
    """Each output filter (row) of a parameter with two or more dimensions is a group; the rest is in none."""

    @property
    def partition(self) -> Partition:
        return Partition(())

    def partition_with(self, params: Params, rest: str = "tensor") -> Partition:
        return Partition(tuple(Group("row", (k,), p.shape[0]) for k, p in params.items() if p.ndim >= 2))


@dataclass(frozen=True)
class Together:
    """All parameters are one group."""

    @property
    def partition(self) -> Partition:
        return Partition(())

    def partition_with(self, params: Params, rest: str = "tensor") -> Partition:
        return Partition.joint(params.keys())


class PartitionBall(ABC):
    """The product of unit balls over the groups of a partition (abstract: subclasses give the partition)."""

    @abstractmethod
    def partition(self, like: Params) -> Partition:
        """The groups whose directions have norm at most 1."""

    def invariant(self, like: Params) -> Partition:
        """The groups along whose radius the loss does not change: none, unless the ball knows scale groups."""
        return Partition(())

    def coordinate_std(self, like: Params) -> Params:
        """``1/√d_i`` per coordinate: ``E ‖u_i‖² = 1``."""
        partition = self.partition(like)
        return partition.spread(partition.sizes(like) ** -0.5, like)

    def active(self, scale: Params, like: Params) -> Tensor:
        """Which groups the scale perturbs at all: bool ``[K]``."""
        full = P.pmap(lambda s, p: s.expand(p.shape[len(like.batch_size) :]), scale, like)
        return self.partition(like).norms(P.make(dict(full.items()))) > 0

    def count(self, scale: Params, like: Params) -> Tensor:
        """``K``, the number of groups that the scale perturbs."""
        return self.active(scale, like).sum()

    def steepest(self, g: Params, scale: Params, fill: Callable[[], Params]) -> Params:
        """``argmax_{u ∈ ball} ⟨g, u⟩ = g_i/‖g_i‖``; ``fill()`` for perturbed groups with a negligible gradient."""
        partition = self.partition(g)
        norms = partition.norms(g)
        u, missing = partition.normalize(g, norms), self.negligible(norms)
        if bool(missing.any()):
            missing = missing & self.active(scale, g)
            if bool(missing.any()):
                mask = partition.spread(missing, g)
                return P.pmap(lambda a, b, m: torch.where(m, b, a), u, fill(), mask)
        return u

    def negligible(self, norms: Tensor) -> Tensor:
        """Which groups' gradients, of these norms in unit coordinates, are negligible: bool ``[*, K]``."""
        return norms <= NEGLIGIBLE * norms.sum()

    def tangent(self, u: Params, g: Params) -> Params:
        """``g_i − ⟨u_i, g_i⟩ u_i``: the Riemannian gradient on the product of unit spheres, for ``‖u_i‖ = 1``."""
        partition = self.partition(u)
        return partition.moved(g, -partition.dots(u, g), u)

    def retract(self, u: Params) -> Params:
        """``u_i / ‖u_i‖``: back to the product of unit spheres."""
        return self.partition(u).normalize(u)

    def back(self, raw: Params, u: Params, g: Params) -> Params:
        """The gradient with respect to w where ``u = w_i/‖w_i‖`` and ``g = ∂/∂u``: ``(g_i − ⟨u_i, g_i⟩u_i)/‖w_i‖``."""
        partition = self.partition(u)
        return partition.scale(self.tangent(u, g), P.safe_reciprocal(partition.norms(raw)))

    def power(self, u: Params, g: Params) -> Params:
        """``g_i / ‖g_i‖``, the maximiser of the linearised score; groups without gradient keep ``u_i``."""
        partition = self.partition(u)
        norms = partition.norms(g)
        new, alive = partition.normalize(g, norms), norms > 0
        if bool(alive.all()):
            return new
        return P.pmap(lambda a, b, m: torch.where(m, b, a), u, new, partition.spread(alive, u))


@dataclass(frozen=True)
class JointBall(PartitionBall):
    """``‖u‖ ≤ 1`` over all parameters."""

    def partition(self, like: Params) -> Partition:
        return Partition.joint(like.keys())

    def coordinate_std(self, like: Params) -> Params:
        """1 per coordinate: the scale is the standard deviation of one coordinate."""
        return P.pmap(lambda p: p.new_ones((1,) * (p.ndim - len(like.batch_size))), like)


@dataclass(frozen=True)
class GroupBall(PartitionBall):
    """``‖u_i‖ ≤ 1`` for each scale group, and for the rest per tensor (``rest="tensor"``) or jointly."""

    groups: Groups
    rest: str = "tensor"
    _cache: dict[tuple[object, ...], Partition] = field(default_factory=dict, compare=False, repr=False)

    def partition(self, like: Params) -> Partition:
        lead = len(like.batch_size)
        key = (*like.keys(), *(v.shape[lead:] if lead else v.shape for v in like.values()))
        known = self._cache.get(key)
        if known is None:
            one = P.pick(like, 0) if like.batch_size else like
            known = self._cache[key] = self.groups.partition_with(one, self.rest)
        return known

    def invariant(self, like: Params) -> Partition:
        names = {name for group in self.groups.partition.groups for name in group.members}
        return Partition(tuple(g for g in self.partition(like) if set(g.members) <= names))


@dataclass(frozen=True)
class BoxBall:
    """``|u_j| ≤ 1`` per coordinate."""

    def partition(self, like: Params) -> Partition:
        return Partition.joint(like.keys())

    def invariant(self, like: Params) -> Partition:
        return Partition(())

    def coordinate_std(self, like: Params) -> Params:
        return JointBall().coordinate_std(like)

    def count(self, scale: Params, like: Params) -> Tensor:
        """The number of coordinates that the scale perturbs."""
        shapes = {k: p.shape[len(like.batch_size) :] for k, p in like.items()}
        return torch.stack([(s > 0).expand(shapes[k]).sum() for k, s in scale.items()]).sum()

    def steepest(self, g: Params, scale: Params, fill: Callable[[], Params]) -> Params:
        """``sign(g)``; where the gradient is negligible, ``sign(fill())``."""
        threshold = NEGLIGIBLE * torch.stack([a.abs().sum() for a in g.values()]).sum()
        missing = P.pmap(lambda a, s: (a.abs() <= threshold) & (s > 0), g, scale)
        if not any(bool(m.any()) for m in missing.values()):
            return P.pmap(torch.sign, g)
        return P.pmap(lambda a, b, m: torch.where(m, torch.sign(b), torch.sign(a)), g, fill(), missing)

    def tangent(self, u: Params, g: Params) -> Params:
        """g, without what would leave the box."""
        return P.pmap(lambda a, b: torch.where((a.abs() >= 1) & (a * b > 0), torch.zeros_like(b), b), u, g)

    def retract(self, u: Params) -> Params:
        """Clip to the box."""
        return P.pmap(lambda a: a.clamp(-1, 1), u)

    def back(self, raw: Params, u: Params, g: Params) -> Params:
        """The gradient with respect to w where u is w clipped to the box and ``g = ∂/∂u``."""
        return P.pmap(lambda w, b: torch.where(w.abs() > 1, torch.zeros_like(b), b), raw, g)

    def power(self, u: Params, g: Params) -> Params:
        """``sign(g)``; coordinates without gradient keep ``u_j``."""
        return P.pmap(lambda a, b: torch.where(b == 0, a, torch.sign(b)), u, g)


AnyBall = PartitionBall | BoxBall
