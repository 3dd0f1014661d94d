"""The identities of the theory: invariance, limits, bounds, closed forms, and the search against brute force.

Networks are small, float64, with a negligible ε; limits are tested with smooth activations.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Problem, problem, problems
from torch import Tensor

from bnsharp import Engine, ScaleGroups, exact_norms, laws, scale_groups
from bnsharp import params as P
from bnsharp.directions import Ascend, Given
from bnsharp.geometry import Groupwise
from bnsharp.measures import (
    Measure,
    bn_sharpness,
    epsilon_sharpness,
    hessian_top,
    hessian_trace,
    lebesgue_ball,
)
from bnsharp.profiles import Curvature, Line
from bnsharp.reduce import Maximum, PowerMean
from bnsharp.regularizers import Penalty
from bnsharp.types import Params

RULES = ("riemannian", "power", "alternate")


def along(p: Problem, u: Params, delta: float, exponent: float, nodes: int = 8) -> float:
    """BN-Sharpness of the unit directions ``u`` (one, or the largest of a batch)."""
    measure = Measure(Groupwise(p.groups), Given(u), Line(laws.Uniform(delta), exponent, nodes), Maximum())
    return measure(p.objective(), p.params).value


def steepest_v(p: Problem) -> Tensor:
    return oracles.steepest(p.loss, p.params, p.index)


def row_index(p: Problem) -> oracles.Index:
    """The scale-invariant groups alone."""
    return p.index[: sum(len(p.params[name]) for name in p.rows)]


def radial(r: Tensor, p: Problem) -> float:
    """Largest cosine between θ_i and r_i on the invariant groups, relative to the whole of r."""
    theta = oracles.flatten(p.params)
    return max(abs(float(theta[i] @ r[i])) / float(theta[i].norm() * r.norm()) for i in row_index(p))


# ---------------------------------------------------------------- the oracles and the groups themselves


@given(problems())
def test_problems_know_their_groups(p: Problem) -> None:
    """Groups by construction, by behaviour and by hand agree; so do both ways to the loss."""
    assert set(scale_groups(p.module, p.x)) == set(p.groups.resolve(p.params))
    assert p.objective()(p.params).item() == pytest.approx(p.loss(p.params).item(), rel=1e-12)
    norms = oracles.group_norms(oracles.flatten(p.params), row_index(p))
    ours = p.groups.norms(p.params)
    assert torch.cat([ours[name].reshape(-1) for name in p.rows]).tolist() == pytest.approx(norms)


@given(strategies.scaled_problems(activations=("tanh", "relu")))
def test_rescaling_by_hand_leaves_the_loss(case: tuple[Problem, dict[str, Tensor]]) -> None:
    p, a = case
    by_hand = oracles.rescale(p.params, p.rows, a)
    ours = p.groups.rescale(p.params, {k: v.reshape(-1, *[1] * (p.params[k].ndim - 1)) for k, v in a.items()})
    torch.testing.assert_close(oracles.flatten(ours), oracles.flatten(by_hand))
    assert p.loss(by_hand).item() == pytest.approx(p.loss(p.params).item(), rel=1e-11)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_hessian_products_against_dense_and_differences(kind: str) -> None:
    p = problem(kind, seed=1)
    hessian, theta = oracles.dense_hessian(p.loss, p.params), oracles.flatten(p.params)
    product = p.objective().hessian(p.params)
    for seed in range(3):
        d = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)
        torch.testing.assert_close(oracles.flatten(product(oracles.to_params(d, p.params))), hessian @ d)
        differences = _gradient_difference(p, d, 1e-4)
        torch.testing.assert_close(hessian @ d, differences, rtol=1e-7, atol=1e-8)


def _gradient_difference(p: Problem, d: Tensor, h: float) -> Tensor:
    theta = oracles.flatten(p.params)

    def g(t: float) -> Tensor:
        return oracles.gradient(p.loss, oracles.to_params(theta + t * d, p.params))

    return (8 * (g(h) - g(-h)) - (g(2 * h) - g(-2 * h))) / (12 * h)


@pytest.mark.xfail(reason="torch.func.hessian is wrong through batch_norm (torch 2.14)", strict=False)
def test_torch_func_hessian_through_batch_norm() -> None:
    """A trap: why neither the package nor the oracles use it."""
    p = problem("mlp", seed=1)
    theta = oracles.flatten(p.params)
    hessian = torch.func.hessian(lambda x: p.loss(oracles.unflatten(x, p.params)))(theta)
    d = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    torch.testing.assert_close(hessian @ d, _gradient_difference(p, d, 1e-4), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- T1, T2


@settings(max_examples=15)
@given(problems(activations=("tanh", "relu")))
def test_t1_a_fixed_radius_is_not_invariant(p: Problem) -> None:
    """δ-sharpness with a fixed radius grows as the BN groups of a layer shrink."""
    values: list[float] = []
    for a in (1.0, 0.1, 0.03, 0.01):
        factors = {p.rows[0]: torch.full((len(p.params[p.rows[0]]),), a, dtype=torch.float64)}
        scaled = oracles.rescale(p.params, p.rows[:1], factors)
        values.append(epsilon_sharpness(delta=1e-4, certify=0)(p.objective(), scaled).value)
    assert values == sorted(values) and values[-1] > 3 * values[0]


@settings(max_examples=20)
@given(
    strategies.scaled_problems(activations=("tanh", "softplus", "relu")),
    strategies.exponents(), strategies.deltas(), st.sampled_from(RULES), st.sampled_from([0, 1, 4]), st.integers(0, 1),
    st.sampled_from(["tensor", "joint"]),
)
def test_t2_invariance(
    case: tuple[Problem, dict[str, Tensor]],
    exponent: float,
    delta: float,
    rule: str,
    steps: int,
    restarts: int,
    rest: str,
) -> None:
    """``S(T_a θ) = S(θ)``, and the maximiser is ``T_a v`` (or its mirror image: v and −v have the same S)."""
    p, a = case
    measure = bn_sharpness(
        p.groups, delta=delta, p=exponent, steps=steps, restarts=restarts, rule=rule, rest=rest, nodes=4
    )
    one, two = (measure(p.objective(), x) for x in (p.params, oracles.rescale(p.params, p.rows, a)))
    assert two.value == pytest.approx(one.value, rel=1e-8)
    expected, got = oracles.flatten(oracles.rescale(one.direction, p.rows, a)), oracles.flatten(two.direction)
    if restarts and float(expected @ got) < 0:
        got = -got
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_t2_with_exact_norms(kind: str) -> None:
    """At torch's ε the invariance breaks by ``O(ε/a²)``; ``exact_norms`` restores it."""
    p = problem(kind, seed=2, eps=1e-5)
    a = {k: torch.full((len(p.params[k]),), 0.05, dtype=torch.float64) for k in p.rows}
    measure = bn_sharpness(p.groups, delta=0.05, steps=2, restarts=0)

    def change() -> float:
        one, two = (measure(p.objective(), x).value for x in (p.params, oracles.rescale(p.params, p.rows, a)))
        return abs(two / one - 1)

    assert change() > 1e-4
    with exact_norms(p.module):
        assert change() < 1e-8


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_t2_breaks_in_ambient_coordinates(kind: str) -> None:
    """One scalar step on v is not equivariant."""
    p = problem(kind, seed=4)
    a = {k: torch.logspace(-1, 1, len(p.params[k]), dtype=torch.float64) for k in p.rows}
    scaled = oracles.rescale(p.params, p.rows, a)
    for coordinates, bound in (("unit", lambda x: x < 1e-8), ("ambient", lambda x: x > 1e-5)):
        measure = bn_sharpness(p.groups, delta=0.3, steps=5, restarts=0, rule="riemannian", coordinates=coordinates)
        one, two = (measure(p.objective(), x).value for x in (p.params, scaled))
        assert bound(abs(two / one - 1))


