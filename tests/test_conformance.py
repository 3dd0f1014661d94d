"""Our own measures, geometries and regularisers through the public conformance kit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bnsharp import ScaleGroups
from bnsharp import params as P
from bnsharp import regularizers as R
from bnsharp.evaluation import AbstractObjective
from bnsharp.geometry import Elementwise, Euclidean, Groupwise
from bnsharp.measures import MEASURES, Measure, bn_gaussian, bn_random_line, bn_sharpness, build_measure, gaussian
from bnsharp.regularizers import GRADIENTS, Penalty, Plain, asam, sam
from bnsharp.testing import Check, check_geometry, check_measure, check_regularizer
from bnsharp.testing.measure_subject import hold_unit, steepest_start
from bnsharp.types import Params

# ---------------------------------------------------------------- closed forms on a quadratic


def flat(theta: Params) -> Tensor:
    return torch.cat([v.reshape(-1) for v in theta.values()])


def blocks(theta: Params) -> list[Tensor]:
    """Index sets of the groups: the rows of the weight, the bias."""
    rows, columns = theta["weight"].shape
    return [torch.arange(r * columns, (r + 1) * columns) for r in range(rows)] + [
        torch.arange(rows * columns, P.numel(theta))
    ]


def group_variances(theta: Params, more: int = 0) -> Tensor:
    """``‖θ_i‖²/(d_i + more)`` per coordinate."""
    out, x = torch.zeros_like(flat(theta)), flat(theta)
    for index in blocks(theta):
        out[index] = x[index].square().sum() / (len(index) + more)
    return out


def mean_rise(variances: Tensor, A: Tensor) -> float:
    """``E L(θ+v) − L(θ) = ½ Σ_j E v_j² A_jj`` for independent signs of v."""
    return 0.5 * float((variances * A.diagonal()).sum())


def free_energy(variances: Tensor, A: Tensor, gradient: Tensor) -> float:
    """``−log E exp(−f)``, ``v ~ N(0, diag)``: ``½ log det(I + SA) − ½ gᵀ(I + SA)⁻¹Sg``."""
    S = torch.diag(variances)
    M = torch.eye(len(A), dtype=A.dtype) + S @ A
    return float(0.5 * torch.logdet(M) - 0.5 * gradient @ torch.linalg.solve(M, S @ gradient))


def largest(M: Tensor) -> float:
    return float(torch.linalg.eigvalsh(M)[-1])


def line(delta: float, a: float, q: float) -> float:
    """``(1/(2δ) ∫ (a t + ½ q t²)² dt)^{1/2}``."""
    return math.sqrt(a**2 * delta**2 / 3 + q**2 * delta**4 / 20)


def line_bounds(delta: float) -> Callable[..., tuple[float, float]]:
    """Of BN-Sharpness at p = 2: its value at the gradient's direction, and Minkowski's bound over all directions."""

    def bounds(A: Tensor, b: Tensor, theta: Params, groups: ScaleGroups) -> tuple[float, float]:
        x, g, v = flat(theta), A @ flat(theta) + b, torch.zeros_like(b)
        for index in blocks(theta):
            v[index] = x[index].norm() * g[index] / g[index].norm().clamp(min=1e-300)
        slope = sum(float(x[i].norm() * g[i].norm()) for i in blocks(theta))
        bend = sum(
            float(x[i].norm() * torch.linalg.matrix_norm(A[i][:, j], 2) * x[j].norm())
            for i in blocks(theta) for j in blocks(theta)
        )
        return line(delta, float(g @ v), float(v @ A @ v)), line(delta, slope, 0) + line(delta, 0, bend)

    return bounds


def ball_bounds(scale: Callable[[Params], Tensor]) -> Callable[..., tuple[float, float]]:
    """Of ``max_{‖u‖≤1} L(θ + s⊙u) − L(θ)``: its value at the gradient's direction, and ``‖s⊙g‖ + ½λ_max``."""

    def bounds(A: Tensor, b: Tensor, theta: Params, groups: ScaleGroups) -> tuple[float, float]:
        s = scale(theta)
        g, M = s * (A @ flat(theta) + b), s[:, None] * A * s
        u = g / g.norm().clamp(min=1e-300)
        return float(g @ u + 0.5 * u @ M @ u), float(g.norm()) + 0.5 * max(largest(M), 0.0)

    return bounds


def neuron_traces(A: Tensor, theta: Params) -> float:
    """``Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}`` over the rows of the weight."""
    weight, index = theta["weight"], blocks(theta)
    return sum(
        float(weight[s] @ weight[r] * A[index[s]][:, index[r]].trace())
        for s in range(len(weight)) for r in range(len(weight))
    )


# ---------------------------------------------------------------- measures



