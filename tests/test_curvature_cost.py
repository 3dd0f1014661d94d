"""Hessian products, eigenvalues and traces: cheaper ways give the numbers of the slow and obvious ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnsharp
from bnsharp import InputError
from bnsharp import params as P
from bnsharp.composed import Composed
from bnsharp.evaluation import as_objective
from bnsharp.forms import GradientGraph
from bnsharp.geometry import Euclidean, Geometry, Groupwise
from bnsharp.measures import hessian_top, hessian_trace
from bnsharp.profiles import Curvature

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


# ---------------------------------------------------------------- traces


def network(batches: int = 1) -> tuple[bnsharp.Objective, P.Params, bnsharp.ScaleGroups]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3
    data = [(x[i::batches], y[i::batches]) for i in range(batches)]
    return bnsharp.Objective(net, F.cross_entropy, data), P.parameters(net), bnsharp.scale_groups(net, x)


def dense(objective: bnsharp.Objective, theta: P.Params, geometry: Geometry) -> Tensor:
    """The form in a law's coordinates, column by column: its trace is the measure."""
    frame, product = geometry.at(theta), objective.hessian(theta)
    std = P.flatten(P.pmap(lambda p, w: w.expand_as(p), theta, frame.ball.coordinate_std(theta)))
    columns = [
        P.flatten(frame.pull(product(frame.place(P.unflatten(std * e, theta))))) * std
        for e in torch.eye(P.numel(theta), dtype=torch.float64)
    ]
    return torch.stack(columns)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("relative", [False, True])
def test_deflated_traces_are_unbiased_and_their_errors_honest(relative: bool, batches: int) -> None:
    """200 repetitions: the mean within 4 standard errors of the exact trace, coverage of 95% intervals, the spread."""
    objective, theta, groups = network(batches)
    geometry = Groupwise(groups) if relative else Euclidean(1.0)
    exact = float(dense(objective, theta, geometry).trace())
    measure, sampling = hessian_trace(geometry=geometry, draws=8), bnsharp.Sampling(deflate=6)
    repetitions = 200 if batches == 1 else 40
    found = [measure(objective, theta, torch.Generator().manual_seed(i), sampling) for i in range(repetitions)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    spread = float(values.std())
    assert abs(float(values.mean()) - exact) < 4 * spread / repetitions**0.5
    inside = sum(f.interval[0] <= exact <= f.interval[1] for f in found) / repetitions
    assert 0.88 <= inside <= 1.0
    assert float(torch.tensor([f.stderr for f in found]).mean()) == pytest.approx(spread, rel=0.25)
    plain = [measure(objective, theta, torch.Generator().manual_seed(i)).stderr for i in range(20)]
    assert spread < 0.9 * sum(plain) / 20
    assert found[0].evaluations["products"] == (14 if batches == 1 else 20) and found[0].draws == 8
    assert (found[0].stderr_data is None) == (batches == 1)


def test_a_basis_of_everything_gives_the_exact_trace() -> None:
    objective, theta, _ = network()
    matrix = dense(objective, theta, Euclidean(1.0))
    found = hessian_trace(draws=2)(objective, theta, sampling=bnsharp.Sampling(deflate=P.numel(theta) + 5))
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-8)
    assert found.stderr <= 1e-8 * found.value


def test_errors_over_batches_see_the_exact_part() -> None:
    """With a basis of everything, the standard error over batches is that of the exact traces of the batches."""
    objective, theta, _ = network(3)
    parts = []
    for batch in objective.batches:
        one = bnsharp.Objective(objective.module, F.cross_entropy, batch)
        parts.append(float(dense(one, theta, Euclidean(1.0)).trace()))
    expected = float(torch.tensor(parts).std() / 3**0.5)
    found = hessian_trace(draws=2)(objective, theta, sampling=bnsharp.Sampling(deflate=P.numel(theta)))
    assert found.value == pytest.approx(sum(parts) / 3, rel=1e-6)
    assert found.stderr_data == pytest.approx(expected, rel=1e-6)


def test_deflation_is_for_traces() -> None:
    objective, theta, _ = network()
    for measure in (bnsharp.measures.gaussian(draws=2), hessian_top(), bnsharp.measures.fisher_rao()):
        with pytest.raises(InputError, match="expected a trace"):
            measure(objective, theta, sampling=bnsharp.Sampling(deflate=3))
    with pytest.raises(InputError, match="deflate"):
        bnsharp.Sampling(deflate=-1)


def test_float32_traces_are_checked_against_float64() -> None:
    objective, theta, _ = network()
    exact = hessian_trace(draws=8)(objective, theta, sampling=bnsharp.Sampling(deflate=6))
    low = P.pmap(Tensor.float, theta)
    found = hessian_trace(draws=8)(objective, low, sampling=bnsharp.Sampling(deflate=6))
    assert found.precision == "float32" and found.value == pytest.approx(exact.value, rel=1e-3)
    assert 0 < found.error < 1e-3 * found.value


# ---------------------------------------------------------------- largest eigenvalues


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_an_eigenvector_orthogonal_to_the_gradient_is_found(tilt: float) -> None:
    """The gradient lies in an invariant subspace without the largest eigenvalue; a gradient of zero does no harm."""
    diagonal = torch.cat([torch.linspace(0, 1, 30, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)])
    theta = P.make({"w": torch.cat([tilt * torch.ones(30), torch.zeros(1)]).double()})
    found = hessian_top()(lambda q: 0.5 * (diagonal * q["w"] ** 2).sum(), theta)
    assert found.value == pytest.approx(5.0, rel=1e-6)
    assert found.upper is not None and 5.0 - 1e-9 <= found.upper <= 5.01


def test_largest_eigenvalue_spends_no_product_twice() -> None:
    objective, theta, _ = network()
    values = torch.linalg.eigvalsh(dense(objective, theta, Euclidean(1.0)))
    found = hessian_top(iterations=5, tolerance=1e-12, certify=0)(objective, theta)
    assert found.evaluations == {"gradients": 0, "losses": 0, "products": 5}
    assert found.value <= float(values[-1]) + 1e-12
    assert found.value == pytest.approx(float(Curvature()(objective, theta, [found.direction])[0].detach()), rel=1e-9)
    several, theta, _ = network(3)
    found, exact = hessian_top(tolerance=1e-8)(several, theta), dense(several, theta, Euclidean(1.0))
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-9)
    assert found.stderr_data is not None
