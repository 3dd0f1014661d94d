"""The checks of a geometry; each body is one property at random points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.groups import ScaleGroups
from bnsharp.laws import Ball, Box, Gaussian, Law, Rademacher, Sphere
from bnsharp.partition import Group
from bnsharp.testing.check import Rule, agree, calling, five_point, for_all, require
from bnsharp.testing.strategies import seeds
from bnsharp.types import Params

GROUPS = ScaleGroups(
    [
        Group("row", ("rows",), 3), Group("block", ("blocks",), 2), Group("joint", ("weight", "bias"), 2),
        Group("inert", ("inert",), 1),
    ]
)
"""Rows, blocks of rows, two parameters that scale together, one without effect; ``"head"``, ``"shift"`` in no group."""
SHAPES = {
    "rows": (3, 2, 2), "blocks": (4, 3), "weight": (2, 3), "bias": (2,), "inert": (3,), "head": (2, 3), "shift": (2,),
}
RANDOM_DIRECTIONS = 50
DRAWS = 400


# ---------------------------------------------------------------- balls


@dataclass(frozen=True)
class BallKind:
    """What is true of every geometry with this ball.

    Attributes:
        gauge: ``(geometry, u) -> [K]``, each at most 1 for a direction that is allowed.
        laws: laws that draw inside it.
        coordinates: laws of independent coordinates.
        round: whether its boundary is a product of spheres.
    """

    gauge: Callable[[Any, Params], Tensor]
    laws: tuple[Law, ...]
    coordinates: tuple[Law, ...]
    round: bool


def _norms(geometry: Any, u: Params) -> Tensor:
    return geometry.ball.partition(u).norms(u)


def _coordinates(geometry: Any, u: Params) -> Tensor:
    return P.flatten(u).abs()


BALLS: dict[str, BallKind] = {
    "sphere": BallKind(_norms, (Sphere(), Ball()), (Gaussian(), Rademacher()), True),
    "box": BallKind(_coordinates, (Box(),), (), False),
}
"""``"sphere"``: ``‖u_i‖ ≤ 1`` for each group of the ball's partition; ``"box"``: ``|u_j| ≤ 1``."""


@dataclass(frozen=True)
class Declared:
    """What a geometry's author says about it; see :func:`check_geometry`."""

    build: Callable[[ScaleGroups], Any]
    name: str
    ball: BallKind
    equivariant: bool
    second_moment: str | None
    examples: int

    def made(self) -> Any:
        """The geometry for :data:`GROUPS`."""
        with calling(f"{self.name}: building it"):
            return self.build(GROUPS)

    def like(self, geometry: Any, params: Params) -> Params:
        """A point in the shape of u."""
        return geometry.at(params).like

    def on_ball(self, geometry: Any, params: Params, seed: int) -> Params:
        """A random direction on the ball's boundary (inside, for a box)."""
        return geometry.ball.retract(normal(self.like(geometry, params), seed))


def normal(like: Params, seed: int) -> Params:
    """Standard normal coordinates in the shape of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    return P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), like)


def point(seed: int) -> Params:
    """Generic parameters of the shapes that :data:`GROUPS` is about, none of them near 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x + 0.1 * torch.where(x < 0, -1.0, 1.0)

    return P.make({k: draw(s) for k, s in SHAPES.items()})


def distance(a: Params, b: Params) -> float:
    """``‖a − b‖ / ‖b‖`` (or ``‖a − b‖`` where b is 0)."""
    size = float(P.norm(b))
    return float(P.norm(P.combine(1.0, a, -1.0, b))) / (size if size > 0 else 1.0)


def _close(declared: Declared, a: Params, b: Params, sentence: str, allowed: float = 1e-9) -> None:
    off = distance(a, b)
    require(off <= allowed, f"{declared.name}: {sentence}; the relative difference is {off:.3g}, allowed {allowed:.1g}")


Body = Callable[[Declared, Any, Params, int], None]


def _rule(name: str, body: Body, applies: Callable[[Declared], bool] = lambda declared: True) -> Rule[Declared]:
    """A check that visits the geometry at random points: ``body(declared, geometry, params, seed)``."""

    def check(declared: Declared) -> None:
        def example(seed: int) -> None:
            with calling(f"{declared.name}: the geometry"):
                body(declared, declared.made(), point(seed), seed + 1)

        for_all(seeds(), example, declared.examples)

    return Rule(name, check, applies)