RISE = frozenset({"offset", "homogeneous"})
SEARCH = {*RISE, "searched"}
PIECEWISE = "an error rate is piecewise constant: no gradient, and a plain function has no criterion"


@dataclass(frozen=True)
class Row:
    """What we say of a measure."""

    properties: Collection[str] = RISE
    invariant: Collection[str] = ("permutation",)
    options: Mapping[str, Any] = field(default_factory=dict)
    closed_form: Callable[..., Any] | None = None
    not_invariant: Collection[str] = ()
    powers: Callable[..., Any] | None = None
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    examples: int = 1


DRAWS = {"draws": 6}
SAMPLED = {*RISE, "sampled"}

ROWS: dict[str, Row] = {
    "bn_sharpness": Row(
        {*SEARCH, "two-sided", "nonnegative"}, ("scale", "permutation"), {"delta": 0.1, "steps": 1, "nodes": 4},
        line_bounds(0.1), ("relu",), lambda groups, p: bn_sharpness(groups, delta=0.1, p=p, steps=1), examples=2,
    ),
    "bn_ball": Row(
        SAMPLED, ("scale", "permutation"), {"delta": 0.1, **DRAWS},
        lambda A, b, theta, groups: mean_rise(0.01 * group_variances(theta, 2), A),
    ),
    "bn_gaussian": Row(
        SAMPLED, ("scale", "permutation"), {"sigma": 0.1, **DRAWS},
        lambda A, b, theta, groups: mean_rise(0.01 * group_variances(theta), A), examples=3,
    ),
    "bn_entropy": Row(
        {"offset", "sampled"}, ("scale", "permutation"), {"gamma": 400.0, "draws": 16},
        lambda A, b, theta, groups: free_energy(group_variances(theta) / 400, A, A @ flat(theta) + b),
    ),
    "bn_random_line": Row(
        {*SAMPLED, "two-sided", "nonnegative"}, ("scale", "permutation"), {"delta": 0.1, "nodes": 4, **DRAWS},
        lambda A, b, theta, groups: (0.0, line_bounds(0.1)(A, b, theta, groups)[1]), (),
        lambda groups, p: bn_random_line(groups, delta=0.1, p=p, draws=4),
    ),
    "epsilon_sharpness": Row(
        SEARCH, ("permutation",), {"delta": 0.1, "steps": 2},
        ball_bounds(lambda theta: torch.full_like(flat(theta), 0.1)), ("scale", "relu"),
    ),
    "keskar": Row({"searched"}, ("permutation",), {"epsilon": 0.01, "steps": 2}, None, ("scale", "relu")),
    "adaptive": Row(
        SEARCH, ("scale", "permutation", "relu"), {"rho": 0.1, "steps": 2},
        ball_bounds(lambda theta: 0.1 * flat(theta).abs()),
    ),
    "adaptive_average": Row(
        SAMPLED, ("scale", "permutation", "relu"), {"rho": 0.1, **DRAWS},
        lambda A, b, theta, groups: mean_rise(0.01 * flat(theta) ** 2, A),
    ),
    "gaussian": Row(
        SAMPLED, ("permutation",), {"sigma": 0.1, **DRAWS},
        lambda A, b, theta, groups: 0.005 * float(A.trace()), ("scale", "relu"),
    ),
    "lebesgue_ball": Row(
        SAMPLED, ("permutation",), {"delta": 0.1, **DRAWS},
        lambda A, b, theta, groups: 0.005 * float(A.trace()) / (len(A) + 2), ("scale",),
    ),
    "local_entropy": Row(
        {"offset", "sampled"}, ("permutation",), {"gamma": 400.0, "draws": 16},
        lambda A, b, theta, groups: free_energy(torch.full_like(b, 1 / 400), A, A @ flat(theta) + b), ("scale",),
    ),
    "filter_normalized": Row(
        {*SAMPLED, "two-sided", "nonnegative"}, ("scale", "permutation"), {"delta": 0.1, "nodes": 4, **DRAWS},
    ),
    "largest_sigma": Row(
        {"offset", "sampled", "nonnegative"}, ("permutation",), {"draws": 6, "halvings": 10}, None, ("scale",),
        expected_failures={"standard_error": "where the loss has no minimum some draws are borne at every radius"},
    ),
    "largest_sigma_accuracy": Row(
        {"sampled"}, ("permutation",), {"draws": 6, "halvings": 10},
        expected_failures={
            "invariant_under_permutation": "other draws of six, borne at every radius on a network of 16 examples",
        } | dict.fromkeys(
            ("standard_error", "accepts_a_plain_function", "penalty_is_the_value", "penalty_gradient",
             "penalty_finite_at_a_group_of_norm_zero"), PIECEWISE,
        ),
    ),
    "hessian_top": Row(
        SEARCH, ("permutation",), {"certify": 1}, lambda A, b, theta, groups: largest(A), ("scale", "relu"),
    ),
    "relative_top": Row(
        SEARCH, ("scale", "permutation"), {"iterations": 5, "restarts": 0, "certify": 0},
    ),
    "spherical_top": Row(
        SEARCH, ("permutation",), {}, lambda A, b, theta, groups: float(flat(theta) @ flat(theta)) * largest(A),
        ("scale", "relu"),
    ),
    "hessian_trace": Row(
        {*SAMPLED, "two-sided"}, ("permutation",), DRAWS, lambda A, b, theta, groups: float(A.trace()),
        ("scale", "relu"),
    ),
    "relative_trace": Row(
        {*SAMPLED, "two-sided"}, ("scale", "permutation"), DRAWS,
        lambda A, b, theta, groups: 2 * mean_rise(group_variances(theta), A),
    ),
    "relative_flatness": Row(
        {*SAMPLED, "two-sided"}, ("scale", "permutation"), DRAWS,
        lambda A, b, theta, groups: neuron_traces(A, theta),
    ),
    "fisher_rao": Row(
        {*RISE, "two-sided"}, ("scale", "permutation", "relu"), {},
        lambda A, b, theta, groups: float(flat(theta) @ A @ flat(theta)),
        expected_failures={"accepts_a_plain_function": "a Gauss-Newton matrix needs the network's output"},
    ),
    "pac_bayes": Row(
        (), ("scale",), {"draws": 8, "pilot": 1},
        expected_failures={
            "deterministic": "the sampling error is inside the bound, so that none is stated",
            "accepts_a_plain_function": "an error rate has a criterion, and its examples are counted",
        },
    ),
}
"""A measure without a row fails ``test_every_measure_has_a_row``."""


