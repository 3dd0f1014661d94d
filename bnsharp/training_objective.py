"""The loss of one training batch: the module as its user set it, one mask, one update of running statistics."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bnsharp import params as P
from bnsharp.distributed import SINGLE, Ranks
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, Engine, is_transformed
from bnsharp.modes import Undo, freeze, hold, kept_activations, spare
from bnsharp.objective import ModuleObjective, arguments, batch_size
from bnsharp.passes import Draws, PassOverflow, Scaled, detached, has_node, is_finite, joined
from bnsharp.structure import Structure
from bnsharp.synchronised import synchronised
from bnsharp.types import LossFunction, Params, Term

REENTRANT = ("a layer is checkpointed with use_reentrant=True, which gives gradients to .backward() alone; expected "
             "use_reentrant=False")


class TrainingObjective(ModuleObjective):
    """The loss of one training batch, with the module in the modes its user set.

    Only the first evaluation may update running statistics (``update_statistics``); every later one uses the
    same random masks and leaves the statistics alone. ``output`` is the module's output at the first one. Parameters
    are put into the live module until their pass is over, forth and back, so that checkpointed layers, which repeat
    their forward pass inside the backward pass, see them as well. A module wrapped by ``torch.compile`` runs compiled,
    except where derivatives are taken twice or by ``torch.func``: compiled code has neither.

    Args:
        module: any ``nn.Module``, also inside the wrappers that :func:`bnsharp.params.unwrap` knows.
        criterion: ``(output, y) -> scalar``, the mean over the batch.
        batch: ``(x, y)``, x as for :class:`bnsharp.Objective`.
        update_statistics: whether the first evaluation updates running statistics.
        engine: how several points are evaluated.
        autocast: dtype of ``torch.autocast`` in forward passes; None changes nothing.
        everywhere: whether autocast is on at every point, or at the module's own parameters alone.
        gradient_scale: a scalar by which losses are multiplied before they are differentiated, and gradients divided
            afterwards; with one, a loss or gradient that is not finite raises :class:`PassOverflow`.
        like: an objective on the same batch, whose random masks are used.
        structure: of the module, where it is known.
        own: views of the module's own parameters, as they will be passed to evaluations: there nothing is put into the
            module and taken out again.
        ranks: processes that hold parts of the batch; losses, gradients and batch statistics are the whole batch's.

    Attributes:
        used: names of the parameters that a gradient has reached.

    Raises:
        InputError: a batch that is no pair.
    """

    statistics = "batch"

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        batch: tuple[Any, Any],
        *,
        update_statistics: bool = True,
        engine: Engine | str = "loop",
        autocast: torch.dtype | None = None,
        everywhere: bool = True,
        gradient_scale: Tensor | None = None,
        like: TrainingObjective | None = None,
        structure: Structure | None = None,
        own: Params | None = None,
        ranks: Ranks = SINGLE,
    ):
        super().__init__(module, criterion, engine, ranks, structure)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"a batch is a {type(batch).__name__}; expected a pair (x, y)")
        x, self.y = batch
        self.x: Any = dict(x) if isinstance(x, Mapping) else x
        self.batch_size: int = batch_size(self.x)
        self.update_statistics = update_statistics
        self.autocast, self.everywhere, self.gradient_scale = autocast, everywhere, gradient_scale
        self.used: set[str] = set()
        self._compiled = P.compiled(module)
        self._own = own
        narrow = autocast is not None and not everywhere
        self._addresses = {k: p.data_ptr() for k, p in self.structure.parameters.items()} if narrow else {}
        self._draws: Draws = Draws() if like is None else like._draws
        self._begin()

    def _begin(self) -> None:
        self._evaluated = False
        self._output_kept: Any = None
        self._loss_kept: Tensor | None = None
        self._parts: list[TrainingObjective] = []
        self._held: Undo | None = None
        self._once = self._missed = False
        self._root: Any = None

    # ------------------------------------------------------------ the batch

    @property
    def output(self) -> Any:
        """The module's output at the first evaluation, of all chunks where the batch was cut; None before it."""
        if self._parts and self._output_kept is None:
            outputs = [part.output for part in self._parts]
            return None if any(output is None for output in outputs) else joined(outputs)
        return self._output_kept

    @property
    def loss(self) -> Tensor | None:
        """The loss at the first evaluation, that of the first chunk where the batch was cut; None before it."""
        return self._parts[0].loss if self._parts else self._loss_kept

    @property
    def gradients(self) -> int:
        """Gradients and products with second derivatives evaluated, those of chunks included."""
        own = self.evaluations["gradients"] + self.evaluations["products"]
        return own + sum(part.gradients for part in self._parts)

    def parts(self, n: int) -> list[AbstractObjective]:
        if n > self.batch_size:
            raise InputError(f"{n} chunks of a batch of {self.batch_size}; expected at most one chunk per example")
        bounds = [len(rows) for rows in torch.arange(self.batch_size).tensor_split(n)]

        def cut(a: Any) -> Sequence[Any]:
            per_example = isinstance(a, Tensor) and a.ndim and len(a) == self.batch_size
            return a.split(bounds) if per_example else [a] * n

        (x, x_tree), (y, y_tree) = tree_flatten(self.x), tree_flatten(self.y)
        xs, ys = (list(zip(*map(cut, leaves), strict=True)) for leaves in (x, y))
        self._parts = []
        for i, (size, draws) in enumerate(zip(bounds, self._draws.parts(n), strict=True)):
            part = copy.copy(self)
            part.x, part.y = tree_unflatten(xs[i], x_tree), tree_unflatten(ys[i], y_tree)
            part.batch_size, part.evaluations, part._draws, part._totals = size, Counter(), draws, []
            part._begin()
            self._parts.append(part)
        return list(self._parts)

    # ------------------------------------------------------------ one evaluation

    def _terms(self) -> Iterator[Term]:
        yield Term(float(self.batch_size), self._evaluate, self._outcome, lambda output: self._judged(output, self.y))

    @contextmanager
    def _session(self) -> Iterator[None]:
        """What an evaluation has put into the module stays until the next one, or the end."""
        with synchronised(self.module, self.ranks), nullcontext() if self._once else kept_activations():
            self._held = held = Undo()
            try:
                yield
            finally:
                held.undo()
                self._held = None

    def _evaluate(self, params: Params) -> Tensor:
        loss = self._forward(params, lambda: self._loss(params, self.x, self.y, self._keep))
        if self._loss_kept is None:
            self._loss_kept = loss.detach()
        if not self._once:
            return loss
        if not loss.requires_grad and not is_transformed(params):
            raise InputError(f"the loss of {type(self.module).__name__} depends on no parameter that requires grad; "
                             "expected one that does: is the output detached, or computed under no_grad?")
        if is_transformed(params):
            self.used.update(params.keys())
        self._root = loss.grad_fn
        return loss if self.gradient_scale is None else Scaled.apply(loss, self.gradient_scale)  # type: ignore[no-untyped-call]

    def _chunks(self, n: int) -> list[range]:
        """The first evaluation is of one point alone: it moves statistics, draws the masks and gives the output."""
        rest = super()._chunks(n - 1 if n > 1 and not self._evaluated else n)
        return rest if self._evaluated or n < 2 else [range(1), *(range(r.start + 1, r.stop + 1) for r in rest)]

    def _outcome(self, params: Params) -> Any:
        return self._forward(params, lambda: self._output(params, self.x, self._keep))

    def _forward(self, params: Params, evaluate: Callable[[], Any]) -> Any:
        """One forward pass in its precision, with the batch's masks; statistics move at the first one, if at all."""
        updates = self.update_statistics and not self._evaluated
        dtype = self.autocast
        if dtype is not None and not self.everywhere and not self._is_own(params):
            dtype = None
        held = Undo() if self._held is None else self._held
        held.undo()
        states = self._draws.begin(params)
        try:
            if not updates:
                freeze(self.structure.owners, held)
            if dtype is None:
                value = evaluate()
            else:
                with torch.autocast(P.first(params).device.type, dtype=dtype):
                    value = evaluate()
                # inside a context of the caller's, low-precision copies of every point's weights would outlive it
                torch.clear_autocast_cache()
            if updates:
                spare(self.structure.owners, held)
        finally:
            self._draws.end(params, states)
            if self._held is None:
                held.undo()
        self._evaluated = True
        return value

    def _call(self, tensors: dict[str, Tensor], x: Any, converted: bool) -> Any:
        if self._held is None or converted or is_transformed(tensors):
            return super()._call(tensors, x, converted)
        parameters = self.structure.parameters
        if any(v is not parameters[k] for k, v in tensors.items()):
            hold(self.structure, tensors, self._held)
        positional, named = arguments(x)
        differentiable = torch.is_grad_enabled() and any(v.requires_grad for v in tensors.values())
        # compiled code would not see that batch normalizations are synchronised
        plain = self.ranks.count > 1 or not (self._once or not differentiable)
        module = self.module if plain else self._compiled
        return module(*positional, **named)

    def _keep(self, output: Any) -> None:
        if not self._evaluated:
            self._output_kept = detached(output)

    def _is_own(self, params: Params) -> bool:
        """Whether these are the module's own parameters, or aliases of them."""
        return not is_transformed(params) and all(v.data_ptr() == self._addresses.get(k) for k, v in params.items())

    # ------------------------------------------------------------ derivatives

    def value_and_grad(self, params: Params) -> tuple[Tensor, Params]:
        if self.ranks.count > 1 or is_transformed(params):
            with self._first_derivatives():
                value, gradient = super().value_and_grad(params)
            return value, self._unscaled(gradient)
        self.evaluations["gradients"] += 1
        with self._first_derivatives():
            self._held = held = Undo()  # one batch in one process: nothing to average or to synchronise
            try:
                value, gradient = self._finite(self._at(self._evaluate, params, bare=True))
            finally:
                held.undo()
                self._held = None
        self._tick(1)
        self.batches_seen, self.weight_seen = 1, float(self.batch_size)
        return value, self._unscaled(gradient)

    def _value_and_grad(self, fn: LossFunction, params: Params) -> tuple[Tensor, Params]:
        if not self._once or is_transformed(params):
            return super()._value_and_grad(fn, params)
        return self._at(fn, params)

    def _at(self, fn: LossFunction, params: Params, bare: bool = False) -> tuple[Tensor, Params]:
        """Loss and gradient: leaves that the loss does not reach get zeros, the others' names go into ``used``.

        ``bare``: the function takes a dictionary as well.
        """
        parameters = self.structure.parameters
        if params is self._own and not any(parameters[k]._backward_hooks for k in params.keys()):
            leaves: dict[str, Tensor] = {k: parameters[k] for k in params.keys()}
        else:  # also where hooks on a parameter would change this gradient and not those at other points
            leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        with torch.enable_grad():
            value = fn(cast(Params, leaves) if bare else P.make(leaves))
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        reached = dict(zip(leaves, grads, strict=True))
        missed = [k for k, g in reached.items() if g is None]
        self._missed = bool(missed)
        self.used.update(reached.keys() - missed if missed else reached)
        return value.detach(), P.make({k: torch.zeros_like(leaves[k]) if g is None else g for k, g in reached.items()})

    def many_value_and_grad(self, source: Params | Sequence[Params]) -> tuple[Tensor, Params]:
        with self._first_derivatives():
            values, gradients = super().many_value_and_grad(source)
        return values, self._unscaled(gradients)

    def weighted_gradients(self, source: Params | Sequence[Params], weights: Tensor) -> Params:
        with self._first_derivatives():
            gradients = super().weighted_gradients(source, weights)
        return self._unscaled(gradients)

    def hessian(self, params: Params) -> Callable[[Params], Params]:
        product = super().hessian(params)
        like = {k: p.detach().requires_grad_() for k, p in params.items()}

        def apply(v: Params) -> Params:
            # checkpointed layers repeat their forward pass, as it was, in each product
            undo = Undo()
            try:
                freeze(self.structure.owners, undo)
                hold(self.structure, like, undo)
                return product(v)
            finally:
                undo.undo()

        return apply

    @contextmanager
    def _first_derivatives(self) -> Iterator[None]:
        """Within, losses are differentiated once: compiled, and scaled."""
        self._once = True
        try:
            yield
            if self._missed and has_node(self._root, "CheckpointFunctionBackward"):
                raise InputError(REENTRANT)
        finally:
            self._once, self._root, self._missed = False, None, False

    def _pass(self, evaluate: Callable[[Term], Any]) -> Iterator[tuple[float, Any]]:
        return super()._pass(lambda term: self._finite(evaluate(term)))

    def _finite(self, values: Any) -> Any:
        """What was evaluated, if nothing in it overflowed."""
        if self.gradient_scale is not None:
            parts = values if isinstance(values, tuple) else (values,)
            if not all(map(is_finite, parts)):
                raise PassOverflow
        return values

    def _unscaled(self, gradient: Params) -> Params:
        return gradient if self.gradient_scale is None else P.pmap(lambda g: g / self.gradient_scale, gradient)