# ---------------------------------------------------------------- T5, T6, T7, section 7


@settings(max_examples=6)
@given(st.sampled_from(["joint", "box"]), st.integers(0, 1000))
def test_t5_the_power_mean_tends_to_the_maximum(ball: str, seed: int) -> None:
    """Over n draws ``max·n^{−1/p} ≤ (mean |f|^p)^{1/p} ≤ max``, growing with p; over the ball, to its maximum."""
    g = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    params = P.make({"w": torch.zeros(2, dtype=torch.float64)})
    n, values = 1500, []
    exponents = (1.0, 2.0, 8.0, 64.0, 512.0)
    for exponent in exponents:
        values.append(lebesgue_ball(delta=0.1, draws=n, p=exponent, ball=ball)(lambda q: q["w"] @ g, params).value)
    assert values == sorted(values)
    maximum = 0.1 * float(g.norm() if ball == "joint" else g.abs().sum())
    assert values[-1] <= maximum and values[-1] == pytest.approx(maximum, rel=0.1)


@given(st.integers(0, 1000))
def test_t5_bound_of_the_power_mean(seed: int) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for exponent in (1.0, 3.0, 16.0, 1000.0):
        value, top = PowerMean(exponent)(x)[0].item(), x.abs().max().item()
        assert top * 50 ** (-1 / exponent) <= value * (1 + 1e-12) <= top * (1 + 2e-12)