def measure_checks() -> list[Check]:
    checks = []
    for name, row in ROWS.items():
        if name in MEASURES:
            checks += check_measure(
                lambda groups, name=name, row=row: build_measure(name, groups, **row.options), name=name,
                invariant=row.invariant, not_invariant=row.not_invariant, properties=row.properties,
                closed_form=row.closed_form, powers=row.powers, expected_failures=row.expected_failures,
                examples=row.examples,
            )
    return checks


def test_every_measure_has_a_row() -> None:
    missing, unknown = MEASURES.keys() - ROWS.keys(), ROWS.keys() - MEASURES.keys()
    assert not missing, f"add a row to ROWS for {sorted(missing)}"
    assert not unknown, f"no such measure: {sorted(unknown)}"


@pytest.mark.parametrize("name", sorted(MEASURES.keys() & ROWS.keys()))
def test_the_registry_agrees_on_invariance(name: str) -> None:
    """A measure listed as invariant under rescaling is checked to be."""
    assert not MEASURES[name].invariant or "scale" in ROWS[name].invariant, name


@pytest.mark.parametrize("check", measure_checks(), ids=str)
def test_measure(check: Check) -> None:
    check()


# ---------------------------------------------------------------- geometries

GEOMETRIES: dict[str, tuple[Callable[[ScaleGroups], Any], dict[str, Any]]] = {
    "euclidean": (lambda groups: Euclidean(0.3), {"second_moment": "coordinate"}),
    "euclidean box": (lambda groups: Euclidean(0.3, "box"), {"ball": "box"}),
    "groupwise": (Groupwise, {"equivariant": True, "second_moment": "group"}),
    "groupwise joint rest": (
        lambda groups: Groupwise(groups, 0.2, "joint"), {"equivariant": True, "second_moment": "group"}
    ),
    # with η = 0 a magnitude scales with its group: equivariant, as Kwon et al. (2021) show
    "elementwise": (lambda groups: Elementwise(0.3), {"equivariant": True, "second_moment": "coordinate"}),
    "elementwise eta": (lambda groups: Elementwise(0.3, 0.1), {"second_moment": "coordinate"}),
    "elementwise box": (lambda groups: Elementwise(0.3, 1.0, "box"), {"ball": "box"}),
}


@pytest.mark.parametrize(
    "check",
    [c for name, (build, says) in GEOMETRIES.items() for c in check_geometry(build, name=name, examples=2, **says)],
    ids=str,
)
def test_geometry(check: Check) -> None:
    check()


# ---------------------------------------------------------------- regularisers



def sharpness(groups: ScaleGroups, steps: int = 0) -> Measure:
    return bn_sharpness(groups, delta=0.1, steps=steps, nodes=4)


def exact(groups: ScaleGroups) -> Callable[..., float]:
    """S with the unit direction of a search held: v moves with θ."""
    measure = sharpness(groups, steps=1)

    def value(objective: AbstractObjective, params: Params, held: Params, generator: torch.Generator) -> float:
        unit = measure(objective, held, generator).unit
        assert unit is not None
        return hold_unit(measure, unit)(objective, params).value

    return value


