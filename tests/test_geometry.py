"""One list of laws, run over every geometry; and the normalisation of every law of directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import torch
from torch import Tensor

from bnsharp import Group, ScaleGroups, laws
from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.geometry import Elementwise, Euclidean, Geometry, Groupwise
from bnsharp.types import Params

GROUPS = ScaleGroups(
    [
        Group("row", ("conv",), 3),
        Group("block", ("blocks",), 2),
        Group("joint", ("w", "b"), 2),
        Group("inert", ("inert",), 1),
    ]
)
"""Rows, blocks of rows, two parameters that scale together, and one without any effect; the rest in no group."""


def point(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (3, 2, 2), "blocks": (4, 3), "w": (2, 3), "b": (2,), "inert": (3,), "head": (2, 3), "bias": (2,)}
    return P.make({k: torch.randn(s, generator=generator, dtype=torch.float64) + 0.1 for k, s in shapes.items()})


def by_hand(params: Params, rest: str) -> oracles.Index:
    """The groups of ``GROUPS`` as index sets."""
    start: dict[str, int] = {}
    total = 0
    for name, value in params.items():
        start[name] = total
        total += value.numel()

    def span(name: str, first: int, last: int) -> Tensor:
        return torch.arange(start[name] + first, start[name] + last)

    groups = [span("conv", 4 * r, 4 * r + 4) for r in range(3)]
    groups += [span("blocks", 6 * r, 6 * r + 6) for r in range(2)]
    groups += [torch.cat([span("w", 3 * r, 3 * r + 3), span("b", r, r + 1)]) for r in range(2)]
    others = [span("head", 0, 6), span("bias", 0, 2)]
    return [*groups, *others] if rest == "tensor" else [*groups, torch.cat(others)]


@dataclass(frozen=True)
class Case:
    """A geometry, and by hand: its scale per coordinate and its groups (None: a box)."""

    geometry: Geometry
    scale: Callable[[Params], Tensor]
    groups: Callable[[Params], oracles.Index] | None


def _norms(rest: str) -> Callable[[Params], Tensor]:
    def scale(params: Params) -> Tensor:
        flat, index = oracles.flatten(params), by_hand(params, rest)
        out = torch.zeros_like(flat)
        for positions, norm in zip(index, oracles.group_norms(flat, index), strict=True):
            out[positions] = norm
        return out

    return scale


def _whole(params: Params) -> oracles.Index:
    return [torch.arange(P.numel(params))]


CASES = {
    "euclidean": Case(Euclidean(0.3), lambda p: torch.full_like(oracles.flatten(p), 0.3), _whole),
    "euclidean box": Case(Euclidean(0.3, "box"), lambda p: torch.full_like(oracles.flatten(p), 0.3), None),
    "groupwise": Case(Groupwise(GROUPS), _norms("tensor"), lambda p: by_hand(p, "tensor")),
    "groupwise joint rest": Case(Groupwise(GROUPS, rest="joint"), _norms("joint"), lambda p: by_hand(p, "joint")),
    "groupwise radius": Case(
        Groupwise(GROUPS, 0.2), lambda p: 0.2 * _norms("tensor")(p), lambda p: by_hand(p, "tensor")
    ),
    "elementwise": Case(Elementwise(0.3, 0.1), lambda p: 0.3 * (oracles.flatten(p).abs() + 0.1), _whole),
    "elementwise box": Case(Elementwise(0.3, 0.1, "box"), lambda p: 0.3 * (oracles.flatten(p).abs() + 0.1), None),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def random(seed: int) -> Params:
    generator = torch.Generator().manual_seed(1000 + seed)
    return P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), point())


def inside(case: Case, params: Params, seed: int) -> Params:
    """A random point on the boundary of the ball, by hand."""
    flat = oracles.flatten(random(seed))
    if case.groups is None:
        return oracles.to_params(torch.sign(flat), params)
    return oracles.to_params(oracles.on_phi(flat, _ones(case, params), case.groups(params)), params)


def _ones(case: Case, params: Params) -> Tensor:
    """A vector of norm one on each group, so that ``on_phi`` gives unit directions."""
    assert case.groups is not None
    flat = torch.zeros_like(oracles.flatten(params))
    for positions in case.groups(params):
        flat[positions] = len(positions) ** -0.5
    return flat


def no_fill() -> Params:
    raise AssertionError("no group has a negligible gradient here")


# ---------------------------------------------------------------- laws of every geometry


def test_place_is_the_scale_times_u(case: Case) -> None:
    params, u = point(), random(0)
    expected = case.scale(params) * oracles.flatten(u)
    torch.testing.assert_close(oracles.flatten(case.geometry.place(u, params)), expected)
    torch.testing.assert_close(oracles.flatten(case.geometry.at(params).place(u)), expected)
    torch.testing.assert_close(oracles.flatten(case.geometry.at(params).place(u, 0.5)), 0.5 * expected)


def test_a_batch_is_placed_item_by_item(case: Case) -> None:
    params = point()
    together = case.geometry.at(params).place(P.stack([random(0), random(1)]))
    for i in range(2):
        torch.testing.assert_close(
            oracles.flatten(P.pick(together, i)), oracles.flatten(case.geometry.place(random(i), params))
        )


def test_pull_is_the_adjoint_of_place(case: Case) -> None:
    frame = case.geometry.at(point())
    one, two = P.dot(frame.place(random(0)), random(1)), P.dot(random(0), frame.pull(random(1)))
    assert one.item() == pytest.approx(two.item())


def test_steepest_attains_the_maximum_over_the_ball(case: Case) -> None:
    params, frame = point(), case.geometry.at(point())
    for seed in range(5):
        g = frame.pull(random(seed))
        u = frame.steepest(g, no_fill)
        best = P.dot(g, u).item()
        flat = oracles.flatten(g)
        exact = flat.abs().sum() if case.groups is None else sum(flat[i].norm() for i in case.groups(params))
        assert best == pytest.approx(float(exact))
        assert all(P.dot(g, inside(case, params, k)).item() <= best + 1e-12 for k in range(200))


def test_retract_lands_on_the_ball(case: Case) -> None:
    params = point()
    moved = P.shift(inside(case, params, 0), random(1))
    u = oracles.flatten(case.geometry.ball.retract(moved))
    if case.groups is None:
        assert float(u.abs().max()) <= 1
        torch.testing.assert_close(u, oracles.flatten(moved).clamp(-1, 1))
    else:
        for positions in case.groups(params):
            assert float(u[positions].norm()) == pytest.approx(1)
            part = oracles.flatten(moved)[positions]
            torch.testing.assert_close(u[positions], part / part.norm())


def test_retract_keeps_what_is_on_the_ball(case: Case) -> None:
    u = inside(case, point(), 3)
    torch.testing.assert_close(oracles.flatten(case.geometry.ball.retract(u)), oracles.flatten(u))


def test_tangent_is_the_first_order_of_retract(case: Case) -> None:
    """``d/dt retract(u + t g) = tangent(u, g)`` at t = 0+; orthogonal to u on every sphere."""
    params = point()
    u, g, ball = inside(case, params, 0), random(1), case.geometry.ball
    move = ball.tangent(u, g)
    step = P.scaled(P.combine(1.0, ball.retract(P.shift(u, g, 1e-7)), -1.0, u), 1e7)
    inert = torch.ones(P.numel(params), dtype=torch.bool)
    if case.groups is not None:
        covered = torch.cat(case.groups(params))
        inert[covered] = False
        for positions in case.groups(params):
            radial = oracles.flatten(move)[positions] @ oracles.flatten(u)[positions]
            assert abs(float(radial)) < 1e-12
    else:
        inert[:] = False
    torch.testing.assert_close(oracles.flatten(step)[~inert], oracles.flatten(move)[~inert], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(oracles.flatten(ball.tangent(u, move))[~inert], oracles.flatten(move)[~inert])


def test_power_is_the_steepest(case: Case) -> None:
    """The power step is the maximiser of ``⟨g, u⟩``; without a gradient u stays."""
    frame, u = case.geometry.at(point()), inside(case, point(), 0)
    g = frame.pull(random(1))
    new = frame.ball.power(u, g)
    assert P.dot(g, new).item() == pytest.approx(P.dot(g, frame.steepest(g, lambda: random(99))).item())
    torch.testing.assert_close(oracles.flatten(frame.ball.power(u, P.zeros_like(u))), oracles.flatten(u))


def test_uphill_stays_on_the_ball_and_climbs(case: Case) -> None:
    params, frame = point(), case.geometry.at(point())
    u, g = P.batch(inside(case, params, 0)), P.batch(frame.pull(random(1)))
    for ambient in (False, True):
        new = frame.uphill(u, g, torch.tensor([0.1], dtype=torch.float64), ambient)
        torch.testing.assert_close(
            oracles.flatten(P.pick(frame.ball.retract(new), 0)), oracles.flatten(P.pick(new, 0))
        )
        assert P.dot(g, new).item() > P.dot(g, u).item()


def test_size_is_the_length_of_u(case: Case) -> None:
    params = point()
    u = inside(case, params, 0)
    assert float(case.geometry.at(params).size) == pytest.approx(float(P.norm(u)))


def test_moving_is_the_derivative_of_place(case: Case) -> None:
    """``⟨moving(u, g), d⟩ = d/dh ⟨g, place(u, θ + h d)⟩``; place is differentiable by autograd too."""
    params, u, g, d = point(), random(0), random(1), random(2)
    slope = oracles.central_difference(
        lambda h: P.dot(g, case.geometry.place(u, P.shift(params, d, h))).item(), 1e-4
    )
    assert P.dot(case.geometry.moving(u, g, params), d).item() == pytest.approx(slope, rel=1e-7, abs=1e-9)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    value = P.dot(g, case.geometry.place(u, P.make(leaves)))
    if value.requires_grad:
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(
            torch.cat([x.reshape(-1) for x in grads]), oracles.flatten(case.geometry.moving(u, g, params))
        )


def test_a_constant_scale_does_not_move() -> None:
    moved = Euclidean(0.3).moving(random(0), random(1), point())
    assert not oracles.flatten(moved).any()


# ---------------------------------------------------------------- groupwise alone


@pytest.mark.parametrize("rest", ["tensor", "joint"])
def test_groupwise_is_equivariant(rest: str) -> None:
    """``place(u, T_a θ) = T_a place(u, θ)``; ``steepest`` in u does not see a; neither does a Riemannian step."""
    geometry, params = Groupwise(GROUPS, rest=rest), point()
    a = GROUPS.random_factors(params, torch.Generator().manual_seed(0), 0.05, 20)
    scaled, u = GROUPS.rescale(params, a), random(0)
    torch.testing.assert_close(
        oracles.flatten(geometry.place(u, scaled)), oracles.flatten(GROUPS.rescale(geometry.place(u, params), a)),
        rtol=1e-13, atol=0,
    )
    # the gradient of an invariant function scales by 1/a
    g = random(1)
    g_scaled = GROUPS.rescale(g, P.pmap(torch.reciprocal, a))
    one, two = geometry.at(params), geometry.at(scaled)
    pulled = [oracles.flatten(x) for x in (one.pull(g), two.pull(g_scaled))]
    torch.testing.assert_close(*pulled, rtol=1e-13, atol=1e-15)
    rate = torch.tensor([0.5], dtype=torch.float64)
    start = P.batch(geometry.ball.retract(random(2)))
    new = [f.uphill(start, P.batch(f.pull(x)), rate) for f, x in ((one, g), (two, g_scaled))]
    torch.testing.assert_close(*(oracles.flatten(P.pick(x, 0)) for x in new), rtol=1e-12, atol=1e-14)


def test_groupwise_has_the_norms_of_theta() -> None:
    """``v ∈ Φ(θ)``: ``‖v_i‖ = ‖θ_i‖`` for every group, so that ``‖v‖ = ‖θ‖`` without the inert part."""
    params = point()
    v = Groupwise(GROUPS).place(Groupwise(GROUPS).ball.retract(random(0)), params)
    index = by_hand(params, "tensor")
    assert oracles.group_norms(oracles.flatten(v), index) == pytest.approx(
        oracles.group_norms(oracles.flatten(params), index)
    )
    assert not v["inert"].any()


@pytest.mark.parametrize("name", ["conv", "blocks", "head"])
def test_a_group_of_norm_zero_is_not_perturbed(name: str) -> None:
    params = point()
    params[name][0] = 0
    if name == "blocks":
        params[name][1] = 0  # a block is two rows
    if name == "head":
        params[name] = torch.zeros_like(params[name])
    geometry = Groupwise(GROUPS)
    frame = geometry.at(params)
    u = frame.steepest(frame.pull(random(0)), lambda: random(1))
    v = geometry.place(u, params)
    zero = params[name] == 0
    assert not v[name][zero].any() and v["conv"][1].any() and v["bias"].any()
    assert float(frame.size) == pytest.approx(math.sqrt(len(by_hand(params, "tensor")) - 1))
    # nor does its norm's derivative poison the others
    assert all(x.isfinite().all() for x in geometry.moving(random(2), random(3), params).values())


@pytest.mark.parametrize("name", list(CASES))
def test_a_negligible_gradient_is_filled(name: str) -> None:
    """Groups (coordinates, in a box) without gradient start at random; the test is invariant under ``T_a``."""
    params, geometry = point(), CASES[name].geometry
    g, fill = random(0), geometry.ball.retract(random(1))
    g["conv"][1] *= 1e-16
    frame = geometry.at(params)
    u = frame.steepest(frame.pull(g), lambda: fill)
    if name.startswith("groupwise"):
        torch.testing.assert_close(u["conv"][1], fill["conv"][1])
        assert not torch.allclose(u["conv"][0], fill["conv"][0])
        a = GROUPS.random_factors(params, torch.Generator().manual_seed(0), 1e-3, 1e3)
        other = geometry.at(GROUPS.rescale(params, a))
        again = other.steepest(other.pull(GROUPS.rescale(g, P.pmap(torch.reciprocal, a))), lambda: fill)
        torch.testing.assert_close(oracles.flatten(again), oracles.flatten(u), rtol=1e-12, atol=1e-14)
    elif name.endswith("box"):
        assert torch.equal(u["conv"][1], torch.sign(fill["conv"][1]))
        assert torch.equal(u["conv"][0], torch.sign(g["conv"][0]))


def test_invariant_groups_of_the_ball() -> None:
    """Only scale groups: the rest is in no invariant group, and other balls have none."""
    params = point()
    members = {name for g in Groupwise(GROUPS).ball.invariant(params) for name in g.members}
    assert members == {"conv", "blocks", "w", "b"}
    for name in ("euclidean", "euclidean box", "elementwise", "elementwise box"):
        assert not CASES[name].geometry.ball.invariant(params).groups


# ---------------------------------------------------------------- laws of u


DRAWS = 1500


def draws(law: laws.Law, case: Case) -> Tensor:
    """``[DRAWS, d]`` draws of u."""
    generator = torch.Generator().manual_seed(7)
    ball, params = case.geometry.ball, point()
    return torch.stack([oracles.flatten(law(ball, params, generator)) for _ in range(DRAWS)])


def close(mean: Tensor, expected: float, samples: Tensor) -> None:
    """Within 5 standard errors: wrong with probability below 1e-6 per comparison, and the seed is fixed."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert bool(((mean - expected).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("name", ["euclidean", "groupwise", "groupwise joint rest"])
