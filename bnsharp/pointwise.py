"""Losses and gradients of one batch at n points, by an engine: what an objective does within a pass over its data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bnsharp import choosing, engines
from bnsharp import params as P
from bnsharp.distributed import SINGLE, Ranks
from bnsharp.engines import LOOP, Engine, Taken, as_engine
from bnsharp.errors import InputError
from bnsharp.grids import Points, stacked
from bnsharp.types import LossFunction, Params


def is_transformed(params: Params | Mapping[str, Tensor]) -> bool:
    """Whether a ``torch.func`` transform is under way: there, gradients must be taken by ``torch.func`` too."""
    return P.transforming() and any(P.is_wrapped(v) for v in params.values())


def value_and_grad(fn: LossFunction, params: Params) -> tuple[Tensor, Params]:
    """A loss and its gradient, detached; zeros where it does not depend on a parameter."""
    if is_transformed(params):
        grads, value = torch.func.grad_and_value(lambda d: fn(P.make(d)))(dict(params.items()))
        return value, P.make(grads)
    leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
    with torch.enable_grad():
        value = fn(P.make(leaves))
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), P.make(dict(zip(leaves, grads, strict=True)))


class PointLosses:
    """Evaluates a batch's loss at many points by its engine.

    An engine that is to be chosen, or compiled, is the loop where several ranks meet, where a graph of the losses is
    kept and within a transform of ``torch.func``.

    Raises:
        InputError: an unknown engine; one to be chosen or compiled in training.
    """

    takes_any_engine: ClassVar[bool] = False
    """Whether its engine may be chosen by timing, or compiled: where it measures, and does not train."""

    def __init__(self, engine: Engine | str, ranks: Ranks = SINGLE):
        self.engine = as_engine(engine)
        if not self.takes_any_engine and (self.engine.name == "auto" or self.engine.compile):
            raise InputError(
                f"engine={str(self.engine)!r} in training; expected 'loop' or 'vmap', the same in every step, since "
                "engines round differently: wrap the module by torch.compile to compile it"
            )
        self.ranks = ranks
        self.engines_taken: set[str] = set()
        """Engines that ``"auto"`` has taken; whoever reports them clears them before."""
        self._graphs: dict[Engine, engines.Compiled] = {}
        self._signature: str | None = None

    @property
    def engine_used(self) -> str:
        """The engine in words: the one given, or those chosen since ``engines_taken`` was last cleared."""
        return engines.used(self.engine, self.engines_taken)

    def signature(self) -> str:
        """What objectives have in common that share choices of engines."""
        if self._signature is None:
            self._signature = f"{type(self).__name__} {next(_signatures)}"
        return self._signature

    def _taken(self, fn: LossFunction, like: Params) -> Taken:
        """A batch's loss for a compiler, at points like this one."""
        raise InputError(f"{type(self).__name__} cannot be compiled; expected the objective of a module and its data: "
                         "use bnsharp.Objective")

    def _value_and_grad(self, fn: LossFunction, params: Params) -> tuple[Tensor, Params]:
        return value_and_grad(fn, params)

    def _chunks(self, n: int) -> list[range]:
        """Points evaluated together by the engine that was given."""
        return _ranges(n, self.engine.size)

    def _split(self, n: int, engine: Engine) -> list[range]:
        return self._chunks(n) if engine is self.engine else _ranges(n, engine.size)

    def _engine_for(self, fn: LossFunction, points: Points, gradients: bool) -> Engine:
        """The engine of one call."""
        given, n = self.engine, P.count(points.source)
        if given.name != "auto" and not given.compile:
            return given
        plain = self.ranks.count > 1 or (torch.is_grad_enabled() and not gradients) or n == 0 or points.transformed
        if given.name == "auto":
            given = LOOP if plain or n < choosing.FEWEST else self._chosen(fn, points, gradients)
            self.engines_taken.add(str(given))
        elif plain:
            return replace(given, compile=False)
        return LOOP if given.compile and given.size > n else given

    def _chosen(self, fn: LossFunction, points: Points, gradients: bool) -> Engine:
        n, one = P.count(points.source), P.first(points.like)
        evaluate = self._grads if gradients else self._losses
        size = choosing.bucket(n)
        call = (f"{'gradients' if gradients else 'losses'} at {size}"
                f"{' or more' if size == choosing.CHUNKS[-1] else f' to {2 * size - 1}'} points, "
                f"{str(one.dtype).removeprefix('torch.')}{', compiled too' if self.engine.compile else ''}")
        key = f"{call}; {self.signature()}; {choosing.machine(one.device)}"
        return choosing.choose(
            key, call, n, self.engine.compile, lambda e, m: evaluate(fn, points, range(m), e), one.device, gradients
        )

    def _losses(self, fn: LossFunction, points: Points, r: range, engine: Engine) -> Tensor:
        if engine.compile:
            return self._compiled_losses(fn, points, r, engine, [])
        if len(r) == 1:
            value = fn(points[r.start]).unsqueeze(0)
            return value.clone() if points.shared else value  # it may be a view of what the next point overwrites
        chunk = dict(stacked(points.source, r).items())
        return torch.func.vmap(lambda d: fn(P.make(d)), randomness="same")(chunk)

    def _grads(self, fn: LossFunction, points: Points, r: range, engine: Engine) -> tuple[Tensor, Params]:
        if engine.compile:
            return self._compiled_grads(fn, points, r, engine)
        if len(r) == 1:
            value, grad = self._value_and_grad(fn, points[r.start])
            return value.unsqueeze(0), P.batch(grad)
        chunk = {k: v.detach() for k, v in stacked(points.source, r).items()}
        grads, values = torch.func.vmap(
            torch.func.grad_and_value(lambda d: fn(P.make(d))), randomness="same"
        )(chunk)
        return values, P.make(grads, (len(r),))

    def _compiled_losses(
        self, fn: LossFunction, points: Points, r: range, engine: Engine, leaves: list[dict[str, Tensor]]
    ) -> Tensor:
        """Losses ``[r]``; with gradients on, what they are functions of is appended to ``leaves``."""
        taken, single = self._taken(fn, points.like), engine.size == 1
        if single:
            tensors = dict(points[r.start].items())
        else:  # a graph is made for one number of points: the last chunk starts earlier
            first = max(0, r.stop - engine.size)
            tensors = dict(stacked(points.source, range(first, first + engine.size)).items())
        if torch.is_grad_enabled():
            tensors = {k: v.detach().requires_grad_() for k, v in tensors.items()}
            leaves.append(tensors)
        if engine not in self._graphs:
            self._graphs[engine] = engines.compiled(taken.program, engine, next(iter(tensors.values())).device)
        values = self._graphs[engine](tensors, taken.rest, taken.data)
        return values.reshape(1) if single else values[engine.size - len(r) :]

    def _compiled_grads(
        self, fn: LossFunction, points: Points, r: range, engine: Engine
    ) -> tuple[Tensor, Params]:
        """Values and gradients: each value depends on its own point alone, so that their sum has all gradients."""
        leaves: list[dict[str, Tensor]] = []
        with torch.enable_grad():
            values = self._compiled_losses(fn, points, r, engine, leaves)
            (tensors,) = leaves
            found = torch.autograd.grad(
                values.sum(), list(tensors.values()), allow_unused=True, materialize_grads=True
            )
        grads = P.make(dict(zip(tensors, found, strict=True)))
        own = P.batch(grads) if engine.size == 1 else P.make({k: g[engine.size - len(r) :] for k, g in grads.items()},
                                                             (len(r),))
        return values.detach(), own


_signatures = itertools.count()


def _ranges(n: int, size: int) -> list[range]:
    return [range(start, min(start + size, n)) for start in range(0, n, size)]
