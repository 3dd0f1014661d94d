"""Linear maps ``v = M(θ) u`` that are no diagonal scaling: random subspaces, one matrix on all neurons of a layer.

Each is a ``LinearMap`` of :mod:`bnsharp.geometry`: the shape of u, ``place`` (M u) and ``pull`` (Mᵀ g).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import at_least, positive, unknown, whole
from bnsharp.errors import InputError
from bnsharp.types import Params

KEPT = 20_000_000
"""Entries of a random basis up to which it is kept; a larger one is drawn again for every product."""


@dataclass(frozen=True)
class Subspace:
    """``v = A (radius·(|A⁺θ| + η) ⊙ u)``, A with ``dimension`` random columns of norm 1 (Keskar et al. 2017, eq. 4).

    Args:
        dimension: columns of A; at most the number of parameters.
        radius: ε.
        eta: 1 in the paper.
        seed: of A.

    Raises:
        InputError: a dimension below 1 or above the number of parameters, radius ≤ 0, η < 0.
    """

    dimension: int = 100
    radius: float = 1e-3
    eta: float = 1.0
    seed: int = 0
    _cache: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        whole("dimension", self.dimension)
        positive("radius", self.radius)
        at_least("eta", self.eta, 0)

    def like(self, params: Params) -> Params:
        return P.make({"subspace": P.first(params).new_zeros(self.dimension)})

    def place(self, u: Params, params: Params) -> Params:
        return P.unflatten(self._times(self._scale(params) * u["subspace"], params), params)

    def pull(self, g: Params, params: Params) -> Params:
        return P.make({"subspace": self._scale(params) * self._transposed(P.flatten(g), params)})

    def _scale(self, params: Params) -> Tensor:
        gram, _ = self._basis(params)
        projected = torch.linalg.solve(gram, self._transposed(P.flatten(params), params))  # A⁺θ
        return self.radius * (projected.abs() + self.eta)

    def _basis(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """``AᵀA``, and ``A [d, k]`` where it is small enough to keep."""
        first, d = P.first(params), P.numel(params)
        key = (d, first.dtype, first.device)
        if key not in self._cache:
            if self.dimension > d:
                raise InputError(f"dimension={self.dimension}; expected at most {d}, the number of parameters")
            if d * self.dimension <= KEPT:
                basis = torch.stack(list(self._columns(params)), 1)
                self._cache[key] = basis.T @ basis, basis
            else:
                gram = first.new_zeros(self.dimension, self.dimension)
                for i, column in enumerate(self._columns(params)):
                    gram[i] = self._dots(column, params)
                self._cache[key] = gram, None
        return self._cache[key]

    def _columns(self, params: Params) -> Iterator[Tensor]:
        first, d = P.first(params), P.numel(params)
        for seed in P.random_seeds(P.seeded(self.seed, torch.device("cpu")), self.dimension):
            column = torch.randn(d, generator=P.seeded(seed, torch.device("cpu")), dtype=torch.float32).to(first)
            yield column / column.norm()

    def _transposed(self, vector: Tensor, params: Params) -> Tensor:
        kept = self._basis(params)[1]
        return kept.T @ vector if kept is not None else self._dots(vector, params)

    def _dots(self, vector: Tensor, params: Params) -> Tensor:
        return torch.stack([column @ vector for column in self._columns(params)])

    def _times(self, coefficients: Tensor, params: Params) -> Tensor:
        kept = self._basis(params)[1]
        if kept is not None:
            return kept @ coefficients
        total = coefficients.new_zeros(P.numel(params))
        for value, column in zip(coefficients, self._columns(params), strict=True):
            total = total + value * column
        return total


@dataclass(frozen=True)
class NeuronMix:
    """``V = W U`` on one layer's weight W ``[n, …]``, nothing elsewhere: one matrix on the weights of every neuron.

    W is reshaped to ``[n, m]`` (n neurons) and U is ``[m, m]``; for U of independent coordinates with mean 0 and
    variance 1, ``E VᵀHV = Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}``, the relative flatness of Petzka et al. (2021).

    Args:
        layer: the weight's name; None is the last parameter with two or more dimensions.

    Raises:
        InputError: no such parameter, or none with two dimensions.
    """

    layer: str | None = None

    def like(self, params: Params) -> Params:
        weight = self._weight(params)
        m = weight[0].numel()
        return P.make({"mixture": weight.new_zeros(m, m)})

    def place(self, u: Params, params: Params) -> Params:
        name, weight = self.name(params), self._weight(params)
        mixed = (weight.flatten(1) @ u["mixture"]).reshape(weight.shape)
        return P.make({k: mixed if k == name else torch.zeros_like(v) for k, v in params.items()})

    def pull(self, g: Params, params: Params) -> Params:
        name, weight = self.name(params), self._weight(params)
        return P.make({"mixture": weight.flatten(1).T @ g[name].flatten(1)})

    def name(self, params: Params) -> str:
        """The weight's name."""
        matrices = [k for k, v in params.items() if v.ndim >= 2]
        if self.layer is not None and self.layer not in matrices:
            raise unknown("layer with a weight", self.layer, matrices)
        if not matrices:
            raise InputError("no parameter has two dimensions; expected a layer's weight among the parameters")
        return matrices[-1] if self.layer is None else self.layer

    def _weight(self, params: Params) -> Tensor:
        return params[self.name(params)]

