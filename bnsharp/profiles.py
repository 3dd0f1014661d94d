"""Profiles: what is read off the loss along a perturbation v.

``Rise`` is ``L(θ+v) − L(θ)``; ``Line`` is ``(E_t |L(θ+tv) − L(θ)|^p)^{1/p}``; ``Curvature`` is ``vᵀHv``. Each is a pure
function ``(objective, θ, V [n]) -> Tensor [n]``. A profile's :meth:`secant` is its two-point form
``κ·sign·(∇L(θ+δv) − ∇L(θ))``, which costs one gradient beyond the one at θ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import at_least
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective, is_transformed
from bnsharp.geometry import Frame
from bnsharp.modes import math_attention
from bnsharp.quadrature import SegmentLaw, check_nodes, line_points, power_norm
from bnsharp.types import Params, Scored

SEARCH_NODES = 4
"""Quadrature nodes on each half segment while searching: S is then off by 1e-4 or so, alike for all directions."""

Source = Params | Sequence[Params]


class Anchor:
    """An objective at one θ: the loss, gradient and Hessian there, each evaluated at most once."""

    def __init__(self, objective: AbstractObjective, params: Params, loss: Tensor | None = None,
                 gradient: Params | None = None):
        self.objective, self.params = objective, params
        self._loss, self._gradient = loss, gradient
        self._hessian: Any = None

    @property
    def loss(self) -> Tensor:
        if self._loss is None:
            with torch.no_grad():
                self._loss = self.objective(self.params)
        return self._loss

    @property
    def gradient(self) -> Params:
        if self._gradient is None:
            self._loss, self._gradient = self.objective.value_and_grad(self.params)
        return self._gradient

    def hessian(self, v: Params) -> Params:
        """``H v``."""
        if self._hessian is None:
            self._hessian = self.objective.hessian(self.params)
        return self._hessian(v)


class Profile(ABC):
    """``(objective, θ, V [n]) -> Tensor [n]`` and what searches and regularisers need of it."""

    @abstractmethod
    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        """Values ``[n]``, an ordinary differentiable function of θ and v."""

    @abstractmethod
    def evaluate(self, anchor: Anchor, v: Source) -> tuple[Tensor, Tensor]:
        """Values ``[n]`` and numerical errors ``[n]``, without gradients and with one loss held at a time."""

    @abstractmethod
    def differentiate(
        self, anchor: Anchor, v: Source, theta: bool = False
    ) -> tuple[Tensor, Tensor, Params, Params | None]:
        """Values, errors, ``∂/∂v [n]`` and, if ``theta``, ``∂/∂θ [n]`` with v constant.

        Memory does not grow with the number of points on a line.
        """

    def secant(self) -> tuple[float, float]:
        """``(κ, δ)`` of the two-point form."""
        raise InputError(f"{type(self).__name__} has no two-point form; use gradient='exact'")

    def coarse(self) -> Profile:
        """A cheaper version that ranks directions alike: what a measurement's search is scored by."""
        return self

    def cost(self) -> int:
        """Losses or products per direction, for progress displays."""
        return 1

    @property
    def absolute(self) -> bool:
        """Whether the profile measures ``|f|`` rather than f."""
        return False


def rounding(loss: Tensor) -> Tensor:
    """Bound on the rounding error of one loss: 4 units in the last place of ``1 + |L|``."""
    return 4 * torch.finfo(loss.dtype).eps * (1 + loss.abs())


