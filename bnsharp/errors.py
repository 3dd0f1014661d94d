"""The errors that users meet. Importing this imports nothing else."""

from __future__ import annotations


class InputError(ValueError):
    """Bad usage: the message says in one line what was given, what was expected and what to do."""


class DivergedError(RuntimeError):
    """Training met a non-finite loss or gradient; the message says at which epoch and step."""


class NotFiniteError(InputError):
    """A loss that is not finite at a perturbed point."""


class NotDifferentiableError(InputError):
    """A layer whose derivatives of the order that is needed autograd does not have."""


class StorageError(RuntimeError):
    """A run's file that could not be written, as on a full disk; the message says which, and what is kept."""


class DataError(RuntimeError):
    """Batches stopped coming, as when a data worker was killed; the message says where, and what is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (SIGINT) while training, after the step under way was finished; the message says where, what is kept."""

    code = 130


class Terminated(SystemExit):
    """SIGTERM while training, after the step under way was finished; the message says where, what is kept."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = 143


class Notice(UserWarning):
    """What a user should know and nobody has to act on, in one line: a damaged file that was not needed, say."""


class RankLostError(RuntimeError):
    """One of several processes died or drifted from the others; the message says what is kept."""
