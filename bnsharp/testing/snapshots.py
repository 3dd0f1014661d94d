"""What measuring must leave alone: snapshots of a network and of global random states, and how they differ."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnsharp.testing.networks import Network, network


def snapshot(module: nn.Module) -> dict[str, Any]:
    """What measuring must leave alone, by a name to tell."""
    kept: dict[str, Any] = {}
    for name, m in module.named_modules():
        kept[f"the mode of {name or 'the network'}"] = m.training
        for attribute in ("eps", "momentum", "track_running_stats"):
            if hasattr(m, attribute):
                kept[f"{attribute} of {name}"] = getattr(m, attribute)
    for name, p in module.named_parameters():
        kept[f"parameter {name}"] = p.detach().clone()
        kept[f"requires_grad of {name}"] = p.requires_grad
        kept[f"the gradient of {name}"] = None if p.grad is None else p.grad.clone()
    for name, b in module.named_buffers():
        kept[f"buffer {name}"] = b.clone()
    return kept


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two snapshots."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return [k for k in {**before, **after} if k not in before or k not in after or not same(before[k], after[k])]


def in_use(normalizer: str = "batch", seed: int = 0) -> Network:
    """A network in the middle of training: mixed modes, dropout, gradients, a frozen parameter."""
    net = network(normalizer, seed=seed, dropout=0.3, eps=1e-5)
    net.module.train()
    list(net.module.children())[1].eval()
    for k, (_, p) in enumerate(net.module.named_parameters()):
        p.grad = torch.full_like(p, 0.1 * k) if k % 2 else None
    list(net.module.parameters())[-1].requires_grad_(False)
    return net


def told(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def random_states() -> dict[str, Any]:
    """The global random states of torch, NumPy and Python."""
    state: Any = np.random.get_state()
    return {
        "torch's global random state": torch.get_rng_state(),
        "NumPy's global random state": torch.from_numpy(state[1].astype(np.int64)),
        "NumPy's position in its random state": state[2],
        "Python's global random state": random.getstate(),
    }
