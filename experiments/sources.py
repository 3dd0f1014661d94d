"""What a command can measure: a run folder, a file of weights, or a network of torchvision or timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnsharp.checkpoint import CONFIG
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.config import LARGEST_SEED, make_config
from bnsharp.experiments.networks import library, network
from bnsharp.experiments.run import TRAINED, load_data, read_run
from bnsharp.experiments.weights import READERS, fit_weights, read_weights, require_finite
from bnsharp.modes import measuring


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
    weights: str = TRAINED,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Open what a user names, and see that the network takes the data.

    Args:
        source: a run folder; a run's checkpoint (beside its ``config.json``); any file of weights
            (:func:`bnsharp.experiments.weights.read_weights`), with ``model``; or ``torchvision:NAME`` or
            ``timm:NAME``, the library's own network with untrained weights drawn from ``seed``.
        data, data_options: a data set or image folder; a run's own by default.
        model, model_options: the network that a file of weights holds: one of :data:`bnsharp.models.MODELS`,
            ``torchvision:NAME`` or ``timm:NAME``, built with as many outputs as the data has classes.
        seed: of untrained weights and of the data's split.
        weights: ``"trained"``, or the name of an average that a run kept: ``"ema"``.
        progress: called with images decoded so far and their total.

    Raises:
        InputError: nothing there; data or model missing or unknown; weights that are damaged, hold code, do not fit
            the network or are not finite; a network that does not take the data, or has fewer outputs than classes.
    """
    if seed > LARGEST_SEED:
        raise InputError(f"seed={seed}; expected at most {LARGEST_SEED}")
    opened = _open(source, data, data_options, model, model_options or {}, seed, weights, progress)
    require_finite(opened.module.state_dict(), source)
    _require_fit(opened)
    return opened


def _open(
    source: str, data: str | None, data_options: dict[str, Any] | None, model: str | None,
    model_options: dict[str, Any], seed: int, weights: str, progress: Callable[[int, int], None] | None,
) -> Source:
    def read(seed: int = seed) -> ImageData:
        if data is None:
            raise InputError(f"{source!r} says nothing of its data; expected --data NAME or --data FOLDER")
        return load_data(make_config({"data": data, "data_options": data_options or {}, "seed": seed}), progress)

    path, untrained = Path(source), library(source)
    if model is not None and (untrained or path.is_dir()):
        raise InputError(f"{source} says itself what network it is; expected no --model beside it (got {model!r})")
    own_run = not untrained and (path.is_dir() or (path.is_file() and _is_checkpoint(path) and model is None))
    if weights != TRAINED and not own_run:
        raise InputError(f"weights={weights!r} of {source}, which is no run; expected {TRAINED!r}: leave it out")
    if untrained:
        images = read()
        return Source(untrained(seed, model_options), images)
    if own_run and model_options:
        raise InputError(f"{source} says itself how its network is built; expected no options of it beside it "
                         f"(got {', '.join(model_options)})")
    if own_run:
        folder = path.is_dir()
        config, module, own = read_run(path if folder else path.parent, None if folder else path, weights)
        return Source(module, own if data is None else read(config.split_seed))
    if not path.is_file():
        raise InputError(f"{source!r}: expected a run folder, a checkpoint, torchvision:NAME or timm:NAME")
    if model is None:
        raise InputError(f"{source} says nothing of its network; expected --model NAME to say what network it holds")
    make = network(model)
    tensors = read_weights(path)
    images = read()
    module = make(images, seed, model_options)
    fit_weights(module, tensors, source)
    return Source(module, images)


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is one that a run wrote: beside its configuration, and no other program's format."""
    return (path.parent / CONFIG).is_file() and path.suffix.lower() not in READERS


def _require_fit(source: Source) -> None:
    """Raise :class:`InputError` unless two images go through the network and come out as logits of every class."""
    module, data = source.module, source.data
    images = data.normalize(data.train_images[:2])
    try:
        with torch.no_grad(), measuring(module, "running"):
            output = module(images.to(next(module.parameters()).device))
    except Exception as error:  # foreign networks refuse inputs in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"{type(module).__name__} does not take {data.name}'s inputs of shape {data.input_shape} ({reason}); "
            "expected a network for such images: choose another, or resize the data"
        ) from error
    shape = list(getattr(output, "shape", ()))
    if len(shape) != 2 or shape[1] < len(data.classes):
        got = f"outputs of shape {shape}" if shape else f"a {type(output).__name__}"
        raise InputError(
            f"{type(module).__name__} gives {got} for two images of {data.name}, which has {len(data.classes)} "
            f"classes; expected logits [2, {len(data.classes)}] or more: choose a classifier with enough outputs"
        )
