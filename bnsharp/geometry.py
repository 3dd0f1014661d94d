"""Geometry = scale × ball: which perturbations ``v = s(θ) ⊙ u`` are allowed.

The ball is a set of unit directions u: joint (``‖u‖ ≤ 1``), groupwise (``‖u_i‖ ≤ 1`` for each group) or a box
(``|u_j| ≤ 1``). The scale ``s(θ)`` is a constant, the group norms ``‖θ_i‖`` (what makes a measure invariant under
``T_a``), or a magnitude ``|θ_j| + η``. Everything that should be invariant is computed in u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import at_least, one_of, positive
from bnsharp.errors import InputError
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


# ---------------------------------------------------------------- scales


@dataclass(frozen=True)
class Constant:
    """``s(θ) = value``."""

    value: float

    def __post_init__(self) -> None:
        positive("scale", self.value)

    def __call__(self, params: Params) -> Params:
        return P.pmap(lambda p: p.new_full((1,) * p.ndim, self.value), params)


@dataclass(frozen=True)
class GroupNorms:
    """``s(θ) = radius · ‖θ_i‖`` on group i: ``s(T_a θ) = a_i s(θ)``; a group of norm zero is not perturbed."""

    ball: GroupBall
    radius: float = 1.0

    def __post_init__(self) -> None:
        positive("radius", self.radius)

    def __call__(self, params: Params) -> Params:
        partition = self.ball.partition(params)
        return partition.spread(self.radius * partition.norms(params), params)


@dataclass(frozen=True)
class Magnitude:
    """``s(θ)_j = radius · (|θ_j| + η)`` (adaptive sharpness, ASAM; Keskar's box with η = 1)."""

    radius: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        positive("radius", self.radius)
        at_least("eta", self.eta, 0)

    def __call__(self, params: Params) -> Params:
        return P.pmap(lambda p: self.radius * (p.abs() + self.eta), params)


class Scale(Protocol):
    """``θ ↦ s(θ)``, tensors that broadcast against each parameter; differentiable in θ: ``v = s(θ) ⊙ u``."""

    def __call__(self, params: Params) -> Params: ...


class LinearMap(Protocol):
    """``v = M(θ) u`` where M is no diagonal (:mod:`bnsharp.maps`); u has coordinates of its own."""

    def like(self, params: Params) -> Params:
        """A point in the shape of u."""
        ...

    def place(self, u: Params, params: Params) -> Params:
        """``M(θ) u`` for one u, differentiable in θ."""
        ...

    def pull(self, g: Params, params: Params) -> Params:
        """``M(θ)ᵀ g`` for one g."""
        ...


# ---------------------------------------------------------------- balls


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
        u, missing = partition.normalize(g, norms), norms <= NEGLIGIBLE * norms.sum()
        if bool(missing.any()):
            missing = missing & self.active(scale, g)
            if bool(missing.any()):
                mask = partition.spread(missing, g)
                return P.pmap(lambda a, b, m: torch.where(m, b, a), u, fill(), mask)
        return u

    def tangent(self, u: Params, g: Params) -> Params:
        """``g_i − ⟨u_i, g_i⟩ u_i``: the Riemannian gradient on the product of unit spheres, for ``‖u_i‖ = 1``."""
        partition = self.partition(u)
        return P.pmap(lambda a, d, b: a - d * b, g, partition.spread(partition.dots(u, g), u), u)

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
        key = tuple((k, v.shape[len(like.batch_size) :]) for k, v in like.items())
        if key not in self._cache:
            one = P.pick(like, 0) if like.batch_size else like
            self._cache[key] = self.groups.partition_with(one, self.rest)
        return self._cache[key]

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


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """A scale (or another linear map of u) and a ball.

    Raises:
        InputError: a map that is no diagonal with a groupwise ball.
    """

    scale: Scale | LinearMap
    ball: AnyBall

    def __post_init__(self) -> None:
        if not callable(self.scale) and isinstance(self.ball, GroupBall):
            raise InputError("a map with coordinates of its own has no scale groups; expected a joint ball or a box")

    def place(self, u: Params, params: Params) -> Params:
        """``v = s(θ) ⊙ u``, differentiable in θ with u held fixed; u may be a batch ``[n]``."""
        if callable(self.scale):
            return P.pmap(lambda a, s: s * a, u, self.scale(params))
        linear = self.scale
        return _each(lambda item: linear.place(item, params), u)

    def moving(self, u: Params, gradient_v: Params, params: Params) -> Params:
        """``(∂v/∂θ)ᵀ ∂S/∂v`` with u held: for group norms ``⟨∂S/∂v_i, u_i⟩ θ_i/‖θ_i‖`` on group i."""
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        with torch.enable_grad():
            inner = P.dot(self.place(u, P.make(leaves)), gradient_v)
        if not inner.requires_grad:
            return P.zeros_like(params)
        grads = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return P.make(dict(zip(leaves, grads, strict=True)))

    def at(self, params: Params) -> Frame:
        """The geometry at one θ, what depends on θ computed once."""
        return Frame(self, params)


class Frame:
    """A geometry at one θ: unit directions u stand for perturbations ``v = s(θ) ⊙ u``.

    Attributes:
        params: θ.
        like: a point in the shape of u (θ itself unless the geometry has coordinates of its own).
        scale: ``s(θ)``; ones for a map that is no diagonal.
    """

    def __init__(self, geometry: Geometry, params: Params):
        self.geometry, self.params, self.ball = geometry, params, geometry.ball
        self.linear = None if callable(geometry.scale) else geometry.scale
        self.like = params if self.linear is None else self.linear.like(params)
        if callable(geometry.scale):
            self.scale = geometry.scale(params)
        else:
            self.scale = P.pmap(lambda p: p.new_ones((1,) * p.ndim), self.like)

    def place(self, u: Params, factor: float = 1.0) -> Params:
        """``v = factor · s(θ) ⊙ u``."""
        if self.linear is not None:
            linear = self.linear
            return P.scaled(_each(lambda item: linear.place(item, self.params), u), factor)
        return self._times(u, factor)

    def _times(self, u: Params, factor: float) -> Params:
        if factor == 1.0:
            return P.pmap(lambda a, s: a * s, u, self.scale)
        return P.pmap(lambda a, s: a * (factor * s), u, self.scale)

    def points(self, u: Params, factor: float = 1.0) -> Params:
        """``θ + factor · v``, a batch ``[n]`` for a batch u."""
        if self.linear is not None:
            return P.shift(self.params, self.place(u, factor))
        return P.pmap(lambda p, a, s: torch.addcmul(p, a, s, value=factor), self.params, u, self.scale)

    def pull(self, g: Params, factor: float = 1.0) -> Params:
        """``∂/∂u`` from ``∂/∂v``: the adjoint of :meth:`place`, which a diagonal scale is itself."""
        if self.linear is not None:
            linear = self.linear
            return P.scaled(_each(lambda item: linear.pull(item, self.params), g), factor)
        return self._times(g, factor)

    def steepest(self, g: Params, fill: Callable[[], Params]) -> Params:
        """``argmax_{u ∈ ball} ⟨g, u⟩`` for ``g = ∂L/∂u``; ``fill()`` where the gradient is negligible."""
        return self.ball.steepest(g, self.scale, fill)

    @cached_property
    def size(self) -> Tensor:
        """``√K``, K the number of groups (coordinates, for a box) that are perturbed: the length of u."""
        return self.ball.count(self.scale, self.like).sqrt()

    def uphill(self, u: Params, g: Params, rate: Tensor, ambient: bool = False) -> Params:
        """One Riemannian step of u ``[n]`` along the score's gradient ``g = ∂/∂u``, retracted onto the ball.

        ``u_i + η√K g_i/‖g‖`` with g the tangent gradient; ``ambient``: the same step on v with one scalar step size,
        ``v + η‖v‖ ∇_v/‖∇_v‖``, which is not equivariant under ``T_a``.
        """
        move = self.ball.tangent(u, g)
        norm, length = P.norm(move), self.size
        if ambient:
            inverse = P.pmap(P.safe_reciprocal, self.scale)
            slope = P.pmap(lambda a, r: a * r, move, inverse)  # with respect to v
            norm, length = P.norm(slope), P.norm(self.place(u))
            move = P.pmap(lambda a, r: a * r, slope, inverse)  # back in unit coordinates
        return self.ball.retract(P.shift(u, P.times(P.safe_divide(rate * length, norm), move)))


def _each(fn: Callable[[Params], Params], x: Params) -> Params:
    """``fn`` of one point, or of each point of a batch ``[n]``."""
    return P.stack([fn(P.pick(x, i)) for i in range(P.count(x))]) if x.batch_size else fn(x)


def Euclidean(scale: float, ball: str = "joint") -> Geometry:
    """Constant scale: ``‖v‖ ≤ scale`` (``ball="joint"``) or ``|v_j| ≤ scale`` (``"box"``)."""
    return Geometry(Constant(scale), _ball(ball))


def Groupwise(groups: Groups, radius: float = 1.0, rest: str = "tensor") -> Geometry:
    """``‖v_i‖ ≤ radius·‖θ_i‖`` for each group: invariant under ``T_a`` (Yi et al. 2019, definition 1)."""
    one_of("rest", rest, ("tensor", "joint"))
    ball = GroupBall(groups, rest)
    return Geometry(GroupNorms(ball, radius), ball)


def Elementwise(radius: float, eta: float = 0.0, ball: str = "joint") -> Geometry:
    """``v_j = radius·(|θ_j| + η) u_j`` with ``‖u‖ ≤ 1`` (ASAM) or ``|u_j| ≤ 1`` (Keskar 2017)."""
    return Geometry(Magnitude(radius, eta), _ball(ball))


def _ball(name: str) -> AnyBall:
    balls: dict[str, AnyBall] = {"joint": JointBall(), "box": BoxBall()}
    one_of("ball", name, balls)
    return balls[name]
