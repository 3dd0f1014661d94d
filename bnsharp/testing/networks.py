"""Small float64 networks with each normalizer, at a generic point (every parameter random, none zero)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bnsharp import params as P
from bnsharp.checks import flag, one_of, whole
from bnsharp.errors import InputError
from bnsharp.groups import ScaleGroups, scale_groups
from bnsharp.modes import NEGLIGIBLE_EPS
from bnsharp.objective import Objective
from bnsharp.transformations import Transformation, find
from bnsharp.types import Params

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus, "relu": nn.ReLU}
SMOOTH = ("tanh", "softplus")
SIDE = 4
"""Images are 1 × SIDE × SIDE."""


def _group_norm(blocks: int) -> Callable[[tuple[int, ...]], nn.Module]:
    return lambda shape: nn.GroupNorm(blocks, shape[0])


def _batch_norm(shape: tuple[int, ...]) -> nn.Module:
    return nn.BatchNorm2d(shape[0]) if len(shape) > 1 else nn.BatchNorm1d(shape[0])


NORMALIZERS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "batch": _batch_norm,
    "layer": lambda shape: nn.LayerNorm(shape),
    "group": _group_norm(2),
    "instance": lambda shape: nn.InstanceNorm2d(shape[0], affine=True),
    "rms": lambda shape: nn.RMSNorm(shape),
    "weight": lambda shape: nn.Identity(),
    "none": lambda shape: nn.Identity(),
}
"""Normalizer by the shape of one example's features; ``"weight"`` is weight normalization of the layer before it."""


@dataclass(frozen=True, eq=False)
class Network:
    """A module with one batch and a criterion.

    Attributes:
        module: two hidden layers with the normalizer, and a linear head; in eval mode.
        x: inputs ``[n, 3]``, or ``[n, 1, 4, 4]`` for a convolutional network.
        y: labels ``[n]`` of three classes.
        criterion: mean cross-entropy.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy

    @property
    def params(self) -> Params:
        """Copies of the parameters."""
        return P.parameters(self.module)

    @cached_property
    def groups(self) -> ScaleGroups:
        """Its scale groups, found by :func:`bnsharp.scale_groups`."""
        return scale_groups(self.module, self.x)

    @cached_property
    def transformations(self) -> dict[str, Transformation]:
        """What keeps its function, found by :func:`bnsharp.transformations.find`."""
        return find(self.module, self.x, self.groups)

    def objective(self, **options: Any) -> Objective:
        """The mean loss on the batch; options of :class:`bnsharp.Objective`."""
        return Objective(self.module, self.criterion, (self.x, self.y), **options)


def network(
    normalizer: str = "batch", activation: str = "tanh", conv: bool = False, *, bias: bool = False, width: int = 6,
    examples: int = 12, dropout: float = 0.0, eps: float = NEGLIGIBLE_EPS, seed: int = 0,
) -> Network:
    """One network, as :func:`networks` draws them.

    Args:
        normalizer: one of ``NORMALIZERS``; ``"instance"`` needs ``conv``.
        activation: ``"tanh"``, ``"softplus"`` or ``"relu"``.
        conv: two convolutions on images instead of two linear layers.
        bias: whether the hidden layers have one.
        width: hidden channels, a multiple of 2; at least 6 where vectors are normalized in two groups.
        examples: in the batch, at least 4.
        dropout: probability, in front of the head; 0 for no such layer.
        eps: of every normalizer; negligible, so that scale invariance is exact.
        seed: of parameters, running statistics and batch.

    Raises:
        InputError: an unknown name, or a number out of range.
    """
    check_network(normalizer, activation, conv)
    whole("examples", examples, 4)
    if not fits(normalizer, conv, width):
        raise InputError(
            f"width={width!r} with normalizer={normalizer!r}; expected an even number, for group normalization of "
            "vectors at least 6: a block of two numbers is normalized to ±1 whatever they are"
        )
    generator = torch.Generator().manual_seed(seed)
    module = _architecture(normalizer, activation, conv, bias, width, dropout).double().eval()
    _randomize(module, generator, eps)
    shape = (examples, 1, SIDE, SIDE) if conv else (examples, 3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Network(module, x, torch.randint(0, 3, (examples,), generator=generator))


def fits(normalizer: str, conv: bool, width: int) -> bool:
    """Whether the hidden channels can be normalized in blocks that say anything."""
    return whole("width", width, 2) % 2 == 0 and (normalizer != "group" or conv or width >= 6)


def check_network(normalizer: str, activation: str, conv: bool) -> None:
    one_of("normalizer", normalizer, NORMALIZERS)
    one_of("activation", activation, ACTIVATIONS)
    flag("conv", conv)
    if normalizer == "instance" and not conv:
        raise InputError("normalizer='instance' with conv=False; instance normalization needs images: pass conv=True")


def _architecture(
    normalizer: str, activation: str, conv: bool, bias: bool, width: int, dropout: float
) -> nn.Sequential:
    def hidden(inputs: int) -> list[nn.Module]:
        layer: nn.Module = (
            nn.Conv2d(inputs, width, 3, padding=1, bias=bias) if conv else nn.Linear(inputs, width, bias=bias)
        )
        if normalizer == "weight":
            layer = parametrizations.weight_norm(layer)
        shape = (width, SIDE, SIDE) if conv else (width,)
        return [layer, NORMALIZERS[normalizer](shape), ACTIVATIONS[activation]()]

    end: list[nn.Module] = [nn.AdaptiveAvgPool2d(2), nn.Flatten()] if conv else []
    end += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*hidden(1 if conv else 3), *hidden(width), *end, nn.Linear(4 * width if conv else width, 3))


def _randomize(module: nn.Module, generator: torch.Generator, eps: float) -> None:
    """Generic parameters and running statistics; every ε set."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_((1.0 if gain else 0.0) + 0.3 * noise if p.ndim == 1 else noise / p[0].numel() ** 0.5)
        for m in module.modules():
            if "eps" in m.__dict__:
                m.__dict__["eps"] = eps
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator))
                assert m.running_var is not None
                m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=generator))


def with_running_statistics(net: Network, mean: float, variance: float) -> Network:
    """A copy whose running statistics are these numbers."""
    module = copy.deepcopy(net.module)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.fill_(mean)
            assert m.running_var is not None
            m.running_var.fill_(variance)
    return replace(net, module=module)
