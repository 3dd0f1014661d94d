"""Arithmetic on parameter dictionaries, written once.

A parameter dictionary is a flat :class:`tensordict.TensorDict` whose keys are the names of
``module.named_parameters()``. Its batch size is ``[]`` (one point) or ``[n]`` (n points stacked).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from bnsharp.errors import InputError
from bnsharp.types import Params


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile``, data parallelism and Lightning Fabric."""
    return _layers(module)[-1]


def compiled(module: nn.Module) -> nn.Module:
    """:func:`unwrap`, or its ``torch.compile`` wrapper where there is one directly around it."""
    layers = _layers(module)
    return layers[-2] if len(layers) > 1 and "_orig_mod" in layers[-2]._modules else layers[-1]


def data_parallel(module: nn.Module) -> nn.Module | None:
    """The ``DistributedDataParallel`` among a module's wrappers, or None."""
    return next((m for m in _layers(module) if type(m).__name__ == "DistributedDataParallel"), None)


_INSIDE = {"DistributedDataParallel": "module", "DataParallel": "module", "_FabricModule": "_forward_module"}
"""Wrappers by the names of their classes, so that none has to be installed, and where the module inside is."""


def _layers(module: nn.Module) -> list[nn.Module]:
    """The module and what is inside it, wrapper by wrapper."""
    layers = [module]
    while True:
        module = layers[-1]
        inner = module._modules.get("_orig_mod") or module._modules.get(_INSIDE.get(type(module).__name__, ""))
        if inner is None:
            return layers
        layers.append(inner)


def make(values: Mapping[str, Tensor], batch_size: Sequence[int] = ()) -> Params:
    """A parameter dictionary from a mapping, without copying a tensor."""
    return cast(Params, TensorDict(dict(values), batch_size=torch.Size(batch_size)))


def live(module: nn.Module) -> Params:
    """Views (no copies) of the parameters that require grad; what training works on."""
    return make({k: p.detach() for k, p in trainable(module)})