# ---------------------------------------------------------------- place and its derivatives


def _place_is_linear(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    like = declared.like(geometry, params)
    u, w = normal(like, seed), normal(like, seed + 1)
    together = geometry.place(P.combine(2.0, u, -0.5, w), params)
    apart = P.combine(2.0, geometry.place(u, params), -0.5, geometry.place(w, params))
    _close(declared, together, apart, "place(2u − w/2) is not 2 place(u) − place(w)/2")
    _close(declared, geometry.at(params).place(u), geometry.place(u, params), "at(θ).place(u) is not place(u, θ)")
    _close(declared, geometry.at(params).place(u, 0.3), P.scaled(geometry.place(u, params), 0.3),
           "at(θ).place(u, 0.3) is not 0.3 place(u, θ)")


def _place_is_differentiable(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    u, g, d = normal(declared.like(geometry, params), seed), normal(params, seed + 1), normal(params, seed + 2)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    inner, by_autograd = P.dot(g, geometry.place(u, P.make(leaves))), 0.0
    if inner.requires_grad:
        grads = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True, materialize_grads=True)
        by_autograd = float(P.dot(P.make(dict(zip(leaves, grads, strict=True))), d))
    slope = _slope_of_place(geometry, params, u, g, d)
    agree(by_autograd, slope, 1e-6 * (1 + abs(slope)),
          f"{declared.name}: autograd gives {{a}} for the derivative of place in θ, differences give {{b}}")


def _moving(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    u, g, d = normal(declared.like(geometry, params), seed), normal(params, seed + 1), normal(params, seed + 2)
    slope = _slope_of_place(geometry, params, u, g, d)
    agree(float(P.dot(geometry.moving(u, g, params), d)), slope, 1e-6 * (1 + abs(slope)),
          f"{declared.name}: ⟨moving(u, g, θ), d⟩ is {{a}}, differences of ⟨g, place(u, θ + hd)⟩ give {{b}}")


def _slope_of_place(geometry: Any, params: Params, u: Params, g: Params, d: Params) -> float:
    small = P.scaled(d, 0.05)  # θ is kept away from 0, where magnitudes have a kink
    return 20 * five_point(lambda h: float(P.dot(g, geometry.place(u, P.shift(params, small, h)))))


def _pull_is_the_adjoint(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    frame = geometry.at(params)
    u, g = normal(frame.like, seed), normal(params, seed + 1)
    a, b = float(P.dot(frame.place(u), g)), float(P.dot(u, frame.pull(g)))
    agree(a, b, 1e-9 * (1 + abs(a)), f"{declared.name}: ⟨place(u), g⟩ is {{a}}, ⟨u, pull(g)⟩ is {{b}}")


def _norm_zero(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    params["rows"][0] = 0.0
    params["head"] = torch.zeros_like(params["head"])
    frame = geometry.at(params)
    u, g = normal(frame.like, seed), normal(params, seed + 1)
    for what, x in (("place", frame.place(u)), ("pull", frame.pull(g)), ("moving", geometry.moving(u, g, params)),
                    ("steepest", frame.steepest(frame.pull(g), lambda: u))):
        require(all(bool(v.isfinite().all()) for v in x.values()), f"{declared.name}: {what} is not finite at θ_i = 0")


# ---------------------------------------------------------------- the ball


def _steepest(declared: Declared, geometry: Any, params: Params, seed: int) -> tuple[Params, Params]:
    frame = geometry.at(params)
    g = frame.pull(normal(params, seed))
    return g, frame.steepest(g, lambda: declared.on_ball(geometry, params, seed + 1))


def _steepest_is_feasible(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    _, u = _steepest(declared, geometry, params, seed)
    largest = float(declared.ball.gauge(geometry, u).max())
    require(largest <= 1 + 1e-9, f"{declared.name}: the steepest direction has size {largest:.9g}; the ball ends at 1")


def _steepest_is_steepest(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    g, u = _steepest(declared, geometry, params, seed)
    best = float(P.dot(g, u))
    candidates = [declared.on_ball(geometry, params, seed + k) for k in range(2, RANDOM_DIRECTIONS)]
    # random directions are far below the maximum; their turns towards g are near it
    candidates += [geometry.ball.retract(P.shift(c, g, 10.0 / float(P.norm(g)))) for c in candidates[:10]]
    rival = max(float(P.dot(g, c)) for c in candidates)
    require(rival <= best + 1e-9 * abs(best),
            f"{declared.name}: steepest has ⟨g, u⟩ = {best:.9g}, another direction of the ball {rival:.9g}")


def _summit(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    frame, g = geometry.at(params), normal(params, seed)
    fill = declared.on_ball(geometry, params, seed + 1)
    flat = P.make({k: torch.zeros_like(v) if k == "rows" else v for k, v in g.items()})
    for what, slope in (("", g), (" where a parameter has no gradient", flat)):
        _close(declared, frame.summit(slope, 0.3, lambda: fill),
               frame.points(frame.steepest(frame.pull(slope), lambda: fill), 0.3),
               f"summit is not the point of the steepest direction{what}")


def _retract(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    ball, w = geometry.ball, P.scaled(normal(declared.like(geometry, params), seed), 1.7)
    once = ball.retract(w)
    _close(declared, ball.retract(once), once, "retract(retract(w)) is not retract(w)")
    sizes = declared.ball.gauge(geometry, once)
    require(float(sizes.max()) <= 1 + 1e-9, f"{declared.name}: retract left the ball: size {float(sizes.max()):.9g}")
    if declared.ball.round:
        smallest = float(sizes.min())
        require(smallest >= 1 - 1e-9, f"{declared.name}: retract gave a group of norm {smallest:.9g}; expected 1")


def _tangent(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    ball, u = geometry.ball, declared.on_ball(geometry, params, seed)
    g = normal(u, seed + 1)
    move = ball.tangent(u, g)
    _close(declared, ball.tangent(u, move), move, "tangent(u, tangent(u, g)) is not tangent(u, g)")
    if declared.ball.round:
        radial = float(ball.partition(u).dots(move, u).abs().max())
        require(radial <= 1e-9, f"{declared.name}: tangent(u, g) has a component {radial:.3g} along u on a sphere")


def _tangent_is_first_order(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    """``retract(u + h g) = u + h tangent(u, g) + o(h)``, h > 0."""
    ball, u = geometry.ball, declared.on_ball(geometry, params, seed)
    g, h = _perturbed(declared, geometry, params, normal(u, seed + 1)), 1e-6
    moved = P.scaled(P.combine(1.0, ball.retract(P.shift(u, g, h)), -1.0, u), 1 / h)
    _close(declared, moved, ball.tangent(u, g), "tangent(u, g) is not the first order of retract(u + hg)", 1e-4)


def _perturbed(declared: Declared, geometry: Any, params: Params, x: Params) -> Params:
    """x without coordinates that the ball never moves (those of parameters without effect)."""
    if not declared.ball.round:
        return x
    partition = geometry.ball.partition(x)
    return partition.scale(x, torch.ones_like(partition.norms(x)))


def _back(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    """``⟨back(w, u, g), d⟩ = d/dh ⟨g, retract(w + h d)⟩``, ``u = retract(w)``."""
    ball = geometry.ball
    w = P.scaled(normal(declared.like(geometry, params), seed), 1.7)
    g, d = normal(w, seed + 1), P.scaled(normal(w, seed + 2), 0.01)
    slope = five_point(lambda h: float(P.dot(g, ball.retract(P.shift(w, d, h)))))
    agree(float(P.dot(ball.back(w, ball.retract(w), g), d)), slope, 1e-6 * (0.01 + abs(slope)),
          f"{declared.name}: ⟨back(w, u, g), d⟩ is {{a}}, differences of ⟨g, retract(w + hd)⟩ give {{b}}")


def _power(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    g, u = _steepest(declared, geometry, params, seed)
    start = declared.on_ball(geometry, params, seed + 3)
    a, b = float(P.dot(g, geometry.ball.power(start, g))), float(P.dot(g, u))
    agree(a, b, 1e-9 * (1 + abs(b)), f"{declared.name}: the power step has ⟨g, u⟩ = {{a}}, steepest has {{b}}")
    _close(declared, geometry.ball.power(start, P.zeros_like(g)), start, "without a gradient the power step moves u")


# ---------------------------------------------------------------- equivariance, laws


def _equivariance(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    factors = GROUPS.random_factors(params, torch.Generator().manual_seed(seed), 0.05, 20.0)
    scaled, u = GROUPS.rescale(params, factors), normal(declared.like(geometry, params), seed)
    _close(declared, geometry.place(u, scaled), GROUPS.rescale(geometry.place(u, params), factors),
           "place(u, T_a θ) is not T_a place(u, θ)")
    # the gradient of an invariant function scales by 1/a
    g = normal(params, seed + 1)
    inverse = GROUPS.rescale(g, P.pmap(torch.reciprocal, factors))
    one, two = geometry.at(params), geometry.at(scaled)
    _close(declared, two.pull(inverse), one.pull(g), "pull at T_a θ of the gradient there is not pull at θ")
    fill = declared.on_ball(geometry, params, seed + 2)
    _close(declared, two.steepest(two.pull(inverse), lambda: fill), one.steepest(one.pull(g), lambda: fill),
           "the steepest unit direction changes under T_a")


def _laws(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    """Draws of bounded laws stay in the ball, and second moments are as declared."""
    like, ball = declared.like(geometry, params), geometry.ball
    generator = torch.Generator().manual_seed(seed)
    for law in declared.ball.laws:
        for _ in range(20):
            largest = float(declared.ball.gauge(geometry, law(ball, like, generator)).max())
            require(largest <= 1 + 1e-6, f"{declared.name}: {law} drew a direction of size {largest:.9g}, above 1")
    if declared.second_moment is None:
        return
    partition = ball.partition(like)
    sizes = partition.sizes(like)
    expected = sizes if declared.second_moment == "coordinate" else torch.ones_like(sizes)
    for law in declared.ball.coordinates:
        squares = torch.stack([partition.norms(law(ball, like, generator)) ** 2 for _ in range(DRAWS)])  # [n, K]
        mean, error = squares.mean(0), squares.std(0) / math.sqrt(DRAWS)
        off = ((mean - expected).abs() - 6 * error - 1e-6 * expected).argmax()
        require(
            bool((mean - expected).abs()[off] <= 6 * error[off] + 1e-6 * expected[off]),
            f"{declared.name}: {law} has E ‖u_i‖² = {float(mean[off]):.4g} ± {float(error[off]):.1g} on a group of "
            f"{int(sizes[off])} coordinates; declared {float(expected[off]):.4g}",
        )


def _uphill(declared: Declared, geometry: Any, params: Params, seed: int) -> None:
    frame = geometry.at(params)
    u, g = declared.on_ball(geometry, params, seed), frame.pull(normal(params, seed + 1))
    new = P.pick(frame.uphill(P.batch(u), P.batch(g), torch.tensor([0.1], dtype=torch.float64)), 0)
    largest = float(declared.ball.gauge(geometry, new).max())
    require(largest <= 1 + 1e-9, f"{declared.name}: a step left the ball: size {largest:.9g}")
    before, after = float(P.dot(g, u)), float(P.dot(g, new))
    require(after > before, f"{declared.name}: a small step along g lowered ⟨g, u⟩ from {before:.6g} to {after:.6g}")


RULES: tuple[Rule[Declared], ...] = (
    _rule("place_is_linear", _place_is_linear),
    _rule("place_is_differentiable", _place_is_differentiable),
    _rule("moving", _moving),
    _rule("pull_is_the_adjoint", _pull_is_the_adjoint),
    _rule("finite_at_a_group_of_norm_zero", _norm_zero),
    _rule("steepest_is_feasible", _steepest_is_feasible),
    _rule("steepest_is_steepest", _steepest_is_steepest),
    _rule("summit", _summit),
    _rule("retract", _retract),
    _rule("tangent", _tangent),
    _rule("tangent_is_first_order", _tangent_is_first_order),
    _rule("back", _back),
    _rule("power", _power),
    _rule("uphill", _uphill),
    _rule("equivariance", _equivariance, lambda d: d.equivariant),
    _rule("laws", _laws),
)
