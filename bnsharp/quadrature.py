"""``(E_t |f(t)|^p)^{1/p}`` from values of f at fixed nodes, differentiable in those values.

f is a loss rise along a line with ``f(0) = 0``. ``|f|^p`` has a kink at 0, so negative and positive t are separate
panels, each with the nodes of the law's own Gauss rule (Gauss–Legendre for the uniform law, half-range Hermite for the
normal one). Where p is not even and f changes sign inside a panel, or where ``|f|^p`` has a higher degree than the
nodes resolve, the polynomial through ``(0, 0)`` and the nodes is integrated instead, split at its
roots: no extra evaluation of f. The error is estimated by the same formula on a subset of the nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bnsharp.checks import whole

VISIBLE = 3e-3
"""A change of sign matters where f exceeds this fraction of ``E|f|`` on both sides: less adds under 1e-6 to S."""


SAFETY = 3.0
"""The quadrature error is this many times the largest difference to an embedded rule, which can be small by chance."""
CANDIDATES = 20
"""Nodes, evenly spread, among which those that an embedded rule leaves out are chosen."""
UNSEEN = 1e-6
"""What changes of sign too small to be seen can do, relative to S."""


class SegmentLaw(Protocol):
    """A symmetric law of t. Distances are in units of its reach: ``z = |t|/reach``.

    Attributes:
        reach: the unit of t: the largest ``|t|`` of a bounded law, the standard deviation of the normal one.
        standard: the law of reach 1 of the same shape.
        extent: the largest z that matters (1 for the uniform law).
        is_bounded: whether z ends at ``extent`` (else the density has died out there).
    """

    def __hash__(self) -> int: ...

    @property
    def reach(self) -> float: ...

    @property
    def standard(self) -> SegmentLaw: ...

    @property
    def extent(self) -> float: ...

    @property
    def is_bounded(self) -> bool: ...

    def density(self, t: Tensor) -> Tensor:
        """Density of ``|t|``."""
        ...

    def moment(self, p: float) -> float:
        """``E |t|^p``."""
        ...


@lru_cache(maxsize=64)
def gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1) and weights that sum to 1; exact for polynomials of degree ``2n − 1``."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


@lru_cache(maxsize=64)
def law_rule(law: SegmentLaw, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes z and weights (sum 1) for the density of ``|t|`` under a law of reach 1.

    Exact for polynomials of degree ``2n − 1`` in z; by the Lanczos recurrence on a fine discretisation of the density
    (Gautschi 1982), then the eigenvalues of the Jacobi matrix (Golub and Welsch 1969).
    """
    z, w = _fine(law)
    basis = [np.sqrt(w / w.sum())]
    alpha, beta = np.zeros(n), np.zeros(n)
    for k in range(n):
        image = z * basis[k]
        alpha[k] = basis[k] @ image
        for _ in range(2):
            for b in basis:
                image = image - (b @ image) * b
        beta[k] = np.linalg.norm(image)
        basis.append(image / beta[k])
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[: n - 1], 1) + np.diag(beta[: n - 1], -1))
    return nodes, vectors[0] ** 2


def _fine(law: SegmentLaw) -> tuple[np.ndarray, np.ndarray]:
    """A dense discretisation of the density of z."""
    x, w = gauss_legendre(200)
    z = law.extent * x
    return z, law.extent * w * np.array(law.density(torch.tensor(z)).tolist())


@dataclass(frozen=True)
class Rule:
    """Nodes z of one panel and interpolatory weights for the law's density; ``edge`` is the last z that they show."""

    x: np.ndarray
    w: np.ndarray
    edge: float = 1.0

    @cached_property
    def ends(self) -> np.ndarray:
        """``[2, m]``: near 0 and at the edge, what the polynomial through (0, 0) and ``(z_j, f_j)`` shows of its sign.

        Near 0 that is its slope times 0.05: a change of sign at z adds ``O(slope·z²)`` only.
        """
        tiny = 1e-6 * self.edge
        slope = self.interpolation(np.array([tiny]))[0] / tiny
        return np.stack([0.05 * slope, self.interpolation(np.array([self.edge]))[0]])

    def interpolation(self, z: np.ndarray) -> np.ndarray:
        """``B [len(z), m]``: values at z of the polynomial through (0, 0) and ``(z_j, f_j)``."""
        nodes = np.concatenate([[0.0], self.x])
        out = np.ones((len(z), len(self.x)))
        for j in range(1, len(nodes)):
            for i in range(len(nodes)):
                if i != j:
                    out[:, j - 1] *= (z - nodes[i]) / (nodes[j] - nodes[i])
        return out


@lru_cache(maxsize=64)
def panel_rules(law: SegmentLaw, n: int) -> tuple[Rule, tuple[Rule, ...]]:
    """The law's Gauss rule with n nodes (law of reach 1), and embedded rules on n − 2 and, from 5 nodes on, n − 3."""
    x, w = law_rule(law, n)
    drops = (2, 3) if n >= 5 else (2,)

    def edge(nodes: np.ndarray) -> float:
        return law.extent if law.is_bounded else float(nodes[-1])

    return Rule(x, w, edge(x)), tuple(
        Rule(keep, weights, edge(keep)) for keep, weights in (_embedded(law, x, drop) for drop in drops)
    )