class Sampled(Profile):
    """A profile that is a function of the losses at ``θ + t_k v`` and at θ (abstract: subclasses combine)."""

    @abstractmethod
    def points(self) -> list[float]:
        """``t_1, …, t_K``."""

    @abstractmethod
    def combine(self, loss: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Values and numerical errors ``[n]`` from ``L(θ)``, repeated ``[n]``, and ``L(θ + t_k v_i) [n, K]``."""

    def cost(self) -> int:
        return len(self.points())

    def _grid(self, params: Params, v: Source) -> tuple[int, list[float], P.Lazy]:
        n, t = P.count(v), self.points()
        return n, t, P.Lazy(n * len(t), lambda i: P.shift(params, P.pick(v, i // len(t)), t[i % len(t)]))

    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        objective = as_objective(objective)
        n, t, points = self._grid(params, v)
        return self.combine(objective(params).expand(n), objective.many(points).reshape(n, len(t)))[0]

    def evaluate(self, anchor: Anchor, v: Source) -> tuple[Tensor, Tensor]:
        n, t, points = self._grid(anchor.params, v)
        with torch.no_grad():
            losses = anchor.objective.many(points).reshape(n, len(t))
            return self.combine(anchor.loss.expand(n), losses)

    def differentiate(
        self, anchor: Anchor, v: Source, theta: bool = False
    ) -> tuple[Tensor, Tensor, Params, Params | None]:
        n, t, points = self._grid(anchor.params, v)
        with torch.no_grad():
            losses = anchor.objective.many(points).reshape(n, len(t))

        def total(losses: Tensor, base: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            values, errors = self.combine(base, losses)
            return values.sum(), (values, errors)

        base = anchor.loss.detach().repeat(n)
        (weights, own), (values, errors) = torch.func.grad(total, argnums=(0, 1), has_aux=True)(losses, base)
        times = weights.new_tensor(t)
        rows = []
        for i in range(n):
            item = P.Lazy(len(t), lambda k, i=i: points[i * len(t) + k])  # type: ignore[misc]
            w = weights[i] * times
            w = torch.stack([w, weights[i]]) if theta else w[None]
            rows.append(anchor.objective.weighted_gradients(item, w))
        both = P.stack(rows)  # [n, 2], or [n, 1] without θ
        d_v = P.make({k: b[:, 0] for k, b in both.items()}, (n,))
        if not theta:
            return values, errors, d_v, None
        own_part = P.make({k: own.reshape(-1, *[1] * g.ndim) * g for k, g in anchor.gradient.items()}, (n,))
        return values, errors, d_v, P.pmap(lambda b, o: b[:, 1] + o, both, own_part)


@dataclass(frozen=True)
class Rise(Sampled):
    """``f = L(θ+v) − L(θ)``; ``|f|`` if ``absolute``; over ``1 + L(θ)`` if ``relative`` (Keskar et al. 2017, eq. 3)."""

    is_absolute: bool = False
    relative: bool = False

    @property
    def absolute(self) -> bool:
        return self.is_absolute

    def points(self) -> list[float]:
        return [1.0]

    def combine(self, loss: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        f = losses[:, 0] - loss
        value = f.abs() if self.is_absolute else f
        error = (rounding(losses[:, 0]) + rounding(loss)).detach()
        if self.relative:
            return value / (1 + loss), error / (1 + loss.detach())
        return value, error

    def secant(self) -> tuple[float, float]:
        if self.relative:
            raise InputError("a rise relative to 1 + L has no two-point form; use gradient='exact'")
        return 1.0, 1.0


@dataclass(frozen=True)
class Line(Sampled):
    """``(E_t |L(θ+tv) − L(θ)|^p)^{1/p}``, t by a symmetric law (BN-Sharpness: uniform on ``[−δ, δ]``).

    Args:
        law: the law of t (``bnsharp.laws.Uniform(delta)``).
        p: exponent, p ≥ 1.
        nodes: Gauss–Legendre nodes on each of ``[−δ, 0]`` and ``[0, δ]``, at least 3.

    Raises:
        InputError: p < 1 or not finite, fewer than 3 nodes.
    """

    law: SegmentLaw
    p: float = 2.0
    nodes: int = 8

    def __post_init__(self) -> None:
        at_least("p", self.p, 1)
        check_nodes(self.nodes)

    @property
    def absolute(self) -> bool:
        return True

    def coarse(self) -> Line:
        """At most ``SEARCH_NODES`` nodes on each half segment, for the powers that so few resolve (p ≤ 2)."""
        return replace(self, nodes=min(self.nodes, SEARCH_NODES)) if self.p <= 2 else self

    def points(self) -> list[float]:
        return line_points(self.law, self.nodes)

    def combine(self, loss: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        f = losses - loss[:, None]
        value, quadrature = power_norm(f, self.law, self.p, self.nodes)
        noise = rounding(losses.detach()).amax(-1) + rounding(loss.detach())
        return value, quadrature + noise

    def secant(self) -> tuple[float, float]:
        """``κ = (E|t|^p)^{1/p}/δ``, δ the reach of the law: ``(p+1)^{−1/p}`` for the uniform law."""
        return self.law.moment(self.p) ** (1 / self.p) / self.law.reach, self.law.reach


@dataclass(frozen=True)
class Curvature(Profile):
    """``vᵀ H v`` with H the Hessian of the objective, by exact Hessian-vector products."""

    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        objective = as_objective(objective)

        def second(v: Params) -> Tensor:
            if is_transformed(params):
                raise InputError(
                    "curvature inside a torch.func transform is silently wrong through batch_norm; expected plain "
                    "tensors: use torch.autograd"
                )
            leaves = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
            with torch.enable_grad(), math_attention():
                grads = _grad(objective(P.make(leaves)), leaves)
                return P.dot(v, _grad(P.dot(v, grads), leaves))

        return torch.stack([second(P.pick(v, i)) for i in range(P.count(v))])

    def evaluate(self, anchor: Anchor, v: Source) -> tuple[Tensor, Tensor]:
        values, errors = [], []
        for i in range(P.count(v)):
            direction = P.pick(v, i)
            product = anchor.hessian(direction)
            values.append(P.dot(direction, product))
            eps = torch.finfo(values[-1].dtype).eps
            errors.append(8 * eps * P.norm(direction) * P.norm(product))
        return torch.stack(values), torch.stack(errors)

    def differentiate(
        self, anchor: Anchor, v: Source, theta: bool = False
    ) -> tuple[Tensor, Tensor, Params, Params | None]:
        directions = [P.pick(v, i) for i in range(P.count(v))]
        products = P.stack([anchor.hessian(d) for d in directions])
        stacked = P.stack(directions)
        values = P.dot(stacked, products)
        errors = 8 * torch.finfo(values.dtype).eps * P.norm(stacked) * P.norm(products)
        if not theta:
            return values, errors, P.scaled(products, 2.0), None
        rows = [self._slope(anchor, d) for d in directions]
        return values, errors, P.scaled(products, 2.0), P.stack(rows)

    def _slope(self, anchor: Anchor, v: Params) -> Params:
        """``∇_θ vᵀHv ≈ (∇L(θ+hv) − 2∇L(θ) + ∇L(θ−hv))/h²``: batch_norm has no third derivative in PyTorch."""
        size = P.norm(v)
        eps = torch.finfo(size.dtype).eps
        h = eps**0.25 * P.safe_divide(1 + P.norm(anchor.params), size)
        points = P.Lazy(2, lambda i: P.shift(anchor.params, v, h if i else -h))
        outer = P.pick(anchor.objective.weighted_gradients(points, size.new_ones(1, 2)), 0)
        return P.scaled(P.combine(1.0, outer, -2.0, anchor.gradient), P.safe_divide(torch.ones_like(h), h * h))


def _grad(value: Tensor, leaves: dict[str, Tensor]) -> Params:
    """Gradient that can be differentiated again; zeros where the value does not depend on a leaf."""
    if not value.requires_grad:
        return P.zeros_like(P.make(leaves))
    inputs = list(leaves.values())
    grads = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    return P.make(dict(zip(leaves, grads, strict=True)))


class ExactScore:
    """A profile itself as what a search maximises (measuring, and exact gradients)."""

    def __init__(self, profile: Profile, frame: Frame, anchor: Anchor, keep_gradient: bool = False):
        self.profile, self.frame, self.anchor, self.keep = profile, frame, anchor, keep_gradient

    def slope(self) -> Params:
        return self.frame.pull(self.anchor.gradient)

    def __call__(self, u: Params, last: bool = False) -> Scored:
        """Scores; ``last`` leaves out ``∂/∂u``, which no step needs any more."""
        v = self.frame.place(u)
        if last and not self.keep:
            values, errors = self.profile.evaluate(self.anchor, v)
            return Scored(values, None, P.make({"error": errors}, (len(values),)))
        values, errors, d_v, d_theta = self.profile.differentiate(self.anchor, v, theta=self.keep)
        extra: dict[str, Any] = {"error": errors}
        if self.keep:
            extra |= {"d_v": d_v, "d_theta": d_theta}
        return Scored(values, None if last else self.frame.pull(d_v), P.make(extra, (len(values),)))


class SecantScore:
    """``κ|f(δ)|`` (or ``κ f(δ)``) as what a search maximises: one gradient per direction, kept for the step."""

    def __init__(self, profile: Profile, frame: Frame, anchor: Anchor):
        self.profile, self.frame, self.anchor = profile, frame, anchor
        self.kappa, self.delta = profile.secant()

    def slope(self) -> Params:
        return self.frame.pull(self.anchor.gradient)

    def __call__(self, u: Params, last: bool = False) -> Scored:
        """``extra`` holds ``f(δ) [n]``, its sign as used, and ``∇L(θ+δv) [n]``."""
        losses, grads = self.anchor.objective.many_value_and_grad(self.frame.points(u, self.delta))
        f = losses - self.anchor.loss
        sign = torch.where(f < 0, -1.0, 1.0).to(f.dtype) if self.profile.absolute else torch.ones_like(f)
        slope = self.kappa * sign
        d_u = None if last else P.times(self.delta * slope, self.frame.pull(grads))
        return Scored(slope * f, d_u, P.make({"rise": f, "sign": sign, "gradient": grads}, (len(f),)))
