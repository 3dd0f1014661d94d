"""Every measure on random quadratic losses, against its closed form; the losses are plain functions.

``L(θ) = ½ (θ−m)ᵀA(θ−m) + gᵀ(θ−m)`` on three tensors; the rows of the first are scale groups by decree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnsharp import Measure, ScaleGroups, laws, measures
from bnsharp import params as P
from bnsharp.directions import Draw, Given
from bnsharp.evaluation import Engine, FunctionObjective
from bnsharp.geometry import Elementwise, Euclidean, Filters, Groupwise
from bnsharp.laws import Box, Normal, Sphere, Uniform
from bnsharp.profiles import Curvature, Line, Rise
from bnsharp.reduce import Maximum, Mean
from bnsharp.types import Estimate, Params

SHAPES = {"layer.weight": (3, 2), "norm.weight": (2,), "head.weight": (2, 3)}
GROUPS = ScaleGroups({"layer.weight": "row"})
DRAWS = 2000
SIGMAS = 4.5
"""A drawn value may be off by this many standard errors: wrong once in 10⁵, and the seeds are fixed."""


@dataclass(frozen=True)
class Quadratic:
    """A loss with Hessian A and gradient g at θ, and θ."""

    a: Tensor
    g: Tensor
    params: Params

    @property
    def theta(self) -> Tensor:
        return oracles.flatten(self.params)

    @property
    def index(self) -> oracles.Index:
        return oracles.index_sets(self.params, ["layer.weight"])

    def objective(self) -> FunctionObjective:
        middle = self.theta

        def loss(params: Params) -> Tensor:
            d = oracles.flatten(params) - middle
            return 0.5 * d @ (self.a @ d) + self.g @ d + 0.7

        return FunctionObjective(loss, Engine("vmap", 64))

    def scales(self) -> Tensor:
        """``‖θ_i‖`` of each coordinate's group, and below ``d_i``."""
        out = torch.zeros(2, len(self.theta), dtype=torch.float64)
        for i in self.index:
            out[0, i], out[1, i] = self.theta[i].norm(), float(len(i))
        return out


def quadratic(seed: int, slope: float = 1.0, definite: bool = False) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)
    d = sum(math.prod(s) for s in SHAPES.values())
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    a = root @ root.T / d if definite else (root + root.T) / 2
    g = slope * torch.randn(d, generator=generator, dtype=torch.float64)
    theta = torch.randn(d, generator=generator, dtype=torch.float64)
    like = {k: torch.zeros(s, dtype=torch.float64) for k, s in SHAPES.items()}
    return Quadratic(a, g, oracles.to_params(theta, like))


seeds = st.integers(0, 10_000)


# ---------------------------------------------------------------- means over draws


def free_energy(a: Tensor, g: Tensor, beta: float) -> float:
    """``−(1/β) log E exp(−β(gᵀε + ½εᵀAε))``, ε standard normal."""
    b = torch.eye(len(g), dtype=g.dtype) + beta * a
    return float(torch.logdet(b) / (2 * beta) - beta / 2 * g @ torch.linalg.solve(b, g))


MEANS: dict[str, tuple[Callable[[], measures.Measured], Callable[[Quadratic], float]]] = {
    "gaussian": (
        lambda: measures.gaussian(sigma=0.3, draws=DRAWS), lambda q: 0.5 * 0.3**2 * float(q.a.trace()),
    ),
    "lebesgue_ball": (
        lambda: measures.lebesgue_ball(delta=0.5, draws=DRAWS),
        lambda q: 0.5 * 0.5**2 / (len(q.g) + 2) * float(q.a.trace()),
    ),
    "lebesgue box": (
        lambda: measures.lebesgue_ball(delta=0.5, draws=DRAWS, ball="box"), lambda q: 0.5**2 / 6 * float(q.a.trace()),
    ),
    "lebesgue_ball p=2": (
        lambda: measures.lebesgue_ball(delta=0.5, draws=DRAWS, p=2.0), lambda q: ball_second_moment(q, 0.5),
    ),
    "adaptive_average": (
        lambda: measures.adaptive_average(rho=0.2, draws=DRAWS),
        lambda q: 0.5 * 0.2**2 * float(q.a.diagonal() @ q.theta**2),
    ),
    "bn_ball": (
        lambda: measures.bn_ball(GROUPS, delta=0.4, draws=DRAWS),
        lambda q: 0.5 * 0.4**2 * float((q.scales()[0] ** 2 / (q.scales()[1] + 2)) @ q.a.diagonal()),
    ),
    "bn_gaussian": (
        lambda: measures.bn_gaussian(GROUPS, sigma=0.4, draws=DRAWS),
        lambda q: 0.5 * 0.4**2 * float((q.scales()[0] ** 2 / q.scales()[1]) @ q.a.diagonal()),
    ),
    "hessian_trace": (lambda: measures.hessian_trace(draws=DRAWS), lambda q: float(q.a.trace())),
    "relative_trace": (
        lambda: measures.relative_trace(GROUPS, draws=DRAWS),
        lambda q: float((q.scales()[0] ** 2 / q.scales()[1]) @ q.a.diagonal()),
    ),
    "relative_flatness": (
        lambda: measures.relative_flatness(draws=DRAWS), lambda q: flatness_by_loops(q, "head.weight"),
    ),
    "relative_flatness of a layer": (
        lambda: measures.relative_flatness(layer="layer.weight", draws=DRAWS),
        lambda q: flatness_by_loops(q, "layer.weight"),
    ),
}


