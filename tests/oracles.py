"""Slow, dense, obvious versions of what the package computes fast.

Nothing here imports the package but its parameter dictionaries: losses are plain functions of a dictionary of tensors,
groups are lists of index sets into the flattened parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.types import Params

Loss = Callable[[Mapping[str, Tensor]], Tensor]
"""A loss as a function of a dictionary of tensors."""

Index = list[Tensor]
"""One tensor of positions in the flattened parameters per group."""


# ---------------------------------------------------------------- vectors


def flatten(params: Mapping[str, Tensor]) -> Tensor:
    """All coordinates of one point, one after the other."""
    return torch.cat([v.reshape(-1) for v in params.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dictionary whose coordinates are ``vector``."""
    out, start = {}, 0
    for name, value in like.items():
        out[name] = vector[start : start + value.numel()].reshape(value.shape)
        start += value.numel()
    return out


def to_params(vector: Tensor, like: Mapping[str, Tensor]) -> Params:
    return P.make(unflatten(vector, like))


# ---------------------------------------------------------------- groups, by hand


def index_sets(params: Params, rows: Sequence[str], inert: Sequence[str] = (), rest: str = "tensor") -> Index:
    """Every row of ``rows`` is a group, ``inert`` is in none, every other tensor is one (or all others together)."""
    groups, others, start = [], [], 0
    for name, value in params.items():
        positions = torch.arange(start, start + value.numel()).reshape(value.shape)
        start += value.numel()
        if name in rows:
            for row in range(value.shape[0]):
                groups.append(positions[row].reshape(-1))
        elif name not in inert:
            others.append(positions.reshape(-1))
    if rest == "joint" and others:
        others = [torch.cat(others)]
    return groups + others


def group_norms(vector: Tensor, index: Index) -> list[float]:
    """``‖θ_i‖`` by a double loop."""
    norms = []
    for positions in index:
        total = 0.0
        for j in positions.tolist():
            total += float(vector[j]) ** 2
        norms.append(total**0.5)
    return norms


def rescale(params: Params, rows: Sequence[str], factors: Mapping[str, Tensor]) -> Params:
    """``T_a θ``: row k of every parameter in ``rows`` times ``factors[name][k]``."""
    out = {name: value.clone() for name, value in params.items()}
    for name in rows:
        for k in range(len(factors[name])):
            out[name][k] = factors[name][k] * params[name][k]
    return P.make(out)


# ---------------------------------------------------------------- derivatives


