"""Run benchmarks: ours and others' side by side, as a Markdown table and JSON in ``benchmarks/results/``.

``python -m benchmarks [WORD…]`` runs the cases whose names hold one of the words, all of them by default. Rows are
printed and written as they come, each in the place of its last result: an interruption keeps those so far.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser, available, duration, measuring, positive, settle
from benchmarks.paired import LEAST, Case, measure
from benchmarks.progress import Progress
from benchmarks.tables import HEAD, rows

MODULES = ("training", "together", "measuring", "curvature", "peers", "memory", "startup")
"""Where cases are: ``CASES`` of each module that there is."""
SECONDS = 8.0
"""Of a case's counted rounds, where ``LEAST`` of them do not take longer: all cases then take about ten minutes."""
PACKAGES = (
    "torch", "tensordict", "numpy", "scipy", "pytorch_optimizer", "PyHessian", "curvlinops-for-pytorch",
    "hessian-eigenthings", "loss-landscapes", "typer", "rich",
)
FAILED = 1
INTERRUPTED = 130


def find_cases(modules: Sequence[str] = MODULES) -> tuple[list[Case], list[str]]:
    """All cases, and for every module that needs a package that is not installed a line that says so."""
    cases: list[Case] = []
    lacking = []
    for name in modules:
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            continue
        try:
            cases += importlib.import_module(f"benchmarks.{name}").CASES
        except ModuleNotFoundError as error:
            lacking.append(f"benchmarks/{name}.py: {error.name} is not installed")
    return cases, lacking


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(), "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
    }


def processor() -> str:
    """The processor's name, as the system knows it."""
    known = Path("/proc/cpuinfo")
    if known.exists():
        for line in known.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """An installed distribution's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def outcome_of(
    case: Case, device: torch.device, rounds: int | None = None, seconds: float = SECONDS
) -> dict[str, Any]:
    """A case's record; one that could not be run says why in the place of numbers."""
    started = time.perf_counter()
    try:
        record = measure(case, device, rounds=rounds, seconds=seconds).record()
    except ModuleNotFoundError as error:
        record = {"case": case.name, "note": case.note, "limit": case.limit, "not_installed": {"": str(error.name)}}
    except Exception as error:  # one peer's failure is a row, not the end of all others
        lines = str(error).splitlines()
        failure = f"{type(error).__name__}: {lines[0] if lines else ''}"
        record = {"case": case.name, "note": case.note, "limit": case.limit, "failed": failure}
    known = machine(device if case.takes_device else torch.device("cpu"))
    return record | {"took": time.perf_counter() - started, "machine": known}


Key = tuple[str, str, int]


def key(record: Mapping[str, Any]) -> Key:
    """What tells two rows apart: a case on a kind of device with a number of threads."""
    return record["case"], record["machine"]["device"], record["machine"]["threads"]


def read(out: Path) -> dict[Key, dict[str, Any]]:
    """The records in a folder of results."""
    path = out / "results.json"
    return {key(r): r for r in json.loads(path.read_text())["cases"]} if path.exists() else {}


def write(records: Mapping[Key, dict[str, Any]], out: Path) -> None:
    """``results.json`` and ``table.md``, each whole at any time."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [*HEAD, *(line for record in records.values() for line in rows(record))]
    data = json.dumps({"cases": list(records.values())}, indent=1)
    for name, text in {"results.json": data, "table.md": "\n".join(lines)}.items():
        part = out / f"{name}.part"
        part.write_text(text + "\n")
        part.replace(out / name)


def parser() -> Parser:
    made = measuring("benchmarks", __doc__)
    made.add_argument("words", nargs="*", metavar="WORD", help="only cases whose names hold one of these")
    made.add_argument("--device", type=available, default=None, metavar="DEVICE",
                      help="cpu, or cuda: the cases that run there (default: cuda too where there is one)")
    many = made.add_mutually_exclusive_group()
    many.add_argument("--seconds", type=duration, default=SECONDS, metavar="S",
                      help=f"for a case's rounds: {LEAST} at least, its own number at most (default: {SECONDS:g})")
    many.add_argument("--rounds", type=positive, default=None, metavar="N", help="of every case, whatever they take")
    made.add_argument("--list", action="store_true", help="names of the cases, and nothing is run")
    return made


def plan(cases: Sequence[Case], device: torch.device | None) -> list[tuple[Case, torch.device]]:
    """What is run where: a case on the CPU, then on a GPU where there is one and the case can use it."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    devices = [device] if device is not None else [cpu, *([cuda] if torch.cuda.is_available() else [])]
    return [(case, d) for d in devices for case in cases if d.type == "cpu" or case.takes_device]


def run(
    work: Sequence[tuple[Case, torch.device]], out: Path, rounds: int | None, seconds: float
) -> dict[Key, dict[str, Any]]:
    """Measure, print and write, row after row, until all are done or it is interrupted; what was measured."""
    before, found = read(out), {}
    took = {name: record["took"] for (name, *_), record in before.items() if "took" in record}
    progress = Progress([took.get(case.name, seconds) for case, _ in work])
    print("\n".join(HEAD), flush=True)
    try:
        for case, device in work:
            progress.start(case.name)
            record = outcome_of(case, device, rounds, seconds)
            found[key(record)] = record
            progress.clear()
            print("\n".join(rows(record)), flush=True)
            write(before | found, out)
    except KeyboardInterrupt:
        progress.clear()
        write(before | found, out)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print as it goes, and write; the exit code."""
    given = parser().parse_args(arguments)
    settle(given.threads)
    cases, lacking = find_cases()
    chosen = [case for case in cases if not given.words or any(word in case.name for word in given.words)]
    if not chosen:
        print(f"benchmarks: no case holds {' or '.join(map(repr, given.words))}; expected a word of a name: "
              "python -m benchmarks --list", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(case.name for case in chosen))
        return 0
    for line in lacking:
        print(f"benchmarks: {line}", file=sys.stderr)
    work = plan(chosen, given.device)
    found = run(work, given.out, given.rounds, given.seconds)
    if len(found) < len(work):
        print(f"benchmarks: stopped; {len(found)} cases are in {given.out}", file=sys.stderr)
        return INTERRUPTED
    if not given.words:  # rows of cases that are no more
        write(found, given.out)
    return FAILED if any("failed" in record for record in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
