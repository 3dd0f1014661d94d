"""Checks of a measure: ``check_measure(build, name=…, invariant=…, properties=…)`` gives named checks to run.

    @pytest.mark.parametrize("check", check_measure(my_measure, name="mine", invariant={"scale"}), ids=str)
    def test_my_measure(check):
        check()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from bnsharp.checks import positive, whole
from bnsharp.errors import InputError
from bnsharp.groups import ScaleGroups
from bnsharp.measures import Measure
from bnsharp.testing.check import Check, choose, known_names
from bnsharp.testing.data_rules import DATA_RULES
from bnsharp.testing.measure_rules import RULES
from bnsharp.testing.measure_subject import PROPERTIES, ClosedForm, Declared, hold_unit, steepest_start
from bnsharp.testing.penalty_rules import PENALTY_RULES
from bnsharp.testing.strategies import FOUND_AS
from bnsharp.types import Params


def check_measure(
    build: Callable[[ScaleGroups], Any],
    *,
    name: str,
    invariant: Collection[str] = (),
    not_invariant: Collection[str] = (),
    properties: Collection[str] = (),
    closed_form: ClosedForm | None = None,
    powers: Callable[[ScaleGroups, float], Any] | None = None,
    hold: Callable[[Any, Params], Any] | None = None,
    start: Callable[[Any, Any, Params], Params] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    rtol: float = 1e-6,
    examples: int = 2,
) -> list[Check]:
    """Named checks of a measure, chosen by what it declares.

    Args:
        build: ``groups -> measure``; a measure is called as ``(objective, params, generator)`` and returns an object
            with ``.value``, and ``.stderr``, ``.error``, ``.unit``, ``.direction`` where it has them. With a method
            ``penalty`` (same arguments, a differentiable scalar) the penalty is checked too.
        name: for messages and ids.
        invariant: transformations that keep its value: ``"scale"``, ``"permutation"``, ``"relu"``. Under ``"scale"``
            the same seed must give the same value; under the others sampled values may differ by their errors.
        not_invariant: transformations under which the value changes somewhere, which is checked as well.
        properties: any of ``PROPERTIES``.
        closed_form: ``(A, b, theta, groups) -> value`` or ``(low, high)`` on ``L = ½θᵀAθ + bᵀθ``; coordinates in the
            order of ``theta``, the groups being the rows of its ``"weight"``.
        powers: ``(groups, p) -> measure``, a family that does not decrease in p ≥ 1.
        hold: ``(measure, unit) -> measure`` along this direction alone; known for a :class:`bnsharp.Measure`. Without
            it a searched penalty's gradient is compared with differences of the value searched again.
        start: ``(measure, objective, params) -> unit`` where the search starts; known for a :class:`bnsharp.Measure`.
        expected_failures: check name -> reason; such a check must fail.
        rtol: relative difference that counts as rounding.
        examples: Hypothesis examples per check.

    Returns:
        Checks; each is called without arguments and raises :class:`CheckFailed`, an ``AssertionError``.

    Raises:
        InputError: unknown names, a transformation declared both ways, an expected failure without a reason.
    """
    positive("rtol", rtol)
    whole("examples", examples)
    keeps = known_names("invariance", invariant, FOUND_AS)
    changes = known_names("invariance", not_invariant, FOUND_AS)
    if keeps & changes:
        raise InputError(f"{sorted(keeps & changes)} are in invariant and in not_invariant; expected one of them")
    probe = _probe(build)
    own = isinstance(probe, Measure)
    declared = Declared(
        build, name, keeps, changes, known_names("property", properties, PROPERTIES), closed_form, powers,
        hold or (hold_unit if own else None), start or (steepest_start if own else None),
        callable(getattr(probe, "penalty", None)), rtol, examples,
    )
    return choose((*RULES, *DATA_RULES, *PENALTY_RULES), declared, name, expected_failures)


def _probe(build: Callable[[ScaleGroups], Any]) -> Any:
    """A measure as built, to see what it offers; None if that fails, which every check then tells."""
    try:
        return build(ScaleGroups({"weight": "row"}))
    except Exception:
        return None
