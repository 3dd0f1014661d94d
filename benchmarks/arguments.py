"""What the commands of ``benchmarks`` have in common: their arguments, and one line for what cannot be used."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bnsharp.allocator import keep_freed_memory

OUT = Path("benchmarks") / "results"


class Parser(argparse.ArgumentParser):
    """One line for what cannot be used.

    Args:
        command: the module that is run.
        description: its docstring.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"python -m {command}", description=description, formatter_class=argparse.RawTextHelpFormatter
        )

    def error(self, message: str) -> Any:
        print(f"benchmarks: {message}", file=sys.stderr)
        sys.exit(2)


def measuring(command: str, description: str | None) -> Parser:
    """What every command that measures takes: the number of threads and the folder of results."""
    made = Parser(command, description)
    made.add_argument("--threads", type=positive, default=1, metavar="N", help="of PyTorch (default: 1)")
    made.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"results (default: {OUT})")
    return made


def timing(command: str, description: str | None, rounds: int) -> Parser:
    """The same with the number of rounds of every timing."""
    made = measuring(command, description)
    made.add_argument("--rounds", type=positive, default=rounds, metavar="N", help=f"of timing (default: {rounds})")
    return made


def settle(threads: int) -> None:
    """What every process that measures does first: so many threads, and freed memory is kept.

    Pages that the system clears anew in every pass took up to 40% of both sides' times, and more in one round than in
    another.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1 on")
    return int(text)


def duration(text: str) -> float:
    """A time of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected seconds from 0 on")
    return value


def available(text: str) -> torch.device:
    """A device that there is."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("'cuda' is not available here; expected cpu")
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected cpu or cuda")
    return torch.device(text)
