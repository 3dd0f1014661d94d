"""Peak memory beyond network and batch: BN-Sharpness on 64 nodes against a plain training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import PEAK, Case, Run
from bnsharp.models import build

NODES = 32
"""On each half segment: 64 in all."""
cross_entropy = nn.functional.cross_entropy


def images(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images of 32×32 with random labels."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)
    return x.to(device), y.to(device)


def training(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Run:
    """Two steps of SGD with momentum: the second holds gradients, momentum and the graph at once."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)

    def run() -> None:
        optimizer.state.clear()
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()
        optimizer.zero_grad()

    return run


def measured(module: nn.Module, batch: tuple[Tensor, Tensor], engine: str, steps: int) -> Run:
    """BN-Sharpness with ``steps`` search steps: copied parameters, objective, search, value, its numerical error."""
    groups = bnsharp.scale_groups(module, batch[0][:16])
    measure = bnsharp.measures.bn_sharpness(groups, delta=0.01, p=2, steps=steps, nodes=NODES)

    def run() -> None:
        objective = bnsharp.Objective(module, cross_entropy, batch, engine=engine)
        measure(objective, bnsharp.parameters(module))

    return run


def against_training(name: str, size: int, steps: int = 0) -> Callable[..., Mapping[str, Run]]:
    """A measurement and a training step on equal networks and the same batch."""

    def setup(device: torch.device) -> dict[str, Run]:
        batch = images(size, device)
        first, second = (build(name, (3, 32, 32), 10, seed=0).to(device) for _ in range(2))
        return {"bn_sharpness": measured(first, batch, "loop", steps), "training step": training(second, batch)}

    return setup


CASES = tuple(
    Case(
        f"peak memory: BN-Sharpness, 64 nodes{f', {steps} search step' if steps else ''} / training step, {title}, "
        f"batch {size}",
        against_training(name, size, steps), 1.3, 1, memory=False, quantity=PEAK,
    )
    for name, title, size, steps in (
        ("lenet-bn", "LeNet-BN", 2048, 0), ("lenet-bn", "LeNet-BN", 2048, 1), ("resnet18", "ResNet18", 32, 0),
    )
)
