"""Checks of arguments, and what an error about an unknown name says: one wording everywhere."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any

from bnsharp.errors import InputError


def suggest(given: object, known: Iterable[str]) -> str:
    """``; did you mean …?`` for a near miss, else an empty string: the end of an error about an unknown name."""
    close = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(what: str, given: object, known: Iterable[str]) -> InputError:
    """``unknown WHAT GIVEN; expected one of …; did you mean …?``."""
    names = list(known)
    return InputError(f"unknown {what} {given!r}; expected one of {', '.join(names) or 'none'}{suggest(given, names)}")


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer of at least ``least``.

    Raises:
        InputError: anything else, bools and floats included.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name}={value!r}; expected a whole number of at least {least}")
    return number


def positive(name: str, value: Any) -> None:
    """Raise :class:`InputError` unless ``value`` is a finite number > 0."""
    if not (_is_number(value) and math.isfinite(value) and value > 0):
        raise InputError(f"{name}={value!r}; expected a finite {name} > 0")


def at_least(name: str, value: Any, least: float) -> None:
    """Raise :class:`InputError` unless ``value`` is a finite number ≥ ``least``."""
    if not (_is_number(value) and math.isfinite(value) and value >= least):
        raise InputError(f"{name}={value!r}; expected a finite {name} >= {least:g}")


def flag(name: str, value: Any) -> None:
    """Raise :class:`InputError` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}; expected true or false")


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise :class:`InputError` unless ``value`` is one of the known names."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{name}={value!r}; expected one of {', '.join(names)}{suggest(value, names)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
