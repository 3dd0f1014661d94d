"""A sum over ranks and a copy to all ranks: each is the other's derivative, to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sum(torch.autograd.Function):
    """``x_r ↦ Σ_r x_r``. Elementwise, so that ``vmap`` has nothing to do."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ranks: Any, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ranks.reduce(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Any:
        return (None, *Spread.apply(ctx.ranks, *d))  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Any, *x: Tensor) -> Any:
        return Sum.apply(ranks, *x), in_dims[1:]  # type: ignore[no-untyped-call]


class Spread(torch.autograd.Function):
    """``x ↦ x`` on every rank: one value becomes many, so that gradients add up."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ranks: Any, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Any:
        return (None, *Sum.apply(ctx.ranks, *d))  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Any, *x: Tensor) -> Any:
        return Spread.apply(ranks, *x), in_dims[1:]  # type: ignore[no-untyped-call]
