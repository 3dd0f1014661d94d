"""Every context puts a module back exactly as it was, nested and after an exception."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnsharp.errors import InputError
from bnsharp.modes import exact_norms, frozen_statistics, math_attention, measuring, untouched


class HomeMade(nn.Module):
    """Batch normalization in its author's own words: crashes if its buffers are None."""

    running_mean: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_scale", torch.ones(features))
        self.variance_epsilon = 1e-5
        self.updates = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.weight * (x - self.running_mean) / self.running_scale
        mean, scale = x.mean(0), (x.var(0, unbiased=False) + self.variance_epsilon).sqrt()
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(0.1 * mean)
            self.running_scale = 0.9 * self.running_scale + 0.1 * scale
            self.updates += 1
        return self.weight * (x - mean) / scale


class NoRMSNorm(nn.Module):
    """A class-level ε, and attributes called ε that are not numbers."""

    epsilon = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.eps = None


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        nn.Sequential(nn.Linear(6, 6), HomeMade(6)),
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()),
        nn.RMSNorm(6),
        nn.LayerNorm(6),
        nn.BatchNorm1d(6, track_running_stats=False),
    )
    net[1].eval()
    net[3].eval()
    net[3][1].train()
    return net


def state(module: nn.Module) -> list[Any]:
    """Flags, buffers (identity and value) and ε of every submodule."""
    out: list[Any] = []
    for m in module.modules():
        out.append(m.training)
        out += [(k, id(b), None if b is None else b.tolist()) for k, b in m._buffers.items()]
        out.append(sorted((k, v) for k, v in m.__dict__.items() if isinstance(v, int | float)))
        out.append(m.__dict__.get("eps", "absent"))
    return out


CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "batch": lambda m: measuring(m, "batch"),
    "running": lambda m: measuring(m, "running"),
    "frozen": frozen_statistics,
    "exact": exact_norms,
    "attention": lambda m: math_attention(),
    "untouched": untouched,
}


@pytest.mark.parametrize("outer", CONTEXTS)
@pytest.mark.parametrize("inner", CONTEXTS)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(outer: str, inner: str, fails: bool) -> None:
    net = network()
    before = state(net)
    backends = (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())
    try:
        with CONTEXTS[outer](net):
            flags = [m.training for m in net.modules()]
            with CONTEXTS[inner](net):
                if {outer, inner} & {"batch", "running", "frozen"}:
                    net(torch.randn(8, 4))
                if fails:
                    raise KeyError("stop")
            assert [m.training for m in net.modules()] == flags
    except KeyError:
        assert fails
    assert state(net) == before
    assert backends == (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())


def test_measuring_uses_the_statistics_it_names() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), HomeMade(3)).train()
    net[0].running_mean.fill_(5.0)
    x = torch.randn(64, 3) + 2
    with measuring(net, "batch"):
        assert [m.training for m in net.modules()] == [False, True, False, True]
        assert torch.allclose(net(x).mean(0), torch.zeros(3), atol=1e-5)
    with measuring(net, "running"):
        assert not any(m.training for m in net.modules())
        assert torch.allclose(net(x), (x - 5) / (1 + 1e-5) ** 0.5)


def test_running_statistics_are_found_inside_a_context_that_switched_them_off() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    net[0].running_mean.fill_(5.0)
    x = torch.randn(8, 3)
    with frozen_statistics(net):
        with measuring(net, "running"):
            assert torch.allclose(net(x), (x - 5) / (1 + 1e-5) ** 0.5)
            with measuring(net, "batch"):
                assert torch.allclose(net(x).mean(0), torch.zeros(3), atol=1e-5)
        assert net[0].running_mean is None
    assert net[0].running_mean.tolist() == [5.0] * 3


def test_frozen_statistics_keeps_flags_and_dropout() -> None:
    net = network()
    flags = [m.training for m in net.modules()]
    with frozen_statistics(net):
        assert [m.training for m in net.modules()] == flags
        assert not torch.equal(net[2](torch.ones(8, 6)), torch.ones(8, 6))


def test_torch_func_works_through_measuring() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    x, p = torch.randn(8, 4), {k: v.detach() for k, v in net.named_parameters()}
    with measuring(net, "batch"):
        grads = torch.func.grad(lambda q: torch.func.functional_call(net, q, (x,)).square().sum())(p)
    assert grads["1.weight"].abs().min() > 0


def test_exact_norms_makes_every_epsilon_negligible() -> None:
    net = nn.Sequential(network(), NoRMSNorm())
    with exact_norms(net):
        for m in net[0].modules():
            for name in ("eps", "variance_epsilon"):
                assert m.__dict__.get(name, 1e-30) == 1e-30
        assert net[1].epsilon == 1e-30 and net[1].eps is None
        assert torch.isfinite(nn.BatchNorm1d(3, eps=net[0][1].eps)(torch.randn(8, 3))).all()
    assert "epsilon" not in net[1].__dict__ and net[0][5].eps is None


def test_math_attention_has_a_double_backward() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    p = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(q: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, q, (x,)).square().sum()

    with math_attention():
        _, hv = torch.func.jvp(torch.func.grad(loss), (p,), ({k: torch.ones_like(v) for k, v in p.items()},))
    assert all(torch.isfinite(v).all() for v in hv.values())


def test_wrapped_modules_are_reached() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    for wrapped in (torch.compile(net, backend="eager"), nn.DataParallel(net)):
        with measuring(wrapped, "running"), exact_norms(wrapped):
            assert not net.training and net[0].eps == 1e-30
    assert net.training and net[0].eps == 1e-5


def test_unknown_statistics_are_refused_in_one_line() -> None:
    net = network()
    before = state(net)
    with pytest.raises(InputError, match="statistics='both'") as error, measuring(net, "both"):
        pass
    assert "\n" not in str(error.value) and state(net) == before
