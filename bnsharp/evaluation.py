"""Evaluating losses, gradients and Hessian products: one point or many, one batch or a weighted mean of batches.

Everything that evaluates a loss or a gradient goes through :class:`AbstractObjective`, so that engines, counting and
averaging over batches and over ranks live in one place. A plain function ``Params -> Tensor []`` is accepted wherever
an objective is: see :func:`as_objective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.distributed import SINGLE, Ranks, over_ranks
from bnsharp.engines import Engine
from bnsharp.errors import InputError
from bnsharp.forms import GradientGraph, QuadraticForm, hessian_slope
from bnsharp.grids import Grid, Points
from bnsharp.pointwise import PointLosses
from bnsharp.pointwise import is_transformed as is_transformed
from bnsharp.types import LossFunction, Params, Term


class AbstractObjective(PointLosses, ABC):
    """A weighted mean of losses, one term per batch. Subclasses say what the terms are.

    With several ranks each holds a part of every batch, and all evaluate together.
    """

    statistics: str | None = None
    batch_size: int | None = None
    def __init__(self, engine: Engine | str = "loop", ranks: Ranks = SINGLE):
        super().__init__(engine, ranks)
        self._totals: list[float] = []
        self.evaluations: Counter[str] = Counter()
        self.on_evaluation: Callable[[int], None] | None = None
        """Called with the number of losses, gradients or products just evaluated on a batch: for progress displays."""
        self.batches_seen = 0
        """Batches in the last full pass, 0 before the first."""
        self.weight_seen = 0.0
        """Sum of their weights: the number of examples, where weights are batch sizes."""

    @property
    def examples(self) -> int | None:
        """Examples that the objective is a mean over; None for a plain function or before the first evaluation."""
        return int(self.weight_seen) if self.batch_size is not None and self.batches_seen else None

    @abstractmethod
    def _terms(self) -> Iterator[Term]:
        """The batches; the objective is ``Σ w_b L_b / Σ w_b``."""

    def _whole_terms(self) -> Iterator[Term]:
        """The batches with all ranks' parts, for a single process its own.

        Raises:
            InputError: ranks with different numbers of batches, on all of them.
        """
        if self.ranks.count == 1:
            yield from self._terms()
            return
        known, index = bool(self._totals), 0
        totals = self._totals if known else []
        for index, term in enumerate(self._terms(), 1):
            if not known:
                totals.append(self._total(index, term.weight))
            yield over_ranks(term, self.ranks, totals[index - 1])
        if not known:
            self._total(index + 1, 0.0)
            self._totals = totals

    def _total(self, index: int, weight: float) -> float:
        """Weight of the ``index``-th batch over all ranks; 0 where this rank has none left."""
        weights = self.ranks.gather(weight)
        if any(weights) and not all(weights):
            without = [r for r, w in enumerate(weights) if not w]
            raise InputError(
                f"ranks {without} of {self.ranks.count} have no batch {index}, the others have one; expected a part of "
                "every batch on every rank: cut each batch with ranks.share(batch)"
            )
        return sum(weights)

    def _session(self) -> AbstractContextManager[Any]:
        """The context in which terms are evaluated."""
        return nullcontext()

    def _tick(self, n: int) -> None:
        if self.on_evaluation is not None:
            self.on_evaluation(n)

    def _pass(self, evaluate: Callable[[Term], Any]) -> Iterator[tuple[float, Any]]:
        """``(weight, evaluate(term))`` of every batch, one after the other: one pass over the data."""
        count, weights = 0, 0.0
        with self._session():
            for term in self._whole_terms():
                part = evaluate(term)
                count, weights = count + 1, weights + term.weight
                yield term.weight, part
        if not count:
            raise InputError("the objective's data holds no batch; expected at least one")
        self.batches_seen, self.weight_seen = count, weights

    def _mean(self, evaluate: Callable[[LossFunction], Any], add: Callable[[Any, float, Any], Any]) -> Any:
        result, weights = None, 0.0
        for weight, part in self._pass(lambda term: evaluate(term.loss)):
            weights += weight
            # running mean: a single batch is returned unchanged, and one part is held at a time
            result = part if result is None else add(result, weight / weights, part)
        return result

    def _each(self, evaluate: Callable[[Term], Tensor]) -> tuple[Tensor, Tensor]:
        """Weights ``[B]`` and values ``[B, n]`` of all batches."""
        weights, values = zip(*self._pass(evaluate), strict=True)
        stacked = torch.stack(values)
        return stacked.new_tensor(weights), stacked

    def __call__(self, params: Params) -> Tensor:
        """``L(θ)``, a scalar; transformable by ``torch.func`` when the data is one batch."""
        self.evaluations["losses"] += 1
        return self._mean(lambda fn: self._ticked(fn, params), lambda a, w, b: a + w * (b - a))

    def value_and_grad(self, params: Params) -> tuple[Tensor, Params]:
        """``L(θ)`` and ``∇L(θ)``, detached."""
        self.evaluations["gradients"] += 1
        return self._mean(
            lambda fn: self._ticked(lambda x: self._value_and_grad(fn, x), params),
            lambda a, w, b: (a[0] + w * (b[0] - a[0]), P.combine(1 - w, a[1], w, b[1])),
        )

    def many(self, source: Params | Sequence[Params]) -> Tensor:
        """``[L(θ_1), …, L(θ_n)]`` for a batch ``[n]`` or a sequence made on demand: shape ``[n]``."""
        n = P.count(source)
        if n == 0:
            raise InputError("many() got an empty sequence of points; expected at least one")
        self.evaluations["losses"] += n
        return self._mean(lambda fn: self._all_losses(fn, source), lambda a, w, b: a + w * (b - a))

    def many_by_batch(self, source: Params | Sequence[Params]) -> tuple[Tensor, Tensor]:
        """Weights ``[B]`` and the losses ``[B, n]`` of each batch at n points; their weighted mean is :meth:`many`."""
        self.evaluations["losses"] += P.count(source)
        return self._each(lambda term: self._all_losses(term.loss, source))

    def forms_by_batch(
        self, params: Params, source: Params | Sequence[Params], form: QuadraticForm
    ) -> tuple[Tensor, Tensor]:
        """Weights ``[B]`` and ``v_iᵀ A_b v_i``, ``‖v_i‖‖A_b v_i‖``, ``[B, n, 2]``: θ's part is built once per batch."""
        self.evaluations["products"] += P.count(source)

        def evaluate(term: Term) -> Tensor:
            apply = form(term, params)
            return torch.stack([self._ticked(apply, P.pick(source, i)) for i in range(P.count(source))])

        return self._each(evaluate)

    def _all_losses(self, fn: LossFunction, source: Params | Sequence[Params]) -> Tensor:
        points = Points(source, reuse=True)
        engine = self._engine_for(fn, points, gradients=False)
        parts = []
        for r in self._split(P.count(source), engine):
            parts.append(self._losses(fn, points, r, engine))
            self._tick(len(r))
        return torch.cat(parts)

    def _ticked(self, fn: Callable[[Params], Any], params: Params) -> Any:
        result = fn(params)
        self._tick(1)
        return result

    def along(self, params: Params, v: Params, t: Tensor) -> Tensor:
        """``[L(θ + t_1 v), …, L(θ + t_n v)]``, shape ``[n]``; never n copies of θ at once."""
        return self.many(Grid(params, [v], t))

    def many_value_and_grad(self, source: Params | Sequence[Params]) -> tuple[Tensor, Params]:
        """Losses ``[n]`` and gradients, a batch ``[n]``; detached."""
        n = P.count(source)
        self.evaluations["gradients"] += n

        def evaluate(fn: LossFunction) -> tuple[Tensor, Params]:
            points = Points(source)
            engine = self._engine_for(fn, points, gradients=True)
            parts = []
            for r in self._split(n, engine):
                parts.append(self._grads(fn, points, r, engine))
                self._tick(len(r))
            if len(parts) == 1:
                return parts[0]
            values = torch.cat([v for v, _ in parts])
            keys = parts[0][1].keys()
            return values, P.make({k: torch.cat([g[k] for _, g in parts]) for k in keys}, (n,))

        return self._mean(
            evaluate, lambda a, w, b: (a[0] + w * (b[0] - a[0]), P.combine(1 - w, a[1], w, b[1]))
        )

    def weighted_gradients(self, source: Params | Sequence[Params], weights: Tensor) -> Params:
        """``Σ_k W_jk ∇L(θ_k)`` for ``W`` of shape ``[m, n]``: a batch ``[m]``; one chunk of gradients is held."""
        n = P.count(source)
        self.evaluations["gradients"] += n

        def evaluate(fn: LossFunction) -> Params:
            points = Points(source)
            engine, total = self._engine_for(fn, points, gradients=True), None
            for r in self._split(n, engine):
                _, grads = self._grads(fn, points, r, engine)
                part = _weighted_sum(grads, weights[:, r.start : r.stop])
                self._tick(len(r))
                total = part if total is None else P.shift(total, part)
            assert total is not None
            return total

        return self._mean(evaluate, lambda a, w, b: P.combine(1 - w, a, w, b))

    def hessian(self, params: Params) -> Callable[[Params], Params]:
        """The Hessian at θ as a function ``v ↦ H v`` (exact, by a second backward pass; detached).

        On a single batch the graph of the gradient is built once and reused by every product; ``gradient`` of the
        function is then ``∇L(θ)``, which it needed, and None on several batches.
        """
        return _Hessian(self, params)

    def hessian_slope(self, params: Params, v: Params) -> Params:
        """``∇_θ vᵀH(θ)v`` with v held (exact, by a third backward pass; detached). It counts as a product."""
        self.evaluations["products"] += 1
        return self._mean(
            lambda fn: self._ticked(lambda x: hessian_slope(fn, x, v), params),
            lambda a, w, b: P.combine(1 - w, a, w, b),
        )

    def check(self, params: Params) -> None:
        """Raise :class:`InputError` if the objective is unfit for measuring; a plain function is taken as it is."""
        return

    def parts(self, n: int) -> list[AbstractObjective]:
        """The objective's batch cut into n chunks, each an objective with statistics of its own.

        Raises:
            InputError: nothing to cut, or fewer examples than chunks.
        """
        raise InputError(f"{type(self).__name__} cannot be cut into {n} chunks; expected the objective of one batch, "
                         "as bnsharp.backward makes it")


