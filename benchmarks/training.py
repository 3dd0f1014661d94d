"""Training steps: ours against bare loops and published optimizers, on the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import Case, Missing, Run, needing
from bnsharp.algorithms import algorithm
from bnsharp.data import load
from bnsharp.models import build

cross_entropy = nn.functional.cross_entropy
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Setting:
    """A network and the batches of an epoch.

    Attributes:
        name: of the network, with its batch size.
        model: of :func:`bnsharp.models.build`.
        size: examples in a batch.
        steps: batches in an epoch, one timed run.
        digits: batches of the bundled digits; random 32×32 images otherwise.
        epochs: of one timed call of the trainer, made anew in each: what it costs to begin is in its time.
    """

    name: str
    model: str
    size: int
    steps: int
    digits: bool = False
    epochs: int = 5

    def batches(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        n = self.size * self.steps
        if self.digits:
            x, y = load("digits", seed=0).train_set()
            x, y = x[:n], y[:n]
        else:
            generator = torch.Generator().manual_seed(0)
            x, y = torch.randn(n, 3, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator)
        x, y = x.to(device), y.to(device)
        return list(zip(x.split(self.size), y.split(self.size), strict=True))

    def network(self, device: torch.device) -> nn.Module:
        shape = (1, 8, 8) if self.digits else (3, 32, 32)
        return build(self.model, shape, 10, seed=0).to(device).train()


MLP = Setting("bn-mlp, batch 64", "bn-mlp", 64, 12, digits=True)
LENET = Setting("LeNet-BN, batch 128", "lenet-bn", 128, 3)
WIDE = Setting("LeNet-BN, batch 1024", "lenet-bn", 1024, 1)
RESNET = Setting("ResNet18, batch 32", "resnet18", 32, 1, epochs=2)
VGG = Setting("VGG11-BN, batch 32", "vgg11-bn", 32, 1)


def bare(module: nn.Module, parts: list[tuple[Tensor, Tensor]], epochs: int = 1, **options: Any) -> Run:
    """The loop that anyone would write, with loss and accuracy summed as the trainer does."""
    optimizer, device = torch.optim.SGD(module.parameters(), **SGD, **options), parts[0][0].device

    def run() -> None:
        for _ in range(epochs):
            loss = correct = torch.zeros((), dtype=torch.float64, device=device)
            for x, y in parts:
                optimizer.zero_grad()
                output = module(x)
                value = cross_entropy(output, y)
                value.backward()
                optimizer.step()
                loss = loss + value.detach().double()
                correct = correct + (output.argmax(1) == y).double().mean()

    return run


def trained(module: nn.Module, parts: list[tuple[Tensor, Tensor]], epochs: int, **options: Any) -> Run:
    """Epochs of the trainer with plain SGD, nothing evaluated or written."""

    def run() -> None:
        bnsharp.Trainer(
            module, cross_entropy, lambda generator: iter(parts), epochs=epochs,
            optimizer=lambda p: torch.optim.SGD(p, **SGD, **options),
        ).fit()

    return run


def stepping(module: nn.Module, parts: list[tuple[Tensor, Tensor]], name: str, **options: Any) -> Run:
    """``bnsharp.backward`` in a plain loop."""
    groups = bnsharp.scale_groups(module, parts[0][0][:16])
    made = algorithm(name, groups, **options)
    regularizer, weight = made.regularizer(0), made.weight(0)
    optimizer = torch.optim.SGD(module.parameters(), **SGD)
    generator, state = torch.Generator(parts[0][0].device).manual_seed(0), regularizer.init(bnsharp.parameters(module))

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


def compiled(module: nn.Module, parts: list[tuple[Tensor, Tensor]], name: str, **options: Any) -> Run:
    """:func:`stepping` on a compiled module."""
    groups = bnsharp.scale_groups(module, parts[0][0][:16])
    made = algorithm(name, groups, **options)
    regularizer, weight = made.regularizer(0), made.weight(0)
    optimizer, fast = torch.optim.SGD(module.parameters(), **SGD), torch.compile(module)

    def run() -> None:
        for batch in parts:
            optimizer.zero_grad()
            bnsharp.backward(fast, cross_entropy, batch, regularizer, weight, state={})
            optimizer.step()

    return run


def peer(module: nn.Module, parts: list[tuple[Tensor, Tensor]], name: str, **options: Any) -> Run | Missing:
    """An optimizer of pytorch_optimizer with two passes per step."""

    def make() -> Run:
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, name)(module.parameters(), torch.optim.SGD, **options, **SGD)

        def run() -> None:
            for x, y in parts:
                cross_entropy(module(x), y).backward()
                optimizer.first_step(zero_grad=True)
                cross_entropy(module(x), y).backward()
                optimizer.second_step(zero_grad=True)

        return run

    return needing("pytorch_optimizer", make)


Alternative = Callable[[nn.Module, list[tuple[Tensor, Tensor]]], "Run | Missing"]


def side_by_side(
    setting: Setting, alternatives: Mapping[str, Alternative]
) -> Callable[..., Mapping[str, Run | Missing]]:
    """Alternatives on equal networks and the same batches."""

    def setup(device: torch.device) -> dict[str, Run | Missing]:
        parts, module = setting.batches(device), setting.network(device)
        return {name: make(copy.deepcopy(module), parts) for name, make in alternatives.items()}

    return setup


def epoch(setting: Setting, rounds: int, *others: dict[str, bool]) -> Case:
    """The trainer's epoch against a bare loop's; both with other options of the optimizer too."""
    made: dict[str, Alternative] = {}
    for options in ({}, *others):
        more = "".join(f", {name} SGD" for name in options)
        made[f"trainer{more}"] = partial(trained, epochs=setting.epochs, **options)
        made[f"bare loop{more}"] = partial(bare, epochs=setting.epochs, **options)
    return Case(f"trainer's SGD epoch / bare loop: {setting.name}", side_by_side(setting, made), 1.03, rounds,
                memory=False)


def against_sgd(name: str, setting: Setting, limit: float, floor: int, rounds: int, **options: Any) -> Case:
    """An algorithm's step against our SGD step."""
    return Case(
        f"{name.upper()}, same batch / our SGD step: {setting.name}",
        side_by_side(setting, {
            name: lambda m, parts: stepping(m, parts, name, **options),
            "our SGD step": lambda m, parts: stepping(m, parts, "sgd"),
        }),
        limit, rounds, note=f"floor {floor}", memory=False,
    )


