"""Checks of a regulariser: ``check_regularizer(build, name=…, properties=…)`` gives named checks to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from bnsharp.checks import positive, whole
from bnsharp.groups import ScaleGroups
from bnsharp.testing.check import Check, choose, known_names
from bnsharp.testing.regularizer_rules import PROPERTIES, RULES, Declared, Penalised


def check_regularizer(
    build: Callable[[ScaleGroups], Any],
    *,
    name: str,
    properties: Collection[str] = (),
    penalised: Penalised | None = None,
    weight: float = 0.7,
    expected_failures: Mapping[str, str] | None = None,
    rtol: float = 1e-8,
    examples: int = 2,
) -> list[Check]:
    """Named checks of a regulariser: ``init`` and ``step``, see :mod:`bnsharp.regularizers`.

    Args:
        build: ``groups -> regulariser``; called anew for every network, and when a run is resumed.
        name: for messages and ids.
        properties: any of ``PROPERTIES``.
        penalised: ``(objective, params, held_at, generator) -> S``, the function whose gradient ``"exact"`` promises,
            at ``params``, with all that it holds fixed (directions, scales) computed at ``held_at``. None is the value
            reported by a step with the same seed.
        weight: λ of the steps; a smoothing that takes no weight but 1 passes 1.
        expected_failures: check name -> reason; such a check must fail.
        rtol: relative difference that counts as rounding.
        examples: Hypothesis examples per check.

    Raises:
        InputError: unknown names, an expected failure without a reason.
    """
    positive("weight", weight)
    positive("rtol", rtol)
    whole("examples", examples)
    known = known_names("property", properties, PROPERTIES)
    return choose(RULES, Declared(build, name, known, penalised, weight, rtol, examples), name, expected_failures)