def parameters(module: nn.Module) -> Params:
    """Detached copies of the parameters of ``module`` that require grad.

    Keys are ``named_parameters()`` of the module inside ``torch.compile``'s and DDP's wrappers; a tied weight appears
    once. Raises :class:`InputError` if there is none.
    """
    return make({k: p.detach().clone() for k, p in trainable(module)})


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require grad, a tied one once; :class:`InputError` if there is none."""
    found = [(k, p) for k, p in unwrap(module).named_parameters() if p.requires_grad]
    if not found:
        raise InputError(
            f"{type(module).__name__} has no parameter that requires grad; expected at least one: "
            "pass a module with trainable parameters"
        )
    return found


def pmap(fn: Callable[..., Tensor], *params: Params) -> Params:
    """``{k: fn(p[k], q[k], …)}``; the result has the largest batch size among the arguments."""
    size = max((p.batch_size for p in params), key=len)
    if len(params) == 1:
        return make({k: fn(v) for k, v in params[0].items()}, size)
    others = [dict(p.items()) for p in params[1:]]
    return make({k: fn(v, *[p[k] for p in others]) for k, v in params[0].items()}, size)


def pick(params: Any, index: int) -> Params:
    """Item ``index`` of a batch ``[n]`` or of a sequence made on demand."""
    if isinstance(params, TensorDict):
        return make({k: v[index] for k, v in cast(Params, params).items()})
    return params[index]


def stack(items: Sequence[Params]) -> Params:
    """Stack n points into one dictionary of batch size ``[n]``."""
    keys = items[0].keys()
    return make({k: torch.stack([p[k] for p in items]) for k in keys}, (len(items),))


def batch(params: Any) -> Any:
    """View one point as a batch of one: tensors, nested dictionaries of them, or dataclasses that hold both."""
    if isinstance(params, Tensor):
        return params.unsqueeze(0)
    if params is None:
        return None
    if is_dataclass(params) and not isinstance(params, type):
        return replace(params, **{f.name: batch(getattr(params, f.name)) for f in fields(params)})
    return make({k: batch(v) for k, v in params.items()}, (1,))


def count(source: Any) -> int:
    """How many points a batch ``[n]`` or a sequence holds."""
    if isinstance(source, TensorDict):
        if len(source.batch_size) != 1:
            raise InputError(
                f"expected parameters of batch size [n] or a sequence of parameters, got batch size "
                f"{list(source.batch_size)}: stack them first"
            )
        return int(source.batch_size[0])
    return len(source)


class Lazy(Sequence[Params]):
    """A sequence of n points, each made when it is asked for: never n copies at once."""

    def __init__(self, n: int, make_item: Callable[[int], Params]):
        self._n, self._make = n, make_item

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._n))]
        if not -self._n <= index < self._n:
            raise IndexError(index)
        return self._make(index % self._n)


def shift(params: Params, v: Params, t: Tensor | float = 1.0) -> Params:
    """``θ + t v``; ``v`` may be a batch ``[n]``."""
    if isinstance(t, float) and t == 1.0:
        return pmap(lambda p, d: p + d, params, v)
    plain = is_plain(params.values(), v.values())
    if isinstance(t, Tensor):
        if plain and not t.requires_grad:
            return foreach(lambda p, d: torch._foreach_addcmul(p, d, [t.to(x.dtype) for x in p]), params, v)
        return pmap(lambda p, d: torch.addcmul(p, d, t.to(p.dtype)), params, v)
    if plain:
        return foreach(lambda p, d: torch._foreach_add(p, d, alpha=t), params, v)
    return pmap(lambda p, d: torch.add(p, d, alpha=t), params, v)


def flatten(params: Params) -> Tensor:
    """All coordinates of one point as a vector."""
    return torch.cat([v.reshape(-1) for v in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """A vector as a point in the shape, precision and place of ``like``."""
    parts = vector.split([v.numel() for v in like.values()])
    return make({k: p.reshape(v.shape).to(v) for (k, v), p in zip(like.items(), parts, strict=True)})


def scaled(params: Params, factor: Tensor | float) -> Params:
    """``c θ``."""
    if is_plain(params.values()) and not (isinstance(factor, Tensor) and factor.requires_grad):
        return foreach(lambda x: torch._foreach_mul(x, factor), params)
    return pmap(lambda p: factor * p, params)


def take(x: Any, indices: Tensor) -> Any:
    """Items of batches ``[n]``: tensors, dictionaries of them, or dataclasses that hold both."""
    if isinstance(x, Tensor):
        return x[indices]
    if isinstance(x, TensorDict):
        return make({k: take(v, indices) for k, v in x.items()}, (len(indices),))
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: take(getattr(x, f.name), indices) for f in fields(x)})
    return x


def times(values: Tensor, x: Params) -> Params:
    """Item i of a batch ``[n]`` (or one point) times ``values[i]``."""
    return make({k: values.reshape(-1, *[1] * (v.ndim - 1)) * v for k, v in x.items()}, values.shape)


def combine(a: Tensor | float, x: Params, b: Tensor | float, y: Params) -> Params:
    """``a x + b y``."""
    if isinstance(a, float) and a == 1.0:
        return shift(x, y, b)
    plain = x.batch_size == y.batch_size and is_plain(x.values(), y.values())
    if plain and isinstance(a, float) and isinstance(b, float):
        ax = foreach(lambda p: torch._foreach_mul(p, a), x)
        torch._foreach_add_(list(ax.values()), [y[k] for k in x.keys()], alpha=b)
        return ax
    return pmap(lambda p, q: a * p + b * q, x, y)


def times_difference(c: Tensor | float, x: Params, y: Params) -> Params:
    """``c (x − y)`` for a scalar c."""
    if x.batch_size == y.batch_size and is_plain(x.values(), y.values()):
        difference = foreach(torch._foreach_sub, x, y)
        torch._foreach_mul_(list(difference.values()), c)
        return difference
    return pmap(lambda p, q: c * (p - q), x, y)


def pullback(fn: Callable[[Params], Params], params: Params, covector: Params) -> Params:
    """``(∂fn/∂θ)ᵀ covector``: zeros where ``fn`` does not depend on θ."""
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    with torch.enable_grad():
        inner = dot(fn(make(leaves)), covector)
    if not inner.requires_grad:
        return zeros_like(params)
    grads = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return make(dict(zip(leaves, grads, strict=True)))


def lerp(x: Params, y: Params, c: Tensor | float) -> Params:
    """``x + c (y − x)`` for a scalar c; y at c = 1."""
    if is_plain(x.values(), y.values()):
        weight = c if isinstance(c, float) else [c.to(v.dtype) for v in x.values()]
        return foreach(lambda p, q: torch._foreach_lerp(p, q, weight), x, y)
    return pmap(lambda p, q: torch.lerp(p, q, c if isinstance(c, float) else c.to(p.dtype)), x, y)


def zeros_like(params: Params) -> Params:
    """Zeros in the shape of ``params``."""
    return pmap(torch.zeros_like, params)


def where(condition: Tensor, x: Any, y: Any) -> Any:
    """Choose per batch item between two values ``[n]``: tensors, or nested dictionaries of them."""
    if x is None or y is None:
        return None
    if condition.numel() == 1:
        return x if bool(condition) else y
    if isinstance(x, Tensor):
        return torch.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)
    return make({k: where(condition, x[k], y[k]) for k in x.keys()}, x.batch_size)


def foreach(operation: Callable[..., Any], *params: Params) -> Params:
    """``operation`` on lists of tensors, in the order of the first one's names."""
    first_one, names = params[0], list(params[0].keys())
    lists = [list(first_one.values()), *([p[k] for k in names] for p in params[1:])]
    size = max((p.batch_size for p in params), key=len)
    return make(dict(zip(names, operation(*lists), strict=True)), size)


