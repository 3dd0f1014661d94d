"""Scale groups of published architectures are those that the graph of layers says, and rescaling is verified."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.ops import StochasticDepth

import bnsharp
from bnsharp import params as P
from bnsharp.groups import ScaleGroups
from bnsharp.modes import measuring
from bnsharp.partition import Group

# ---------------------------------------------------------------- what the graph of layers says

Convolution = nn.Conv1d | nn.Conv2d
LEAVES = (nn.Linear, Convolution, _BatchNorm, nn.LayerNorm, nn.MultiheadAttention, StochasticDepth)
IDENTITIES = (nn.Identity, nn.Dropout, StochasticDepth, F.dropout)
RECTIFIERS = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
RESHAPES = (nn.Flatten, torch.flatten, torch.permute, "flatten", "permute")


class Layers(fx.Tracer):
    """A graph whose nodes are layers."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, name)


class Structure:
    """The scale groups of a network by rules about its layers: nothing is evaluated.

    A change of a node's value does not matter if it does not matter to any layer that uses it. Three changes are
    followed: every channel times its own positive factor (``channels``), all of it times one factor (``whole``), and
    a constant added to every channel (``shift``).
    """

    def __init__(self, net: nn.Module):
        self.net = net.eval()
        self.graph = Layers().trace(net)
        self.modules = dict(net.named_modules())
        self.ignored = cache(self._ignored)

    def layer(self, node: fx.Node) -> Any:
        """The module, function or method's name that a node calls."""
        return self.modules[node.target] if node.op == "call_module" else node.target

    def _ignored(self, node: fx.Node, change: str) -> bool:
        """Whether nothing downstream sees this change of the node's value."""
        if change == "whole" and self.ignored(node, "channels"):
            return True
        return bool(node.users) and all(self.absorbed(user, change) for user in node.users)

    def absorbed(self, user: fx.Node, change: str) -> bool:
        layer = self.layer(user)
        if isinstance(layer, _BatchNorm):
            return True
        if isinstance(layer, nn.LayerNorm):
            return change == "whole"
        if isinstance(layer, nn.Linear | Convolution):
            return self.through_weights(user, layer, change)
        if is_one(layer, IDENTITIES):
            return self.ignored(user, change)
        if is_one(layer, RECTIFIERS + POOLS):
            return change != "shift" and self.ignored(user, change)
        if is_one(layer, RESHAPES):
            return change == "whole" and self.ignored(user, change)
        if layer is torch.cat:  # one part as a whole is some of the channels of the result
            return self.ignored(user, "shift" if change == "shift" else "channels")
        if getattr(layer, "__name__", layer) in ("add", "iadd", "add_"):
            return change == "shift" and self.ignored(user, change)
        return False

    def after(self, module: nn.Module, node: fx.Node, change: str) -> bool:
        """A change of ``W x + b`` or ``γ x + β``: timm's normalizers have an activation of their own behind it."""
        own = getattr(module, "act", None)
        passes = own is None or is_one(own, IDENTITIES) or (is_one(own, RECTIFIERS) and change != "shift")
        return passes and self.ignored(node, change)

    def through_weights(self, user: fx.Node, layer: Any, change: str) -> bool:
        """A factor passes if the layer's own bias does not matter; a constant, if no zeros are padded."""
        if change == "shift":
            return getattr(layer, "padding", 0) in (0, (0,), (0, 0)) and self.ignored(user, "shift")
        depthwise = getattr(layer, "groups", 0) == getattr(layer, "in_channels", 1) == getattr(layer, "out_channels", 1)
        free = layer.bias is None or self.ignored(user, "shift")
        return free and (change == "whole" or depthwise) and self.ignored(user, change)

    def groups(self) -> set[Group]:
        used: set[str] = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        found: set[Group] = set()
        for name, module in self.modules.items():
            calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == name]
            if calls:
                used |= {f"{name}.{k}" for k, _ in module.named_parameters()}
            if calls and isinstance(module, nn.Linear | Convolution | _BatchNorm | nn.LayerNorm):
                ignored = {c: all(self.after(module, n, c) for n in calls) for c in ("channels", "whole", "shift")}
                found |= groups_of(name, module, **ignored)
        unused = [k for k, _ in self.net.named_parameters() if k not in used]
        return found | {Group("inert", (k,), 1) for k in unused}


