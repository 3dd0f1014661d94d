"""Run benchmarks: ``python -m benchmarks [WORD…]``; only cases whose names hold one of the words, if any are given."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch

from benchmarks import measuring, training
from benchmarks.paired import Outcome, measure

CASES = (*training.CASES, *measuring.CASES)
OUT = Path("benchmarks") / "results"


def line(outcome: Outcome) -> str:
    """A row of the Markdown table: the ratio to the first other alternative, with its quartiles."""
    middle, low, high = outcome.ratio(outcome.others[0])
    limit = outcome.case.limit
    reached = "" if limit is None else f"{limit:g} ({'reached' if middle <= limit else 'not reached'})"
    return f"| {outcome.case.name} | {middle:.3f} | {low:.3f} to {high:.3f} | {reached} | {outcome.case.note} |"


def main() -> None:
    """Measure, print as it goes, and write one Markdown table and one JSON file."""
    torch.set_num_threads(int(sys.argv.pop(1).removeprefix("--threads=")) if _threads_given() else 1)
    words = sys.argv[1:]
    chosen = [case for case in CASES if not words or any(word in case.name for word in words)]
    lines = ["| ours / theirs | median | quartiles | aim | |", "|---|---|---|---|---|"]
    outcomes = []
    print("\n".join(lines))
    for case in chosen:
        outcome = measure(case)
        outcomes.append(outcome)
        lines.append(line(outcome))
        print(lines[-1], flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    machine = {"processor": platform.processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    record = {"machine": machine, "cases": [outcome.record() for outcome in outcomes]}
    (OUT / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def _threads_given() -> bool:
    return len(sys.argv) > 1 and sys.argv[1].startswith("--threads=")


if __name__ == "__main__":
    main()
