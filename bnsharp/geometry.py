"""Geometry = scale × ball: which perturbations ``v = s(θ) ⊙ u`` are allowed.

The ball is a set of unit directions u: joint (``‖u‖ ≤ 1``), groupwise (``‖u_i‖ ≤ 1`` for each group) or a box
(``|u_j| ≤ 1``). The scale ``s(θ)`` is a constant, the group norms ``‖θ_i‖`` (what makes a measure invariant under
``T_a``), or a magnitude ``|θ_j| + η``. Everything that should be invariant is computed in u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.balls import (
    AnyBall,
    BoxBall,
    Filters,
    GroupBall,
    Groups,
    JointBall,
    PartitionBall,
    Together,
)
from bnsharp.checks import at_least, one_of, positive
from bnsharp.errors import InputError
from bnsharp.partition import Partition
from bnsharp.types import Params

__all__ = [
    "AnyBall", "BoxBall", "Constant", "Elementwise", "Euclidean", "Filters", "Frame", "Geometry", "GroupBall",
    "GroupNorms", "Groups", "Groupwise", "JointBall", "LinearMap", "Magnitude", "Matrices", "PartitionBall", "Scale",
    "Together",
]

# ---------------------------------------------------------------- scales


@dataclass(frozen=True)
class Constant:
    """``s(θ) = value``."""

    value: float

    def __post_init__(self) -> None:
        positive("scale", self.value)

    def __call__(self, params: Params) -> Params:
        return P.pmap(lambda p: p.new_full((1,) * p.ndim, self.value), params)

    def by_group(self, partition: Partition, params: Params) -> float:
        """The same on every group."""
        return self.value


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

    def by_group(self, partition: Partition, params: Params) -> Tensor | None:
        """``[K]``, on the ball's own groups."""
        return self.radius * partition.norms(params) if partition == self.ball.partition(params) else None


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


@dataclass(frozen=True)
class Matrices:
    """Another scale, and 0 on parameters of fewer than two dimensions: biases, normalizers' own parameters."""

    scale: Scale

    def __call__(self, params: Params) -> Params:
        scale = self.scale(params)
        return P.make({k: s if params[k].ndim >= 2 else torch.zeros_like(s) for k, s in scale.items()})


class Scale(Protocol):
    """``θ ↦ s(θ)``, tensors that broadcast against each parameter; differentiable in θ: ``v = s(θ) ⊙ u``.

    One that is constant on each group of a partition may say so by ``by_group(partition, θ)``: its values ``[K]``, or
    None for groups on which it is not. Steepest points then take one pass over the parameters. A class derived from one
    that does, and which is another function, gives another ``by_group`` too, or sets it to None.
    """

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
        return P.pullback(lambda x: self.place(u, x), params, gradient_v)

    def at(self, params: Params) -> Frame:
        """The geometry at one θ, what depends on θ computed once."""
        return Frame(self, params)


class Frame:
    """A geometry at one θ: unit directions u stand for perturbations ``v = s(θ) ⊙ u``.

    Attributes:
        params: θ.
        like: a point in the shape of u (θ itself unless the geometry has coordinates of its own).
        scale: ``s(θ)``, made when it is needed; ones for a map that is no diagonal.
    """

    def __init__(self, geometry: Geometry, params: Params):
        self.geometry, self.params, self.ball = geometry, params, geometry.ball
        self.linear = None if callable(geometry.scale) else geometry.scale
        self.like = params if self.linear is None else self.linear.like(params)

    @cached_property
    def scale(self) -> Params:
        known = self._by_group
        if isinstance(known, Tensor) and isinstance(self.ball, PartitionBall):
            return self.ball.partition(self.params).spread(known, self.params)
        if callable(self.geometry.scale):
            return self.geometry.scale(self.params)
        return P.pmap(lambda p: p.new_ones((1,) * p.ndim), self.like)

    def place(self, u: Params, factor: float = 1.0) -> Params:
        """``v = factor · s(θ) ⊙ u``."""
        if self.linear is not None:
            linear = self.linear
            return P.scaled(_each(lambda item: linear.place(item, self.params), u), factor)
        return self._times(u, factor)

    def _times(self, u: Params, factor: Tensor | float) -> Params:
        scale = self.scale if isinstance(factor, float) and factor == 1.0 else P.scaled(self.scale, factor)
        if P.is_plain(u.values(), scale.values()):
            return P.foreach(torch._foreach_mul, u, scale)
        return P.pmap(lambda a, s: a * s, u, scale)

    @cached_property
    def _by_group(self) -> Tensor | float | None:
        """The scale on each group of the ball, ``[K]``, where it is constant on them."""
        by_group = getattr(self.geometry.scale, "by_group", None)
        if by_group is None or not isinstance(self.ball, PartitionBall):
            return None
        return by_group(self.ball.partition(self.params), self.params)  # type: ignore[no-any-return]

    def points(self, u: Params, factor: float = 1.0) -> Params:
        """``θ + factor · v``, a batch ``[n]`` for a batch u."""
        if self.linear is not None:
            return P.shift(self.params, self.place(u, factor))
        if P.is_plain(self.params.values(), u.values(), self.scale.values()):
            return P.foreach(lambda p, a, s: torch._foreach_addcmul(p, a, s, factor), self.params, u, self.scale)
        return P.pmap(lambda p, a, s: torch.addcmul(p, a, s, value=factor), self.params, u, self.scale)

    def pull(self, g: Params, factor: Tensor | float = 1.0) -> Params:
        """``∂/∂u`` from ``∂/∂v``, times a number: the adjoint of :meth:`place`, which a diagonal scale is itself."""
        if self.linear is not None:
            linear = self.linear
            return P.scaled(_each(lambda item: linear.pull(item, self.params), g), factor)
        return self._times(g, factor)

    def steepest(self, g: Params, fill: Callable[[], Params]) -> Params:
        """``argmax_{u ∈ ball} ⟨g, u⟩`` for ``g = ∂L/∂u``; ``fill()`` where the gradient is negligible."""
        return self.ball.steepest(g, self.scale, fill)

    def summit(self, g: Params, factor: float, fill: Callable[[], Params]) -> Params:
        """``θ + factor · v``, v the perturbation along which a loss with gradient ``g = ∂L/∂v`` rises most."""
        scale = self._by_group
        if scale is not None and isinstance(self.ball, PartitionBall) and P.is_plain(g.values()):
            partition = self.ball.partition(self.params)
            norms = partition.norms(g)
            sizes = scale * norms  # in unit coordinates
            missing = self.ball.negligible(sizes)
            if not missing.any():
                return partition.moved(self.params, factor * scale / norms, g)
            if not (missing & (scale > 0)).any():  # where the scale is 0 nothing moves
                return partition.moved(self.params, torch.where(sizes > 0, factor * scale / norms, 0.0), g)
        return self.points(self.steepest(self.pull(g), fill), factor)

    @cached_property
    def size(self) -> Tensor:
        """``√K``, K the number of groups (coordinates, for a box) that are perturbed: the length of u."""
        if isinstance(self._by_group, Tensor):
            return (self._by_group > 0).sum().sqrt()
        return self.ball.count(self.scale, self.like).sqrt()

    def uphill(self, u: Params, g: Params, rate: Tensor, ambient: bool = False) -> Params:
        """One Riemannian step of u along the score's gradient ``g = ∂/∂u``, retracted onto the ball.

        u is a batch ``[n]`` with as many rates, or one point.

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
        step = P.safe_divide(rate * length, norm)
        return self.ball.retract(P.shift(u, P.times(step, move)) if step.ndim else P.shift(u, move, step))


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