def ball_second_moment(q: Quadratic, delta: float) -> float:
    """``E f²`` over the ball: ``E(gᵀv)² = δ²‖g‖²/(d+2)``, ``E(½vᵀAv)² = δ⁴(2 tr A² + (tr A)²)/(4(d+2)(d+4))``."""
    d, t = len(q.g), float(q.a.trace())
    first = delta**2 * float(q.g @ q.g) / (d + 2)
    return math.sqrt(first + delta**4 * (2 * float((q.a @ q.a).trace()) + t**2) / (4 * (d + 2) * (d + 4)))


def flatness_by_loops(q: Quadratic, name: str) -> float:
    """``Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}``, neuron by neuron."""
    start, total = 0, 0.0
    for key, value in q.params.items():
        if key == name:
            n, m = value.shape
            for s in range(n):
                for r in range(n):
                    block = q.a[start + s * m : start + (s + 1) * m, start + r * m : start + (r + 1) * m]
                    total += float(value[s] @ value[r]) * float(block.trace())
        start += value.numel()
    return total


@pytest.mark.parametrize("name", MEANS)
@settings(max_examples=4)
@given(seed=seeds)
def test_mean_over_draws(name: str, seed: int) -> None:
    build, closed = MEANS[name]
    q = quadratic(seed)
    found = build()(q.objective(), q.params)
    assert found.stderr > 0 and abs(found.value - closed(q)) < SIGMAS * found.stderr
    assert found.draws == DRAWS == found.effective_samples


@settings(max_examples=6)
@given(seed=seeds, beta=st.sampled_from([0.5, 1.0, 2.0]))
def test_free_energies(seed: int, beta: float) -> None:
    """Local entropy and its BN form; with so small a variance the effective sample size stays high."""
    q, gamma = quadratic(seed, slope=0.5, definite=True), 30.0
    s = q.scales()
    relative = s[0] / s[1].sqrt() * gamma**-0.5
    forms = (
        (measures.local_entropy(gamma=gamma, beta=beta, draws=DRAWS), torch.full_like(q.g, gamma**-0.5)),
        (measures.bn_entropy(GROUPS, gamma=gamma, beta=beta, draws=DRAWS), relative),
    )
    for measure, std in forms:
        found = measure(q.objective(), q.params)
        expected = free_energy(std[:, None] * q.a * std, std * q.g, beta)
        assert found.effective_samples > 0.2 * DRAWS
        assert abs(found.value - expected) < SIGMAS * found.stderr


@settings(max_examples=6)
@given(seed=seeds)
def test_largest_sigma(seed: int) -> None:
    """``½σ² tr A = rise``, within its own error; the trace must be positive for a radius to exist."""
    q = quadratic(seed, slope=0.0, definite=True)
    found = measures.largest_sigma(rise=0.02, draws=400)(q.objective(), q.params)
    expected = math.sqrt(2 * 0.02 / float(q.a.trace()))
    assert found.converged and abs(found.value - expected) < SIGMAS * found.stderr + found.error
    assert found.error < 1e-3 * found.value
    again = measures.gaussian(sigma=found.value, draws=400)(q.objective(), q.params)
    assert again.value <= 0.02 < measures.gaussian(sigma=1.01 * found.value, draws=400)(q.objective(), q.params).value
    for rise, end in ((1e9, 2.0), (1e-13, 1e-5)):
        outside = measures.largest_sigma(rise=rise, draws=5)(q.objective(), q.params)
        assert outside.converged is False and outside.value == end


# ---------------------------------------------------------------- maxima


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


