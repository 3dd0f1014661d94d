"""Kullback-Leibler divergences, and the bounds of a mean that are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bnsharp.errors import InputError


def gaussian_kl(distance2: Tensor, std: Tensor, width: Tensor, size: Tensor | int = 1) -> Tensor:
    """``KL(N(μ, s² I_d) ‖ N(μ⁰, w² I_d)) = ½ (d (s²/w² − 1 − ln s²/w²) + ‖μ − μ⁰‖²/w²)``, elementwise.

    Args:
        distance2: ``‖μ − μ⁰‖²``. std, width: s and w, > 0. size: d. They broadcast against each other.
    """
    ratio = (std / width).square()
    return 0.5 * (size * (ratio - 1 - ratio.log()) + distance2 / width.square())


def bernoulli_kl(q: float, p: float) -> float:
    """``kl(q‖p) = q ln(q/p) + (1−q) ln((1−q)/(1−p))`` of two Bernoulli laws, in nats; inf where p excludes q."""
    total = 0.0
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return total


def kl_inverse(q: float, c: float) -> float:
    """``sup {p ≥ q : kl(q‖p) ≤ c}`` (Seeger 2002), by bisection from above: never below the supremum's last bit.

    Raises:
        InputError: q outside [0, 1], a negative c.
    """
    if not (0 <= q <= 1 and c >= 0):
        raise InputError(f"q={q!r}, c={c!r}; expected 0 <= q <= 1 and c >= 0")
    low, high = q, 1.0
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if bernoulli_kl(q, middle) <= c else (low, middle)
    return high if c > 0 else q


def mean_bound(mean: float, draws: int, eta: float) -> float:
    """An upper confidence limit of the mean of a law on [0, 1]: ``sup {p : kl(p̂‖p) ≤ ln(2/η)/m}``.

    p̂ is the mean of m independent draws; below the true mean with probability at most η (Langford & Caruana 2001).
    """
    return kl_inverse(mean, math.log(2 / eta) / draws)


@dataclass(frozen=True)
class Form:
    """One PAC-Bayes theorem for losses in [0, 1].

    Attributes:
        complexity: ``(KL + ln choices, n, η) -> c``.
        bound: ``(E_Q L_S, c) -> bound of E_Q L_D``, increasing in both.
        least: the smallest n for which it holds.
    """

    complexity: Callable[[float, int, float], float]
    bound: Callable[[float, float], float]
    least: int


FORMS: dict[str, Form] = {
    "mcallester": Form(
        lambda kl, n, eta: (kl + math.log(2 * n / eta)) / (2 * (n - 1)), lambda risk, c: risk + math.sqrt(c), 2
    ),
    "kl": Form(lambda kl, n, eta: (kl + math.log(2 * math.sqrt(n) / eta)) / n, kl_inverse, 8),
}
"""``"mcallester"``: ``E_Q L_S + √c``, ``c = (KL + ln(2n/η))/(2(n−1))`` (McAllester 2003).

``"kl"``: ``sup {p : kl(E_Q L_S‖p) ≤ c}``, ``c = (KL + ln(2√n/η))/n`` (Seeger 2002, with Maurer's 2004 constant, n ≥ 8),
never larger by Pinsker's inequality, and never above 1.
"""