@given(problems(), strategies.exponents(), strategies.deltas(), st.sampled_from([0, 3]))
def test_t6_and_section_7(p: Problem, exponent: float, delta: float, steps: int) -> None:
    """``E_t f ≤ S_{δ,1} ≤ S_{δ,p} ≤ max_{‖ε‖ ≤ δ‖θ‖} |f|`` over candidates that hold the direction found."""
    found = bn_sharpness(p.groups, delta=delta, p=exponent, steps=steps, restarts=0, nodes=6)(p.objective(), p.params)
    v = oracles.flatten(found.direction)
    assert float(v.norm()) <= float(oracles.flatten(p.params).norm()) * (1 + 1e-12)
    f = oracles.rise(p.loss, p.params, v)
    t, w = np.polynomial.legendre.leggauss(40)
    mean, top = float(w @ f(delta * t) / 2), float(np.abs(f(np.linspace(-delta, delta, 2001))).max())
    first = along(p, found.unit, delta, 1.0)
    slack = 1 + 1e-6
    assert mean <= first * slack + 1e-12
    assert first <= along(p, found.unit, delta, exponent) * slack
    assert found.value <= top * slack


@settings(max_examples=6)
@given(problems(), strategies.deltas())
def test_t6_limit(p: Problem, delta: float) -> None:
    """``lim_{p→∞} S_{δ,p} = max_{|t| ≤ δ} |f(t)|`` along one direction, from below."""
    found = bn_sharpness(p.groups, delta=delta, steps=2, restarts=0, nodes=5)(p.objective(), p.params)
    f = oracles.rise(p.loss, p.params, oracles.flatten(found.direction))
    top = float(np.abs(f(np.linspace(-delta, delta, 2001))).max())
    ratios = [along(p, found.unit, delta, q, nodes=10) / top for q in (4.0, 16.0, 64.0, 256.0, 1024.0)]
    assert ratios == sorted(ratios) and 0.98 < ratios[-1] <= 1 + 1e-6


@settings(max_examples=8)
@given(problems(), strategies.deltas(), st.sampled_from([0, 3]))
def test_t7_grows_with_p(p: Problem, delta: float, steps: int) -> None:
    """``p ≤ q ⇒ S_{δ,p} ≤ S_{δ,q}``, the maxima taken over the union of both searches' directions."""
    exponents = (1.0, 1.5, 2.0, 4.0, 8.0)
    units = [
        bn_sharpness(p.groups, delta=delta, p=q, steps=steps, restarts=0, nodes=6)(p.objective(), p.params).unit
        for q in exponents
    ]
    values = [along(p, P.stack(units), delta, q, nodes=10) for q in exponents]
    assert all(a <= b * (1 + 1e-7) for a, b in pairwise(values))


