"""Transformations that keep the function: where they are found, where they are not, and that they keep it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsharp import InputError, ScaleGroups, exact_norms
from bnsharp import params as P
from bnsharp.channels import Columns, Site
from bnsharp.models import build
from bnsharp.modes import measuring
from bnsharp.transformations import Permutation, ReluRescaling, ScaleRescaling, Transformation, find
from bnsharp.types import Params

VECTORS, IMAGES, TOKENS = (12, 6), (8, 3, 8, 8), (8, 5, 8)


def chain(*widths: int, act: type[nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """Linear layers with a normalizer and an activation between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), *([norm(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def convolutional(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


class Residual(nn.Module):
    """``h + B relu(A relu(h))`` with ``h = stem(x)``, read by a head: one stream, one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h + self.b(torch.relu(self.a(torch.relu(h)))))


class Skip(nn.Module):
    """The channels are the output as well: whatever writes them cannot be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return h + torch.tanh(self.b(h))


class Tied(nn.Module):
    """One square weight for both layers: its columns read the inputs too, which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Recurrent(nn.Module):
    """A weight whose rows and columns are the same channels, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inputs(x)
        h = torch.relu(u)
        for _ in range(2):
            h = torch.relu(u + self.hidden(h))
        return self.head(h)


class ChannelsLast(nn.Module):
    """Squared ReLU (degree 2), flattened with channels last, the reader registered before the writer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.conv = nn.Linear(36, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(torch.relu(self.conv(x)).square(), 2).permute(0, 2, 3, 1).flatten(1))


class Attention(nn.Module):
    """Two heads of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shuffled(nn.Module):
    """Row r is read by column r + 1: a pattern that is not looked for and must not be mistaken."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x).roll(1, dims=1)))


def rows(*names: str) -> set[str]:
    return {f"{layer}.{kind}" for layer in names for kind in ("weight", "bias")}


# network, shape of its inputs, sites of the rescaling and of the permutation: rows, columns (with outer), and last a
# degree or the number of blocks
Expected = list[tuple[set[str], list[tuple[str, int]], float]]
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Expected, Expected]] = {
    "relu": (lambda: chain(6, 8, 8, 3), VECTORS,
             [(rows("0"), [("2.weight", 1)], 1), (rows("2"), [("4.weight", 1)], 1)],
             [(rows("0"), [("2.weight", 1)], 1), (rows("2"), [("4.weight", 1)], 1)]),
    "tanh": (lambda: chain(6, 8, 7, 3, act=nn.Tanh), VECTORS, [],
             [(rows("0"), [("2.weight", 1)], 1), (rows("2"), [("4.weight", 1)], 1)]),
    "batch norm": (
        lambda: chain(6, 8, 8, 3, norm=nn.BatchNorm1d), VECTORS,
        [(rows("1"), [("3.weight", 1)], 1), (rows("4"), [("6.weight", 1)], 1)],
        [({"0.weight", *rows("1")}, [("3.weight", 1)], 1), ({"3.weight", *rows("4")}, [("6.weight", 1)], 1)],
    ),
    "layer norm": (lambda: chain(6, 8, 3, norm=nn.LayerNorm), VECTORS,
                   [(rows("1"), [("3.weight", 1)], 1)], [(rows("0", "1"), [("3.weight", 1)], 1)]),
    "layer norm, tanh": (lambda: chain(6, 8, 3, norm=nn.LayerNorm, act=nn.Tanh), VECTORS,
                         [], [(rows("0", "1"), [("3.weight", 1)], 1)]),
    "group norm": (lambda: convolutional(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), channels=8), IMAGES,
                   [(rows("1"), [("5.weight", 1)], 1)], [(rows("0", "1"), [("5.weight", 1)], 4)]),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
                  IMAGES, [(rows("0"), [("4.weight", 1)], 1)], [(rows("0"), [("4.weight", 1)], 1)]),
    "channels last": (ChannelsLast, IMAGES,
                      [(rows("conv"), [("head.weight", 9)], 0.5)], [(rows("conv"), [("head.weight", 9)], 1)]),
    "depthwise": (lambda: convolutional(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), channels=8),
                  IMAGES, [(rows("2"), [("6.weight", 1)], 1)], [(rows("0", "2"), [("6.weight", 1)], 1)]),
    "grouped": (lambda: convolutional(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), channels=8), IMAGES,
                [(rows("2"), [("6.weight", 1)], 1)], [(rows("2"), [("6.weight", 1)], 2)]),
    "residual": (Residual, VECTORS,
                 [(rows("stem", "b"), [("a.weight", 1), ("head.weight", 1)], 1), (rows("a"), [("b.weight", 1)], 1)],
                 [(rows("stem", "b"), [("a.weight", 1), ("head.weight", 1)], 1), (rows("a"), [("b.weight", 1)], 1)]),
    "recurrent": (Recurrent, VECTORS,
                  [(rows("inputs", "hidden"), [("hidden.weight", 1), ("head.weight", 1)], 1)],
                  [(rows("inputs", "hidden"), [("hidden.weight", 1), ("head.weight", 1)], 1)]),
    "attention": (Attention, TOKENS, [(rows("v"), [("o.weight", 1)], 1)], [(rows("v"), [("o.weight", 1)], 2)]),
    "skip to the output": (Skip, VECTORS, [], []),
    "tied": (Tied, VECTORS, [], []),
    "shuffled": (Shuffled, VECTORS, [], []),
    "one layer": (lambda: nn.Linear(6, 3), VECTORS, [], []),
}


def made(name: str) -> tuple[nn.Module, Tensor, dict[str, Transformation]]:
    torch.manual_seed(0)
    module, shape = CASES[name][0](), CASES[name][1]
    x = torch.randn(shape, dtype=torch.float64)
    return module, x, find(module, x)


def output(module: nn.Module, params: Params, x: Tensor) -> Tensor:
    with torch.no_grad(), exact_norms(module), measuring(module):
        return torch.func.functional_call(module.double(), dict(params.items()), (x,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_expected(sites: tuple[Site, ...], last: Callable[[Site], Any]) -> Expected:
    return [(set(s.rows), [(c.name, c.outer) for c in s.columns], last(s)) for s in sites]


@pytest.mark.parametrize("name", CASES)
def test_found_where_it_applies_and_the_function_stays(name: str) -> None:
    """All sites and no others; outputs of transformed networks equal to 1e-10 in float64, at the network's own θ."""
    module, x, found = made(name)
    relu, permutation = found["relu_rescaling"], found["permutation"]
    assert as_expected(relu.sites, lambda s: s.degrees[0]) == CASES[name][2]
    assert all(len(set(s.degrees)) == 1 for s in relu.sites)
    assert as_expected(permutation.sites, lambda s: s.blocks) == CASES[name][3]
    theta = P.pmap(Tensor.double, P.parameters(module))
    before = output(module, theta, x)
    for transformation in found.values():
        assert transformation.residual < 1e-10
        for seed in range(3):
            other = transformation.apply(theta, generator(seed))
            assert list(other.keys()) == list(theta.keys())
            moved = any(not torch.equal(other[k], theta[k]) for k in theta.keys())
            assert moved == bool(transformation.sites)
            assert float((output(module, other, x) - before).abs().max()) <= 1e-10 * float(before.abs().max())


def test_every_part_of_a_site_is_needed() -> None:
    """A site without one of its members, or with the wrong degree or blocks, changes the output."""
    for name in ("relu", "residual", "layer norm", "grouped", "flattened"):
        module, x, found = made(name)
        theta = P.pmap(lambda p: p.double() + 0.3 * torch.randn(p.shape), P.parameters(module))  # no bias is zero
        before = output(module, theta, x)
        relu, permutation = found["relu_rescaling"], found["permutation"]
        for other in [*broken(relu.sites[0], ReluRescaling), *broken(permutation.sites[0], Permutation)]:
            assert float((output(module, other.apply(theta, generator()), x) - before).abs().max()) > 1e-6, other


def broken(site: Site, kind: type[Transformation]) -> Iterator[Transformation]:
    for i, _ in enumerate(site.rows):
        kept = tuple(k for j, k in enumerate(site.rows) if j != i)
        yield kind((Site(site.channels, kept, site.columns, site.degrees[1:], site.blocks),))
    for i, _ in enumerate(site.columns):
        kept_columns = tuple(c for j, c in enumerate(site.columns) if j != i)
        yield kind((Site(site.channels, site.rows, kept_columns, site.degrees, site.blocks),))
    if site.degrees:
        yield kind((Site(site.channels, site.rows, site.columns, tuple(2 * d for d in site.degrees)),))


@pytest.mark.parametrize("seed", range(3))
def test_all_of_ten_narrow_layers_are_found(seed: int) -> None:
    """Where half of six channels are masked everywhere, hardly a signal is left."""
    torch.manual_seed(seed)
    module = chain(6, *[6] * 10, 3)
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
            nn.init.normal_(m.bias, std=0.3)
    found = find(module, torch.randn(VECTORS))
    assert len(found["relu_rescaling"].sites) == len(found["permutation"].sites) == 10


def test_nothing_is_found_behind_a_layer_that_passes_no_signal() -> None:
    """All weights read zeros there, so that any map of them would pass every check."""
    torch.manual_seed(0)
    module = chain(6, 8, 8, 8, 3)
    with torch.no_grad():
        module[0].bias.sub_(1e3)  # type: ignore[index, union-attr, operator]
    found = find(module, torch.randn(VECTORS))
    for kind in ("relu_rescaling", "permutation"):
        assert [set(s.rows) for s in found[kind].sites] == [rows("4")]


def test_batch_norm_networks_have_their_scale_groups() -> None:
    module, _, found = made("batch norm")
    rescaling = found["rescaling"]
    assert isinstance(rescaling, ScaleRescaling)
    assert {k for g in rescaling.sites for k in g.members} >= {"0.weight", "3.weight"}
    assert not {"0.bias", "3.bias"} & {k for g in rescaling.sites for k in g.members}  # inert
    theta = P.parameters(module)
    same = rescaling.groups.rescale(theta, rescaling.groups.random_factors(theta, generator()))
    assert all(torch.equal(rescaling.apply(theta, generator())[k], same[k]) for k in theta.keys())


@pytest.mark.parametrize("model", ["bn-mlp", "lenet-bn", "conv-bn"])
def test_registered_models_have_a_site_behind_every_normalizer(model: str) -> None:
    module = build(model, (1, 12, 12), 5, seed=0)
    found = find(module, torch.randn(8, 1, 12, 12))
    hidden = [k for k, m in module.named_modules() if "Norm" in type(m).__name__ and k != "norm_head"]
    for kind in ("relu_rescaling", "permutation"):
        sites = found[kind].sites
        assert [next(k for k in s.rows if "norm" in k) for s in sites] == [f"{k}.weight" for k in hidden]


def test_a_whole_residual_stream_is_one_site() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    module = torchvision.models.resnet18(num_classes=3)
    for m in [*module.modules()]:  # the same graph with an eighth of the channels
        for name in ("in_channels", "out_channels", "num_features", "in_features"):
            if getattr(m, name, 0) > 3:
                setattr(m, name, getattr(m, name) // 8)
        for name, p in list(m._parameters.items()):
            if p is not None:
                shape = [n // 8 if n >= 64 else n for n in p.shape]
                m._parameters[name] = nn.Parameter(torch.randn(shape) * 0.3)
        for name, b in list(m._buffers.items()):
            if b is not None and b.ndim:
                m._buffers[name] = b[: len(b) // 8].clone()
    found = find(module, torch.randn(4, 3, 16, 16))
    for kind in ("relu_rescaling", "permutation"):
        assert [len(s.columns) for s in found[kind].sites] == [4, 1, 1, 1, 3, 1, 1, 3, 1, 1, 2, 1], kind
    stream = found["permutation"].sites[0]
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv2.weight", "layer1.1.bn2.weight"} <= set(stream.rows)
    assert Columns("layer2.0.downsample.0.weight") in stream.columns


def test_the_module_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    module, x = chain(6, 8, 8, 3, norm=nn.BatchNorm1d), torch.randn(VECTORS)
    before = snapshot(module)
    found = find(module, x)
    found["permutation"].apply(P.live(module), generator())
    found["relu_rescaling"].apply(P.live(module), generator())
    assert_same(before, snapshot(module))


NETWORKS = {name: made(name) for name in ("batch norm", "attention", "channels last", "recurrent")}


@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 2**20), st.sampled_from([torch.float32, torch.float64]))
def test_one_seed_is_one_transformation(name: str, seed: int, dtype: torch.dtype) -> None:
    module, _, found = NETWORKS[name]
    theta = P.pmap(lambda p: p.to(dtype), P.parameters(module))
    kept = P.pmap(torch.clone, theta)
    for transformation in found.values():
        first, second = (transformation.apply(theta, generator(seed)) for _ in range(2))
        for k in theta.keys():
            assert torch.equal(first[k], second[k]) and first[k].dtype == dtype and first[k].shape == theta[k].shape
            assert torch.equal(theta[k], kept[k])
            assert first[k].data_ptr() != theta[k].data_ptr() or transformation.name == "rescaling"


@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 2**20))
def test_inverse_factors_and_orders_undo(name: str, seed: int) -> None:
    module, _, found = NETWORKS[name]
    theta = P.pmap(Tensor.double, P.parameters(module))
    relu, permutation = found["relu_rescaling"], found["permutation"]
    assert isinstance(relu, ReluRescaling) and isinstance(permutation, Permutation)
    factors = relu.random_factors(theta, generator(seed))
    assert all(bool(((a >= 0.1) & (a <= 10)).all()) for a in factors)
    back = relu.rescale(relu.rescale(theta, factors), [1 / a for a in factors])
    orders = permutation.random_orders(theta, generator(seed))
    for site, order in zip(permutation.sites, orders, strict=True):
        block = site.channels // site.blocks
        assert sorted(order.tolist()) == list(range(site.channels))
        assert torch.equal(order // block, torch.arange(site.channels) // block)
        assert not torch.equal(order, torch.arange(site.channels))
    same = permutation.permute(permutation.permute(theta, orders), [order.argsort() for order in orders])
    for k in theta.keys():
        assert torch.allclose(back[k], theta[k], rtol=1e-13, atol=0)
        assert torch.equal(same[k], theta[k])


def test_running_statistics_do_not_move_along() -> None:
    """A permutation keeps the function under batch statistics; the running ones are not parameters."""
    module, x, found = made("batch norm")
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):
            assert m.running_mean is not None
            m.running_mean.normal_()
    theta = P.pmap(Tensor.double, P.parameters(module))
    other = found["permutation"].apply(theta, generator())
    with torch.no_grad(), measuring(module.double(), "running"):
        a, b = (torch.func.functional_call(module, dict(t.items()), (x,)) for t in (theta, other))
    assert float((a - b).abs().max()) > 1e-3


def test_errors() -> None:
    module, x, found = made("batch norm")
    theta = P.parameters(module)
    relu, permutation = found["relu_rescaling"], found["permutation"]
    assert isinstance(relu, ReluRescaling) and isinstance(permutation, Permutation)
    for transformation in found.values():
        with pytest.raises(InputError, match="generator"):
            transformation.apply(theta, None)
        with pytest.raises(InputError):
            transformation.apply(P.make({"w": torch.zeros(3)}), generator())
    with pytest.raises(InputError, match="sites"):
        relu.rescale(theta, [])
    with pytest.raises(InputError, match="channels"):
        permutation.permute(theta, [torch.arange(3)] * 2)
    with pytest.raises(InputError, match="share"):
        permutation.apply(P.pmap(lambda p: p[:4], theta), generator())
    with pytest.raises(InputError, match="low"):
        find(module, x, low=0.0)
    with pytest.raises(InputError, match="scale-invariant"):
        find(module, x, ScaleGroups({"6.weight": "tensor"}))
    with pytest.raises(InputError, match="examples"):
        find(module, x[:2])


def test_groups_given_by_hand_are_verified_and_used() -> None:
    module, x, _ = made("batch norm")
    groups = ScaleGroups({"0.weight": "row"})
    rescaling = find(module, x, groups)["rescaling"]
    assert [g.members for g in rescaling.sites] == [("0.weight",)] and 0 < rescaling.residual < 1e-10
