"""Profiles: what is read off the loss along a perturbation v.

``Rise`` is ``L(θ+v) − L(θ)``; ``Line`` is ``(E_t |L(θ+tv) − L(θ)|^p)^{1/p}``; ``Curvature`` is ``vᵀHv`` and
``GaussNewton`` ``vᵀGv``. Each is a pure
function ``(objective, θ, V [n]) -> Tensor [n]``. A profile's :meth:`secant` is its two-point form
``κ·sign·(∇L(θ+δv) − ∇L(θ))``, which costs one gradient beyond the one at θ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bnsharp import params as P
from bnsharp.anchor import Anchor, batch_mean
from bnsharp.checks import at_least
from bnsharp.convolutions import frugal
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective, is_transformed
from bnsharp.forms import (
    Composed,
    QuadraticForm,
    form_of,
    gauss_newton_form,
    gradient_graph,
    hessian_form,
    output_form,
    parts_of,
)
from bnsharp.grids import Grid
from bnsharp.modes import math_attention
from bnsharp.quadrature import SegmentLaw, check_nodes, line_points, power_norm
from bnsharp.types import Evaluated, Params, Term

SEARCH_NODES = 4
"""Quadrature nodes on each half segment while searching: S is then off by 1e-4 or so, alike for all directions."""

JACKKNIFE = 20
"""Batches are left out in at most this many groups."""

Source = Params | Sequence[Params]


class Profile(ABC):
    """``(objective, θ, V [n]) -> Tensor [n]`` and what searches and regularisers need of it."""

    is_form: ClassVar[bool] = False
    """Whether it is a quadratic form of v."""

    @abstractmethod
    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        """Values ``[n]``, an ordinary differentiable function of θ and v."""

    @abstractmethod
    def evaluate(self, anchor: Anchor, v: Source) -> Evaluated:
        """Values ``[n]`` and numerical errors ``[n]``, without gradients and with one loss held at a time."""

    def expansion(self, anchor: Anchor) -> tuple[float, float]:
        """``(c₁, c₂)``: for small v the value is at most ``c₁|⟨v, ∇L⟩| + c₂|vᵀHv|`` up to third order (Minkowski)."""
        raise InputError(f"{type(self).__name__} has no second-order expansion; expected a rise, line or curvature")

    @abstractmethod
    def differentiate(
        self, anchor: Anchor, v: Source, theta: bool = False
    ) -> tuple[Tensor, Tensor, Params, Params | None]:
        """Values, errors, ``∂/∂v [n]`` and, if ``theta``, ``∂/∂θ [n]`` with v constant.

        Memory does not grow with the number of points on a line.
        """

    def image(self, anchor: Anchor, v: Params) -> Params:
        """``A v`` for a form ``vᵀAv``: half of its derivative."""
        return P.scaled(P.pick(self.differentiate(anchor, P.batch(v))[2], 0), 0.5)

    def prepare(self, anchor: Anchor) -> None:
        """Before a search: evaluate at the anchor what all of its scores need and its start can use."""
        return

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


def _left_out(weights: Tensor, x: Tensor) -> list[Tensor]:
    """Weighted means over dimension 0 with one group of batches left out: none for a single batch."""
    if len(x) == 1:
        return []
    count = min(len(x), JACKKNIFE)
    member = torch.arange(len(x), device=x.device) * count // len(x)
    return [batch_mean(weights[member != g], x[member != g]) for g in range(count)]


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

    def _grid(self, params: Params, v: Source) -> tuple[int, list[float], Grid]:
        t = self.points()
        return P.count(v), t, Grid(params, v, t)

    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        objective = as_objective(objective)
        n, t, points = self._grid(params, v)
        return self.combine(objective(params).expand(n), objective.many(points).reshape(n, len(t)))[0]

    def evaluate(self, anchor: Anchor, v: Source) -> Evaluated:
        n, t, points = self._grid(anchor.params, v)
        with torch.no_grad(), frugal(P.first(anchor.params).dtype):
            base = anchor.by_batch  # [B]
            weights, losses = anchor.objective.many_by_batch(points)
            both = torch.cat([base[:, None], losses], 1)  # [B, 1 + nK]

            def values(mean: Tensor) -> tuple[Tensor, Tensor]:
                return self.combine(mean[0].expand(n), mean[1:].reshape(n, len(t)))

            rest = [values(mean)[0] for mean in _left_out(weights, both)]
            return Evaluated(*values(batch_mean(weights, both)), torch.stack(rest) if rest else None)

    def differentiate(
        self, anchor: Anchor, v: Source, theta: bool = False
    ) -> tuple[Tensor, Tensor, Params, Params | None]:
        n, t, points = self._grid(anchor.params, v)
        with torch.no_grad(), frugal(P.first(anchor.params).dtype):
            losses = anchor.objective.many(points).reshape(n, len(t))

        def total(losses: Tensor, base: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            values, errors = self.combine(base, losses)
            return values.sum(), (values, errors)

        base = anchor.loss.detach().repeat(n)
        (weights, own), (values, errors) = torch.func.grad(total, argnums=(0, 1), has_aux=True)(losses, base)
        times = weights.new_tensor(t)
        rows = []
        for i in range(n):
            item = Grid(anchor.params, [points.direction(i)], t)
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
            return value / (1 + loss), error / (1 + loss.detach()).abs()
        return value, error

    def secant(self) -> tuple[float, float]:
        if self.relative:
            raise InputError("a rise relative to 1 + L has no two-point form; use gradient='exact'")
        return 1.0, 1.0

    def expansion(self, anchor: Anchor) -> tuple[float, float]:
        size = 1 + float(anchor.loss) if self.relative else 1.0
        return 1 / size, 0.5 / size


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

    def expansion(self, anchor: Anchor) -> tuple[float, float]:
        """``f = a t + ½ q t² + …``: ``((E|t|^p)^{1/p}, ½ (E t^{2p})^{1/p})``."""
        return self.law.moment(self.p) ** (1 / self.p), 0.5 * self.law.moment(2 * self.p) ** (1 / self.p)


@dataclass(frozen=True)
class Curvature(Profile):
    """``vᵀ H v`` with H the Hessian of the objective, by exact Hessian-vector products."""

    is_form: ClassVar[bool] = True

    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        objective = as_objective(objective)

        def second(v: Params) -> Tensor:
            if is_transformed(params):
                raise InputError(
                    "curvature inside a torch.func transform is silently wrong through batch_norm; expected plain "
                    "tensors: use torch.autograd"
                )
            # aliases: v may depend on θ itself, and H is the derivative at a fixed v
            leaves = {k: p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
            with torch.enable_grad(), math_attention(), Composed(3):
                grads = gradient_graph(objective(P.make(leaves)), list(leaves.values()))
                return P.dot(v, _grad(P.dot(v, P.make(dict(zip(leaves, grads, strict=True)))), leaves))

        return torch.stack([second(P.pick(v, i)) for i in range(P.count(v))])

    def evaluate(self, anchor: Anchor, v: Source) -> Evaluated:
        if anchor.objective.batches_seen != 1 or not anchor.has_graph():
            return _evaluate_form(anchor, v, hessian_form)
        directions = (P.pick(v, i) for i in range(P.count(v)))
        return _evaluated(torch.stack([form_of(d, anchor.hessian(d)) for d in directions]))

    def prepare(self, anchor: Anchor) -> None:
        anchor.has_graph()

    def image(self, anchor: Anchor, v: Params) -> Params:
        return anchor.hessian(v)

    def expansion(self, anchor: Anchor) -> tuple[float, float]:
        return 0.0, 1.0

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
        rows = [anchor.objective.hessian_slope(anchor.params, d) for d in directions]
        return values, errors, P.scaled(products, 2.0), P.stack(rows)


def _evaluate_form(anchor: Anchor, v: Source, form: QuadraticForm) -> Evaluated:
    weights, both = anchor.objective.forms_by_batch(anchor.params, v, form)  # [B, n, 2]
    rest = [x[:, 0] for x in _left_out(weights, both.detach())]
    return _evaluated(batch_mean(weights, both.detach()), torch.stack(rest) if rest else None)


def _evaluated(forms: Tensor, left_out: Tensor | None = None) -> Evaluated:
    """From ``vᵀAv`` and ``‖v‖‖Av‖``, ``[n, 2]``."""
    return Evaluated(forms[:, 0], 8 * torch.finfo(forms.dtype).eps * forms[:, 1], left_out)


@dataclass(frozen=True)
class GaussNewton(Profile):
    """``vᵀ G v``, ``G = E Jᵀ(∇²_z ℓ)J`` the Gauss–Newton matrix of the network's output z.

    For cross-entropy G is the model's Fisher information, so that ``v = θ`` gives the Fisher–Rao norm (Liang et al.
    2019, definition 2). As a penalty ``J v`` is a central difference of outputs with a step of ``ε^{1/3}``, whose
    relative error is about ``ε^{2/3}``.
    """

    is_form: ClassVar[bool] = True

    def __call__(self, objective: AbstractObjective | LossFunction, params: Params, v: Source) -> Tensor:
        objective = as_objective(objective)
        weights, values = objective.forms_by_batch(params, v, _difference_form)
        return batch_mean(weights, values)[:, 0]

    def evaluate(self, anchor: Anchor, v: Source) -> Evaluated:
        return _evaluate_form(anchor, v, gauss_newton_form)

    def differentiate(
        self, anchor: Anchor, v: Source, theta: bool = False
    ) -> tuple[Tensor, Tensor, Params, Params | None]:
        known, rows, thetas = self.evaluate(anchor, v), [], []
        for i in range(P.count(v)):
            d = {k: x.detach().requires_grad_() for k, x in P.pick(v, i).items()}
            leaves = {k: x.detach().requires_grad_() for k, x in anchor.params.items()}
            with torch.enable_grad():
                value = self(anchor.objective, P.make(leaves), [P.make(d)])[0]
            grads = torch.autograd.grad(
                value, [*d.values(), *leaves.values()], allow_unused=True, materialize_grads=True
            )
            rows.append(P.make(dict(zip(d, grads[: len(d)], strict=True))))
            thetas.append(P.make(dict(zip(leaves, grads[len(d) :], strict=True))))
        return known.values, known.errors, P.stack(rows), P.stack(thetas) if theta else None


def _difference_form(term: Term, params: Params) -> Callable[[Params], Tensor]:
    """The Gauss–Newton form with ``J v ≈ (z(θ+hv) − z(θ−hv))/(2h)``: differentiable in θ and v by one backward pass."""
    output, _ = parts_of(term)

    def form(v: Params) -> Tensor:
        size = P.norm(v).detach()
        h = torch.finfo(size.dtype).eps ** (1 / 3) * P.safe_divide(1 + P.norm(params).detach(), size)
        middle = output(params)
        z, up, down = (
            tree_flatten(a)[0] for a in (middle, output(P.shift(params, v, h)), output(P.shift(params, v, -h)))
        )
        floating = [i for i, a in enumerate(z) if isinstance(a, Tensor) and a.is_floating_point()]
        value = output_form(term, middle, floating, [(up[i] - down[i]) / (2 * h) for i in floating])
        return torch.stack([value, value.detach().abs()])

    return form


def _grad(value: Tensor, leaves: dict[str, Tensor]) -> Params:
    """Gradient that can be differentiated again; zeros where the value does not depend on a leaf."""
    if not value.requires_grad:
        return P.zeros_like(P.make(leaves))
    inputs = list(leaves.values())
    grads = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    return P.make(dict(zip(leaves, grads, strict=True)))
