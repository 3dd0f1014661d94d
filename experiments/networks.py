"""Networks by name: one of ``MODELS``, ``torchvision:NAME`` or ``timm:NAME``, fitted to the data's classes and images.

Weights are never pretrained and never fetched: they are drawn from a seed, and the global random state is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp.checks import suggest, unknown, whole
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.models import MODELS, build

Make = Callable[[int, dict[str, Any]], nn.Module]
"""``(seed, options) -> module``."""


def network(name: str) -> Callable[[ImageData, int, dict[str, Any]], nn.Module]:
    """``(data, seed, options) -> module`` with an output per class, its name checked at once.

    A network of timm gets the data's channels, and its image size where the network is made for one size; a network of
    torchvision takes three channels, and gray images are repeated. ``options`` go to the constructor and come first.

    Raises:
        InputError: an unknown name (with the nearest known one), timm missing; later, options that do not fit.
    """
    made = library(name)
    if made is not None:
        fit = FITTED[name.partition(":")[0]]
        return lambda data, seed, options: fit(made, name.partition(":")[2], data, seed, options)
    if name not in MODELS:
        raise unknown("model", name, (*MODELS, *(f"{kind}:NAME" for kind in LIBRARIES)))
    return lambda data, seed, options: build(name, data.input_shape, len(data.classes), seed=seed, **options)


def library(name: str) -> Make | None:
    """``(seed, options) -> module`` for ``torchvision:NAME`` or ``timm:NAME`` as the library has it; None for others.

    Raises:
        InputError: a name that the library does not have, timm missing.
    """
    kind, _, inner = name.partition(":")
    if kind not in LIBRARIES or not inner:
        return None
    return LIBRARIES[kind](inner)


def _torchvision(name: str) -> Make:
    from torchvision import models

    _require_known("torchvision", name, models.list_models(module=models))  # classifiers of images
    return lambda seed, options: _make(name, seed, lambda: models.get_model(name, weights=None, **options))


def _timm(name: str) -> Make:
    try:
        import timm
    except ImportError as error:
        raise InputError("timm:NAME needs the package timm; install bnsharp[timm]") from error
    _require_known("timm", name, timm.list_models())
    return lambda seed, options: _make(name, seed, lambda: timm.create_model(name, pretrained=False, **options))


LIBRARIES: dict[str, Callable[[str], Make]] = {"torchvision": _torchvision, "timm": _timm}
"""Libraries of networks: ``NAME -> (seed, options) -> module``; an unknown name is an error before anything is read."""


def _torchvision_fitted(make: Make, name: str, data: ImageData, seed: int, options: dict[str, Any]) -> nn.Module:
    channels = data.input_shape[0]
    if channels not in (1, 3):
        raise InputError(f"torchvision:{name} takes color images; {data.name} has {channels} channels: choose another "
                         "model, such as one of timm")
    module = make(seed, {"num_classes": len(data.classes), **options})
    if channels == 1:
        module.register_forward_pre_hook(_repeat_channels)
    return module


def _repeat_channels(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gray images ``[n, 1, H, W]`` as color images with three equal channels."""
    return (inputs[0].expand(-1, 3, -1, -1), *inputs[1:])


def _timm_fitted(make: Make, name: str, data: ImageData, seed: int, options: dict[str, Any]) -> nn.Module:
    from timm.models import get_pretrained_cfg

    channels, *size = data.input_shape
    told = get_pretrained_cfg(name)
    fixed = {"img_size": tuple(size)} if told is not None and told.fixed_input_size else {}
    return make(seed, {"num_classes": len(data.classes), "in_chans": channels, **fixed, **options})


FITTED: dict[str, Callable[[Make, str, ImageData, int, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision_fitted, "timm": _timm_fitted,
}
"""How each library's networks are fitted to data."""


def _require_known(library: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        hint = suggest(name, known) or f"; see {library}'s list of models"
        raise InputError(f"{library} has no model {name!r} for images and classes{hint}")


def _make(name: str, seed: int, build_module: Callable[[], nn.Module]) -> nn.Module:
    whole("seed", seed, 0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            return build_module()
        except Exception as error:  # foreign constructors fail in any way
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise InputError(f"{name} is not built with these options ({reason})") from error
