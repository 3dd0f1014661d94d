"""Quadratic forms ``v ↦ vᵀAv`` of one batch at one θ: the Hessian's and the Gauss–Newton matrix's.

Both come from plain double backward passes: nested ``torch.func`` transforms are wrong through ``batch_norm``. A layer
whose derivative has no derivative of its own is an error: autograd would leave its part out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from bnsharp import params as P
from bnsharp.composed import Composed
from bnsharp.errors import InputError, NotDifferentiableError
from bnsharp.modes import math_attention
from bnsharp.types import LossFunction, Params, Term

Form = Callable[[Params], Tensor]
"""``v ↦ [vᵀAv, ‖v‖‖Av‖]``, shape ``[2]``: the value, and what its rounding error is relative to."""

QuadraticForm = Callable[[Term, Params], Form]


class GradientGraph:
    """``∇L(θ)`` with its graph: built once, differentiated by every product ``H v``."""

    def __init__(self, loss: LossFunction, params: Params):
        self.leaves = _leaves(params)
        with torch.enable_grad(), math_attention(), Composed(2):
            self.gradient = gradient_graph(loss(P.make(self.leaves)), list(self.leaves.values()))

    @property
    def slope(self) -> Params:
        """``∇L(θ)``, detached."""
        return P.make({k: g.detach() for k, g in zip(self.leaves, self.gradient, strict=True)})

    def product(self, v: Params) -> Params:
        """``H v``, detached."""
        pairs = [(g, v[k]) for k, g in zip(self.leaves, self.gradient, strict=True) if g.requires_grad]
        if not pairs:
            return P.zeros_like(v)
        outputs, vectors = zip(*pairs, strict=True)
        with math_attention(), Composed(2):
            hv = torch.autograd.grad(
                outputs, list(self.leaves.values()), vectors, retain_graph=True, materialize_grads=True,
                allow_unused=True,
            )
        return P.make(dict(zip(self.leaves, hv, strict=True)))


def hessian_slope(loss: LossFunction, params: Params, v: Params) -> Params:
    """``∇_θ vᵀHv`` with v held, by a third backward pass; detached.

    Differences of gradients would be worthless here: where a perturbation of size h crosses a kink (ReLU, max-pooling)
    the second difference is off by the jump over h.

    Raises:
        NotDifferentiableError: a layer that cannot be differentiated three times.
    """
    leaves = _leaves(params)
    inputs = list(leaves.values())
    with torch.enable_grad(), math_attention(), Composed(3):
        gradient = gradient_graph(loss(P.make(leaves)), inputs)
        try:
            product = _grad(_inner(gradient, v.values()), inputs, create_graph=True)
            slope = _grad(_inner(product, v.values()), inputs)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("is not implemented", "does not support", "twice")):
                raise
            raise NotDifferentiableError(
                "the gradient of a curvature needs third derivatives, and a layer has none "
                f"({' '.join(str(error).split())[:150]}); expected layers that have them, or another measure"
            ) from error
    return P.make(dict(zip(leaves, slope, strict=True)))


def hessian_form(term: Term, params: Params) -> Form:
    """``vᵀ H v``, H the Hessian of the batch's loss."""
    graph = GradientGraph(term.loss, params)

    return lambda v: form_of(v, graph.product(v))


def form_of(v: Params, product: Params) -> Tensor:
    """``[vᵀAv, ‖v‖‖Av‖]`` from ``A v``."""
    return torch.stack([P.dot(v, product), P.norm(v) * P.norm(product)])


def gauss_newton_form(term: Term, params: Params) -> Form:
    """``vᵀ Jᵀ (∇²_z ℓ) J v``, J the Jacobian of the output z: for cross-entropy the Fisher form of the model.

    ``J v`` is the derivative of ``w ↦ ⟨Jᵀw, v⟩``, which is linear in w.

    Raises:
        InputError: an objective that has no network's output.
    """
    output, _ = parts_of(term)
    leaves = _leaves(params)
    with torch.enable_grad(), math_attention(), Composed(2):
        z, spec = tree_flatten(output(P.make(leaves)))
        floating = [i for i, a in enumerate(z) if isinstance(a, Tensor) and a.is_floating_point() and a.requires_grad]
        # any w: the form is linear in it, and ones show whether a layer forgets it
        w = [torch.ones_like(z[i]).requires_grad_() for i in floating]
        pulled = gradient_graph([z[i] for i in floating], list(leaves.values()), w) if floating else []

    def form(v: Params) -> Tensor:
        if not floating:
            return P.first(params).new_zeros(2)
        with torch.enable_grad(), math_attention():
            jv = _grad(_inner(pulled, [v[k] for k in leaves]), w, retain_graph=True)
        fixed = [a.detach() if isinstance(a, Tensor) else a for a in z]
        value = output_form(term, tree_unflatten(fixed, spec), floating, jv).detach()
        return torch.stack([value, value.abs()])

    return form


