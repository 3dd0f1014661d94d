"""Several runs of one network, apart only in their seeds, trained at once.

Their networks are stacked (:mod:`bnsharp.stacked`), so that one pass gives every run its loss and gradient. Each run's
regularised step is the single run's own code: the runs' steps go side by side (:mod:`bnsharp.lockstep`), and what they
evaluate at the same time is evaluated together. So every regulariser works, those with random draws and branches of
their own too, and the numbers are those of single runs up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.companions import aligned, check_batches, check_together
from bnsharp.errors import DivergedError, InputError
from bnsharp.lockstep import Lockstep
from bnsharp.loopstate import LoopState, check_finite, drawn
from bnsharp.observing import accuracy, modes_kept
from bnsharp.shared_passes import Answer, Passes, Request, SharedObjective
from bnsharp.stacked import Stack
from bnsharp.stacked_optimizers import StackedOptimizer
from bnsharp.stopping import StopRequest
from bnsharp.trainer import Batch, Result, Trainer
from bnsharp.types import Step

Outcome = Result | DivergedError


@dataclass
class Run:
    """One of the runs: its trainer, and what of an epoch under way is its own."""

    trainer: Trainer
    history: list[dict[str, Any]]
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    others: Iterator[Batch] = field(default_factory=lambda: iter(()))

    @property
    def state(self) -> LoopState:
        return self.trainer._run

    def begin(self, lr: float) -> None:
        """Draw an epoch's batches."""
        self.batches, self.others = drawn(self.state, self.trainer.epoch, self.trainer.other_batches, lr)


