"""The rounding error of a value taken in low precision: its difference to float64 at a few directions.

float64 numbers take twice the memory, so that no parameters are copied into it: θ and v are held as they are and made
float64 tensor by tensor while a point is put together. A cast to float64 is exact, and the numbers are those of copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.choosing import is_out_of_memory
from bnsharp.evaluation import AbstractObjective
from bnsharp.geometry import Frame, Geometry
from bnsharp.profiles import Profile
from bnsharp.types import Params

CHECKED = 3
"""Directions at which a value in low precision is compared with float64."""
KEPT = 2**15
"""Numbers that a dictionary made on demand keeps: small tensors would take longer to make than to use."""
PRECISIONS = re.compile(r"\b(d?types?|float64|double)\b", re.IGNORECASE)
"""What PyTorch's errors about tensors of unequal or unknown precision say."""


class OnDemand(Mapping[str, Tensor]):
    """A parameter dictionary at one point whose tensors are made when they are asked for, and not held.

    The first ones are kept while they hold no more than ``KEPT`` numbers together.
    """

    batch_size = torch.Size()

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = tuple(names), make
        self._kept: dict[str, Tensor] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._make(name)
        if tensor.numel() <= self._room:
            self._kept[name] = tensor
            self._room -= tensor.numel()
        return tensor


def doubled(params: Params) -> Params:
    """A point in float64, on demand."""
    return cast(Params, OnDemand(params.keys(), lambda name: params[name].double()))


def placed(frame: Frame, u: Params) -> Params:
    """``v = s(θ) ⊙ u`` in float64 for one u in low precision: on demand where the geometry scales each coordinate."""
    if frame.linear is not None:
        return frame.place(P.pmap(Tensor.double, u))
    return cast(Params, OnDemand(u.keys(), lambda name: frame.place(P.make({name: u[name].double()}))[name]))


def rounding_error(
    values: Tensor, units: P.Lazy, profile: Profile, geometry: Geometry, objective: AbstractObjective, params: Params
) -> float | None:
    """``CHECKED`` times the largest difference of values to those in float64.

    None where the objective cannot be evaluated in float64 (a plain function that holds tensors of its own, a device
    without that precision); any other error is raised.

    Args:
        values: ``[n]``, of the profile in low precision.
        units: the n unit directions, in low precision.
        profile, geometry, objective: of the measure.
        params: θ in low precision.
    """
    theta = doubled(params)
    try:
        frame = geometry.at(theta)
        v = P.Lazy(len(units), lambda i: placed(frame, units[i]))
        exact = profile.evaluate(Anchor(objective, theta), v).values
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error) or not PRECISIONS.search(str(error)):
            raise
        return None
    difference = (values.double() - exact).abs().max()
    return CHECKED * float(difference) if bool(difference.isfinite()) else math.inf