@settings(max_examples=10)
@given(seed=seeds)
def test_largest_eigenvalues(seed: int) -> None:
    q = quadratic(seed)
    norms, theta = q.scales()[0], q.theta
    for measure, expected in (
        (measures.hessian_top(tolerance=1e-10), top(q.a)),
        (measures.spherical_top(tolerance=1e-10), float(theta @ theta) * top(q.a)),
        (measures.relative_top(GROUPS, ball="joint", tolerance=1e-10), top(norms[:, None] * q.a * norms)),
    ):
        found = measure(q.objective(), q.params)
        assert found.value == pytest.approx(expected, rel=1e-8)
        assert found.upper is not None and expected * (1 - 1e-12) <= found.upper <= expected * 1.01


@settings(max_examples=10)
@given(seed=seeds, rho=st.floats(0.01, 0.5))
def test_largest_rise_without_slope(seed: int, rho: float) -> None:
    """At a stationary point the largest rise in a ball is ``½ρ²`` times an eigenvalue."""
    q = quadratic(seed, slope=0.0, definite=True)
    theta = q.theta.abs()
    search = {"steps": 200, "restarts": 6}
    for measure, expected in (
        (measures.epsilon_sharpness(delta=rho, **search), 0.5 * rho**2 * top(q.a)),
        (measures.adaptive(rho=rho, certify=1, **search), 0.5 * rho**2 * top(theta[:, None] * q.a * theta)),
    ):
        found = measure(q.objective(), q.params)
        assert found.value == pytest.approx(expected, rel=1e-5)
        assert found.upper is not None and expected * (1 - 1e-12) <= found.upper <= expected * 1.01


@settings(max_examples=10)
@given(seed=seeds)
def test_largest_rise_of_a_linear_loss(seed: int) -> None:
    """Linear losses are solved by the steepest start alone."""
    q = quadratic(seed)
    q = Quadratic(torch.zeros_like(q.a), q.g, q.params)
    size, theta = q.g.abs(), q.theta.abs()
    expected = {
        measures.epsilon_sharpness(delta=0.1, steps=0): 0.1 * float(q.g.norm()),
        measures.epsilon_sharpness(delta=0.1, steps=0, relative=True): 0.1 * float(q.g.norm()) / 1.7,
        measures.keskar(epsilon=1e-2, steps=0): 1e-2 * float(size @ (theta + 1)) / 1.7,
        measures.adaptive(rho=0.1, steps=0): 0.1 * float((theta * q.g).norm()),
        measures.adaptive(rho=0.1, eta=0.5, ball="box", steps=3): 0.1 * float((theta + 0.5) @ size),
    }
    for measure, value in expected.items():
        assert measure(q.objective(), q.params).value == pytest.approx(value, rel=1e-10)


@settings(max_examples=10)
@given(seed=seeds, k=st.integers(1, 8))
def test_keskar_in_a_random_subspace(seed: int, k: int) -> None:
    """``ε Σ_i |Aᵀg|_i (|A⁺θ|_i + 1)/(1 + L)`` on a linear loss, A rebuilt from steps along its axes."""
    q = quadratic(seed)
    q = Quadratic(torch.zeros_like(q.a), q.g, q.params)
    measure = measures.keskar(epsilon=1e-2, subspace=k, steps=0, seed=seed)
    frame = measure.geometry.at(q.params)
    axes = torch.eye(k, dtype=torch.float64)
    placed = torch.stack([P.flatten(frame.place(P.make({"subspace": e}))) for e in axes], 1)
    columns = placed / placed.norm(dim=0)
    scale = 1e-2 * ((torch.linalg.pinv(columns) @ q.theta).abs() + 1)
    torch.testing.assert_close(placed, columns * scale)
    value = measure(q.objective(), q.params).value
    assert value == pytest.approx(float(scale @ (columns.T @ q.g).abs()) / 1.7, rel=1e-9)


def test_a_basis_too_large_to_keep_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quadratic(1)
    kept = measures.keskar(subspace=5, steps=1)(q.objective(), q.params).value
    monkeypatch.setattr("bnsharp.maps.KEPT", 10)
    assert measures.keskar(subspace=5, steps=1)(q.objective(), q.params).value == pytest.approx(kept, rel=1e-12)


# ---------------------------------------------------------------- lines


