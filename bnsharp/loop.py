"""A regularised backward pass in anyone's training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnsharp import params as P
from bnsharp.checks import one_of, positive
from bnsharp.distributed import SINGLE, Ranks, average
from bnsharp.errors import InputError
from bnsharp.evaluation import Engine
from bnsharp.passes import PassOverflow, is_finite
from bnsharp.penalties import Penalty, Regularizer
from bnsharp.structure import Structure
from bnsharp.training_objective import REENTRANT, TrainingObjective
from bnsharp.types import Params, State, Step

Batch = tuple[Any, Any]
PRECISIONS = ("float32", "ambient")
"""Of a regulariser's passes under autocast: the parameters' own precision, or autocast's."""
DIRECTIONS = ("synchronised", "local")
"""Over ranks: those of the whole batch, or each rank's own from its part (m-SAM)."""


def backward(
    module: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    batch: Batch,
    regularizer: Regularizer,
    weight: float = 1.0,
    *,
    other_batches: Sequence[Batch] = (),
    generator: torch.Generator | None = None,
    state: State | None = None,
    scale: float = 1.0,
    engine: Engine | str = "loop",
    precision: str = "float32",
    scaler: torch.amp.GradScaler | None = None,
    ranks: Ranks | None = None,
    directions: str = "synchronised",
    share_gradient: bool = False,
    structure: Structure | None = None,
) -> Step:
    """What ``loss.backward()`` does, for a regularised loss: add ``scale·gradient`` to every ``.grad``.

    A parameter that no pass has reached keeps its ``.grad``, as with ``loss.backward()``. Inside ``torch.no_grad()`` or
    ``torch.inference_mode()`` it does the same as outside.

    Args:
        module: in the modes you train it in, also compiled or wrapped (DDP, Fabric); its parameters are not moved.
        criterion: ``(output, y) -> scalar``, the mean over the batch.
        batch: ``(x, y)``, the loss's batch: x a tensor, a tuple (``module(*x)``) or a mapping (``module(**x)``). Only
            its first evaluation updates running statistics, and random layers see one mask in all of them.
        regularizer: any :class:`bnsharp.regularizers.Regularizer`.
        weight: λ ≥ 0.
        other_batches: fresh batches for the regulariser; without one it uses ``batch``.
        generator: source of random directions; None seeds one from PyTorch's global generator.
        state: the state returned by the last step; None starts afresh.
        scale: factor > 0 on what is added (``1/k`` when accumulating over k micro-batches).
        engine: how several perturbed points of one step are evaluated.
        precision: under ``torch.autocast``, what is not the loss's own evaluation runs without it (``"float32"``): in
            bfloat16 the difference of two gradients is rounding error. Penalties then take ∇L(θ) twice, for the loss
            and for their difference. ``"ambient"`` evaluates everything under autocast.
        scaler: a gradient scaler for float16 autocast. ``.grad`` receives gradients times its scale, for
            ``scaler.unscale_``, ``step`` and ``update``. If any pass overflows the step ends there: ``.grad`` is not
            finite, so that ``scaler.step`` skips the update, and the state returned is the one passed in.
        ranks: processes that hold parts of the batch; None is those of a ``DistributedDataParallel`` module, else this
            one alone. ``.grad`` is the same on all of them.
        directions: ``"synchronised"``: the step of the whole batch, with its batch statistics, as one process would
            take; ``"local"``: each rank a step on its part, averaged (m-SAM).
        share_gradient: where ``.grad`` is None and ``scale`` 1, it becomes the very tensor in the step returned: no
            copy is made, and what then changes ``.grad`` in place (clipping) changes the step's gradient. A gradient
            in the memory of another, of a parameter or of the state is copied all the same.
        structure: ``Structure(module)``, made once by a loop of many steps; where a parameter or submodule has been
            added, replaced or removed since, it is made anew.

    Returns:
        The step: loss, penalty, gradient, gradients evaluated, state, the module's output (of this rank's part).

    Raises:
        InputError: an argument out of range; a scaler without float16 autocast; a Fabric module in mixed precision
            outside ``fabric.autocast()``; reentrant checkpointing; a loss that depends on no parameter.
    """
    positive("scale", scale)
    one_of("precision", precision, PRECISIONS)
    one_of("directions", directions, DIRECTIONS)
    structure = structure if structure is not None and structure.is_of(module) else Structure(module)
    owned = structure.trained or P.trainable(module)
    ambient = _Ambient.now(module, owned, scaler)
    ranks = _ranks_of(module) if ranks is None else ranks
    with _outside(ambient):
        params = P.make({name: parameter.detach() for name, parameter in owned})
        grad_scale = _scale_of(scaler, params)
        before = regularizer.init(params) if state is None else state

        def objective(data: Batch, **options: Any) -> TrainingObjective:
            return TrainingObjective(
                module, criterion, _usable(data), engine=engine, gradient_scale=grad_scale,
                ranks=ranks if directions == "synchronised" else SINGLE, structure=structure, own=params, **options,
            )

        first = objective(batch, autocast=ambient.dtype, everywhere=precision == "ambient")
        others_in = ambient.dtype if precision == "ambient" else None
        others = [objective(b, update_statistics=False, autocast=others_in) for b in _batches(other_batches)]
        if ambient.dtype is not None and others_in is None and not others and _takes_differences(regularizer):
            others = [objective(batch, update_statistics=False, like=first)]
        drawn = _generator(generator, params, ranks, directions)
        objectives, local = [first, *others], directions == "local"
        step = _step(regularizer, objectives, params, weight, before, drawn)
        overflowed = grad_scale is not None and (step is None or not is_finite(step.gradient))
        overflowed = ranks.any(overflowed) if local else overflowed  # local steps overflow on some ranks alone
        if step is None or overflowed:
            step = _overflowed(objectives, params, before)
        elif local:
            step = average(step, ranks, float(first.batch_size))
        reached = set(params.keys()) if ranks.count > 1 else {name for o in objectives for name in o.used}
        taken = _storages(step.state, params) if share_gradient else None
        _add(owned, step.gradient, scale if grad_scale is None else scale * grad_scale, reached, taken)
    return replace(step, output=first.output, plain=None)  # one gradient less to hold


