"""``(E_t |f(t)|^p)^{1/p}`` from values of f at fixed nodes, differentiable in those values.

f is a loss rise along a line with ``f(0) = 0``. ``|f|^p`` has a kink at 0, so ``[−δ, 0]`` and ``[0, δ]`` are separate
panels of Gauss–Legendre nodes. Where p is not even and f changes sign inside a panel, or where ``|f|^p`` has a higher
degree than the nodes resolve, the polynomial through ``(0, 0)`` and the nodes is integrated instead, split at its
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

VISIBLE = 1e-3
"""A change of sign matters where f exceeds this fraction of ``max|f|`` on both sides: less adds under 1e-6 to S."""


class SegmentLaw(Protocol):
    """A symmetric law of t: density of ``|t|`` on ``[0, reach]`` and ``E |t|^p``."""

    @property
    def reach(self) -> float: ...

    def density(self, t: Tensor) -> Tensor: ...

    def moment(self, p: float) -> float: ...


@lru_cache(maxsize=64)
def gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1) and weights that sum to 1; exact for polynomials of degree ``2n − 1``."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


@dataclass(frozen=True)
class Rule:
    """Nodes in (0, 1) of one panel and interpolatory weights for the uniform density."""

    x: np.ndarray
    w: np.ndarray

    @cached_property
    def ends(self) -> np.ndarray:
        """``[2, m]``: near 0 and at 1, what the polynomial through (0, 0) and ``(x_j, f_j)`` shows of its sign.

        Near 0 that is its slope times 0.05: a change of sign at z adds ``O(slope·z²)`` only.
        """
        tiny = 1e-6
        slope = self.interpolation(np.array([tiny]))[0] / tiny
        return np.stack([0.05 * slope, self.interpolation(np.array([1.0]))[0]])

    def interpolation(self, z: np.ndarray) -> np.ndarray:
        """``B [len(z), m]``: values at z of the polynomial through (0, 0) and ``(x_j, f_j)``."""
        nodes = np.concatenate([[0.0], self.x])
        out = np.ones((len(z), len(self.x)))
        for j in range(1, len(nodes)):
            for i in range(len(nodes)):
                if i != j:
                    out[:, j - 1] *= (z - nodes[i]) / (nodes[j] - nodes[i])
        return out


@lru_cache(maxsize=64)
def panel_rules(n: int) -> tuple[Rule, Rule]:
    """The Gauss–Legendre rule with n nodes, and the embedded rule on the subset of n − 2 that weighs best."""
    x, w = gauss_legendre(n)
    best: tuple[float, Rule, list[int]] | None = None
    for drop in combinations(range(n), 2):
        keep = [i for i in range(n) if i not in drop]
        vandermonde = np.vander(2 * x[keep] - 1, increasing=True).T
        moments = np.array([0.0 if k % 2 else 1.0 / (k + 1) for k in range(len(keep))])
        weights = np.linalg.solve(vandermonde, moments)
        # positive weights, and nodes as evenly used as possible
        badness = float(np.abs(weights).sum() - 1) + float(weights.var())
        if best is None or badness < best[0] - 1e-12:
            best = (badness, Rule(x[keep], weights), keep)
    assert best is not None
    return Rule(x, w), best[1]


def _subset(full: Rule, part: Rule) -> list[int]:
    return [int(np.argmin(np.abs(full.x - v))) for v in part.x]


def _roots(values: Tensor, rule: Rule) -> list[float]:
    """Sign changes in (0, 1) of the interpolating polynomial, by bisection between points of a grid."""
    f = np.array(values.detach().tolist())
    grid = np.linspace(0.0, 1.0, 257)[1:]
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
    n = min(256, max(24, math.ceil(p * len(rule.x) / 2) + 1))
    x, w = gauss_legendre(n)
    edges = [0.0, *cuts, 1.0]
    z = np.concatenate([a + (b - a) * x for a, b in pairwise(edges)])
    weights = np.concatenate([(b - a) * w for a, b in pairwise(edges)])
    matrix = values.new_tensor(rule.interpolation(z))
    dense = values.new_tensor(weights) * law.density(values.new_tensor(z) * law.reach) * law.reach
    return dense @ (matrix @ values).abs() ** p


def _panel_means(values: Tensor, rule: Rule, law: SegmentLaw, p: float) -> Tensor:
    """``E |f|^p`` per panel for ``values [..., m]`` (already scaled to at most 1): shape ``[...]``."""
    even = p % 2 == 0
    x = values.new_tensor(rule.x)
    weights = values.new_tensor(rule.w) * law.density(x * law.reach) * law.reach
    direct = (weights * values.abs() ** p).sum(-1)
    # signs at the nodes, and of the interpolating polynomial just after 0 and at the far end
    seen = torch.cat([values.detach(), values.detach() @ values.new_tensor(rule.ends).T], -1)
    crossing = (seen.amax(-1) > VISIBLE) & (seen.amin(-1) < -VISIBLE)
    redo = torch.ones_like(crossing) if p > len(rule.x) else crossing & (not even)
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
    """The t at which f is evaluated: ``2·nodes`` of them, the negative half segment first."""
    x, _ = gauss_legendre(nodes)
    return [*(-law.reach * x).tolist(), *(law.reach * x).tolist()]


def power_norm(f: Tensor, law: SegmentLaw, p: float, nodes: int) -> tuple[Tensor, Tensor]:
    """``S = (E_t |f(t)|^p)^{1/p}`` and its quadrature error for ``f [n, 2·nodes]``: shapes ``[n]``.

    ``S = M·(E (|f|/M)^p)^{1/p}`` with ``M = max|f|``, so that no power underflows; S = 0 has gradient 0.
    """
    full, part = panel_rules(nodes)
    keep = _subset(full, part)
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
        off = (means - _panel_means(panels[..., keep], part, law, p)).abs().mean(-1)
        error = (value - (mean - off).clamp(min=0) ** (1 / p)) * scale
    return value * scale, error
