"""Peak memory beyond network and batch: BN-Sharpness against a plain training step.

One loss is held at a time, so that the number of nodes is nothing to the peak: where a pass takes long there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import PEAK, Case, Run
from bnsharp.models import build

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


def measured(module: nn.Module, batch: tuple[Tensor, Tensor], engine: str, nodes: int, steps: int) -> Run:
    """BN-Sharpness with ``steps`` search steps: copied parameters, objective, search, value, its numerical error."""
    groups = bnsharp.scale_groups(module, batch[0][:16])
    measure = bnsharp.measures.bn_sharpness(groups, delta=0.01, p=2, steps=steps, nodes=nodes // 2)

    def run() -> None:
        objective = bnsharp.Objective(module, cross_entropy, batch, engine=engine)
        measure(objective, bnsharp.parameters(module))

    return run


def against_training(name: str, size: int, nodes: int, steps: int) -> Callable[..., Mapping[str, Run]]:
    """A measurement and a training step on equal networks and the same batch."""

    def setup(device: torch.device) -> dict[str, Run]:
        batch = images(size, device)
        first, second = (build(name, (3, 32, 32), 10, seed=0).to(device) for _ in range(2))
        return {"bn_sharpness": measured(first, batch, "loop", nodes, steps), "training step": training(second, batch)}

    return setup


CASES = tuple(
    Case(
        f"peak memory: BN-Sharpness, {nodes} nodes{f', {steps} search step' if steps else ''} / training step, "
        f"{title}, batch {size}",
        against_training(name, size, nodes, steps), 1.3, 1, memory=False, quantity=PEAK,
    )
    for name, title, size, nodes, steps in (
        ("lenet-bn", "LeNet-BN", 512, 64, 0), ("lenet-bn", "LeNet-BN", 2048, 8, 0),
        ("lenet-bn", "LeNet-BN", 2048, 8, 1), ("resnet18", "ResNet18", 32, 8, 0),
    )
)
