"""How cost grows with nodes, directions, parameters, batch and ranks: ``python -m benchmarks.growth``.

A training step is SGDS-0's, an evaluation BN-Sharpness from the steepest start with 2×8 nodes, where nothing else is
said, on the BN perceptron. Sizes of one axis are interleaved; the exponent is the slope of log time over log size, by
least squares over the upper half of the sizes. Writes ``benchmarks/results/growth.json`` and ``docs/growth.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bnsharp
from benchmarks.__main__ import machine
from benchmarks.arguments import settle, timing
from benchmarks.paired import Case, Run, measure
from benchmarks.tables import table
from bnsharp.algorithms import algorithm
from bnsharp.models import build

ROUNDS = 7
SIDE, WIDTH, BATCH = 16, 256, 512
FIGURE = Path("docs") / "growth.png"
HEAD = ["axis", "what", "sizes", "times", "exponent"]
cross_entropy = nn.functional.cross_entropy


def setting(width: int = WIDTH, batch: int = BATCH) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A BN perceptron and random images."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, 1, SIDE, SIDE, generator=generator), torch.randint(10, (batch,), generator=generator)
    return build("bn-mlp", (1, SIDE, SIDE), 10, seed=0, width=width).train(), (x, y)


def step(ranks: Any = None, **size: int) -> Run:
    """A training step of SGDS-0."""
    module, batch = setting(**size)
    made = algorithm("sgds-0", bnsharp.scale_groups(module, batch[0][:16]))
    regularizer, weight, generator = made.regularizer(0), made.weight(0), torch.Generator().manual_seed(0)
    optimizer, part = torch.optim.SGD(module.parameters(), lr=1e-4), batch if ranks is None else ranks.share(batch)

    def run() -> None:
        optimizer.zero_grad()
        bnsharp.backward(module, cross_entropy, part, regularizer, weight, generator=generator, ranks=ranks)
        optimizer.step()

    return run


def evaluation(ranks: Any = None, nodes: int = 8, directions: int = 1, **size: int) -> Run:
    """BN-Sharpness: the steepest direction and ``directions − 1`` random ones, the best of them."""
    module, batch = setting(**size)
    groups = bnsharp.scale_groups(module, batch[0][:16])
    measured = bnsharp.measures.bn_sharpness(groups, delta=0.01, steps=0, nodes=nodes, restarts=directions - 1)
    part, more = (batch, {}) if ranks is None else (ranks.share(batch), {"ranks": ranks})
    objective, theta = bnsharp.Objective(module, cross_entropy, part, **more), bnsharp.parameters(module)
    return lambda: measured(objective, theta, sampling=bnsharp.Sampling(promote=False))


WHAT: dict[str, Callable[..., Run]] = {"SGDS-0 step": step, "BN-Sharpness": evaluation}
AXES: dict[str, tuple[Sequence[int], Callable[[int], int], dict[str, Callable[[int], Run]]]] = {
    "nodes": ((4, 8, 16, 32, 64), lambda n: 2 * n, {"BN-Sharpness": lambda n: evaluation(nodes=n)}),
    "directions": ((2, 4, 8, 16), lambda n: n, {"BN-Sharpness": lambda n: evaluation(directions=n)}),
    "parameters": (
        (64, 128, 256, 512, 1024), lambda w: sum(p.numel() for p in setting(w, 2)[0].parameters()),
        {name: lambda w, make=make: make(width=w) for name, make in WHAT.items()},
    ),
    "batch": (
        (64, 256, 1024, 4096), lambda n: n, {name: lambda n, make=make: make(batch=n) for name, make in WHAT.items()},
    ),
}
"""By axis: settings, what is on the axis at each, and what is timed."""
SLOPES = {"ranks": (-1, 0)}
"""What the eye compares with, where that is not slope 1 through the last point: slope, and point."""
RANKS = (1, 2)
RANKS_BATCH = 4096


def on_axis(axis: str, what: str, rounds: int) -> dict[str, Any]:
    """Median seconds at every size of an axis."""
    settings, shown, made = AXES[axis]
    runs = {str(n): made[what](n) for n in settings}
    times = measure(Case(axis, lambda: runs, rounds=rounds, memory=False)).times
    return series(axis, what, [shown(n) for n in settings], [statistics.median(times[str(n)]) for n in settings])


def over_ranks(what: str, rounds: int) -> dict[str, Any]:
    """Median seconds of one batch in 1 and 2 processes, each process with one thread."""
    seconds = []
    for count in RANKS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                   "-m", "benchmarks.growth", "--worker", what, f"--rounds={rounds}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds.append(float(done.stdout.split()[-1]))
    return series("ranks", what, list(RANKS), seconds)


def worker(what: str, rounds: int) -> None:
    """What each process of a job does; the first prints the median of the seconds."""
    from bnsharp.distributed import joined

    settle(1)
    with joined() as ranks:
        run = WHAT[what](ranks=ranks, batch=RANKS_BATCH)
        times = measure(Case(what, lambda: {what: run}, rounds=rounds, memory=False)).times[what]
        if ranks.is_first:
            print(statistics.median(times))


def series(axis: str, what: str, sizes: list[int], seconds: list[float]) -> dict[str, Any]:
    """One line of the table."""
    return {"axis": axis, "what": what, "sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log size by least squares, over the upper half of the sizes (two at least)."""
    kept = max(2, math.ceil((len(sizes) + 1) / 2))
    x, y = ([math.log(v) for v in values[-kept:]] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope


def line(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        found["axis"], found["what"], ", ".join(map(str, found["sizes"])),
        ", ".join(f"{1e3 * s:.3g}" for s in found["seconds"]) + " ms", f"{found['exponent']:.2f}",
    ]


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds over size, one panel per axis, both logarithmic, with lines of slope 1 for the eye."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(f["axis"] for f in found))
    figure, panels = plt.subplots(1, len(axes), figsize=(3.1 * len(axes), 3.3), layout="constrained")
    colours = dict(zip(WHAT, ("tab:blue", "tab:red"), strict=True))
    for axis, panel in zip(axes, panels, strict=True):
        mine = [f for f in found if f["axis"] == axis]
        for f in mine:
            label = f"{f['what']}: slope {f['exponent']:.2f}"
            panel.loglog(f["sizes"], [1e3 * s for s in f["seconds"]], "o-", color=colours[f["what"]], label=label)
        first = mine[-1]
        slope, at = SLOPES.get(axis, (1, -1))
        ideal = [1e3 * first["seconds"][at] * (n / first["sizes"][at]) ** slope for n in first["sizes"]]
        panel.loglog(first["sizes"], ideal, ":", color="grey", label=f"slope {slope}")
        panel.set_xticks(first["sizes"], [f"{n / 1000:.0f}k" if n >= 10_000 else str(n) for n in first["sizes"]])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.set_xlabel(axis)
        panel.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("ms")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Measure every axis, print a table, write JSON and figure."""
    parser = timing("benchmarks.growth", __doc__, ROUNDS)
    parser.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE", help=f"(default: {FIGURE})")
    parser.add_argument("--worker", choices=WHAT, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settle(given.threads)
    if given.worker is not None:
        worker(given.worker, given.rounds)
        return
    found = []
    print(table(HEAD, []), flush=True)
    for axis, (_, _, made) in AXES.items():
        for what in made:
            found.append(on_axis(axis, what, given.rounds))
            print("| " + " | ".join(line(found[-1])) + " |", flush=True)
    for what in WHAT:
        found.append(over_ranks(what, given.rounds))
        print("| " + " | ".join(line(found[-1])) + " |", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(torch.device("cpu")), "growth": found}
    (given.out / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(found, given.figure)


if __name__ == "__main__":
    main()
