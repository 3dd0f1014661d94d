"""Where a call's time goes, by sampling the interpreter's stack on a timer.

Each sample's weight is the time since the last one: a signal that arrives while a kernel runs is handled when the
kernel returns, in the frame that called it, so that long kernels count in full. Nothing is patched or wrapped.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

INTERVAL = 1e-3
"""Seconds between two samples."""
FORWARD, BACKWARD, OPTIMIZER = "forward passes", "backward passes", "optimizer"
ARITHMETIC, OTHER = "directions and geometry", "checks and bookkeeping"
KINDS = (FORWARD, BACKWARD, ARITHMETIC, OPTIMIZER, OTHER)
MODULES = {
    **dict.fromkeys((
        "params", "partition", "balls", "geometry", "maps", "laws", "directions", "scores", "reduce", "quadrature",
        "profiles", "penalties", "penalty_gradients", "starts", "grids",
    ), ARITHMETIC),
    **dict.fromkeys(("convolutions", "pointwise", "shared_passes", "stacked"), FORWARD),
}
"""What the time of the package's own modules is spent on, all others' on bookkeeping."""


def shares(run: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Fractions of the time of ``run()``, repeated for about ``seconds``, by kind; they sum to 1."""
    spent: Counter[str] = Counter()
    last = time.perf_counter()

    def sample(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[kind_of(stack(frame))] += now - last  # type: ignore[assignment]
        last = now

    before = signal.signal(signal.SIGALRM, sample)
    try:
        run()
        last = started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)
        while time.perf_counter() - started < seconds:
            run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    total = sum(spent.values())
    return {kind: spent[kind] / total if total else 0.0 for kind in KINDS}


def stack(frame: FrameType | None) -> Iterable[tuple[str, str]]:
    """``(file, function)`` of a frame and of all that called it, innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def kind_of(frames: Iterable[tuple[str, str]]) -> str:
    """The kind of the innermost frame that has one."""
    for file, function in frames:
        path = Path(file)
        if "/torch/nn/modules/" in file or file.endswith("/torch/nn/functional.py"):
            return FORWARD
        if "/torch/autograd/" in file and function in ("grad", "backward", "_engine_run_backward"):
            return BACKWARD
        if "/torch/optim/" in file:
            return OPTIMIZER
        if path.parent.name == "bnsharp":
            return MODULES.get(path.stem, OTHER)
    return OTHER
