"""Sums, dots, norms and projections of a partition against loops over its groups, one list of numbers each."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import fast, one_line, random_params
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.partition import Group, Partition
from bnsharp.types import Params

SHAPES = {"conv": (6, 2, 2), "gamma": (6,), "beta": (6,), "scale": (), "row": (1, 3), "free": (2, 2)}
PARTITIONS = {
    "rows": Partition((Group("row", ("conv",), 6),)),
    "blocks": Partition((Group("block", ("conv",), 3), Group("block", ("free",), 2))),
    "tensor": Partition((Group("tensor", ("conv",), 1), Group("tensor", ("beta",), 1))),
    "joint": Partition.joint(SHAPES),
    "joint by channel": Partition((Group("joint", ("gamma", "beta"), 6), Group("row", ("conv",), 6))),
    "joint in blocks": Partition((Group("joint", ("conv", "gamma"), 2),)),
    "0-d": Partition((Group("tensor", ("scale",), 1), Group("row", ("row",), 1))),
    "0-d with others": Partition((Group("joint", ("scale", "row"), 1),)),
    "nothing": Partition(()),
}
partitions = st.sampled_from(sorted(PARTITIONS)).map(PARTITIONS.get)
leads = st.sampled_from([(), (1,), (3,)])
seeds = st.integers(0, 2**16)


def members(group: Group, block: int) -> list[tuple[str, int | None]]:
    """Which rows of which parameter make one group; a row of None is a scalar parameter."""
    found: list[tuple[str, int | None]] = []
    for name in group.members:
        if not SHAPES[name]:
            found.append((name, None))
            continue
        size = SHAPES[name][0] // group.blocks
        found += [(name, row) for row in range(block * size, (block + 1) * size)]
    return found


def coordinates(x: Params, group: Group, block: int) -> list[float]:
    """The numbers of one group of one point."""
    return [
        value
        for name, row in members(group, block)
        for value in (x[name] if row is None else x[name][row]).reshape(-1).tolist()
    ]


def loop(partition: Partition, fn, *points: Params) -> list[list[list[float]]]:
    """``[point][group][block]`` of ``fn`` of the groups' coordinates."""
    n = max((p.batch_size[0] for p in points if p.batch_size), default=1)
    items = [[P.pick(p, i) if p.batch_size else p for p in points] for i in range(n)]
    return [
        [[fn(*(coordinates(p, g, b) for p in item)) for b in range(g.blocks)] for g in partition] for item in items
    ]


def compare(values: Tensor, expected: list[list[list[float]]], lead: tuple[int, ...]) -> None:
    """``[*, K]``, groups in order and blocks in order."""
    flat = [[v for group in point for v in group] for point in expected]
    assert values.shape == (*lead, len(flat[0]))
    for row, point in zip(values.reshape(len(flat), -1).tolist(), flat, strict=True):
        assert row == pytest.approx(point, rel=1e-12, abs=1e-12)


@given(partitions, leads, seeds)
@fast
def test_sums_dots_and_norms_are_loops_over_groups(partition, lead, seed):
    x, y = random_params(SHAPES, lead, seed), random_params(SHAPES, lead, seed + 1)
    compare(partition.sums(x), loop(partition, sum, x), lead)
    compare(partition.norms(x), loop(partition, lambda a: math.hypot(*a), x), lead)
    compare(
        partition.dots(x, y),
        loop(partition, lambda a, b: sum(u * v for u, v in zip(a, b, strict=True)), x, y),
        lead,
    )
    sizes = [len(coordinates(random_params(SHAPES), g, 0)) for g in partition for _ in range(g.blocks)]
    assert partition.sizes(x).tolist() == sizes
    assert partition.count == len(sizes)


@given(partitions, seeds)
@fast
def test_dots_of_a_batch_and_a_point(partition, seed):
    x, y = random_params(SHAPES, (3,), seed), random_params(SHAPES, (), seed + 1)
    expected = loop(partition, lambda a, b: sum(u * v for u, v in zip(a, b, strict=True)), x, y)
    compare(partition.dots(x, y), expected, (3,))
    compare(partition.dots(y, x), expected, (3,))


