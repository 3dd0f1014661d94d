"""Objectives on a module: ``θ ↦ mean loss over data`` as pure functions of a parameter dictionary."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from bnsharp import params as P
from bnsharp.checks import one_of
from bnsharp.distributed import SINGLE, SMALLEST_SHARE, Ranks
from bnsharp.engines import Engine, Taken
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective
from bnsharp.modes import Undo, hold, measuring
from bnsharp.structure import Structure
from bnsharp.synchronised import synchronised
from bnsharp.types import LossFunction, Params, Term

_FULL = (torch.float32, torch.float64)


def batch_size(x: Any) -> int:
    """Examples in a batch's inputs, a tensor or a pytree of tensors."""
    leaves = [leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves:
        raise InputError(f"a batch's inputs hold no tensor with examples along dimension 0, got {type(x).__name__}")
    return int(leaves[0].shape[0])


def _is_pair(data: Any) -> bool:
    """Whether data is one ``(x, y)`` rather than a collection of batches (two pairs in a tuple are two batches)."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    pairs = all(isinstance(item, tuple | list) and len(item) == 2 for item in data)
    return isinstance(data[1], Tensor) or (isinstance(data, tuple) and not pairs)


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How inputs are passed to a module: a tuple as ``module(*x)``, a dictionary as ``module(**x)``."""
    if isinstance(x, dict):
        return (), x
    return (tuple(x) if isinstance(x, tuple | list) else (x,)), {}


class ModuleObjective(AbstractObjective):
    """What objectives on a module share: the functional call, its checks, its error messages."""

    def __init__(
        self, module: nn.Module, criterion: Callable[[Any, Any], Tensor], engine: Engine | str, ranks: Ranks = SINGLE,
        structure: Structure | None = None,
    ):
        super().__init__(engine, ranks)
        self.structure = Structure(module) if structure is None else structure
        self.module, self.criterion = self.structure.module, criterion
        self._dtypes = {k: p.dtype for k, p in self.structure.parameters.items()}
        self._rest: dict[tuple[torch.dtype, int], dict[str, Tensor]] | None = None
        """Within a pass over the data: buffers and frozen parameters in another precision, by it and what is given."""

    def _is_converted(self, params: Params | Mapping[str, Tensor]) -> bool:
        """Whether parameters come in another precision than the module's.

        Raises:
            InputError: parameters that the module does not have.
        """
        dtypes = self._dtypes
        unknown = [k for k in params.keys() if k not in dtypes]
        if unknown:
            raise InputError(
                f"parameters {sorted(unknown)[:3]} are not in {type(self.module).__name__}; expected the keys of "
                "bnsharp.parameters(module)"
            )
        return any(v.dtype != dtypes[k] for k, v in params.items())

    def _tensors(self, params: Params) -> dict[str, Tensor]:
        """``params`` in another precision than the module's, with its buffers and frozen parameters in that."""
        given, dtype, known = dict(params.items()), P.first(params).dtype, {} if self._rest is None else self._rest
        if (dtype, len(given)) not in known:
            rest = [*self.module.named_buffers(), *self.structure.parameters.items()]
            known[dtype, len(given)] = {
                k: t.detach().to(dtype) for k, t in rest if k not in given and t.is_floating_point()
            }
        return {**known[dtype, len(given)], **given}

    def _loss(self, params: Params, x: Any, y: Any, keep: Callable[[Any], None] | None = None) -> Tensor:
        return self._judged(self._output(params, x, keep), y)

    def _output(self, params: Params, x: Any, keep: Callable[[Any], None] | None = None) -> Any:
        """The module's output; inputs follow the parameters into another precision than the module's."""
        converted = self._is_converted(params)
        if converted:
            x = self._inputs(x, P.first(params).dtype)
        try:
            output = self._call(self._tensors(params) if converted else dict(params.items()), x, converted)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise InputError(
                    f"a batch of {batch_size(x)} example(s) leaves one value per channel, and batch statistics need at "
                    "least two: use a larger batch, or statistics='running'"
                ) from error
            raise
        if keep is not None:
            keep(output)
        return output

    def _inputs(self, x: Any, dtype: torch.dtype) -> Any:
        """A batch's inputs in another precision than the module's."""
        return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, x)

    def _call(self, tensors: dict[str, Tensor], x: Any, converted: bool) -> Any:
        """The module at inputs x, with these tensors for parameters and, where converted, buffers."""
        return torch.func.functional_call(self.module, tensors, *arguments(x))

    def _criterion_in(self, dtype: torch.dtype) -> Callable[[Any, Any], Tensor]:
        """The criterion; a copy in another precision where it is a module with tensors of its own (class weights)."""
        criterion = self.criterion
        if not isinstance(criterion, nn.Module):
            return criterion
        own = [t for t in [*criterion.parameters(), *criterion.buffers()] if t.is_floating_point()]
        if not own or dtype not in _FULL or all(t.dtype == dtype for t in own):
            return criterion
        return copy.deepcopy(criterion).to(dtype)

    def _judged(self, output: Any, y: Any) -> Tensor:
        first = next((t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()), None)
        # targets follow the parameters; under autocast a criterion promotes them itself
        if isinstance(y, Tensor) and y.is_floating_point() and first is not None and first.dtype in _FULL:
            y = y.to(first.dtype)
        criterion = self.criterion if first is None else self._criterion_in(first.dtype)
        try:
            loss = criterion(output, y)
        except IndexError as error:
            known = isinstance(y, Tensor) and not y.is_floating_point() and y.numel() and first is not None
            if not known or "out of bounds" not in str(error):
                raise
            raise InputError(
                f"labels run from {int(y.min())} to {int(y.max())} and the output has shape {list(first.shape)}; "  # type: ignore[union-attr]
                "expected labels from 0 to classes - 1"
            ) from error
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the criterion returned {got}; expected a scalar mean over the batch (reduction='mean')")
        return loss


