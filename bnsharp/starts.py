"""Starts: where a training step's search for the sharpest direction begins, and what it remembers of earlier steps.

A start is a frozen value with explicit state. ``slope(frame, anchor, state)`` is a covector in unit coordinates whose
steepest point ``argmax_{u ∈ ball} ⟨slope, u⟩`` starts the search, unless ``begin(frame, state)`` names the point;
``after(state, anchor, u)`` is the state for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.checks import at_least
from bnsharp.errors import InputError
from bnsharp.geometry import BoxBall, Frame
from bnsharp.types import Params, State


def packed(name: str, params: Params) -> State:
    """A parameter dictionary as entries ``name/KEY`` of a state."""
    return {f"{name}/{k}": v for k, v in params.items()}


def unpacked(state: State, name: str, like: Params) -> Params:
    """The parameter dictionary that :func:`packed` put there, in the precision of ``like``, whose keys it must have.

    Raises:
        InputError: a state of another regulariser, or of other parameters.
    """
    head = f"{name}/"
    found = {k.removeprefix(head): v for k, v in state.items() if k.startswith(head)}
    if not found:
        raise InputError(f"the state holds no {name!r}; expected the state of the last step, or of init(params)")
    shapes, expected = ({k: v.shape for k, v in x.items()} for x in (found, like))
    odd = sorted(k for k in {**shapes, **expected} if shapes.get(k) != expected.get(k))
    if odd:
        raise InputError(f"the state's {name!r} is of other parameters ({', '.join(odd[:3])} differ); expected that of "
                         "the same ones: after freezing or unfreezing begin afresh, with state=None")
    return P.make({k: found[k].to(v) for k, v in like.items()})


def counted(state: State, name: str = "steps") -> int:
    """A step counter of a state."""
    if name not in state:
        raise InputError(f"the state holds no {name!r}; expected the state of the last step, or of init(params)")
    return int(state[name])


def count(n: int) -> torch.Tensor:
    """A counter as a tensor; it stays on the CPU, where reading it waits for nothing."""
    return torch.tensor(n, dtype=torch.int64)


class Start(Protocol):
    """Where a search begins, see the module."""

    @property
    def moves(self) -> bool:
        """Whether the start itself follows θ; if not, only search steps change the direction."""
        ...

    def init(self, params: Params) -> State: ...

    def slope(self, frame: Frame, anchor: Anchor, state: State) -> Params: ...

    def begin(self, frame: Frame, state: State) -> Params | None: ...

    def after(self, state: State, anchor: Anchor, u: Params | None) -> State: ...


class FromSlope:
    """A start that is the steepest point of its slope."""

    def begin(self, frame: Frame, state: State) -> Params | None:
        return None


@dataclass(frozen=True)
class Steepest(FromSlope):
    """``∂L/∂u`` on the regulariser's batch: the gradient's direction (Yi et al. 2019, eq. 6). Remembers nothing."""

    moves: ClassVar[bool] = True

    def init(self, params: Params) -> State:
        return {}

    def slope(self, frame: Frame, anchor: Anchor, state: State) -> Params:
        return frame.pull(anchor.gradient)

    def after(self, state: State, anchor: Anchor, u: Params | None) -> State:
        return {}


@dataclass(frozen=True)
class Unusual(FromSlope):
    """``g − σ m``: what this batch's gradient has beyond the average m of past ones (FriendlySAM, Li et al. 2024).

    ``m ← λ m + (1−λ) g`` after each step, from ``m = g`` at the first, which itself uses g.

    Args:
        sigma: σ ≥ 0; 0 is :class:`Steepest`.
        decay: λ in [0, 1).
    """

    sigma: float = 1.0
    decay: float = 0.9
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("sigma", self.sigma, 0)
        fraction("decay", self.decay)

    def init(self, params: Params) -> State:
        return {"known": count(0), **packed("average", P.zeros_like(params))}

    def slope(self, frame: Frame, anchor: Anchor, state: State) -> Params:
        if not counted(state, "known"):
            return frame.pull(anchor.gradient)
        return frame.pull(P.combine(1.0, anchor.gradient, -self.sigma, unpacked(state, "average", anchor.params)))

    def after(self, state: State, anchor: Anchor, u: Params | None) -> State:
        if not counted(state, "known"):
            return {"known": count(1), **packed("average", P.pmap(torch.clone, anchor.gradient))}
        average = P.combine(self.decay, unpacked(state, "average", anchor.params), 1 - self.decay, anchor.gradient)
        return {"known": count(1), **packed("average", average)}


@dataclass(frozen=True)
class Warm:
    """The direction found at the last step, in unit coordinates; the gradient's at the first.

    Only search steps move it: with none it would stay for ever.
    """

    moves: ClassVar[bool] = False

    def init(self, params: Params) -> State:
        return {"known": count(0), **packed("direction", P.zeros_like(params))}

    def slope(self, frame: Frame, anchor: Anchor, state: State) -> Params:
        # on a product of spheres the steepest point for a unit direction is that direction
        return unpacked(state, "direction", frame.like) if counted(state, "known") else frame.pull(anchor.gradient)

    def begin(self, frame: Frame, state: State) -> Params | None:
        # in a box the steepest point of any slope is a corner
        inside = isinstance(frame.ball, BoxBall) and counted(state, "known")
        return unpacked(state, "direction", frame.like) if inside else None

    def after(self, state: State, anchor: Anchor, u: Params | None) -> State:
        return state if u is None else {"known": count(1), **packed("direction", u)}


def fraction(name: str, value: float) -> None:
    """Raise :class:`InputError` unless ``0 ≤ value < 1``."""
    at_least(name, value, 0)
    if value >= 1:
        raise InputError(f"{name}={value!r}; expected 0 <= {name} < 1")
