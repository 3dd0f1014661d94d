"""Convolutions in float64 on a CPU, a slice of the batch at a time.

PyTorch's float64 convolution there writes out the patches of the whole batch (``C·k²`` numbers for every output pixel)
before it multiplies: a LeNet on 2048 images takes a gibibyte where its float32 kernels take a tenth, and most of the
time goes to the system that hands out the pages. Every example's output is a function of that example alone, and is
computed alone: slices give the same numbers, to the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PATCHES = 2**23
"""Bytes of patches written out at once, about."""

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class Sliced(TorchFunctionMode):
    """Within it, convolutions of large float64 batches that nobody differentiates are computed slice by slice."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[Any], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in CONVOLUTIONS and len(args) >= 2 and not torch.is_grad_enabled():
            x, weight, *rest = args
            size = slice_size(x, weight)
            if size < len(x):
                return torch.cat([func(part, weight, *rest, **named) for part in x.split(size)])
        return func(*args, **named)


def slice_size(x: Tensor, weight: Tensor) -> int:
    """Examples whose patches take about ``PATCHES`` bytes, at least one per thread.

    Args:
        x: ``[n, C, …]``.
        weight: ``[C', C/groups, k, …]``.
    """
    if x.dtype != torch.float64 or x.device.type != "cpu" or x.ndim != weight.ndim:
        return len(x)  # another kernel, or no batch
    one = 8 * math.prod(x.shape[1:]) * math.prod(weight.shape[2:])  # an upper bound: strides make fewer patches
    return max(torch.get_num_threads(), PATCHES // max(one, 1))


def frugal(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context in which losses at parameters of this precision are evaluated."""
    return Sliced() if dtype == torch.float64 else nullcontext()
