"""Named training algorithms: a regulariser per epoch, a weight per epoch, and whether it takes a batch of its own.

``algorithm("sgds-5", groups, delta=0.05)`` gives a value that the trainer runs without knowing its name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bnsharp.checks import flag, positive, suggest
from bnsharp.directions import Ascend
from bnsharp.errors import InputError
from bnsharp.geometry import Groups, Groupwise
from bnsharp.laws import Uniform
from bnsharp.measures import Measure
from bnsharp.profiles import Line
from bnsharp.reduce import Maximum
from bnsharp.regularizers import Penalty, Plain, Regularizer, check_weight, sam


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
    """Algorithms that share a builder; ``pattern`` matches their names, its numbers are passed to the builder."""

    pattern: str
    build: Callable[..., Algorithm]
    summary: str
    source: str
    needs_groups: bool = True


def sgd(name: str) -> Algorithm:
    return Algorithm(name, lambda epoch: Plain(), lambda epoch: 1.0)


def sharpness_aware(name: str, *, rho: float = 0.05, weight: float = 1.0) -> Algorithm:
    check_weight(weight)
    regularizer = sam(rho=rho)
    return Algorithm(name, lambda epoch: regularizer, lambda epoch: weight)


def sgds(
    name: str,
    groups: Groups,
    steps: int,
    *,
    delta: float = 0.08,
    delta_growth: float = 1.0,
    p: float = 2.0,
    weight: float | None = None,
    weight_growth: float = 1.0,
    gradient: str = "two-point",
    clip: float | None = None,
    rest: str = "tensor",
    rule: str = "alternate",
    coordinates: str = "unit",
    nodes: int = 8,
    independent_batch: bool = False,
) -> Algorithm:
    """SGD with BN-Sharpness; ``weight=None`` is ``λ = (p+1)^{1/p}``, at which c = λκ = 1."""
    positive("delta", delta)
    flag("independent_batch", independent_batch)
    for label, growth in (("delta_growth", delta_growth), ("weight_growth", weight_growth)):
        positive(label, growth)

    def regularizer(epoch: int) -> Penalty:
        measure = Measure(
            Groupwise(groups, rest=rest), Ascend(steps, rule=rule, coordinates=coordinates),
            Line(Uniform(delta * delta_growth**epoch), p, nodes), Maximum(),
        )
        return Penalty(measure, gradient=gradient, clip=clip)

    regularizer(0)  # bad options are told before training starts
    base = (p + 1) ** (1 / p) if weight is None else weight
    check_weight(base)
    return Algorithm(name, regularizer, lambda epoch: base * weight_growth**epoch, int(independent_batch))


_PAPER: dict[str, Any] = {
    "clip": 0.1, "rest": "joint", "independent_batch": True, "rule": "riemannian",
}


def _preset(**defaults: Any) -> Callable[..., Algorithm]:
    """:func:`sgds` with other defaults, still open to options."""

    def build(name: str, groups: Groups, steps: int, **options: Any) -> Algorithm:
        return sgds(name, groups, steps, **{**defaults, **options})

    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(default=defaults.get(k, p.default)) for k, p in inspect.signature(sgds).parameters.items()]
    )
    return build


FAMILIES: dict[str, Family] = {
    "sgd": Family("sgd", sgd, "plain loss", "-", needs_groups=False),
    "sam": Family(
        "sam", sharpness_aware, "sharpness-aware minimisation, radius rho", "Foret et al. 2021", needs_groups=False
    ),
    "sgds-N": Family(
        r"sgds-(\d+)", sgds,
        "BN-Sharpness, N search steps, c = λ(p+1)^(-1/p) = 1, no clip, the loss's own batch ('effective')",
        "Yi et al. 2019, algorithm 1",
    ),
    "sgds-N-paper-lambda": Family(
        r"sgds-(\d+)-paper-lambda", _preset(delta=1e-3, weight=1e-4, weight_growth=1.02, **_PAPER),
        "the paper's settings read as λ = 1e-4·1.02^epoch, δ = 1e-3, clip 0.1, independent batch",
        "Yi et al. 2019, section 5",
    ),
    "sgds-N-paper-delta": Family(
        r"sgds-(\d+)-paper-delta", _preset(delta=1e-4, delta_growth=1.02, weight=1.0, **_PAPER),
        "the paper's settings read as δ = 1e-4·1.02^epoch, λ = 1, clip 0.1, independent batch",
        "Yi et al. 2019, section 5",
    ),
}


def find(name: str) -> tuple[Family, tuple[int, ...]]:
    """The family of a name and the numbers in it.

    Raises:
        InputError: an unknown name.
    """
    for family in FAMILIES.values():
        match = re.fullmatch(family.pattern, name)
        if match:
            return family, tuple(int(g) for g in match.groups())
    raise InputError(
        f"unknown algorithm {name!r}; expected one of {', '.join(FAMILIES)} (N a number of search steps)"
        + suggest(name, FAMILIES)
    )


def options_of(family: Family) -> dict[str, Any]:
    """The options of a family with their defaults."""
    parameters = inspect.signature(family.build).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def algorithm(name: str, groups: Groups | None = None, /, **options: Any) -> Algorithm:
    """The named algorithm with these options.

    Args:
        name: ``"sgd"``, ``"sam"``, ``"sgds-N"``, ``"sgds-N-paper-lambda"``, ``"sgds-N-paper-delta"``.
        groups: scale groups of the network, where the algorithm needs them.
        options: see :func:`options_of`.

    Raises:
        InputError: an unknown name or option, or an option out of range.
    """
    family, numbers = find(name)
    known = options_of(family)
    for key in options:
        if key not in known:
            raise InputError(
                f"algorithm {name!r} has no option {key!r}; expected one of {', '.join(known) or 'none'}"
                + suggest(key, known)
            )
    if family.needs_groups and groups is None:
        raise InputError(f"algorithm {name!r} needs the network's scale groups: pass bnsharp.scale_groups(module, x)")
    arguments = (groups, *numbers) if family.needs_groups else numbers
    built = family.build(name, *arguments, **options)
    return Algorithm(built.name, built.regularizer, built.weight, built.other_batches, {**known, **options})