def gradient(loss: Loss, params: Params) -> Tensor:
    """``∇L`` flattened, by one plain backward pass."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


def dense_hessian(loss: Loss, params: Params) -> Tensor:
    """``H [d, d]``, column by column by a plain second backward pass."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    inputs = list(leaves.values())
    grads = torch.autograd.grad(loss(leaves), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    columns = []
    for j in range(len(flat)):
        column = torch.autograd.grad(flat[j], inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        columns.append(torch.cat([c.reshape(-1) for c in column]))
    return torch.stack(columns, dim=1)


def central_difference(f: Callable[[float], float], h: float) -> float:
    """``f'(0)`` by a fourth-order central difference."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


# ---------------------------------------------------------------- BN-Sharpness


def line_norm(f: Callable[[np.ndarray], np.ndarray], delta: float, p: float, panels: int = 32) -> float:
    """``(1/(2δ) ∫_{−δ}^{δ} |f|^p dt)^{1/p}`` with many Gauss panels, cut where f changes sign."""
    grid = np.linspace(-delta, delta, 2 * panels + 1)
    at = f(grid)
    at[panels] = 0.0  # f(0) = 0
    edges = set(grid.tolist())
    for k in range(2 * panels):
        if at[k] * at[k + 1] < 0:
            edges.add(scipy.optimize.brentq(lambda t: float(f(np.array([t]))[0]), grid[k], grid[k + 1], xtol=1e-15))
    x, w = np.polynomial.legendre.leggauss(20)
    s = (x + 1) / 2
    # a substitution that is flat at both ends: |f|^p is singular where f vanishes
    x, w = s**3 * (10 - 15 * s + 6 * s**2), w / 2 * 30 * s**2 * (1 - s) ** 2
    nodes, weights = [], []
    for a, b in pairwise(sorted(edges)):
        nodes.append(a + (b - a) * x)
        weights.append((b - a) * w)
    values = np.abs(f(np.concatenate(nodes)))
    top = values.max()
    if top == 0.0:
        return 0.0
    return float(top * (np.concatenate(weights) @ (values / top) ** p / (2 * delta)) ** (1 / p))


def rise(loss: Loss, params: Params, v: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """``t ↦ L(θ + t v) − L(θ)`` for arrays of t; v is flattened."""
    theta = flatten(params)

    @torch.no_grad()
    def f(t: np.ndarray) -> np.ndarray:
        def at(s: Tensor) -> Tensor:
            return loss(unflatten(theta + s * v, params))

        losses = torch.func.vmap(at, chunk_size=256)(torch.as_tensor(t, dtype=theta.dtype))
        return (losses - at(torch.zeros((), dtype=theta.dtype))).numpy()

    return f


def sharpness_along(loss: Loss, params: Params, v: Tensor, delta: float, p: float, panels: int = 32) -> float:
    """BN-Sharpness of one direction v (flattened)."""
    return line_norm(rise(loss, params, v), delta, p, panels)


def on_phi(w: Tensor, theta: Tensor, index: Index) -> Tensor:
    """``v_i = ‖θ_i‖ w_i/‖w_i‖`` for every group, 0 elsewhere."""
    v = torch.zeros_like(theta)
    for positions in index:
        part = w[positions]
        v = v.index_put((positions,), theta[positions].norm() * part / part.norm())
    return v


def steepest(loss: Loss, params: Params, index: Index) -> Tensor:
    """``v_i = ‖θ_i‖ ∇_i L/‖∇_i L‖``."""
    return on_phi(gradient(loss, params), flatten(params), index)


def brute_force(
    loss: Loss,
    params: Params,
    index: Index,
    delta: float,
    p: float,
    starts: int = 30,
    seed: int = 0,
    given: Sequence[Tensor] = (),
    iterations: int = 200,
) -> tuple[float, Tensor]:
    """``S_{δ,p}`` and its maximiser v: L-BFGS from the steepest, the ``given`` and many random starts on Φ."""
    theta = flatten(params).double()
    x, w = np.polynomial.legendre.leggauss(16)
    t = torch.tensor(np.concatenate([-delta * (x + 1) / 2, delta * (x + 1) / 2]))
    weights = torch.tensor(np.concatenate([w, w]) / 4)

    def minus_log(flat: np.ndarray) -> tuple[float, np.ndarray]:
        u = torch.tensor(flat, requires_grad=True)
        v = on_phi(u, theta, index)
        f = torch.func.vmap(lambda s: loss(unflatten(theta + s * v, params)))(t) - base
        top = f.detach().abs().max()
        value = -(torch.log(top) + torch.log(weights @ (f.abs() / top) ** p) / p)
        value.backward()
        return value.item(), u.grad.numpy()

    base = loss(unflatten(theta, params))
    generator = torch.Generator().manual_seed(seed)
    first = gradient(loss, params)
    noise = 1e-6 * torch.randn(len(theta), generator=generator, dtype=torch.float64)
    begin = [on_phi(first + noise * first.norm(), theta, index), *given]
    begin += [torch.randn(len(theta), generator=generator, dtype=torch.float64) for _ in range(starts)]
    best, best_v = -1.0, theta
    for start in begin:
        scaled = on_phi(start, torch.ones_like(theta), index).numpy()
        found = scipy.optimize.minimize(
            minus_log, scaled, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "ftol": 1e-10, "gtol": 1e-7}
        )
        v = on_phi(torch.tensor(found.x), theta, index)
        value = sharpness_along(loss, params, v, delta, p, panels=16)
        if value > best:
            best, best_v = value, v
    return best, best_v
