"""The checks of a measure's value; each body is one property, told in the words of its failure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bnsharp.testing.check import CheckFailed, Rule, agree, for_all, require
from bnsharp.testing.measure_subject import Declared, Reading, closed_form_of, mean_of
from bnsharp.testing.networks import SMOOTH, Network, with_running_statistics
from bnsharp.testing.snapshots import changed, in_use, random_states, snapshot, told
from bnsharp.testing.strategies import (
    Quadratic,
    Transform,
    networks,
    quadratics,
    reflected,
    seeds,
    transformations,
)
from bnsharp.types import Params

SEEDS = 24
"""Measurements whose spread is compared with the stated standard error."""
SPREAD = (0.1, 6.0)
"""Bounds of mean squared z-scores. For normal z-scores either is exceeded with probability below 1e-7."""

# ---------------------------------------------------------------- random numbers, and what must not be touched


def _deterministic(declared: Declared) -> None:
    def body(net: Network) -> None:
        one, two, other = (declared.value(net.groups, net.objective(), net.params, seed) for seed in (0, 0, 1))
        agree(one.value, two.value, 0.0, f"{declared.name}: two measurements with one seed gave {{a}} and {{b}}")
        if "sampled" in declared.properties:
            allowed = one.slack(other, declared.rtol, stated=True) + 8 * math.hypot(one.stderr, other.stderr)
            agree(one.value, other.value, allowed, f"{declared.name}: seeds 0 and 1 gave {{a}} and {{b}}")
        elif "searched" not in declared.properties:
            agree(
                one.value, other.value, one.slack(other, declared.rtol, stated=True),
                f"{declared.name}: it is not declared sampled or searched, and seeds 0 and 1 gave {{a}} and {{b}}",
            )

    for_all(networks(), body, declared.examples)


def _leaves_network_alone(declared: Declared) -> None:
    def body(seed: int) -> None:
        net = in_use(seed=seed)
        groups, params, objective = net.groups, net.params, net.objective()
        before, given = snapshot(net.module), params.clone()
        declared.value(groups, objective, params)
        differ = changed(before, snapshot(net.module))
        require(not differ, f"{declared.name}: measuring changed {told(differ)}")
        moved = [k for k, v in given.items() if not torch.equal(v, params[k])]
        require(not moved, f"{declared.name}: measuring wrote to the parameters it was given: {told(moved)}")

    for_all(seeds(), body, declared.examples)


def _leaves_random_state_alone(declared: Declared) -> None:
    def body(net: Network) -> None:
        groups = net.groups
        before = random_states()
        declared.value(groups, net.objective(), net.params)
        differ = changed(before, random_states())
        require(
            not differ, f"{declared.name}: measuring moved {told(differ)}; draw from the generator that is passed"
        )

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


def _ignores_running_statistics(declared: Declared) -> None:
    def body(net: Network) -> None:
        wild = with_running_statistics(net, 40.0, 1e-3)
        one, two = (declared.value(net.groups, n.objective(), n.params) for n in (net, wild))
        agree(
            one.value, two.value, one.slack(two, declared.rtol),
            f"{declared.name}: other running statistics changed the value from {{a}} to {{b}}",
        )

    for_all(networks(normalizer="batch"), body, declared.examples)


# ---------------------------------------------------------------- equal functions


KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "scale": ({"normalizer": ("batch", "layer", "group", "instance", "rms", "weight"), "activation": SMOOTH}, False),
    "permutation": ({"normalizer": ("batch", "layer", "none"), "activation": SMOOTH, "conv": False}, True),
    "relu": ({"normalizer": "none", "activation": "relu", "conv": False}, True),
}
"""Networks that have each kind of transformation, and whether values may differ by their stated errors."""


def _both(
    declared: Declared, kind: str, visit: Callable[[Reading, Reading, float], None], repeats: int = 1
) -> None:
    """Visit the value (mean over ``repeats`` seeds) at θ and at the transformed θ with what they may differ by."""
    options, spread = KINDS[kind]
    repeats = repeats if spread and "sampled" in declared.properties else 1

    @st.composite
    def pairs(draw: st.DrawFn) -> tuple[Network, Transform]:
        net = draw(networks(**options))
        return net, draw(transformations(net, (kind,), low=0.05, high=20.0))

    def body(pair: tuple[Network, Transform]) -> None:
        net, transform = pair
        measure, objective = declared.made(net.groups), net.objective()
        one, two = (
            mean_of([declared.read(measure, objective, params, seed) for seed in range(repeats)])
            for params in (net.params, transform(net.params))
        )
        visit(one, two, one.slack(two, declared.rtol, stated=spread, spread=spread))

    for_all(pairs(), body, declared.examples)


def _invariant(kind: str) -> Callable[[Declared], None]:
    def check(declared: Declared) -> None:
        def visit(one: Reading, two: Reading, allowed: float) -> None:
            sentence = f"a {kind} transformation, which keeps the network, changed the value from {{a}} to {{b}}"
            agree(one.value, two.value, allowed, f"{declared.name}: {sentence}")

        _both(declared, kind, visit)

    return check


def _changes(kind: str) -> Callable[[Declared], None]:
    def check(declared: Declared) -> None:
        ratios: list[float] = []
        _both(declared, kind, lambda one, two, allowed: ratios.append(abs(one.value - two.value) / allowed), SEEDS)
        if not any(ratio > 1 for ratio in ratios):
            raise CheckFailed(
                f"{declared.name}: declared not invariant under {kind} transformations, but in {len(ratios)} networks "
                f"the value changed by at most {max(ratios):.2g} times what invariance allows"
            )

    return check


# ---------------------------------------------------------------- the loss as a function


Change = Callable[[Callable[[Params], Tensor]], Callable[[Params], Tensor]]


def _on_losses(declared: Declared, change: Callable[[Quadratic], Change], factor: float, sentence: str) -> None:
    """The value of a changed loss against ``factor`` times the value of the loss."""

    def body(loss: Quadratic) -> None:
        one, two = (
            declared.value(loss.groups, objective, loss.theta)
            for objective in (loss.objective(), loss.objective(change(loss)))
        )
        agree(factor * one.value, two.value, factor * one.slack(two, declared.rtol), f"{declared.name}: {sentence}")

    for_all(quadratics(cubic=0.5), body, declared.examples)


def _offset(declared: Declared) -> None:
    sentence = "adding 3 to the loss changed the value from {a} to {b}"
    _on_losses(declared, lambda loss: lambda fn: lambda params: fn(params) + 3.0, 1.0, sentence)


def _homogeneous(declared: Declared) -> None:
    sentence = "2.5 times the value of L is {a}, the value of 2.5 L is {b}"
    _on_losses(declared, lambda loss: lambda fn: lambda params: 2.5 * fn(params), 2.5, sentence)


def _two_sided(declared: Declared) -> None:
    sentence = "the value of θ + v ↦ L(θ + v) is {a}, that of L(θ − v) is {b}"
    _on_losses(declared, lambda loss: lambda fn: reflected(fn, loss.theta), 1.0, sentence)


def _nonnegative(declared: Declared) -> None:
    for definite in (False, None):

        def body(loss: Quadratic) -> None:
            one = declared.value(loss.groups, loss.objective(), loss.theta)
            require(one.value >= -one.error, f"{declared.name}: the value is {one.value:.6g} at a maximum of the loss")

        for_all(quadratics(stationary=True, definite=definite), body, declared.examples)


def _closed_form(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        low, high = closed_form_of(declared, loss)
        measure, objective = declared.made(loss.groups), loss.objective()
        repeats = SEEDS if "sampled" in declared.properties and low == high else 1
        mean = mean_of([declared.read(measure, objective, loss.theta, seed) for seed in range(repeats)])
        slack = declared.rtol * max(abs(low), abs(high)) + mean.slack(mean, 0.0, stated=True, spread=True)
        expected = f"{low:.9g}" if low == high else f"between {low:.9g} and {high:.9g}"
        require(
            low - slack <= mean.value <= high + slack,
            f"{declared.name}: the value on a quadratic is {mean.value:.9g}, its closed form {expected} "
            f"(allowed difference {slack:.2g})",
        )

    for_all(quadratics(), body, declared.examples)
    if "sampled" in declared.properties:  # at a minimum the noise of a sampled rise is far below its mean
        for_all(quadratics(stationary=True, definite=True), body, declared.examples)


def _standard_error(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        measure = declared.made(loss.groups)
        objective = loss.objective()
        readings = [declared.read(measure, objective, loss.theta, 100 + seed) for seed in range(SEEDS)]
        mean, unbiased = math.fsum(r.value for r in readings) / SEEDS, SEEDS / (SEEDS - 1)
        if declared.closed_form is not None:
            low, high = closed_form_of(declared, loss)
            mean, unbiased = (low, 1.0) if low == high else (mean, unbiased)
        stated = math.fsum(r.stderr**2 for r in readings) / SEEDS
        seen = unbiased * math.fsum((r.value - mean) ** 2 for r in readings) / SEEDS
        require(stated > 0, f"{declared.name}: declared sampled, but its standard error is 0")
        low, high = SPREAD
        require(
            low * stated <= seen <= high * stated,
            f"{declared.name}: over {SEEDS} seeds the values deviate by {math.sqrt(seen):.3g}, "
            f"the stated standard error is {math.sqrt(stated):.3g}",
        )

    for_all(quadratics(), body, 2)


def _monotone(declared: Declared) -> None:
    assert declared.powers is not None
    powers, exponents = declared.powers, (1.0, 2.0, 4.0)

    def body(loss: Quadratic) -> None:
        objective = loss.objective()
        for p, q in itertools.pairwise(exponents):
            small = powers(loss.groups, p)
            one = declared.read(small, objective, loss.theta)
            two = declared.read(declared.held(powers(loss.groups, q), one), objective, loss.theta)
            require(
                two.value >= one.value - one.slack(two, declared.rtol, stated=True),
                f"{declared.name}: the value falls from {one.value:.9g} at p = {p:g} to {two.value:.9g} at p = {q:g}",
            )

    for_all(quadratics(cubic=0.5), body, declared.examples)


RULES: tuple[Rule[Declared], ...] = (
    Rule("deterministic", _deterministic),
    Rule("leaves_network_alone", _leaves_network_alone),
    Rule("leaves_random_state_alone", _leaves_random_state_alone),
    Rule("ignores_running_statistics", _ignores_running_statistics),
    *(Rule(f"invariant_under_{k}", _invariant(k), lambda d, k=k: k in d.invariant) for k in KINDS),  # type: ignore[misc]
    *(Rule(f"changes_under_{k}", _changes(k), lambda d, k=k: k in d.not_invariant) for k in KINDS),  # type: ignore[misc]
    Rule("ignores_a_constant", _offset, lambda d: "offset" in d.properties),
    Rule("homogeneous_in_the_loss", _homogeneous, lambda d: "homogeneous" in d.properties),
    Rule("two_sided", _two_sided, lambda d: "two-sided" in d.properties),
    Rule("nonnegative", _nonnegative, lambda d: "nonnegative" in d.properties),
    Rule("closed_form", _closed_form, lambda d: d.closed_form is not None),
    Rule("standard_error", _standard_error, lambda d: "sampled" in d.properties),
    Rule("monotone_in_p", _monotone, lambda d: d.powers is not None),
)
