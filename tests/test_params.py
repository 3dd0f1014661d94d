"""Arithmetic on parameter dictionaries against loops over plain numbers, and which parameters a module has."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import fast, flat, layouts, one_line, random_params
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsharp import parameters
from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.types import Params

seeds = st.integers(0, 2**16)


def close(a: list[float], b: list[float]) -> None:
    assert a == pytest.approx(b, rel=1e-12, abs=1e-12)


# ---------------------------------------------------------------- arithmetic


@given(layouts(), seeds)
@fast
def test_dot_and_norm_are_sums_over_all_coordinates(layout, seed):
    lead, shapes = layout
    x, y = random_params(shapes, lead, seed), random_params(shapes, lead, seed + 1)
    assert P.dot(x, y).shape == P.norm(x).shape == lead
    pairs = list(zip(flat(x), flat(y), strict=True))
    close(P.dot(x, y).reshape(-1).tolist(), [sum(a * b for a, b in zip(u, v, strict=True)) for u, v in pairs])
    close(P.norm(x).reshape(-1).tolist(), [math.hypot(*u) for u, _ in pairs])
    assert P.numel(x) == len(flat(x)[0]) and P.count(P.Lazy(4, lambda i: x)) == 4


@given(layouts(), seeds)
@fast
def test_dot_of_a_batch_and_a_point_broadcasts(layout, seed):
    _, shapes = layout
    x, y = random_params(shapes, (3,), seed), random_params(shapes, (), seed + 1)
    expected = [sum(a * b for a, b in zip(u, flat(y)[0], strict=True)) for u in flat(x)]
    for product in (P.dot(x, y), P.dot(y, x)):
        assert product.shape == (3,)
        close(product.tolist(), expected)


@given(layouts(), seeds, st.sampled_from([1.0, 0.0, -2.5]), st.booleans())
@fast
def test_shift_combine_and_scaled_are_coordinatewise(layout, seed, t, as_tensor):
    lead, shapes = layout
    x, v = random_params(shapes, (), seed), random_params(shapes, lead, seed + 1)
    factor = torch.tensor(t, dtype=torch.float64) if as_tensor else t
    moved = P.shift(x, v, factor)
    assert moved.batch_size == torch.Size(lead)
    for got, step in zip(flat(moved), flat(v), strict=True):
        close(got, [a + t * b for a, b in zip(flat(x)[0], step, strict=True)])
    for got, step in zip(flat(P.combine(2.0, x, factor, v)), flat(v), strict=True):
        close(got, [2 * a + t * b for a, b in zip(flat(x)[0], step, strict=True)])
    for got, step in zip(flat(P.scaled(v, factor)), flat(v), strict=True):
        close(got, [t * b for b in step])
    assert all(z == 0 for point in flat(P.zeros_like(v)) for z in point)


@given(layouts(), seeds)
@fast
def test_times_scales_item_by_item(layout, seed):
    _, shapes = layout
    factors = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    for x in (random_params(shapes, (3,), seed), P.batch(random_params(shapes, (), seed))):
        got = P.times(factors, x)
        assert got.batch_size == (3,)
        for i, c in enumerate(factors.tolist()):
            source = flat(x)[i if x.batch_size[0] == 3 else 0]
            close(flat(got)[i], [c * a for a in source])


@given(layouts(), seeds, st.lists(st.booleans(), min_size=3, max_size=3))
@fast
def test_where_takes_each_item_from_one_side(layout, seed, chosen):
    _, shapes = layout
    x, y = random_params(shapes, (3,), seed), random_params(shapes, (3,), seed + 1)
    got = P.where(torch.tensor(chosen), x, y)
    assert flat(got) == [a if c else b for c, a, b in zip(chosen, flat(x), flat(y), strict=True)]
    first = torch.tensor(chosen[:1])
    assert flat(P.where(first, P.batch(P.pick(x, 0)), P.batch(P.pick(y, 0)))) == flat(x if chosen[0] else y)[:1]
    values = P.where(torch.tensor(chosen), torch.ones(3), torch.zeros(3))
    assert values.tolist() == [float(c) for c in chosen]


def test_where_reaches_into_nested_dictionaries():
    x, y = (P.make({"inner": random_params({"w": (2,), "s": ()}, (3,), s)}, (3,)) for s in (0, 1))
    got = P.where(torch.tensor([True, False, True]), x, y)["inner"]
    for name in ("w", "s"):
        expected = torch.stack([x["inner"][name][0], y["inner"][name][1], x["inner"][name][2]])
        assert torch.equal(got[name], expected)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("zero", [("a",), ("s",), ("a", "s")])
def test_the_gradient_of_a_norm_at_zero_is_zero(lead, zero):
    x = random_params({"a": (2, 3), "s": ()}, lead)
    leaves = {k: (torch.zeros_like(v) if k in zero else v).requires_grad_() for k, v in x.items()}
    gradients = torch.autograd.grad(P.norm(P.make(leaves, lead)).sum(), list(leaves.values()))
    for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.isfinite().all(), name
        if name in zero:
            assert not gradient.any(), name
        else:
            norm = P.norm(P.make(leaves, lead)).detach().reshape((*lead, *[1] * (value.ndim - len(lead))))
            torch.testing.assert_close(gradient, value.detach() / norm)


def test_division_by_zero_is_zero_with_a_zero_gradient():
    x = torch.tensor([1.0, 2.0, 0.0]).requires_grad_()
    y = torch.tensor([0.0, 4.0, 0.0]).requires_grad_()
    for value in (P.safe_divide(x, y), P.safe_reciprocal(y)):
        gradients = torch.autograd.grad(value.sum(), [x, y], allow_unused=True, materialize_grads=True)
        assert all(g.isfinite().all() for g in gradients)
    assert P.safe_divide(x, y).tolist() == [0.0, 0.5, 0.0]
    assert P.safe_reciprocal(y).tolist() == [0.0, 0.25, 0.0]


@given(layouts(), seeds)
@fast
def test_stack_undoes_pick(layout, seed):
    _, shapes = layout
    x = random_params(shapes, (3,), seed)
    again = P.stack([P.pick(x, i) for i in range(P.count(x))])
    assert again.batch_size == (3,) and all(torch.equal(again[k], x[k]) for k in x.keys())
    one = P.pick(x, 1)
    assert flat(P.pick(P.batch(one), 0)) == flat(one)


def test_count_refuses_a_single_point():
    with pytest.raises(InputError, match="batch size"):
        P.count(random_params({"a": (2,)}))


def test_lazy_is_a_sequence_that_makes_an_item_when_it_is_asked_for():
    made: list[int] = []

    def make(i: int) -> Params:
        made.append(i)
        return P.make({"w": torch.full((), float(i))})

    lazy = P.Lazy(4, make)
    assert len(lazy) == 4 and made == []
    assert lazy[2]["w"] == 2 and lazy[-1]["w"] == 3 and made == [2, 3]
    made.clear()
    assert [float(x["w"]) for x in lazy] == [0, 1, 2, 3] and made == [0, 1, 2, 3]
    assert [float(x["w"]) for x in lazy[1:3]] == [1, 2] and [float(x["w"]) for x in lazy[::-2]] == [3, 1]
    assert float(P.pick(lazy, 1)["w"]) == 1
    for index in (4, -5):
        with pytest.raises(IndexError):
            lazy[index]


def test_a_random_draw_without_a_generator_is_refused_in_one_line():
    with pytest.raises(InputError) as caught:
        P.generator_for(random_params({"a": ()}), None, "Draw")
    assert "generator" in one_line(caught.value)


def test_random_seeds_are_a_function_of_the_generator():
    draws = [P.random_seeds(torch.Generator().manual_seed(3), 5) for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) == 5


# ---------------------------------------------------------------- parameters of a module


class Wrapper(nn.Module):
    """What ``torch.compile`` returns, as far as names go."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self._orig_mod = inner