@dataclass(frozen=True)
class _Ambient:
    """The caller's autocast: its device type, and its dtype where it is on."""

    device_type: str
    dtype: torch.dtype | None

    @staticmethod
    def now(
        module: nn.Module, owned: Sequence[tuple[str, nn.Parameter]], scaler: torch.amp.GradScaler | None
    ) -> _Ambient:
        kind = owned[0][1].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if scaler is not None and scaler.is_enabled() and dtype != torch.float16:
            raise InputError(f"a gradient scaler with {'no autocast' if dtype is None else f'autocast to {dtype}'}; "
                             f'expected torch.autocast("{kind}", dtype=torch.float16) around the call, or scaler=None')
        plugin = getattr(getattr(module, "_strategy", None), "precision", None)
        fabric = getattr(plugin, "precision", None)
        if dtype is None and isinstance(fabric, str) and fabric.endswith("mixed"):
            raise InputError(f"a Fabric module set up with precision={fabric!r} and no autocast; expected "
                             "`with fabric.autocast():` around bnsharp.backward")
        if any(p.is_inference() for _, p in owned):
            raise InputError("parameters made inside torch.inference_mode() cannot be trained; expected a module made "
                             "outside of it")
        return _Ambient(kind, dtype)


@contextmanager
def _outside(ambient: _Ambient) -> Iterator[None]:
    """Outside the caller's inference mode, no_grad and autocast: a regulariser's own arithmetic keeps its precision."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if ambient.dtype is not None:
            stack.enter_context(torch.autocast(ambient.device_type, enabled=False))
        yield


def _step(
    regularizer: Regularizer,
    objectives: list[TrainingObjective],
    params: Params,
    weight: float,
    state: State,
    generator: torch.Generator,
) -> Step | None:
    """The regulariser's step; None if a pass overflowed."""
    try:
        return regularizer.step(objectives, params, weight=weight, state=state, generator=generator)
    except PassOverflow:
        return None
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise InputError(REENTRANT) from error


