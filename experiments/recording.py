"""The numbers of a run's epochs as TensorBoard scalars, for those who ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnsharp.errors import InputError

FOLDER, PREFIX = "tensorboard", "events.out.tfevents."


class Scalars:
    """One scalar per numeric field of every epoch's record, at the epoch's number, in ``RUN/tensorboard``.

    The file is opened with the first record. TensorBoard is told to forget what an interrupted run wrote from that
    epoch on, so that a resumed run shows every epoch once.

    Raises:
        InputError: the package tensorboard is missing.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("tensorboard=true needs the package tensorboard; install bnsharp[tensorboard]") from error
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def write(self, run: Path, record: Mapping[str, Any]) -> None:
        """The scalars of one epoch, on disk at once."""
        if self._writer is None:
            self._writer = self._make(str(run / FOLDER), purge_step=record["epoch"])
        for name, value in record.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file, if one was opened."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def clear(run: Path) -> None:
    """Remove the scalars that another run has left in the folder."""
    for path in (run / FOLDER).glob(f"{PREFIX}*"):
        path.unlink()
