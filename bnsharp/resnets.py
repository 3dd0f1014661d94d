"""Residual networks for small images: a 3×3 stem of stride 1 and no max-pool, so that 8×8 pixels are enough.

Convolutions have no bias and start Kaiming normal, fan out (He et al. 2015, arXiv:1502.01852). In :func:`resnet18` a
normalization follows every convolution, so that each of its filters is scale invariant. In :func:`wideresnet` the
normalization comes before the convolution: what is added to the residual stream, the second convolution of a block and
the projection of a skip, reaches no normalization alone and is not scale invariant.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from einops.layers.torch import Reduce
from torch import Tensor, nn

from bnsharp.checks import whole
from bnsharp.errors import InputError

Shape = tuple[int, int, int]
"""Channels, height and width of one image, ``(C, H, W)``."""

SMALLEST = 8
"""Pixels on a side that survive the strides."""


class PostActivationBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + skip(x))``; the skip is a 1×1 convolution with BN where shapes differ.

    Source: He et al. 2015 (arXiv:1512.03385), figure 2 and section 3.3, option B.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(OrderedDict(
                conv=_conv(inputs, outputs, stride, kernel=1), norm=nn.BatchNorm2d(outputs)
            ))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(inner + self.skip(x))


class PreActivationBlock(nn.Module):
    """``conv2(drop(relu(bn2(conv1(a))))) + x`` with ``a = relu(bn1(x))``; where shapes differ, ``+ conv_1×1(a)``.

    Source: Zagoruyko & Komodakis 2016 (arXiv:1605.07146), figure 1(d) and section 2.4.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = _conv(outputs, outputs)
        self.act = nn.ReLU()
        self.skip = _conv(inputs, outputs, stride, kernel=1) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.norm1(x))
        inner = self.conv2(self.drop(self.act(self.norm2(self.conv1(a)))))
        return inner + (x if self.skip is None else self.skip(a))


def resnet18(input_shape: Shape, classes: int, *, width: float = 1.0) -> nn.Module:
    """ResNet-18 for small images: a 3×3 stem, four stages of two blocks, mean over positions, linear head.

    The stages have 64, 128, 256 and 512 channels times ``width`` (rounded, at least 1); each but the first halves the
    image. 11,173,962 parameters for three channels and ten classes.

    Source: He et al. 2015 (arXiv:1512.03385), table 1, without the stem's stride and pool.

    Raises:
        InputError: a width that is no positive number, images below 8×8.
    """
    require_width(width)
    require_size("resnet18", input_shape[1:], SMALLEST)
    channels = [max(1, round(width * c)) for c in (64, 128, 256, 512)]
    layers: dict[str, nn.Module] = {
        "conv": _conv(input_shape[0], channels[0]), "norm": nn.BatchNorm2d(channels[0]), "act": nn.ReLU()
    }
    inputs = channels[0]
    for s, outputs in enumerate(channels, start=1):
        for b, stride in enumerate((1 if s == 1 else 2, 1), start=1):
            layers[f"block{s}_{b}"] = PostActivationBlock(inputs, outputs, stride)
            inputs = outputs
    return _with_head(layers, inputs, classes)


def wideresnet(input_shape: Shape, classes: int, *, depth: int = 16, width: int = 4, dropout: float = 0.0) -> nn.Module:
    """WRN-``depth``-``width``: 3×3 stem of 16 channels, three stages of ``(depth − 4)/6`` blocks, BN, ReLU, mean, head.

    The stages have 16, 32 and 64 channels times ``width``; each but the first halves the image. For three channels and
    ten classes WRN-16-4 has 2,748,890 parameters and WRN-28-10 has 36,479,194.

    Args:
        depth: ``6n + 4``: 10, 16, 22, 28, 40, …
        width: factor of the channels, a whole number of at least 1.
        dropout: probability between the convolutions of a block, in [0, 1).

    Source: Zagoruyko & Komodakis 2016 (arXiv:1605.07146), table 1.

    Raises:
        InputError: another depth, a width or dropout out of range, images below 8×8.
    """
    whole("width", width)
    if whole("depth", depth, 10) % 6 != 4:
        lower = depth - (depth - 4) % 6
        raise InputError(f"depth={depth}; a wide residual network has 6n + 4 layers: pass e.g. {lower} or {lower + 6}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout!r}; expected a probability from 0 to below 1")
    require_size("wideresnet", input_shape[1:], SMALLEST)
    layers: dict[str, nn.Module] = {"conv": _conv(input_shape[0], 16)}
    inputs = 16
    for s, outputs in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for b in range(1, (depth - 4) // 6 + 1):
            layers[f"block{s}_{b}"] = PreActivationBlock(inputs, outputs, 2 if s > 1 and b == 1 else 1, dropout)
            inputs = outputs
    return _with_head(layers | {"norm": nn.BatchNorm2d(inputs), "act": nn.ReLU()}, inputs, classes)


def require_width(width: float) -> None:
    """Raise :class:`InputError` unless ``width`` is a positive finite number."""
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
        raise InputError(f"width={width!r}; expected a positive number that multiplies the channels: pass e.g. 0.5")


def require_size(name: str, sides: tuple[int, ...] | list[int], minimum: int) -> None:
    """Raise :class:`InputError` unless both sides of an image have ``minimum`` pixels."""
    if min(sides) < minimum:
        raise InputError(
            f"{name} got images of {sides[0]}×{sides[1]} pixels; expected at least {minimum}×{minimum}: "
            f"load the data with image_size={minimum} or more, or choose another model"
        )


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _with_head(layers: dict[str, nn.Module], features: int, classes: int) -> nn.Module:
    head = {"average": Reduce("n c h w -> n c", "mean"), "head": nn.Linear(features, classes)}
    return nn.Sequential(OrderedDict(layers | head))
