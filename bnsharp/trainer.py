"""A generic regularised trainer: any regulariser, any ``torch.optim`` optimizer and scheduler.

It names no measure and no algorithm. What it writes per epoch does not depend on time or machine load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.checkpoint import METRICS, TIMING, RunFolder
from bnsharp.checks import one_of, positive, whole
from bnsharp.distributed import SINGLE, Ranks
from bnsharp.errors import DataError, DivergedError, InputError, RankLostError, StorageError
from bnsharp.evaluation import Engine
from bnsharp.loop import DIRECTIONS, backward
from bnsharp.loopstate import LoopState, check_finite, drawn, numbers
from bnsharp.objective import batch_size, check_parts
from bnsharp.observing import Criterion, Evaluation, accuracy, evaluate, evaluated, modes_kept, tracked
from bnsharp.regularizers import Plain, Regularizer, check_weight
from bnsharp.schedules import Schedule, constant
from bnsharp.stopping import StopRequest, lost_worker, release
from bnsharp.structure import Structure
from bnsharp.types import Average, Step, Tracker, TrackingContext

__all__ = ["Batch", "Criterion", "Epoch", "Evaluation", "Result", "Trainer", "accuracy", "evaluate"]

Batch = tuple[Any, Any]
Epoch = Callable[[torch.Generator], Iterable[Batch]]


@dataclass(frozen=True)
class Result:
    """What :meth:`Trainer.fit` returns: the last epoch's record, the records of all epochs, and the steps taken."""

    last: dict[str, Any]
    history: list[dict[str, Any]]
    steps: int


