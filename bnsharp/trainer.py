"""A generic regularised trainer: any regulariser, any ``torch.optim`` optimizer and scheduler.

It names no measure and no algorithm. What it writes per epoch does not depend on time or machine load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bnsharp import params as P
from bnsharp.checkpoint import METRICS, TIMING, RunFolder
from bnsharp.checks import whole
from bnsharp.errors import DivergedError, InputError
from bnsharp.evaluation import Engine
from bnsharp.loop import backward
from bnsharp.objective import arguments, batch_size
from bnsharp.regularizers import Plain, Regularizer, check_weight
from bnsharp.schedules import Schedule, constant
from bnsharp.types import State, Step

Batch = tuple[Any, Any]
Epoch = Callable[[torch.Generator], Iterable[Batch]]
Criterion = Callable[[Any, Any], Tensor]
Evaluation = Callable[[nn.Module], dict[str, float]]


def accuracy(output: Any, y: Any) -> Tensor:
    """Fraction of correct classes; NaN where the output is not ``[n, classes]`` scores."""
    if not all(isinstance(a, Tensor) for a in (output, y)) or output.ndim != 2 or y.ndim != 1:
        return torch.full((), float("nan"))
    return (output.argmax(1) == y).double().mean()


def evaluate(module: nn.Module, criterion: Criterion, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss and accuracy over batches with running statistics, each example weighted equally."""
    was_training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            loss = correct = torch.zeros((), dtype=torch.float64)
            n = 0
            for x, y in batches:
                args, kwargs = arguments(x)
                output, size = module(*args, **kwargs), batch_size(x)
                loss = loss + size * criterion(output, y).double().cpu()
                correct = correct + size * accuracy(output, y).cpu()
                n += size
    finally:
        for m, mode in was_training.items():
            m.training = mode
    if not n:
        raise InputError("evaluation got no batch; expected at least one")
    return {"loss": float(loss / n), "accuracy": float(correct / n)}


@dataclass(frozen=True)
class Result:
    """What :meth:`Trainer.fit` returns: the last epoch's record, the records of all epochs, and the steps taken."""

    last: dict[str, Any]
    history: list[dict[str, Any]]
    steps: int


@dataclass
class _Sums:
    """Sums over the steps of an epoch, in float64."""

    steps: int = 0
    examples: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, step: Step, n: int, y: Any) -> None:
        values = {
            "loss": n * step.loss.double(),
            "accuracy": n * accuracy(step.output, y),
            "penalty": step.penalty.double(),
            "ratio": step.ratio.double(),
        }
        for key, value in values.items():
            self.totals[key] = self.totals[key] + value if key in self.totals else value
        self.steps, self.examples = self.steps + 1, self.examples + n

    def means(self) -> dict[str, float]:
        per = {"loss": self.examples, "accuracy": self.examples, "penalty": self.steps, "ratio": self.steps}
        return {key: float(self.totals[key] / n) for key, n in per.items()}


