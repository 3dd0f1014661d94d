"""The rounding error of a value in low precision: that of whole copies in float64, without holding them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import bn_mlp, cross_entropy, examples, generic
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bnsharp import Measure, Objective, Sampling, ScaleGroups, measures
from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.precision import CHECKED, KEPT, OnDemand, rounding_error

GROUPS = ScaleGroups({"0.weight": "row"})

BUILT: dict[str, Any] = {
    "bn_sharpness": measures.bn_sharpness(GROUPS, delta=0.1, steps=2, restarts=1, nodes=3),
    "gaussian": measures.gaussian(sigma=0.1, draws=5),
    "adaptive": measures.adaptive(steps=1),
    "filter_normalized": measures.filter_normalized(draws=2, nodes=3),
    "keskar": measures.keskar(subspace=5, steps=1),
    "hessian_trace": measures.hessian_trace(draws=2),
    "fisher_rao": measures.fisher_rao(),
}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("name", BUILT)
def test_the_error_is_that_of_whole_copies(name: str, batches: int) -> None:
    measure: Measure = BUILT[name]
    net, (x, y) = generic(bn_mlp()), examples(32)
    data = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    objective, theta = Objective(net, cross_entropy, data), P.parameters(net)
    found = measure.search(Anchor(objective, theta), None)
    n = min(2, P.count(found.u))
    frame, high = measure.geometry.at(theta), P.pmap(Tensor.double, theta)
    values = measure.profile.evaluate(Anchor(objective, theta), [frame.place(P.pick(found.u, i)) for i in range(n)])
    v = [measure.geometry.at(high).place(P.pmap(Tensor.double, P.pick(found.u, i))) for i in range(n)]
    exact = measure.profile.evaluate(Anchor(objective, high), v).values
    assert exact.dtype == torch.float64
    expected = CHECKED * float((values.values.double() - exact).abs().max())
    units = P.Lazy(n, lambda i: P.pick(found.u, i))
    got = rounding_error(values.values, units, measure.profile, measure.geometry, objective, theta)
    assert got == expected > 0


class Held(TorchDispatchMode):
    """The most float64 numbers that were held at once by results of operations while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes() // 8
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
                    self.most = max(self.most, sum(self.sizes.values()))
        return result


def deep_net(layers: int = 24, width: int = 192) -> nn.Sequential:
    """Layers of equal size, each larger than what is kept of small ones."""
    torch.manual_seed(0)
    assert width**2 > KEPT
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
                           for _ in range(layers)), nn.Linear(width, 3))


@pytest.mark.parametrize("name", ["bn_sharpness", "gaussian", "filter_normalized"])
def test_one_copy_in_float64_at_a_time(name: str) -> None:
    """The perturbed point alone: θ, the direction and its unit coordinates are cast tensor by tensor."""
    net = deep_net()
    groups = ScaleGroups({k: "row" for k, p in net.named_parameters() if p.ndim == 2 and p.shape[0] > 3})
    options: dict[str, Any] = {"delta": 0.01, "steps": 1, "nodes": 3} if name == "bn_sharpness" else {"draws": 2}
    measure = measures.build_measure(name, groups if name == "bn_sharpness" else None, **options)
    x, y = torch.randn(8, 192), torch.randint(3, (8,))
    objective, theta = Objective(net, cross_entropy, (x, y)), P.parameters(net)
    with Held() as held:
        estimate = measure(objective, theta, sampling=Sampling(promote=False))
    assert estimate.precision == "float32"
    assert P.numel(theta) <= held.most <= 1.3 * P.numel(theta)


def test_small_tensors_are_made_once() -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.zeros(sizes[name])

    sizes = {"first": KEPT - 2, "large": KEPT, "second": 2, "third": 1}
    point = OnDemand(sizes, make)
    for _ in range(3):
        assert {k: len(v) for k, v in point.items()} == sizes and len(point) == 4
    assert [made.count(name) for name in sizes] == [1, 3, 1, 3]