@given(partitions, leads, seeds)
@fast
def test_spread_puts_each_groups_value_on_its_rows_and_zero_elsewhere(partition, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*lead, partition.count, generator=generator, dtype=torch.float64)
    values = drawn.split([g.blocks for g in partition], -1)
    like = random_params(SHAPES, (), seed)
    spread = partition.spread(drawn, like)
    assert list(spread.keys()) == list(SHAPES)
    inner = lead
    full = {k: (spread[k] * torch.ones((*inner, *s), dtype=torch.float64)) for k, s in SHAPES.items()}
    for i in range(inner[0] if inner else 1):
        expected = {k: torch.zeros(s, dtype=torch.float64) for k, s in SHAPES.items()}
        for g, group in enumerate(partition):
            for b in range(group.blocks):
                value = values[g][i, b] if inner else values[g][b]
                for name, row in members(group, b):
                    expected[name][() if row is None else row] = value
        for name in SHAPES:
            got = full[name][i] if inner else full[name]
            assert got.shape == SHAPES[name] and torch.equal(got, expected[name]), name


@given(partitions, leads, seeds)
@fast
def test_scale_multiplies_and_normalize_makes_unit_norms(partition, lead, seed):
    x = random_params(SHAPES, lead, seed)
    norms = partition.norms(partition.normalize(x))
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)
    factors = torch.full((*lead, partition.count), 3.0, dtype=torch.float64)
    inside = {name for g in partition for name in g.members}
    tripled = partition.scale(x, factors)
    for name in SHAPES:
        assert torch.equal(tripled[name], (3.0 if name in inside else 0.0) * x[name]), name


@given(partitions, leads, seeds)
@fast
def test_project_removes_the_component_along_each_group(partition, lead, seed):
    x, y = random_params(SHAPES, lead, seed), random_params(SHAPES, (), seed + 1)
    projected = partition.project(x, y)
    for i in range(lead[0] if lead else 1):
        got, source = (P.pick(p, i) if lead else p for p in (projected, x))
        expected = {k: v.clone() for k, v in source.items()}
        for group in partition:
            for b in range(group.blocks):
                u, v = (torch.tensor(coordinates(p, group, b), dtype=torch.float64) for p in (source, y))
                ratio = float(u @ v) / float(v @ v)
                for name, row in members(group, b):
                    index = () if row is None else row
                    expected[name][index] = source[name][index] - ratio * y[name][index]
        for name in SHAPES:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-12)
    assert bool((partition.dots(projected, y).abs() < 1e-12).all())
    again = partition.project(projected, y)
    assert float(P.norm(P.combine(1.0, again, -1.0, projected)).max()) < 1e-12


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_groups_of_norm_zero_stay_zero_with_zero_gradients(name):
    partition = PARTITIONS[name]
    zero = P.zeros_like(random_params(SHAPES))
    assert not P.norm(partition.normalize(zero)).any()
    x = random_params(SHAPES)
    assert torch.equal(P.norm(partition.project(x, zero)), P.norm(x))
    leaves = {k: v.clone().requires_grad_() for k, v in zero.items()}
    value = partition.norms(P.make(leaves)).sum() + P.norm(partition.normalize(P.make(leaves)))
    if value.requires_grad:
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        assert not any(g.any() for g in gradients)


@given(leads, seeds)
@fast
def test_the_joint_partition_is_the_whole_vector(lead, seed):
    x = random_params(SHAPES, lead, seed)
    norms = Partition.joint(SHAPES).norms(x)
    torch.testing.assert_close(norms.squeeze(-1), P.norm(x), rtol=1e-12, atol=0)
    assert Partition.joint(SHAPES).sizes(x).tolist() == [P.numel(x)]


@pytest.mark.parametrize(("group", "word"), [
    (Group("row", ("missing",), 6), "missing"),
    (Group("block", ("conv",), 4), "divisor"),
    (Group("row", ("scale",), 2), "scale"),
])
def test_a_partition_that_does_not_fit_is_refused_in_one_line(group, word):
    for like in (random_params(SHAPES), random_params(SHAPES, (3,))):
        with pytest.raises(InputError) as caught:
            Partition((group,)).check(like)
        assert word in one_line(caught.value)


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_a_partition_that_fits_is_accepted(name):
    PARTITIONS[name].check(random_params(SHAPES))
    PARTITIONS[name].check(random_params(SHAPES, (3,)))
