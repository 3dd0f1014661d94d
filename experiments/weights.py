"""Weights from a file: read without running code, unwrapped, and fitted to a network or refused with their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp import checkpoint
from bnsharp.errors import InputError
from bnsharp.experiments.run import load_state

WRAPPERS = ("module", "state_dict", "model", "model_state_dict")
"""Keys under which training programs keep a network's tensors beside other things, in the order they are tried."""

_COUNTER = "num_batches_tracked"
"""A normalizer's count of training batches: no output depends on it, and some programs leave it out."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: ``.safetensors``, or whatever ``torch.save`` wrote of plain tensors.

    A state dictionary may lie inside another dictionary, under one of :data:`WRAPPERS`, at any depth. Code is never
    unpickled.

    Raises:
        InputError: a missing, truncated or foreign file, a pickle of code, the package safetensors missing where it
            is needed, no dictionary of named tensors inside.
    """
    payload = READERS.get(path.suffix.lower(), checkpoint.load)(path)
    while (inner := next((payload[k] for k in WRAPPERS if isinstance(payload.get(k), Mapping)), None)) is not None:
        payload = inner
    wrong = next((k for k, v in payload.items() if not (isinstance(k, str) and isinstance(v, Tensor))), None)
    if wrong is not None:
        raise InputError(
            f"{path} holds a {type(payload[wrong]).__name__} under {wrong!r}; expected a dictionary of named tensors, "
            f"or one under {', '.join(map(repr, WRAPPERS))}: save module.state_dict()"
        )
    if not payload:
        raise InputError(f"{path} holds no tensor; expected a network's state dictionary: save module.state_dict()")
    return dict(payload)


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load ``weights`` into ``module``, which stays as it was if they do not fit.

    What all keys have in front and the network's do not (``module.`` of data-parallel training, ``_orig_mod.`` of
    ``torch.compile``) is stripped; counts of batches that are missing are the network's own.

    Raises:
        InputError: keys missing, unknown or of other shapes; NaN or infinite values; sparse or quantized tensors.
    """
    own = module.state_dict()
    state = {k: v for k, v in own.items() if k.rpartition(".")[2] == _COUNTER} | dict(_without_prefix(weights, own))
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise InputError(f"{where} has a sparse, quantized, complex or empty tensor {name!r}; expected plain ones")
    require_finite(state, where)
    load_state(module, state, where)


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise :class:`InputError` unless every value is finite: NaN in one weight makes every measure NaN."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise InputError(
                f"{where} has NaN or infinite values in {name!r} ({count} of {value.numel()}); expected finite "
                "weights: take a checkpoint from before training diverged"
            )


def _without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Leading name components that all keys share, taken off until a key is the network's; else nothing is."""
    stripped = weights
    while not stripped.keys() & own.keys():
        parts = [key.partition(".") for key in stripped]
        if len({head for head, _, _ in parts}) != 1 or not all(rest for _, _, rest in parts):
            return weights
        stripped = {rest: value for (_, _, rest), value in zip(parts, stripped.values(), strict=True)}
    return stripped


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors; install bnsharp[safetensors]") from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {path}; expected a file of weights") from error
    except Exception as error:  # a foreign file can fail in any way inside the reader
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is not a safetensors file ({reason}); expected one written by safetensors") from error


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {".safetensors": _read_safetensors}
"""How files of a suffix are read; every other file as one of ``torch.save``."""
