"""The mass of a Gaussian neighbourhood: closed forms, draws, and a figure that is the same file twice."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tree
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from bnsharp.errors import InputError
from bnsharp.experiments import neighbourhood as N


def test_closed_forms() -> None:
    """d = 1: erf; d = 2: 1 − exp(−x²/2); d = 4: 1 − (1 + x²/2) exp(−x²/2)."""
    for x in (0.0, 0.1, 0.7, 1.0, 2.5, 6.0):
        h = x**2 / 2
        expected = (math.erf(x / math.sqrt(2)), -math.expm1(-h), 1 - (1 + h) * math.exp(-h))
        assert N.mass_inside([1, 2, 4], x).tolist() == pytest.approx(expected, abs=1e-14)


@given(st.integers(1, 10**8), st.floats(0.001, 0.999))
def test_mass_and_distance_are_inverse(d: int, probability: float) -> None:
    r = N.distance_quantile(d, probability)
    assert float(N.mass_inside(d, r)) == pytest.approx(probability, rel=1e-6)
    assert float(N.mass_inside(d, r)) == pytest.approx(float(stats.chi(d).cdf(float(r))), abs=1e-6)


def test_mass_falls_with_the_dimension_and_concentrates_at_its_root() -> None:
    d = np.unique(np.geomspace(1, 1e8, 200).astype(int))
    for radius in N.RADII:
        mass = N.mass_inside(d, radius)
        assert bool((np.diff(mass) <= 1e-15).all())
    assert N.mass_inside(10**6, [990.0, 1000.0, 1010.0]).tolist() == pytest.approx([0, 0.5, 1], abs=1e-3)
    for size in N.network_sizes().values():
        low, high = N.distance_quantile(size, [0.001, 0.999])
        assert abs(low - size**0.5) < 2.3 and abs(high - size**0.5) < 2.3


@pytest.mark.parametrize("radius", [1, 3, 10])
def test_draws_agree(radius: int) -> None:
    """Within an interval of error rate 1e-4 each, at every dimension that the figure draws."""
    generator = torch.Generator().manual_seed(1)
    for d in N.DRAWN:
        count, p = N.drawn_inside(d, radius, 2000, generator), float(N.mass_inside(d, radius))
        assert stats.binomtest(count, 2000, min(1.0, p)).pvalue > 1e-4, (d, count / 2000, p)


def test_intervals_are_scipys() -> None:
    for count in (0, 1, 17, 99, 100):
        exact = stats.binomtest(count, 100).proportion_ci(0.95, method="exact")
        assert N.agreement(count, 100) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_sizes_are_those_of_the_networks() -> None:
    from torchvision.models import ResNet18_Weights

    sizes = N.network_sizes()
    assert sizes["ResNet-18"] == ResNet18_Weights.DEFAULT.meta["num_params"]
    vgg = (3 * 64 + 64 * 128 + 128 * 256 + 256**2 + 256 * 512 + 3 * 512**2) * 9 + 2 * (64 + 128 + 512 + 2048) + 5130
    assert sizes["VGG11-BN"] == vgg
    lenet = 3 * 6 * 25 + 6 * 16 * 25 + 400 * 120 + 120 * 84 + 84 * 10 + 2 * (6 + 16 + 120 + 84 + 10)
    assert sizes["LeNet-BN"] == lenet


def test_the_command_draws_the_same_files_twice(tmp_path: Path) -> None:
    """In a process of its own, and here."""
    done = subprocess.run([sys.executable, "-m", "bnsharp.experiments.neighbourhood", "a.png", "b.svg"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == done.stderr == ""
    sizes = N.network_sizes()
    assert tree(tmp_path) == {"a.png": N.figure(sizes), "b.svg": N.figure(sizes, ".svg")}
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.png")).reshape(-1, 4), axis=0)) > 100
    assert b"<svg" in (tmp_path / "b.svg").read_bytes()


def test_a_file_that_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ("c.pdf", "c", "none/c.png"):
        assert N.main([str(tmp_path / "d.png"), str(tmp_path / bad)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert bad in line
    assert tree(tmp_path) == {}
    with pytest.raises(InputError):
        N.figure({}, ".pdf")