# ---------------------------------------------------------------- T8, T9: second order


@settings(max_examples=6)
@given(strategies.scaled_problems())
def test_t8_the_trace_is_not_invariant(case: tuple[Problem, dict[str, Tensor]]) -> None:
    """Scaling group i by a divides the trace of its block by a²; the relative trace stays."""
    p, a = case
    scaled = oracles.rescale(p.params, p.rows, a)
    blocks, relative = [], []
    for x in (p.params, scaled):
        diagonal, theta = oracles.dense_hessian(p.loss, x).diagonal(), oracles.flatten(x)
        blocks.append([float(diagonal[i].sum()) for i in row_index(p)])
        relative.append(sum(float(theta[i].norm() ** 2 / len(i) * diagonal[i].sum()) for i in p.index))
    factors = torch.cat([a[k] for k in p.rows]).tolist()
    expected = [b / f**2 for b, f in zip(blocks[0], factors, strict=True)]
    assert blocks[1] == pytest.approx(expected, rel=1e-7, abs=1e-9 * max(map(abs, expected)))
    assert relative[1] == pytest.approx(relative[0], rel=1e-8)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_t8_hessian_trace_is_the_trace(kind: str) -> None:
    """Within 5 standard errors of the dense trace (wrong once in 10⁶, and the seed is fixed)."""
    p = problem(kind, seed=6)
    diagonal, theta = oracles.dense_hessian(p.loss, p.params).diagonal(), oracles.flatten(p.params)
    expected = float(diagonal.sum())
    found = hessian_trace(draws=300)(p.objective(), p.params)
    assert found.stderr > 0 and abs(found.value - expected) < 5 * found.stderr
    expected = sum(float(theta[i].norm() ** 2 / len(i) * diagonal[i].sum()) for i in p.index)
    found = hessian_trace(geometry=Groupwise(p.groups), draws=300)(p.objective(), p.params)
    assert found.stderr > 0 and abs(found.value - expected) < 5 * found.stderr


@settings(max_examples=4)
@given(problems(), strategies.exponents())
def test_t9_at_an_exact_minimum(p: Problem, exponent: float) -> None:
    """``S_{δ,p}/δ² → ½(2p+1)^{−1/p} max vᵀHv``, at least as much with the relative trace for the maximum."""
    p = strategies.at_own_output(p)
    hessian, theta = oracles.dense_hessian(p.loss, p.params), oracles.flatten(p.params)
    assert p.loss(p.params).item() < 1e-28 and float(oracles.gradient(p.loss, p.params).abs().max()) < 1e-12
    top = hessian_top(geometry=Groupwise(p.groups), iterations=20, restarts=0)(p.objective(), p.params)
    v, factor = oracles.flatten(top.direction), 0.5 * (2 * exponent + 1) ** (-1 / exponent)
    assert top.value == pytest.approx(float(v @ hessian @ v), rel=1e-8)
    for delta, tolerance in ((1e-2, 5e-2), (1e-3, 5e-3)):
        assert along(p, top.unit, delta, exponent) / delta**2 == pytest.approx(factor * top.value, rel=tolerance)
    found = bn_sharpness(p.groups, delta=1e-3, p=exponent, steps=20, restarts=0)(p.objective(), p.params)
    trace = sum(float(theta[i].norm() ** 2 / len(i) * hessian.diagonal()[i].sum()) for i in p.index)
    assert found.value / 1e-6 >= factor * trace
    assert found.value / 1e-6 == pytest.approx(factor * top.value, rel=0.1)


@settings(max_examples=6)
@given(problems())
def test_t9_null_directions_at_a_minimum(p: Problem) -> None:
    """``H θ_i = 0`` for every invariant group."""
    p = strategies.at_own_output(p)
    hessian, theta = oracles.dense_hessian(p.loss, p.params), oracles.flatten(p.params)
    for i in row_index(p):
        direction = torch.zeros_like(theta)
        direction[i] = theta[i]
        assert float((hessian @ direction).norm()) < 1e-10 * float(hessian.norm())


