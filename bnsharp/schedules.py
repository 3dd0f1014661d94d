"""Learning-rate schedules as factories of ``torch.optim`` schedulers that are stepped once per training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bnsharp.errors import InputError

Schedule = Callable[[Optimizer], LRScheduler]


def constant() -> Schedule:
    """The learning rate as it is."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: 1.0)


def multistep(milestones: Sequence[int], gamma: float, steps_per_epoch: int) -> Schedule:
    """Times γ from the start of each milestone epoch on.

    Raises:
        InputError: milestones that do not increase, γ not in (0, 1].
    """
    if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
        raise InputError(f"milestones={list(milestones)}; expected increasing epochs from 1 on")
    if not (math.isfinite(gamma) and 0 < gamma <= 1):
        raise InputError(f"gamma={gamma}; expected 0 < gamma <= 1")

    def factor(step: int) -> float:
        return gamma ** sum(step >= m * steps_per_epoch for m in milestones)

    return lambda optimizer: LambdaLR(optimizer, factor)


def cosine(steps: int) -> Schedule:
    """``½(1 + cos(π·step/steps))``: from the full rate to 0."""
    if steps < 1:
        raise InputError(f"cosine schedule over {steps} steps; expected at least 1")

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    return lambda optimizer: LambdaLR(optimizer, factor)