@settings(max_examples=20)
@given(seed=seeds, reach=st.floats(1e-3, 1.0), law=st.sampled_from(["uniform", "normal"]))
def test_bn_sharpness_along_a_direction(seed: int, reach: float, law: str) -> None:
    """p = 2: ``a²E t² + ¼q²E t⁴``; for the uniform law ``a²δ²/3 + q²δ⁴/20``, for the normal one ``a²σ² + ¾q²σ⁴``."""
    q = quadratic(seed)
    u = Sphere()(Groupwise(GROUPS).ball, q.params, P.seeded(seed, torch.device("cpu")))
    measure = Measure(Groupwise(GROUPS), Given(u), Line(laws.SEGMENTS[law](reach), 2.0), Maximum())
    found = measure(q.objective(), q.params)
    v = oracles.flatten(found.direction)
    a, curvature = float(q.g @ v), float(v @ q.a @ v)
    moments = {"uniform": (1 / 3, 1 / 20), "normal": (1.0, 3 / 4)}[law]
    expected = math.sqrt(a**2 * reach**2 * moments[0] + curvature**2 * reach**4 * moments[1])
    assert found.value == pytest.approx(expected, rel=1e-9)


@settings(max_examples=5)
@given(seed=seeds, law=st.sampled_from(["uniform", "normal"]), reach=st.sampled_from([0.05, 0.5]))
def test_bn_sharpness_maximised(seed: int, law: str, reach: float) -> None:
    """The search against many random starts of a dense optimiser on the closed form."""
    q = quadratic(seed)
    moments = {"uniform": (1 / 3, 1 / 20), "normal": (1.0, 3 / 4)}[law]
    generator, best = torch.Generator().manual_seed(seed), 0.0
    for _ in range(20):
        w = torch.randn(len(q.g), generator=generator, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss(w: Tensor = w) -> Tensor:
            v = oracles.on_phi(w, q.theta, q.index)
            return -((q.g @ v) ** 2 * reach**2 * moments[0] + (v @ q.a @ v) ** 2 * reach**4 * moments[1]).sqrt()

        def closure(w: Tensor = w, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(w)
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        best = max(best, -loss(w).item())
    found = measures.bn_sharpness(GROUPS, delta=reach, law=law, certify=0)(q.objective(), q.params)
    assert best * 0.999 <= found.value <= best * 1.001


@settings(max_examples=5)
@given(seed=seeds)
def test_random_lines_are_a_floor(seed: int) -> None:
    """Random directions average the closed form of each; they stay below the maximum; filters have their own norms."""
    q = quadratic(seed)
    bn = measures.bn_random_line(GROUPS, delta=0.3, draws=50)(q.objective(), q.params)
    assert bn.value < measures.bn_sharpness(GROUPS, delta=0.3, certify=0)(q.objective(), q.params).value
    filters = measures.filter_normalized(delta=0.3, draws=50)
    found = filters.directions(None, filters.geometry.at(q.params), P.seeded(0, torch.device("cpu")))  # type: ignore[arg-type]
    total = 0.0
    for u in found.u:
        v = filters.geometry.place(u, q.params)
        assert float(v["norm.weight"].abs().max()) == 0.0
        for name in ("layer.weight", "head.weight"):
            torch.testing.assert_close(v[name].norm(dim=1), q.params[name].norm(dim=1))
        flat = oracles.flatten(v)
        total += math.sqrt(float(q.g @ flat) ** 2 * 0.3**2 / 3 + float(flat @ q.a @ flat) ** 2 * 0.3**4 / 20)
    assert filters(q.objective(), q.params).value == pytest.approx(total / 50, rel=1e-8)


# ---------------------------------------------------------------- exact traces


@settings(max_examples=10)
@given(seed=seeds)
def test_traces_over_all_axes_are_exact(seed: int) -> None:
    """The mean of ``vᵀHv`` over the axes times d is the trace, to rounding: no draw is involved."""
    q = quadratic(seed)
    eye = torch.eye(len(q.g), dtype=torch.float64)
    axes = P.stack([oracles.to_params(e, q.params) for e in eye])
    for geometry, expected in (
        (Euclidean(1.0), float(q.a.trace())),
        (Groupwise(GROUPS), float(q.scales()[0] ** 2 @ q.a.diagonal())),
        (Elementwise(1.0), float(q.theta**2 @ q.a.diagonal())),
    ):
        found = Measure(geometry, Given(axes), Curvature(), Mean())(q.objective(), q.params)
        assert len(eye) * found.value == pytest.approx(expected, rel=1e-10)
        assert found.stderr == 0.0


# ---------------------------------------------------------------- stated errors


HONEST: dict[str, tuple[Callable[[], Measure], Callable[[Quadratic], float]]] = {
    "gaussian": (lambda: measures.gaussian(sigma=0.3, draws=40), MEANS["gaussian"][1]),
    "ball": (lambda: measures.lebesgue_ball(delta=0.5, draws=40), MEANS["lebesgue_ball"][1]),
    "power mean": (lambda: measures.lebesgue_ball(delta=0.5, draws=60, p=2.0), MEANS["lebesgue_ball p=2"][1]),
    "bn_gaussian": (lambda: measures.bn_gaussian(GROUPS, sigma=0.4, draws=40), MEANS["bn_gaussian"][1]),
    "local_entropy": (
        lambda: measures.local_entropy(gamma=100.0, draws=60),
        lambda q: free_energy(q.a / 100, q.g / 10, 1.0),
    ),
    "trace": (lambda: measures.hessian_trace(draws=30), MEANS["hessian_trace"][1]),
    "relative trace": (lambda: measures.relative_trace(GROUPS, draws=30), MEANS["relative_trace"][1]),
    "relative flatness": (lambda: measures.relative_flatness(draws=60), MEANS["relative_flatness"][1]),
}


@pytest.mark.parametrize("name", HONEST)
def test_intervals_hold_the_truth_as_often_as_they_say(name: str) -> None:
    """Over 200 seeds a 95% interval holds the truth 90 to 99% of the time."""
    build, closed = HONEST[name]
    q = quadratic(12, definite=True)
    measure, objective, truth = build(), q.objective(), closed(q)
    held = 0
    for seed in range(200):
        low, high = measure(objective, q.params, P.seeded(seed, torch.device("cpu"))).interval
        held += low <= truth <= high
    assert 180 <= held <= 198, held


def test_radius_intervals_hold_the_truth() -> None:
    q = quadratic(12, slope=0.3, definite=True)
    measure = measures.largest_sigma(rise=0.05, draws=60, halvings=8)
    truth, held = math.sqrt(2 * 0.05 / float(q.a.trace())), 0
    for seed in range(100):
        low, high = measure(q.objective(), q.params, P.seeded(seed, torch.device("cpu"))).interval
        held += low <= truth <= high
    assert 88 <= held <= 99, held


@pytest.mark.parametrize("law", [Uniform(0.4), Normal(0.4)])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_quadrature_errors_cover(law: laws.SegmentLaw, p: float) -> None:
    """Over 40 random lines through a quartic loss, the stated numerical error covers the true one."""
    generator = torch.Generator().manual_seed(0)
    theta = P.make({"w": torch.zeros(1, dtype=torch.float64)})
    z = np.linspace(-12, 12, 40_001) if not law.is_bounded else np.linspace(-1, 1, 40_001)
    t = z * law.reach
    density = np.array(law.density(torch.tensor(np.abs(t))).tolist()) / 2
    for _ in range(40):
        c = torch.randn(4, generator=generator, dtype=torch.float64)

        def loss(q: Params, c: Tensor = c) -> Tensor:
            return sum(c[k] * q["w"][0] ** (k + 1) for k in range(4))  # type: ignore[return-value]

        found = Measure(Euclidean(1.0), Given(P.make({"w": torch.ones(1, dtype=torch.float64)})), Line(law, p), Mean())(
            loss, theta
        )
        f = sum(float(c[k]) * t ** (k + 1) for k in range(4))
        exact = np.trapezoid(np.abs(f) ** p * density, t) ** (1 / p)
        assert abs(found.value - exact) <= found.error + 2e-4 * exact


def test_the_box_law_and_the_ball_law_are_used_where_they_are_named() -> None:
    """A draw in the box leaves the ball of the same radius almost always in 14 dimensions."""
    q = quadratic(0)
    box = Measure(Euclidean(0.1, "box"), Draw(Box(), 50), Rise(), Mean())
    drawn = box.directions(None, box.geometry.at(q.params), P.seeded(0, torch.device("cpu"))).u  # type: ignore[arg-type]
    assert all(float(oracles.flatten(u).abs().max()) <= 1 < float(oracles.flatten(u).norm()) for u in drawn)


def test_filters_leave_vectors_alone() -> None:
    q = quadratic(0)
    assert [(g.members, g.blocks) for g in Filters().partition_with(q.params)] == [
        (("layer.weight",), 3), (("head.weight",), 2),
    ]


def test_an_estimate_of_one_draw_has_an_unbounded_interval() -> None:
    q = quadratic(0)
    found: Estimate = measures.gaussian(sigma=0.1, draws=1)(q.objective(), q.params)
    assert math.isinf(found.stderr) and math.isinf(found.half_width)
