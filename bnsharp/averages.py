"""Other parameters and other running statistics than training's own, for an evaluation: averages, re-estimation.

An average has three parts: ``init(module) -> State``, ``update(module, state, step) -> State`` after each training
step, and the context ``applied(module, state)`` in which the module *is* the average. What the module held comes back
after the context, the same tensors, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnsharp import params as P
from bnsharp.checks import positive
from bnsharp.errors import InputError
from bnsharp.objective import arguments
from bnsharp.types import State

_COUNT, _PARAMETER, _BUFFER = "count", "parameter:", "buffer:"


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of the parameters, ``Σ_{k≤t} d^{t−k} θ_k / Σ_{k≤t} d^{t−k}``, θ_k after step k.

    ``s_t = s_{t−1} + (1 − d)/(1 − d^t)·(θ_t − s_{t−1})``: the initial weights have no share, so that the average needs
    no warm-up (the correction of Kingma & Ba 2015, arXiv:1412.6980, section 3; the average of Polyak & Juditsky 1992 is
    its limit d → 1). Normalizers' running statistics are averaged with the same weights, which costs no pass over the
    data; around :meth:`applied`, :func:`reestimated` replaces them by those of the averaged network. Low-precision
    parameters are averaged in float32.

    Args:
        decay: d, the weight of the past, in (0, 1).

    Raises:
        InputError: a decay outside (0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        positive("ema", self.decay)
        if self.decay >= 1:
            raise InputError(f"ema={self.decay!r}; expected a decay between 0 and 1, as in ema=0.99")

    def init(self, module: nn.Module) -> State:
        """The state before the first step; its averages have no weight yet."""
        start = {k: _wide(t).clone() for k, t in _averaged(module).items()}
        return {_COUNT: torch.zeros((), dtype=torch.int64), **start}

    def update(self, module: nn.Module, state: State, step: int = 0) -> State:
        """The state after one more training step. ``step`` is not needed: the state counts."""
        count = int(state[_COUNT]) + 1
        share = (1 - self.decay) / (1 - self.decay**count)
        # the first share is 1, and 0·old + 1·new would keep a non-finite old
        averaged = {
            k: _wide(t).clone() if count == 1 else torch.lerp(state[k], _wide(t), share)
            for k, t in _averaged(module).items()
        }
        return {_COUNT: torch.tensor(count), **averaged}

    @contextmanager
    def applied(self, module: nn.Module, state: State) -> Iterator[None]:
        """The module with the averaged parameters and running statistics.

        Raises:
            InputError: a state that was made for another module.
        """
        own = _averaged(module)
        if set(own) != set(state) - {_COUNT}:
            odd = sorted(set(own) ^ (set(state) - {_COUNT}))[:3]
            raise InputError(f"an average of another network ({odd} differ); expected that of {type(module).__name__}")
        with ExitStack() as stack:
            for key, tensor in own.items():
                stack.callback(setattr, tensor, "data", tensor.data)
                tensor.data = state[key].to(tensor)
            yield


@contextmanager
def reestimated(module: nn.Module, batches: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """The module with running statistics rebuilt over ``batches``, as cumulative means of the batches' statistics.

    ``mean ← mean + (batch mean − mean)/k`` at batch k, and so the variance (unbiased, as PyTorch keeps it): every batch
    counts alike. Meanwhile normalizers use the statistics of the batch, as in training, and everything else is in eval
    mode (Izmailov et al. 2018, arXiv:1803.05407, section 3.2). Modes, momenta and the former statistics, the
    same tensors, come back after the context.

    Raises:
        InputError: no running statistics, a home-made normalizer (its update is its own), no batch.
    """
    module = P.unwrap(module)
    owners = [m for m in module.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    foreign = next((m for m in owners if not isinstance(m, _NormBase)), None)
    if not owners or foreign is not None:
        got = "no running statistics" if foreign is None else f"running statistics of a {type(foreign).__name__}"
        raise InputError(f"{type(module).__name__} has {got}; expected torch's own normalizers to re-estimate")
    norms = [m for m in owners if isinstance(m, _NormBase)]
    with ExitStack() as stack:
        for m in module.modules():
            stack.callback(setattr, m, "training", m.training)
            m.training = m in owners
        for m in norms:
            stack.callback(setattr, m, "momentum", m.momentum)
            for name, value in list(m._buffers.items()):
                stack.callback(m._buffers.__setitem__, name, value)
                m._buffers[name] = None if value is None else value.clone()
            m.reset_running_stats()
        with torch.no_grad():
            k = 0
            for k, (x, _) in enumerate(batches, start=1):
                for m in norms:
                    m.momentum = 1 / k
                args, kwargs = arguments(x)
                module(*args, **kwargs)
        if not k:
            raise InputError("re-estimating running statistics got no batch; expected at least one")
        module.eval()
        yield


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics that :func:`reestimated` can rebuild."""
    return any(isinstance(m, _NormBase) and m.running_mean is not None for m in module.modules())


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged: the parameters that are trained, and the floating buffers of normalizers."""
    module = P.unwrap(module)
    statistics = {
        f"{_BUFFER}{prefix}.{k}" if prefix else f"{_BUFFER}{k}": b
        for prefix, m in module.named_modules()
        if isinstance(getattr(m, "running_mean", None), Tensor)
        for k, b in m.named_buffers(recurse=False)
        if b.is_floating_point()
    }
    return {f"{_PARAMETER}{k}": p for k, p in P.trainable(module)} | statistics


def _wide(tensor: Tensor) -> Tensor:
    """Detached, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
