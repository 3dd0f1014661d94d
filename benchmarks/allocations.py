"""Peak memory of a call: every allocation of PyTorch's allocators, those inside kernels among them.

On a CPU the profiler's record of allocations and releases is summed up in the order of time; on a GPU the caching
allocator keeps the peak itself. What was allocated before the call (network, batch) is not counted. Memory that a
kernel library takes past PyTorch's allocator (oneDNN's and MKL's scratch space) is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes held at the worst moment of ``run()`` beyond those held before it."""
    return ON[device.type](run, device)


def on_cpu(run: Callable[[], Any], device: torch.device) -> int:
    """From the profiler's allocation events."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with _quiet(), torch.profiler.profile(activities=[cpu], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return highest([(e.start_ns(), e.nbytes()) for e in events])


def highest(changes: list[tuple[int, int]]) -> int:
    """The largest sum of a prefix of ``(time, bytes)``, sorted by time alone; 0 where nothing was allocated."""
    held = top = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        top = max(top, held)
    return top


def on_cuda(run: Callable[[], Any], device: torch.device) -> int:
    """From the caching allocator."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


ON: dict[str, Callable[[Callable[[], Any], torch.device], int]] = {"cpu": on_cpu, "cuda": on_cuda}


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard error closed to the profiler's native code, which reports its start and stop there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