def transforming() -> bool:
    """Whether a ``torch.func`` transform is under way anywhere: without one no tensor is wrapped."""
    return torch._C._functorch.maybe_current_level() is not None


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a ``torch.func`` transform is under way for this tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_plain(*groups: Iterable[Tensor]) -> bool:
    """Whether nothing is recorded or transformed: then several tensors may share one operation."""
    return not transforming() and not any(t.requires_grad for tensors in groups for t in tensors)


def dot(x: Params, y: Params) -> Tensor:
    """``⟨x, y⟩`` over all parameters: ``[]``, or ``[n]`` if either is a batch."""
    product = pmap(lambda a, b: a * b, x, y)
    lead = len(product.batch_size)
    return torch.stack([v.reshape(*v.shape[:lead], -1).sum(-1) for v in product.values()]).sum(0)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all coordinates together, 0 of none, not differentiable; on one device."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def norm(x: Params) -> Tensor:
    """Euclidean norm over all parameters: ``[]`` or ``[n]``, with zero gradient at zero."""
    lead = len(x.batch_size)
    if not lead:
        values = list(x.values())
        if is_plain(values):
            return total_norm(values)
    parts = [torch.linalg.vector_norm(v.reshape(*v.shape[:lead], -1), dim=-1) for v in x.values()]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)


def distance(x: Params, y: Params) -> Tensor:
    """``‖x − y‖`` over all parameters: ``[]``; the difference of one tensor is held at a time."""
    return torch.linalg.vector_norm(torch.stack([torch.dist(v, y[k]) for k, v in x.items()]))


def safe_divide(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, and 0 where ``y = 0``."""
    nonzero = y != 0
    return torch.where(nonzero, x / torch.where(nonzero, y, 1.0), 0.0)


def safe_reciprocal(x: Tensor) -> Tensor:
    """``1 / x``, and 0 where ``x = 0``; a derivative of 0 there too."""
    nonzero = x != 0
    return torch.where(nonzero, torch.where(nonzero, x, 1.0).reciprocal(), 0.0)


def numel(params: Params) -> int:
    """Number of coordinates of one point."""
    return sum(math.prod(v.shape[len(params.batch_size) :]) for v in params.values())


def first(params: Params) -> Tensor:
    """A tensor of the dictionary: its dtype and device are the dictionary's."""
    return next(iter(params.values()))


def generator_for(params: Params, generator: torch.Generator | None, what: str) -> torch.Generator:
    """The generator, or an error naming what needs it: nothing here draws from the global state."""
    if generator is None:
        raise InputError(
            f"{what} draws random numbers and got generator=None; expected a torch.Generator: "
            f'pass generator=torch.Generator("{first(params).device}").manual_seed(SEED)'
        )
    return generator


def random_seeds(generator: torch.Generator, n: int) -> list[int]:
    """``n`` seeds drawn from ``generator``, so that draw i can be remade on demand."""
    return torch.randint(2**62, (n,), generator=generator, device=generator.device).tolist()


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A generator on ``device`` with this seed."""
    return torch.Generator(device).manual_seed(seed)
