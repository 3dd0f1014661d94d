"""Stochastic Lanczos quadrature against dense eigenvalues."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from strategies import problem

from bnsharp import InputError
from bnsharp import params as P
from bnsharp.geometry import Groupwise
from bnsharp.spectrum import spectrum


@pytest.mark.parametrize("relative", [False, True])
def test_moments_and_density_against_dense_eigenvalues(relative: bool) -> None:
    p = problem("mlp", seed=3)
    hessian, scale = oracles.dense_hessian(p.loss, p.params), torch.ones(P.numel(p.params), dtype=torch.float64)
    if relative:
        theta, scale = oracles.flatten(p.params), torch.zeros_like(scale)
        for i in p.index:
            scale[i] = theta[i].norm()
    eigenvalues = torch.linalg.eigvalsh(scale[:, None] * hessian * scale)
    geometry = Groupwise(p.groups) if relative else None
    found = spectrum(p.objective(), p.params, geometry=geometry, draws=60, iterations=40)
    assert found.weights.sum(1).tolist() == pytest.approx([1.0] * 60)
    for power in (1, 2, 3):
        value, stderr = found.moment(power)
        assert abs(value - float((eigenvalues**power).sum())) < 4.5 * stderr
    assert float(found.nodes.max()) == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert float(found.nodes.min()) == pytest.approx(float(eigenvalues[0]), rel=1e-4)
    grid, width = torch.linspace(-3, float(eigenvalues[-1]) + 3, 500, dtype=torch.float64), 0.5
    density = found.density(grid, width)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=0.02)
    exact = torch.exp(-0.5 * ((grid[:, None] - eigenvalues) / width) ** 2).mean(1) / (width * math.sqrt(2 * math.pi))
    assert torch.trapezoid((density - exact).abs(), grid).item() < 0.1


def test_the_relative_spectrum_is_invariant_and_runs_repeat() -> None:
    p = problem("mlp", seed=3)
    a = {k: torch.logspace(-1, 1, len(p.params[k]), dtype=torch.float64) for k in p.rows}
    one, two = (
        spectrum(p.objective(), x, geometry=Groupwise(p.groups), draws=2, iterations=15)
        for x in (p.params, oracles.rescale(p.params, p.rows, a))
    )
    torch.testing.assert_close(one.nodes, two.nodes, rtol=1e-6, atol=1e-8)
    again = spectrum(p.objective(), p.params, geometry=Groupwise(p.groups), draws=2, iterations=15)
    assert torch.equal(one.nodes, again.nodes)


def test_small_problems_end_early_and_bad_ones_are_refused() -> None:
    params = P.make({"w": torch.ones(3, dtype=torch.float64)})
    found = spectrum(lambda q: (q["w"] ** 2).sum(), params, draws=3)
    assert found.nodes.shape == (3, 1) and float(found.nodes[0, 0]) == pytest.approx(2.0)
    assert found.moment(1)[0] == pytest.approx(6.0)
    for bad in ({"draws": 0}, {"iterations": 0}):
        with pytest.raises(InputError):
            spectrum(lambda q: q["w"].sum(), params, **bad)
    with pytest.raises(InputError):
        found.density(torch.zeros(2), 0.0)
