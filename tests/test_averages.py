"""Averaged weights and rebuilt running statistics against sums written out, and modules left as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import HomeMadeNorm, assert_same, bn_conv, bn_mlp, examples, one_line, plain_mlp, snapshot
from torch import nn

from bnsharp.averages import Ema, has_statistics, reestimated
from bnsharp.errors import InputError

BATCHES = [examples(8, seed=s) for s in range(3)]


def moved(net: nn.Module, seed: int) -> nn.Module:
    """Other parameters and other running statistics, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
            t += torch.rand(t.shape, generator=generator)
    return net


# ---------------------------------------------------------------- exponential moving average


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_average_is_its_sum_written_out(decay, steps):
    net, ema = bn_mlp().double(), Ema(decay)
    state, seen = ema.init(net), []
    for step in range(steps):
        moved(net, step)
        state = ema.update(net, state, step + 1)
        seen.append(copy.deepcopy(net.state_dict()))
    weights = [decay ** (steps - k) for k in range(1, steps + 1)]
    with ema.applied(net, state):
        for key, value in net.state_dict().items():
            expected = sum(w * s[key] for w, s in zip(weights, seen, strict=True)) / sum(weights)
            if key.endswith("num_batches_tracked"):
                assert torch.equal(value, seen[-1][key])
            else:
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_a_constant_network_is_its_own_average():
    net, ema = bn_conv(), Ema(0.99)
    state = ema.init(net)
    for step in range(5):
        state = ema.update(net, state, step)
    before = copy.deepcopy(net.state_dict())
    with ema.applied(net, state):
        assert_same(dict(before), dict(net.state_dict()))


def test_an_average_leaves_the_module_alone_also_after_an_exception():
    net, ema = bn_mlp(), Ema(0.9)
    state = ema.update(moved(net, 0), ema.init(net))
    moved(net, 1)
    before = snapshot(net)
    pointers = [p.data_ptr() for p in net.parameters()]
    def interrupted() -> None:
        with ema.applied(net, state):
            assert not torch.equal(net[0].weight, before["state"]["0.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(before, snapshot(net))
    assert pointers == [p.data_ptr() for p in net.parameters()]


def test_an_update_leaves_the_old_state_and_the_module_alone():
    net, ema = bn_mlp(), Ema(0.9)
    old = ema.init(net)
    kept, before = {k: v.clone() for k, v in old.items()}, snapshot(net)
    new = ema.update(net, old)
    moved(net, 0)
    assert_same(kept, old)
    assert_same({k: v for k, v in new.items() if k != "count"}, {k: v for k, v in kept.items() if k != "count"})
    assert before["state"].keys() == net.state_dict().keys()


def test_low_precision_is_averaged_in_float32():
    net, ema = nn.Linear(2, 2).bfloat16(), Ema(0.999)
    state = ema.update(net, ema.init(net))
    before = state["parameter:weight"].clone()
    with torch.no_grad():
        net.weight += 1
    state = ema.update(net, state)
    assert state["parameter:weight"].dtype == torch.float32
    torch.testing.assert_close(state["parameter:weight"] - before, torch.full((2, 2), 1 / 1.999), atol=0.01, rtol=0)
    with ema.applied(net, state):
        assert net.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, float("nan"), "0.9", True])
def test_a_decay_outside_its_interval_is_refused_in_one_line(decay):
    with pytest.raises(InputError) as caught:
        Ema(decay)
    assert "ema=" in one_line(caught.value)


def test_the_average_of_another_network_is_refused_in_one_line():
    ema = Ema(0.9)
    with pytest.raises(InputError) as caught, ema.applied(plain_mlp(), ema.init(bn_mlp())):
        pass
    assert "Sequential" in one_line(caught.value)


# ---------------------------------------------------------------- running statistics