def is_one(layer: Any, known: tuple[Any, ...]) -> bool:
    return layer in known or any(isinstance(k, type) and isinstance(layer, k) for k in known)


def groups_of(name: str, module: Any, *, channels: bool, whole: bool, shift: bool) -> set[Group]:
    """``y = W x + b`` or ``y = γ x + β``: what may be done to y says what may be done to the parameters."""
    found, members = set(), [f"{name}.weight"] if module.weight is not None else []
    if module.bias is not None and shift:
        found.add(Group("inert", (f"{name}.bias",), 1))
    elif module.bias is not None:
        members.append(f"{name}.bias")
    if members and (channels or whole):
        blocks = len(module.weight) if channels else 1
        kind = "joint" if len(members) > 1 else "row" if channels else "tensor"
        found.add(Group(kind, tuple(members), blocks))
    return found


# ---------------------------------------------------------------- networks


def vgg11_bn() -> nn.Module:
    """Its own features; the hidden layers of its classifier, 90% of the parameters and not normalized, are narrow."""
    net = models.vgg11_bn(weights=None, num_classes=10)
    net.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    return net


def vit_b_16() -> nn.Module:
    """Four of its twelve equal blocks."""
    net = models.vit_b_16(weights=None, image_size=32)
    net.encoder.layers = net.encoder.layers[:4]
    return net


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, **options)


def from_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, pretrained=False)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (torchvision("resnet18"), 8, 32),
    "resnet50": (torchvision("resnet50"), 8, 32),
    "vgg11_bn": (vgg11_bn, 8, 32),
    "densenet121": (torchvision("densenet121"), 8, 32),
    "mobilenet_v3_small": (torchvision("mobilenet_v3_small"), 8, 32),
    "efficientnet_b0": (torchvision("efficientnet_b0"), 8, 64),
    "convnext_tiny": (torchvision("convnext_tiny"), 4, 32),
    "vit_b_16": (vit_b_16, 4, 32),
    "googlenet": (torchvision("googlenet", init_weights=False), 8, 32),
    "timm resnet10t": (from_timm("resnet10t"), 8, 32),
    "timm mobilenetv4_conv_small": (from_timm("mobilenetv4_conv_small"), 8, 64),
    "timm test_convnext": (from_timm("test_convnext"), 8, 64),
}
"""Makers, numbers of examples and pixels of a side (at 32 pixels some see a single position in their last layers)."""


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, examples, side = ARCHITECTURES[name]
    torch.manual_seed(0)
    return make(), torch.randn(examples, 3, side, side)


@cache
def found_in(name: str) -> ScaleGroups:
    return bnsharp.scale_groups(*made(name))


def change_by_rescaling(net: nn.Module, x: Tensor, groups: ScaleGroups) -> float:
    """Largest change of the output under a random ``T_a``, factors in [0.1, 10], relative to its root mean square."""
    theta = {k: v.detach().double() for k, v in net.named_parameters()}
    factors = groups.random_factors(P.make(theta), torch.Generator().manual_seed(1))
    spread = torch.cat([v.reshape(-1) for v in factors.values()])
    assert spread.min() >= 0.1 and spread.max() <= 10 and spread.max() / spread.min() > 2
    buffers = {k: v.double() if v.is_floating_point() else v for k, v in net.named_buffers()}
    with torch.no_grad(), measuring(net), bnsharp.exact_norms(net):
        before, after = [
            torch.func.functional_call(net, {**buffers, **dict(point.items())}, x.double())
            for point in (P.make(theta), groups.rescale(P.make(theta), factors))
        ]
    return float((after - before).abs().max() / before.square().mean().sqrt())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_are_those_of_the_layers_and_hold(name: str) -> None:
    (net, x), groups = made(name), found_in(name)
    assert set(groups) == Structure(net).groups()
    assert groups.forwards < 60 and groups.residual < 1e-10
    assert not groups.partition.count or change_by_rescaling(net, x, groups) < 1e-8


