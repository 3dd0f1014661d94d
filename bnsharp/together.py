"""Several runs of one network, apart only in their seeds, trained at once.

Their networks are stacked (:mod:`bnsharp.stacked`), so that one pass gives every run its loss and gradient. Each run's
regularised step is the single run's own code: the runs' steps go side by side (:mod:`bnsharp.lockstep`), and what they
evaluate at the same time is evaluated together. So every regulariser works, those with random draws and branches of
their own too, and the numbers are those of single runs up to rounding.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.checkpoint import CHECKPOINT, PREVIOUS, RunFolder, load
from bnsharp.errors import DivergedError, InputError
from bnsharp.evaluation import AbstractObjective, is_transformed
from bnsharp.forms import QuadraticForm
from bnsharp.lockstep import Lockstep
from bnsharp.loopstate import LoopState, check_finite, drawn
from bnsharp.objective import arguments, batch_size, differ, random_states
from bnsharp.observing import accuracy, modes_kept
from bnsharp.stacked import Stack, check_stackable
from bnsharp.stopping import StopRequest
from bnsharp.trainer import Batch, Criterion, Result, Trainer
from bnsharp.training_objective import TrainingObjective
from bnsharp.types import Params, Step, Term

ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop",
)
"""Optimizers of ``torch.optim`` that treat every coordinate alone: on stacked parameters they do what n of them do."""

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Those whose step PyTorch has in one pass over memory also on a CPU, where n networks no longer fit its cache."""

Outcome = Result | DivergedError


# ---------------------------------------------------------------- passes


@dataclass(frozen=True)
class Request:
    """One run's evaluation: its point (None: its own parameters), its batch, whether running statistics move."""

    point: Params | None
    x: Any
    y: Any
    updating: bool
    differentiate: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind are evaluated in one pass."""
        shapes: list[Any] = []
        tree_map(lambda t: shapes.append(getattr(t, "shape", t)), (self.x, self.y))
        return (*shapes, self.updating, self.differentiate)


@dataclass(frozen=True)
class Answer:
    """The loss, its gradient (None where it was not asked for) and the network's output, detached."""

    loss: Tensor
    gradient: Params | None
    output: Any