# ---------------------------------------------------------------- T10 and gradients on invariant groups


@given(problems(activations=("tanh", "relu")), strategies.deltas())
def test_t10(p: Problem, delta: float) -> None:
    """``⟨θ_i, ∇_i L(θ+δv)⟩ = −δ⟨v_i, ∇_i L(θ+δv)⟩``; the two-point gradient inherits it."""
    theta, v = oracles.flatten(p.params), steepest_v(p)
    ahead = oracles.gradient(p.loss, oracles.to_params(theta + delta * v, p.params))
    measure = bn_sharpness(p.groups, delta=delta, p=2, steps=0, restarts=0)
    _, r = Penalty(measure, gradient="two-point").penalty(p.objective(), p.params)
    flat = oracles.flatten(r)
    f = p.loss(oracles.to_params(theta + delta * v, p.params)) - p.loss(p.params)
    kappa = 3**-0.5 * (1 if f >= 0 else -1)
    for i in row_index(p):
        scale = float(theta[i].norm() * ahead.norm())
        assert abs(float(theta[i] @ ahead[i] + delta * v[i] @ ahead[i])) < 1e-10 * scale
        assert abs(float(theta[i] @ flat[i] + kappa * delta * v[i] @ ahead[i])) < 1e-9 * scale


@settings(max_examples=25)
@given(
    problems(activations=("tanh", "relu")), strategies.exponents(), strategies.deltas(), st.sampled_from([0, 1, 3]),
    st.sampled_from(RULES),
)
def test_exact_gradient_is_orthogonal_to_invariant_groups(
    p: Problem, exponent: float, delta: float, steps: int, rule: str
) -> None:
    """The gradient with v moving with θ; for any direction held in unit coordinates."""
    measure = bn_sharpness(p.groups, delta=delta, p=exponent, steps=steps, restarts=0, rule=rule, nodes=4)
    _, r = Penalty(measure, gradient="exact").penalty(p.objective(), p.params)
    assert radial(oracles.flatten(r), p) < 1e-8


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_constant_v_gradient_is_not_orthogonal(kind: str) -> None:
    p = problem(kind, seed=7)
    v = steepest_v(p)
    leaves = {k: x.clone().requires_grad_() for k, x in p.params.items()}
    value = Line(laws.Uniform(0.1), 2.0)(p.objective(), P.make(leaves), P.batch(oracles.to_params(v, p.params)))
    grads = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert radial(torch.cat([g.reshape(-1) for g in grads]), p) > 1e-3


