"""Learning-rate schedules as factories of ``torch.optim`` schedulers that are stepped once per training step.

Step ``s`` counts from 0. With a warm-up over ``W`` steps (which may be fractional) the rate rises linearly as
``(s + 1)/(W + 1)`` until it is full at step ``W`` (Goyal et al. 2017, arXiv:1706.02677, section 2.2): no step is taken
at rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bnsharp.errors import InputError

Schedule = Callable[[Optimizer], LRScheduler]


def constant(*, warmup: float = 0.0) -> Schedule:
    """The learning rate as it is, after a warm-up over ``warmup`` steps.

    Raises:
        InputError: a warm-up that is negative or not finite.
    """
    _require_warmup(warmup)
    return lambda optimizer: LambdaLR(optimizer, lambda step: _rising(step, warmup))


def multistep(milestones: Sequence[int], gamma: float, steps_per_epoch: int, *, warmup: float = 0.0) -> Schedule:
    """Times γ from the start of each milestone epoch on; epochs are those of the run, its warm-up included.

    Raises:
        InputError: milestones that do not increase, γ not in (0, 1], a warm-up that is negative or not finite.
    """
    if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
        raise InputError(f"milestones={list(milestones)}; expected increasing epochs from 1 on")
    if not (math.isfinite(gamma) and 0 < gamma <= 1):
        raise InputError(f"gamma={gamma}; expected 0 < gamma <= 1")
    _require_warmup(warmup)

    def factor(step: int) -> float:
        return _rising(step, warmup) * gamma ** sum(step >= m * steps_per_epoch for m in milestones)

    return lambda optimizer: LambdaLR(optimizer, factor)


def cosine(steps: int, *, warmup: float = 0.0, floor: float = 0.0) -> Schedule:
    """``f + (1 − f)·½(1 + cos(π (s − W)/(steps − W)))`` after the warm-up: from the full rate to ``f`` times it.

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5.

    Args:
        steps: of the run, its warm-up included.
        warmup: W, in steps.
        floor: f, the last rate in units of the full one, in [0, 1].

    Raises:
        InputError: no step, a warm-up that is negative or leaves no step, a floor outside [0, 1].
    """
    if steps < 1:
        raise InputError(f"cosine schedule over {steps} steps; expected at least 1")
    _require_warmup(warmup)
    if warmup >= steps:
        raise InputError(f"warmup={warmup:g} of {steps} steps; expected a warm-up that is shorter than the run")
    if not 0 <= floor <= 1:
        raise InputError(f"floor={floor}; expected a fraction of the full rate between 0 and 1")

    def factor(step: int) -> float:
        done = min(max(step - warmup, 0.0) / (steps - warmup), 1.0)
        return _rising(step, warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    return lambda optimizer: LambdaLR(optimizer, factor)


def _rising(step: int, warmup: float) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def _require_warmup(warmup: float) -> None:
    if not (math.isfinite(warmup) and warmup >= 0):
        raise InputError(f"warmup={warmup}; expected a finite number of steps >= 0")
