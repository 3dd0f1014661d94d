"""Where a training run is: counters, partial sums, random streams, carried states, as one value that is stored."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.errors import DivergedError, InputError, Notice
from bnsharp.types import State, Step

STREAMS = ("batches", "others", "directions")
"""Generators of a run: order and augmentation of batches, the same for the second stream, random directions."""

VERSION = 2
"""Of what a checkpoint holds."""


SUMMED = {"loss": True, "accuracy": True, "penalty": False, "ratio": False}
"""What is summed over an epoch, and whether as a mean over examples (else over steps)."""


@dataclass
class Sums:
    """Sums over the steps of an epoch, in float64."""

    steps: int = 0
    examples: int = 0
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, numbers: Mapping[str, float], n: int) -> None:
        """One step on ``n`` examples, its :func:`numbers`."""
        for key, per_example in SUMMED.items():
            self.totals[key] = self.totals.get(key, 0.0) + (n * numbers[key] if per_example else numbers[key])
        self.steps, self.examples = self.steps + 1, self.examples + n

    def means(self) -> dict[str, float]:
        """Loss and accuracy per example, penalty and ratio per step."""
        per = {key: self.examples if per_example else self.steps for key, per_example in SUMMED.items()}
        return {key: self.totals[key] / n for key, n in per.items()}


@dataclass
class LoopState:
    """Everything that the next step depends on, beside the module, its optimizer and its schedule.

    Attributes:
        device: of the parameters.
        generators: by the names in :data:`STREAMS`.
        regularizer: what the regulariser carries.
        averages: what each average carries, by name.
        epoch: epochs finished.
        steps, gradients: optimizer steps taken and gradients evaluated, in all.
        lr: learning rate at the first step of the epoch under way.
        sums: of the epoch under way; ``sums.steps`` is how many steps it has taken.
        seconds: spent in the epoch under way before the last interruption.
        start: random states when the epoch under way began; None between epochs.
    """

    device: torch.device
    generators: dict[str, torch.Generator]
    regularizer: State
    averages: dict[str, State]
    epoch: int = 0
    steps: int = 0
    gradients: int = 0
    lr: float = 0.0
    sums: Sums = field(default_factory=Sums)
    seconds: float = 0.0
    start: dict[str, Any] | None = None

    @classmethod
    def new(cls, seed: int, device: torch.device, regularizer: State, averages: dict[str, State]) -> LoopState:
        """Before the first step."""
        generators = {name: P.seeded(seed * 4 + i, device) for i, name in enumerate(STREAMS)}
        return cls(device, generators, regularizer, averages)

    @property
    def where(self) -> str:
        """In words: ``epoch 3``, or ``epoch 4, step 7`` within one."""
        return f"epoch {self.epoch + 1}, step {self.sums.steps}" if self.sums.steps else f"epoch {self.epoch}"

    def begin(self, lr: float) -> None:
        """An epoch begins; it is drawn again from here after an interruption."""
        self.lr, self.sums, self.seconds, self.start = lr, Sums(), 0.0, self.random()

    def end(self) -> None:
        """The epoch under way is finished."""
        self.epoch, self.sums, self.seconds, self.start = self.epoch + 1, Sums(), 0.0, None

    def random(self) -> dict[str, Any]:
        """All random states now."""
        return {
            "generators": {k: g.get_state() for k, g in self.generators.items()},
            "global": randomness.capture(self.device),
        }

    def set_random(self, state: dict[str, Any]) -> None:
        """Make :meth:`random`'s value the random states again."""
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        randomness.restore(state["global"], self.device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "version": VERSION,
            "epoch": self.epoch, "step": self.sums.steps,
            "count": {"steps": self.steps, "gradients": self.gradients},
            "regularizer": self.regularizer, "averages": self.averages,
            "sums": {"examples": self.sums.examples, "totals": self.sums.totals},
            "lr": self.lr, "seconds": self.seconds,
            "random": self.random(), "start": self.start,
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            InputError: a checkpoint without the state of a run, or with other averages.
        """
        if stored.get("version") != VERSION:
            raise InputError(
                f"a checkpoint of version {stored.get('version', 1)!r}; a run resumes from version {VERSION}: measure "
                "it, or train again with --overwrite"
            )
        if set(stored["averages"]) != set(self.averages):
            raise InputError(f"the checkpoint holds the averages {sorted(stored['averages'])}, now "
                             f"{sorted(self.averages)}; expected the same ones")
        self.regularizer = self._placed(stored["regularizer"], self.regularizer)
        self.averages = {k: self._placed(stored["averages"][k], v) for k, v in self.averages.items()}
        self.epoch = stored["epoch"]
        self.steps, self.gradients = stored["count"]["steps"], stored["count"]["gradients"]
        totals = {k: float(v) for k, v in stored["sums"]["totals"].items()}
        self.sums = Sums(stored["step"], stored["sums"]["examples"], totals)
        self.lr, self.seconds, self.start = stored["lr"], stored["seconds"], stored["start"]
        self.set_random(stored["random"])

    def _placed(self, stored: State, fresh: State) -> State:
        """Loaded tensors where a fresh state has them, on the parameters' device where it has none."""
        return {k: v.to(fresh[k].device if k in fresh else self.device) for k, v in stored.items()}


def drawn(
    run: LoopState, epoch: Callable[[torch.Generator], Iterable[Any]], other_batches: int, lr: float
) -> tuple[Iterator[Any], Iterator[Any]]:
    """The epoch's batches and an endless second stream, which starts afresh each epoch; past those already used.

    An epoch that was interrupted is drawn again from its random states; batches that come out otherwise are a
    :class:`bnsharp.errors.Notice`.
    """
    taken = run.sums.steps
    now = run.random() if taken else {}
    if taken and run.start is not None:
        run.set_random(run.start)
    else:
        run.begin(lr)
    others = run.generators["others"]
    streams = iter(epoch(run.generators["batches"])), itertools.chain.from_iterable(
        epoch(others) for _ in itertools.count()
    )
    if taken:
        used = zip(streams, (taken, taken * other_batches), strict=True)
        found = [sum(1 for _ in itertools.islice(stream, n)) for stream, n in used]
        again = run.random()["generators"]
        if found[0] < taken or any(not torch.equal(again[k], now["generators"][k]) for k in ("batches", "others")):
            warnings.warn(Notice(
                f"the batches of epoch {run.epoch + 1} came out otherwise when drawn again, so that the resumed run is "
                "another one than the uninterrupted; expected batches that depend on the generator alone"
            ), stacklevel=2)
        run.set_random(now)
    return streams


def numbers(step: Step, norm: Tensor, accuracy: Tensor) -> dict[str, float]:
    """Loss, penalty, ratio, accuracy and the norm of the whole gradient as plain numbers: one synchronisation."""
    tensors = {"loss": step.loss, "norm": norm, "penalty": step.penalty, "ratio": step.ratio, "accuracy": accuracy}
    device = step.loss.device
    values = torch.stack([t.to(device, torch.float64) for t in tensors.values()])
    return dict(zip(tensors, values.tolist(), strict=True))


def check_finite(values: Mapping[str, float], run: LoopState, kept: str) -> None:
    """Refuse a step whose loss or gradient is not finite (its :func:`numbers`); ``kept`` ends the message.

    Raises:
        DivergedError: with the epoch, the step and what is not finite.
    """
    names = {"loss": "loss", "norm": "norm of the gradient"}
    wrong = [f"{name} {values[k]:.4g}" for k, name in names.items() if not math.isfinite(values[k])]
    # a penalty or ratio that a method does not compute is NaN
    wrong += [f"{k} {values[k]:.4g}" for k in ("penalty", "ratio") if math.isinf(values[k])]
    if wrong:
        raise DivergedError(
            f"{', '.join(wrong)} at epoch {run.epoch + 1}, step {run.sums.steps + 1}, which was not taken; expected "
            f"finite values: lower the learning rate or the perturbation{kept}"
        )