def output_form(term: Term, output: Any, floating: Sequence[int], d: Sequence[Tensor]) -> Tensor:
    """``dᵀ (∇²_z ℓ) d`` at an output z, differentiable in z where ``d`` and z are."""
    _, criterion = parts_of(term)
    z, spec = tree_flatten(output)
    with torch.enable_grad():
        # aliases: one output may be computed from another, and the criterion's Hessian is taken with each of its own
        leaves = [z[i].view_as(z[i]) if z[i].requires_grad else z[i].detach().requires_grad_() for i in floating]
        filled = list(z)
        for i, leaf in zip(floating, leaves, strict=True):
            filled[i] = leaf
        slope = gradient_graph(criterion(tree_unflatten(filled, spec)), leaves)
        value = _inner(_grad(_inner(slope, d), leaves, create_graph=True), d)
        return value if term.total is None else term.total(value)


def parts_of(term: Term) -> tuple[Callable[[Params], Any], Callable[[Any], Tensor]]:
    """The network's output and the criterion.

    Raises:
        InputError: a loss that is a plain function.
    """
    if term.output is None or term.criterion is None:
        raise InputError(
            "this measure needs a network's output and a criterion, and got a plain function of parameters; expected "
            "bnsharp.Objective(module, criterion, data)"
        )
    return term.output, term.criterion


def _leaves(params: Params) -> dict[str, Tensor]:
    return {k: v.detach().requires_grad_() for k, v in params.items()}


def _inner(x: Iterable[Tensor], y: Iterable[Tensor]) -> Tensor:
    """``Σ ⟨x_i, y_i⟩``."""
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()


def _grad(
    value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
) -> Sequence[Tensor]:
    """Gradients; zeros where the value does not depend on an input."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        value, inputs, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )


# ---------------------------------------------------------------- derivatives that can be differentiated


_ONCE = once_differentiable(lambda ctx: None).__code__  # type: ignore[no-untyped-call]
"""The code of every ``backward`` that is marked so."""


def gradient_graph(
    values: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Gradients with their graph; zeros where the values do not depend on an input.

    Raises:
        NotDifferentiableError: a custom ``autograd.Function`` on the way whose ``backward`` cannot be differentiated.
            Where only gradients of given inputs are asked for, autograd leaves out its part without a word.
    """
    outputs = [v for v in ([values] if isinstance(values, Tensor) else values) if v.requires_grad]
    if not outputs:
        return [torch.zeros_like(x) for x in inputs]
    cut: list[str] = []
    hooks = []
    for node in _custom_nodes(outputs):
        function = getattr(node, "_forward_cls", type(node))
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            cut.append(function.__name__)
        else:
            hooks.append(node.register_hook(partial(_note_cut, cut, function.__name__)))
    try:
        gradients = torch.autograd.grad(
            outputs, list(inputs), vectors, create_graph=True, allow_unused=True, materialize_grads=True
        )
    finally:
        for hook in hooks:
            hook.remove()
    if cut:
        raise NotDifferentiableError(
            f"{cut[0]} is an autograd.Function whose backward cannot be differentiated (once_differentiable, detached "
            "or computed outside autograd), so that second derivatives would lack its part; expected a differentiable "
            "backward, or a measure that takes losses and gradients alone"
        )
    return gradients


def _custom_nodes(outputs: Sequence[Tensor]) -> list[Any]:
    """The nodes of custom functions in the graph behind ``outputs``."""
    seen: set[Any] = set()
    left, found = [v.grad_fn for v in outputs], list[Any]()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found.append(node)
        left += [parent for parent, _ in node.next_functions]
    return found


def _note_cut(cut: list[str], name: str, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
    """Note a ``backward`` whose results have forgotten what they were computed from; zeros have nothing to forget."""
    reached = any(isinstance(d, Tensor) and d.requires_grad for d in incoming)
    results = [d for d in outgoing if isinstance(d, Tensor)]
    if reached and not any(d.requires_grad for d in results) and any(bool(d.any()) for d in results):
        cut.append(name)
