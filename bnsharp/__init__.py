"""bnsharp: scale-invariant sharpness of neural-network minima, measured and regularised.

Names are imported when they are first used, so that ``import bnsharp`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnsharp import (
        algorithms,
        averages,
        composites,
        data,
        directions,
        distributed,
        geometry,
        laws,
        maps,
        measures,
        models,
        pacbayes,
        profiles,
        reduce,
        regularizers,
        schedules,
        spectrum,
        testing,
        together,
        transformations,
    )
    from bnsharp.errors import DivergedError, InputError
    from bnsharp.estimation import Measure, Sampling
    from bnsharp.evaluation import Engine
    from bnsharp.groups import ScaleGroups, scale_groups
    from bnsharp.loop import backward
    from bnsharp.modes import exact_norms
    from bnsharp.objective import Objective
    from bnsharp.params import parameters
    from bnsharp.partition import Group
    from bnsharp.trainer import Trainer
    from bnsharp.types import Estimate, Step

__version__ = "0.1.0"

_HOME = {
    "parameters": "params",
    "Objective": "objective",
    "Engine": "evaluation",
    "scale_groups": "groups",
    "ScaleGroups": "groups",
    "Group": "partition",
    "exact_norms": "modes",
    "Measure": "estimation",
    "Sampling": "estimation",
    "backward": "loop",
    "Trainer": "trainer",
    "DivergedError": "errors",
    "Estimate": "types",
    "InputError": "errors",
    "Step": "types",
}
_MODULES = (
    "algorithms", "averages", "composites", "data", "directions", "distributed", "geometry", "laws", "maps",
    "measures", "models", "pacbayes", "profiles", "reduce", "regularizers", "schedules", "spectrum", "testing",
    "together", "transformations",
)

__all__ = [
    "DivergedError", "Engine", "Estimate", "Group", "InputError", "Measure", "Objective", "Sampling", "ScaleGroups",
    "Step", "Trainer", "algorithms", "averages", "backward", "composites", "data", "directions", "distributed",
    "exact_norms", "geometry", "laws", "maps", "measures", "models", "pacbayes", "parameters", "profiles", "reduce",
    "regularizers", "scale_groups", "schedules", "spectrum", "testing", "together",
    "transformations",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"bnsharp.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"bnsharp.{name}")
    else:
        raise AttributeError(f"module 'bnsharp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
