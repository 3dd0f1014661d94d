"""Global random states — PyTorch's, Python's, NumPy's — kept, restored, and left alone.

Nothing here draws from them; random layers and data code that is not ours may.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """Every global random state as tensors and plain values: PyTorch's on the CPU and ``device``, Python's, NumPy's."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, torch.from_numpy(np.array(words, dtype=np.int64)), gauss],
        "numpy": [kind, torch.tensor(np.asarray(keys, dtype=np.int64)), *rest],
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """What :func:`capture` gave becomes the global random state again."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within the context, the global random states after it are those before it."""
    before = capture(device)
    try:
        yield
    finally:
        restore(before, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random states that start from ``seed``; the caller's come back after the context."""
    with undisturbed(device):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def stream(seed: int, *place: int) -> int:
    """A seed for one of many streams of one run: no two places share one."""
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=place)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
