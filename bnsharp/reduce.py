"""Reduce: n values of a profile to one number, with its standard error and effective sample size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bnsharp.checks import at_least, positive


class Reduce(Protocol):
    """``values [n] -> (value [], stderr [], effective sample size [])``; the value is differentiable."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


def derivative(reduce: Reduce, values: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced value and its derivative ``w [n]`` with respect to each value."""
    if len(values) == 1 and is_identity(reduce):
        return values[0], torch.ones_like(values)
    leaf = values.detach().requires_grad_()
    with torch.enable_grad():
        value = reduce(leaf)[0]
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def is_identity(reduce: Reduce) -> bool:
    """Whether the reduced value of a single one is known to be that value."""
    return type(reduce) in _OF_ONE_THE_SAME  # a class derived from them may be another function


def _mean_stderr(values: Tensor) -> Tensor:
    """Standard error of the mean; infinite from a single draw."""
    n = len(values)
    if n < 2:
        return values.new_tensor(math.inf)
    return values.detach().std() / math.sqrt(n)


@dataclass(frozen=True)
class Mean:
    """``E f``."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return values.mean(), _mean_stderr(values), values.new_tensor(float(len(values)))


@dataclass(frozen=True)
class Maximum:
    """``max f``: nothing is sampled, so the standard error is 0."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return values.max(), values.new_zeros(()), values.new_tensor(float(len(values)))


@dataclass(frozen=True)
class PowerMean:
    """``(E |f|^p)^{1/p}``, standard error by the delta method."""

    p: float

    def __post_init__(self) -> None:
        at_least("p", self.p, 1)

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = values.detach().abs().max()
        scale = torch.where(top > 0, top, torch.ones_like(top))
        powers = (values.abs() / scale) ** self.p
        mean = powers.mean()
        positive = mean > 0
        root = torch.where(positive, torch.where(positive, mean, torch.ones_like(mean)) ** (1 / self.p), mean)
        value = scale * root
        slope = torch.where(positive, value.detach() / (self.p * torch.where(positive, mean, 1.0).detach()), 0.0)
        stderr = torch.where(positive, slope * _mean_stderr(powers), torch.zeros_like(slope))
        return value, stderr, values.new_tensor(float(len(values)))


@dataclass(frozen=True)
class FreeEnergy:
    """``−(1/β) log E exp(−β f)``; effective sample size ``(Σ w)² / Σ w²``, ``w = exp(−β f)``."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        positive("beta", self.beta)

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = len(values)
        logs = -self.beta * values
        value = -(torch.logsumexp(logs, 0) - math.log(n)) / self.beta
        weights = torch.softmax(logs.detach(), 0)
        relative = _mean_stderr(weights * n)
        return value, relative / self.beta, 1.0 / (weights**2).sum()


_OF_ONE_THE_SAME: tuple[type, ...] = (Mean, Maximum, FreeEnergy)
"""Reductions of which a single value is itself."""