def statistics(net: nn.Sequential, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of the first layer's output, batch by batch, averaged: with pencil and paper."""
    z = [net[0](x) for x, _ in batches]
    return torch.stack([a.mean(0) for a in z]).mean(0), torch.stack([a.var(0) for a in z]).mean(0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_cumulative_means_of_the_batches(momentum):
    net = bn_mlp().double()
    net[1].momentum = momentum
    batches = [(x.double(), y) for x, y in BATCHES]
    with torch.no_grad(), reestimated(net, batches):
        mean, variance = statistics(net, batches)
        torch.testing.assert_close(net[1].running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net[1].running_var, variance, rtol=1e-12, atol=1e-12)
        assert not any(m.training for m in net.modules())  # ready for an evaluation


def test_they_are_what_torch_calls_cumulative():
    """``momentum=None`` of batch normalization, in a deeper network."""
    net = bn_conv()
    batches = [examples(6, (2, 5, 5), seed=s) for s in range(3)]
    torchs = torch.optim.swa_utils.update_bn
    other = copy.deepcopy(net)
    torchs([x for x, _ in batches], other)
    with reestimated(net, batches):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(net[1], name), getattr(other[1], name))


def test_instance_norm_and_a_dropped_layer():
    """Torch's instance norm ignores ``momentum=None``; dropout is off while statistics are rebuilt."""
    net = nn.Sequential(nn.Dropout(0.9), nn.InstanceNorm1d(3, track_running_stats=True)).double()
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with reestimated(net, [(x[:2], None), (x[2:], None)]):
        torch.testing.assert_close(net[1].running_mean, x.mean((0, 2)))
        torch.testing.assert_close(net[1].running_var, x.var(2).mean(0))


@pytest.mark.parametrize("fail", [False, True])
def test_re_estimation_leaves_the_module_alone_also_after_an_exception(fail):
    net = bn_mlp()
    net.train()
    net[3].eval()
    before, momentum = snapshot(net), net[1].momentum
    batches = [*BATCHES, (torch.zeros(2, 99), None)] if fail else BATCHES
    try:
        with reestimated(net, batches):
            assert not torch.equal(net[1].running_mean, before["state"]["1.running_mean"])
    except RuntimeError:
        assert fail
    assert_same(before, snapshot(net))
    assert net[1].momentum == momentum and net[0].training and not net[3].training


def test_non_finite_statistics_are_replaced():
    net = bn_mlp()
    net[1].running_var.fill_(float("inf"))
    with reestimated(net, BATCHES):
        assert net[1].running_var.isfinite().all()


def test_an_averaged_network_has_its_own_statistics():
    net, ema = bn_mlp().double(), Ema(0.5)
    batches = [(x.double(), y) for x, y in BATCHES]
    state = ema.init(net)
    for step in range(3):
        state = ema.update(moved(net, step), state)
    with torch.no_grad(), ema.applied(net, state), reestimated(net, batches):
        mean, _ = statistics(net, batches)
        torch.testing.assert_close(net[1].running_mean, mean)


@pytest.mark.parametrize(("net", "batches", "word"), [
    (plain_mlp(), BATCHES, "running statistics"), (bn_mlp(), [], "no batch"),
    (nn.Sequential(nn.Linear(5, 3), HomeMadeNorm(3)), BATCHES, "HomeMadeNorm"),
    (nn.BatchNorm1d(5, track_running_stats=False), BATCHES, "running statistics"),
], ids=["none", "no batch", "home-made", "untracked"])
def test_what_cannot_be_re_estimated_is_refused_in_one_line(net, batches, word):
    before = snapshot(net)
    with pytest.raises(InputError) as caught, reestimated(net, batches):
        pass
    assert word in one_line(caught.value)
    assert_same(before, snapshot(net))


def test_who_has_statistics():
    assert has_statistics(bn_mlp()) and not has_statistics(plain_mlp())
    assert not has_statistics(nn.BatchNorm1d(3, track_running_stats=False))
    assert not has_statistics(nn.Sequential(HomeMadeNorm(3)))
