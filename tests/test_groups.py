"""Scale groups: what is found on networks whose groups are known, and the algebra of rescaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnsharp.params as P
from bnsharp.errors import InputError
from bnsharp.groups import ScaleGroups, scale_groups
from bnsharp.modes import exact_norms, measuring
from bnsharp.partition import Group
from bnsharp.types import Params


class HomeMade(nn.Module):
    """Batch normalization that knows nothing of torch's classes."""

    running_mean: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0) if self.training else self.running_mean
        if self.training:
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(mean, alpha=0.1)
        return self.gain * (x - mean) / (x.var(0, unbiased=False) + self.epsilon).sqrt()


class Tied(nn.Module):
    """One square weight used by two normalized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.second(torch.tanh(self.norm1(self.first(x)))))


class PreActivation(nn.Module):
    """``h = W x``; ``out = h + V relu(BN(h))``: W feeds the skip connection before it is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.branch = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return h + self.branch(torch.relu(self.norm(h)))


class Unused(nn.Module):
    """A head that the output does not use, as auxiliary heads in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.head = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": (torch.tanh(self.used(x)), None), "label": x.argmax(1)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def relu_between(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), *middle)


def conv(*layers: nn.Module, bias: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), *layers, nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 3))


def partly_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8))
    net[3].bias.requires_grad_(False)
    net[1].requires_grad_(False)
    with torch.no_grad():
        net[3].bias.zero_()
    return net


IMAGE, VECTOR = (3, 6, 6), (6,)
NETWORKS: dict[str, tuple[Any, tuple[int, ...], dict[str, str], list[tuple[str, ...]]]] = {
    "linear-bn": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
        VECTOR, {"0.weight": "row", "0.bias": "inert"}, [],
    ),
    "conv-bn": (lambda: conv(nn.BatchNorm2d(8), bias=True), IMAGE, {"0.weight": "row", "0.bias": "inert"}, []),
    "bn on the output": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), VECTOR, {"0.weight": "row", "0.bias": "inert"}, [],
    ),
    "affine, relu, linear, bn": (
        lambda: relu_between(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), VECTOR,
        {"0.weight": "row", "0.bias": "inert", "1.weight": "joint", "1.bias": "joint", "3.weight": "row",
         "3.bias": "inert"},
        [("1.weight", "1.bias", "1")],
    ),
    "affine, relu, depthwise, bn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Tanh()
        ),
        IMAGE,
        {"0.weight": "row", "0.bias": "inert", "1.weight": "joint", "1.bias": "joint", "3.weight": "row",
         "3.bias": "inert"},
        [("1.weight", "1.bias", "8")],
    ),
    "layernorm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
        {"0.weight": "joint", "0.bias": "joint"}, [("0.weight", "0.bias", "1")],
    ),
    "layernorm without bias": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
        {"0.weight": "tensor"}, [],
    ),
    "rmsnorm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
        {"0.weight": "joint", "0.bias": "joint"}, [("0.weight", "0.bias", "1")],
    ),
    "groupnorm": (lambda: conv(nn.GroupNorm(4, 8), bias=False), IMAGE, {"0.weight": "block"}, [("0.weight", "4")]),
    "groupnorm with bias": (
        lambda: conv(nn.GroupNorm(2, 8), bias=True), IMAGE, {"0.weight": "joint", "0.bias": "joint"},
        [("0.weight", "0.bias", "2")],
    ),
    "instancenorm": (
        lambda: conv(nn.InstanceNorm2d(8, affine=True, track_running_stats=True), bias=True), IMAGE,
        {"0.weight": "row", "0.bias": "inert"}, [],
    ),
    "home-made": (
        lambda: nn.Sequential(nn.Linear(6, 8), HomeMade(8), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
        {"0.weight": "row", "0.bias": "inert"}, [],
    ),
    "tied": (Tied, VECTOR, {"first.weight": "row"}, []),
    "pre-activation skip": (PreActivation, VECTOR, {}, []),
    "unused": (Unused, VECTOR, {"head.weight": "inert", "head.bias": "inert"}, []),
    "no invariance": (mlp, VECTOR, {}, []),
    "frozen": (partly_frozen, VECTOR, {"0.weight": "tensor", "3.weight": "tensor"}, []),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
        VECTOR, {"0.parametrizations.weight.original1": "row"}, [],
    ),
    "weight norm, bn": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.Tanh()),
        VECTOR,
        {"0.bias": "inert", "0.parametrizations.weight.original0": "row", "0.parametrizations.weight.original1": "row"},
        [],
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    make, shape, _, _ = NETWORKS[name]
    return make(), torch.randn(12, *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_found(name: str) -> None:
    net, x = build(name)
    groups = scale_groups(net, x)
    _, _, expected, cuts = NETWORKS[name]
    assert groups.invariant == expected
    found = {(*g.members, str(g.blocks)) for g in groups if g.kind in ("joint", "block")}
    assert found == set(cuts)
    for group in groups:
        if group.kind == "row":
            assert group.blocks == P.parameters(net)[group.members[0]].shape[0]
    assert groups.residual < 1e-10 and groups.forwards >= 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["no invariance", "affine, relu, linear, bn", "groupnorm with bias"])
def test_any_seed_finds_the_same(name: str, seed: int) -> None:
    net, x = build(name)
    assert scale_groups(net, x, seed=seed) == scale_groups(net, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_module_is_untouched(name: str) -> None:
    net, x = build(name)
    net.train()
    next(net.children()).eval()

    def snapshot() -> list[Any]:
        tensors = [*net.named_parameters(), *net.named_buffers()]
        return [
            [(m.training, sorted(m.__dict__)) for m in net.modules()],
            [(k, id(t), t.dtype, t.requires_grad, t.grad, t.tolist(), t._version) for k, t in tensors],
            torch.get_rng_state().tolist(),
            x.tolist(),
        ]

    before = snapshot()
    scale_groups(net, x)
    assert snapshot() == before


def test_biases_and_scales_at_initialisation_make_no_false_group() -> None:
    torch.manual_seed(0)
    net = relu_between(nn.Linear(8, 3))
    nn.init.zeros_(net[1].bias)
    nn.init.zeros_(net[3].bias)
    nn.init.zeros_(net[3].weight)
    assert scale_groups(net, torch.randn(8, 6)).invariant == {"0.weight": "row", "0.bias": "inert"}


def test_dead_rows_do_not_hide_a_group_and_do_not_make_one() -> None:
    torch.manual_seed(0)
    net = relu_between(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Tanh())
    with torch.no_grad():
        net[1].weight[:4] = 1e-9
        net[1].bias[:4] = -50.0
    assert scale_groups(net, torch.randn(8, 6)).invariant["0.weight"] == "row"
    dead = mlp()
    with torch.no_grad():
        dead[0].bias[:7] = -100.0
    assert "row" not in scale_groups(dead, torch.randn(8, 6)).invariant.values()


def test_a_dead_layer_at_a_probed_point_makes_nothing_inert() -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        deep = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(4, 4), nn.ReLU())], nn.Linear(4, 2))
        x = torch.randn(12, 4)
        if deep(x).std(0).min() > 0:
            assert scale_groups(deep, x, seed=seed).invariant == {}


def test_values_do_not_matter() -> None:
    """Groups belong to the architecture: weights scaled by T_a, huge or tiny, give the same ones."""
    net, x = build("affine, relu, linear, bn")
    expected = scale_groups(net, x)
    for factor in (1e-6, 1e6):
        with torch.no_grad():
            net[0].weight *= factor
        assert scale_groups(net, x) == expected


def test_transformer_layer_and_keyword_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(6, 5, 8)
    groups = scale_groups(layer, {"src": x})
    assert groups.invariant == scale_groups(layer, (x,)).invariant == {}
    assert groups.forwards == 3


def test_wrapped_modules_give_the_same_names() -> None:
    net, x = build("linear-bn")
    expected = scale_groups(net, x)
    assert scale_groups(torch.compile(net, backend="eager"), x) == expected
    with torch.inference_mode(), torch.autocast("cpu"):
        assert scale_groups(nn.DataParallel(net), x) == expected


def _refused(match: str, call: Any) -> None:
    with pytest.raises(InputError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_bad_networks_and_inputs_are_refused_in_one_line() -> None:
    net, x = build("linear-bn")
    constant = nn.Sequential(nn.Linear(6, 1), nn.LayerNorm(1, elementwise_affine=False))

    class Noisy(nn.Module):
        def __init__(self, generator: torch.Generator | None):
            super().__init__()
            self.linear, self.generator = nn.Linear(6, 3), generator

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.randn(len(x), 3, generator=self.generator)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> str:
            return str(self.linear(x))

    _refused("3 examples", lambda: scale_groups(net, x[:3]))
    _refused("0 examples", lambda: scale_groups(net, "text"))
    _refused("equal", lambda: scale_groups(net, torch.zeros(8, 6)))
    _refused("fails in float64", lambda: scale_groups(net, torch.randn(8, 5)))
    noisy, rng = Noisy(None), torch.get_rng_state()
    _refused("global random state", lambda: scale_groups(noisy, x))
    assert torch.equal(torch.get_rng_state(), rng)
    _refused("differ", lambda: scale_groups(Noisy(torch.Generator()), x))
    _refused("floating tensor", lambda: scale_groups(Text(), x))
    _refused("does not depend", lambda: scale_groups(constant, x))
    _refused("not finite", lambda: scale_groups(net, x * math.nan))
    _refused("requires grad", lambda: scale_groups(nn.ReLU(), x))
    _refused("tolerance", lambda: scale_groups(net, x, tolerance=0.0))


# ---------------------------------------------------------------- the value

SHAPES = {"w": (6, 2, 2), "b": (6,), "v": (4, 3), "u": (2, 5), "s": (), "i": (3,)}
GROUPS = ScaleGroups(
    [
        Group("row", ("v",), 4),
        Group("tensor", ("s",), 1),
        Group("joint", ("w", "b"), 3),
        Group("inert", ("i",), 1),
    ]
)


def point(seed: int) -> Params:
    g = torch.Generator().manual_seed(seed)
    return P.make({k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in SHAPES.items()})


def times(a: Params, b: Params) -> Params:
    return P.make({k: a[k] * b[k] for k in a.keys()})


def close(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-12, atol=1e-14) for k in a.keys())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_norms_and_rescaling_obey_their_laws(seed: int, other: int) -> None:
    p = point(seed)
    g = torch.Generator().manual_seed(other)
    a, b = GROUPS.random_factors(p, g), GROUPS.random_factors(p, g)
    assert set(a.keys()) == {"v", "s", "w", "b"}
    assert close(GROUPS.norms(GROUPS.rescale(p, a)), times(a, GROUPS.norms(p)))
    assert close(GROUPS.rescale(GROUPS.rescale(p, b), a), GROUPS.rescale(p, times(a, b)))
    assert all(v.min() >= 0.1 and v.max() <= 10 for v in a.values())
    assert torch.equal(a["w"].flatten(), a["b"])
    assert torch.equal(GROUPS.rescale(p, a)["u"], p["u"]) and torch.equal(GROUPS.rescale(p, a)["i"], p["i"])


def test_norms_are_the_slow_ones() -> None:
    p = point(0)
    norms = GROUPS.norms(p)
    assert norms["v"].shape == (4, 1) and norms["w"].shape == (6, 1, 1) and norms["b"].shape == (6,)
    assert torch.allclose(norms["v"].squeeze(), torch.stack([r.norm() for r in p["v"]]))
    for block in range(3):
        both = torch.cat([p[k][2 * block : 2 * block + 2].flatten() for k in ("w", "b")])
        assert torch.allclose(norms["w"].flatten()[2 * block : 2 * block + 2], both.norm().expand(2))
    assert torch.allclose(norms["s"], p["s"].abs())


def test_batches_and_gradients_pass_through() -> None:
    p = P.stack([point(0), point(1)])
    assert torch.equal(GROUPS.norms(p)["w"][1], GROUPS.norms(point(1))["w"])
    a = GROUPS.random_factors(point(0), torch.Generator().manual_seed(0))
    assert close(P.pick(GROUPS.rescale(p, a), 1), GROUPS.rescale(point(1), a))
    many = P.stack([a, a])
    assert close(P.pick(GROUPS.rescale(point(1), many), 0), GROUPS.rescale(point(1), a))
    assert GROUPS.rescale(point(0), {}).keys() == point(0).keys()
    each = P.make({"w": torch.tensor([2.0, 3.0], dtype=torch.float64)}, (2,))
    assert torch.equal(GROUPS.rescale(point(0), each)["w"][1], 3 * point(0)["w"])
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    GROUPS.rescale(point(0), {"u": s})["u"].sum().backward()
    assert torch.allclose(s.grad, point(0)["u"].sum())


@pytest.mark.parametrize("name", [k for k, v in NETWORKS.items() if v[2]])
def test_output_does_not_change_under_random_factors(name: str) -> None:
    net, x = build(name)
    groups = scale_groups(net, x)
    net, x = net.double(), x.double()
    p = P.parameters(net)
    with measuring(net, "batch"), exact_norms(net):
        q = groups.rescale(p, groups.random_factors(p, torch.Generator().manual_seed(3)))
        a, b = (torch.func.functional_call(net, dict(t.items()), (x,)) for t in (p, q))
    a, b = (t if isinstance(t, Tensor) else t["logits"][0] for t in (a, b))
    assert (a - b).abs().max() <= 1e-10 * a.abs().max()
    assert name == "unused" or any(not torch.equal(p[k], q[k]) for k in p.keys())


def test_by_hand() -> None:
    groups = ScaleGroups({"w": ("block", 3), "v": "row", "s": "tensor", "i": "inert"})
    assert groups.invariant == {"w": "block", "v": "row", "s": "tensor", "i": "inert"}
    p = point(0)
    assert [g.blocks for g in groups] == [3, 0, 1, 1]
    assert [g.blocks for g in groups.resolve(p)] == [3, 4, 1, 1]
    assert groups.resolve(p).resolve(p) == groups.resolve(p)
    assert [g.members for g in groups.partition] == [("w",), ("v",), ("s",)]
    assert groups.norms(p)["v"].shape == (4, 1)
    by_tensor, jointly = groups.partition_with(p), groups.partition_with(p, "joint")
    assert [(g.members, g.blocks) for g in by_tensor] == [
        (("w",), 3), (("v",), 4), (("s",), 1), (("b",), 1), (("u",), 1)
    ]
    assert [g.members for g in jointly][-1] == ("b", "u")
    everything = ScaleGroups({k: "tensor" for k in SHAPES})
    assert len(everything.partition_with(p, "joint").groups) == len(SHAPES)
    assert ScaleGroups().invariant == {} and ScaleGroups().norms(p).keys() == set()


def test_found_and_given_agree() -> None:
    net, x = build("conv-bn")
    given_groups = ScaleGroups({"0.weight": "row", "0.bias": "inert"}).resolve(P.parameters(net))
    assert given_groups == scale_groups(net, x) and given_groups.forwards == 0
    assert hash(given_groups) == hash(scale_groups(net, x))


def test_bad_groups_are_refused_in_one_line() -> None:
    p = point(0)
    ones = torch.ones((), dtype=torch.float64)
    _refused("expected 'row'", lambda: ScaleGroups({"w": "column"}))
    _refused("joint", lambda: ScaleGroups({"w": "joint"}))
    _refused("integer", lambda: ScaleGroups({"w": ("block", 0)}))
    _refused("unknown kind", lambda: ScaleGroups([Group("column", ("w",), 1)]))
    _refused("members", lambda: ScaleGroups([Group("row", ("w", "b"), 1)]))
    _refused("two scale groups", lambda: ScaleGroups([Group("row", ("w",), 1), Group("tensor", ("w",), 1)]))
    _refused("expected Group", lambda: ScaleGroups([torch.zeros(3, 3)]))  # type: ignore[list-item]
    _refused("not among", lambda: ScaleGroups({"x": "row"}).norms(p))
    _refused("not among", lambda: ScaleGroups([Group("row", ("x",), 4)]).norms(p))
    _refused("not among", lambda: GROUPS.rescale(p, {"x": ones}))
    _refused("divisor", lambda: ScaleGroups({"w": ("block", 4)}).partition_with(p))
    _refused("has 2 rows", lambda: ScaleGroups([Group("row", ("v",), 2)]).partition_with(p))
    _refused("rest='none'", lambda: GROUPS.partition_with(p, "none"))
    for bad in (0.0, -1.0, math.inf, math.nan):
        _refused("finite", lambda bad=bad: GROUPS.rescale(p, {"v": bad}))
    _refused("broadcasts", lambda: GROUPS.rescale(p, {"v": torch.ones(4)}))
    _refused("low=2", lambda: GROUPS.random_factors(p, torch.Generator(), 2.0, 1.0))
    _refused("generator", lambda: GROUPS.random_factors(p, None))


def test_functional_normalization_needs_no_module() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(F.linear(x, F.normalize(self.w, dim=1))))

    torch.manual_seed(0)
    assert scale_groups(Functional(), torch.randn(8, 6)).invariant == {"w": "row"}
