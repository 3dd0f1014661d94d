"""Measures against closed forms on quadratics; honest errors; generators; bad input; what measuring must not touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import problem
from torch import Tensor, nn

from bnsharp import Engine, InputError, Objective, ScaleGroups, exact_norms, laws
from bnsharp import params as P
from bnsharp.directions import Ascend, Draw, Lanczos
from bnsharp.geometry import Euclidean, Groupwise
from bnsharp.measures import (
    Measure,
    adaptive,
    bn_sharpness,
    epsilon_sharpness,
    gaussian,
    hessian_top,
    hessian_trace,
    lebesgue_ball,
)
from bnsharp.profiles import Curvature, Line, Rise
from bnsharp.reduce import FreeEnergy, Maximum, PowerMean
from bnsharp.types import Params


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic:
    """``½ θᵀAθ + bᵀθ`` at a random θ, with parameters w ``[d − 2]`` and v ``[2]``; A symmetric, indefinite."""

    def __init__(self, d: int = 6, seed: int = 0, definite: bool = False):
        g = seeded(seed)
        a = torch.randn(d, d, generator=g, dtype=torch.float64)
        self.matrix = a @ a.T / d if definite else (a + a.T) / 2
        self.slope = torch.randn(d, generator=g, dtype=torch.float64)
        self.theta = torch.randn(d, generator=g, dtype=torch.float64)
        self.params = P.make({"w": self.theta[: d - 2].clone(), "v": self.theta[d - 2 :].clone()})

    def __call__(self, params: Params) -> Tensor:
        x = oracles.flatten(params)
        return 0.5 * x @ self.matrix @ x + self.slope @ x

    @property
    def gradient(self) -> Tensor:
        return self.matrix @ self.theta + self.slope


def within(found: Any, exact: float) -> None:
    """5 standard errors: wrong once in 10⁶ for normal errors, and the seed is fixed."""
    assert 0 < found.stderr < math.inf
    assert abs(found.value - exact) < 5 * found.stderr + found.error


# ---------------------------------------------------------------- random directions


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0]))
def test_gaussian(seed: int, sigma: float) -> None:
    """``E L(θ+σε) − L(θ) = ½ σ² tr A``."""
    q = Quadratic(seed=seed)
    within(gaussian(sigma=sigma, draws=400)(q, q.params, seeded(seed)), float(0.5 * sigma**2 * q.matrix.trace()))


@given(st.integers(0, 1000), st.sampled_from(["joint", "box"]))
def test_lebesgue_ball_mean(seed: int, ball: str) -> None:
    """``½ δ² tr A/(d+2)`` over the ball, ``½ δ² tr A/3`` over the box."""
    q, delta = Quadratic(seed=seed), 0.7
    moment = 1 / (6 + 2) if ball == "joint" else 1 / 3
    found = lebesgue_ball(delta=delta, draws=400, ball=ball)(q, q.params, seeded(seed))
    within(found, float(0.5 * delta**2 * moment * q.matrix.trace()))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_lebesgue_ball_power_of_a_linear_loss(d: int, p: float) -> None:
    """``E|u_1|^p = Γ(d/2+1) Γ((p+1)/2) / (√π Γ((d+p)/2+1))`` in the unit ball of ``R^d``."""
    g = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)[:d]
    moment = math.gamma(d / 2 + 1) * math.gamma((p + 1) / 2) / (math.pi**0.5 * math.gamma((d + p) / 2 + 1))
    params = P.make({"w": torch.ones(d, dtype=torch.float64)})
    found = lebesgue_ball(delta=0.3, draws=2000, p=p)(lambda x: x["w"] @ g, params)
    within(found, 0.3 * float(g.norm()) * moment ** (1 / p))


@pytest.mark.parametrize("geometry", ["euclidean", "groupwise"])
def test_hessian_trace(geometry: str) -> None:
    q, groups = Quadratic(), ScaleGroups({"w": "row"})
    if geometry == "euclidean":
        exact = float(q.matrix.trace())
        within(hessian_trace(draws=400)(q, q.params), exact)
    else:  # groups of one coordinate each (rows of a vector), and v
        w, v, diagonal = q.params["w"], q.params["v"], q.matrix.diagonal()
        exact = float((w**2 * diagonal[:4]).sum() + v.norm() ** 2 / 2 * diagonal[4:].sum())
        within(hessian_trace(geometry=Groupwise(groups), draws=400)(q, q.params), exact)


def test_hessian_trace_of_a_diagonal_matrix_is_exact() -> None:
    q = Quadratic()
    q.matrix = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    found = hessian_trace(draws=3)(q, q.params)
    assert found.value == pytest.approx(21.0) and found.stderr < 1e-12 and found.error < 1e-10


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_entropy_kernel(beta: float) -> None:
    """``−(1/β) log E exp(−βf)``, ``ε ~ N(0, I/γ)``: ``(½ log det(I + βA/γ) − ½β² gᵀ(γI + βA)⁻¹g)/β``."""
    q, gamma = Quadratic(definite=True), 20.0
    measure = Measure(Euclidean(gamma**-0.5), Draw(laws.Gaussian(), 4000), Rise(), FreeEnergy(beta))
    eye = torch.eye(6, dtype=torch.float64)
    inner = q.gradient @ torch.linalg.solve(gamma * eye + beta * q.matrix, q.gradient)
    exact = float(0.5 * torch.logdet(eye + beta * q.matrix / gamma) - 0.5 * beta**2 * inner) / beta
    found = measure(q, q.params)
    within(found, exact)
    assert 1 < found.effective_samples < 4000


@pytest.mark.parametrize(
    ("build", "exact"),
    [
        (lambda: gaussian(sigma=0.3, draws=40), lambda q: 0.5 * 0.09 * q.matrix.trace()),
        (lambda: lebesgue_ball(delta=0.5, draws=40), lambda q: 0.5 * 0.25 / 22 * q.matrix.trace()),
        (lambda: hessian_trace(draws=40), lambda q: q.matrix.trace()),
        (
            lambda: Measure(Euclidean(1e-4), Draw(laws.Sphere(), 40), Rise(is_absolute=True), PowerMean(2.0)),
            lambda q: 1e-4 * (q.gradient @ q.gradient / 20) ** 0.5,
        ),
    ],
    ids=["gaussian", "ball", "trace", "L2 of a nearly linear rise"],
)
def test_standard_errors_are_honest(build: Callable[[], Measure], exact: Callable[[Quadratic], Tensor]) -> None:
    """Within 2 standard errors in 94.7% of seeds (Student, 39 degrees of freedom): of 200 seeds, 5 deviations of a
    binomial leave 87% to 100%."""
    q = Quadratic(20)
    truth = float(exact(q))
    found = [build()(q, q.params, seeded(seed)) for seed in range(200)]
    inside = sum(abs(f.value - truth) <= 2 * f.stderr for f in found) / 200
    spread = float(np.std([f.value for f in found]))
    assert inside > 0.87
    assert float(np.mean([f.stderr for f in found])) == pytest.approx(spread, rel=0.25)


def test_a_single_draw_has_no_standard_error() -> None:
    q = Quadratic()
    assert gaussian(draws=1)(q, q.params).stderr == math.inf


# ---------------------------------------------------------------- searched directions


@pytest.mark.parametrize("seed", range(5))
def test_hessian_top_is_the_largest_eigenvalue(seed: int) -> None:
    """Algebraically largest, whatever the size of the negative ones; an eigenvalue lies within the residual."""
    q = Quadratic(40, seed=seed)
    if seed % 2:
        q.matrix = q.matrix - 5 * torch.eye(40, dtype=torch.float64)
    values = torch.linalg.eigvalsh(q.matrix)
    found = hessian_top(tolerance=1e-6)(q, q.params)
    assert found.value == pytest.approx(float(values[-1]), rel=1e-8, abs=1e-8)
    assert float((values - found.value).abs().min()) <= found.error
    u = oracles.flatten(found.direction)
    assert float((q.matrix @ u - found.value * u).norm()) <= found.error + 1e-10
    assert found.stderr == 0 and found.evaluations["products"] <= 62


def test_hessian_top_unconverged_says_so() -> None:
    q = Quadratic(60, seed=1)
    exact = float(torch.linalg.eigvalsh(q.matrix)[-1])
    found = hessian_top(iterations=4)(q, q.params)
    assert found.value < exact and found.error > 1e-3
    assert found.value <= exact + 1e-10


@pytest.mark.parametrize("case", ["one direction", "multiple", "zero", "one dimension"])
def test_lanczos_on_degenerate_matrices(case: str) -> None:
    q = Quadratic(6)
    d = torch.zeros(6, dtype=torch.float64)
    d[0] = {"one direction": 1.0, "multiple": 1.0, "zero": 0.0, "one dimension": 2.0}[case]
    if case == "multiple":
        d[1:3] = 1.0
    if case == "one dimension":
        params = P.make({"w": torch.ones(1, dtype=torch.float64)})
        assert hessian_top()(lambda x: (x["w"] ** 2).sum(), params).value == pytest.approx(2.0)
        return
    q.matrix = torch.diag(d)
    found = hessian_top()(q, q.params)
    assert found.value == pytest.approx(float(d.max()), abs=1e-10) and math.isfinite(found.error)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("delta", [0.01, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_bn_sharpness_of_two_coordinates(seed: int, delta: float, p: float) -> None:
    """One group of two coordinates: the maximum over Φ is a maximum over one angle."""
    q = Quadratic(2, seed=seed)
    params = P.make({"w": q.theta})
    angles = np.linspace(0, np.pi, 241)  # v and −v are equal for |f|
    values = []
    for angle in angles:
        v = q.theta.norm() * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        a, c = float(q.gradient @ v), float(v @ q.matrix @ v)
        values.append(oracles.line_norm(lambda t, a=a, c=c: a * t + 0.5 * c * t**2, delta, p, panels=2))
    found = bn_sharpness(ScaleGroups({"w": "tensor"}), delta=delta, p=p, steps=30, restarts=4)(q, params)
    assert found.value == pytest.approx(max(values), rel=5e-4)
    assert found.error >= 0 and found.stderr == 0


@pytest.mark.parametrize("seed", range(4))
def test_epsilon_sharpness_of_two_coordinates(seed: int) -> None:
    q, delta = Quadratic(2, seed=seed), 0.5
    params = P.make({"w": q.theta})
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    v = delta * torch.stack([angles.cos(), angles.sin()])
    rises = 0.5 * (v * (q.matrix @ v)).sum(0) + q.gradient @ v
    found = epsilon_sharpness(delta=delta, steps=50, restarts=2)(q, params)
    assert found.value == pytest.approx(float(rises.max()), rel=1e-4)
    relative = epsilon_sharpness(delta=delta, steps=50, restarts=2, relative=True)(lambda x: q(x) + 10, params)
    assert relative.value == pytest.approx(found.value / (1 + 10 + float(q(params))), rel=1e-4)


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1]))
def test_adaptive_of_a_linear_loss(seed: int, eta: float) -> None:
    """``ρ ‖(|θ|+η) ⊙ g‖``."""
    q = Quadratic(seed=seed)
    q.matrix = torch.zeros_like(q.matrix)
    found = adaptive(rho=0.2, eta=eta, steps=2)(q, q.params)
    assert found.value == pytest.approx(0.2 * float(((q.theta.abs() + eta) * q.slope).norm()), rel=1e-9)


def test_a_zero_loss_has_no_sharpness() -> None:
    q = Quadratic()
    searched = bn_sharpness(ScaleGroups({"w": "tensor"}), steps=2, restarts=0)
    for measure in (searched, hessian_top(), gaussian(), epsilon_sharpness()):
        found = measure(lambda x: 0 * oracles.flatten(x).sum(), q.params)
        assert found.value == 0 and math.isfinite(found.error)


def test_rounding_is_part_of_the_error() -> None:
    """In float32 at a large loss, the error owns up to the digits lost."""
    q = Quadratic(seed=2)
    params = P.pmap(lambda x: x.float(), q.params)
    q32 = Quadratic(seed=2)
    q32.matrix, q32.slope = q.matrix.float(), q.slope.float()
    measure = bn_sharpness(ScaleGroups({"w": "tensor"}), delta=1e-4, steps=0, restarts=0)
    exact = measure(q, q.params)
    found = measure(lambda x: q32(x) + 1000.0, params)
    assert abs(found.value - exact.value) <= found.error
    assert found.error > 1e-5 > exact.error


# ---------------------------------------------------------------- generators


GROUPS = ScaleGroups({"w": "row"})
RANDOM = {
    "gaussian": gaussian(draws=5),
    "ball": lebesgue_ball(draws=5),
    "box": lebesgue_ball(draws=5, ball="box", p=2),
    "trace": hessian_trace(draws=5),
    "restarts": bn_sharpness(GROUPS, steps=1, restarts=2, delta=0.5),
    "lanczos": Measure(Euclidean(1.0), Lanczos(2), hessian_top().profile, hessian_top().reduce),
}


@pytest.mark.parametrize("name", list(RANDOM))
def test_generators(name: str) -> None:
    """The same seed gives the same number, None is seed 0, another seed another; the global state is not read."""
    q, measure = Quadratic(), RANDOM[name]
    torch.manual_seed(1)
    first = measure(q, q.params)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert measure(q, q.params).value == first.value == measure(q, q.params, seeded(0)).value
    assert torch.equal(state, torch.get_rng_state())
    if name != "restarts":
        assert measure(q, q.params, seeded(1)).value != first.value
    used = seeded(5)
    before = used.get_state()
    measure(q, q.params, used)
    assert not torch.equal(before, used.get_state())


@pytest.mark.parametrize("name", ["gaussian", "ball", "box", "trace"])
def test_a_penalty_has_the_value_of_its_measure(name: str) -> None:
    q = Quadratic()
    assert RANDOM[name].penalty(q, q.params).item() == pytest.approx(RANDOM[name](q, q.params).value, rel=1e-12)


# ---------------------------------------------------------------- bad input


BAD: dict[str, Callable[[], Any]] = {
    **{f"delta={x}": lambda x=x: bn_sharpness(GROUPS, delta=x) for x in (0.0, -1.0, math.nan, math.inf)},
    **{f"p={x}": lambda x=x: bn_sharpness(GROUPS, p=x) for x in (0.99, 0.0, -2.0, math.nan, math.inf)},
    **{f"steps={x}": lambda x=x: bn_sharpness(GROUPS, steps=x) for x in (-1, 1.5, math.nan)},
    **{f"restarts={x}": lambda x=x: bn_sharpness(GROUPS, restarts=x) for x in (-1, 0.5)},
    **{f"nodes={x}": lambda x=x: bn_sharpness(GROUPS, nodes=x) for x in (0, 2)},
    "rule": lambda: bn_sharpness(GROUPS, rule="newton"),
    "rest": lambda: bn_sharpness(GROUPS, rest="none"),
    "coordinates": lambda: bn_sharpness(GROUPS, coordinates="polar"),
    **{f"rate={x}": lambda x=x: Ascend(1, rate=x) for x in (0.0, math.nan)},
    **{f"sigma={x}": lambda x=x: gaussian(sigma=x) for x in (0.0, -1.0, math.nan, math.inf)},
    **{f"draws={x}": lambda x=x: gaussian(draws=x) for x in (0, -1, 2.5)},
    **{f"ball delta={x}": lambda x=x: lebesgue_ball(delta=x) for x in (0.0, math.nan)},
    "ball p": lambda: lebesgue_ball(p=0.5),
    "ball": lambda: lebesgue_ball(ball="cube"),
    "epsilon delta": lambda: epsilon_sharpness(delta=0.0),
    "epsilon steps": lambda: epsilon_sharpness(steps=-1),
    "adaptive rho": lambda: adaptive(rho=math.inf),
    "adaptive eta": lambda: adaptive(eta=-0.1),
    "iterations": lambda: hessian_top(iterations=0),
    "trace draws": lambda: hessian_trace(draws=0),
    "beta": lambda: FreeEnergy(0.0),
    "line p": lambda: Line(laws.Uniform(0.1), math.nan),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_options(name: str) -> None:
    with pytest.raises(InputError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", list(RANDOM))
def test_non_finite_parameters(name: str, value: float) -> None:
    q = Quadratic()
    q.params["v"][0] = value
    with pytest.raises(InputError, match="'v'"):
        RANDOM[name](q, q.params)


@pytest.mark.parametrize("name", list(RANDOM))
def test_non_finite_losses(name: str) -> None:
    q = Quadratic()
    with pytest.raises(InputError, match="finite"):
        RANDOM[name](lambda x: q(x) * math.nan, q.params)
    if name not in ("trace", "lanczos"):
        # finite at θ alone
        base = float(q(q.params))
        with pytest.raises(InputError, match="finite"):
            RANDOM[name](lambda x: torch.where(q(x).detach() == base, q(x), q(x) * math.inf), q.params)


def test_groups_of_another_network() -> None:
    q = Quadratic()
    with pytest.raises(InputError, match="'weight'"):
        bn_sharpness(ScaleGroups({"weight": "row"}))(q, q.params)


def test_what_is_no_objective() -> None:
    with pytest.raises(InputError, match="Objective"):
        gaussian()(3.0, Quadratic().params)  # type: ignore[arg-type]


# ---------------------------------------------------------------- networks


def every_measure(groups: ScaleGroups) -> dict[str, Measure]:
    return {
        "bn_sharpness": bn_sharpness(groups, delta=0.1, p=3, steps=3, restarts=1, nodes=4),
        "gaussian": gaussian(draws=7),
        "lebesgue_ball": lebesgue_ball(draws=7, p=2),
        "epsilon_sharpness": epsilon_sharpness(steps=3),
        "adaptive": adaptive(steps=3),
        "hessian_top": hessian_top(iterations=8),
        "hessian_top groupwise": hessian_top(geometry=Groupwise(groups), iterations=5, restarts=1),
        "hessian_trace": hessian_trace(draws=7),
    }


def snapshot(module: nn.Module) -> dict[str, Any]:
    state = {k: v.clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}
    identities = {k: id(v) for k, v in [*module.named_parameters(), *module.named_buffers()]}
    flags = [(m.training, sorted(m.__dict__)) for m in module.modules()]
    grads = {k: (p.requires_grad, None if p.grad is None else p.grad.clone()) for k, p in module.named_parameters()}
    return {"state": state, "identities": identities, "flags": flags, "grads": grads, "rng": torch.get_rng_state()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(every_measure(GROUPS)))
def test_measuring_leaves_the_module_untouched(name: str, training: bool) -> None:
    """Parameters, buffers, modes, ``requires_grad``, ``.grad`` and the global random state, dropout included."""
    p = problem("conv", "relu", bias=True, seed=1)
    module = nn.Sequential(p.module, nn.Dropout(0.5)).train(training)
    p.module[1].eval()  # a layer whose mode differs
    next(iter(p.module[8].parameters())).requires_grad_(False)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    groups = ScaleGroups({**{f"0.{k}": "row" for k in p.rows}, **{f"0.{k}": "inert" for k in p.inert}})
    params = P.parameters(module)
    kept = P.pmap(torch.clone, params)
    before = snapshot(module)
    every_measure(groups)[name](Objective(module, p.criterion, (p.x, p.y)), params)
    after = snapshot(module)
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    torch.testing.assert_close(after["grads"], before["grads"], rtol=0, atol=0)
    assert torch.equal(after["rng"], before["rng"])
    assert after["flags"] == before["flags"] and after["identities"] == before["identities"]
    assert torch.equal(oracles.flatten(params), oracles.flatten(kept))


@pytest.mark.parametrize("name", list(every_measure(GROUPS)))
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_engines_agree(kind: str, name: str) -> None:
    p = problem(kind, "tanh", seed=2)
    measure = every_measure(p.groups)[name]
    engines: list[Any] = ["loop", "vmap", Engine("vmap", 1), Engine("vmap", 3), Engine("vmap", 1000)]
    found = [measure(p.objective(e), p.params) for e in engines]
    for f in found[1:]:
        assert f.value == pytest.approx(found[0].value, rel=1e-9)
        assert f.stderr == pytest.approx(found[0].stderr, rel=1e-9)
        assert f.evaluations == found[0].evaluations


@pytest.mark.parametrize("name", list(every_measure(GROUPS)))
def test_batches_are_averaged_by_their_size(name: str) -> None:
    """Unequal batches against one plain function that averages their losses."""
    p = problem("mlp", "tanh", seed=3, examples=20)
    batches = [(p.x[:9], p.y[:9]), (p.x[9:13], p.y[9:13]), (p.x[13:], p.y[13:])]
    parts = [(replace(p, x=x, y=y), len(x)) for x, y in batches]
    measure = every_measure(p.groups)[name]
    ours = measure(Objective(p.module, p.criterion, batches), p.params)
    plain = measure(lambda x: sum(n * part.loss(x) for part, n in parts) / 20, p.params)
    assert ours.value == pytest.approx(plain.value, rel=1e-8)


@pytest.mark.parametrize("name", ["bn_sharpness", "hessian_top groupwise"])
def test_invariant_measures_say_what_they_found(name: str) -> None:
    """``direction = ‖θ_i‖ u_i`` attains the value; statistics and batch size are recorded."""
    p = problem("conv", "tanh", seed=4)
    with exact_norms(p.module):
        found = every_measure(p.groups)[name](p.objective(), p.params)
    assert found.statistics == "batch" and found.batch_size == len(p.x)
    placed = Groupwise(p.groups).place(found.unit, p.params)
    torch.testing.assert_close(oracles.flatten(placed), oracles.flatten(found.direction))
    v = oracles.flatten(found.direction)
    if name == "bn_sharpness":
        dense = oracles.sharpness_along(p.loss, p.params, v, 0.1, 3)
        assert abs(dense - found.value) <= found.error + 1e-9
    else:
        assert float(v @ oracles.dense_hessian(p.loss, p.params) @ v) == pytest.approx(found.value)


def test_a_reused_problem_is_deterministic() -> None:
    p = strategies.trained(problem("mlp", seed=1), steps=5)
    one, two = (bn_sharpness(p.groups, restarts=1, steps=2)(p.objective(), p.params).value for _ in range(2))
    assert one == two


@pytest.mark.parametrize(("profile", "shape"), [
    (Rise(), Euclidean(0.1)), (Line(laws.Uniform(0.1)), Euclidean(1.0)), (Curvature(), Euclidean(1.0, ball="box")),
])
def test_an_eigenvalue_solve_needs_a_form_on_a_joint_ball(profile: Any, shape: Any) -> None:
    with pytest.raises(InputError) as caught:
        Measure(shape, Lanczos(), profile, Maximum())
    assert "Ascend" in str(caught.value) and "\n" not in str(caught.value)
