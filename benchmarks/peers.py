"""What other packages offer too: SAM and ASAM steps of pytorch_optimizer, losses along a line of loss-landscapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import Case, Missing, Run, needing
from bnsharp.algorithms import algorithm
from bnsharp.models import build

POINTS = 32
"""Losses along a line."""
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
cross_entropy = nn.functional.cross_entropy
Batch = tuple[Tensor, Tensor]


def made(name: str, size: int, device: torch.device) -> tuple[nn.Module, Batch]:
    """A network in train mode and a random batch of 32×32 images."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)
    return build(name, (3, 32, 32), 10, seed=0).to(device).train(), (x.to(device), y.to(device))


def ours(module: nn.Module, batch: Batch, name: str, **options: Any) -> Run:
    """``bnsharp.backward`` and the optimizer's step."""
    groups = bnsharp.scale_groups(module, batch[0][:16])
    family = algorithm(name, groups, **options)
    regularizer, weight = family.regularizer(0), family.weight(0)
    optimizer, generator = torch.optim.SGD(module.parameters(), **SGD), torch.Generator().manual_seed(0)

    def run() -> None:
        optimizer.zero_grad()
        bnsharp.backward(module, cross_entropy, batch, regularizer, weight, generator=generator)
        optimizer.step()

    return run


def theirs(module: nn.Module, batch: Batch, **options: Any) -> Run:
    """pytorch_optimizer's SAM: two passes, the second at perturbed parameters."""
    from pytorch_optimizer import SAM

    optimizer = SAM(module.parameters(), torch.optim.SGD, **options, **SGD)
    x, y = batch

    def run() -> None:
        cross_entropy(module(x), y).backward()
        optimizer.first_step(zero_grad=True)
        cross_entropy(module(x), y).backward()
        optimizer.second_step(zero_grad=True)

    return run


def steps(name: str, size: int, ours_is: str, own: dict[str, Any], peer: dict[str, Any]) -> Callable[..., Any]:
    """One of our steps and theirs on equal networks."""

    def setup(device: torch.device) -> dict[str, Run | Missing]:
        module, batch = made(name, size, device)
        other = copy.deepcopy(module)
        return {
            "ours": ours(module, batch, ours_is, **own),
            "pytorch_optimizer": needing("pytorch_optimizer", lambda: theirs(other, batch, **peer)),
        }

    return setup


def along_a_line() -> Mapping[str, Run | Missing]:
    """Losses at 32 points of one filter-normalised random line, LeNet-BN in train mode, batch 512."""
    module, (x, y) = made("lenet-bn", 512, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():  # the package divides by norms, and fresh biases are zero
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    theta = bnsharp.parameters(module)
    objective = bnsharp.Objective(module, cross_entropy, (x, y))
    t = torch.linspace(0, 0.1, POINTS)

    def along() -> None:
        filters = {k: torch.randn(p.shape, generator=generator) for k, p in theta.items()}
        v = bnsharp.geometry.Groupwise(bnsharp.ScaleGroups({k: "row" for k in theta.keys()})).at(theta)
        with torch.no_grad():
            objective.along(theta, v.place(type(theta)(filters, batch_size=[])), t)

    def landscape() -> Run:
        import loss_landscapes
        from loss_landscapes.metrics import Loss

        metric = Loss(cross_entropy, x, y)
        return lambda: loss_landscapes.random_line(
            module, metric, distance=0.1, steps=POINTS, normalization="filter", deepcopy_model=True
        )

    return {"along": along, "loss-landscapes": needing("loss_landscapes", landscape)}


CASES = (
    Case("our SAM step / pytorch_optimizer's, LeNet-BN, batch 256",
         steps("lenet-bn", 256, "sam", {"rho": 0.05}, {"rho": 0.05}), 1.02, 21),
    Case("our ASAM step / pytorch_optimizer's, LeNet-BN, batch 256",
         steps("lenet-bn", 256, "asam", {"rho": 0.5}, {"rho": 0.5, "adaptive": True}), 1.02, 21),
    Case("our SAM step / pytorch_optimizer's, ResNet18, batch 32",
         steps("resnet18", 32, "sam", {"rho": 0.05}, {"rho": 0.05}), 1.02, 7),
    Case("32 losses along a random line / loss-landscapes, LeNet-BN, batch 512", along_a_line, None, 5),
)
