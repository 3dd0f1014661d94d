"""Run benchmarks: ours and others' side by side, as a Markdown table and JSON in ``benchmarks/results/``.

``python -m benchmarks [WORD…]`` runs the cases whose names hold one of the words, all of them by default. Rows are
printed and written as they come: an interruption keeps those so far.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import Case, measure
from benchmarks.tables import HEAD, rows

MODULES = ("training", "together", "measuring", "curvature", "peers", "memory", "startup")
"""Where cases are: ``CASES`` of each module that there is."""
OUT = Path("benchmarks") / "results"
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


def outcome_of(case: Case, device: torch.device, rounds: int | None) -> dict[str, Any]:
    """A case's record; one that could not be run says why in the place of numbers."""
    try:
        record = measure(case, device, rounds=rounds).record()
    except ModuleNotFoundError as error:
        record = {"case": case.name, "note": case.note, "limit": case.limit, "not_installed": {"": str(error.name)}}
    except Exception as error:  # one peer's failure is a row, not the end of all others
        lines = str(error).splitlines()
        failure = f"{type(error).__name__}: {lines[0] if lines else ''}"
        record = {"case": case.name, "note": case.note, "limit": case.limit, "failed": failure}
    return record | {"machine": machine(device if case.takes_device else torch.device("cpu"))}


def write(records: Sequence[dict[str, Any]], out: Path, keep: bool) -> None:
    """``results.json`` and ``table.md``; with ``keep``, rows of other cases that are there stay."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    merged = {key(r): r for r in json.loads(path.read_text())["cases"]} if keep and path.exists() else {}
    merged |= {key(r): r for r in records}
    path.write_text(json.dumps({"cases": list(merged.values())}, indent=1) + "\n")
    (out / "table.md").write_text("\n".join([*HEAD, *(line for r in merged.values() for line in rows(r))]) + "\n")


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    """What tells two rows apart: a case on a kind of device with a number of threads."""
    return record["case"], record["machine"]["device"], record["machine"]["threads"]


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1 on")
    return int(text)


def available(text: str) -> torch.device:
    """A device that there is."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("'cuda' is not available here; expected cpu")
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected cpu or cuda")
    return torch.device(text)


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("words", nargs="*", metavar="WORD", help="only cases whose names hold one of these")
    made.add_argument("--threads", type=positive, default=1, metavar="N", help="of PyTorch (default: 1)")
    made.add_argument("--device", type=available, default=None, metavar="DEVICE",
                      help="cpu, or cuda: the cases that run there (default: cuda too where there is one)")
    made.add_argument("--rounds", type=positive, default=None, metavar="N", help="of every case (default: its own)")
    made.add_argument("--list", action="store_true", help="names of the cases, and nothing is run")
    made.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"results (default: {OUT})")
    return made


class Parser(argparse.ArgumentParser):
    """One line for what cannot be used."""

    def error(self, message: str) -> Any:
        print(f"benchmarks: {message}", file=sys.stderr)
        sys.exit(2)


def plan(cases: Sequence[Case], device: torch.device | None) -> list[tuple[Case, torch.device]]:
    """What is run where: a case on the CPU, then on a GPU where there is one and the case can use it."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    devices = [device] if device is not None else [cpu, *([cuda] if torch.cuda.is_available() else [])]
    return [(case, d) for d in devices for case in cases if d.type == "cpu" or case.takes_device]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print as it goes, and write; the exit code."""
    given = parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
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
    records: list[dict[str, Any]] = []
    print("\n".join(HEAD), flush=True)
    try:
        for case, device in plan(chosen, given.device):
            records.append(outcome_of(case, device, given.rounds))
            print("\n".join(rows(records[-1])), flush=True)
            write(records, given.out, keep=bool(given.words))
    except KeyboardInterrupt:
        print(f"benchmarks: stopped; {len(records)} cases are in {given.out}", file=sys.stderr)
        return INTERRUPTED
    return FAILED if any("failed" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
