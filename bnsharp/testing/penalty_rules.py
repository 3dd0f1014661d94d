"""The checks of a measure's penalty (its value as a differentiable scalar) and of its search."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from bnsharp import params as P
from bnsharp.testing.check import CheckFailed, Rule, agree, calling, five_point, for_all, require
from bnsharp.testing.measure_subject import Declared
from bnsharp.testing.networks import SMOOTH, Network
from bnsharp.testing.strategies import (
    Quadratic,
    Transform,
    networks,
    quadratics,
    transformations,
)
from bnsharp.types import Params


def _penalty_is_the_value(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        measure, objective = declared.made(loss.groups), loss.objective()
        one = declared.read(measure, objective, loss.theta)
        value, _ = declared.penalty(measure, objective, loss.theta)
        allowed = one.error + declared.rtol * abs(one.value) + 1e-14
        agree(one.value, value, allowed, f"{declared.name}: the value is {{a}}, the penalty is {{b}}")

    for_all(quadratics(cubic=0.5), body, declared.examples)


def _penalty_gradient(declared: Declared) -> None:
    """``⟨∇S, d⟩`` against five-point differences of the value, unit directions held."""

    def body(loss: Quadratic) -> None:
        measure, objective = declared.made(loss.groups), loss.objective()
        found = declared.read(measure, objective, loss.theta)
        _, gradient = declared.penalty(measure, objective, loss.theta)
        held = declared.held(measure, found)
        generator = torch.Generator().manual_seed(1)
        d = P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), loss.theta)
        slope = five_point(lambda h: declared.read(held, objective, P.shift(loss.theta, d, h)).value)
        allowed = 1e-5 * float(P.norm(gradient) * P.norm(d)) + 1e-5 * abs(slope) + 1e-9
        agree(
            float(P.dot(gradient, d)), slope, allowed,
            f"{declared.name}: the penalty's derivative in a direction is {{a}}, differences of the value give {{b}}",
        )

    for_all(quadratics(cubic=0.5), body, declared.examples)


def _penalty_orthogonal(declared: Declared) -> None:
    """The gradient of a scale-invariant function is orthogonal to θ_i on every invariant group (Euler)."""

    def body(net: Network) -> None:
        measure, params = declared.made(net.groups), net.params
        _, gradient = declared.penalty(measure, net.objective(), params)
        partition = net.groups.resolve(params).partition
        radial = partition.dots(gradient, params).abs() / partition.norms(params)
        worst, size = float(radial.max()), float(P.norm(gradient))
        require(
            worst <= max(declared.rtol, 1e-7) * size + 1e-14,
            f"{declared.name}: the penalty's gradient has a component {worst:.3g} along an invariant group θ_i "
            f"(its norm is {size:.3g}); perturbations must move with θ",
        )

    for_all(networks(normalizer=("batch", "layer", "weight"), conv=False), body, declared.examples)


def _penalty_zero_norm(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        theta = loss.theta.clone()
        theta["weight"][0] = 0.0
        declared.penalty(declared.made(loss.groups), loss.objective(), theta)  # which requires a finite gradient

    for_all(quadratics(), body, declared.examples)


# ---------------------------------------------------------------- searches


def _search_beats_its_start(declared: Declared) -> None:
    assert declared.hold is not None and declared.start is not None
    hold, start = declared.hold, declared.start

    def body(net: Network) -> None:
        measure, objective, params = declared.made(net.groups), net.objective(), net.params
        found = declared.read(measure, objective, params)
        with calling(f"{declared.name}: its start"):
            first = hold(measure, start(measure, objective, params))
        at_start = declared.read(first, objective, params)
        require(
            found.value >= at_start.value - found.slack(at_start, declared.rtol, stated=True),
            f"{declared.name}: the search ended at {found.value:.9g}, below {at_start.value:.9g} of its own start",
        )

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


def _search_attains_its_value(declared: Declared) -> None:
    assert declared.hold is not None
    hold = declared.hold

    def body(net: Network) -> None:
        measure, objective = declared.made(net.groups), net.objective()
        found = declared.read(measure, objective, net.params)
        require(found.unit is not None, f"{declared.name}: declared searched, but the estimate has no .unit")
        assert found.unit is not None
        again = declared.read(hold(measure, found.unit), objective, net.params)
        agree(
            found.value, again.value, found.slack(again, declared.rtol),
            f"{declared.name}: the value is {{a}}, that of the direction it reports is {{b}}",
        )

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


def _search_is_equivariant(declared: Declared) -> None:
    """The maximiser moves as ``v ↦ T_a v``: no step may depend on the scale of a group."""

    @st.composite
    def pairs(draw: st.DrawFn) -> tuple[Network, Transform]:
        net = draw(networks(normalizer=("batch", "layer", "group"), activation=SMOOTH))
        return net, draw(transformations(net, ("scale",), low=0.05, high=20.0))

    def body(pair: tuple[Network, Transform]) -> None:
        net, transform = pair
        measure, objective = declared.made(net.groups), net.objective()
        one, two = (_direction(declared, measure, objective, t) for t in (net.params, transform(net.params)))
        assert transform.factors is not None
        back = net.groups.rescale(two, P.pmap(torch.reciprocal, transform.factors))
        off, size = float(P.norm(P.combine(1.0, back, -1.0, one))), float(P.norm(one))
        require(
            off <= 1e-4 * size,
            f"{declared.name}: the direction found does not move with the scale groups: "
            f"‖T_a⁻¹ v(T_a θ) − v(θ)‖ = {off:.3g}, ‖v(θ)‖ = {size:.3g}",
        )

    for_all(pairs(), body, declared.examples)


def _direction(declared: Declared, measure: object, objective: object, params: Params) -> Params:
    v = declared.read(measure, objective, params).direction
    if v is None:
        raise CheckFailed(f"{declared.name}: declared searched, but the estimate has no .direction")
    return v


def _upper_bound(declared: Declared) -> None:
    """A stated upper bound is above the value; ``.upper`` None states none."""

    def body(loss: Quadratic) -> None:
        measure, objective = declared.made(loss.groups), loss.objective()
        with calling(f"{declared.name}: measuring"):
            estimate = measure(objective, loss.theta, torch.Generator().manual_seed(0))
        upper, value = getattr(estimate, "upper", None), float(estimate.value)
        allowed = declared.rtol * abs(value) + float(getattr(estimate, "error", 0.0))
        require(
            upper is None or float(upper) >= value - allowed,
            f"{declared.name}: the upper bound {upper} is below the value {value:.9g}",
        )

    for_all(quadratics(stationary=None), body, declared.examples)


def _searched(declared: Declared) -> bool:
    return "searched" in declared.properties


PENALTY_RULES: tuple[Rule[Declared], ...] = (
    Rule("penalty_is_the_value", _penalty_is_the_value, lambda d: d.has_penalty),
    Rule("penalty_gradient", _penalty_gradient, lambda d: d.has_penalty),
    Rule("penalty_orthogonal", _penalty_orthogonal, lambda d: d.has_penalty and "scale" in d.invariant),
    Rule("penalty_finite_at_a_group_of_norm_zero", _penalty_zero_norm, lambda d: d.has_penalty),
    Rule("search_beats_its_start", _search_beats_its_start,
         lambda d: _searched(d) and d.hold is not None and d.start is not None),
    Rule("search_attains_its_value", _search_attains_its_value, lambda d: _searched(d) and d.hold is not None),
    Rule("upper_bound", _upper_bound, _searched),
    Rule("search_is_equivariant", _search_is_equivariant, lambda d: _searched(d) and "scale" in d.invariant),
)
