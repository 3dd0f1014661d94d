"""Training steps: ours against bare loops and published optimizers, on the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import bnsharp
from benchmarks.paired import Case, Run
from bnsharp.algorithms import algorithm
from bnsharp.data import ImageData, load
from bnsharp.models import build

STEPS = 12
"""Training steps in one timed run."""
cross_entropy = nn.functional.cross_entropy
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def digits() -> ImageData:
    """The bundled digits: 800 training images."""
    return load("digits", seed=0)


def batches(data: ImageData, size: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The training set in full batches."""
    x, y = data.train_set()
    n = len(y) // size * size
    return list(zip(x[:n].split(size), y[:n].split(size), strict=True))[:STEPS]


def network(data: ImageData) -> nn.Module:
    """The BN perceptron of the demo."""
    return build("bn-mlp", data.input_shape, len(data.classes), seed=0).train()


def bare(module: nn.Module, data: ImageData) -> Run:
    """The loop that anyone would write, with loss and accuracy summed as the trainer does."""
    optimizer, parts = torch.optim.SGD(module.parameters(), **SGD), batches(data)

    def run() -> None:
        loss = correct = torch.zeros((), dtype=torch.float64)
        for x, y in parts:
            optimizer.zero_grad()
            output = module(x)
            value = cross_entropy(output, y)
            value.backward()
            optimizer.step()
            loss = loss + value.detach().double()
            correct = correct + (output.argmax(1) == y).double().mean()

    return run


def stepping(module: nn.Module, data: ImageData, name: str, **options: Any) -> Run:
    """``bnsharp.backward`` in a plain loop."""
    groups = bnsharp.scale_groups(module, data.train_set(16)[0])
    made = algorithm(name, groups, **options)
    regularizer, weight = made.regularizer(0), made.weight(0)
    optimizer, parts = torch.optim.SGD(module.parameters(), **SGD), batches(data)
    generator, state = torch.Generator().manual_seed(0), regularizer.init(bnsharp.parameters(module))

    def run() -> None:
        nonlocal state
        for batch in parts:
            optimizer.zero_grad()
            step = bnsharp.backward(
                module, cross_entropy, batch, regularizer, weight, generator=generator, state=state
            )
            optimizer.step()
            state = step.state

    return run


def trained(module: nn.Module, data: ImageData) -> Run:
    """One epoch of the trainer with plain SGD, nothing evaluated or written."""
    parts = batches(data)

    def run() -> None:
        bnsharp.Trainer(
            module, cross_entropy, lambda generator: iter(parts), optimizer=lambda p: torch.optim.SGD(p, **SGD)
        ).fit()

    return run


def peer(module: nn.Module, data: ImageData, name: str, **options: Any) -> Run:
    """An optimizer of pytorch_optimizer with two passes per step."""
    import pytorch_optimizer

    optimizer = getattr(pytorch_optimizer, name)(module.parameters(), torch.optim.SGD, **options, **SGD)
    parts = batches(data)

    def run() -> None:
        for x, y in parts:
            cross_entropy(module(x), y).backward()
            optimizer.first_step(zero_grad=True)
            cross_entropy(module(x), y).backward()
            optimizer.second_step(zero_grad=True)

    return run


def pair(ours: str, theirs: str, one: Callable[..., Run], other: Callable[..., Run]) -> Callable[[], Mapping[str, Run]]:
    """Two alternatives on equal networks."""

    def setup() -> dict[str, Run]:
        data = digits()
        module = network(data)
        return {ours: one(module, data), theirs: other(copy.deepcopy(module), data)}

    return setup


def algorithm_against_sgd(name: str, **options: Any) -> Callable[[], Mapping[str, Run]]:
    return pair(
        name, "our SGD step", lambda m, d: stepping(m, d, name, **options), lambda m, d: stepping(m, d, "sgd")
    )


CASES = (
    Case("trainer's SGD epoch / bare loop", pair("trainer", "bare loop", trained, bare), 1.03, 41),
    Case("SGDS-0, same batch / our SGD step", algorithm_against_sgd("sgds-0"), 2.05, 41, note="floor 2"),
    Case("SGDS-averaged / our SGD step", algorithm_against_sgd("sgds-averaged"), 1.10, 41, note="floor 1"),
    Case("SGDS-5, same batch / our SGD step", algorithm_against_sgd("sgds-5"), 7.2, 21, note="floor 7"),
    Case(
        "our SAM step / pytorch_optimizer's", pair(
            "ours", "pytorch_optimizer", lambda m, d: stepping(m, d, "sam", rho=0.05),
            lambda m, d: peer(m, d, "SAM", rho=0.05),
        ), 1.02, 41,
    ),
)
