"""Orders of examples: shuffled batches of indices, and permutations whose prefixes are stratified subsets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnsharp.checks import whole
from bnsharp.errors import InputError


def epoch_indices(n: int, batch_size: int, generator: torch.Generator, drop_last: bool = True) -> Iterator[Tensor]:
    """Batches of indices, int64 ``[batch_size]``, of one shuffled pass over ``n`` examples.

    The permutation is drawn at the call, on the generator's device. A last batch that is not full is dropped unless
    ``drop_last`` is false. Raises :class:`InputError` if ``batch_size`` exceeds ``n``.
    """
    if whole("batch_size", batch_size) > n:
        raise InputError(f"batch_size={batch_size} for {n} examples; expected at most {n}: lower batch_size")
    batches = torch.split(torch.randperm(n, generator=generator, device=generator.device), batch_size)
    return iter(batches[: n // batch_size] if drop_last else batches)


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation ``[N]`` whose every prefix holds the classes nearly in proportion.

    The i-th example (from 0, in random order) of a class of n_c comes at ``(i + 1/2) / n_c``, ties at random: the
    divisor method of Sainte-Laguë 1910. So a subset is a prefix, and a smaller subset is part of a larger one.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    labels = labels[shuffled]
    counts = torch.bincount(labels)
    grouped = labels.argsort(stable=True)
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[grouped] = (torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[grouped]]).double()
    return shuffled[((rank + 0.5) / counts[labels]).argsort(stable=True)]
