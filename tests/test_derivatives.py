"""Second and third derivatives: exact through normalizations and across kinks, refused where autograd lacks them."""

from __future__ import annotations

import copy
from typing import Any

import oracles
import pytest
import torch
from helpers import one_line
from strategies import problem
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm

import bnsharp
from bnsharp import InputError, Objective
from bnsharp import params as P
from bnsharp.algorithms import algorithm
from bnsharp.measures import fisher_rao, hessian_top, hessian_trace
from bnsharp.regularizers import Penalty

cross_entropy = nn.functional.cross_entropy


def drawn(like: P.Params, seed: int) -> P.Params:
    generator = torch.Generator().manual_seed(seed)
    return P.pmap(lambda v: torch.randn(v.shape, generator=generator, dtype=v.dtype), like)


# ---------------------------------------------------------------- layers


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(len(x), -1, 8)).mean(1))


def convolutional(norm: nn.Module, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, activation, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def dense(first: nn.Module, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), first, *rest, nn.Tanh(), nn.Linear(8, 3))


LAYERS: dict[str, Any] = {
    "batch": lambda: convolutional(nn.BatchNorm2d(4), nn.ReLU()),
    "batch, not affine": lambda: convolutional(nn.BatchNorm2d(4, affine=False), nn.Softplus()),
    "batch, dense": lambda: dense(nn.Linear(72, 8), nn.BatchNorm1d(8)),
    "instance": lambda: convolutional(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.SiLU()),
    "instance, bare": lambda: convolutional(nn.InstanceNorm2d(4), nn.SiLU()),
    "group": lambda: convolutional(nn.GroupNorm(2, 4), nn.GELU()),
    "layer": lambda: dense(nn.Linear(72, 8), nn.LayerNorm(8)),
    "layer, not affine": lambda: dense(nn.Linear(72, 8), nn.LayerNorm(8, elementwise_affine=False)),
    "root mean square": lambda: dense(nn.Linear(72, 8), nn.RMSNorm(8)),
    "weight": lambda: dense(weight_norm(nn.Linear(72, 8))),
    "weight, whole": lambda: dense(weight_norm(nn.Linear(72, 8), dim=None)),
    "attention": Encoder,
}


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_derivatives_of_normalizations_against_differences(name: str, statistics: str) -> None:
    """``H v`` by differences of gradients, ``∇ vᵀHv`` by differences of ``vᵀHv``."""
    torch.manual_seed(3)
    net = LAYERS[name]().double()
    x, y = torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (6,))
    objective, theta = Objective(net, cross_entropy, (x, y), statistics=statistics), bnsharp.parameters(net)
    v, d, h = drawn(theta, 1), drawn(theta, 2), 1e-5
    ahead, behind = (objective.value_and_grad(P.shift(theta, v, t))[1] for t in (h, -h))
    product = objective.hessian(theta)(v)
    difference = P.scaled(P.combine(1.0, ahead, -1.0, behind), 0.5 / h)
    torch.testing.assert_close(oracles.flatten(product), oracles.flatten(difference), rtol=1e-5, atol=1e-5)

    def form(t: float) -> float:
        return float(P.dot(v, objective.hessian(P.shift(theta, d, t))(v)))

    slope = float(P.dot(objective.hessian_slope(theta, v), d))
    scale = float(P.norm(objective.hessian_slope(theta, v)))
    assert slope == pytest.approx((form(h) - form(-h)) / (2 * h), rel=1e-5, abs=1e-6 * scale)
    leaves = {k: t.clone().requires_grad_() for k, t in theta.items()}
    value = bnsharp.profiles.Curvature()(objective, P.make(leaves), [v])[0]
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(
        torch.cat([g.reshape(-1) for g in grads]), oracles.flatten(objective.hessian_slope(theta, v))
    )


