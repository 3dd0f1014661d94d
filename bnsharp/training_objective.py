"""The loss of one training batch: the module as its user set it, one mask, one update of running statistics."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bnsharp import params as P
from bnsharp.distributed import SINGLE, Ranks
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective, Engine, is_transformed
from bnsharp.modes import frozen_statistics
from bnsharp.objective import ModuleObjective, arguments, batch_size, differ, random_states, restore
from bnsharp.synchronised import synchronised
from bnsharp.types import Params, Term

REENTRANT = ("a layer is checkpointed with use_reentrant=True, which gives gradients to .backward() alone; expected "
             "use_reentrant=False")


class PassOverflow(ArithmeticError):
    """A pass of a step with a gradient scaler gave a loss or a gradient that is not finite."""


class Draws:
    """What random layers draw on one batch: noted at the first evaluation, the same at every later one."""

    def __init__(self) -> None:
        self._states: dict[torch.device, Tensor] | None = None
        self._parts: dict[int, list[Draws]] = {}

    def parts(self, n: int) -> list[Draws]:
        """Those of n chunks of the batch, the same for every objective on it."""
        return self._parts.setdefault(n, [Draws() for _ in range(n)])

    @contextmanager
    def same(self, params: Params) -> Iterator[None]:
        """An evaluation; in the end the global random state has moved on as after the first one alone."""
        if self._states is None:
            before = random_states(params)
            yield
            # a pass that drew nothing needs no masks remade
            self._states = before if differ(before, random_states(params)) else {}
            return
        current = random_states(params) if self._states else {}
        try:
            restore(self._states)
            yield
        finally:
            restore(current)


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module's parameters are ``tensors``, wherever each of them is used (tied weights)."""
    new = {id(p): tensors[name] for name, p in module.named_parameters() if name in tensors}
    places = [(m._parameters, name, p) for m in module.modules() for name, p in m._parameters.items() if id(p) in new]
    try:
        for store, name, p in places:
            store[name] = new[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, p in places:
            store[name] = p


@contextmanager
def spare_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics are copies: a forward pass repeated inside a backward pass (checkpointing) moves these."""
    kept = [
        (m._buffers, name, b)
        for m in module.modules() if m.training and m._buffers.get("running_mean") is not None
        for name, b in m._buffers.items() if b is not None
    ]
    try:
        for store, name, b in kept:
            store[name] = b.clone()
        yield
    finally:
        for store, name, b in kept:
            store[name] = b


def detached(output: Any) -> Any:
    """A module's output without its graph: tensors, pytrees and dataclasses of them."""
    if isinstance(output, Tensor):
        return output.detach()
    leaves, tree = tree_flatten(output)
    if len(leaves) == 1 and leaves[0] is output:
        if is_dataclass(output) and not isinstance(output, type):
            return replace(output, **{f.name: detached(getattr(output, f.name)) for f in fields(output) if f.init})
        return output
    return tree_unflatten([detached(leaf) for leaf in leaves], tree)


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
        ranks: Ranks = SINGLE,
    ):
        super().__init__(module, criterion, engine, ranks)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"a batch is a {type(batch).__name__}; expected a pair (x, y)")
        x, self.y = batch
        self.x: Any = dict(x) if isinstance(x, Mapping) else x
        self.batch_size: int = batch_size(self.x)
        self.update_statistics = update_statistics
        self.autocast, self.everywhere, self.gradient_scale = autocast, everywhere, gradient_scale
        self.used: set[str] = set()
        self._compiled = P.compiled(module)
        self._trained = {k for k, p in self.module.named_parameters() if p.requires_grad}
        self._places = {} if everywhere else {k: p.data_ptr() for k, p in self.module.named_parameters()}
        self._draws: Draws = Draws() if like is None else like._draws
        self._begin()

    def _begin(self) -> None:
        self._evaluated = False
        self._output_kept: Any = None
        self._loss_kept: Tensor | None = None
        self._parts: list[TrainingObjective] = []
        self._held: ExitStack | None = None
        self._once = False
        self._root: Any = None

    # ------------------------------------------------------------ the batch

    @property
    def output(self) -> Any:
        """The module's output at the first evaluation, of all chunks where the batch was cut; None before it."""
        if self._parts and self._output_kept is None:
            outputs = [part.output for part in self._parts]
            if any(output is None for output in outputs):
                return None
            return tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *outputs)
        return self._output_kept

    @property
    def loss(self) -> Tensor | None:
        """The loss at the first evaluation, that of the first chunk where the batch was cut; None before it."""
        return self._parts[0].loss if self._parts else self._loss_kept

    @property
    def gradients(self) -> int:
        """Gradients evaluated, those of chunks included."""
        return self.evaluations["gradients"] + sum(part.gradients for part in self._parts)

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
        with synchronised(self.module, self.ranks), ExitStack() as stack:
            self._held = stack
            try:
                yield
            finally:
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
        self._note_use(params)
        self._root = loss.grad_fn
        return loss if self.gradient_scale is None else _Scaled.apply(loss, self.gradient_scale)  # type: ignore[no-untyped-call]

    def _outcome(self, params: Params) -> Any:
        return self._forward(params, lambda: self._output(params, self.x, self._keep))

    def _forward(self, params: Params, evaluate: Callable[[], Any]) -> Any:
        """One forward pass in its precision, with the batch's masks; statistics move at the first one, if at all."""
        updates = self.update_statistics and not self._evaluated
        dtype = self.autocast if self.everywhere or self._is_own(params) else None
        with ExitStack() as alone:
            held = alone if self._held is None else self._held
            held.close()
            if not updates:
                held.enter_context(frozen_statistics(self.module))
            with (
                self._draws.same(params),
                nullcontext() if dtype is None else torch.autocast(P.first(params).device.type, dtype=dtype),
            ):
                value = evaluate()
            if updates:
                held.enter_context(spare_statistics(self.module))
        if dtype is not None:
            # inside a context of the caller's, low-precision copies of every point's weights would outlive the point
            torch.clear_autocast_cache()
        self._evaluated = True
        return value

    def _call(self, tensors: dict[str, Tensor], x: Any) -> Any:
        converted = any(v.dtype != self._dtypes.get(k) for k, v in tensors.items())
        if self._held is None or converted or is_transformed(P.make(tensors)):
            return super()._call(tensors, x)
        self._held.enter_context(holding(self.module, tensors))
        positional, named = arguments(x)
        differentiable = torch.is_grad_enabled() and any(v.requires_grad for v in tensors.values())
        module = self._compiled if self._once or not differentiable else self.module
        return module(*positional, **named)

    def _keep(self, output: Any) -> None:
        if not self._evaluated:
            self._output_kept = detached(output)

    def _is_own(self, params: Params) -> bool:
        """Whether these are the module's own parameters, or aliases of them."""
        return not is_transformed(params) and all(v.data_ptr() == self._places.get(k) for k, v in params.items())

    # ------------------------------------------------------------ derivatives

    def value_and_grad(self, params: Params) -> tuple[Tensor, Params]:
        with self._first_derivatives():
            value, gradient = super().value_and_grad(params)
        return value, self._unscaled(gradient)

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
            with frozen_statistics(self.module), holding(self.module, like):
                return product(v)

        return apply

    @contextmanager
    def _first_derivatives(self) -> Iterator[None]:
        """Within, losses are differentiated once: compiled, and scaled."""
        self._once = True
        try:
            yield
            if len(self.used) < len(self._trained) and _has_node(self._root, "CheckpointFunctionBackward"):
                raise InputError(REENTRANT)
        finally:
            self._once, self._root = False, None

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

    def _note_use(self, params: Params) -> None:
        """Names of parameters that a gradient reaches from here are put into ``used``."""
        for name, tensor in params.items():
            if is_transformed(params):
                self.used.add(name)
            elif name not in self.used and tensor.requires_grad:
                tensor.register_hook(lambda d, name=name: self.used.add(name))  # type: ignore[misc]


def _has_node(root: Any, name: str) -> bool:
    """Whether a graph has a node of this name."""
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == name:
            return True
        seen.add(node)
        left += [parent for parent, _ in node.next_functions]
    return False


def is_finite(values: Tensor | Params) -> bool:
    """Whether every number of a tensor or a parameter dictionary is finite."""
    tensors: list[Tensor] = [values] if isinstance(values, Tensor) else list(values.values())
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


class _Scaled(torch.autograd.Function):
    """The loss itself, with a derivative ``scale`` times as large: small ones do not underflow in half precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, scale: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d * ctx.saved_tensors[0], None
