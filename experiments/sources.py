"""What a command can measure: a run folder, a checkpoint, or a network of torchvision or timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnsharp.checkpoint import CONFIG, load
from bnsharp.checks import suggest
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.config import make_config
from bnsharp.experiments.run import load_data, load_state, read_run
from bnsharp.models import build


@dataclass(frozen=True)
class Source:
    """A network and the data it is measured on."""

    module: nn.Module
    data: ImageData


def open_source(
    source: str,
    *,
    data: str | None = None,
    data_options: dict[str, Any] | None = None,
    model: str | None = None,
    model_options: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Open a run folder, a checkpoint (beside its config.json or with ``model``), ``torchvision:NAME``, ``timm:NAME``.

    Raises:
        InputError: nothing there, data or model missing, a checkpoint that does not fit, a pickle of code.
    """
    kind, _, name = source.partition(":")
    if kind in LIBRARIES and name:
        return Source(LIBRARIES[kind](name, seed), _data(source, data, data_options, seed, progress))
    path = Path(source)
    if path.is_dir() or (path.is_file() and (path.parent / CONFIG).is_file() and model is None):
        config, module, own = read_run(path if path.is_dir() else path.parent, None if path.is_dir() else path)
        return Source(module, own if data is None else _data(source, data, data_options, config.split_seed, progress))
    if not path.is_file():
        raise InputError(f"{source!r}: expected a run folder, a checkpoint, torchvision:NAME or timm:NAME")
    if model is None:
        raise InputError(f"{source} lies beside no {CONFIG}; expected --model NAME to say what network it holds")
    images = _data(source, data, data_options, seed, progress)
    module = build(model, images.input_shape, len(images.classes), seed=seed, **(model_options or {}))
    payload = load(path)
    load_state(module, payload.get("module", payload), source)
    return Source(module, images)


def _data(source: str, data: str | None, options: dict[str, Any] | None, seed: int,
          progress: Callable[[int, int], None] | None) -> ImageData:
    if data is None:
        raise InputError(f"{source!r} says nothing of its data; expected --data NAME or --data FOLDER")
    return load_data(make_config({"data": data, "data_options": options or {}, "seed": seed}), progress)


def _torchvision(name: str, seed: int) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}" + (suggest(name, known) or "; see its list of models"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.get_model(name, weights=None)


def _timm(name: str, seed: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError("timm:NAME needs the package timm; install bnsharp[timm]") from error
    if name not in timm.list_models():
        hint = suggest(name, timm.list_models()) or "; see its list of models"
        raise InputError(f"timm has no model {name!r}{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained=False)


LIBRARIES: dict[str, Callable[[str, int], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}