class Trainer:
    """Trains a module by ``optimizer`` on ``∇L + λ r``.

    Args:
        module: trained in place.
        criterion: ``(output, y) -> scalar``, the mean over the batch.
        epoch: ``generator -> batches``, one shuffled pass; called once per epoch.
        optimizer: ``parameters -> torch.optim.Optimizer``.
        regularizer: a regulariser, or ``epoch -> regulariser``.
        weight: λ, or ``epoch -> λ``.
        other_batches: batches of a second stream that the regulariser takes each step.
        schedule: ``optimizer -> scheduler``, stepped once per training step.
        epochs: passes over the data.
        evaluations: name -> ``module -> {metric: value}``, run after each epoch; recorded as ``name_metric``.
        seed: of the order of batches, augmentation, random directions and random layers.
        folder: where metrics and checkpoints go; None keeps everything in memory.
        checkpoint_every: epochs from one checkpoint to the next; the last epoch always has one.
        resume: continue from the folder's checkpoint.
        engine: how several perturbed points of one step are evaluated; one engine for the whole run.
        on_step: called with ``(epoch, step)`` after each step, for progress displays.
        on_epoch: called with each epoch's record.

    Raises:
        InputError: bad settings.
        DivergedError: a non-finite loss or gradient; the checkpoint of the last good epoch is kept.
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
        evaluations: Mapping[str, Evaluation] | None = None,
        seed: int = 0,
        folder: RunFolder | None = None,
        checkpoint_every: int = 1,
        resume: bool = False,
        engine: Engine | str = "loop",
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ):
        whole("epochs", epochs)
        self.module, self.criterion, self.epoch = module, criterion, epoch
        self.params = P.live(module)
        chosen = regularizer if regularizer is not None else Plain()
        self.regularizer: Callable[[int], Regularizer] = (
            (lambda e: chosen) if hasattr(chosen, "step") else chosen  # type: ignore[assignment,return-value]
        )
        self.weight: Callable[[int], float] = weight if callable(weight) else (lambda e: weight)
        check_weight(self.weight(0))
        self.other_batches, self.epochs = whole("other_batches", other_batches, 0), int(epochs)
        self.optimizer = optimizer([p for p in P.unwrap(module).parameters() if p.requires_grad])
        self.scheduler: LRScheduler = (schedule or constant())(self.optimizer)
        self.evaluations = dict(evaluations or {})
        self.seed, self.folder, self.resume = seed, folder, resume
        self.checkpoint_every = whole("checkpoint_every", checkpoint_every)
        self.engine = Engine(engine) if isinstance(engine, str) else engine
        self.on_step, self.on_epoch = on_step, on_epoch

    def fit(self) -> Result:
        """Train to the last epoch; the caller's global random state is left as it was."""
        device = P.first(self.params).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return self._fit(device)

    def _fit(self, device: torch.device) -> Result:
        self._generators = {
            name: P.seeded(self.seed * 4 + i, device) for i, name in enumerate(("batches", "others", "directions"))
        }
        self._state: State = self.regularizer(0).init(self.params)
        self._count = {"steps": 0, "gradients": 0}
        self._kept = 0
        history: list[dict[str, Any]] = []
        if self.resume:
            history = self._restore()
        for epoch in range(len(history), self.epochs):
            started = time.perf_counter()
            record = self._train(epoch)
            trained = time.perf_counter()
            for name, measure in self.evaluations.items():
                record |= {f"{name}_{key}": value for key, value in measure(self.module).items()}
            history.append(record)
            timing = {"epoch": epoch + 1, "train_seconds": trained - started,
                      "evaluation_seconds": time.perf_counter() - trained}
            self._keep(record, timing)
        if not history:
            raise InputError("nothing was trained: no epoch left")
        return Result(history[-1], history, self._count["steps"])

    def _train(self, epoch: int) -> dict[str, Any]:
        self.module.train()
        # the second stream starts afresh each epoch, so that a resumed run draws what an uninterrupted one does
        others = self._endless(self._generators["others"])
        regularizer, weight = self.regularizer(epoch), self.weight(epoch)
        sums, lr = _Sums(), self.optimizer.param_groups[0]["lr"]
        for index, batch in enumerate(self.epoch(self._generators["batches"])):
            self.optimizer.zero_grad(set_to_none=True)
            step = backward(
                self.module, self.criterion, batch, regularizer, weight,
                other_batches=[next(others) for _ in range(self.other_batches)],
                generator=self._generators["directions"], state=self._state, engine=self.engine,
            )
            if not bool((step.loss + step.penalty + step.ratio).isfinite()):
                raise DivergedError(
                    f"loss {float(step.loss):.4g}, penalty {float(step.penalty):.4g} at epoch {epoch + 1}, step "
                    f"{index + 1}; expected finite values: lower the learning rate or the perturbation"
                    + (f"; the checkpoint of epoch {self._kept} is kept" if self._kept else "")
                )
            self.optimizer.step()
            self.scheduler.step()
            self._state = step.state
            self._count["steps"] += 1
            self._count["gradients"] += step.evaluations
            sums.add(step, batch_size(batch[0]), batch[1])
            if self.on_step is not None:
                self.on_step(epoch, index)
        if not sums.steps:
            raise InputError("an epoch holds no batch; expected at least one: is the batch size too large?")
        size = float(P.norm(self.params))
        if size != size or size == float("inf"):
            raise DivergedError(f"parameters are not finite after epoch {epoch + 1}; expected finite values: lower the "
                                "learning rate or the perturbation")
        return {"epoch": epoch + 1, "steps": self._count["steps"], "lr": lr, "weight": weight, **sums.means(),
                "gradient_evaluations": self._count["gradients"], "parameter_norm": size}

    def _endless(self, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield from self.epoch(generator)

    def _keep(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.append(METRICS, record)
            self.folder.append(TIMING, timing)
            if record["epoch"] % self.checkpoint_every == 0 or record["epoch"] == self.epochs:
                self.folder.save(self.checkpoint(record["epoch"]))
                self._kept = record["epoch"]
        if self.on_epoch is not None:
            self.on_epoch(record)

    def checkpoint(self, epoch: int) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "epoch": epoch,
            "count": dict(self._count),
            "module": P.unwrap(self.module).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "regularizer": self._state,
            "generators": {k: g.get_state() for k, g in self._generators.items()},
            "random": torch.get_rng_state(),
        }

    def _restore(self) -> list[dict[str, Any]]:
        stored = self.folder.load() if self.folder is not None else None
        if self.folder is None or stored is None:
            if self.folder is not None:
                self.folder.keep(METRICS, 0)
                self.folder.keep(TIMING, 0)
            return []
        P.unwrap(self.module).load_state_dict(stored["module"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scheduler.load_state_dict(stored["scheduler"])
        self._state, self._count = stored["regularizer"], dict(stored["count"])
        for name, state in stored["generators"].items():
            self._generators[name].set_state(state)
        torch.set_rng_state(stored["random"])
        self._kept = stored["epoch"]
        self.folder.keep(METRICS, stored["epoch"])
        self.folder.keep(TIMING, stored["epoch"])
        return self.folder.records(METRICS)
