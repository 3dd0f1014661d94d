"""Passes that several runs share: what they evaluate at the same time is evaluated by their stacked networks.

A run's objective hands its points and batches to :class:`Passes`, which waits for those of the others
(:mod:`bnsharp.lockstep`), and gets its own loss, gradient and output back.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnsharp import params as P
from bnsharp.evaluation import AbstractObjective, is_transformed
from bnsharp.forms import QuadraticForm
from bnsharp.objective import arguments, batch_size
from bnsharp.stacked import Stack
from bnsharp.training_objective import TrainingObjective
from bnsharp.types import Params, Term

Batch = tuple[Any, Any]
Criterion = Callable[[Any, Any], Tensor]


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

    def begin(self) -> None:
        """A new step: what was kept of the last one's batches may be memory that a source has filled anew."""
        self._batch = None

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
        inner: Any = self.criterion
        options = inner.keywords if isinstance(inner, functools.partial) and not inner.args else {}
        plain = (inner.func if options else inner) is F.cross_entropy and options.keys() <= {"label_smoothing"}
        if plain and y.ndim == 2 and not bool((y < 0).any()):  # a mean over all of a run's examples
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
        """Inputs of all runs one after the other, and targets ``[m, B, …]``; those of the last pass are kept
        until :meth:`begin`."""
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
            moves = self._updating and not self._evaluated
            self._single = TrainingObjective(
                self._module, self._criterion, (self.x, self.y), update_statistics=moves
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
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in params.values())
        if differentiable or is_transformed(params):
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
        chunks: list[Any] = TrainingObjective(self._module, self._criterion, (self.x, self.y)).parts(n)
        self._parts = [
            SharedObjective(self._ask, self._module, self._criterion, self._own, (c.x, c.y), self._updating)
            for c in chunks
        ]
        return list(self._parts)