class Objective(ModuleObjective):
    """``θ ↦ mean loss of module(x; θ)`` over fixed data, with the normalizers' statistics of each batch.

    Args:
        module: any ``nn.Module``. It is referred to, not copied: buffers and eps are read at each call;
            modes and tracking are switched during a call and restored, and it is never written to.
        criterion: ``(output, y) -> scalar``, the mean over the batch.
        data: one ``(x, y)``, or a re-iterable of such batches, each weighted by its number of examples.
            ``x`` is a tensor, a tuple (``module(*x)``) or a dictionary (``module(**x)``).
        statistics: ``"batch"`` (the function is scale invariant) or ``"running"`` (it is not).
        engine: how several points are evaluated, see :class:`bnsharp.Engine`. The default repeats every bit; ``"auto"``
            is what is fastest here, and another run may choose an engine whose last bits differ.
        ranks: the processes that hold parts of the data (:func:`bnsharp.distributed.joined`). ``data`` is then this
            one's part of every batch (``ranks.share(batch)``), batch statistics are those of whole batches, and every
            number is that of one process with all of the data, on all ranks. All ranks make the same calls.

    Raises:
        InputError: one-shot iterators, shuffling loaders, a batch of one with batch statistics, a criterion
            that is not a scalar, a module that stays random when measured, ranks with different numbers of batches.
    """

    takes_any_engine = True

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        statistics: str = "batch",
        engine: Engine | str = "loop",
        ranks: Ranks = SINGLE,
    ):
        super().__init__(module, criterion, engine, ranks)
        one_of("statistics", statistics, ("batch", "running"))
        self.statistics = statistics
        self.batches: Iterable[tuple[Any, Any]] = (tuple(data),) if _is_pair(data) else data  # type: ignore[assignment]
        if isinstance(self.batches, Iterator) or not hasattr(self.batches, "__iter__"):
            raise InputError(
                f"data is a {type(data).__name__}; expected one (x, y) or a collection of batches that can be "
                "iterated again: pass list(data) or a DataLoader"
            )
        sampler = getattr(self.batches, "sampler", None)
        if isinstance(sampler, torch.utils.data.RandomSampler):
            raise InputError(
                "the data loader shuffles, so that batch statistics change from pass to pass; expected fixed "
                "batches: pass shuffle=False"
            )
        self.batch_size = None
        self._shapes: list[Any] = []
        for x, y in self.batches:
            self.batch_size = batch_size(x)
            self._shapes = [(t.shape, t.dtype) for t in tree_flatten((x, y))[0] if isinstance(t, Tensor)]
            break
        if self.batch_size is not None:
            self.batch_size = int(sum(ranks.gather(self.batch_size)))
        else:
            raise InputError("data holds no batch; expected one (x, y) or a non-empty collection of batches")
        self._checked = False
        self._converted: tuple[Any, torch.dtype, Any] | None = None

    def signature(self) -> str:
        """The network's layers and shapes, the first batch's shapes, criterion and statistics, as a checksum."""
        if self._signature is None:
            name = getattr(self.criterion, "__qualname__", None) or repr(self.criterion)
            shapes = [(k, p.shape) for k, p in self.structure.parameters.items()]
            known = [repr(self.module), shapes, self._shapes, name, self.statistics]
            self._signature = hashlib.sha256(repr(known).encode()).hexdigest()[:20]
        return self._signature

    def _terms(self) -> Iterator[Term]:
        for x, y in self.batches:
            yield Term(
                float(batch_size(x)),
                BatchLoss(self, x, y),
                lambda params, x=x: self._output(params, x),  # type: ignore[misc]
                lambda output, y=y: self._judged(output, y),  # type: ignore[misc]
            )

    def with_criterion(self, criterion: Callable[[Any, Any], Tensor]) -> Objective:
        """The same network, data, statistics and engine under another criterion."""
        other = Objective(self.module, criterion, self.batches, statistics=str(self.statistics), engine=self.engine,
                          ranks=self.ranks)
        other.on_evaluation, other._checked = self.on_evaluation, self._checked
        return other

    @contextmanager
    def _session(self) -> Iterator[None]:
        """One walk over the module per pass; buffers and inputs in another precision are kept until its end."""
        assert self.statistics is not None
        self.structure = Structure(self.module)
        self._dtypes = {k: p.dtype for k, p in self.structure.parameters.items()}
        with measuring(self.module, self.statistics), synchronised(self.module, self.ranks):
            self._rest = {}
            try:
                yield
            finally:
                self._rest = self._converted = None

    def _inputs(self, x: Any, dtype: torch.dtype) -> Any:
        if self._rest is None:
            return super()._inputs(x, dtype)
        if self._converted is None or self._converted[0] is not x or self._converted[1] != dtype:
            self._converted = (x, dtype, super()._inputs(x, dtype))
        return self._converted[2]

    def _call(self, tensors: dict[str, Tensor], x: Any, converted: bool) -> Any:
        if self._rest is None or (converted and not tensors.keys() <= self._dtypes.keys()):  # buffers are replaced too
            return super()._call(tensors, x, converted)
        undo, (positional, named) = Undo(), arguments(x)
        try:
            hold(self.structure, tensors, undo)
            return self.module(*positional, **named)
        finally:
            undo.undo()

    def _taken(self, fn: LossFunction, like: Params) -> Taken:
        assert isinstance(fn, BatchLoss)
        tensors, x = dict(like.items()), fn.x
        if self._is_converted(like):
            tensors, x = self._tensors(like), self._inputs(x, P.first(like).dtype)
        return Taken(self._program, {k: v for k, v in tensors.items() if k not in like.keys()}, (x, fn.y))

    def _program(self, points: dict[str, Tensor], rest: dict[str, Tensor], data: Any) -> Tensor:
        """The loss as a pure function of tensors, for a compiler."""
        x, y = data
        return self._judged(torch.func.functional_call(self.module, {**rest, **points}, *arguments(x)), y)

    def check(self, params: Params) -> None:
        """Evaluate twice on at most 64 examples of the first batch; once per objective."""
        if self._checked:
            return
        x, y = next(iter(self.batches))
        if not isinstance(self.batches, tuple | list) and not _equal((x, y), next(iter(self.batches))):
            raise InputError(
                "the data gives another first batch when iterated again (it shuffles, samples or augments); expected "
                "fixed batches: pass list(data), or a loader without randomness"
            )
        n = batch_size(x)

        def cut(a: Any) -> Any:
            return a[:64] if isinstance(a, Tensor) and a.ndim and len(a) == n else a

        x, y = tree_map(cut, x), tree_map(cut, y)
        states = random_states(params)
        try:
            with torch.no_grad(), self._session():
                first, second = self._loss(params, x, y), self._loss(params, x, y)
            drew = differ(states, random_states(params))
        finally:
            restore(states)
        tolerance = 1e3 * torch.finfo(first.dtype).eps * (1 + float(first.abs()))
        if drew or (bool(first.isfinite()) and float((first - second).abs()) > tolerance):
            raise InputError(
                f"{type(self.module).__name__} stays random when measured: two evaluations at one point gave "
                f"{float(first):.6g} and {float(second):.6g}; expected a deterministic function: switch the random "
                "layer off in eval mode"
            )
        self._checked = True


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """``θ ↦`` the loss of one batch of an objective."""

    objective: Objective
    x: Any
    y: Any

    def __call__(self, params: Params) -> Tensor:
        return self.objective._loss(params, self.x, self.y)