def _embedded(law: SegmentLaw, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and interpolatory weights of the subset with ``count`` nodes left out that weighs best."""
    n, (z, fine) = len(x), _fine(law)
    middle, half = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
    # Legendre polynomials: powers of many nodes cannot be told apart in double precision
    moments = fine @ np.polynomial.legendre.legvander((z - middle) / half, n - count - 1)
    table = np.polynomial.legendre.legvander((x - middle) / half, n - count - 1)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for drop in combinations(range(0, n, -(-n // CANDIDATES)), count):
        rest = [i for i in range(n) if i not in drop]
        keep, weights = x[rest], np.linalg.solve(table[rest].T, moments)
        # positive weights, as even as the full rule's
        badness = float(np.abs(weights).sum() - 1) + float(weights.var())
        if best is None or badness < best[0] - 1e-12:
            best = (badness, keep, weights)
    assert best is not None
    return best[1], best[2]


def _subset(full: Rule, part: Rule) -> list[int]:
    return [int(np.argmin(np.abs(full.x - v))) for v in part.x]


def _roots(values: Tensor, rule: Rule) -> list[float]:
    """Sign changes before the edge of the interpolating polynomial, by bisection between points of a grid."""
    f = np.array(values.detach().tolist())
    grid = np.linspace(0.0, rule.edge, 257)[1:]
    at = rule.interpolation(grid) @ f
    cuts = np.nonzero(np.sign(at[1:]) * np.sign(at[:-1]) < 0)[0]
    roots = []
    for c in cuts:
        lo, hi, sign = grid[c], grid[c + 1], np.sign(at[c])
        for _ in range(50):
            middle = (lo + hi) / 2
            if np.sign((rule.interpolation(np.array([middle])) @ f)[0]) == sign:
                lo = middle
            else:
                hi = middle
        roots.append(float((lo + hi) / 2))
    return roots


def _resampled(values: Tensor, rule: Rule, law: SegmentLaw, p: float, cuts: list[float]) -> Tensor:
    """``E |f|^p`` over one panel from the interpolating polynomial, panels cut at ``cuts``."""
    n = min(256, max(24 if law.is_bounded else 64, math.ceil(p * len(rule.x) / 2) + 1))
    x, w = gauss_legendre(n)
    edges = [0.0, *cuts, law.extent]
    z = np.concatenate([a + (b - a) * x for a, b in pairwise(edges)])
    weights = np.concatenate([(b - a) * w for a, b in pairwise(edges)])
    matrix = values.new_tensor(rule.interpolation(z))
    dense = values.new_tensor(weights) * law.density(values.new_tensor(z))
    return dense @ (matrix @ values).abs() ** p


def _panel_means(values: Tensor, rule: Rule, law: SegmentLaw, p: float) -> Tensor:
    """``E |f|^p`` per panel for ``values [..., m]`` (already scaled to at most 1): shape ``[...]``."""
    even = p % 2 == 0
    direct = (values.new_tensor(rule.w) * values.abs() ** p).sum(-1)
    # signs at the nodes, and of the interpolating polynomial just after 0 and at the far end
    seen = torch.cat([values.detach(), values.detach() @ values.new_tensor(rule.ends).T], -1)
    visible = VISIBLE * (values.detach().abs() @ values.new_tensor(np.abs(rule.w)))
    crossing = (seen.amax(-1) > visible) & (seen.amin(-1) < -visible)
    # beyond the last node of an unbounded law a high power of the polynomial says nothing
    redo = torch.ones_like(crossing) if p > len(rule.x) and law.is_bounded else crossing & (not even)
    if not bool(redo.any()):
        return direct
    flat, result = values.reshape(-1, values.shape[-1]), direct.reshape(-1)
    parts = []
    for i, (again, crosses) in enumerate(zip(redo.reshape(-1).tolist(), crossing.reshape(-1).tolist(), strict=True)):
        if not again:
            parts.append(result[i])
            continue
        cuts = _roots(flat[i], rule) if crosses and not even else []
        parts.append(_resampled(flat[i], rule, law, p, cuts))
    return torch.stack(parts).reshape(direct.shape)


def check_nodes(nodes: int) -> None:
    """Raise :class:`InputError` unless an embedded rule exists for this many nodes per panel."""
    whole("nodes", nodes, 3)


def line_points(law: SegmentLaw, nodes: int) -> list[float]:
    """The t at which f is evaluated: ``2·nodes`` of them, the negative ones first."""
    x, _ = law_rule(law.standard, nodes)
    return [*(-law.reach * x).tolist(), *(law.reach * x).tolist()]


def power_norm(f: Tensor, law: SegmentLaw, p: float, nodes: int) -> tuple[Tensor, Tensor]:
    """``S = (E_t |f(t)|^p)^{1/p}`` and its quadrature error for ``f [n, 2·nodes]``: shapes ``[n]``.

    ``S = M·(E (|f|/M)^p)^{1/p}`` with ``M = max|f|``, so that no power underflows; S = 0 has gradient 0.
    """
    law = law.standard
    full, parts = panel_rules(law, nodes)
    panels = f.reshape(-1, 2, nodes)
    top = panels.detach().abs().amax((-1, -2))
    scale = torch.where(top == 0, 1.0, top)
    panels = panels / scale[:, None, None]

    means = _panel_means(panels, full, law, p)
    mean = means.mean(-1)
    zero = mean == 0  # NaN is not, and stays
    value = torch.where(zero, 0.0, torch.where(zero, 1.0, mean) ** (1 / p))
    with torch.no_grad():
        # panel by panel, so that errors of opposite sign do not cancel
        each = [(means - _panel_means(panels[..., _subset(full, part)], part, law, p)).abs().mean(-1) for part in parts]
        off = SAFETY * torch.stack(each).amax(0)
        error = (value - (mean - off).clamp(min=0) ** (1 / p)) * scale + UNSEEN * value * scale
    return value * scale, error
