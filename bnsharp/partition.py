"""A partition of the parameters into groups, with its sums, dots, norms, sizes and counts.

One value serves every ball (the joint ball is one group) and every scale group (a filter is one group),
so that zero norms, blocks of rows and groups of several parameters are handled in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.types import Params


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
        return _joint(tuple(names))

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

    @cached_property
    def count(self) -> int:
        """``K``, the number of groups."""
        return sum(group.blocks for group in self.groups)

    @cached_property
    def _sizes(self) -> list[int]:
        return [group.blocks for group in self.groups]

    def _gather(self, x: Params, fold: Callable[[Tensor], Tensor], join: Callable[[Tensor], Tensor]) -> Tensor:
        """``fold`` over the coordinates of each member's parts, ``join`` over the members of a group: ``[*, K]``."""
        lead, values, out = x.batch_size, dict(x.items()), []
        for group in self.groups:
            parts = [fold(values[name].reshape(*lead, group.blocks, -1)) for name in group.members]
            out.append(parts[0] if len(parts) == 1 else join(torch.stack(parts)))
        return torch.cat(out, -1) if out else P.first(x).new_zeros(*lead, 0)

    def sums(self, x: Params) -> Tensor:
        """Sum over each group: ``[K]`` (``[n, K]`` for a batch), groups in order, blocks in order."""
        return self._gather(x, lambda v: v.sum(-1), lambda v: v.sum(0))

    def dots(self, x: Params, y: Params) -> Tensor:
        """``⟨x_i, y_i⟩`` per group: ``[*, K]``."""
        if not x.batch_size and not y.batch_size and P.is_plain(x.values(), y.values()):
            return self._plain_dots(dict(x.items()), dict(y.items()))
        return self.sums(P.pmap(lambda a, b: a * b, x, y))

    def _plain_dots(self, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
        """:meth:`dots` at one point without derivatives: no product is written out."""
        out = []
        for group in self.groups:
            pairs = [(x[name].reshape(group.blocks, -1), y[name].reshape(group.blocks, -1)) for name in group.members]
            parts = [torch.linalg.vecdot(a, b) for a, b in pairs]
            out.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        return torch.cat(out) if out else next(iter(x.values())).new_zeros(0)

    def norms(self, x: Params) -> Tensor:
        """``‖x_i‖`` per group, with zero gradient at zero: ``[*, K]``."""
        if x.batch_size in ((), (1,)) and self.groups and P.is_plain(x.values()):
            norms = self._plain_norms({k: v[0] for k, v in x.items()} if x.batch_size else dict(x.items()))
            return norms.unsqueeze(0) if x.batch_size else norms
        return self._gather(
            x, lambda v: torch.linalg.vector_norm(v, dim=-1), lambda v: torch.linalg.vector_norm(v, dim=0)
        )

    def _plain_norms(self, values: Mapping[str, Tensor]) -> Tensor:
        """:meth:`norms` at one point without derivatives: whole tensors share one operation."""
        if len(self.groups) == 1 and self.groups[0].blocks == 1:
            return P.total_norm([values[name] for name in self.groups[0].members]).unsqueeze(0)
        whole = [values[name] for group in self.groups if group.blocks == 1 for name in group.members]
        totals, done = torch.stack(torch._foreach_norm(whole)) if whole else None, 0
        out: list[Tensor] = []
        for is_whole, groups in self._runs:
            if is_whole and totals is not None:
                sizes = [len(group.members) for group in groups]
                own, done = totals[done : done + sum(sizes)], done + sum(sizes)
                if max(sizes) > 1:
                    own = torch.stack([torch.linalg.vector_norm(part) for part in own.split_with_sizes(sizes)])
                out.append(own)
                continue
            for group in groups:
                parts = [_block_norms(values[name], group.blocks) for name in group.members]
                out.append(parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0))
        return out[0] if len(out) == 1 else torch.cat(out)

    @cached_property
    def _runs(self) -> list[tuple[bool, list[Group]]]:
        """Stretches of groups whose members are whole tensors, or parts of them."""
        return [(is_whole, list(run)) for is_whole, run in groupby(self.groups, lambda group: group.blocks == 1)]

    def sizes(self, like: Params) -> Tensor:
        """``d_i``, the number of coordinates of each group: ``[K]``."""
        ones = P.make({k: v.new_ones(()).expand(_own_shape(like, k)) for k, v in like.items()})
        return self.sums(ones)

    def spread(self, values: Tensor, like: Params) -> Params:
        """Per-group values ``[*, K]`` as tensors that broadcast against each parameter (0 outside every group)."""
        lead, own = tuple(values.shape[:-1]), len(like.batch_size)
        shapes = {name: v.shape[own:] for name, v in like.items()}
        out: dict[str, Tensor] = {}
        parts = values.split_with_sizes(self._sizes, -1) if self.groups else ()
        for group, value in zip(self.groups, parts, strict=True):
            for name in group.members:
                shape, each = shapes[name], value
                if (group.blocks == 1 and shape and not lead) or (len(shape) == 1 and group.blocks in (1, shape[0])):
                    out[name] = each  # [1] broadcasts against any tensor
                    continue
                if shape and 1 < group.blocks < shape[0]:
                    each = value.repeat_interleave(shape[0] // group.blocks, dim=-1)
                out[name] = each.reshape((*lead, *(each.shape[-1:] if shape else ()), *[1] * (len(shape) - 1)))
        for name, shape in shapes.items():
            if name not in out:
                out[name] = values.new_zeros((*lead, *[1] * len(shape)))
        return P.make({name: out[name] for name in shapes}, lead)

    def scale(self, x: Params, values: Tensor) -> Params:
        """``values_i · x_i`` per group."""
        spread = self.spread(values, x)
        if P.is_plain(x.values(), spread.values()):
            return P.foreach(torch._foreach_mul, x, spread)
        return P.pmap(lambda a, s: a * s, x, spread)

    def moved(self, x: Params, values: Tensor, y: Params) -> Params:
        """``x_i + values_i · y_i`` per group; parameters in no group are unchanged."""
        spread = self.spread(values, x)
        if P.is_plain(x.values(), y.values(), spread.values()):
            return P.foreach(torch._foreach_addcmul, x, y, spread)
        return P.pmap(torch.addcmul, x, y, spread)

    def normalize(self, x: Params, norms: Tensor | None = None) -> Params:
        """``x_i / ‖x_i‖`` per group; groups of norm zero stay zero."""
        return self.scale(x, P.safe_reciprocal(self.norms(x) if norms is None else norms))

    def project(self, x: Params, away_from: Params) -> Params:
        """``x_i − ⟨x_i, y_i⟩ y_i / ‖y_i‖²`` per group; parameters in no group are unchanged."""
        ratio = P.safe_divide(self.dots(x, away_from), self.dots(away_from, away_from))
        return P.pmap(lambda a, r, y: a - r * y, x, self.spread(ratio, x), away_from)


@lru_cache(maxsize=64)
def _joint(names: tuple[str, ...]) -> Partition:
    return Partition((Group("joint", names, 1),))


def _own_shape(like: Params, name: str) -> torch.Size:
    return like[name].shape[len(like.batch_size) :]


def _block_norms(value: Tensor, blocks: int) -> Tensor:
    """Norms of equal parts along dimension 0: ``[blocks]``."""
    parts = value if value.ndim == 2 and len(value) == blocks else value.reshape(blocks, -1)
    return torch.linalg.vector_norm(parts, dim=-1)
