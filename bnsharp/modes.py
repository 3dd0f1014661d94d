"""Context managers that switch a live module for an evaluation and put everything back.

Scale invariance ``L(T_a θ) = L(θ)`` holds with the statistics of the batch and with a negligible ε (with
``y = (x − mean)/√(var + ε)`` it breaks by ``O(ε/(a²·var))``); running statistics must not move while a loss is
only being measured. Every change is undone in a ``finally``, in reverse order, so that the contexts nest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import checkpoint as checkpointing

from bnsharp.errors import InputError
from bnsharp.params import unwrap
from bnsharp.structure import Structure, owns_statistics

NEGLIGIBLE_EPS = 1e-30
"""A normalizer's ε that changes nothing: torch refuses 0 in training mode and accepts this, in float32 too."""

_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
_RUNNING_NAMES = ("running_mean", "running_var", "num_batches_tracked")
_MISSING = object()

_hidden: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""Running statistics that a context has switched off, for an inner context that wants them."""


class Undo:
    """Entries of dictionaries and training flags that were changed, undone last first."""

    def __init__(self) -> None:
        self._entries: list[tuple[MutableMapping[Any, Any], Any, Any]] = []
        self._flags: list[tuple[nn.Module, bool]] = []

    def put(self, store: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        # a scripted module's dictionaries have no get
        self._entries.append((store, key, store[key] if key in store else _MISSING))  # noqa: SIM401
        store[key] = value

    def train(self, module: nn.Module, mode: bool) -> None:
        if module.training != mode:
            self._flags.append((module, module.training))
            module.training = mode

    def undo(self) -> None:
        for store, key, value in reversed(self._entries):
            if value is _MISSING:
                store.pop(key, None)
            else:
                store[key] = value
        for module, mode in self._flags:
            module.training = mode
        self._entries.clear()
        self._flags.clear()


@contextmanager
def measuring(module: nn.Module, statistics: str = "batch") -> Iterator[None]:
    """Measure with the module: nothing random, nothing updated.

    The root and all submodules are in eval mode, and checkpointed layers keep their activations. With ``"batch"``, the
    modules that own a ``running_mean`` are in train mode with their tracking switched off: they normalize with the
    statistics of the batch. With ``"running"`` they normalize with their running statistics.

    Raises:
        InputError: if ``statistics`` is neither.
    """
    if statistics not in ("batch", "running"):
        raise InputError(f'statistics={statistics!r}; expected "batch" or "running"')
    undo = Undo()
    try:
        _keep_activations(undo)
        for m in unwrap(module).modules():
            owner = owns_statistics(m)
            undo.train(m, owner and statistics == "batch")
            if owner and statistics == "batch":
                _switch_off(m, undo)
            elif owner and m in _hidden:
                for name, value in _hidden[m].items():
                    undo.put(m._buffers, name, value)
        yield
    finally:
        undo.undo()


@contextmanager
def kept_activations() -> Iterator[None]:
    """Checkpointed layers keep their activations.

    They would repeat their forward pass inside the backward pass, when the module has other parameters and modes again,
    and give the derivatives of another function without a word.
    """
    undo = Undo()
    try:
        _keep_activations(undo)
        yield
    finally:
        undo.undo()


def _keep_activations(undo: Undo) -> None:
    """``torch.utils.checkpoint.checkpoint``, by whatever name it was imported, calls its function and no more."""
    names = vars(checkpointing)
    undo.put(names, "CheckpointFunction", _Direct)
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
        if name in names:  # by version of PyTorch
            undo.put(names, name, _nothing_around)


class _Direct:
    """In the place of the reentrant checkpoint's function."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what the other checkpoint does before and after its function."""
    yield


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Training flags stay as they are, but evaluations do not change running statistics."""
    undo = Undo()
    try:
        freeze(unwrap(module).modules(), undo)
        yield
    finally:
        undo.undo()


def freeze(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Evaluations do not change the running statistics of these modules until ``undo``."""
    for m in modules:
        if m.training and owns_statistics(m):
            _switch_off(m, undo)


def spare(owners: Iterable[nn.Module], undo: Undo) -> None:
    """Running statistics are copies until ``undo``: a forward pass repeated in a backward pass (checkpointing) moves
    these."""
    for m in owners:
        buffers = m._buffers
        if m.training and "running_mean" in buffers and buffers["running_mean"] is not None:
            for name, b in buffers.items():
                if b is not None:
                    undo.put(buffers, name, b.clone())


def hold(structure: Structure, tensors: Mapping[str, Tensor], undo: Undo) -> None:
    """The module's parameters are ``tensors``, wherever each of them is used (tied weights), until ``undo``."""
    for name, tensor in tensors.items():
        for store, key in structure.places(name):
            undo.put(store, key, tensor)


@contextmanager
def exact_norms(module: nn.Module) -> Iterator[None]:
    """Every normalizer's ε negligible: attributes ``eps``, ``epsilon``, ``variance_epsilon`` that are floats.

    ``eps=None`` of :class:`torch.nn.RMSNorm` means machine epsilon and is replaced as well. An ε written as a
    number inside a ``forward`` cannot be reached.
    """
    undo = Undo()
    try:
        for m in unwrap(module).modules():
            for name in _EPS_NAMES:
                value = m.__dict__.get(name, _MISSING)
                if value is _MISSING:
                    value = getattr(type(m), name, _MISSING)
                if isinstance(value, float) or (value is None and isinstance(m, nn.RMSNorm)):
                    undo.put(m.__dict__, name, NEGLIGIBLE_EPS)
        yield
    finally:
        undo.undo()


@contextmanager
def math_attention() -> Iterator[None]:
    """Attention by its formula: the fused kernels have no double backward, the fused layer no derivative at all."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Everything that makes a network a deterministic, differentiable function with negligible ε; all is put back."""
    devices = {p.device for p in module.parameters()}
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), untouched(module)):
            stack.enter_context(context)
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        for device_type in {d.type for d in devices}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        for context in (measuring(module, "batch"), exact_norms(module), math_attention()):
            stack.enter_context(context)
        yield


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Attributes that a forward pass leaves on a module (caches, recomputed weights) are put back."""
    saved = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in saved:
            for name in m.__dict__.keys() - attributes.keys():
                del m.__dict__[name]
            m.__dict__.update(attributes)


def _switch_off(module: nn.Module, undo: Undo) -> None:
    """Running statistics None for torch's own normalizers, clones for a home-made one (which would crash)."""
    if isinstance(module, _NormBase):
        if module not in _hidden:
            undo.put(_hidden, module, {k: module._buffers[k] for k in _RUNNING_NAMES if k in module._buffers})
        for name in _RUNNING_NAMES:
            if module._buffers.get(name) is not None:
                undo.put(module._buffers, name, None)
        return
    for store in (module._buffers, module.__dict__):
        for name, value in list(store.items()):
            if isinstance(value, Tensor):
                undo.put(store, name, value.clone())
            elif isinstance(value, int | float) and name != "training":
                undo.put(store, name, value)
