"""How far a command is and how long it will take, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO


class Progress:
    """One line on a terminal, a line per piece of work elsewhere.

    Times that are expected beforehand are corrected by how long those that are done took instead.

    Args:
        expected: seconds of each piece of work, in their order.
        screen: where lines go; standard error by default.
    """

    def __init__(self, expected: Sequence[float], screen: TextIO | None = None):
        self.expected, self.screen = list(expected), sys.stderr if screen is None else screen
        self.index, self.started = -1, time.perf_counter()

    def start(self, name: str) -> None:
        """The next piece of work begins."""
        self.index += 1
        line = (f"{self.index + 1}/{len(self.expected)}, about {clock(self.left(time.perf_counter() - self.started))} "
                f"left: {name}")
        live = self.screen.isatty()
        print(f"\r\033[K{line[:100]}" if live else line, end="" if live else "\n", file=self.screen, flush=True)

    def clear(self) -> None:
        """The line makes room for what is printed next."""
        if self.screen.isatty():
            print("\r\033[K", end="", file=self.screen, flush=True)

    def left(self, spent: float) -> float:
        """Seconds expected from the present piece on, ``spent`` being those of all before it."""
        done, rest = sum(self.expected[: self.index]), sum(self.expected[self.index :])
        return rest * spent / done if done else rest


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
