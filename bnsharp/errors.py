"""The errors that users meet. Importing this imports nothing else."""

from __future__ import annotations


class InputError(ValueError):
    """Bad usage: the message says in one line what was given, what was expected and what to do."""


class DivergedError(RuntimeError):
    """Training met a non-finite loss or gradient; the message says at which epoch and step."""


class NotFiniteError(InputError):
    """A loss that is not finite at a perturbed point."""
