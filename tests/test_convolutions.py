"""Float64 convolutions slice by slice: the numbers of whole batches, and far less memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.allocations import peak_bytes
from bnsharp import convolutions
from bnsharp.convolutions import Sliced, frugal, slice_size

CASES = {
    "conv1d": (torch.nn.functional.conv1d, (9, 4, 12), (6, 4, 3), {"padding": 1}),
    "conv2d": (torch.nn.functional.conv2d, (9, 4, 8, 8), (6, 2, 3, 3), {"stride": 2, "groups": 2}),
    "conv3d": (torch.nn.functional.conv3d, (5, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"dilation": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_slices_give_the_numbers_of_the_whole_batch(name, monkeypatch):
    monkeypatch.setattr(convolutions, "PATCHES", 1)
    function, shape, kernel, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, kernel, kernel[:1]))
    assert slice_size(x, w) < len(x)
    with torch.no_grad():
        whole = function(x, w, b, **options)
        with Sliced():
            torch.testing.assert_close(function(x, w, b, **options), whole, rtol=1e-13, atol=1e-13)
            one = function(x[0], w, b, **options)  # no batch: nothing to slice
            torch.testing.assert_close(one, whole[0], rtol=1e-13, atol=1e-13)


def test_float32_and_derivatives_are_left_alone(monkeypatch):
    monkeypatch.setattr(convolutions, "PATCHES", 1)
    x, w = torch.randn(5, 2, 6, 6), torch.randn(3, 2, 3, 3)
    assert slice_size(x, w) == len(x)
    assert not isinstance(frugal(torch.float32), Sliced) and isinstance(frugal(torch.float64), Sliced)
    with Sliced():
        output = torch.conv2d(x.double(), w.double().requires_grad_())
    assert "Convolution" in type(output.grad_fn).__name__  # not a concatenation


def test_patches_of_the_whole_batch_are_never_held():
    x, w = torch.randn(256, 3, 32, 32, dtype=torch.float64), torch.randn(6, 3, 5, 5, dtype=torch.float64)
    output = 8 * 256 * 6 * 28 * 28

    def run() -> None:
        with torch.no_grad(), frugal(torch.float64):
            torch.conv2d(x, w)

    assert peak_bytes(run, torch.device("cpu")) < 2 * output + 2 * convolutions.PATCHES


def test_a_batch_without_examples_is_left_to_pytorch():
    """A network may send no example to one of its convolutions."""
    x, w = torch.randn(0, 2, 5, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad(), Sliced():
        assert torch.conv2d(x, w).shape == (0, 3, 3, 3)