def _weighted_sum(grads: Params, weights: Tensor) -> Params:
    """``Σ_k W_jk g_k``, a batch ``[m]``."""
    return P.make({k: torch.tensordot(weights.to(g.dtype), g, dims=1) for k, g in grads.items()}, (len(weights),))


class _Hessian:
    """``v ↦ H v``: what :meth:`AbstractObjective.hessian` gives."""

    def __init__(self, objective: AbstractObjective, params: Params):
        self.objective, self.params = objective, params
        self._graph: GradientGraph | None = None
        with objective._session():
            terms = objective._whole_terms()
            first, second = next(terms, None), next(terms, None)
            if first is not None and second is None:
                self._graph = GradientGraph(first.loss, params)
                objective.batches_seen, objective.weight_seen = 1, first.weight
        self.gradient = None if self._graph is None else self._graph.slope

    def __call__(self, v: Params) -> Params:
        objective = self.objective
        objective.evaluations["products"] += 1
        if self._graph is not None:
            return objective._ticked(self._graph.product, v)  # type: ignore[no-any-return]
        return objective._mean(  # type: ignore[no-any-return]
            lambda fn: objective._ticked(GradientGraph(fn, self.params).product, v),
            lambda a, w, b: P.combine(1 - w, a, w, b),
        )


class FunctionObjective(AbstractObjective):
    """A plain function ``Params -> Tensor []`` as an objective."""

    takes_any_engine = True

    def __init__(self, fn: LossFunction, engine: Engine | str = "loop"):
        super().__init__(engine)
        self.fn = fn

    def _terms(self) -> Iterator[Term]:
        yield Term(1.0, self.fn)


def as_objective(objective: AbstractObjective | LossFunction) -> AbstractObjective:
    """The objective itself, or a plain function wrapped as one."""
    if isinstance(objective, AbstractObjective):
        return objective
    if not callable(objective):
        raise InputError(
            f"expected an objective or a function of parameters, got {type(objective).__name__}: "
            "use bnsharp.Objective(module, criterion, data)"
        )
    return FunctionObjective(objective)


