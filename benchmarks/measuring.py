"""Losses at many points and BN-Sharpness: ours against the plain loop and against the passes they need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import Case, Run
from benchmarks.training import cross_entropy, digits, network
from bnsharp import params as P
from bnsharp.models import build

POINTS = 64


def plain_loop(module: nn.Module, x: Tensor, y: Tensor, points: P.Params) -> Run:
    """Parameters copied in, one loss after the other."""

    def run() -> None:
        with torch.no_grad():
            kept = {k: p.clone() for k, p in module.named_parameters()}
            for i in range(P.count(points)):
                for name, p in module.named_parameters():
                    p.copy_(points[name][i])
                cross_entropy(module(x), y)
            for name, p in module.named_parameters():
                p.copy_(kept[name])

    return run


def many() -> Mapping[str, Run]:
    """64 perturbations of the BN perceptron on 256 examples."""
    data = digits()
    module = network(data)
    x, y = data.train_set(256)
    theta = bnsharp.parameters(module)
    generator = torch.Generator().manual_seed(0)
    points = P.stack([
        P.pmap(lambda p: p + 0.01 * torch.randn(p.shape, generator=generator), theta) for _ in range(POINTS)
    ])
    vmap, loop = (bnsharp.Objective(module, cross_entropy, (x, y), engine=e) for e in ("vmap", "loop"))

    def by(objective: bnsharp.Objective) -> Run:
        def run() -> None:
            with torch.no_grad():
                objective.many(points)

        return run

    return {"many, vmap": by(vmap), "plain loop": plain_loop(module, x, y, points), "many, loop": by(loop)}


def bn_sharpness() -> Mapping[str, Run]:
    """Steepest start, 2×8 nodes, LeNet-BN, against the 16 forward passes and one gradient that it needs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2048, 3, 32, 32, generator=generator), torch.randint(10, (2048,), generator=generator)
    module = build("lenet-bn", (3, 32, 32), 10, seed=0)
    groups = bnsharp.scale_groups(module, x[:16])
    objective = bnsharp.Objective(module, cross_entropy, (x, y))
    theta = bnsharp.parameters(module)
    measure = bnsharp.measures.bn_sharpness(groups, delta=0.01, steps=0)
    bare = build("lenet-bn", (3, 32, 32), 10, seed=0).train()

    def ours() -> None:
        measure(objective, theta, sampling=bnsharp.Sampling(promote=False))

    def passes() -> None:
        torch.autograd.grad(cross_entropy(bare(x), y), list(bare.parameters()))
        with torch.no_grad():
            for _ in range(16):
                cross_entropy(bare(x), y)

    return {"bn_sharpness": ours, "16 forward + 1 gradient": passes}


CASES = (
    Case("64 perturbations of the BN perceptron, batch 256", many, 0.25, 21),
    Case("BN-Sharpness, steepest start, LeNet-BN, batch 2048", bn_sharpness, 1.10, 5),
)
