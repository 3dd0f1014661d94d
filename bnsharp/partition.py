"""A partition of the parameters into groups, with its sums, dots, norms, sizes and counts.

One value serves every ball (the joint ball is one group) and every scale group (a filter is one group),
so that zero norms, blocks of rows and groups of several parameters are handled in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.types import InputError, Params

Blocks = list[Tensor]
"""One tensor ``[blocks]`` (or ``[n, blocks]``) per group of a partition."""


@dataclass(frozen=True)
class Group:
    """Groups of one kind: each member is cut along dimension 0 into ``blocks`` equal parts.

    Part b of every member together is one group; ``blocks = 1`` takes the members whole.
    """

    kind: str
    members: tuple[str, ...]
    blocks: int


@dataclass(frozen=True)
class Partition:
    """Disjoint groups of parameters; parameters in no group have norm 0 and are never perturbed."""

    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @staticmethod
    def joint(names: Iterable[str]) -> Partition:
        """All parameters as one group."""
        return Partition((Group("joint", tuple(names), 1),))

    def check(self, like: Params) -> None:
        """Raise :class:`InputError` unless every group fits ``like``."""
        for group in self.groups:
            for name in group.members:
                if name not in like.keys():
                    raise InputError(
                        f"scale group names the parameter {name!r}, which is not among the "
                        f"{len(list(like.keys()))} parameters given: make the groups from the same module"
                    )
                rows = _own_shape(like, name)[:1] or (1,)
                if rows[0] % group.blocks:
                    raise InputError(
                        f"scale group cuts {name!r} with {rows[0]} rows into {group.blocks} blocks; "
                        "expected a divisor of the number of rows"
                    )

    def sums(self, x: Params) -> Blocks:
        """Sum over each group: ``[blocks]`` per entry (``[n, blocks]`` for a batch)."""
        lead = x.batch_size
        out = []
        for group in self.groups:
            parts = [x[name].reshape(*lead, group.blocks, -1).sum(-1) for name in group.members]
            out.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        return out

    def dots(self, x: Params, y: Params) -> Blocks:
        """``⟨x_i, y_i⟩`` per group."""
        return self.sums(P.pmap(lambda a, b: a * b, x, y))

    def norms(self, x: Params) -> Blocks:
        """``‖x_i‖`` per group, with zero gradient at zero."""
        lead = x.batch_size
        out = []
        for group in self.groups:
            parts = [
                torch.linalg.vector_norm(x[name].reshape(*lead, group.blocks, -1), dim=-1) for name in group.members
            ]
            out.append(parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0))
        return out

    def sizes(self, like: Params) -> list[int]:
        """``d_i``, the number of coordinates of one group, per entry."""
        return [
            sum(math.prod(_own_shape(like, name)) for name in group.members) // group.blocks
            for group in self.groups
        ]

    def spread(self, values: Sequence[Tensor], like: Params) -> Params:
        """Per-group values as tensors that broadcast against each parameter (0 outside every group)."""
        dims = values[0].ndim - 1 if values else 0
        lead = tuple(values[0].shape[:dims]) if values else ()
        out: dict[str, Tensor] = {}
        for group, value in zip(self.groups, values, strict=True):
            for name in group.members:
                shape = _own_shape(like, name)
                rows = shape[0] if shape else 1
                cut = 1 < group.blocks < rows
                each = value.repeat_interleave(rows // group.blocks, dim=-1) if cut else value
                out[name] = each.reshape((*lead, *(each.shape[dims:] if shape else ()), *[1] * (len(shape) - 1)))
        for name in like.keys():
            if name not in out:
                out[name] = like[name].new_zeros((*lead, *[1] * len(_own_shape(like, name))))
        return P.make({name: out[name] for name in like.keys()}, lead)

    def scale(self, x: Params, values: Sequence[Tensor]) -> Params:
        """``values_i · x_i`` per group."""
        return P.pmap(lambda a, s: a * s, x, self.spread(values, x))

    def normalize(self, x: Params) -> Params:
        """``x_i / ‖x_i‖`` per group; groups of norm zero stay zero."""
        return self.scale(x, [P.safe_reciprocal(n) for n in self.norms(x)])

    def project(self, x: Params, away_from: Params) -> Params:
        """``x_i − ⟨x_i, y_i⟩ y_i / ‖y_i‖²`` per group; parameters in no group are unchanged."""
        dots, squares = self.dots(x, away_from), self.dots(away_from, away_from)
        ratio = self.spread([P.safe_divide(d, s) for d, s in zip(dots, squares, strict=True)], x)
        return P.pmap(lambda a, r, y: a - r * y, x, ratio, away_from)


def map_blocks(fn: Callable[..., Tensor], *blocks: Blocks) -> Blocks:
    """Apply ``fn`` entry by entry."""
    return [fn(*parts) for parts in zip(*blocks, strict=True)]


def total(blocks: Blocks) -> Tensor:
    """Sum over all groups: ``[]`` or ``[n]``."""
    return torch.stack([b.sum(-1) for b in blocks]).sum(0) if blocks else torch.zeros(())


def _own_shape(like: Params, name: str) -> torch.Size:
    return like[name].shape[len(like.batch_size) :]
