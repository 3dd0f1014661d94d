"""Signals that ask a run to stop, kept until it can: SIGINT (Ctrl-C) and SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from bnsharp.errors import Interrupted, Terminated

_ASKING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within this context SIGINT and SIGTERM are noted in :attr:`signal` instead of ending the process.

    A second SIGINT raises :class:`KeyboardInterrupt` at once; SIGTERM outweighs SIGINT. Handlers are the process's own:
    outside the main thread nothing is installed, a signal that is ignored stays ignored, and a forked child (a data
    worker) gets the handlers that were there before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:  # None: not installed from Python
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        else:
            self.signal = number

    def error(self, message: str) -> Interrupted | Terminated:
        """What to raise once everything is kept: :class:`Interrupted`, or for SIGTERM :class:`Terminated`."""
        return Terminated(message) if self.signal == signal.SIGTERM else Interrupted(message)