def secant(measure: Measure, form: Callable[[float, float], float]) -> Callable[..., float]:
    """``κ·form(f(δ), f(−δ))`` with v, the steepest start, held."""

    def value(objective: AbstractObjective, params: Params, held: Params, generator: torch.Generator) -> float:
        v = measure.geometry.place(steepest_start(measure, objective, held), held)
        kappa, delta = measure.profile.secant()
        up, down, here = (float(objective(P.shift(params, v, t))) for t in (delta, -delta, 0.0))
        return kappa * form(up - here, down - here)

    return value


HELD: dict[str, Callable[[ScaleGroups], Callable[..., float]]] = {
    "two-point": lambda groups: secant(sharpness(groups), lambda up, down: abs(up)),
    "central": lambda groups: secant(sharpness(groups), lambda up, down: abs(up - down) / 2),
    "exact": exact,
}
"""What each gradient is the gradient of; a tangent one is projected, and is the gradient of nothing."""

SECANT = ("two-point", "central")
PENALTY = {"penalty", "evaluates-loss", "second-batch", "weighted"}


REMEMBERING: dict[str, tuple[Any, set[str], float]] = {
    "friendly sam": (lambda groups: R.friendly_sam(rho=0.05), PENALTY, 0.7),
    "look sam": (lambda groups: R.look_sam(rho=0.05, every=2), {"evaluates-loss", "weighted"}, 0.7),
    "gsam": (lambda groups: R.gsam(rho=0.05), {"evaluates-loss", "weighted"}, 0.7),
    "warm start": (lambda groups: Penalty(sharpness(groups, 2), start=R.Warm()), PENALTY | {"equivariant"}, 0.7),
    "used again": (lambda groups: Penalty(sharpness(groups, 1), reuse=3), PENALTY | {"equivariant"}, 0.7),
    "averaged": (
        lambda groups: R.Averaged(bn_sharpness(groups, delta=0.05, steps=0)), {"evaluates-loss", "weighted"}, 3**0.5
    ),
    "momentum sam": (lambda groups: R.msam(rho=0.05), {"evaluates-loss", "weighted"}, 1.0),
    "entropy": (lambda groups: R.LocalEntropy(steps=3), {"evaluates-loss", "weighted"}, 1.0),
}
"""Steps with a state of their own; at the first step an average is empty, and the loss is ``L(θ)``."""

AWAY_FROM_THETA: dict[str, tuple[Any, set[str], float]] = {
    "smoothing": (lambda groups: R.Smoothing(gaussian(sigma=0.05, draws=2)), {"weighted"}, 1.0),
    "moving smoothing": (
        lambda groups: R.Smoothing(bn_gaussian(groups, sigma=0.1, draws=2), moving=True),
        {"weighted", "equivariant"}, 1.0,
    ),
}


def regularizer_checks() -> list[Check]:
    groups = ScaleGroups({"weight": "row"})  # those of the kit's quadratics, where exactness is checked
    checks = []
    for gradient in GRADIENTS:
        held = HELD.get(gradient)
        checks += check_regularizer(
            lambda groups, gradient=gradient: Penalty(sharpness(groups, int(gradient not in SECANT)), gradient),
            name=f"sharpness {gradient}",
            properties=PENALTY | {"equivariant"} | ({"exact"} if held else set()),
            penalised=held and held(groups),
        )
    for gradient in ("two-point", "exact"):
        # a constant scale holds v, and the same seed holds u: the gradient is that of the value reported
        checks += check_regularizer(
            lambda groups, gradient=gradient: Penalty(gaussian(sigma=0.05, draws=3), gradient),
            name=f"gaussian {gradient}", properties=PENALTY | {"exact"},
        )
    for name, made in (("sam", sam(rho=0.05)), ("asam", asam(rho=0.2))):
        checks += check_regularizer(
            lambda groups, made=made: made, name=name, properties=PENALTY | {"exact"},
            penalised=secant(made.measure, lambda up, down: up),
        )
    checks += check_regularizer(lambda groups: asam(rho=0.2, eta=0.0), name="asam eta=0", properties={"equivariant"})
    for name, (build, properties, weight) in REMEMBERING.items():
        checks += check_regularizer(build, name=name, properties=properties, weight=weight)
    for name, (build, properties, weight) in AWAY_FROM_THETA.items():
        reason = "its first evaluation is not at θ, and running statistics are those of the network evaluated"
        checks += check_regularizer(
            build, name=name, properties=properties, weight=weight,
            expected_failures={"moves_running_statistics_once": reason},
        )
    return checks + check_regularizer(
        lambda groups: Plain(), name="plain", properties={"penalty", "evaluates-loss", "exact", "equivariant"}
    )


@pytest.mark.parametrize("check", regularizer_checks(), ids=str)
def test_regularizer(check: Check) -> None:
    check()