@pytest.mark.parametrize("engine", ["loop", Engine("vmap", 7)], ids=["loop", "vmap"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 8.0])
@pytest.mark.parametrize(("kind", "delta"), [("mlp", 0.2), ("conv", 0.05)])
def test_exact_gradient_four_ways(kind: str, delta: float, exponent: float, engine: Any) -> None:
    """Penalty's gradient, autograd and ``torch.func.grad`` through ``measure.penalty``, and finite differences."""
    p = strategies.trained(problem(kind, seed=8), steps=60)
    measure = bn_sharpness(p.groups, delta=delta, p=exponent, steps=3, restarts=0)
    objective = p.objective(engine)
    found = measure(objective, p.params)
    held = replace(measure, directions=Given(found.unit))
    value, r = Penalty(held, gradient="exact").penalty(objective, p.params)
    assert value.item() == pytest.approx(found.value, rel=1e-10)

    leaves = {k: x.clone().requires_grad_() for k, x in p.params.items()}
    penalty = measure.penalty(objective, P.make(leaves))
    assert penalty.item() == pytest.approx(found.value, rel=1e-10)
    grads = torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True, materialize_grads=True)
    by_autograd = torch.cat([g.reshape(-1) for g in grads])
    scale = float(by_autograd.norm())
    torch.testing.assert_close(oracles.flatten(r), by_autograd, rtol=1e-7, atol=1e-9 * scale)

    theta = oracles.flatten(p.params)
    for seed in range(3):
        d = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)

        def at(h: float, d: Tensor = d) -> float:
            return held(objective, oracles.to_params(theta + h * d, p.params)).value

        slope = oracles.central_difference(at, 1e-5)
        assert float(by_autograd @ d) == pytest.approx(slope, rel=1e-5, abs=1e-7 * scale)

    transformed = torch.func.grad(lambda x: measure.penalty(objective, P.make(x)))(dict(p.params.items()))
    torch.testing.assert_close(oracles.flatten(transformed), by_autograd, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("activation", strategies.SMOOTH)
@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_two_point_limit(kind: str, exponent: float, activation: str) -> None:
    """Two-point/δ → ``(p+1)^{−1/p} sign(a) H v``: error O(δ) forward, O(δ²) central."""
    p = problem(kind, activation, seed=9)
    v = steepest_v(p)
    limit = (exponent + 1) ** (-1 / exponent) * oracles.dense_hessian(p.loss, p.params) @ v  # a > 0
    for gradient, order in (("two-point", 1), ("central", 2)):
        errors = []
        for delta in (4e-4, 1e-4):
            measure = bn_sharpness(p.groups, delta=delta, p=exponent, steps=0, restarts=0)
            _, r = Penalty(measure, gradient=gradient).penalty(p.objective(), p.params)
            errors.append(float((oracles.flatten(r) / delta - limit).norm() / limit.norm()))
        assert errors[1] < 1e-2
        assert 4**order * 0.8 < errors[0] / errors[1] < 4**order * 1.25


@given(problems(activations=("tanh", "relu")), strategies.deltas())
def test_tangent_is_two_point_without_its_radial_part(p: Problem, delta: float) -> None:
    measure = bn_sharpness(p.groups, delta=delta, steps=1, restarts=0)
    (value, r), (same, tangent) = (
        Penalty(measure, gradient=g).penalty(p.objective(), p.params) for g in ("two-point", "tangent")
    )
    flat, theta = oracles.flatten(r).clone(), oracles.flatten(p.params)
    for i in row_index(p):
        flat[i] -= (flat[i] @ theta[i]) / (theta[i] @ theta[i]) * theta[i]
    assert value.item() == same.item()
    torch.testing.assert_close(oracles.flatten(tangent), flat, rtol=1e-10, atol=1e-12 * float(flat.norm()))


# ---------------------------------------------------------------- first order, quadratic


@given(problems(), strategies.exponents(), st.sampled_from([0, 3]), st.sampled_from(RULES))
def test_first_order_limit(p: Problem, exponent: float, steps: int, rule: str) -> None:
    """``S_{δ,p}/δ → (p+1)^{−1/p} Σ_i ‖θ_i‖‖∇_i L‖`` at the gradient direction."""
    theta, g = oracles.flatten(p.params), oracles.gradient(p.loss, p.params)
    expected = (exponent + 1) ** (-1 / exponent) * sum(float(theta[i].norm() * g[i].norm()) for i in p.index)
    errors = []
    for delta in (4e-4, 1e-4):
        measure = bn_sharpness(p.groups, delta=delta, p=exponent, steps=steps, restarts=0, rule=rule, nodes=5)
        found = measure(p.objective(), p.params)
        errors.append(abs(found.value / delta / expected - 1))
    assert errors[1] < 0.02 and errors[1] < 0.6 * errors[0] + 1e-4  # the quadrature's error
    v = steepest_v(p)
    cosine = float(oracles.flatten(found.direction) @ v / v.norm() ** 2)
    assert abs(cosine) > 0.99  # v and −v have the same S


@settings(max_examples=30)
@given(st.integers(0, 1000), strategies.exponents(), strategies.deltas(1e-3, 1.0), st.booleans())
def test_quadratic_closed_form(seed: int, exponent: float, delta: float, at_minimum: bool) -> None:
    """``f(t) = a t + ½ q t²``: for p = 2, ``S² = a²δ²/3 + q²δ⁴/20``; other p by dense integration."""
    generator = torch.Generator().manual_seed(seed)
    a_matrix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    a_matrix = a_matrix + a_matrix.T
    params = P.make({
        "w": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "b": torch.randn(2, generator=generator, dtype=torch.float64),
    })
    shift = oracles.flatten(params) if at_minimum else torch.randn(8, generator=generator, dtype=torch.float64)

    def loss(x: Params) -> Tensor:
        z = oracles.flatten(x) - shift
        return 0.5 * z @ a_matrix @ z

    groups = ScaleGroups({"w": "row"})
    somewhere = oracles.to_params(torch.randn(8, generator=generator, dtype=torch.float64), params)
    u = Groupwise(groups).ball.retract(somewhere)
    measure = Measure(Groupwise(groups), Given(u), Line(laws.Uniform(delta), exponent), Maximum())
    v = oracles.flatten(measure.geometry.place(u, params))
    a, q = float(oracles.gradient(loss, params) @ v), float(v @ a_matrix @ v)
    value = measure(loss, params).value
    dense = oracles.line_norm(lambda t: a * t + 0.5 * q * t**2, delta, exponent)
    assert value == pytest.approx(dense, rel=1e-4)
    if exponent == 2:
        assert value == pytest.approx((a**2 * delta**2 / 3 + q**2 * delta**4 / 20) ** 0.5, rel=1e-9)
    curvature = Measure(Groupwise(groups), Given(u), Curvature(), Maximum())(loss, params)
    assert curvature.value == pytest.approx(q, rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------- the search


@settings(max_examples=20)
@given(
    problems(activations=("tanh", "relu")), strategies.exponents(), strategies.deltas(), st.sampled_from(RULES),
    st.integers(1, 5), st.integers(0, 2), st.sampled_from(["unit", "ambient"]),
)
def test_search_never_ends_below_its_start(
    p: Problem, exponent: float, delta: float, rule: str, steps: int, restarts: int, coordinates: str
) -> None:
    """By its own score: S itself when measuring, ``κ|f(δ)|`` in training."""
    start = bn_sharpness(p.groups, delta=delta, p=exponent, steps=0, restarts=0, nodes=4)
    searched = replace(start, directions=Ascend(steps, restarts, rule, coordinates=coordinates))
    assert searched(p.objective(), p.params).value >= start(p.objective(), p.params).value
    ours, first = (Penalty(m).penalty(p.objective(), p.params)[0].item() for m in (searched, start))
    assert ours >= first


@pytest.mark.parametrize("rule", RULES)
def test_the_value_is_that_of_the_direction(rule: str) -> None:
    """The estimate's direction attains its value by dense integration, and lies on Φ(θ)."""
    for seed in range(3):
        p = strategies.trained(problem("mlp", seed=seed), steps=100)
        found = bn_sharpness(p.groups, delta=0.1, p=3, steps=6, restarts=0, rule=rule)(p.objective(), p.params)
        v = oracles.flatten(found.direction)
        dense = oracles.sharpness_along(p.loss, p.params, v, 0.1, 3)
        assert abs(dense - found.value) <= max(found.error, 1e-3 * dense)
        assert oracles.group_norms(v, p.index) == pytest.approx(oracles.group_norms(oracles.flatten(p.params), p.index))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("delta", [0.01, 0.1])
@pytest.mark.parametrize("place", ["random", "trained"])
def test_search_against_brute_force(place: str, delta: float, exponent: float) -> None:
    p = problem("conv" if exponent < 3 else "mlp", seed=11)
    if place == "trained":
        p = strategies.trained(p, steps=300)
    assert len(oracles.flatten(p.params)) <= 200
    measure = bn_sharpness(p.groups, delta=delta, p=exponent)
    found = measure(p.objective(Engine("vmap", 128)), p.params)
    given = [oracles.flatten(found.direction)]
    best, _ = oracles.brute_force(p.loss, p.params, p.index, delta, exponent, starts=3, given=given, iterations=60)
    assert found.value >= 0.99 * best