def _overflowed(objectives: list[TrainingObjective], params: Params, state: State) -> Step:
    """A step that is nowhere finite and leaves the state as it was."""
    gradient = P.pmap(lambda p: torch.full_like(p, float("nan")), params)
    nothing = P.first(params).new_tensor(float("nan"))
    loss, spent = objectives[0].loss, sum(objective.gradients for objective in objectives)
    return Step(nothing if loss is None else loss, nothing, gradient, spent, state, nothing)


def _storages(*tensors: Mapping[str, Tensor] | Params) -> set[int]:
    """Where these tensors' memory begins."""
    return {t.untyped_storage().data_ptr() for some in tensors for t in some.values()}


def _is_apart(tensor: Tensor, taken: set[int]) -> bool:
    """Whether changing a tensor in place changes nothing else: autograd gives ``p + q`` one gradient for both, and sums
    one number for all elements. Its memory is then taken."""
    storage = tensor.untyped_storage().data_ptr()
    if storage in taken or 0 in tensor.stride():
        return False
    taken.add(storage)
    return True


def _add(
    owned: Sequence[tuple[str, nn.Parameter]], gradient: Params, factor: float | Tensor, reached: set[str],
    taken: set[int] | None,
) -> None:
    """Add ``factor·gradient`` to ``.grad``; a parameter without a gradient in any pass is left alone.

    ``taken``: storages that no ``.grad`` may share; None where none shares that of a gradient.
    """
    for name, parameter in owned:
        if name not in reached and not bool(gradient[name].any()):
            continue
        update = gradient[name]
        if not (isinstance(factor, float) and factor == 1.0):
            update = factor * update
        elif parameter.grad is None and (taken is None or not _is_apart(update, taken)):
            update = update.clone()  # the step returned has the gradient as it is
        if parameter.grad is None:
            parameter.grad = update
        else:
            parameter.grad.add_(update)


def _scale_of(scaler: torch.amp.GradScaler | None, params: Params) -> Tensor | None:
    """The scaler's factor, as it multiplies losses; None without one that is switched on."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(P.first(params).new_ones((), dtype=torch.float32))


def _takes_differences(regularizer: Any) -> bool:
    """Whether a regulariser, or the one it wraps, subtracts ∇L(θ) from gradients at other points."""
    inner = getattr(regularizer, "inner", None)
    return isinstance(regularizer, Penalty) or (inner is not None and _takes_differences(inner))


def _batches(batches: Any) -> list[Batch]:
    if not isinstance(batches, Sequence) or isinstance(batches, Tensor):
        raise InputError(f"other_batches is a {type(batches).__name__}; expected a list of batches (x, y)")
    return list(batches)


def _usable(data: Any) -> Any:
    """A batch as it can be saved for a backward pass, also if it was made in inference mode."""
    if isinstance(data, tuple) and all(isinstance(t, Tensor) and not t.is_inference() for t in data):
        return data
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, data)


def _ranks_of(module: nn.Module) -> Ranks:
    """The processes of a ``DistributedDataParallel`` module, else this one alone."""
    wrapper = P.data_parallel(module)
    if wrapper is None:
        return SINGLE
    group: Any = wrapper.process_group
    device = next(wrapper.parameters()).device
    return Ranks(torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group, device)


def _generator(generator: torch.Generator | None, params: Params, ranks: Ranks, directions: str) -> torch.Generator:
    """The source of random directions: one for all ranks, or this rank's own."""
    if generator is None:
        seed = ranks.from_first(lambda: int(torch.randint(2**62, ()).item()))
        generator = P.seeded(seed, P.first(params).device)
    return ranks.own(generator) if directions == "local" else generator
