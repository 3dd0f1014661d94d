"""What is recorded of a network between epochs: evaluations, also under averages, and trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.errors import InputError
from bnsharp.objective import arguments, batch_size
from bnsharp.types import Average, State, Tracker, TrackingContext

Criterion = Callable[[Any, Any], Tensor]
Evaluation = Callable[[nn.Module], dict[str, float]]


def accuracy(output: Any, y: Any) -> Tensor:
    """Fraction of correct classes; NaN where the output is not ``[n, classes]`` scores."""
    if not all(isinstance(a, Tensor) for a in (output, y)) or output.ndim != 2 or y.ndim != 1:
        return torch.full((), float("nan"))
    return (output.argmax(1) == y).double().mean()


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Every module is in training or evaluation mode afterwards as it was before."""
    before = {m: m.training for m in module.modules()}
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


def evaluate(module: nn.Module, criterion: Criterion, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """Mean loss and accuracy over batches with running statistics, each example weighted equally."""
    with modes_kept(module), torch.no_grad():
        module.eval()
        loss = correct = torch.zeros((), dtype=torch.float64)
        n = 0
        for x, y in batches:
            args, kwargs = arguments(x)
            output, size = module(*args, **kwargs), batch_size(x)
            loss = loss + size * criterion(output, y).double().cpu()
            correct = correct + size * accuracy(output, y).cpu()
            n += size
    if not n:
        raise InputError("evaluation got no batch; expected at least one")
    return {"loss": float(loss / n), "accuracy": float(correct / n)}


def evaluated(
    module: nn.Module, evaluations: Mapping[str, Evaluation], averages: Mapping[str, Average],
    states: Mapping[str, State], record: dict[str, Any],
) -> float:
    """Add every evaluation to ``record`` as ``name_metric``, and under each average as ``average_name_metric``.

    Returns the seconds that it took.

    Raises:
        InputError: two things of one name.
    """
    started = time.perf_counter()

    def run(prefix: str) -> None:
        for name, measure in evaluations.items():
            found = {f"{prefix}{name}_{key}": value for key, value in measure(module).items()}
            _merge(record, found, f"evaluation {prefix}{name}")

    run("")
    for name, average in averages.items():
        with average.applied(module, states[name]):
            run(f"{name}_")
    return time.perf_counter() - started


def tracked(
    module: nn.Module, trackers: Mapping[str, Tracker], seed: int, context: TrackingContext, record: dict[str, Any]
) -> float:
    """Add what every tracker finds to ``record``; each has a generator of its own for this epoch.

    Returns the seconds that it took.

    Raises:
        InputError: two things of one name.
    """
    started = time.perf_counter()
    for place, (name, tracker) in enumerate(trackers.items()):
        generator = P.seeded(randomness.stream(seed, context.epoch, place), context.generator.device)
        found = tracker(module, replace(context, generator=generator, record=dict(record)))
        _merge(record, found, f"tracker {name!r}")
    return time.perf_counter() - started


def _merge(record: dict[str, Any], found: Mapping[str, Any], who: str) -> None:
    taken = sorted(record.keys() & found.keys())
    if taken:
        raise InputError(f"{who} gives {taken[0]!r}, which the epoch's record holds already; expected another name")
    record.update(found)