class ByHand(nn.Module):
    """Batch normalization of elementary operations."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        centred = x - x.mean(dims, keepdim=True)
        unit = centred / ((centred**2).mean(dims, keepdim=True) + self.eps).sqrt()
        return self.weight.reshape(shape) * unit + self.bias.reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["hessian_trace", "relative_trace", "hessian_top"])
def test_a_curvature_penalty_across_kinks(name: str, dtype: torch.dtype) -> None:
    """ReLU, max-pooling and 200 examples: differences of gradients would be off by orders of magnitude."""
    p = problem("conv", "relu", seed=2, eps=1e-5, examples=200)
    built = algorithm(f"penalty-{name}", p.groups).regularizer(0)
    assert isinstance(built, Penalty)
    measure = built.measure
    net = copy.deepcopy(p.module).to(dtype)
    objective, theta = Objective(net, p.criterion, (p.x.to(dtype), p.y)), bnsharp.parameters(net)
    _, r = built.penalty(objective, theta, torch.Generator().manual_seed(3))
    u = P.pick(measure.search(bnsharp.anchor.Anchor(objective, theta), torch.Generator().manual_seed(3)).u, 0)
    plain = nn.Sequential(*[ByHand(m) if isinstance(m, nn.BatchNorm2d) else m for m in copy.deepcopy(p.module)])
    leaves = {k: t.clone().requires_grad_() for k, t in p.params.items()}
    held = {k: t.view_as(t) for k, t in leaves.items()}
    v = measure.geometry.place(P.pmap(Tensor.double, u), P.make(leaves))
    loss = p.criterion(torch.func.functional_call(plain, held, (p.x,)), p.y)
    g = torch.autograd.grad(loss, list(held.values()), create_graph=True)
    first = torch.stack([(a * v[k]).sum() for k, a in zip(held, g, strict=True)]).sum()
    hv = torch.autograd.grad(first, list(held.values()), create_graph=True)
    form = torch.stack([(a * v[k]).sum() for k, a in zip(held, hv, strict=True)]).sum()
    exact = torch.cat([a.reshape(-1) for a in torch.autograd.grad(form, list(leaves.values()))])
    error = (oracles.flatten(r).double() - exact).norm() / exact.norm()
    assert float(error) < (1e-9 if dtype == torch.float64 else 1e-3)


# ---------------------------------------------------------------- layers without second derivatives


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return 3 * d * ctx.saved_tensors[0] ** 2


class Detached(Once):
    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return 3 * d.detach() * ctx.saved_tensors[0].detach() ** 2


class Twice(Once):
    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return 3 * d * ctx.saved_tensors[0] ** 2


class Quantised(torch.autograd.Function):
    """Straight-through: linear, and rightly without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d


class Apply(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def network(function: Any, last: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Linear(6, 3)]
    layers.insert(2 if last else 1, Apply(function))  # type: ignore[arg-type]
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (4, 3))  # type: ignore[return-value]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("function", [Once, Detached])
def test_a_layer_without_second_derivatives_is_one_line(function: Any, last: bool) -> None:
    net = network(function, last)
    objective, theta = Objective(net, nn.functional.mse_loss, data()), bnsharp.parameters(net)
    for build in (hessian_top, hessian_trace, fisher_rao):
        with pytest.raises(InputError) as caught:
            build()(objective, theta)
        assert function.__name__ in one_line(caught.value)
        with pytest.raises(InputError, match=function.__name__):
            bnsharp.backward(net, nn.functional.mse_loss, data(), Penalty(build(), "exact"), 0.1)
    # first derivatives are all that these need
    sharpness = bnsharp.measures.epsilon_sharpness(steps=2)(objective, theta)
    assert sharpness.value > 0 and sharpness.upper is None
    bnsharp.backward(net, nn.functional.mse_loss, data(), bnsharp.regularizers.sam())


def test_a_criterion_without_second_derivatives_is_one_line() -> None:
    net = network(Twice, True)

    def criterion(output: Tensor, y: Tensor) -> Tensor:
        return Once.apply(output - y).square().mean()

    with pytest.raises(InputError, match="Once"):
        fisher_rao()(Objective(net, criterion, data()), bnsharp.parameters(net))


@pytest.mark.parametrize("last", [False, True])
def test_a_custom_layer_with_second_derivatives_is_the_plain_one(last: bool) -> None:
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x * x

    custom = network(Twice, last)
    plain = nn.Sequential(*[Cube() if isinstance(m, Apply) else m for m in custom])
    for build in (hessian_top, hessian_trace, fisher_rao):
        a, b = (build()(Objective(n, nn.functional.mse_loss, data()), bnsharp.parameters(n)) for n in (custom, plain))
        assert a.value == pytest.approx(b.value, rel=1e-9)


def test_a_straight_through_layer_is_no_error() -> None:
    net = network(Quantised, False)
    assert hessian_trace()(Objective(net, nn.functional.mse_loss, data()), bnsharp.parameters(net)).value > 0
