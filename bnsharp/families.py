"""What an algorithm is to a trainer, and how algorithms are registered and found by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bnsharp.balls import Groups
from bnsharp.checks import suggest
from bnsharp.errors import InputError
from bnsharp.penalties import Regularizer, check_weight


@dataclass(frozen=True)
class Algorithm:
    """What a trainer needs of an algorithm.

    Attributes:
        name: as given.
        regularizer: ``epoch -> Regularizer`` (δ may grow).
        weight: ``epoch -> λ``.
        other_batches: fresh batches that the regulariser takes each step, beyond the loss's own.
        options: every option with its value, defaults included.
    """

    name: str
    regularizer: Callable[[int], Regularizer]
    weight: Callable[[int], float]
    other_batches: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Algorithms that share a builder.

    Attributes:
        pattern: matches their names; what its groups match is passed to the builder.
        build: ``(name, [groups,] *matched, **options) -> Algorithm``; its keyword-only arguments are the options.
        summary, source: one line each.
        needs_groups: whether it cannot do without the network's scale groups.
        refuses: option -> why this family cannot have it, where the reason is not plain.
        further: ``matched -> options`` beyond the builder's own; without arguments all that there can be.
    """

    pattern: str
    build: Callable[..., Algorithm]
    summary: str
    source: str
    needs_groups: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    further: Callable[..., dict[str, Any]] | None = None

    @property
    def takes_groups(self) -> bool:
        """Whether the builder has scale groups for an argument."""
        return "groups" in inspect.signature(self.build).parameters


FAMILIES: dict[str, Family] = {}
"""Every algorithm by the name of its family."""


def family(
    name: str, summary: str, source: str, *, pattern: str | None = None, refuses: Mapping[str, str] | None = None,
    needs_groups: bool | None = None, further: Callable[..., dict[str, Any]] | None = None,
) -> Callable[[Callable[..., Algorithm]], Callable[..., Algorithm]]:
    """Register a builder; the pattern is the name itself, and groups are needed where the builder takes them."""

    def register(build: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
        made = Family(pattern or re.escape(name), build, summary, source, refuses=refuses or {}, further=further)
        FAMILIES[name] = replace(made, needs_groups=made.takes_groups if needs_groups is None else needs_groups)
        return build

    return register


def always(name: str, regularizer: Regularizer, weight: float = 1.0, other_batches: int = 0) -> Algorithm:
    """The same regulariser and weight in every epoch.

    Raises:
        InputError: λ < 0 or not finite.
    """
    check_weight(weight)
    return Algorithm(name, lambda epoch: regularizer, lambda epoch: weight, other_batches)


def find(name: str) -> tuple[Family, tuple[str, ...]]:
    """The family of a name, and what is matched in it.

    Raises:
        InputError: an unknown name.
    """
    for known in FAMILIES.values():
        match = re.fullmatch(known.pattern, name)
        if match:
            return known, match.groups()
    raise InputError(
        f"unknown algorithm {name!r}; expected one of {', '.join(FAMILIES)} (N a number of search steps)"
        + suggest(name, FAMILIES)
    )


def own_options(family: Family) -> dict[str, Any]:
    """The options that every name of a family has, with their defaults."""
    parameters = inspect.signature(family.build).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def options_of(family: Family, *matched: str) -> dict[str, Any]:
    """The options of a family with their defaults; what some names of it have beyond, where ``matched`` says which."""
    return {**(family.further(*matched) if family.further is not None else {}), **own_options(family)}


def algorithm(name: str, groups: Groups | None = None, /, **options: Any) -> Algorithm:
    """The named algorithm with these options.

    Args:
        name: a key of :data:`FAMILIES`, with a number for N and a measure's name for MEASURE.
        groups: scale groups of the network, where the algorithm needs them.
        options: see :func:`options_of`.

    Raises:
        InputError: an unknown name or option, or an option out of range or that contradicts the algorithm.
    """
    chosen, matched = find(name)
    known = options_of(chosen, *matched)
    for key in options:
        if key in chosen.refuses:
            raise InputError(f"algorithm {name!r} with {key}={options[key]!r}: {chosen.refuses[key]}")
        if key not in known:
            raise InputError(
                f"algorithm {name!r} has no option {key!r}; expected one of {', '.join(known) or 'none'}"
                + suggest(key, known)
            )
    if chosen.needs_groups and groups is None:
        raise InputError(f"algorithm {name!r} needs the network's scale groups: pass bnsharp.scale_groups(module, x)")
    built = chosen.build(name, *((groups,) if chosen.takes_groups else ()), *matched, **options)
    return replace(built, options={**known, **options})
