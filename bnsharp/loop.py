"""A regularised backward pass in anyone's training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp.evaluation import Engine
from bnsharp.objective import TrainingObjective
from bnsharp.regularizers import Regularizer
from bnsharp.types import State, Step


def backward(
    module: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any],
    regularizer: Regularizer,
    weight: float = 1.0,
    *,
    other_batches: Sequence[tuple[Any, Any]] = (),
    generator: torch.Generator | None = None,
    state: State | None = None,
    scale: float = 1.0,
    engine: Engine | str = "loop",
) -> Step:
    """What ``loss.backward()`` does, for a regularised loss: add ``scale·gradient`` to every ``.grad``.

    Args:
        module: in the modes you train it in; its parameters are not moved.
        criterion: ``(output, y) -> scalar``, the mean over the batch.
        batch: ``(x, y)``, the loss's batch. Only its first evaluation updates running statistics, and random layers see
            one mask in every evaluation on it.
        regularizer: any :class:`bnsharp.regularizers.Regularizer`.
        weight: λ ≥ 0.
        other_batches: fresh batches for the regulariser; without one it uses ``batch``.
        generator: source of random directions; None seeds one from PyTorch's global generator.
        state: the state returned by the last step; None starts afresh.
        scale: factor on what is added (``1/k`` when accumulating over k micro-batches).
        engine: how several perturbed points of one step are evaluated.

    Returns:
        The step: loss, penalty, gradient, gradients evaluated, state, the module's output.
    """
    owned = P.trainable(module)
    params = P.make({name: parameter.detach() for name, parameter in owned})
    if generator is None:
        generator = P.seeded(int(torch.randint(2**62, ()).item()), P.first(params).device)
    first = TrainingObjective(module, criterion, batch, engine=engine)
    others = [
        TrainingObjective(module, criterion, b, update_statistics=False, engine=engine) for b in other_batches
    ]
    step = regularizer.step(
        [first, *others],
        params,
        weight=weight,
        state=regularizer.init(params) if state is None else state,
        generator=generator,
    )
    for name, parameter in owned:
        update = step.gradient[name] if scale == 1.0 else scale * step.gradient[name]
        if parameter.grad is None:
            parameter.grad = update.clone()
        else:
            parameter.grad.add_(update)
    return replace(step, output=first.output)
