"""What one pass of a training step needs: masks drawn once, other parameters in a live module, scaled derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bnsharp.objective import differ, random_states, restore
from bnsharp.types import Params


class PassOverflow(ArithmeticError):
    """A pass of a step with a gradient scaler gave a loss or a gradient that is not finite."""


class Draws:
    """What random layers draw on one batch: noted at the first evaluation, the same at every later one."""

    def __init__(self) -> None:
        self._states: dict[torch.device, Tensor] | None = None
        self._parts: dict[int, list[Draws]] = {}

    def parts(self, n: int) -> list[Draws]:
        """Those of n chunks of the batch, the same for every objective on it."""
        return self._parts.setdefault(n, [Draws() for _ in range(n)])

    def begin(self, params: Mapping[str, Tensor] | Params) -> dict[torch.device, Tensor]:
        """An evaluation begins; what it returns is for :meth:`end`."""
        states = random_states(params) if self._states is None or self._states else {}
        if self._states:
            restore(self._states)
        return states

    def end(self, params: Mapping[str, Tensor] | Params, before: dict[torch.device, Tensor]) -> None:
        """In the end the global random state has moved on as after the first evaluation alone."""
        if self._states is None:
            # a pass that drew nothing needs no masks remade
            self._states = before if differ(before, random_states(params)) else {}
        else:
            restore(before)


def detached(output: Any) -> Any:
    """A module's output without its graph: tensors, pytrees and dataclasses of them."""
    if isinstance(output, Tensor):
        return output.detach()
    leaves, tree = tree_flatten(output)
    if len(leaves) == 1 and leaves[0] is output:
        if is_dataclass(output) and not isinstance(output, type):
            return replace(output, **{f.name: detached(getattr(output, f.name)) for f in fields(output) if f.init})
        return output
    return tree_unflatten([detached(leaf) for leaf in leaves], tree)


def joined(outputs: Sequence[Any]) -> Any:
    """The outputs of consecutive chunks of a batch as one: tensors, pytrees and dataclasses of them.

    Numbers (tensors without dimensions) are stacked, ``[chunks]``.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.ndim else torch.stack(list(outputs))
    leaves, tree = tree_flatten(first)
    if len(leaves) == 1 and leaves[0] is first:
        if is_dataclass(first) and not isinstance(first, type):
            names = [f.name for f in fields(first) if f.init]
            return replace(first, **{k: joined([getattr(o, k) for o in outputs]) for k in names})
        return first
    return tree_unflatten([joined(row) for row in zip(*(tree_flatten(o)[0] for o in outputs), strict=True)], tree)


def has_node(root: Any, name: str) -> bool:
    """Whether a graph has a node of this name."""
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == name:
            return True
        seen.add(node)
        left += [parent for parent, _ in node.next_functions]
    return False


def is_finite(values: Tensor | Params) -> bool:
    """Whether every number of a tensor or a parameter dictionary is finite."""
    tensors: list[Tensor] = [values] if isinstance(values, Tensor) else list(values.values())
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


class Scaled(torch.autograd.Function):
    """The loss itself, with a derivative ``scale`` times as large: small ones do not underflow in half precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, scale: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d * ctx.saved_tensors[0], None
