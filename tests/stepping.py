"""One step in a loop written by hand, with ``bnsharp.backward`` and without, and networks for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers import cross_entropy, examples, generic
from torch import Tensor, nn

import bnsharp
from bnsharp import params as P
from bnsharp.regularizers import Penalty
from bnsharp.types import Step


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grads(module: nn.Module) -> Tensor:
    """All gradients as one vector, zeros where there is none."""
    inner = P.unwrap(module)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in inner.parameters()])


def flat(params: Any) -> Tensor:
    return torch.cat([v.reshape(-1) for v in params.values()])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))


def wide_mlp(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 3),
    )
    return generic(net)


def by_row(delta: float = 0.05, steps: int = 1, gradient: str = "two-point") -> Penalty:
    groups = bnsharp.ScaleGroups({"0.weight": "row"})
    return Penalty(bnsharp.measures.bn_sharpness(groups, delta=delta, steps=steps, restarts=0, nodes=3), gradient)


def take(module: nn.Module, regularizer: Any, *, batch: Any = None, **options: Any) -> Step:
    """One call of ``backward`` under fixed seeds, on gradients that are None."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    batch = examples(64) if batch is None else batch
    return bnsharp.backward(module, cross_entropy, batch, regularizer, generator=seeded(), **options)


def plain_loop(module: nn.Module, batch: Any, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradients of the loop everyone writes."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    x, y = batch
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = cross_entropy(module(x), y)
    loss.backward()
    return loss.detach(), grads(module)


class Tied(nn.Module):
    """An embedding used twice, one layer that is never used, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unused, self.frozen = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(self.embed(tokens)))).mean(1)


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


def words() -> tuple[Tensor, Tensor]:
    generator = seeded(1)
    return torch.randint(11, (8, 5), generator=generator), torch.randint(11, (8,), generator=generator)


class BreaksAt(nn.Module):
    """A linear layer that gives an infinite output at one of its evaluations."""

    def __init__(self, at: int):
        super().__init__()
        self.layer, self.at, self.calls = nn.Linear(5, 3), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (float("inf") if self.calls == self.at else 1.0)
