"""Paired measurement: alternatives interleaved in one process, medians of per-round ratios with their spread.

A noisy machine slows whole stretches of time down. Alternatives are therefore run one after the other in every round,
in an order that changes, and they are compared within each round: what slows a round slows both of its sides.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.allocations import peak_bytes

Run = Callable[[], Any]
CPU = torch.device("cpu")
LEAST = 5
"""Counted rounds without which quartiles say nothing."""


@dataclass(frozen=True)
class Missing:
    """In the place of an alternative: the package that it needs is not installed."""

    package: str


def needing(package: str, make: Callable[[], Run]) -> Run | Missing:
    """``make()``, or what the table says where ``package`` (an import name) is not installed."""
    try:
        importlib.import_module(package)
    except ImportError:
        return Missing(package)
    return make()


def on_clock(run: Run) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def between_events(run: Run) -> float:
    """Seconds of one call between two CUDA events."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


CLOCKS: dict[str, Callable[[Run], float]] = {"cpu": on_clock, "cuda": between_events}


@dataclass(frozen=True)
class Quantity:
    """What is measured of a call: ``take(run, device)``, shown by ``show``; ``warm``: after a call not counted."""

    name: str
    take: Callable[[Run, torch.device], float]
    show: Callable[[float], str]
    warm: bool = True


def seconds(value: float) -> str:
    """A time with its unit, three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def mebibytes(value: float) -> str:
    """An amount of memory in MiB."""
    return f"{value / 2**20:.3g} MiB" if value < 1000 * 2**20 else f"{value / 2**20:.0f} MiB"


SECONDS = Quantity("time", lambda run, device: CLOCKS[device.type](run), seconds)
STATED = Quantity("time stated", lambda run, device: float(run()), seconds)
"""Seconds that the call returns: of a part of what it does."""
PEAK = Quantity("peak memory", lambda run, device: float(peak_bytes(run, device)), mebibytes, warm=False)


@dataclass(frozen=True)
class Comparison:
    """How ours and another's are compared in one round."""

    name: str
    of: Callable[[float, float], float]
    show: Callable[[float], str]


RATIO = Comparison("ratio", lambda ours, theirs: ours / theirs, lambda x: f"{x:.3f}×")
EXCESS = Comparison("excess", lambda ours, theirs: ours - theirs, lambda x: f"{x:+.3f} s")
"""Ours beyond theirs, in seconds."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: a line for the table.
        setup: called once, with the device if it takes one; gives the alternatives by name. The first is ours, the
            second what it is held against.
        limit: what is aimed at for ours compared with the second; None where nothing is.
        rounds: how often every alternative is run at most.
        divide: what a time is divided by, per alternative (steps in a run, units of work): 1 where it is missing.
        note: where the limit comes from.
        best: hold ours against the best of the others in the place of the second.
        memory: whether peak memory is taken too, by one further call of each alternative.
        quantity: what is measured of a call.
        comparison: how ours is compared with the others.
    """

    name: str
    setup: Callable[..., Mapping[str, Run | Missing]]
    limit: float | None = None
    rounds: int = 11
    divide: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    best: bool = False
    memory: bool = True
    quantity: Quantity = SECONDS
    comparison: Comparison = RATIO

    @property
    def takes_device(self) -> bool:
        """Whether it runs on other devices than the CPU."""
        return "device" in inspect.signature(self.setup).parameters


@dataclass(frozen=True)
class Outcome:
    """What was measured of each alternative in each round, and ours compared with each other one.

    Attributes:
        times: seconds (or what else the case measures) by alternative, per round.
        peaks: bytes by alternative, where they were taken.
        missing: alternatives whose package is not installed, with its name.
    """

    case: Case
    times: dict[str, list[float]]
    peaks: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return next(iter(self.times))

    @property
    def others(self) -> list[str]:
        return list(self.times)[1:]

    @property
    def reference(self) -> str | None:
        """What ours is held against; None where nothing is left of the others."""
        if not self.others:
            return None
        return min(self.others, key=lambda k: statistics.median(self.times[k])) if self.case.best else self.others[0]

    def compared(self, other: str) -> list[float]:
        """Ours compared with another, per round."""
        pairs = zip(self.times[self.ours], self.times[other], strict=True)
        return [self.case.comparison.of(ours, theirs) for ours, theirs in pairs]

    def ratio(self, other: str) -> tuple[float, float, float]:
        """Median and quartiles of ours compared with another over rounds."""
        values = self.compared(other)
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return middle, low, high

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ratios = {}
        for other in self.others:
            low, high = interval_of_median(self.compared(other))
            ratios[other] = {
                **dict(zip(("median", "low", "high"), self.ratio(other), strict=True)), "interval": [low, high],
            }
        return {
            "case": self.case.name, "limit": self.case.limit, "note": self.case.note,
            "rounds": len(self.times[self.ours]) if self.times else 0,
            "quantity": self.case.quantity.name, "comparison": self.case.comparison.name,
            "ours": self.ours if self.times else None, "reference": self.reference if self.times else None,
            "medians": {k: statistics.median(v) for k, v in self.times.items()}, "ratios": ratios,
            "peak_bytes": self.peaks, "not_installed": self.missing, "values": self.times,
        }


def interval_of_median(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval of the median: the order statistics whose binomial ranks hold ``confidence``.

    With fewer than six values no two of them do, and the interval is their range.
    """
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if 2 * below > 1 - confidence:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def rounds_within(seconds: float, spent: float, counted: int, most: int) -> int:
    """How many rounds take ``seconds`` if those counted spent ``spent``: no fewer than these, at most ``most``."""
    return max(counted, int(min(most, seconds * counted / spent))) if spent > 0 else most


def measure(
    case: Case, device: torch.device = CPU, seed: int = 0, rounds: int | None = None, seconds: float = math.inf
) -> Outcome:
    """A case's rounds, after one that is not counted where the quantity asks for it.

    Args:
        case: what is compared.
        device: for cases that take one.
        seed: of the orders in a round.
        rounds: exactly so many; None leaves it to the case and to ``seconds``.
        seconds: what the counted rounds are to take together. The first ``LEAST`` say how many fit; as many as those
            are taken in any case, and the case's at most.
    """
    made = dict(case.setup(device=device) if case.takes_device else case.setup())
    missing = {name: run.package for name, run in made.items() if isinstance(run, Missing)}
    alternatives = {name: run for name, run in made.items() if not isinstance(run, Missing)}
    if not alternatives or next(iter(made)) in missing:
        return Outcome(case, {}, missing=missing)
    order, device = random.Random(seed), device if case.takes_device else CPU
    for run in alternatives.values() if case.quantity.warm else ():
        run()
    values: dict[str, list[float]] = {name: [] for name in alternatives}

    def take(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            names = list(alternatives)
            order.shuffle(names)
            for name in names:
                values[name].append(case.quantity.take(alternatives[name], device) / case.divide.get(name, 1.0))
        return time.perf_counter() - started

    if rounds is None:
        first = min(LEAST, case.rounds)
        take(rounds_within(seconds, take(first), first, case.rounds) - first)
    else:
        take(rounds)
    peaks = {name: peak_bytes(run, device) for name, run in alternatives.items()} if case.memory else {}
    return Outcome(case, values, peaks, missing)