def test_every_convolution_of_a_residual_network_is_normalized_by_row() -> None:
    """The same in words, without the graph: 20 convolutions, the first normalizer of each block, nothing else."""
    (net, _), found = made("resnet18"), found_in("resnet18")
    rows = {f"{k}.weight" for k, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    firsts = {f"layer{i}.{j}.bn1.{w}" for i in range(1, 5) for j in range(2) for w in ("weight", "bias")}
    assert len(rows) == 20
    assert found.invariant == dict.fromkeys(rows, "row") | dict.fromkeys(firsts, "joint")
    assert found.forwards < 60


def test_auxiliary_heads_that_are_off_are_inert() -> None:
    net, _ = made("googlenet")
    heads = {k for k, _ in net.named_parameters() if k.startswith("aux")}
    found = found_in("googlenet").invariant
    assert len(heads) == 14
    assert {k for k, kind in found.items() if kind == "inert"} == heads


def test_vision_transformers_have_none() -> None:
    """Attention has no scale groups: a query's scale is compensated by no normalizer (pre-norm, with biases)."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("test_vit", pretrained=False)
    assert bnsharp.scale_groups(net, torch.randn(4, 3, 160, 160)).invariant == {}


def test_standardized_convolutions_are_rows() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("test_nfnet", pretrained=False)
    rows = {f"{k}.weight" for k, m in net.named_modules() if type(m).__name__ == "ScaledStdConv2d"}
    x = torch.randn(8, 3, 64, 64)
    found = bnsharp.scale_groups(net, x)
    assert len(rows) > 10
    assert found.invariant == dict.fromkeys(rows, "row")
    assert change_by_rescaling(net, x, found) < 1e-8


# ---------------------------------------------------------------- small constructs


class Gains(nn.Module):
    """``BN(s t (W x + b))`` with two numbers s and t, or numbers per channel."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.s, self.t = nn.Parameter(torch.full(channels, 2.0)), nn.Parameter(torch.full(channels, -1.0))
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.s * self.t * self.linear(x)))


class PreActivationBlock(nn.Module):
    """``x + V relu(BN2(W relu(BN1(x))))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))


class HalfNormalized(nn.Module):
    """One weight, tied, used by a normalized and by a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def frozen(net: nn.Sequential, *layers: int) -> nn.Sequential:
    for i in layers:
        net[i].requires_grad_(False)
    return net


def image_net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def tokens() -> Tensor:
    return torch.arange(48).reshape(12, 4) * 7 % 10


def bias_and(name: str, *groups: Group) -> set[Group]:
    return {Group("inert", (name,), 1), *groups}


