"""Learning rates at every step, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import fast, one_line
from hypothesis import given
from hypothesis import strategies as st

from bnsharp.errors import InputError
from bnsharp.schedules import Schedule, constant, cosine, multistep


def rates(schedule: Schedule, steps: int, lr: float = 1.0) -> list[float]:
    """The rate of each of the first steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize(("schedule", "expected"), [
    (constant(), [1, 1, 1]),
    (constant(warmup=3), [1 / 4, 2 / 4, 3 / 4, 1, 1]),
    (constant(warmup=1.5), [1 / 2.5, 2 / 2.5, 1, 1]),
    (multistep([1, 2], 0.1, 2), [1, 1, 0.1, 0.1, 0.01, 0.01]),
    (multistep([1, 2], 0.1, 2, warmup=1), [0.5, 1, 0.1, 0.1, 0.01]),
    (multistep([1], 0.1, 2, warmup=3), [0.25, 0.5, 0.075, 0.1, 0.1]),  # a milestone within the warm-up
    (cosine(4), [1, half_cosine(1 / 4), 0.5, half_cosine(3 / 4), 0, 0]),
    (cosine(4, floor=0.2), [1, 0.2 + 0.8 * half_cosine(1 / 4), 0.6, 0.2 + 0.8 * half_cosine(3 / 4), 0.2]),
    (cosine(6, warmup=2), [1 / 3, 2 / 3, 1, half_cosine(1 / 4), 0.5, half_cosine(3 / 4), 0]),
    (cosine(4, warmup=0.5, floor=0.1), [1 / 1.5, 0.1 + 0.9 * half_cosine(0.5 / 3.5),
                                        0.1 + 0.9 * half_cosine(1.5 / 3.5)]),
])
def test_rates(schedule, expected):
    assert rates(schedule, len(expected), lr=0.4) == pytest.approx([0.4 * e for e in expected], abs=1e-12)


@given(st.integers(1, 20), st.floats(0, 0.99), st.floats(0, 1))
@fast
def test_cosine_rises_to_the_full_rate_and_falls_to_its_floor(steps, part, floor):
    warmup = part * steps
    found = rates(cosine(steps, warmup=warmup, floor=floor), steps + 3)
    assert all(0 < r <= 1 + 1e-12 for r in found[:steps])
    turn = max(range(len(found)), key=found.__getitem__)
    assert turn <= math.ceil(warmup)
    assert found[turn:] == sorted(found[turn:], reverse=True)
    assert found[steps:] == pytest.approx([floor] * 3, abs=1e-12)


BAD: list[tuple[Any, str]] = [
    (lambda: constant(warmup=-1), "warmup"), (lambda: constant(warmup=math.inf), "warmup"),
    (lambda: multistep([1], 0.1, 2, warmup=math.nan), "warmup"), (lambda: multistep([2, 1], 0.1, 2), "milestones"),
    (lambda: multistep([0], 0.1, 2), "milestones"), (lambda: multistep([1], 0.0, 2), "gamma"),
    (lambda: cosine(0), "steps"), (lambda: cosine(3, warmup=3), "shorter"), (lambda: cosine(3, floor=1.5), "floor"),
    (lambda: cosine(3, floor=math.nan), "floor"),
]


@pytest.mark.parametrize(("make", "word"), BAD)
def test_bad_schedules_are_refused_in_one_line(make, word):
    with pytest.raises(InputError) as caught:
        make()
    assert word in one_line(caught.value)