@pytest.mark.parametrize("law", [laws.Sphere(), laws.Ball(), laws.Gaussian(), laws.Rademacher()], ids=repr)
def test_second_moments(law: laws.Law, name: str) -> None:
    """``E u_j² = 1`` (joint) or ``E ‖u_i‖² = 1`` (groupwise) for coordinate laws; 1 on a sphere; d/(d+2) in a ball."""
    case = CASES[name]
    u = draws(law, case)
    assert case.groups is not None
    for positions in case.groups(point()):
        d, part = len(positions), u[:, positions]
        squares = part.square().sum(1)
        expected = {"Sphere": 1.0, "Ball": d / (d + 2)}.get(type(law).__name__, d if name == "euclidean" else 1.0)
        close(squares.mean(), expected, squares)
        close(part.mean(0), 0.0, part)
        close(part.square().mean(0), expected / d, part.square())
        if type(law).__name__ in ("Sphere", "Ball"):
            assert float(squares.max()) <= 1 + 1e-12
        if isinstance(law, laws.Sphere):
            torch.testing.assert_close(squares, torch.ones_like(squares))
        if isinstance(law, laws.Ball):
            close((squares ** (d / 2)).mean(), 0.5, squares ** (d / 2))  # ‖u‖^d is uniform
        if isinstance(law, laws.Rademacher):
            torch.testing.assert_close(part.square(), torch.full_like(part, expected / d))
        if isinstance(law, laws.Gaussian):
            fourth = part**4 / (expected / d) ** 2
            close(fourth.mean(), 3.0, fourth.mean(1))