class Together:
    """Trains what several :class:`bnsharp.Trainer` would train, at once: the same numbers, up to rounding.

    Each run draws its own batches, directions and noise from its own seed, keeps its own records, averages, trackers,
    checkpoints and folder, and is evaluated by its own network. One run that diverges ends alone.
    A group that was stopped or killed goes on with ``resume=True`` in all its trainers, from the last point at which
    all of them have a checkpoint, and writes the same bytes as one that was not; where some diverged, up to rounding.
    ``train_seconds`` of a run is its share of the group's time.

    Args:
        trainers: made but not run; equal but for module, data, folder and seed, see
            :func:`bnsharp.companions.check_together`.

    Raises:
        InputError: trainers that cannot run together (at once, or at the first step by
            :func:`bnsharp.companions.check_batches`), or what :meth:`bnsharp.Trainer.fit` raises of its settings.
        StorageError, Interrupted, Terminated: as from a single trainer; every run's last checkpoint is kept.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        check_together(trainers)
        self.trainers = list(trainers)
        self._outcomes: dict[int, Outcome] = {}
        self._checked = False

    def fit(self) -> list[Outcome]:
        """Train to the last epoch: for each trainer its :class:`bnsharp.trainer.Result`, or how it diverged."""
        with ExitStack() as stack:
            self._stop = stack.enter_context(StopRequest())
            for trainer in self.trainers:
                if trainer.folder is not None:
                    stack.enter_context(trainer.folder.locked())
            device = P.first(self.trainers[0].params).device
            stack.enter_context(randomness.seeded(self.trainers[0].seed, device))
            for trainer in self.trainers:
                stack.enter_context(modes_kept(trainer.module))
            for group in aligned(self.trainers):
                self._fit(group, device)
        return [self._outcomes[i] for i in range(len(self.trainers))]

    def _fit(self, trainers: Sequence[Trainer], device: torch.device) -> None:
        """Train those that are at one point."""
        self._runs = [self._start(trainer, device) for trainer in trainers]
        with ExitStack() as stack:
            self._lockstep = stack.enter_context(Lockstep(len(self._runs)))
            stack.callback(self._disband)
            self._gather()
            while self._runs and self._runs[0].state.epoch < self._runs[0].trainer.epochs:
                self._epoch()
            for run in self._runs:
                if not run.history:
                    raise InputError("nothing was trained: no epoch left")
                self._outcomes[self._place(run)] = Result(run.history[-1], run.history, run.state.steps)

    def _start(self, trainer: Trainer, device: torch.device) -> Run:
        averages = {name: average.init(trainer.module) for name, average in trainer.averages.items()}
        trainer._run = LoopState.new(trainer.seed, device, trainer.regularizer(0).init(trainer.params), averages)
        trainer._kept, trainer._writes = None, trainer.folder is not None
        trainer._stop = StopRequest()  # signals are this object's
        history = trainer._restore()
        trainer._begun = True
        return Run(trainer, history)

    def _place(self, run: Run) -> int:
        return next(i for i, trainer in enumerate(self.trainers) if trainer is run.trainer)

    # ------------------------------------------------------------ stacking

    def _gather(self) -> None:
        """Stack networks and optimizers."""
        trainers = [run.trainer for run in self._runs]
        self._stack = Stack([t.module for t in trainers])
        for trainer in trainers:
            trainer.params = P.live(trainer.module)
        self._passes = Passes(self._stack, trainers[0].criterion)
        self._optimizer = StackedOptimizer(
            [t.optimizer for t in trainers], [t.scheduler for t in trainers],
            [{id(p): k for k, p in P.trainable(t.module)} for t in trainers], self._stack.parameters,
        )

    def _disband(self) -> None:
        """Every run has tensors of its own again."""
        self._optimizer.scatter()
        self._stack.release()
        for run in self._runs:
            run.trainer.params = P.live(run.trainer.module)

    def _leave(self, failed: dict[int, DivergedError]) -> None:
        """Runs that diverged end; the others are stacked anew."""
        self._disband()
        for i, error in failed.items():
            self._outcomes[self._place(self._runs[i])] = error
        self._runs = [run for i, run in enumerate(self._runs) if i not in failed]
        if self._runs:
            self._gather()

    # ------------------------------------------------------------ an epoch

    def _epoch(self) -> None:
        started = time.perf_counter() - sum(run.state.seconds for run in self._runs)
        trainers = [run.trainer for run in self._runs]
        self._stack.network.train()
        for run in self._runs:
            run.trainer.module.train()
            run.begin(self._optimizer.lr)
        epoch = self._runs[0].state.epoch
        self._regularizers = {id(t): (t.regularizer(epoch), t.weight(epoch)) for t in trainers}
        while self._runs and self._step():
            self._rest(started)
        seconds = (time.perf_counter() - started) / max(1, len(self._runs))
        self._end(seconds)

    def _step(self) -> bool:
        """One step of every run; False where the epoch has no batch left."""
        found = [next(run.batches, None) for run in self._runs]
        batches = [batch for batch in found if batch is not None]
        if len(batches) < len(found):
            if batches:
                raise InputError("epochs of different lengths in runs together; expected as many batches in each")
            return False
        if not self._checked:
            self._check(batches)
        self._passes.begin()
        objectives = [self._objectives(i, run, batches[i]) for i, run in enumerate(self._runs)]
        calls = [self._call(run, own) for run, own in zip(self._runs, objectives, strict=True)]
        steps: list[Step] = self._lockstep.run(calls, self._passes)
        gradient = self._gradient(steps)
        norms = _norms(gradient)
        values = self._numbers(steps, norms, [own[0].output for own in objectives], [y for _, y in batches])
        failed = {i: error for i, run in enumerate(self._runs) if (error := _diverged(values[i], run)) is not None}
        if failed:
            kept = [i for i in range(len(self._runs)) if i not in failed]
            self._leave(failed)
            steps, values, batches = [steps[i] for i in kept], [values[i] for i in kept], [batches[i] for i in kept]
            gradient, norms = {k: g[kept] for k, g in gradient.items()}, norms[kept]
        if self._runs:
            self._descend(gradient, norms)
        for run, step, own, batch in zip(self._runs, steps, values, batches, strict=True):
            run.trainer._count(step, own, batch)
            if run.trainer.on_step is not None:
                run.trainer.on_step(run.state.epoch, run.state.sums.steps - 1)
        return True

    def _check(self, batches: list[Batch]) -> None:
        self._disband()
        check_batches([run.trainer for run in self._runs], batches)
        self._gather()
        self._stack.network.train()
        self._checked = True

    def _objectives(self, place: int, run: Run, batch: Batch) -> list[SharedObjective]:
        """The loss's batch, and fresh ones for the regulariser."""
        trainer = run.trainer

        def ask(request: Request) -> Answer:
            answer: Answer = self._lockstep.ask(place, request)
            return answer

        rest = [next(run.others) for _ in range(trainer.other_batches)]
        return [
            SharedObjective(ask, trainer.module, trainer.criterion, trainer.params, b, updating=not i)
            for i, b in enumerate(chain([batch], rest))
        ]

    def _call(self, run: Run, objectives: list[SharedObjective]) -> Callable[[], Step]:
        regularizer, weight = self._regularizers[id(run.trainer)]
        return lambda: regularizer.step(
            objectives, run.trainer.params, weight=weight, state=run.state.regularizer,
            generator=run.state.generators["directions"],
        )

    def _gradient(self, steps: list[Step]) -> dict[str, Tensor]:
        """What to descend, ``[n, …]`` by name: the last pass's own where the steps return it as it is."""
        answered = self._passes.answered
        if len(answered) == len(steps) and all(
            step.gradient is answer.gradient for step, answer in zip(steps, answered, strict=True)
        ):
            return self._passes.gradient
        rows = [dict(step.gradient.items()) for step in steps]
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

    def _numbers(
        self, steps: list[Step], norms: Tensor, outputs: list[Any], targets: list[Any]
    ) -> list[dict[str, float]]:
        """What :func:`bnsharp.loopstate.numbers` gives of every step: one synchronisation for all."""
        columns = {
            "loss": torch.stack([step.loss for step in steps]), "norm": norms,
            "penalty": torch.stack([step.penalty for step in steps]),
            "ratio": torch.stack([step.ratio for step in steps]),
            "accuracy": _accuracies(torch.stack(outputs), torch.stack(targets)),
        }
        rows = torch.stack([column.double() for column in columns.values()], 1).tolist()
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _descend(self, gradient: dict[str, Tensor], norms: Tensor) -> None:
        """The optimizer's step and the schedule's; no run's gradient is longer than ``max_norm``."""
        trainer = self._runs[0].trainer
        if trainer.max_norm is not None:
            factors = (trainer.max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
            gradient = {k: g * factors.reshape(-1, *[1] * (g.ndim - 1)) for k, g in gradient.items()}
        for name, parameter in self._stack.parameters.items():
            parameter.grad = gradient[name]
        self._optimizer.step()

    # ------------------------------------------------------------ between steps, after an epoch

    def _rest(self, started: float) -> None:
        if not self._runs:
            return
        state, every = self._runs[0].state, self._runs[0].trainer.checkpoint_steps
        asked = self._stop.asked(lambda value: [value])
        if asked or (every is not None and state.steps % every == 0):
            for run in self._runs:
                run.state.seconds = (time.perf_counter() - started) / len(self._runs)
            self._save()
        if asked:
            raise self._stopped()

    def _save(self) -> None:
        self._optimizer.scatter()
        with _compact(self._runs):
            for run in self._runs:
                run.trainer._save()
        self._optimizer.gather()

    def _stopped(self) -> BaseException:
        return self._stop.error(f"{len(self._runs)} runs stopped after {self._runs[0].state.where}; that state is kept "
                                "in their folders, where they have some")

    def _end(self, seconds: float) -> None:
        """Records, evaluations, checkpoints of every run."""
        made: list[tuple[Run, dict[str, Any], dict[str, Any]]] = []
        failed: dict[int, DivergedError] = {}
        for i, run in enumerate(self._runs):
            try:
                made.append((run, _record(run, self._regularizers[id(run.trainer)][1]), {}))
            except DivergedError as error:
                failed[i] = error
        if failed:
            self._leave(failed)
        if not self._runs:
            return
        self._optimizer.scatter()
        with _compact(self._runs):
            for run, record, timing in made:
                timing.update(epoch=record["epoch"], train_seconds=seconds)
                run.trainer._observe(record, timing)
                run.history.append(record)
                run.state.end()
                run.trainer._keep(record, timing)
            asked = self._stop.asked(lambda value: [value])
            if asked:
                for run in self._runs:
                    run.trainer._save()
        self._optimizer.gather()
        if asked:
            raise self._stopped()


def _record(run: Run, weight: float) -> dict[str, Any]:
    """An epoch's record, as the trainer makes it."""
    state, trainer = run.state, run.trainer
    if not state.sums.steps:
        raise InputError("an epoch holds no batch; expected at least one: is the batch size too large?")
    size = float(P.norm(trainer.params))
    if size != size or size == float("inf"):
        raise DivergedError(f"parameters are not finite after epoch {state.epoch + 1}; expected finite values: lower "
                            f"the learning rate or the perturbation{trainer._keeping}")
    return {"epoch": state.epoch + 1, "steps": state.steps, "lr": state.lr, "weight": weight, **state.sums.means(),
            "gradient_evaluations": state.gradients, "parameter_norm": size}


class _compact:
    """Within, a network's state dictionary holds tensors of its own: a view would be stored with the whole stack."""

    def __init__(self, runs: Sequence[Run]):
        self._modules = [run.trainer.module for run in runs]

    def __enter__(self) -> None:
        def copied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
            if not prefix:
                state.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})

        self._handles = [module.register_state_dict_post_hook(copied) for module in self._modules]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _diverged(values: Mapping[str, float], run: Run) -> DivergedError | None:
    try:
        check_finite(values, run.state, run.trainer._keeping)
    except DivergedError as error:
        return error
    return None


def _accuracies(outputs: Tensor, y: Tensor) -> Tensor:
    """:func:`bnsharp.observing.accuracy` of every run ``[n]``."""
    if outputs.ndim == 3 and y.ndim == 2:
        return (outputs.argmax(2) == y).double().mean(1)
    return torch.stack([accuracy(*each) for each in zip(outputs, y, strict=True)])


def _norms(gradient: Mapping[str, Tensor]) -> Tensor:
    """``‖g_i‖`` over all parameters ``[n]``."""
    parts = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradient.values()]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)
