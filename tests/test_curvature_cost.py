"""Hessian products, eigenvalues and traces: cheaper ways give the numbers of the slow and obvious ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnsharp import params as P
from bnsharp.composed import Composed
from bnsharp.evaluation import as_objective
from bnsharp.forms import GradientGraph

# ---------------------------------------------------------------- layers made of other operations

LAYOUTS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2, stride=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)), (3, 4, 7, 8)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), (3, 4, 6, 6)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (3, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 5)),
    "same padding": (nn.Conv2d(4, 6, 3, padding="same"), (3, 4, 5, 5)),
    "no batch": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (3, 4, 5, 5)),
    "batch norm": (nn.BatchNorm2d(4, eps=1e-3), (3, 4, 5, 5)),
    "batch norm, running": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "batch norm, plain": (nn.BatchNorm2d(4, affine=False, track_running_stats=False), (3, 4, 5, 5)),
}


def derivatives(layer: nn.Module, x: Tensor, composed: bool) -> list[Tensor]:
    """Value, gradients, and products of the Hessian of ``Σ tanh(layer(layer'(x)))`` in x and all parameters."""
    inputs = [x.clone().requires_grad_(), *layer.parameters()]
    generator = torch.Generator().manual_seed(1)
    with Composed(2 if composed else 0):
        value = (layer(torch.sin(inputs[0])).tanh() ** 2).sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        v = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs]
        return [value, *first, *torch.autograd.grad(first, inputs, v)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_composed_layers_have_the_derivatives_of_the_originals(name: str) -> None:
    layer, shape = LAYOUTS[name]
    layer = layer.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    for ours, theirs in zip(derivatives(layer, x, True), derivatives(layer, x, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_composed_convolutions_can_be_differentiated_three_times() -> None:
    layer, x = nn.Conv2d(2, 3, 2).double(), torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def composed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with Composed(2):
            return F.conv2d(x, w, b).tanh()

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradgradcheck(composed, inputs)

    def slope(*inputs: Tensor) -> Tensor:
        return torch.autograd.grad(composed(*inputs).pow(2).sum(), inputs[1], create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, inputs)


def test_composed_layers_leave_other_uses_alone() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    other = nn.BatchNorm1d(3)
    with Composed(2):
        first = norm(x)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(x[:1])
        per_example = torch.func.vmap(lambda a: F.conv1d(a[None, None], torch.ones(1, 1, 2)))(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.conv1d(x[:, None], torch.ones(1, 1, 2)).dtype == torch.bfloat16
        half = F.batch_norm(x.bfloat16(), None, None, training=True)
    torch.testing.assert_close(first, other(x))
    torch.testing.assert_close(norm.running_var, other.running_var)
    torch.testing.assert_close(per_example[:, 0, 0], x[:, 1:] + x[:, :-1])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, F.batch_norm(x.bfloat16(), None, None, training=True), rtol=0.02, atol=0.01)


def test_products_of_a_convolutional_network_against_differences_of_gradients() -> None:
    """A smooth network: central differences of gradients in float64."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(c, track_running_stats=False) for c in (3, 4)]
    net = nn.Sequential(nn.Conv2d(1, 3, 3), norms[0], nn.Tanh(), nn.Conv2d(3, 4, 3), norms[1], nn.Tanh(), nn.Flatten(),
                        nn.Linear(4 * 9, 3)).double()
    x, y = torch.randn(6, 1, 7, 7, dtype=torch.float64), torch.arange(6) % 3
    theta = P.parameters(net)

    def loss(params: P.Params) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, dict(params.items()), (x,)), y)

    v, h = P.pmap(torch.randn_like, theta), 1e-5
    product, objective = GradientGraph(loss, theta).product(v), as_objective(loss)
    up, down = (objective.value_and_grad(P.shift(theta, v, s * h))[1] for s in (1, -1))
    for k in theta.keys():
        torch.testing.assert_close(product[k], (up[k] - down[k]) / (2 * h), rtol=1e-5, atol=1e-6)
