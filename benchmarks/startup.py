"""Import times in fresh processes: the package beyond what it stands on, ``--help`` beyond the least Typer program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.paired import EXCESS, STATED, Case, Run

BASE = "import torch, tensordict"
MAIN = (
    "from bnsharp import (Estimate, Measure, Objective, Sampling, Trainer, backward, exact_norms, geometry, laws, "
    "measures, parameters, profiles, reduce, regularizers, scale_groups)"
)
"""What the README uses."""


def process(*arguments: str) -> Run:
    """A fresh interpreter, until it has ended."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return run


def after_base(statement: str) -> Run:
    """Seconds that a statement takes in a fresh interpreter that has imported torch and tensordict.

    Whole processes spend seconds on those two, and a busy machine moves that by more than what is looked for.
    """
    code = f"{BASE}\nimport time\nstarted = time.perf_counter()\n{statement}\nprint(time.perf_counter() - started)"

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return float(done.stdout)

    return run


def nothing() -> float:
    """What no statement takes."""
    return 0.0


def imports() -> Mapping[str, Run]:
    return {"import bnsharp": after_base("import bnsharp"), "nothing": nothing}


def names() -> Mapping[str, Run]:
    return {"main names of bnsharp": after_base(MAIN), "nothing": nothing}


def help_text() -> Mapping[str, Run]:
    smallest = Path(__file__).with_name("two_commands.py")
    return {"bnsharp --help": process("-m", "bnsharp.cli", "--help"), "two commands": process(str(smallest), "--help")}


CASES = (
    Case("import bnsharp, beyond torch and tensordict", imports, 0.3, memory=False,
         quantity=STATED, comparison=EXCESS),
    Case("import of bnsharp's main names, beyond torch and tensordict", names, 0.3, memory=False,
         quantity=STATED, comparison=EXCESS),
    Case("bnsharp --help, beyond a two-command Typer program", help_text, 0.2, 15, memory=False, comparison=EXCESS),
)
