"""``(E_t |f(t)|^p)^{1/p}`` from values at nodes, against dense integration of the same function."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnsharp.errors import InputError
from bnsharp.laws import Normal, Uniform
from bnsharp.quadrature import gauss_legendre, line_points, panel_rules, power_norm

Function = Callable[[np.ndarray], np.ndarray]

EXPONENTS = (1.0, 1.5, 2.0, 2.7, 3.0, 4.0, 8.0, 16.0, 64.0)

ONE_SIGN: dict[str, Function] = {
    "linear": lambda t: 0.7 * t,
    "quadratic": lambda t: 3.0 * t**2,
    "bowl with a slope": lambda t: np.expm1(t) + np.where(t < 0, 0.0, t**2),
    "cosh": lambda t: np.cosh(2 * t) - 1,
}
"""No sign change inside either half of the segment."""

CROSSING: dict[str, Function] = {
    "parabola": lambda t: t**2 - 0.3 * t,
    "sine": lambda t: np.sin(5 * t) * np.exp(t),
    "cubic": lambda t: t * (t - 0.2) * (t + 0.35),
    "near the edge": lambda t: t * (t - 0.48),
    "beyond the last node": lambda t: t * (t - 0.495),
    "near zero": lambda t: t * (t + 0.01),
}
"""Sign changes inside a half segment of length 0.5."""


def fast(f: Function, delta: float, p: float, nodes: int = 8) -> tuple[float, float]:
    law = Uniform(delta)
    values = torch.as_tensor(f(np.array(line_points(law, nodes))))[None]
    value, error = power_norm(values, law, p, nodes)
    return value.item(), error.item()


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("name", [*ONE_SIGN, *CROSSING])
def test_matches_dense_integration(name: str, p: float) -> None:
    f, delta = {**ONE_SIGN, **CROSSING}[name], 0.5
    assert fast(f, delta, p)[0] == pytest.approx(oracles.line_norm(f, delta, p), rel=1e-4)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("nodes", [4, 6, 8, 12])
@pytest.mark.parametrize("name", [*ONE_SIGN, *CROSSING])
def test_error_estimate_bounds_the_true_error(name: str, p: float, nodes: int) -> None:
    """Up to 1e-6 of the value: both rules share what is lost near a zero of f when p is small."""
    f, delta = {**ONE_SIGN, **CROSSING}[name], 0.5
    value, error = fast(f, delta, p, nodes)
    assert abs(value - oracles.line_norm(f, delta, p)) <= error + 1e-6 * value


@given(
    a=st.floats(-1, 1), b=st.floats(-3, 3), c=st.floats(-3, 3), log_delta=st.floats(-7, 0),
    p=st.sampled_from(EXPONENTS),
)
def test_a_cubic_is_integrated_to_rounding(a: float, b: float, c: float, log_delta: float, p: float) -> None:
    """Interpolation through the nodes is exact for a cubic, with or without sign changes."""

    def f(t: np.ndarray) -> np.ndarray:
        return a * t + b * t**2 + c * t**3

    delta = math.exp(log_delta)
    dense = oracles.line_norm(f, delta, p)
    # a pair of sign changes closer than the root finder's grid (δ/256) is invisible to both
    assert fast(f, delta, p)[0] == pytest.approx(dense, rel=1e-5, abs=1e-300)


@pytest.mark.parametrize("p", EXPONENTS)
def test_powers_of_t(p: float) -> None:
    """``(E |c t|^p)^{1/p} = |c| δ (p+1)^{−1/p}`` and ``(E |c t²|^p)^{1/p} = |c| δ² (2p+1)^{−1/p}``."""
    tolerance = 1e-9 if p == int(p) else 1e-5
    assert fast(lambda t: -0.3 * t, 0.1, p)[0] == pytest.approx(0.03 * (p + 1) ** (-1 / p), rel=tolerance)
    assert fast(lambda t: 7.0 * t**2, 0.1, p)[0] == pytest.approx(0.07 * (2 * p + 1) ** (-1 / p), rel=tolerance)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0, 16.0])
@pytest.mark.parametrize("name", sorted({*ONE_SIGN, *CROSSING} - {"near zero"}))  # that one sits where the rules change
def test_gradient_in_the_values(name: str, p: float) -> None:
    law = Uniform(0.5)
    f = torch.as_tensor({**ONE_SIGN, **CROSSING}[name](np.array(line_points(law, 6))))[None].requires_grad_()
    (gradient,) = torch.autograd.grad(power_norm(f, law, p, 6)[0].sum(), f)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        d = torch.randn(f.shape, generator=generator, dtype=f.dtype) * f.detach().abs().max()
        slope = oracles.central_difference(
            lambda h, d=d: power_norm(f.detach() + h * d, law, p, 6)[0].item(), 1e-4  # type: ignore[misc]
        )
        # at a fixed sign pattern; a difference across a change of rule would show as an error of order one
        assert (gradient * d).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_gradient_by_torch_func(p: float) -> None:
    """The same gradient inside ``torch.func.grad``, with sign changes."""
    law = Uniform(0.5)
    f = torch.as_tensor(CROSSING["cubic"](np.array(line_points(law, 6))))[None]
    leaf = f.clone().requires_grad_()
    (expected,) = torch.autograd.grad(power_norm(leaf, law, p, 6)[0].sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: power_norm(x, law, p, 6)[0].sum())(f), expected)


@pytest.mark.parametrize("p", EXPONENTS)
def test_zero_has_value_and_gradient_zero(p: float) -> None:
    f = torch.zeros(2, 16, dtype=torch.float64, requires_grad=True)
    value, error = power_norm(f, Uniform(0.1), p, 8)
    (gradient,) = torch.autograd.grad(value.sum(), f)
    assert value.tolist() == error.tolist() == [0.0, 0.0]
    assert torch.equal(gradient, torch.zeros_like(f))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 64.0])
def test_a_non_finite_loss_stays_non_finite(p: float, value: float) -> None:
    f = torch.ones(1, 16, dtype=torch.float64)
    for bad in (f * value, torch.where(torch.arange(16) == 3, f * value, f)):
        assert not power_norm(bad, Uniform(0.1), p, 8)[0].isfinite().any()


@pytest.mark.parametrize("p", [8.0, 16.0, 64.0])
@pytest.mark.parametrize("size", [1e-3, 1e-30, 1e30])
def test_no_underflow_in_float32(p: float, size: float) -> None:
    law = Uniform(1.0)
    f = (size * torch.tensor(line_points(law, 8)))[None].requires_grad_()
    value, _ = power_norm(f, law, p, 8)
    (gradient,) = torch.autograd.grad(value.sum(), f)
    assert value.item() == pytest.approx(size * (p + 1) ** (-1 / p), rel=1e-4)
    # homogeneous of degree 1: ⟨f, ∂S/∂f⟩ = S
    assert (f * gradient).sum().item() == pytest.approx(value.item(), rel=1e-4)


def test_items_of_a_batch_do_not_mix() -> None:
    law = Uniform(0.5)
    t = np.array(line_points(law, 8))
    rows = [*(f(t) for f in ONE_SIGN.values()), *(f(t) for f in CROSSING.values()), 0 * t]
    together = power_norm(torch.as_tensor(np.stack(rows)), law, 3.0, 8)
    alone = [power_norm(torch.as_tensor(r)[None], law, 3.0, 8) for r in rows]
    for k in range(2):
        torch.testing.assert_close(together[k], torch.cat([a[k] for a in alone]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("nodes", range(3, 17))
def test_both_rules_have_positive_weights_and_their_degree(nodes: int) -> None:
    full, parts = panel_rules(Uniform(1.0), nodes)
    assert len(full.x) == nodes and [len(part.x) for part in parts] == [nodes - 2, nodes - 3][: 1 + (nodes >= 5)]
    assert all(set(part.x.tolist()) <= set(full.x.tolist()) for part in parts)
    for rule, degree in ((full, 2 * nodes - 1), *((part, len(part.x) - 1) for part in parts)):
        assert (rule.w > -1e-12).all()
        assert ((rule.x > 0) & (rule.x < 1)).all()
        for k in range(degree + 1):
            assert rule.w @ rule.x**k == pytest.approx(1 / (k + 1), rel=1e-10)


def test_interpolation_reproduces_polynomials_through_zero() -> None:
    rule, _ = panel_rules(Uniform(1.0), 5)
    z = np.linspace(0, 1, 11)
    for k in range(1, 6):
        np.testing.assert_allclose(rule.interpolation(z) @ rule.x**k, z**k, rtol=1e-10, atol=1e-12)


@given(n=st.integers(1, 40))
def test_gauss_legendre_is_on_the_unit_interval(n: int) -> None:
    x, w = gauss_legendre(n)
    assert w.sum() == pytest.approx(1.0) and w @ x == pytest.approx(0.5)


@pytest.mark.parametrize("nodes", [0, 1, 2])
def test_too_few_nodes(nodes: int) -> None:
    from bnsharp.profiles import Line

    with pytest.raises(InputError, match=f"nodes={nodes}"):
        Line(Uniform(0.1), 2.0, nodes)


def test_line_points_are_symmetric() -> None:
    law = Uniform(0.3)
    t = Tensor(line_points(law, 7))
    assert torch.allclose(t[:7], -t[7:]) and float(t.abs().max()) < 0.3


@pytest.mark.parametrize("law", [Uniform(1.0), Normal(1.0)], ids=["uniform", "normal"])
def test_many_nodes(law: Uniform | Normal) -> None:
    """64 on each half segment: embedded rules keep their degree, and (E|t²|²)^½ = (E t⁴)^½."""
    full, parts = panel_rules(law, 64)
    for rule in parts:
        for degree in range(6):
            assert rule.w @ rule.x**degree == pytest.approx(full.w @ full.x**degree, rel=1e-9)
    t = torch.tensor(line_points(law, 64), dtype=torch.float64)
    value, error = power_norm((t**2)[None], law, 2.0, 64)
    assert float(value) == pytest.approx(law.moment(4) ** 0.5, rel=1e-9)
    assert float(error) < 1e-5 * float(value)
