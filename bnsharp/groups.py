"""Scale groups: which parts of the parameters a network does not change under ``θ_i ↦ a_i θ_i``, ``a_i > 0``.

They are found by behaviour, never by a layer's class or a parameter's name. On an invariant group Euler's identity
``⟨θ_i, ∂out/∂θ_i⟩ = 0`` holds at every θ: see :mod:`bnsharp.probing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.modes import probing
from bnsharp.partition import Group, Partition
from bnsharp.probing import Probe, find_groups, log_uniform
from bnsharp.types import Params

KINDS = ("row", "block", "tensor", "joint", "inert")
TOLERANCE = 1e-8
"""Largest relative error of Euler's identity and of a rescaled output that still counts as rounding."""



@dataclass(frozen=True, init=False)
class ScaleGroups:
    """Scale-invariant groups of parameters, and parameters without any effect (``"inert"``).

    By hand ``ScaleGroups({"w": "row", "v": ("block", 4), "u": "tensor", "b": "inert"})``, or from
    :class:`Group` values, which joint groups need: ``ScaleGroups([Group("joint", ("w", "b"), 1)])``. A row group
    given by hand has ``blocks = 0``, as many as the parameter has rows, until :meth:`resolve` sees parameters.

    Attributes:
        groups: the groups, disjoint.
        forwards: forward passes it took to find them (0 by hand).
        residual: largest relative change of the output when all groups were rescaled at once.

    Raises:
        InputError: unknown kind, blocks below 1, a parameter in two groups.
    """

    groups: tuple[Group, ...]
    forwards: int = field(default=0, compare=False)
    residual: float = field(default=0.0, compare=False)

    def __init__(
        self,
        groups: Mapping[str, str | tuple[str, int]] | Iterable[Group] = (),
        *,
        forwards: int = 0,
        residual: float = 0.0,
    ):
        made = [_by_hand(k, v) for k, v in groups.items()] if isinstance(groups, Mapping) else list(groups)
        seen: set[str] = set()
        for group in made:
            _check_group(group)
            for name in group.members:
                if name in seen:
                    raise InputError(f"parameter {name!r} is in two scale groups; expected one: give disjoint groups")
                seen.add(name)
        object.__setattr__(self, "groups", tuple(made))
        object.__setattr__(self, "forwards", forwards)
        object.__setattr__(self, "residual", residual)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def invariant(self) -> dict[str, str]:
        """Parameter → ``"row"``, ``"block"``, ``"tensor"``, ``"joint"`` or ``"inert"``; others are absent."""
        return {name: group.kind for group in self.groups for name in group.members}

    @property
    def partition(self) -> Partition:
        """The invariant groups, without inert parameters; rows given by hand have 0 blocks until resolved."""
        return Partition(tuple(g for g in self.groups if g.kind != "inert"))

    def resolve(self, params: Params) -> ScaleGroups:
        """The same groups with ``blocks`` of row groups filled in.

        Raises:
            InputError: a member is not among ``params``, or has no such rows or blocks.
        """
        shapes, made = _shapes(params), []
        for group in self.groups:
            if group.kind == "row" and group.members[0] in shapes:
                rows = _rows(shapes[group.members[0]])
                if group.blocks not in (0, rows):
                    raise InputError(
                        f"row group of {group.members[0]!r} has {group.blocks} rows, the parameter given has {rows}: "
                        "make the groups from the same module"
                    )
                group = replace(group, blocks=rows)
            made.append(group)
        Partition(tuple(made)).check(params)
        return self if tuple(made) == self.groups else ScaleGroups(made, forwards=self.forwards, residual=self.residual)

    def partition_with(self, params: Params, rest: str = "tensor") -> Partition:
        """A partition of all of ``params`` but inert ones: the groups, then the rest per tensor or as one group."""
        if rest not in ("tensor", "joint"):
            raise InputError(f"rest={rest!r}; expected 'tensor' (one group per tensor) or 'joint' (one group)")
        groups = self.resolve(params).partition.groups
        known = self.invariant
        others = [k for k in params.keys() if k not in known]
        if rest == "tensor":
            return Partition(groups + tuple(Group("rest", (k,), 1) for k in others))
        return Partition((*groups, Group("rest", tuple(others), 1)) if others else groups)

    def norms(self, params: Params) -> Params:
        """``‖θ_i‖`` of each parameter's group, in shapes that broadcast against the parameter."""
        partition = self.resolve(params).partition
        return _members(partition, params, partition.norms(params))

    def rescale(self, params: Params, factors: Mapping[str, Tensor | float] | Params) -> Params:
        """``T_a θ``: each parameter times its factor ``a``; parameters without a factor are unchanged.

        Raises:
            InputError: a factor's name is not among ``params``, or it does not broadcast, or is not in (0, ∞).
        """
        self.resolve(params)
        shapes = _shapes(params)
        lead = getattr(factors, "batch_size", torch.Size())
        made: dict[str, Tensor] = {}
        for name, value in factors.items():
            if name not in shapes:
                raise InputError(f"a factor is given for {name!r}, which is not among the parameters: check its name")
            factor = torch.as_tensor(value).to(params[name])
            own, shape = factor.shape[len(lead) :], shapes[name]
            if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)):
                raise InputError(
                    f"factor of {name!r} has shape {list(own)}; expected one that broadcasts against {list(shape)}"
                )
            if not bool((torch.isfinite(factor) & (factor > 0)).all()):
                raise InputError(f"factor of {name!r} is not finite and > 0; expected positive finite factors")
            made[name] = factor.reshape((*lead, *[1] * (len(shape) - len(own)), *own))
        wider = len(lead) > len(params.batch_size)
        others = {k: v.expand(*lead, *v.shape) if wider else v for k, v in params.items() if k not in made}
        scaled = {k: params[k] * factor for k, factor in made.items()} | others
        return P.make({k: scaled[k] for k in shapes}, lead if wider else params.batch_size)

    def random_factors(
        self, params: Params, generator: torch.Generator | None, low: float = 0.1, high: float = 10.0
    ) -> Params:
        """Log-uniform factors in [low, high], one per group (the same for all its members)."""
        if not (0 < low <= high < math.inf):
            raise InputError(f"low={low}, high={high}; expected 0 < low <= high < inf")
        generator = P.generator_for(params, generator, "random_factors")
        partition, first = self.resolve(params).partition, P.first(params)
        values = log_uniform(partition.count, generator, low, high).to(first)
        return _members(partition, params, values)


