"""The Hessian's spectral density by stochastic Lanczos quadrature, in any geometry's unit coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.checks import positive, whole
from bnsharp.estimation import DEFAULT_SEED, check
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.geometry import Euclidean, Geometry
from bnsharp.lanczos import spectral_nodes
from bnsharp.laws import Rademacher
from bnsharp.types import Params


@dataclass(frozen=True)
class Spectrum:
    """A discrete approximation of the eigenvalue distribution ``(1/d) Σ_k δ_{λ_k}``.

    Attributes:
        nodes: eigenvalue estimates ``[draws, k]``; padded with the last one where a run ended early.
        weights: ``[draws, k]``, each row sums to 1 (padding has weight 0).
        dimension: d, the number of coordinates.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int

    def moment(self, power: int) -> tuple[float, float]:
        """``tr M^power`` and its standard error over draws (infinite from one)."""
        each = self.dimension * (self.weights * self.nodes**power).sum(1)
        n = len(each)
        return float(each.mean()), float(each.std() / math.sqrt(n)) if n > 1 else math.inf

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The density smoothed by a Gaussian of standard deviation ``width``, at ``grid [m]``: shape ``[m]``."""
        positive("width", width)
        z = (grid[:, None] - self.nodes.reshape(-1)) / width
        kernel = torch.exp(-0.5 * z**2) / (width * math.sqrt(2 * math.pi))
        return kernel @ self.weights.reshape(-1) / len(self.nodes)


def spectrum(
    objective: AbstractObjective | LossFunction,
    params: Params,
    generator: torch.Generator | None = None,
    *,
    geometry: Geometry | None = None,
    draws: int = 10,
    iterations: int = 80,
) -> Spectrum:
    """Spectral density of ``M = SHS``, S the geometry's scale: the Hessian's own by default (Ghorbani et al. 2019).

    ``(1/d) tr g(M) ≈ (1/n) Σ_i Σ_k w_ik g(λ_ik)``, λ and w from Lanczos started at a Rademacher vector, fully
    reorthogonalised. In a groupwise geometry the spectrum does not change when scale groups are rescaled.

    Args:
        objective, params: the loss and θ.
        generator: of the draws; None is one seeded with 0.
        geometry: ``Groupwise(groups)`` for the spectrum relative to group norms.
        draws: Rademacher vectors.
        iterations: Lanczos steps for each, as many vectors being kept.

    Raises:
        InputError: no draw or step; what cannot be measured.
    """
    whole("draws", draws)
    whole("iterations", iterations)
    objective = as_objective(objective)
    params = P.pmap(torch.Tensor.detach, params)
    check(objective, params)
    generator = P.seeded(DEFAULT_SEED, P.first(params).device) if generator is None else generator
    frame = (Euclidean(1.0) if geometry is None else geometry).at(params)
    anchor = Anchor(objective, params)

    def apply(u: Params) -> Params:
        return frame.pull(anchor.hessian(frame.place(u)))

    signs = Euclidean(1.0).ball  # equal weight on every coordinate, whatever the ball
    rows = [spectral_nodes(apply, Rademacher()(signs, frame.like, generator), iterations) for _ in range(draws)]
    k = max(len(nodes) for nodes, _ in rows)
    nodes = torch.stack([torch.cat([n, n[-1:].expand(k - len(n))]) for n, _ in rows])
    weights = torch.stack([torch.cat([w, w.new_zeros(k - len(w))]) for _, w in rows])
    return Spectrum(nodes, weights, P.numel(frame.like))