def against_peer(setting: Setting, rounds: int, limit: float, ours: Callable[..., Run] = stepping,
                 word: str = "our") -> Case:
    """Our SAM step against that of pytorch_optimizer."""
    return Case(
        f"{word} SAM step / pytorch_optimizer's: {setting.name}",
        side_by_side(setting, {
            "ours": lambda m, parts: ours(m, parts, "sam", rho=0.05),
            "pytorch_optimizer": lambda m, parts: peer(m, parts, "SAM", rho=0.05),
        }),
        limit, rounds, memory=False,
    )


STEPS = {"sgds-0": (2.05, 2), "sgds-averaged": (1.10, 1), "sgds-5": (7.2, 7)}
"""Aims and floors, in gradients."""

CASES = (
    epoch(MLP, 21, {"fused": True}), epoch(LENET, 11, {"fused": True}), epoch(RESNET, 5),
    *(
        against_sgd(name, setting, limit, floor, rounds)
        for name, (limit, floor) in STEPS.items()
        for setting, rounds in ((MLP, 31), (LENET, 21), (WIDE, 11), (RESNET, 5))
        if not (name == "sgds-5" and setting is RESNET)
    ),
    against_sgd("sgds-0", VGG, 2.05, 2, 5),
    *(against_peer(setting, rounds, 1.02) for setting, rounds in ((MLP, 31), (LENET, 21), (WIDE, 11))),
    *(against_peer(setting, rounds, 0.8, compiled, "our compiled") for setting, rounds in ((MLP, 21), (LENET, 11))),
)
