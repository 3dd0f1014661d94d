"""The checks of how a measure treats data, shared weights, precision and engines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp.groups import ScaleGroups
from bnsharp.objective import Objective
from bnsharp.testing.check import Rule, agree, for_all, refusal
from bnsharp.testing.measure_subject import Declared
from bnsharp.testing.networks import Network, network
from bnsharp.testing.strategies import Quadratic, networks, quadratics, seeds


def _weighs_batches(declared: Declared) -> None:
    def body(net: Network) -> None:
        x, y = net.x, net.y
        parts = [(x[:5], y[:5]), (x[5:], y[5:])]
        one = declared.value(net.groups, net.objective(), net.params)
        two = declared.value(net.groups, Objective(net.module, net.criterion, parts), net.params)
        agree(
            one.value, two.value, one.slack(two, declared.rtol) + 1e-9 * abs(one.value),
            f"{declared.name}: one batch of 16 gave {{a}}, the same examples as batches of 5 and 11 gave {{b}}",
        )

    for_all(networks(normalizer=("layer", "none"), min_examples=16, max_examples=16), body, declared.examples)


class _Tied(nn.Module):
    """Two layers with one weight, under two names or under one."""

    def __init__(self, two_names: bool, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3)
        if two_names:
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def forward(self, x: Tensor) -> Tensor:
        second = self._modules.get("second", self.first)
        assert second is not None
        return self.head(second(self.first(x).tanh()).tanh())


def _tied_weight(declared: Declared) -> None:
    def body(seed: int) -> None:
        batch = network("none", seed=seed)
        one, two = (
            declared.value(ScaleGroups(), Objective(m, batch.criterion, (batch.x, batch.y)), P.parameters(m))
            for m in (_Tied(False, seed), _Tied(True, seed))
        )
        agree(
            one.value, two.value, one.slack(two, declared.rtol),
            f"{declared.name}: a weight used twice gave {{a}}, the same weight under two names gave {{b}}",
        )

    for_all(seeds(), body, declared.examples)


def _zero_norm(declared: Declared) -> None:
    def body(net: Network) -> None:
        params = net.params
        name = next(iter(net.groups.partition.groups)).members[0]
        params[name][0] = 0.0
        last = list(params.keys())[-1]
        params[last] = torch.zeros_like(params[last])
        declared.value(net.groups, net.objective(), params)  # which requires finite numbers

    for_all(networks(normalizer=("batch", "group"), eps=1e-5), body, declared.examples)


def _float32(declared: Declared) -> None:
    def body(net: Network) -> None:
        one = declared.value(net.groups, net.objective(), net.params)
        two = declared.value(net.groups, net.objective(), P.pmap(Tensor.float, net.params))
        allowed = one.slack(two, 0.05, stated=True)
        agree(one.value, two.value, allowed, f"{declared.name}: float64 gave {{a}}, float32 gave {{b}}")

    for_all(networks(normalizer=("batch", "layer"), eps=1e-5), body, declared.examples)


def _engines(declared: Declared) -> None:
    def body(net: Network) -> None:
        one, two = (
            declared.value(net.groups, net.objective(engine=engine), net.params) for engine in ("loop", "vmap")
        )
        agree(
            one.value, two.value, one.slack(two, declared.rtol),
            f"{declared.name}: engine loop gave {{a}}, engine vmap gave {{b}}",
        )

    for_all(networks(normalizer=("batch", "layer")), body, declared.examples)


def _plain_function(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        one, two = (declared.value(loss.groups, fn, loss.theta) for fn in (loss.objective(), loss))
        agree(
            one.value, two.value, one.slack(two, declared.rtol),
            f"{declared.name}: an objective gave {{a}}, the same loss as a plain function {{b}}",
        )

    for_all(quadratics(), body, declared.examples)


def _refuses_nan(declared: Declared) -> None:
    def body(net: Network) -> None:
        measure, params = declared.made(net.groups), net.params
        next(iter(params.values()))[0] = math.nan
        refusal(
            f"{declared.name}: measuring at parameters with a NaN",
            lambda: measure(net.objective(), params, torch.Generator().manual_seed(0)),
        )

    for_all(networks(normalizer="batch"), body, 1)


DATA_RULES: tuple[Rule[Declared], ...] = (
    Rule("weighs_batches_by_examples", _weighs_batches),
    Rule("counts_a_tied_weight_once", _tied_weight),
    Rule("finite_at_a_group_of_norm_zero", _zero_norm),
    Rule("float32_is_close", _float32),
    Rule("engines_agree", _engines),
    Rule("accepts_a_plain_function", _plain_function),
    Rule("refuses_nan", _refuses_nan),
)