class DistributedDataParallel(nn.Module):
    """The data-parallel wrapper, as far as names go."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.module = inner


class User(nn.Module):
    """A user's module whose attribute is called ``module``."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.module = inner


def test_parameters_are_detached_copies():
    net = nn.Linear(2, 3)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    params = parameters(net)
    assert list(params.keys()) == ["weight", "bias"] and params.batch_size == ()
    for value in params.values():
        assert not value.requires_grad and not isinstance(value, nn.Parameter)
        value.mul_(0).add_(7)
    assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
    with torch.no_grad():
        net.weight.zero_()
    assert torch.equal(params["weight"], torch.full((3, 2), 7.0))


def test_live_parameters_are_views():
    net = nn.Linear(2, 3)
    live = P.live(net)
    with torch.no_grad():
        net.weight.zero_()
    assert not live["weight"].any() and not live["weight"].requires_grad


def test_a_tied_weight_appears_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert list(parameters(net).keys()) == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize("wrap", [
    Wrapper, DistributedDataParallel, lambda m: Wrapper(DistributedDataParallel(m)),
    lambda m: DistributedDataParallel(Wrapper(m)), nn.DataParallel, torch.compile,
])
def test_wrappers_leave_no_trace_in_names(wrap):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert P.unwrap(wrap(net)) is net
    assert list(parameters(wrap(net)).keys()) == list(parameters(net).keys()) == [
        "0.weight", "0.bias", "1.weight", "1.bias",
    ]


def test_an_attribute_called_module_keeps_its_name():
    net = User(nn.Linear(2, 3))
    assert P.unwrap(net) is net
    assert list(parameters(net).keys()) == ["module.weight", "module.bias"]
    assert list(parameters(Wrapper(net)).keys()) == ["module.weight", "module.bias"]


def test_frozen_parameters_are_absent():
    net = nn.Linear(2, 3)
    net.bias.requires_grad_(False)
    assert list(parameters(net).keys()) == ["weight"]


def frozen() -> nn.Module:
    return nn.Linear(2, 3).requires_grad_(False)


@pytest.mark.parametrize("make", [nn.ReLU, frozen, lambda: nn.BatchNorm1d(2, affine=False)])
def test_a_module_without_parameters_is_refused_in_one_line(make):
    with pytest.raises(InputError) as caught:
        parameters(make())
    assert type(make()).__name__ in one_line(caught.value)


def test_scalar_parameters_are_parameters():
    net = nn.Module()
    net.scale = nn.Parameter(torch.tensor(2.0))
    params = parameters(net)
    assert params["scale"].shape == () and float(P.norm(params)) == 2.0 and isinstance(P.first(params), Tensor)


def test_norms_of_no_tensors_and_of_several_precisions():
    assert float(P.total_norm([])) == 0.0
    norm = P.total_norm([torch.full((4,), 2.0), torch.tensor(3.0, dtype=torch.float64), torch.zeros(0)])
    assert norm.dtype == torch.float64 and float(norm) == 5.0
