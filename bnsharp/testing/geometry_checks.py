"""Checks of a geometry: ``check_geometry(build, name=…, ball=…, equivariant=…)`` gives named checks to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bnsharp.checks import flag, one_of, whole
from bnsharp.groups import ScaleGroups
from bnsharp.testing.check import Check, choose
from bnsharp.testing.geometry_rules import BALLS, RULES, Declared


def check_geometry(
    build: Callable[[ScaleGroups], Any],
    *,
    name: str,
    ball: str = "sphere",
    equivariant: bool = False,
    second_moment: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    examples: int = 3,
) -> list[Check]:
    """Named checks of a geometry (:class:`bnsharp.geometry.Geometry`, or anything with its methods).

    Args:
        build: ``groups -> geometry`` with ``place``, ``moving``, ``at`` (a frame: ``like``, ``place``, ``pull``,
            ``steepest``, ``uphill``) and a ``ball`` (``partition``, ``tangent``, ``retract``, ``back``, ``power``,
            ``coordinate_std``).
        name: for messages and ids.
        ball: ``"sphere"`` (``‖u_i‖ ≤ 1`` for each group of the ball's partition) or ``"box"`` (``|u_j| ≤ 1``).
        equivariant: whether ``place(u, T_a θ) = T_a place(u, θ)``, which makes a measure scale invariant.
        second_moment: of coordinate laws (Gaussian, Rademacher) on a sphere's groups: ``"coordinate"``
            (``E u_j² = 1``), ``"group"`` (``E ‖u_i‖² = 1``), or None, not checked.
        expected_failures: check name -> reason; such a check must fail.
        examples: Hypothesis examples per check.

    Raises:
        InputError: unknown names, an expected failure without a reason.
    """
    one_of("ball", ball, BALLS)
    flag("equivariant", equivariant)
    if second_moment is not None:
        one_of("second_moment", second_moment, ("coordinate", "group"))
    whole("examples", examples)
    declared = Declared(build, name, BALLS[ball], equivariant, second_moment, examples)
    return choose(RULES, declared, name, expected_failures)
