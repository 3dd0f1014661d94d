"""Quadratic forms ``v ↦ vᵀAv`` of one batch at one θ: the Hessian's and the Gauss–Newton matrix's.

Both come from plain double backward passes: nested ``torch.func`` transforms are wrong through ``batch_norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.modes import math_attention
from bnsharp.types import LossFunction, Params, Term

Form = Callable[[Params], Tensor]
"""``v ↦ [vᵀAv, ‖v‖‖Av‖]``, shape ``[2]``: the value, and what its rounding error is relative to."""

QuadraticForm = Callable[[Term, Params], Form]


class GradientGraph:
    """``∇L(θ)`` with its graph: built once, differentiated by every product ``H v``."""

    def __init__(self, loss: LossFunction, params: Params):
        self.leaves = _leaves(params)
        with torch.enable_grad(), math_attention():
            self.gradient = _grad(loss(P.make(self.leaves)), list(self.leaves.values()), create_graph=True)

    def product(self, v: Params) -> Params:
        """``H v``, detached."""
        pairs = [(g, v[k]) for k, g in zip(self.leaves, self.gradient, strict=True) if g.requires_grad]
        if not pairs:
            return P.zeros_like(v)
        outputs, vectors = zip(*pairs, strict=True)
        with math_attention():
            hv = torch.autograd.grad(
                outputs, list(self.leaves.values()), vectors, retain_graph=True, materialize_grads=True,
                allow_unused=True,
            )
        return P.make(dict(zip(self.leaves, hv, strict=True)))


def hessian_form(term: Term, params: Params) -> Form:
    """``vᵀ H v``, H the Hessian of the batch's loss."""
    graph = GradientGraph(term.loss, params)

    def form(v: Params) -> Tensor:
        product = graph.product(v)
        return torch.stack([P.dot(v, product), P.norm(v) * P.norm(product)])

    return form


def gauss_newton_form(term: Term, params: Params) -> Form:
    """``vᵀ Jᵀ (∇²_z ℓ) J v``, J the Jacobian of the output z: for cross-entropy the Fisher form of the model.

    ``J v`` is the derivative of ``w ↦ ⟨Jᵀw, v⟩``, which is linear in w.

    Raises:
        InputError: an objective that has no network's output.
    """
    output, _ = parts_of(term)
    leaves = _leaves(params)
    with torch.enable_grad(), math_attention():
        z, spec = tree_flatten(output(P.make(leaves)))
        floating = [i for i, a in enumerate(z) if isinstance(a, Tensor) and a.is_floating_point() and a.requires_grad]
        w = [torch.zeros_like(z[i]).requires_grad_() for i in floating]
        pulled = torch.autograd.grad(
            [z[i] for i in floating], list(leaves.values()), w, create_graph=True, allow_unused=True,
            materialize_grads=True,
        ) if floating else []

    def form(v: Params) -> Tensor:
        if not floating:
            return P.first(params).new_zeros(2)
        with torch.enable_grad(), math_attention():
            inner = torch.stack([(g * v[k]).sum() for k, g in zip(leaves, pulled, strict=True)]).sum()
            jv = _grad(inner, w, retain_graph=True)
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
        slope = _grad(criterion(tree_unflatten(filled, spec)), leaves, create_graph=True)
        inner = torch.stack([(g * a).sum() for g, a in zip(slope, d, strict=True)]).sum()
        second = _grad(inner, leaves, create_graph=True)
        value = torch.stack([(h * a).sum() for h, a in zip(second, d, strict=True)]).sum()
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


def _grad(
    value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
) -> Sequence[Tensor]:
    """Gradients; zeros where the value does not depend on an input."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        value, inputs, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
