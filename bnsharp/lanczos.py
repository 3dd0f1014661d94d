"""Lanczos on a symmetric operator over parameters: extreme eigenpairs, Krylov bases and spectral densities.

Each new vector is made orthogonal to all earlier ones, twice where the first pass cancelled much of it (Kahan and
Parlett's criterion; Daniel et al. 1976), so that no eigenvalue appears twice. Basis vectors are rows of matrices, and a
pass is two products of a matrix with a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.errors import NotFiniteError
from bnsharp.types import Params

Operator = Callable[[Params], Params]

CANCELLED = 0.7
"""A vector that keeps less than this share of its norm when made orthogonal is made orthogonal again."""
ROWS = 16
"""Basis vectors in one matrix: a basis grows by so many at a time and is never copied."""


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
    values, vectors, residual = np.zeros(1), np.ones((1, 1)), 0.0
    for _ in range(min(iterations, P.numel(start))):
        beta = run.step()
        values, vectors = run.eigenpairs()
        residual = abs(beta * vectors[-1, -1])
        if residual <= max(tolerance * abs(values[-1]), floor) or beta <= 1e-14 * np.abs(values).max():
            break
    x = run.basis.combine(vectors[:, -1])
    return Ritz(float(values[-1]), P.unflatten(x / x.norm(), start), float(residual), len(run.alphas))


def krylov_basis(apply: Operator, start: Params, rank: int) -> tuple[Basis, list[float]]:
    """An orthonormal basis Q of the Krylov space of ``start``, of at most ``rank`` vectors, and all ``qᵢᵀM qᵢ``."""
    run = _Run(apply, start)
    for _ in range(min(rank, P.numel(start))):
        if run.step() <= 1e-10 * max(map(abs, run.alphas)):
            break
    return run.basis, run.alphas


def spectral_nodes(apply: Operator, start: Params, iterations: int) -> tuple[Tensor, Tensor]:
    """Gauss nodes ``[k]`` and weights (sum 1) of the spectral measure of ``start``: ``⟨q, g(M) q⟩ ≈ Σ w g(λ)``."""
    run = _Run(apply, start)
    for _ in range(min(iterations, P.numel(start))):
        if run.step() <= 1e-10 * max(map(abs, run.alphas)):
            break
    values, vectors = run.eigenpairs()
    device = P.first(start).device
    return torch.from_numpy(values).to(device), torch.from_numpy(vectors[0] ** 2).to(device)


class Basis:
    """Orthonormal vectors ``[d]``, kept as rows of matrices ``[ROWS, d]``."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.count = 0

    def append(self, q: Tensor) -> None:
        """One more vector."""
        row = self.count % ROWS
        if row == 0:
            self.blocks.append(q.new_empty(ROWS, len(q)))
        self.blocks[-1][row] = q
        self.count += 1

    def _filled(self) -> list[Tensor]:
        return [b[: min(ROWS, self.count - ROWS * i)] for i, b in enumerate(self.blocks)]

    def project_out(self, w: Tensor) -> Tensor:
        """``(I − QᵀQ) w`` by one pass of classical Gram–Schmidt over each matrix."""
        for block in self._filled():
            w = torch.addmv(w, block.T, block @ w, alpha=-1)
        return w

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """``Σ c_i q_i``."""
        c = torch.from_numpy(coefficients).to(self.blocks[0])
        parts = c.split([len(block) for block in self._filled()])
        return torch.stack([block.T @ part for block, part in zip(self._filled(), parts, strict=True)]).sum(0)

    def vector(self, i: int) -> Tensor:
        """``q_i [d]``."""
        return self.blocks[i // ROWS][i % ROWS]


class _Run:
    """The recurrence: basis vectors and the tridiagonal matrix so far."""

    def __init__(self, apply: Operator, start: Params):
        self.apply, self.like = apply, start
        q = P.flatten(start)
        self.next = q / q.norm()
        self.basis = Basis()
        self.alphas: list[float] = []
        self.betas: list[float] = []

    def step(self) -> float:
        """One more basis vector; returns the norm of what is left over.

        Raises:
            NotFiniteError: a product that is not finite.
        """
        q = self.next
        self.basis.append(q)
        w = P.flatten(self.apply(P.unflatten(q, self.like)))
        alpha = q @ w
        w = torch.add(w, q * alpha, alpha=-1)
        if self.betas:
            w.sub_(self.betas[-1] * self.basis.vector(self.basis.count - 2))
        before = w.norm()
        w = self.basis.project_out(w)
        beta, size, a = torch.stack([w.norm(), before, alpha]).tolist()
        if beta < CANCELLED * size:
            w = self.basis.project_out(w)
            beta = float(w.norm())
        if not math.isfinite(beta):
            raise NotFiniteError(
                "a Hessian-vector product holds NaN or infinite values; expected finite ones: measure at finite losses"
            )
        self.alphas.append(a)
        self.betas.append(beta)
        self.next = w / beta if beta else w
        return beta

    def eigenpairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues ``[k]``, rising, and eigenvectors in columns of the tridiagonal matrix, in float64."""
        matrix, off = np.diag(self.alphas), self.betas[: len(self.alphas) - 1]
        values, vectors = np.linalg.eigh(matrix + np.diag(off, 1) + np.diag(off, -1))
        return values, vectors