def scale_groups(module: nn.Module, x: Any, *, seed: int = 0, tolerance: float = TOLERANCE) -> ScaleGroups:
    """The scale groups of ``module``, found by how its output behaves on the inputs ``x``.

    In float64, with batch statistics and negligible ε, at two generic points (every parameter perturbed). Each
    parameter gets the first of these that holds at both points: inert (any value gives the same output), its rows,
    blocks of rows, the whole tensor; then pairs of remaining parameters of one layer, channel by channel, in blocks
    or whole. Parameters that do not require grad are constants. The module is left as it was.

    Args:
        module: any module that can run in float64.
        x: a tensor, a tuple (``module(*x)``) or a mapping (``module(**x)``); the first 16 examples are used.
        seed: of the points, the probe and the factors.
        tolerance: relative error that counts as rounding; raise it for a module that computes in float32 inside.

    Raises:
        InputError: fewer than 4 examples or all of them equal; no trainable parameter; a module that is random when
            measured, fails in float64, gives no floating tensor or none that depends on its parameters.
    """
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(f"tolerance={tolerance}; expected a finite tolerance > 0")
    P.live(module)
    module = P.unwrap(module)
    with probing(module):
        probe = Probe(module, x, seed)
        groups, residual = find_groups(probe, tolerance)
        return ScaleGroups(groups, forwards=probe.forwards, residual=residual)


# ---------------------------------------------------------------- helpers


def _by_hand(name: str, kind: str | tuple[str, int]) -> Group:
    if isinstance(kind, str) and kind in ("row", "tensor", "inert"):
        return Group(kind, (name,), 0 if kind == "row" else 1)
    if isinstance(kind, tuple | list) and len(kind) == 2 and kind[0] == "block":
        return Group("block", (name,), kind[1])
    raise InputError(
        f"scale group of {name!r} is {kind!r}; expected 'row', 'tensor', 'inert' or ('block', n): give groups of "
        "several parameters as ScaleGroups([Group('joint', (name, name), blocks)])"
    )


def _check_group(group: Any) -> None:
    if not isinstance(group, Group):
        raise InputError(f"expected Group values or a mapping from names to kinds, got {type(group).__name__}")
    what = f"{group.kind} group of {', '.join(map(repr, group.members)) or 'nothing'}"
    if group.kind not in KINDS:
        raise InputError(f"{what} is of an unknown kind; expected one of {', '.join(KINDS)}")
    if len(group.members) != 1 and (group.kind != "joint" or not group.members):
        raise InputError(f"{what} has {len(group.members)} members; expected one, or several in a joint group")
    if not isinstance(group.blocks, int) or group.blocks < (0 if group.kind == "row" else 1):
        raise InputError(f"{what} has blocks={group.blocks!r}; expected an integer >= 1")


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _shapes(params: Params) -> dict[str, torch.Size]:
    lead = len(params.batch_size)
    return {k: v.shape[lead:] for k, v in params.items()}


def _members(partition: Partition, params: Params, values: Tensor) -> Params:
    """Per-group values spread to the members of the groups only."""
    own = P.make({k: params[k] for g in partition for k in g.members}, params.batch_size)
    return partition.spread(values, own)