class Passes:
    """Answers requests of the runs of a stack, those of one kind in one pass.

    Attributes:
        gradient: of the last pass in which all runs were differentiated: ``[n, …]`` by name.
        answered: its answers, in the order of the runs.
    """

    def __init__(self, stack: Stack, criterion: Criterion):
        self.stack, self.criterion = stack, criterion
        self.gradient: dict[str, Tensor] = {}
        self.answered: list[Answer] = []
        self._batch: tuple[list[Any], Any, Tensor] | None = None

    def __call__(self, requests: Mapping[int, Request]) -> dict[int, Answer]:
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place in sorted(requests):
            groups[requests[place].kind].append(place)
        answers: dict[int, Answer] = {}
        for places in groups.values():
            answers.update(zip(places, self._pass(places, [requests[i] for i in places]), strict=True))
        return answers

    def _pass(self, places: list[int], requests: list[Request]) -> list[Answer]:
        layout, total = self.stack.layout, len(self.stack.modules)
        everyone = len(places) == total
        layout.count, layout.updating = len(places), requests[0].updating
        layout.rows = None if everyone else torch.tensor(places, device=requests[0].x.device)
        own = everyone and all(r.point is None for r in requests)
        leaves = self.stack.parameters if own else self._points(places, requests)
        before = {} if own else self.stack.put(leaves)
        try:
            x, y = self._batches(requests)
            positional, named = arguments(x)
            with torch.set_grad_enabled(requests[0].differentiate):
                output = self.stack.network(*positional, **named)
                outputs = output.reshape(len(places), -1, *output.shape[1:])
                losses = self._losses(outputs, y)
            gradients: dict[str, Tensor] = {}
            if requests[0].differentiate:
                found = torch.autograd.grad(
                    losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                gradients = dict(zip(leaves, found, strict=True))
        finally:
            self.stack.put(before)
            layout.count, layout.rows = total, None
        answers = _apart(losses.detach(), gradients, outputs.detach())
        if everyone and gradients:
            self.gradient, self.answered = gradients, answers
        return answers

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Each run's mean loss ``[m]``."""
        inner, options = self.criterion, {}
        if isinstance(inner, functools.partial) and not inner.args:
            inner, options = inner.func, inner.keywords
        if inner is F.cross_entropy and options.keys() <= {"label_smoothing"} and y.ndim == 2 and not bool((y < 0).any()):
            each = F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none", **options)
            return each.view(y.shape).mean(1)
        return torch.func.vmap(self.criterion)(outputs, y)

    def _points(self, places: list[int], requests: list[Request]) -> dict[str, Tensor]:
        """The points as leaves ``[m, …]``."""
        live = self.stack.parameters
        points = [
            {k: p.detach()[place] for k, p in live.items()} if r.point is None else dict(r.point.items())
            for place, r in zip(places, requests, strict=True)
        ]
        return {k: torch.stack([p[k] for p in points]).requires_grad_() for k in live}

    def _batches(self, requests: list[Request]) -> tuple[Any, Tensor]:
        """Inputs of all runs one after the other, and targets ``[m, B, …]``; those of the last pass are kept."""
        given = [t for r in requests for t in (r.x, r.y)]
        kept = self._batch
        if kept is None or len(kept[0]) != len(given) or any(a is not b for a, b in zip(kept[0], given, strict=True)):
            x = tree_map(lambda *t: torch.cat(t), requests[0].x, *[r.x for r in requests[1:]])
            kept = self._batch = (given, x, torch.stack([r.y for r in requests]))
        return kept[1], kept[2]


def _apart(losses: Tensor, gradients: dict[str, Tensor], outputs: Tensor) -> list[Answer]:
    rows = zip(*[g.unbind() for g in gradients.values()], strict=True)
    points = [P.make(dict(zip(gradients, row, strict=True))) for row in rows] if gradients else [None] * len(losses)
    return [Answer(*each) for each in zip(losses.unbind(), points, outputs.unbind(), strict=True)]


class SharedObjective(AbstractObjective):
    """The loss of one run's batch, evaluated in one pass with the others'; what passes do not offer, alone.

    Like :class:`bnsharp.training_objective.TrainingObjective`: the first evaluation moves running statistics, if any,
    and gives the output.

    Args:
        ask: ``request -> answer``, which waits for the other runs.
        module, criterion: of this run, for evaluations alone.
        own: the run's parameters as they are.
        batch: ``(x, y)``.
        updating: whether the first evaluation moves running statistics.
    """

    statistics = "batch"

    def __init__(self, ask: Callable[[Request], Answer], module: nn.Module, criterion: Criterion, own: Params,
                 batch: Batch, updating: bool):
        super().__init__()
        self._ask, self._module, self._criterion, self._own = ask, module, criterion, own
        (self.x, self.y), self._updating, self._evaluated = batch, updating, False
        self.batch_size = batch_size(self.x)
        self.batches_seen, self.weight_seen = 1, float(self.batch_size)
        self._output: Any = None
        self._parts: list[SharedObjective] = []
        self._single: TrainingObjective | None = None

    @property
    def output(self) -> Any:
        """The network's output at the first evaluation, of all chunks where the batch was cut."""
        if self._output is None and self._parts:
            return torch.cat([part.output for part in self._parts])
        return self._output if self._output is not None or self._single is None else self._single.output

    def _alone(self) -> TrainingObjective:
        """The same loss evaluated by the run's own network."""
        if self._single is None:
            self._single = TrainingObjective(
                self._module, self._criterion, (self.x, self.y), update_statistics=self._updating and not self._evaluated
            )
            self._single.evaluations = self.evaluations
        self._evaluated = True
        return self._single

    def _terms(self) -> Iterator[Term]:
        return self._alone()._terms()

    def _pass_at(self, params: Params, differentiate: bool) -> Answer:
        point = None if params is self._own else params
        request = Request(point, self.x, self.y, self._updating and not self._evaluated, differentiate)
        answer = self._ask(request)
        if not self._evaluated:
            self._output = answer.output
        self._evaluated = True
        return answer

    def __call__(self, params: Params) -> Tensor:
        if torch.is_grad_enabled() and any(p.requires_grad for p in params.values()) or is_transformed(params):
            return self._alone()(params)
        self.evaluations["losses"] += 1
        return self._pass_at(params, False).loss

    def value_and_grad(self, params: Params) -> tuple[Tensor, Params]:
        self.evaluations["gradients"] += 1
        answer = self._pass_at(params, True)
        assert answer.gradient is not None
        return answer.loss, answer.gradient

    def many(self, source: Params | Sequence[Params]) -> Tensor:
        return torch.stack([self(P.pick(source, i)) for i in range(P.count(source))])

    def many_by_batch(self, source: Params | Sequence[Params]) -> tuple[Tensor, Tensor]:
        losses = self.many(source)
        return losses.new_tensor([float(self.batch_size or 1)]), losses[None]

    def many_value_and_grad(self, source: Params | Sequence[Params]) -> tuple[Tensor, Params]:
        found = [self.value_and_grad(P.pick(source, i)) for i in range(P.count(source))]
        losses = torch.stack([loss for loss, _ in found])
        return losses, P.batch(found[0][1]) if len(found) == 1 else P.stack([g for _, g in found])

    def weighted_gradients(self, source: Params | Sequence[Params], weights: Tensor) -> Params:
        total: Params | None = None
        for i in range(P.count(source)):
            _, gradient = self.value_and_grad(P.pick(source, i))
            w = weights[:, i]
            part = P.make({k: w.to(g.dtype).reshape(-1, *[1] * g.ndim) * g for k, g in gradient.items()}, w.shape)
            total = part if total is None else P.shift(total, part)
        assert total is not None
        return total

    def forms_by_batch(
        self, params: Params, source: Params | Sequence[Params], form: QuadraticForm
    ) -> tuple[Tensor, Tensor]:
        return self._alone().forms_by_batch(params, source, form)

    def hessian(self, params: Params) -> Callable[[Params], Params]:
        return self._alone().hessian(params)

    def hessian_slope(self, params: Params, v: Params) -> Params:
        return self._alone().hessian_slope(params, v)

    def parts(self, n: int) -> list[AbstractObjective]:
        chunks = self._alone_parts(n)
        self._parts = [
            SharedObjective(self._ask, self._module, self._criterion, self._own, (c.x, c.y), self._updating)
            for c in chunks
        ]
        return list(self._parts)

    def _alone_parts(self, n: int) -> list[Any]:
        return TrainingObjective(self._module, self._criterion, (self.x, self.y)).parts(n)


# ---------------------------------------------------------------- the runs


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


def check_together(trainers: Sequence[Trainer]) -> None:
    """Raise :class:`InputError` unless these trainers can run together, as far as can be told without a batch.

    Asked for are: networks of one structure without random layers (:func:`bnsharp.stacked.check_stackable`), an
    optimizer of :data:`ELEMENTWISE`, one process, no ``torch.compile``, settings that are equal but for the seed.
    """
    if not trainers:
        raise InputError("no trainer was given; expected at least one")
    first = trainers[0]
    for trainer in trainers:
        kind = type(trainer.optimizer)
        if kind.__name__ not in ELEMENTWISE or kind is not getattr(torch.optim, kind.__name__, None):
            raise InputError(f"optimizer {kind.__name__} on stacked parameters; expected one that treats coordinates "
                             f"alone ({', '.join(ELEMENTWISE)}): train the seeds one after the other")
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


def check_batches(trainers: Sequence[Trainer], batches: Sequence[Batch]) -> None:
    """Raise :class:`InputError` unless one pass of all networks gives what each gives alone, on its batch.

    A network that draws random numbers in training mode is refused, and one that couples examples in a layer of its
    own, a criterion that ``torch.func.vmap`` cannot take, an output that is no tensor. Nothing is changed.
    """
    for trainer, (x, y) in zip(trainers, batches, strict=True):
        if not isinstance(y, Tensor) or not isinstance(x, Tensor):
            raise InputError(f"a batch of {type(x).__name__} and {type(y).__name__}; expected tensors: train the seeds "
                             "one after the other")
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


class Together:
    """Trains what several :class:`bnsharp.Trainer` would train, at once: the same numbers, up to rounding.

    Each run draws its own batches, directions and noise from its own seed, keeps its own records, averages, trackers,
    checkpoints and folder, and is evaluated by its own network. One run that diverges ends alone.
    A group that was stopped or killed goes on with ``resume=True`` in all its trainers, from the last point at which all
    of them have a checkpoint, and writes the same bytes as one that was not. ``train_seconds`` of a run is its share of
    the group's time.

    Args:
        trainers: made but not run; equal but for module, data, folder and seed, see :func:`check_together`.

    Raises:
        InputError: trainers that cannot run together (:func:`check_together`, at the first step
            :func:`check_batches`), or what :meth:`bnsharp.Trainer.fit` raises of its settings.
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
            align([t.folder for t in self.trainers if t.folder is not None and t.resume])
            self._runs = [self._start(trainer, device) for trainer in self.trainers]
            self._lockstep = stack.enter_context(Lockstep(len(self._runs)))
            stack.callback(self._disband)
            self._gather()
            while self._runs and self._runs[0].state.epoch < self._runs[0].trainer.epochs:
                self._epoch()
            for run in self._runs:
                if not run.history:
                    raise InputError("nothing was trained: no epoch left")
                self._outcomes[self._place(run)] = Result(run.history[-1], run.history, run.state.steps)
        return [self._outcomes[i] for i in range(len(self.trainers))]

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
        """Stack networks and optimizers; the first run's optimizer and schedule act for all."""
        trainers = [run.trainer for run in self._runs]
        self._stack = Stack([t.module for t in trainers])
        for trainer in trainers:
            trainer.params = P.live(trainer.module)
        self._passes = Passes(self._stack, trainers[0].criterion)
        self._gather_optimizers()

    def _gather_optimizers(self) -> None:
        trainers = [run.trainer for run in self._runs]
        lead = trainers[0].optimizer
        names = [{id(p): k for k, p in P.trainable(t.module)} for t in trainers]
        self._groups = [list(group["params"]) for group in lead.param_groups]
        state: dict[Tensor, dict[str, Any]] = {}
        for g, group in enumerate(lead.param_groups):
            rows = list(zip(*[t.optimizer.param_groups[g]["params"] for t in trainers], strict=True))
            group["params"] = [self._stack.parameters[names[0][id(row[0])]] for row in rows]
            for stacked, row in zip(group["params"], rows, strict=True):
                parts = [t.optimizer.state.get(p, {}) for t, p in zip(trainers, row, strict=True)]
                if parts[0]:
                    state[stacked] = {k: _stacked([part[k] for part in parts], row[0]) for k in parts[0]}
        lead.state = defaultdict(dict, state)
        self._fused = [group.get("fused") for group in lead.param_groups]
        for group in lead.param_groups:
            if type(lead) in FUSED and group["fused"] is None and not group["foreach"]:
                group["fused"] = True

    def _scatter_optimizers(self) -> None:
        """Every run's optimizer and schedule hold its own part again."""
        trainers = [run.trainer for run in self._runs]
        lead, schedule = trainers[0].optimizer, trainers[0].scheduler.state_dict()
        stacked, state = [group["params"] for group in lead.param_groups], lead.state
        for group, own, fused in zip(lead.param_groups, self._groups, self._fused, strict=True):
            group["params"] = own
            if "fused" in group:
                group["fused"] = fused
        settings = [{k: v for k, v in group.items() if k != "params"} for group in lead.param_groups]
        for i, trainer in enumerate(trainers):
            own_state: dict[Tensor, dict[str, Any]] = {}
            for g, group in enumerate(trainer.optimizer.param_groups):
                group.update(settings[g])
                for p, whole in zip(group["params"], stacked[g], strict=True):
                    if whole in state:
                        own_state[p] = {k: _part(v, i, p) for k, v in state[whole].items()}
            trainer.optimizer.state = defaultdict(dict, own_state)
            if i:
                trainer.scheduler.load_state_dict(dict(schedule))

    def _disband(self) -> None:
        """Every run has tensors of its own again."""
        if self._runs and self._runs[0].trainer.optimizer.param_groups[0]["params"] is not self._groups[0]:
            self._scatter_optimizers()
        self._stack.release()
        for run in self._runs:
            run.trainer.params = P.live(run.trainer.module)

    def _leave(self, failed: dict[int, DivergedError]) -> None:
        """Runs that diverged end; the others are stacked anew."""
        self._scatter_optimizers()
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
        lr = trainers[0].optimizer.param_groups[0]["lr"]
        self._stack.network.train()
        for run in self._runs:
            run.trainer.module.train()
            run.begin(lr)
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
        objectives = [self._objectives(i, run, batch) for i, (run, batch) in enumerate(zip(self._runs, batches, strict=True))]
        calls = [self._call(run, own) for run, own in zip(self._runs, objectives, strict=True)]
        steps: list[Step] = self._lockstep.run(calls, self._passes)
        gradient = self._gradient(steps)
        norms = _norms(gradient)
        values = self._numbers(steps, norms, [own[0].output for own in objectives], [y for _, y in batches])
        failed = {i: error for i, run in enumerate(self._runs) if (error := _diverged(values[i], run)) is not None}
        if failed:
            kept = [i for i in range(len(self._runs)) if i not in failed]
            self._leave(failed)
            steps, values, batches = ([x[i] for i in kept] for x in (steps, values, batches))
            gradient, norms = {k: g[kept] for k, g in gradient.items()}, norms[kept]
        if self._runs:
            self._descend(gradient, norms)
        for run, step, own, batch in zip(self._runs, steps, values, batches, strict=True):
            run.trainer._count(step, own, batch)
            if run.trainer.on_step is not None:
                run.trainer.on_step(run.state.epoch, run.state.sums.steps - 1)
        return True

    def _check(self, batches: list[Batch]) -> None:
        self._scatter_optimizers()
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

    def _numbers(self, steps: list[Step], norms: Tensor, outputs: list[Any], targets: list[Any]) -> list[dict[str, float]]:
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
        trainer.optimizer.step()
        trainer.scheduler.step()

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
        self._scatter_optimizers()
        with _compact(self._runs):
            for run in self._runs:
                run.trainer._save()
        self._gather_optimizers()

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
        self._scatter_optimizers()
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
        self._gather_optimizers()
        if asked:
            raise self._stopped()


def _record(run: Run, weight: float) -> dict[str, Any]:
    """An epoch's record, as the trainer makes it."""
    state, trainer = run.state, run.trainer
    if not state.sums.steps:
        raise InputError("an epoch holds no batch; expected at least one: is the batch size too large?")
    size = float(P.norm(trainer.params))
    if size != size or size == float("inf"):
        raise DivergedError(f"parameters are not finite after epoch {state.epoch + 1}; expected finite values: lower the "
                            f"learning rate or the perturbation{trainer._keeping}")
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


def _stacked(parts: Sequence[Any], parameter: Tensor) -> Any:
    """An optimizer's entries as one ``[n, …]``; counters, which are equal, from the first."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.stack(list(parts)) if first.shape == parameter.shape and first.ndim else first.clone()
    return first


def _part(value: Any, place: int, parameter: Tensor) -> Any:
    """Entry ``place`` of what :func:`_stacked` gave."""
    if isinstance(value, Tensor):
        return value[place].clone() if value.shape[1:] == parameter.shape and value.ndim > parameter.ndim else value.clone()
    return value


def align(folders: Sequence[RunFolder]) -> None:
    """Runs that were killed while their checkpoints were written go back to the point that all of them have.

    A run ahead of the others drops its newest checkpoint, so that the one before it counts.

    Raises:
        InputError: checkpoints further apart than that.
    """

    def where(folder: RunFolder, name: str) -> tuple[int, int]:
        path = folder.path / name
        stored = load(path) if path.exists() else {}
        return stored.get("epoch", 0), stored.get("step", 0)

    places = [where(folder, CHECKPOINT) for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if place == min(places):
            continue
        if where(folder, PREVIOUS) != min(places):
            raise InputError(f"{folder.path} is at epoch {place[0]}, step {place[1]}, another run of the group at epoch "
                             f"{min(places)[0]}, step {min(places)[1]}; expected the checkpoints of one group: train "
                             "again with --overwrite")
        previous = folder.path / PREVIOUS
        if previous.exists():
            previous.replace(folder.path / CHECKPOINT)
        else:
            (folder.path / CHECKPOINT).unlink()
