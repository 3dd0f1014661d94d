"""Lanczos on a symmetric operator over parameters: extreme eigenpairs and spectral densities.

Full reorthogonalisation, twice per step (Kahan, Parlett), so that no eigenvalue appears twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.types import Params

Operator = Callable[[Params], Params]


@dataclass(frozen=True)
class Ritz:
    """The largest Ritz pair.

    Attributes:
        value: ``λ``, at most the largest eigenvalue up to rounding.
        vector: unit Ritz vector.
        residual: ``‖M x − λ x‖``: an eigenvalue lies within it.
        products: operator applications spent.
    """

    value: float
    vector: Params
    residual: float
    products: int


def top_eigenpair(apply: Operator, start: Params, iterations: int, tolerance: float, floor: float = 0.0) -> Ritz:
    """The algebraically largest eigenpair, until the residual is at most ``max(tolerance·|λ|, floor)``."""
    run = _Run(apply, start)
    for _ in range(min(iterations, P.numel(start))):
        beta = run.step()
        values, vectors = torch.linalg.eigh(run.matrix())
        residual = (beta * vectors[-1, -1]).abs()
        if residual <= max(tolerance * float(values[-1].abs()), floor) or beta <= 1e-14 * values.abs().max():
            break
    x = P.zeros_like(start)
    for c, b in zip(vectors[:, -1], run.basis, strict=False):
        x = P.combine(1.0, x, c.to(P.first(x)), b)
    return Ritz(float(values[-1]), P.scaled(x, 1 / P.norm(x)), float(residual), len(run.alphas))


def spectral_nodes(apply: Operator, start: Params, iterations: int) -> tuple[Tensor, Tensor]:
    """Gauss nodes ``[k]`` and weights (sum 1) of the spectral measure of ``start``: ``⟨q, g(M) q⟩ ≈ Σ w g(λ)``."""
    run = _Run(apply, start)
    for _ in range(min(iterations, P.numel(start))):
        if run.step() <= 1e-10 * torch.stack(run.alphas).abs().max():
            break
    values, vectors = torch.linalg.eigh(run.matrix())
    return values, vectors[0] ** 2


class _Run:
    """The recurrence: basis vectors and the tridiagonal matrix so far."""

    def __init__(self, apply: Operator, start: Params):
        self.apply = apply
        self.next = P.scaled(start, 1 / P.norm(start))
        self.basis: list[Params] = []
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = []

    def step(self) -> Tensor:
        """One more basis vector; returns the norm of what is left over."""
        q = self.next
        self.basis.append(q)
        w = self.apply(q)
        self.alphas.append(P.dot(q, w))
        for _ in range(2):
            for b in self.basis:
                w = P.combine(1.0, w, -P.dot(b, w), b)
        beta = P.norm(w)
        self.betas.append(beta)
        self.next = P.scaled(w, P.safe_reciprocal(beta))
        return beta

    def matrix(self) -> Tensor:
        """The tridiagonal matrix ``[k, k]``, in float64."""
        matrix = torch.diag(torch.stack(self.alphas).double())
        if len(self.alphas) > 1:
            off = torch.stack(self.betas[: len(self.alphas) - 1]).double()
            matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
        return matrix
