"""Batch normalization with the statistics of the whole batch, of which every rank holds a part.

``mean = Σ_r n_r mean_r / n`` and ``n·var = Σ_r n_r (var_r + (mean_r − mean)²)`` over parts of n_r values (Chan et al.
1983): one exchange per layer, on any device, differentiable twice. ``torch.nn.SyncBatchNorm`` refuses the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsharp.distributed import Ranks
from bnsharp.errors import InputError

_MISSING = object()


@contextmanager
def synchronised(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """While it lasts, PyTorch's batch normalizations in ``module`` use the statistics of all ranks' parts together.

    The modules, their parameters and names stay; only their ``forward`` is another one, and is put back.
    """
    if ranks.count == 1:
        yield
        return
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    saved = [(m, m.__dict__.get("forward", _MISSING)) for m in norms]
    try:
        for m in norms:
            m.__dict__["forward"] = partial(_forward, m, ranks)
        yield
    finally:
        for m, forward in saved:
            m.__dict__.pop("forward", None)
            if forward is not _MISSING:
                m.__dict__["forward"] = forward


def _forward(m: Any, ranks: Ranks, x: Tensor) -> Tensor:
    """``nn.BatchNorm*d.forward`` with global statistics; with running ones it is the class's own."""
    tracking = m.running_mean is not None and m.running_var is not None
    if not m.training and tracking:
        return type(m).forward(m, x)
    m._check_input_dim(x)
    full = x if x.dtype in (torch.float32, torch.float64) else x.float()
    mean, variance, count = _statistics(full, ranks)
    if m.training and m.track_running_stats:
        _track(m, mean, variance, count)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scale = torch.rsqrt(variance + m.eps)
    if m.weight is not None:
        scale = scale * m.weight
    y = (full - mean.reshape(shape)) * scale.reshape(shape)
    if m.bias is not None:
        y = y + m.bias.reshape(shape)
    return y.to(x.dtype)


def _statistics(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[C]``, biased variance ``[C]`` and number of values per channel, over all ranks."""
    dims = [0, *range(2, x.ndim)]
    n = x.numel() // x.shape[1]
    own_variance, own_mean = torch.var_mean(x, dims, correction=0)
    own = torch.stack([own_mean, own_variance, torch.full_like(own_mean, n)])
    rows = torch.stack([own if r == ranks.index else torch.zeros_like(own) for r in range(ranks.count)])
    means, variances, counts = ranks.pool(rows).unbind(1)  # [R, C]
    total = counts.sum(0)
    if n <= 1 and int(total[0]) <= 1:
        raise InputError(
            "batch statistics of one value per channel over all ranks; expected at least two: use a larger batch"
        )
    share = counts / total
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0), total


def _track(m: Any, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Running statistics move as in one process: the unbiased variance, a cumulative mean where momentum is None."""
    factor = 0.0 if m.momentum is None else m.momentum
    with torch.no_grad():
        if m.num_batches_tracked is not None:
            m.num_batches_tracked.add_(1)
            if m.momentum is None:
                factor = 1.0 / float(m.num_batches_tracked)
        for running, value in ((m.running_mean, mean), (m.running_var, variance * count / (count - 1))):
            if running is not None:
                running.mul_(1 - factor).add_(value.detach().to(running.dtype), alpha=factor)