IMAGE, VECTOR = (3, 6, 6), (6,)
WEIGHT, BIAS = "0.weight", "0.bias"
CONSTRUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Callable[[], Tensor], set[Group]]] = {
    "weight norm, hook": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
        {Group("row", ("0.weight_v",), 8)},
    ),
    "weight norm, hook, bn": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.Tanh()), VECTOR,
        bias_and(BIAS, Group("row", ("0.weight_v",), 8), Group("row", ("0.weight_g",), 8)),
    ),
    "weight norm over the whole tensor": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8), dim=None), nn.Tanh()), VECTOR,
        {Group("tensor", ("0.parametrizations.weight.original1",), 1)},
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh()), VECTOR,
        {Group("tensor", ("0.parametrizations.weight.original",), 1)},
    ),
    "transposed convolution, bn": (
        lambda: image_net(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGE,
        bias_and(BIAS, Group("tensor", (WEIGHT,), 1)),
    ),
    "grouped convolution, bn": (
        lambda: image_net(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE,
        bias_and(BIAS, Group("row", (WEIGHT,), 6)),
    ),
    "convolution over a sequence, bn": (
        lambda: image_net(nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5)), (3, 6), bias_and(BIAS, Group("row", (WEIGHT,), 5)),
    ),
    "convolution over a volume, bn without affine": (
        lambda: image_net(nn.Conv3d(2, 5, 2), nn.BatchNorm3d(5, affine=False)), (2, 3, 3, 3),
        bias_and(BIAS, Group("row", (WEIGHT,), 5)),
    ),
    "instancenorm without affine": (
        lambda: image_net(nn.Conv2d(3, 5, 3), nn.InstanceNorm2d(5)), IMAGE, bias_and(BIAS, Group("row", (WEIGHT,), 5)),
    ),
    "groupnorm of one group with bias": (
        lambda: image_net(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6)), IMAGE, {Group("joint", (WEIGHT, BIAS), 1)},
    ),
    "groupnorm of single channels": (
        lambda: image_net(nn.Conv2d(3, 6, 3), nn.GroupNorm(6, 6)), IMAGE, bias_and(BIAS, Group("row", (WEIGHT,), 6)),
    ),
    "layernorm over images": (
        lambda: image_net(nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 4, 4])), IMAGE, {Group("joint", (WEIGHT, BIAS), 1)},
    ),
    "rmsnorm without bias": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.RMSNorm(8), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
        {Group("tensor", (WEIGHT,), 1)},
    ),
    "embedding, layernorm": (
        lambda: nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), tokens,
        {Group("row", (WEIGHT,), 10)},
    ),
    "numbers before bn": (
        Gains, VECTOR,
        bias_and("linear.bias", Group("row", ("linear.weight",), 8), Group("row", ("s",), 1), Group("row", ("t",), 1)),
    ),
    "numbers per channel before bn": (
        lambda: Gains(8), VECTOR,
        bias_and("linear.bias", *(Group("row", (k,), 8) for k in ("linear.weight", "s", "t"))),
    ),
    "pre-activation block": (
        PreActivationBlock, IMAGE,
        {Group("row", ("conv1.weight",), 8), Group("joint", ("norm1.weight", "norm1.bias"), 1)},
    ),
    "tied to a plain layer": (HalfNormalized, VECTOR, set()),
    "frozen normalizer": (
        lambda: frozen(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), 1), VECTOR,
        bias_and(BIAS, Group("row", (WEIGHT,), 8)),
    ),
    "frozen linear": (
        lambda: frozen(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), 0), VECTOR, set(),
    ),
    "bn twice": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Tanh()), VECTOR,
        {Group("row", (WEIGHT,), 8), Group("inert", (BIAS,), 1), Group("row", ("1.weight",), 8),
         Group("inert", ("1.bias",), 1)},
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_small_constructs(name: str) -> None:
    make, inputs, expected = CONSTRUCTS[name]
    torch.manual_seed(2)
    net, x = make(), inputs() if callable(inputs) else torch.randn(12, *inputs)
    with torch.no_grad():
        net(x)  # lazy layers see their inputs
    found = bnsharp.scale_groups(net, x)
    assert set(found) == expected
    assert found.residual < 1e-10


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["numbers before bn", "numbers per channel before bn", "bn twice"])
def test_a_number_before_a_normalizer_is_never_inert(name: str, seed: int) -> None:
    """Its size does not matter and its sign does, whatever values are probed."""
    make, shape, expected = CONSTRUCTS[name]
    torch.manual_seed(seed)
    assert not callable(shape)
    assert set(bnsharp.scale_groups(make(), torch.randn(8, *shape), seed=seed)) == expected


# ---------------------------------------------------------------- BN-Sharpness of a residual network


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, ScaleGroups, Tensor, Tensor]:
    net, x = made("resnet18")
    return net, found_in("resnet18"), x, torch.arange(8)


def relative_change(resnet18: Any, dtype: torch.dtype, steps: int, exact: bool, examples: int = 8) -> float:
    """``|S(T_a θ)/S(θ) − 1|`` for random factors in [0.1, 10]."""
    net, groups, x, y = resnet18
    objective = bnsharp.Objective(net, F.cross_entropy, (x[:examples].to(dtype), y[:examples]))
    theta = P.pmap(lambda p: p.to(dtype), bnsharp.parameters(net))
    other = groups.rescale(theta, groups.random_factors(theta, torch.Generator().manual_seed(3)))
    measure = bnsharp.measures.bn_sharpness(groups, delta=0.05, steps=steps, nodes=3)
    with bnsharp.exact_norms(net) if exact else nullcontext():
        before, after = (measure(objective, point).value for point in (theta, other))
    assert before > 0.1
    return abs(after / before - 1)


@pytest.mark.parametrize("steps", [0, 2])
def test_bn_sharpness_is_that_of_the_rescaled_network(resnet18: Any, steps: int) -> None:
    assert relative_change(resnet18, torch.float64, steps, exact=True, examples=4) <= 1e-9


@pytest.mark.parametrize("steps", [0, 2])
def test_in_single_precision_too(resnet18: Any, steps: int) -> None:
    """As long as the rounding of gradients does not move kinks much: with few examples it does (docs)."""
    assert relative_change(resnet18, torch.float32, steps, exact=True) <= 1e-3


def test_the_stored_epsilon_breaks_it(resnet18: Any) -> None:
    """By far more than rounding: with it the rescaled network is another function."""
    assert 1e-4 < relative_change(resnet18, torch.float64, 0, exact=False, examples=4) < 0.5