class Trainer:
    """Trains a module by ``optimizer`` on ``∇L + λ r``.

    While it runs, SIGINT (Ctrl-C) and SIGTERM stop it after the step under way, with a checkpoint; a second SIGINT
    stops it at once. A run that was stopped or killed and is resumed writes the same ``metrics.jsonl``, byte for byte,
    and ends with the same parameters as one that never was.

    Args:
        module: trained in place, in training mode (``module.train()`` before each epoch: layers that should stay in
            evaluation mode are kept there by a ``train`` of the module's own).
        criterion: ``(output, y) -> scalar``, the mean over the batch.
        epoch: ``generator -> batches``, one shuffled pass; called once per epoch. Resuming within an epoch draws its
            batches again and skips those already used, so that any such function works.
        optimizer: ``parameters -> torch.optim.Optimizer``.
        regularizer: a regulariser, or ``epoch -> regulariser``.
        weight: λ, or ``epoch -> λ``.
        other_batches: batches of a second stream that the regulariser takes each step.
        schedule: ``optimizer -> scheduler``, stepped once per training step.
        epochs: passes over the data.
        max_norm: largest Euclidean norm of the whole gradient ``∇L + λ r``; a longer one is scaled down to it.
        evaluations: name -> ``module -> {metric: value}``, run after each epoch; recorded as ``name_metric``.
        averages: name -> :class:`bnsharp.types.Average`, updated after each step; every evaluation is run under each
            too, recorded as ``average_name_metric``.
        trackers: name -> :class:`bnsharp.types.Tracker`, run after the evaluations; their numbers join the record.
        track_every: epochs from one tracking to the next.
        seed: of the order of batches, augmentation, random directions and random layers.
        folder: where metrics and checkpoints go; None keeps everything in memory.
        checkpoint_every: epochs from one checkpoint to the next; the last epoch always has one.
        checkpoint_steps: steps from one checkpoint within an epoch to the next; None writes none.
        resume: continue from the folder's checkpoint.
        engine: how several perturbed points of one step are evaluated; one engine for the whole run.
        ranks: processes that train together (:func:`bnsharp.distributed.joined`): each draws the same batches and takes
            its part of every one. Rank 0 alone is given a folder. At the first batch of each epoch the whole loss is
            compared with the one put together from parts.
        directions: ``"synchronised"``: steps are those of one process on the whole batches, up to rounding;
            ``"local"``: each rank takes a step on its part, with its own batch statistics and directions, and their
            gradients are averaged (m-SAM). Running statistics and the regulariser's state are averaged too.
        on_step: called with ``(epoch, step)`` after each step, for progress displays.
        on_epoch: called with each epoch's record.

    Raises:
        InputError: bad settings; a folder that another process writes, or that holds a run without ``resume``; two
            damaged checkpoints; a second ``fit`` that has no checkpoint to go back to.
        DivergedError: a non-finite loss or gradient; that step is not taken, and the last checkpoint is kept.
        StorageError, DataError: a full disk, a killed data worker; the last checkpoint is kept.
        Interrupted, Terminated: SIGINT, SIGTERM, on any rank.
        RankLostError: another rank died, or ranks differ; the last checkpoint is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion,
        epoch: Epoch,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        regularizer: Regularizer | Callable[[int], Regularizer] | None = None,
        weight: float | Callable[[int], float] = 1.0,
        other_batches: int = 0,
        schedule: Schedule | None = None,
        epochs: int = 1,
        max_norm: float | None = None,
        evaluations: Mapping[str, Evaluation] | None = None,
        averages: Mapping[str, Average] | None = None,
        trackers: Mapping[str, Tracker] | None = None,
        track_every: int = 1,
        seed: int = 0,
        folder: RunFolder | None = None,
        checkpoint_every: int = 1,
        checkpoint_steps: int | None = None,
        resume: bool = False,
        engine: Engine | str = "loop",
        ranks: Ranks = SINGLE,
        directions: str = "synchronised",
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ):
        whole("epochs", epochs)
        self.module, self.criterion, self.epoch = module, criterion, epoch
        self.params = P.live(module)
        self._trained = [p for p in P.unwrap(module).parameters() if p.requires_grad]
        chosen = regularizer if regularizer is not None else Plain()
        self.regularizer: Callable[[int], Regularizer] = (
            (lambda e: chosen) if hasattr(chosen, "step") else chosen  # type: ignore[assignment,return-value]
        )
        self.weight: Callable[[int], float] = weight if callable(weight) else (lambda e: weight)
        check_weight(self.weight(0))
        self.other_batches, self.epochs = whole("other_batches", other_batches, 0), int(epochs)
        self.optimizer = optimizer(self._trained)
        self.scheduler: LRScheduler = (schedule or constant())(self.optimizer)
        if max_norm is not None:
            positive("max_norm", max_norm)
        self.max_norm = max_norm
        self.evaluations, self.averages = dict(evaluations or {}), dict(averages or {})
        self.trackers, self.track_every = dict(trackers or {}), whole("track_every", track_every)
        self.seed, self.folder, self.resume = seed, folder, resume
        self.checkpoint_every = whole("checkpoint_every", checkpoint_every)
        self.checkpoint_steps = None if checkpoint_steps is None else whole("checkpoint_steps", checkpoint_steps)
        self.engine = Engine(engine) if isinstance(engine, str) else engine
        self.ranks, self.directions = ranks, directions
        one_of("directions", directions, DIRECTIONS)
        self.on_step, self.on_epoch = on_step, on_epoch
        self._begun = False

    def fit(self) -> Result:
        """Train to the last epoch; global random states, signal handlers and the module's modes are put back."""
        device = P.first(self.params).device
        with ExitStack() as stack:
            self._stop = stack.enter_context(StopRequest())
            if self.folder is not None:
                stack.enter_context(self.folder.locked())
            stack.enter_context(randomness.seeded(self.seed, device))
            stack.enter_context(modes_kept(self.module))
            return self._fit(device)

    def _fit(self, device: torch.device) -> Result:
        averages = {name: average.init(self.module) for name, average in self.averages.items()}
        self._run = LoopState.new(self.seed, device, self.regularizer(0).init(self.params), averages)
        self._kept: str | None = None
        self._writes = self.ranks.from_first(lambda: self.folder is not None)
        history = self._restore()
        self._begun = True
        self.ranks.check_equal(self.params, "at the start")
        with self._lost_ranks():
            while self._run.epoch < self.epochs:
                started = time.perf_counter() - self._run.seconds
                record = self._train(started)
                timing = {"epoch": record["epoch"], "train_seconds": time.perf_counter() - started}
                self._observe(record, timing)
                history.append(record)
                self._run.end()
                self._keep(record, timing)
        if not history:
            raise InputError("nothing was trained: no epoch left")
        return Result(history[-1], history, self._run.steps)

    # ------------------------------------------------------------ an epoch's steps

    def _train(self, started: float) -> dict[str, Any]:
        self.module.train()
        run, epoch = self._run, self._run.epoch
        self._checked, weight = False, self.weight(epoch)
        with self._data_errors():
            self._steps(self.regularizer(epoch), weight, started)
        if not run.sums.steps:
            raise InputError("an epoch holds no batch; expected at least one: is the batch size too large?")
        self._meet()
        size = float(P.norm(self.params))
        if size != size or size == float("inf"):
            raise DivergedError(f"parameters are not finite after epoch {epoch + 1}; expected finite values: lower the "
                                f"learning rate or the perturbation{self._keeping}")
        return {"epoch": epoch + 1, "steps": run.steps, "lr": run.lr, "weight": weight, **run.sums.means(),
                "gradient_evaluations": run.gradients, "parameter_norm": size}

    def _steps(self, regularizer: Regularizer, weight: float, started: float) -> None:
        run = self._run
        structure = Structure(self.module)
        batches, others = drawn(run, self.epoch, self.other_batches, self.optimizer.param_groups[0]["lr"])
        for batch in batches:
            self.optimizer.zero_grad(set_to_none=True)
            part = self._part(batch)
            with self.ranks.masks(self.seed, run.steps, run.device):
                step = backward(
                    self.module, self.criterion, part, regularizer, weight,
                    other_batches=[self.ranks.share(next(others)) for _ in range(self.other_batches)],
                    generator=run.generators["directions"], state=run.regularizer, engine=self.engine,
                    ranks=self.ranks, directions=self.directions, share_gradient=True,
                    structure=structure,
                )
            correct = self.ranks.mean(accuracy(step.output, part[1]), float(batch_size(part[0])))
            values = numbers(step, self._clip(), correct)
            check_finite(values, run, self._keeping)
            self.optimizer.step()
            self.scheduler.step()
            self._count(step, values, batch)
            if self.on_step is not None:
                self.on_step(run.epoch, run.sums.steps - 1)
            self._rest(started)

    def _part(self, batch: Batch) -> Batch:
        """This rank's part of a batch; an epoch's first one shows whether the loss is the mean of its parts."""
        if self.directions == "synchronised" and not self._checked:
            check_parts(self.module, self.criterion, batch, self.ranks)
        self._checked = True
        return self.ranks.share(batch)

    def _meet(self) -> None:
        """Statistics that each rank took on its own parts become their mean on all; parameters are the same already."""
        averages = [t for state in self._run.averages.values() for t in state.values()]
        self.ranks.unify_([*P.unwrap(self.module).buffers(), *averages])
        self.ranks.check_equal(self.params, f"after {self._run.where}")

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, which is not longer than ``max_norm`` afterwards."""
        gradients = [p.grad for p in self._trained if p.grad is not None]
        norm = P.total_norm(gradients)
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.max_norm, norm)
        return norm

    def _count(self, step: Step, values: dict[str, float], batch: Batch) -> None:
        run = self._run
        run.regularizer = step.state
        run.steps += 1
        run.gradients += step.evaluations
        run.sums.add(values, batch_size(batch[0]))
        for name, average in self.averages.items():
            run.averages[name] = average.update(self.module, run.averages[name], run.steps)

    def _rest(self, started: float) -> None:
        """Between two steps: stop if asked to, write a checkpoint if one is due."""
        run = self._run
        due = self.checkpoint_steps is not None and run.steps % self.checkpoint_steps == 0
        asked = self._stop.asked(self.ranks.gather)
        if due or asked:
            self._meet()
            run.seconds = time.perf_counter() - started
            self._save()
        if asked:
            raise self._stopped()

    @contextmanager
    def _data_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not lost_worker(error):
                raise
            self._stop.ignore_children()
            release(error)  # so that the other workers end
            line = " ".join(str(error).split()).rstrip(".")[:150]
            raise DataError(
                f"a data worker was lost ({line}) at epoch {self._run.epoch + 1}, step {self._run.sums.steps + 1}; "
                f"expected batches: is there enough memory for the workers?{self._keeping}"
            ) from error

    # ------------------------------------------------------------ after an epoch

    def _observe(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Evaluations, averages and trackers; what they draw does not reach training."""
        run = self._run
        if not (self.evaluations or self.trackers):
            timing["evaluation_seconds"] = 0.0
            return
        with randomness.undisturbed(run.device):
            timing["evaluation_seconds"] = evaluated(
                self.module, self.evaluations, self.averages, run.averages, record
            )
            if self.trackers and record["epoch"] % self.track_every == 0:
                context = TrackingContext(
                    record["epoch"], run.steps, record["lr"], record["weight"], record["parameter_norm"],
                    P.seeded(self.seed, run.device), record,
                )
                timing["tracking_seconds"] = tracked(self.module, self.trackers, self.seed, context, record)

    def _keep(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if self.folder is not None:
            with self._storage_errors():
                self.folder.append(METRICS, record)
                self.folder.append(TIMING, timing)
        asked = self._stop.asked(self.ranks.gather)
        if record["epoch"] % self.checkpoint_every == 0 or record["epoch"] == self.epochs or asked:
            self._save()
        if self.on_epoch is not None:
            self.on_epoch(record)
        if asked:
            raise self._stopped()

    # ------------------------------------------------------------ checkpoints

    def checkpoint(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            "module": P.unwrap(self.module).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **self._run.state_dict(),
        }

    def _save(self) -> None:
        if self._writes:
            self.ranks.from_first(self._write)
            self._kept = self._run.where

    def _write(self) -> None:
        if self.folder is not None:
            with self._storage_errors():
                self.folder.save(self.checkpoint())

    def _stored(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The checkpoint, and the records that it stands for."""
        if self.folder is None:
            return None, []
        with self._storage_errors():
            if self.resume:
                return self.folder.reopen()
            if self.folder.begun():
                raise InputError(f"{self.folder.path} holds a run already; expected resume=True to go on with it, or a "
                                 "new folder")
        return None, []

    def _restore(self) -> list[dict[str, Any]]:
        """The records so far, after going back to the checkpoint if there is one."""
        stored, history = self.ranks.from_first(self._stored) if self._writes else (None, [])
        run = self._run
        if stored is None:
            if self._begun:
                raise InputError("fit() was called again and there is no checkpoint to go on from; expected a new "
                                 "Trainer, with a fresh optimizer and schedule")
            return history
        P.unwrap(self.module).load_state_dict(stored["module"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scheduler.load_state_dict(stored["scheduler"])
        run.load_state_dict(stored)
        self._kept = run.where
        return history

    def _stopped(self) -> BaseException:
        where = "" if self.folder is None else f" in {self.folder.path}"
        kept = f"; that state is kept{where}" if self._kept == self._run.where else ""
        return self._stop.error(f"stopped after {self._run.where}{kept}")

    @contextmanager
    def _lost_ranks(self) -> Iterator[None]:
        """What ends one rank alone ends the others, and all say what is kept."""
        try:
            yield
        except (RankLostError, InputError) as error:
            if isinstance(error, InputError) and self.ranks.is_first:
                raise
            alone = "" if isinstance(error, RankLostError) else f"rank {self.ranks.index}: "
            kept = f"{self._keeping}: go on with --resume" if self._kept else "; no checkpoint was written"
            raise RankLostError(f"{alone}{error}{kept}") from error

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or (self.folder.path if self.folder is not None else "")
            raise StorageError(
                f"{where}: {error.strerror or error}; expected a disk that can be written: free some space, then go on "
                f"with --resume{self._keeping}"
            ) from error

    @property
    def _keeping(self) -> str:
        return f"; the checkpoint of {self._kept} is kept" if self._kept else ""