CHECKED = 64
"""Examples on which parts are compared with the whole, or two for each rank."""


def check_parts(
    module: nn.Module, criterion: Callable[[Any, Any], Tensor], batch: tuple[Any, Any], ranks: Ranks
) -> None:
    """Compare the loss of a whole batch (its first examples) with the one put together from the ranks' parts.

    Raises:
        InputError: they differ, on all ranks: a criterion that is no plain mean over examples, or a module that couples
            examples in another way than PyTorch's batch normalization.
    """
    if ranks.count == 1:
        return
    n, most = batch_size(batch[0]), max(CHECKED, SMALLEST_SHARE * ranks.count)
    first = tree_map(lambda t: t[:most] if isinstance(t, Tensor) and t.ndim and len(t) == n else t, tuple(batch))
    theta = P.live(module)
    with torch.no_grad():
        whole = Objective(module, criterion, first)(theta)
        parts = Objective(module, criterion, ranks.share(first), ranks=ranks)(theta)
    tolerance = 1e3 * torch.finfo(whole.dtype).eps * (1 + float(whole.abs()))
    if bool(whole.isfinite()) and float((whole - parts).abs()) > tolerance:
        raise InputError(
            f"the loss of a batch is {float(whole):.6g} in one process, {float(parts):.6g} over {ranks.count} ranks; "
            "expected a criterion that is a mean over examples, and no statistics of the batch but those of PyTorch's "
            "batch normalization: use one process, or directions='local', in which each part is a batch of its own"
        )


def _equal(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors."""
    one, two = (tree_flatten(x)[0] for x in (a, b))
    tensors = [isinstance(x, Tensor) for x in one] == [isinstance(x, Tensor) for x in two]
    return tensors and all(torch.equal(x, y) for x, y in zip(one, two, strict=True) if isinstance(x, Tensor))


_CPU = torch.device("cpu")


def random_states(params: Params | Mapping[str, Tensor]) -> dict[torch.device, Tensor]:
    """The global random states that layers on the parameters' devices draw from."""
    states = {_CPU: torch.default_generator.get_state()}
    for v in params.values():
        if v.is_cuda and v.device not in states:
            states[v.device] = torch.cuda.get_rng_state(v.device)
    return states


def differ(before: dict[torch.device, Tensor], after: dict[torch.device, Tensor]) -> bool:
    """Whether something drew from the global random states in between."""
    return any(not torch.equal(state, after[device]) for device, state in before.items())


def restore(states: dict[torch.device, Tensor]) -> None:
    """Make these the global random states."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
