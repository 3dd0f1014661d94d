"""What ends a run from outside: SIGINT (Ctrl-C) and SIGTERM, kept until the run can stop; data workers that die."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from bnsharp.errors import Interrupted, Terminated

_ASKING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within this context SIGINT and SIGTERM are noted in :attr:`signal` instead of ending the process.

    A second SIGINT raises :class:`KeyboardInterrupt` at once; SIGTERM outweighs SIGINT. Handlers are the process's own:
    outside the main thread nothing is installed, a signal that is ignored stays ignored, and a forked child (a data
    worker) gets the handlers that were there before. A signal that came too late to be acted on (:meth:`error`) is
    delivered again after the context.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()
        self._acted = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:  # None: not installed from Python
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.signal is not None and kind is None and not self._acted:
            os.kill(os.getpid(), self.signal)

    def asked(self, gather: Callable[[float], list[float]]) -> bool:
        """Whether a signal has come, here or on another rank (``gather`` tells): it is then this one's too."""
        self.signal = int(max(gather(float(self.signal or 0)))) or None  # SIGTERM is the larger number
        return self.signal is not None

    def ignore_children(self) -> None:
        """Until the end of the context nobody hears of ended children (SIGCHLD): they are being cleaned up."""
        number = getattr(signal, "SIGCHLD", None)
        if number is not None and self._before and number not in self._before:
            before = signal.signal(number, lambda *arguments: None)
            self._before[number] = signal.SIG_DFL if before is None else before

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
        self._acted = True
        return Terminated(message) if self.signal == signal.SIGTERM else Interrupted(message)


def lost_worker(error: BaseException) -> bool:
    """Whether an error says that a worker of a :class:`torch.utils.data.DataLoader` died (PyTorch has no class for it).

    An error of the data set inside a worker is its own, not this.
    """
    if isinstance(error, RuntimeError) and str(error).startswith(("DataLoader worker", "DataLoader timed out")):
        return True
    # its connection broke while a batch was being received
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "_try_get_data" and "torch" in code.co_filename for code in frames)


def release(error: BaseException | None) -> None:
    """Drop what the frames of an error and of those before it hold: iterators, and with them their workers."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
