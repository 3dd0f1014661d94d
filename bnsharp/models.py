"""Small batch-normalized networks for experiments, built by name with reproducible weights.

Every layer before a batch normalization is without bias: such a bias has no influence on the output. Layers have
names (``linear1``, ``norm1``, …, ``head``), so that parameters read well in tables of scale groups.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops.layers.torch import Rearrange, Reduce
from torch import nn

from bnsharp.checks import one_of, unknown, whole
from bnsharp.errors import InputError
from bnsharp.resnets import Shape, require_size, require_width, resnet18, wideresnet

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus}
POOLS: dict[str, Callable[[int], nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


@dataclass(frozen=True)
class ModelSpec:
    """A registered model.

    Attributes:
        builder: ``builder(input_shape, classes, **options)`` makes the module; its keyword-only arguments are the
            model's options.
        summary: one line for a listing.
        source: where the architecture comes from.
    """

    builder: Callable[..., nn.Module]
    summary: str
    source: str

    @property
    def options(self) -> dict[str, Any]:
        """The options' names and defaults."""
        parameters = inspect.signature(self.builder).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(name: str, input_shape: tuple[int, ...], classes: int, /, *, seed: int, **options: Any) -> nn.Module:
    """The model ``name`` on the CPU, in train mode, for images ``[n, C, H, W]``; its output is logits ``[n, classes]``.

    Args:
        name: a key of :data:`MODELS`.
        input_shape: ``(C, H, W)`` of one image, in pixels.
        classes: number of classes, at least 1.
        seed: the initial weights are a function of ``seed``, ``name``, the shapes, the options and the default
            dtype alone; torch's global random state is neither read nor changed.
        options: the model's own options, see ``MODELS[name].options``.

    Raises:
        InputError: unknown model or option, a value out of range, images too small for the architecture.
    """
    spec = MODELS.get(name)
    if spec is None:
        raise unknown("model", name, MODELS)
    for option in options:
        if option not in spec.options:
            raise unknown(f"option of {name}", option, spec.options)
    if len(input_shape) != 3:
        raise InputError(f"input_shape={tuple(input_shape)}; expected (channels, height, width): pass three integers")
    channels, height, width = (whole("input_shape", size) for size in input_shape)
    classes, seed = whole("classes", classes), whole("seed", seed, least=0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return spec.builder((channels, height, width), classes, **options)


def bn_mlp(
    input_shape: Shape, classes: int, *, width: int = 128, depth: int = 2, activation: str = "relu"
) -> nn.Module:
    """Perceptron with ``depth`` hidden layers (linear, BN, activation) of ``width`` units and a plain linear head.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 4.1.
    """
    width, depth = whole("width", width), whole("depth", depth)
    act = _choice("activation", activation, ACTIVATIONS)
    layers: dict[str, nn.Module] = {"flatten": Rearrange("n c h w -> n (c h w)")}
    inputs = math.prod(input_shape)
    for i in range(1, depth + 1):
        layers[f"linear{i}"] = nn.Linear(inputs, width, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm1d(width)
        layers[f"act{i}"] = act()
        inputs = width
    layers["head"] = nn.Linear(inputs, classes)
    return _sequential(layers)


def lenet_bn(
    input_shape: Shape, classes: int, *, activation: str = "relu", pool: str = "max", logits_bn: bool = True
) -> nn.Module:
    """LeNet-5 (6 and 16 kernels of 5×5, then 120, 84, ``classes`` units), batch-normalized after every layer.

    With ``logits_bn`` the logits are normalized too and no layer has a bias; without, the last layer has one.
    An image side below 32 is padded by 2 before the first convolution, as 28×28 MNIST digits were to 32×32.

    Sources: LeCun et al. 1998, "Gradient-based learning applied to document recognition"; batch normalization on
    every layer including the logits: "fully batch-normalized" in the BN-Sharpness paper's experiments.
    """
    act, pooling = _choice("activation", activation, ACTIVATIONS), _choice("pool", pool, POOLS)
    if not isinstance(logits_bn, bool):
        raise InputError(f"logits_bn={logits_bn!r}; expected true or false: pass one of the two")
    channels, *sides = input_shape
    require_size("lenet-bn", sides, minimum=12)
    pad_h, pad_w = (2 if side < 32 else 0 for side in sides)
    rows, columns = (((side + 2 * pad - 4) // 2 - 4) // 2 for side, pad in zip(sides, (pad_h, pad_w), strict=True))
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, 6, 5, padding=(pad_h, pad_w), bias=False),
        "norm1": nn.BatchNorm2d(6),
        "act1": act(),
        "pool1": pooling(2),
        "conv2": nn.Conv2d(6, 16, 5, bias=False),
        "norm2": nn.BatchNorm2d(16),
        "act2": act(),
        "pool2": pooling(2),
        "flatten": Rearrange("n c h w -> n (c h w)"),
        "linear3": nn.Linear(16 * rows * columns, 120, bias=False),
        "norm3": nn.BatchNorm1d(120),
        "act3": act(),
        "linear4": nn.Linear(120, 84, bias=False),
        "norm4": nn.BatchNorm1d(84),
        "act4": act(),
        "head": nn.Linear(84, classes, bias=not logits_bn),
    }
    if logits_bn:
        layers["norm_head"] = nn.BatchNorm1d(classes)
    return _sequential(layers)


_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # channels of each stage; a stage ends in a 2×2 pool


def vgg11_bn(input_shape: Shape, classes: int, *, width: float = 1.0) -> nn.Module:
    """VGG11 with BN for 32×32 images: features ``[n, 512, 1, 1]``, then one linear layer.

    ``width`` multiplies every channel number (rounded, at least 1). Larger images are averaged over the positions
    that remain. Convolutions: Kaiming normal, fan out; the head: normal with standard deviation 0.01 and zero bias.

    Sources: Simonyan & Zisserman 2014 (arXiv:1409.1556), configuration A; He et al. 2015 (arXiv:1502.01852).
    """
    require_width(width)
    inputs, *sides = input_shape
    require_size("vgg11-bn", sides, minimum=32)
    layers: dict[str, nn.Module] = {}
    for s, stage in enumerate(_VGG11, start=1):
        for i, channels in enumerate(stage, start=1):
            outputs = max(1, round(width * channels))
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers |= {f"conv{s}_{i}": conv, f"norm{s}_{i}": nn.BatchNorm2d(outputs), f"act{s}_{i}": nn.ReLU()}
            inputs = outputs
        layers[f"pool{s}"] = nn.MaxPool2d(2)
    head = nn.Linear(inputs, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return _sequential(layers | {"average": Reduce("n c h w -> n c", "mean"), "head": head})


def conv_bn(input_shape: Shape, classes: int, *, width: int = 8) -> nn.Module:
    """Two blocks of 3×3 convolution, BN and ReLU with ``width`` channels, global average pool, linear head.

    The smallest network with the layers of Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.2; any image size.
    """
    width = whole("width", width)
    layers: dict[str, nn.Module] = {}
    for i, inputs in enumerate((input_shape[0], width), start=1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        layers |= {f"norm{i}": nn.BatchNorm2d(width), f"act{i}": nn.ReLU()}
    return _sequential(layers | {"average": Reduce("n c h w -> n c", "mean"), "head": nn.Linear(width, classes)})


MODELS: dict[str, ModelSpec] = {
    "bn-mlp": ModelSpec(bn_mlp, "perceptron, BN on every hidden layer", "Ioffe & Szegedy 2015"),
    "lenet-bn": ModelSpec(lenet_bn, "LeNet-5, BN on every layer and on the logits", "LeCun et al. 1998"),
    "vgg11-bn": ModelSpec(vgg11_bn, "VGG11 with BN for 32×32 images", "Simonyan & Zisserman 2014"),
    "conv-bn": ModelSpec(conv_bn, "two convolutions with BN, for images from 8×8", "Ioffe & Szegedy 2015"),
    "resnet18": ModelSpec(resnet18, "ResNet-18 for images from 8×8: 3×3 stem, no max-pool", "He et al. 2015"),
    "wideresnet": ModelSpec(
        wideresnet, "WRN-depth-width, pre-activation, for images from 8×8", "Zagoruyko & Komodakis 2016"
    ),
}
"""The models that :func:`build` knows, by name."""


def _sequential(layers: dict[str, nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def _choice(option: str, given: str, known: dict[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    one_of(option, given, known)
    return known[given]