def test_box_is_uniform() -> None:
    u = draws(laws.Box(), CASES["euclidean box"])
    assert float(u.abs().max()) <= 1
    close(u.mean(0), 0.0, u)
    close(u.square().mean(0), 1 / 3, u.square())
    close((u**4).mean(0), 1 / 5, u**4)


def test_draws_come_from_the_generator_alone() -> None:
    ball, params = Groupwise(GROUPS).ball, point()
    for law in (laws.Sphere(), laws.Ball(), laws.Box(), laws.Gaussian(), laws.Rademacher()):
        before = torch.get_rng_state()
        one, two = (oracles.flatten(law(ball, params, torch.Generator().manual_seed(3))) for _ in range(2))
        assert torch.equal(one, two) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 8.0])
def test_moments_of_the_uniform_law(p: float) -> None:
    """``E |t|^p = δ^p/(p+1)``, and the density integrates to one."""
    law = laws.Uniform(0.3)
    t = torch.linspace(0, 0.3, 200_001, dtype=torch.float64)
    assert torch.trapezoid(law.density(t), t).item() == pytest.approx(1)
    assert torch.trapezoid(t**p * law.density(t), t).item() == pytest.approx(law.moment(p), rel=1e-8)
    assert law.reach == 0.3


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "build",
    [Euclidean, Elementwise, laws.Uniform, lambda x: Groupwise(GROUPS, x)],
    ids=["euclidean", "elementwise", "uniform", "groupwise"],
)
def test_sizes_are_positive_and_finite(build: Callable[[float], object], value: float) -> None:
    with pytest.raises(InputError) as caught:
        build(value)
    assert "\n" not in str(caught.value) and str(value) in str(caught.value)


def test_unknown_names() -> None:
    builds = (lambda: Euclidean(1.0, "round"), lambda: Groupwise(GROUPS, rest="all"), lambda: Elementwise(1.0, -0.1))
    for build in builds:
        with pytest.raises(InputError):
            build()
