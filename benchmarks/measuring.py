"""Losses at many points and BN-Sharpness: ours against the plain loop and against the passes they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import CPU, Case, Run
from benchmarks.training import cross_entropy
from bnsharp import params as P
from bnsharp.choosing import CHUNKS
from bnsharp.grids import Grid
from bnsharp.models import build

POINTS = 64
IMAGES = (3, 32, 32)
DIGITS = (1, 8, 8)


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


def products(x: Tensor, points: P.Params) -> Run:
    """The matrix products of a perceptron's layers alone, one point after the other: what no loop can go below."""
    weights = [w for w in points.values() if w.ndim == 3]
    inputs = [x.flatten(1), *(torch.randn(len(x), w.shape[1], dtype=x.dtype) for w in weights[:-1])]
    out = [x.new_empty(len(x), w.shape[1]) for w in weights]

    def run() -> None:
        for i in range(P.count(points)):
            for a, w, o in zip(inputs, weights, out, strict=True):
                torch.mm(a, w[i].T, out=o)

    return run


def example(
    name: str, shape: tuple[int, int, int], batch: int, device: torch.device, **options: Any
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in train mode and a batch of noise."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, *shape, generator=generator), torch.randint(10, (batch,), generator=generator)
    return build(name, shape, 10, seed=0, **options).train().to(device), x.to(device), y.to(device)


def perturbed(module: nn.Module, n: int) -> P.Params:
    """``n`` points around the network's parameters, a batch."""
    theta = bnsharp.parameters(module)
    generator = P.seeded(0, P.first(theta).device)

    def noise(p: Tensor) -> Tensor:
        return torch.randn((n, *p.shape), generator=generator, device=p.device, dtype=p.dtype)

    return P.make({k: p + 0.01 * noise(p) for k, p in theta.items()}, (n,))


def losses(objective: bnsharp.Objective, source: Any) -> Run:
    """``objective.many`` without gradients."""

    def run() -> None:
        with torch.no_grad():
            objective.many(source)

    return run


def engines(
    name: str, shape: tuple[int, int, int], batch: int, n: int, names: tuple[str, ...], floor: bool = False,
    device: torch.device = CPU, **options: Any
) -> Mapping[str, Run]:
    """``many`` by each of these engines, the plain loop and, with ``floor``, the matrix products alone."""
    module, x, y = example(name, shape, batch, device, **options)
    points = perturbed(module, n)
    made = {f"many, {e}": losses(bnsharp.Objective(module, cross_entropy, (x, y), engine=e), points) for e in names}
    more = {"matrix products alone": products(x, points)} if floor else {}
    return made | {"plain loop": plain_loop(module, x, y, points)} | more


def many(device: torch.device = CPU) -> Mapping[str, Run]:
    """64 perturbations of the BN perceptron on 256 examples, by the compiled engine that was chosen."""
    found = dict(engines("bn-mlp", DIGITS, 256, POINTS, ("auto:compiled", "auto", "loop", "vmap"), True, device))
    ours = found.pop("many, auto:compiled")
    return {"many, auto:compiled": ours, "plain loop": found.pop("plain loop")} | found


def line(name: str, shape: tuple[int, int, int], batch: int, n: int,
         device: torch.device = CPU) -> Mapping[str, Run]:
    """Losses at θ + t v: points written into one memory, against points that are made anew."""
    module, x, y = example(name, shape, batch, device)
    theta, t = bnsharp.parameters(module), torch.linspace(-0.01, 0.01, n).tolist()
    objective = bnsharp.Objective(module, cross_entropy, (x, y))
    anew = P.Lazy(n, lambda k: P.shift(theta, theta, t[k]))
    return {"along": losses(objective, Grid(theta, [theta], t)), "a point at a time": losses(objective, anew)}


def bn_sharpness(rounding: str, dtype: torch.dtype, batch: int, device: torch.device = CPU) -> Mapping[str, Run]:
    """Steepest start, 2×8 nodes, LeNet-BN, against the 16 forward passes and one gradient that it needs."""
    module, x, y = example("lenet-bn", IMAGES, batch, device)
    bare, x = build("lenet-bn", IMAGES, 10, seed=0).to(device, dtype).train(), x.to(dtype)
    groups = bnsharp.scale_groups(module, x[:16].float())
    objective = bnsharp.Objective(module.to(dtype), cross_entropy, (x, y))
    theta = bnsharp.parameters(module)
    measure = bnsharp.measures.bn_sharpness(groups, delta=0.01, steps=0)
    sampling = bnsharp.Sampling(promote=False, rounding=rounding)

    def ours() -> None:
        measure(objective, theta, sampling=sampling)

    def passes() -> None:
        torch.autograd.grad(cross_entropy(bare(x), y), list(bare.parameters()))
        with torch.no_grad():
            for _ in range(16):
                cross_entropy(bare(x), y)

    return {"bn_sharpness": ours, "16 forward + 1 gradient": passes}


def choice(name: str, shape: tuple[int, int, int], batch: int, n: int, **options: Any) -> Callable[..., Any]:
    """``auto`` against its own loop and vmap, and the plain loop."""
    chunks = tuple(f"vmap:{c}" for c in CHUNKS if c <= n)
    return partial(engines, name, shape, batch, n, ("auto", "loop", *chunks), **options)


F32, F64 = torch.float32, torch.float64
CASES = (
    Case("64 perturbations of the BN perceptron, batch 256", many, 0.25, 21,
         note="the matrix products alone are the floor"),
    Case("64 perturbations of the BN perceptron, width 32, batch 32",
         partial(engines, "bn-mlp", DIGITS, 32, POINTS, ("auto:compiled", "loop"), width=32), None, 21),
    *(Case(f"many, auto / the best engine, BN perceptron, width {width}",
           choice("bn-mlp", DIGITS, 256, POINTS, width=width), 1.05, 21, best=True) for width in (16, 32, 128)),
    Case("many, auto / the best engine, LeNet-BN, batch 64", choice("lenet-bn", IMAGES, 64, 16), 1.05, 9, best=True),
    Case("many, auto / the best engine, ResNet18, batch 32", choice("resnet18", IMAGES, 32, 4), 1.05, 5, best=True),
    Case("many, auto / the best engine, VGG11-BN, batch 32", choice("vgg11-bn", IMAGES, 32, 4), 1.05, 5, best=True),
    Case("points of a line, ResNet18, batch 32", partial(line, "resnet18", IMAGES, 32, 4), None, 5),
    Case("BN-Sharpness, steepest start, LeNet-BN, batch 2048", partial(bn_sharpness, "modelled", F32, 2048), 1.10, 5,
         note="rounding modelled"),
    Case("BN-Sharpness in float64, steepest start, LeNet-BN, batch 512", partial(bn_sharpness, "modelled", F64, 512),
         1.10, 5),
    Case("BN-Sharpness with its rounding measured, LeNet-BN, batch 512", partial(bn_sharpness, "measured", F32, 512),
         None, 5, note="16 float64 passes more"),
)
