"""Paired timing: alternatives interleaved in one process, medians of per-round ratios with their spread.

A noisy machine slows whole stretches of time down. Alternatives are therefore run one after the other in every round,
in an order that changes, and a ratio is taken within each round: what slows a round slows both of its sides.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: a line for the table.
        setup: called once; gives the alternatives by name. The first is ours, the second what it is held against.
        limit: the ratio ours / second that is aimed at; None where none is.
        rounds: how often every alternative is run.
        divide: what a time is divided by, per alternative (steps in a run, units of work): 1 where it is missing.
        note: where the limit comes from.
    """

    name: str
    setup: Callable[[], Mapping[str, Run]]
    limit: float | None = None
    rounds: int = 11
    divide: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """Times in seconds by alternative, per round, and the ratios of the first to each other one."""

    case: Case
    times: dict[str, list[float]]

    def ratio(self, other: str) -> tuple[float, float, float]:
        """Median and quartiles of ours / other over rounds."""
        ours, theirs = (self.times[k] for k in (next(iter(self.times)), other))
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        return middle, low, high

    @property
    def others(self) -> list[str]:
        return list(self.times)[1:]

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "case": self.case.name, "limit": self.case.limit, "note": self.case.note, "rounds": self.case.rounds,
            "median_seconds": {k: statistics.median(v) for k, v in self.times.items()},
            "ratios": {k: dict(zip(("median", "low", "high"), self.ratio(k), strict=True)) for k in self.others},
        }


def timed(run: Run, synchronize: Callable[[], None]) -> float:
    """Seconds of one call, on a GPU until its work is done."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def measure(case: Case, synchronize: Callable[[], None] = lambda: None, seed: int = 0) -> Outcome:
    """All rounds of a case, after one round that is not counted."""
    alternatives, order = dict(case.setup()), random.Random(seed)
    for run in alternatives.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(case.rounds):
        names = list(alternatives)
        order.shuffle(names)
        for name in names:
            times[name].append(timed(alternatives[name], synchronize) / case.divide.get(name, 1.0))
    return Outcome(case, times)
