"""Points ``θ + t_k v_i`` made on demand: one at a time into memory that is reused, or several as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from bnsharp import params as P
from bnsharp.types import Params


class Grid(Sequence[Params]):
    """``θ + t_k v_i``, k fastest: n directions at K parameters t are ``nK`` points, never held at once.

    Args:
        params: θ.
        directions: v, a batch ``[n]`` or a sequence made on demand, of which one is held.
        t: ``[K]``, numbers or a tensor.
    """

    def __init__(self, params: Params, directions: Params | Sequence[Params], t: Sequence[float] | Tensor):
        self.params, self.directions, self.t = params, directions, t
        self._last: tuple[int, Params] | None = None

    def __len__(self) -> int:
        return P.count(self.directions) * len(self.t)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i, k = divmod(index % len(self), len(self.t))
        return P.shift(self.params, self.direction(i), self.t[k])

    def direction(self, i: int) -> Params:
        """``v_i``; the last one asked for is kept."""
        if self._last is None or self._last[0] != i:
            self._last = (i, P.pick(self.directions, i))
        return self._last[1]

    def write_(self, index: int, scratch: Params) -> Params:
        """Point ``index`` written into ``scratch``, which is returned; for use without gradients."""
        i, k = divmod(index, len(self.t))
        t, v = float(self.t[k]), self.direction(i)
        for name, p in self.params.items():
            torch.add(p, v[name], alpha=t, out=scratch[name])
        return scratch

    def stacked(self, indices: range) -> Params:
        """Points of consecutive indices as a batch: ``θ + t[:, None] v`` by broadcasting, nothing stacked but that."""
        pairs = [divmod(i, len(self.t)) for i in indices]
        first, last = pairs[0][0], pairs[-1][0]
        one = P.first(self.params)
        t = torch.stack([torch.as_tensor(self.t[k], dtype=one.dtype, device=one.device) for _, k in pairs])
        if first == last:
            v = P.batch(self.direction(first))
        else:
            rows = torch.tensor([i - first for i, _ in pairs], device=one.device)
            v = P.take(_several(self.directions, first, last + 1), rows)
        made = {
            k: torch.addcmul(p.unsqueeze(0), t.reshape(-1, *[1] * p.ndim), v[k]) for k, p in self.params.items()
        }
        return P.make(made, (len(pairs),))


def _several(source: Params | Sequence[Params], start: int, stop: int) -> Params:
    """Items of consecutive indices: views of a batch, a sequence's stacked."""
    if isinstance(source, Sequence):
        return P.stack([P.pick(source, i) for i in range(start, stop)])
    return P.make({k: v[start:stop] for k, v in source.items()}, (stop - start,))


def stacked(source: Params | Sequence[Params], indices: range) -> Params:
    """Points of consecutive indices as one batch; of a batch they are views."""
    if isinstance(source, Grid):
        return source.stacked(indices)
    return _several(source, indices.start, indices.stop)


class Points:
    """Points of a source one at a time.

    Args:
        source: a batch ``[n]`` or a sequence made on demand.
        reuse: whether those of a :class:`Grid` may share one memory, where no graph is made: a point is then valid
            until the next one is asked for.
    """

    def __init__(self, source: Params | Sequence[Params], reuse: bool = False):
        self.source = source
        self._like: Params | None = None
        shared = reuse and isinstance(source, Grid) and _can_share(source)
        self._scratch = P.pmap(torch.empty_like, source.params) if shared else None  # type: ignore[union-attr]

    @property
    def shared(self) -> bool:
        """Whether the next point overwrites the last one."""
        return self._scratch is not None

    @property
    def like(self) -> Params:
        """Parameters with the names, precision and device of the points."""
        if isinstance(self.source, Grid):
            return self.source.params
        if self._like is None:
            self._like = P.pmap(Tensor.detach, P.pick(self.source, 0))
        return self._like

    @property
    def transformed(self) -> bool:
        """Whether the points are under a transform of ``torch.func``."""
        return _wrapped(self.like) or (isinstance(self.source, Grid) and _wrapped(self.source.direction(0)))

    def __getitem__(self, index: int) -> Params:
        if self._scratch is not None:
            assert isinstance(self.source, Grid)
            return self.source.write_(index, self._scratch)
        point = P.pick(self.source, index)
        return point if isinstance(point, TensorDict) else P.make(point)  # one whose tensors are made on demand


def _wrapped(params: Params) -> bool:
    return any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in params.values())


def _can_share(source: Grid) -> bool:
    """Whether points may overwrite each other: no graph, no ``torch.func`` transform, one precision."""
    if torch.is_grad_enabled() or not len(source):
        return False
    v = source.direction(0)
    same = all(p.dtype == v[k].dtype and p.shape == v[k].shape for k, p in source.params.items())
    moved = isinstance(source.t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(source.t)
    return same and not (moved or _wrapped(v) or _wrapped(source.params))
