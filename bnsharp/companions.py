"""Which trainers can run together (:mod:`bnsharp.together`), and from where they go on after an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.checkpoint import CHECKPOINT, PREVIOUS, RunFolder, load
from bnsharp.errors import InputError
from bnsharp.objective import differ, random_states
from bnsharp.observing import modes_kept
from bnsharp.shared_passes import Answer, Passes, Request
from bnsharp.stacked import Stack, check_stackable
from bnsharp.stacked_optimizers import check_elementwise
from bnsharp.trainer import Batch, Trainer
from bnsharp.training_objective import TrainingObjective
from bnsharp.types import Params

SAMPLED = (*range(32), *(2**k for k in range(5, 21)))
"""Steps at which schedules that are functions are compared."""


def check_together(trainers: Sequence[Trainer]) -> None:
    """Raise :class:`InputError` unless these trainers can run together, as far as can be told without a batch.

    Asked for are: networks of one structure without random layers (:func:`bnsharp.stacked.check_stackable`), an
    optimizer that treats coordinates alone, one process, no ``torch.compile``, equal settings but for the seed,
    those of optimizer and schedule among them.
    """
    if not trainers:
        raise InputError("no trainer was given; expected at least one")
    first = trainers[0]
    for trainer in trainers:
        check_elementwise(trainer.optimizer)
        if trainer.ranks.count > 1 or trainer.engine.name != "loop":
            raise InputError(f"{trainer.ranks.count} rank(s), engine={trainer.engine.name!r} for seeds together; "
                             "expected one process and engine='loop'")
        if P.unwrap(trainer.module) is not trainer.module:
            raise InputError("a compiled or wrapped network among seeds together; expected the bare module")
        for name in ("epochs", "max_norm", "other_batches", "checkpoint_every", "checkpoint_steps", "track_every"):
            ours, theirs = getattr(trainer, name), getattr(first, name)
            if ours != theirs:
                raise InputError(f"{name}={theirs!r} and {ours!r} in trainers together; expected equal settings")
    check_stackable([t.module for t in trainers])
    for trainer in trainers:
        _check_descent(first, trainer)


def _check_descent(first: Trainer, other: Trainer) -> None:
    """The first run's optimizer and schedule act for all: the others' have to be the same."""
    ours, theirs = _descent(first), _descent(other)
    for name in [*ours, *(k for k in theirs if k not in ours)]:
        a, b = ours.get(name), theirs.get(name)
        if a != b:
            shown = "" if name.startswith("schedule") else f" {a!r} and {b!r}"
            raise InputError(f"{name}{shown} differ in trainers together; expected equal settings: train them one "
                             "after the other")


def _descent(trainer: Trainer) -> dict[str, Any]:
    """What an optimizer and its schedule are, as values that can be compared."""
    names = {id(p): k for k, p in P.trainable(trainer.module)}
    found: dict[str, Any] = {"optimizers": type(trainer.optimizer).__name__}
    for i, group in enumerate(trainer.optimizer.param_groups):
        where = f"parameter group {i}: " if i else ""
        for key, value in group.items():
            if key != "params":
                found[f"{where}{key}"] = value.tolist() if isinstance(value, Tensor) else value
        found[f"{where}parameters"] = [names.get(id(p)) for p in group["params"]]
        if None in found[f"{where}parameters"]:
            raise InputError("an optimizer of parameters that its network lacks or holds fixed among seeds together; "
                             "expected the network's own that require grad: train the seeds one after the other")
    schedule = trainer.scheduler
    found["schedules"] = type(schedule).__name__
    settings = {k: v for k, v in schedule.state_dict().items() if not k.startswith("_")}
    return found | {f"schedules ({k})": v for k, v in settings.items()} | {"schedules (factors)": _factors(schedule)}


def _factors(schedule: LRScheduler) -> list[float | None]:
    """Of a schedule that is a function its values at many steps, None where it has none."""
    found: list[float | None] = []
    for function in getattr(schedule, "lr_lambdas", ()):
        for step in SAMPLED:
            try:
                found.append(float(function(step)))
            except (ArithmeticError, LookupError, ValueError):  # a schedule that has ended
                found.append(None)
    return found


def check_batches(trainers: Sequence[Trainer], batches: Sequence[Batch]) -> None:
    """Raise :class:`InputError` unless one pass of all networks gives what each gives alone, on its batch.

    A network that draws random numbers in training mode is refused, and one that couples examples in a layer of its
    own, a criterion that ``torch.func.vmap`` cannot take, an output that is no tensor. Nothing is changed.
    """
    for x, y in batches:
        if not isinstance(y, Tensor) or not isinstance(x, Tensor):
            raise InputError(f"a batch of {type(x).__name__} and {type(y).__name__}; expected tensors: train the "
                             "seeds one after the other")
    with ExitStack() as stack:
        for trainer in trainers:
            stack.enter_context(modes_kept(trainer.module))
            trainer.module.train()
        stack.enter_context(randomness.undisturbed(P.first(trainers[0].params).device))
        own = [P.live(t.module) for t in trainers]
        before = random_states(own[0])
        alone = [
            TrainingObjective(t.module, t.criterion, batch, update_statistics=False).value_and_grad(theta)
            for t, batch, theta in zip(trainers, batches, own, strict=True)
        ]
        if differ(before, random_states(own[0])):
            raise InputError(f"{type(trainers[0].module).__name__} draws random numbers in training mode (dropout?); "
                             "expected none: train its seeds one after the other")
        networks = Stack([t.module for t in trainers])
        stack.callback(networks.release)
        try:
            answers = Passes(networks, trainers[0].criterion)(
                {i: Request(None, *batch, False, True) for i, batch in enumerate(batches)}
            )
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise InputError(f"one pass of {len(trainers)} networks {type(trainers[0].module).__name__} fails "
                             f"({reason}); expected it to work: train the seeds one after the other") from error
    for (loss, gradient), i in zip(alone, sorted(answers), strict=True):
        _check_equal(loss, gradient, answers[i], type(trainers[i].module).__name__)


def _check_equal(loss: Tensor, gradient: Params, answer: Answer, what: str) -> None:
    assert answer.gradient is not None
    tolerance = 1e4 * torch.finfo(loss.dtype).eps
    off = P.norm(P.combine(1.0, gradient, -1.0, answer.gradient)) > tolerance * (1 + P.norm(gradient))
    if bool(off) or bool((loss - answer.loss).abs() > tolerance * (1 + loss.abs())):
        raise InputError(
            f"{what} has loss {float(loss):.6g} alone and {float(answer.loss):.6g} among others, or another gradient; "
            "expected examples that are coupled by batch normalization alone: train its seeds one after the other"
        )


def aligned(trainers: Sequence[Trainer]) -> list[list[Trainer]]:
    """Trainers in groups that go on from one point: all of them in one, unless some diverged before the others stopped.

    Of runs that were killed while their checkpoints were written those ahead drop the newest, so that the one before it
    counts.
    """
    points: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
    for i, trainer in enumerate(trainers):
        folder = trainer.folder if trainer.resume else None
        newest, previous = ((0, 0) if folder is None else _point(folder, name) for name in (CHECKPOINT, PREVIOUS))
        points[i] = newest, previous
    groups: list[list[Trainer]] = []
    while points:
        point = min(newest for newest, _ in points.values())
        members = [i for i, own in points.items() if point in own]
        for i in members:
            folder = trainers[i].folder
            if points.pop(i)[0] != point and folder is not None:
                _go_back(folder)
        groups.append([trainers[i] for i in members])
    return groups


def _point(folder: RunFolder, name: str) -> tuple[int, int]:
    """The epoch and step of a checkpoint; where there is none, before the first."""
    path = folder.path / name
    stored = load(path) if path.exists() else {}
    return stored.get("epoch", 0), stored.get("step", 0)


def _go_back(folder: RunFolder) -> None:
    if (folder.path / PREVIOUS).exists():
        (folder.path / PREVIOUS).replace(folder.path / CHECKPOINT)
    else:
        (folder.path / CHECKPOINT).unlink()
