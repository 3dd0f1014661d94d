"""The training examples of a data set as an objective: what measures are taken on, and where groups are looked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnsharp.checks import whole
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.recipe import criterion
from bnsharp.objective import Objective

MEASURED_AT_ONCE = 2000
"""Examples in a batch when measuring, unless told otherwise: a small data set is one batch."""


def probe_batch(data: ImageData, n: int = 16) -> Tensor:
    """Inputs on which scale groups are looked for."""
    return data.train_set(min(n, len(data.train_labels)))[0]


@dataclass(frozen=True)
class Batches:
    """The first ``n`` training examples in consecutive batches, normalised one batch at a time; can be iterated again.

    A last batch of one example, which has no statistics of its own, joins the one before it.
    """

    data: ImageData
    n: int
    size: int

    def __len__(self) -> int:
        return len(self._bounds())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in self._bounds():
            yield self.data.normalize(self.data.train_images[start:stop]), self.data.train_labels[start:stop]

    def _bounds(self) -> list[tuple[int, int]]:
        starts = list(range(0, self.n, self.size))
        if len(starts) > 1 and self.n - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], self.n], strict=True))


def objective_of(
    module: nn.Module, data: ImageData, n: int | None = None, *, statistics: str = "batch",
    dtype: torch.dtype | None = None, batch_size: int | None = None, engine: str = "loop",
) -> Objective:
    """The loss on the first ``n`` training examples (all by default), in one batch or streamed in several.

    Raises:
        InputError: more examples than there are, or none.
    """
    total = len(data.train_labels)
    n = total if n is None else whole("examples", n)
    if n > total:
        raise InputError(f"examples={n}; {data.name} has {total} training examples: lower it")
    if batch_size is not None and n > whole("batch_size", batch_size, 2):
        return Objective(module, criterion, Batches(data, n, batch_size), statistics=statistics, engine=engine)
    x, y = data.train_set(n)
    return Objective(module, criterion, (x if dtype is None else x.to(dtype), y), statistics=statistics, engine=engine)
