"""Processes of tests that end in time: what outlives its test is killed, with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def process(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, both outputs as text; killed after the context."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(list(map(str, command)), **{**given, **options}) as started:
        try:
            yield started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def done(command: Sequence[str | Path], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself, within so many seconds."""
    with process(command, **options) as started:
        out, err = started.communicate(timeout=seconds)
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """:class:`TimeoutError` in the main thread after so many seconds, and again each second until the context ends."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
