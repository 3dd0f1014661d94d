"""Networks whose Hessians are measured, with references, and products that are not computed twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from bnsharp import params as P
from bnsharp.data import load
from bnsharp.models import build

IN_SPAN = 1e-5
"""A vector with at most this share of its norm outside a span counts as in it: ten times float32's rounding there."""
RESIDUAL = 1e-5
"""Of the reference eigenvector, relative to the eigenvalue, whose error is of second order in it."""
cross_entropy = nn.functional.cross_entropy


class Products:
    """A Hessian on vectors ``[d]`` or columns ``[d, n]``, as the peers' algorithms take an operator.

    The product with a vector in the span of earlier ones is combined from theirs: an estimate with more products
    extends one with fewer that began alike, at the price of the difference.

    Attributes:
        asked: products that were asked for, whether they were computed or combined.
        gradient: ``∇L(θ)``, as a Hessian has it.
        vectors, images: orthonormal rows ``[k, d]`` and their products.
    """

    def __init__(self, hessian: Any, theta: P.Params):
        self.hessian, self.theta, self.gradient, self.asked = hessian, theta, hessian.gradient, 0
        self.size, self.dtype, self.device = P.numel(theta), P.first(theta).dtype, P.first(theta).device
        self.shape = (self.size, self.size)
        self.vectors = self.images = P.flatten(theta).new_empty(0, self.size)

    def __call__(self, v: P.Params) -> P.Params:
        return P.unflatten(self.matvec(P.flatten(v)), self.theta)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.matvec(x) if x.ndim == 1 else torch.stack([self.matvec(column) for column in x.T], 1)

    def matvec(self, v: Tensor) -> Tensor:
        self.asked += 1
        inside, outside = self._split(v)
        product, length = inside @ self.images, outside.norm()
        if length <= IN_SPAN * v.norm():
            return product
        q = outside / length
        q = q - (self.vectors @ q) @ self.vectors  # rounding weighs more in what is short
        q = q / q.norm()
        image = self.direct(q)
        self.vectors, self.images = torch.cat([self.vectors, q[None]]), torch.cat([self.images, image[None]])
        return product + length * image

    def direct(self, v: Tensor) -> Tensor:
        """A product that is computed, and not kept."""
        return P.flatten(self.hessian(P.unflatten(v, self.theta)))

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients ``[k]`` of v in the vectors, and what is outside their span."""
        inside = self.vectors @ v
        inside = inside + self.vectors @ (v - inside @ self.vectors)
        return inside, v - inside @ self.vectors


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained network on one batch, with references for what is measured of its Hessian.

    Attributes:
        trace, error: the trace and its standard error.
        spread: standard deviation of one Rademacher draw ``εᵀHε``, relative to the trace.
        top: the largest eigenvalue.
    """

    module: nn.Module
    batch: tuple[Tensor, Tensor]
    trace: float = math.nan
    error: float = math.nan
    spread: float = math.nan
    top: float = math.nan

    def objective(self) -> bnsharp.Objective:
        return bnsharp.Objective(self.module, cross_entropy, self.batch, statistics="running")

    def products(self) -> Callable[[], Products]:
        """Makes operators without memory of each other, on one graph of the gradient."""
        theta = bnsharp.parameters(self.module)
        hessian = self.objective().hessian(theta)
        return lambda: Products(hessian, theta)


def with_references(module: nn.Module, batch: tuple[Tensor, Tensor], rank: int, draws: int) -> Problem:
    """The trace by ``rank`` directions exactly and ``draws`` in what is left, λ_max from the same Krylov space.

    With Q that space's basis and ``P = I − QᵀQ``, ``tr H = Σ qᵢᵀHqᵢ + E (Pε)ᵀH(Pε)``, where ``HPε = Hε − (HQᵀ)Qε``
    takes the one product that the spread of independent draws takes too.

    Raises:
        ArithmeticError: an eigenvector whose residual is above ``RESIDUAL``: too small a rank.
    """
    bare = Problem(module, batch)
    products, generator = bare.products()(), torch.Generator().manual_seed(12345)
    products.matvec(torch.randn(products.size, generator=generator))
    for _ in range(rank - 1):
        products.matvec(products.images[-1])
    q, r = torch.linalg.qr(products.vectors.double().T)
    q, hq = q.T, torch.linalg.solve_triangular(r.T, products.images.double(), upper=False)  # orthonormal in float64
    form = q @ hq.T
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    top = float(values[-1])
    residual = float((vectors[:, -1] @ hq - top * (vectors[:, -1] @ q)).norm())
    if residual > RESIDUAL * top:
        raise ArithmeticError(f"residual {residual:.1e} of the reference eigenvalue {top:.6g}; expected at most "
                              f"{RESIDUAL:g} of it: take a larger rank than {rank}")
    plain, left = torch.empty(draws, dtype=q.dtype), torch.empty(draws, dtype=q.dtype)
    for i in range(draws):
        epsilon = 1.0 - 2 * torch.randint(2, (products.size,), generator=generator)
        image, epsilon = products.direct(epsilon).double(), epsilon.double()
        inside = q @ epsilon
        plain[i], left[i] = epsilon @ image, (epsilon - inside @ q) @ (image - inside @ hq)
    trace = float(form.trace() + left.mean())
    return Problem(module, batch, trace, float(left.std()) / math.sqrt(draws), float(plain.std()) / trace, top)


def trained(module: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Plain SGD on batches of 64, in eval mode afterwards."""
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randperm(len(y), generator=generator)[:64]
        optimizer.zero_grad()
        cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return module.eval()


@cache
def perceptron() -> Problem:
    """The BN perceptron on the digits' 800 training images, after 260 steps."""
    data = load("digits", seed=0)
    x, y = data.train_set()
    module = trained(build("bn-mlp", data.input_shape, len(data.classes), seed=0), x, y, 260)
    return with_references(module, (x, y), 100, 600)


@cache
def lenet() -> Problem:
    """LeNet-BN on 128 of 512 noisy images of ten patterns, after 60 steps on all of them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (512,), generator=generator)
    patterns = 3 * nn.functional.avg_pool2d(torch.randn(10, 3, 32, 32, generator=generator), 5, 1, 2)
    x = patterns[y] + torch.randn(512, 3, 32, 32, generator=generator)
    module = trained(build("lenet-bn", (3, 32, 32), 10, seed=0), x, y, 60)
    return with_references(module, (x[:128], y[:128]), 60, 400)
