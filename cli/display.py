"""Progress and tables: live on a terminal, a plain log elsewhere. The only place that draws on the screen."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LOG_EVERY = 10.0
"""Seconds between two lines of a plain log."""


WIDE = 130
"""Columns where the output is no terminal and nothing says how wide it is."""


def console() -> Console:
    """Standard output."""
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else WIDE
    return Console(soft_wrap=not is_terminal, width=width)


class Bar:
    """A progress bar: ``start(total)`` sets the clock, ``advance(n)`` moves it, ``note(text)`` stands beside it."""

    def __init__(self, start: Callable[[int], None], advance: Callable[[int], None], note: Callable[[str], None]):
        self.start, self.advance, self.note = start, advance, note


@contextmanager
def progress(label: str, total: int, unit: str = "steps") -> Iterator[Bar]:
    """A bar with ETA on standard error; every ten seconds a line where that is no terminal."""
    err = Console(stderr=True)
    if not err.is_terminal:
        log = _PlainLog(label, total, unit)
        try:
            yield Bar(log.start, log.advance, log.set_note)
        finally:
            log.close()
        return
    bar, handle = _bar(label, total, unit, err)
    with bar:
        yield handle


def _bar(label: str, total: int, unit: str, err: Console) -> tuple[Progress, Bar]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
        TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=err, transient=True)
    task = bar.add_task(escape(label), total=total or None, note="")
    return bar, Bar(
        lambda n: bar.reset(task, total=n or None),
        lambda n: bar.advance(task, n),
        lambda text: bar.update(task, note=escape(text)),
    )


class Dashboard:
    """A training run on the screen: its bar, and below it the numbers of the last finished epoch."""

    def __init__(self, bar: Bar, show: Callable[[Mapping[str, str]], None]):
        self.bar, self.show = bar, show


@contextmanager
def dashboard(label: str, total: int = 0) -> Iterator[Dashboard]:
    """Live on a terminal, with ETA; elsewhere a line at most every ten seconds that ends with the numbers."""
    err = Console(stderr=True)
    if not err.is_terminal:
        with progress(label, total) as bar:
            yield Dashboard(bar, lambda numbers: bar.note(", ".join(f"{k} {v}" for k, v in numbers.items())))
        return
    drawn, bar = _bar(label, total, "steps", err)
    with Live(Group(drawn), console=err, transient=True, refresh_per_second=8) as live:

        def show(numbers: Mapping[str, str]) -> None:
            cells = [Text.assemble((f"{k} ", "dim"), v) for k, v in numbers.items()]
            live.update(Group(drawn, Columns(cells, padding=(0, 3))))

        yield Dashboard(bar, show)


class _PlainLog:
    """Lines instead of a bar: at most one every ten seconds, and a last one where it took two seconds or more.

    Nothing is said of what was not begun: what went wrong before stands alone on its line.
    """

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.unit, self.note = label, unit, ""
        self.start(total)

    def start(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, -1
        self.started = self.next = time.monotonic()
        self.next += LOG_EVERY

    def set_note(self, text: str) -> None:
        self.note = text

    def advance(self, n: int) -> None:
        self.done += n
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + LOG_EVERY
            self.show()

    def show(self) -> None:
        elapsed = time.monotonic() - self.started
        left = elapsed * (self.total - self.done) / self.done if 0 < self.done < self.total else 0.0
        eta = f", eta {left:.0f} s" if left else ""
        of = f"/{self.total}" if self.total >= max(1, self.done) else ""
        line = f"{self.label}: {self.done}{of} {self.unit}, {elapsed:.0f} s{eta} {self.note}".rstrip()
        print(line, file=sys.stderr, flush=True)
        self.shown = self.done

    def close(self) -> None:
        if self.done and time.monotonic() - self.started >= 2 and self.shown != self.done:
            self.show()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = True) -> Table:
    """A rich table: the first column left, the others right unless told otherwise."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if right and i else "left", overflow="fold", no_wrap=not i)
    for row in rows:
        made.add_row(*row)
    return made


GAP = 3
"""What :func:`table` puts between two columns."""


def fitted(width: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | Group:
    """A table for a screen of ``width`` columns; one that is too wide goes on below, its first column repeated.

    Titles of columns are broken between words, and cells not at all.
    """
    wide = [max(cell_len(part) for part in (*name.split(), "", *(line for row in rows for line in row[i].split("\n"))))
            for i, name in enumerate(columns)]
    parts: list[list[int]] = [[]]
    for i in range(1, len(columns)):
        if parts[-1] and sum(wide[j] + GAP for j in (0, *parts[-1], i)) > width:
            parts.append([])
        parts[-1].append(i)
    made = [
        table(title if not k else "", [columns[i] for i in (0, *part)], [[row[i] for i in (0, *part)] for row in rows])
        for k, part in enumerate(parts)
    ]
    endless = Console(width=10_000)
    if Measurement.get(endless, endless.options, made[0]).maximum > width or len(made) > 1:
        for each, part in zip(made, parts, strict=True):
            for column, i in zip(each.columns, (0, *part), strict=True):
                column.width = wide[i]
    return made[0] if len(made) == 1 else Group(*made)


def definitions(title: str, entries: Sequence[tuple[str, str, str, str]]) -> Table:
    """A titled list of names, each with what it is, its options and its source below one another."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column()
    for name, summary, options, source in entries:
        rest = [f"options: {options}" if options else "", f"source: {source}" if source not in ("", "-") else ""]
        made.add_row(name, "\n".join([summary, *(f"[dim]{escape(r)}[/dim]" for r in rest if r)]))
    return made


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table: fixed where that reads well, else scientific; ``–`` for none."""
    if value is None or value != value:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}"
    return f"{value:.{max(1, digits - 2)}e}"


def with_interval(mean: float, half: float, digits: int = 4) -> str:
    """``mean ± half``, the half width to two significant digits."""
    return number(mean, digits) if half != half else f"{number(mean, digits)} ± {number(half, 2)}"


def load_progress(bar_label: str) -> Callable[[int, int], None]:
    """A callback ``(done, total)`` that shows decoding on standard error when it takes long."""
    started = time.monotonic()
    state = {"next": started + 2.0}

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if now >= state["next"] or (done == total and now - started >= 2.0):
            state["next"] = now + 2.0
            eta = f", eta {(now - started) * (total - done) / done:.0f} s" if 0 < done < total else ""
            print(f"{bar_label}: {done}/{total}{eta}", file=sys.stderr, flush=True)

    return show
