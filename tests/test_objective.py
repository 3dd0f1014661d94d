"""Objectives against direct calls, loops and finite differences; what they refuse; what they leave alone."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    HomeMadeNorm,
    assert_close,
    assert_same,
    bn_conv,
    bn_mlp,
    cross_entropy,
    direction,
    double,
    examples,
    generic,
    one_line,
    plain_mlp,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bnsharp
from bnsharp import Engine, Objective, parameters
from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.evaluation import FunctionObjective, as_objective
from bnsharp.types import Params

ENGINES = [Engine("loop"), Engine("vmap", 1), Engine("vmap", 3), Engine("vmap", 64)]
NETWORKS = {"mlp": (bn_mlp, (5,)), "conv": (bn_conv, (2, 4, 4))}
PRECISIONS = {torch.float32: 1e-6, torch.float64: 1e-12}

engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{e.name}-{e.chunk}")
networks = pytest.mark.parametrize("network", sorted(NETWORKS))
precisions = pytest.mark.parametrize("dtype", list(PRECISIONS), ids=lambda d: str(d)[6:])


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest relative deviation."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return float(((got - expected).abs() / expected.abs()).max())


def direct(net: nn.Module, x: Any, y: Tensor, params: Params | None = None, statistics: str = "batch") -> Tensor:
    """The loss by calling a copy of the module: normalizers in train mode, everything else in eval mode."""
    net = copy.deepcopy(net)
    if params is not None:
        net.to(P.first(params).dtype)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name in params.keys():
                    p.copy_(params[name])
    net.eval()
    for m in net.modules():
        if statistics == "batch" and hasattr(m, "running_mean"):
            m.train()
    args, kwargs = ((), x) if isinstance(x, dict) else (x, {}) if isinstance(x, tuple) else ((x,), {})
    with torch.no_grad():
        return cross_entropy(net(*args, **kwargs), y)


def points(params: Params, n: int = 5) -> list[Params]:
    return [P.shift(params, direction(params, seed), 0.1) for seed in range(n)]


class Failing(nn.Module):
    """A network that raises after its normalizers have run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bn_mlp()

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        raise RuntimeError("a fault of the user's module")


# ---------------------------------------------------------------- values


@networks
@precisions
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_value_is_the_modules_loss(network, dtype, statistics):
    make, shape = NETWORKS[network]
    net = make().to(dtype)
    x, y = examples(8, shape, dtype=dtype)
    got = Objective(net, cross_entropy, (x, y), statistics=statistics)(parameters(net))
    assert got.shape == () and relative(got, direct(net, x, y, statistics=statistics)) <= PRECISIONS[dtype]


def test_batch_statistics_are_those_of_the_batch_whatever_the_buffers_and_modes():
    net = bn_mlp()
    x, y = examples(8)
    objective, params = Objective(net, cross_entropy, (x, y)), parameters(net)
    before = objective(params)
    net[1].running_mean.add_(5.0)
    net.eval()
    assert torch.equal(objective(params), before)
    net.train()
    assert torch.equal(objective(params), before)


@engines
@networks
@precisions
def test_many_and_along_are_loops(engine, network, dtype):
    make, shape = NETWORKS[network]
    net = make().to(dtype)
    params, data = parameters(net), examples(8, shape, dtype=dtype)
    objective = Objective(net, cross_entropy, data, engine=engine)
    thetas = points(params)
    expected = torch.stack([direct(net, *data, theta) for theta in thetas])
    with torch.no_grad():
        for source in (P.stack(thetas), P.Lazy(5, lambda i: thetas[i]), thetas):
            assert relative(objective.many(source), expected) <= PRECISIONS[dtype]
        v, t = direction(params), torch.tensor([-0.3, 0.0, 0.2, 0.7], dtype=dtype)
        expected = torch.stack([direct(net, *data, P.shift(params, v, s)) for s in t])
        assert relative(objective.along(params, v, t), expected) <= PRECISIONS[dtype]


@engines
@networks
@precisions
def test_many_gradients_are_loops(engine, network, dtype):
    make, shape = NETWORKS[network]
    net = make().to(dtype)
    objective = Objective(net, cross_entropy, examples(8, shape, dtype=dtype), engine=engine)
    thetas = points(parameters(net))
    losses, gradients = zip(*(objective.value_and_grad(theta) for theta in thetas), strict=True)
    for source in (P.stack(thetas), P.Lazy(5, lambda i: thetas[i])):
        value, gradient = objective.many_value_and_grad(source)
        assert relative(value, torch.stack(losses)) <= PRECISIONS[dtype]
        assert_close(gradient, P.stack(gradients), 3 * PRECISIONS[dtype])
        assert not value.requires_grad and not P.first(gradient).requires_grad
    weights = torch.tensor([[1.0, -2.0, 0.0, 0.5, 3.0], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=dtype)
    got = objective.weighted_gradients(P.Lazy(5, lambda i: thetas[i]), weights)
    explicit = [
        P.make({k: sum(w * g[k] for w, g in zip(row.tolist(), gradients, strict=True)) for k in got.keys()})
        for row in weights
    ]
    assert_close(got, P.stack(explicit), 10 * PRECISIONS[dtype])


@engines
def test_a_weighted_mean_over_batches_of_every_quantity(engine):
    net = plain_mlp().double()
    x, y = examples(10, dtype=torch.float64)
    batches = [(x[:7], y[:7]), (x[7:9], y[7:9]), (x[9:], y[9:])]
    whole, cut = (Objective(net, cross_entropy, data, engine=engine) for data in ((x, y), batches))
    params = parameters(net)
    thetas, v = points(params, 4), direction(params)
    assert relative(cut(params), whole(params)) <= 1e-12
    assert relative(cut.many(thetas), whole.many(thetas)) <= 1e-12
    assert_close(cut.value_and_grad(params)[1], whole.value_and_grad(params)[1], 1e-12)
    assert_close(cut.many_value_and_grad(thetas)[1], whole.many_value_and_grad(thetas)[1], 1e-12)
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(cut.weighted_gradients(thetas, weights), whole.weighted_gradients(thetas, weights), 1e-12)
    assert_close(cut.hessian(params)(v), whole.hessian(params)(v), 1e-12)


@engines
@pytest.mark.parametrize("gradients", [False, True], ids=["losses", "gradients"])
def test_never_more_than_a_chunk_of_points_is_alive(engine, gradients):
    """The bound that makes a sequence made on demand worth having."""
    net = bn_mlp()
    params, alive, most = parameters(net), weakref.WeakSet(), 0

    def make(i: int) -> Params:
        nonlocal most
        item = P.shift(params, params, 0.01 * i)
        alive.add(P.first(item))
        most = max(most, len(alive))
        return item

    objective = Objective(net, cross_entropy, examples(8), engine=engine)
    source = P.Lazy(10, make)
    with torch.no_grad():
        if gradients:
            objective.weighted_gradients(source, torch.ones(1, 10))
        else:
            objective.many(source)
    assert 1 <= most <= (engine.chunk if engine.name == "vmap" else 1)


def test_many_refuses_no_points():
    net = bn_mlp()
    with pytest.raises(InputError) as caught:
        Objective(net, cross_entropy, examples(8)).many([])
    one_line(caught.value)


# ---------------------------------------------------------------- derivatives


@networks
def test_value_and_grad_is_autograd(network):
    make, shape = NETWORKS[network]
    net = make().double()
    x, y = examples(8, shape, dtype=torch.float64)
    value, gradient = Objective(net, cross_entropy, (x, y)).value_and_grad(parameters(net))
    other = copy.deepcopy(net).eval()
    for m in other.modules():
        m.training = hasattr(m, "running_mean")
    loss = cross_entropy(other(x), y)
    loss.backward()
    assert relative(value, loss.detach()) <= 1e-12
    assert_close(gradient, P.make({k: p.grad for k, p in other.named_parameters()}), 1e-12)


def test_the_objective_is_transformable_when_its_data_is_one_batch():
    net = bn_mlp().double()
    objective, params = Objective(net, cross_entropy, examples(8, dtype=torch.float64)), parameters(net)
    _, gradient = objective.value_and_grad(params)
    assert_close(torch.func.grad(objective)(params), gradient, 1e-12)
    v = direction(params)
    _, slope = torch.func.jvp(objective, (params,), (v,))
    torch.testing.assert_close(slope, P.dot(gradient, v), rtol=1e-12, atol=0)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    grads = torch.autograd.grad(objective(P.make(leaves)), list(leaves.values()))
    assert_close(P.make(dict(zip(leaves, grads, strict=True))), gradient, 1e-12)


def test_value_and_grad_can_be_differentiated_by_torch_func():
    net = bn_mlp().double()
    objective, params = Objective(net, cross_entropy, examples(8, dtype=torch.float64)), parameters(net)

    def squared_norm(theta: Params) -> Tensor:
        gradient = objective.value_and_grad(theta)[1]
        return P.dot(gradient, gradient) / 2

    _, gradient = objective.value_and_grad(params)
    assert_close(torch.func.grad(squared_norm)(params), objective.hessian(params)(gradient), 1e-10)


@networks
@pytest.mark.parametrize("batches", [1, 2])
def test_hessian_products_are_finite_differences(network, batches):
    make, shape = NETWORKS[network]
    net = make().double()
    data = [examples(8, shape, seed, torch.float64) for seed in range(batches)]
    objective, params = Objective(net, cross_entropy, data), parameters(net)
    hessian, h = objective.hessian(params), 1e-5
    for seed in (1, 2):
        v = direction(params, seed)
        ahead, behind = (objective.value_and_grad(P.shift(params, v, s))[1] for s in (h, -h))
        assert_close(hessian(v), P.combine(0.5 / h, ahead, -0.5 / h, behind), 1e-6)
    assert not P.first(hessian(v)).requires_grad


def test_a_parameter_that_has_no_influence_has_zero_derivatives():
    net = bn_mlp().double()
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.forward = lambda x: net[4](net[1](net[0](x)))  # type: ignore[method-assign]
    objective, params = Objective(net, cross_entropy, examples(8, dtype=torch.float64)), parameters(net)
    assert not objective.value_and_grad(params)[1]["unused"].any()
    assert not objective.many_value_and_grad([params, params])[1]["unused"].any()
    assert not objective.hessian(params)(direction(params))["unused"].any()


def test_evaluations_are_counted():
    net = bn_mlp()
    objective, params = Objective(net, cross_entropy, examples(8)), parameters(net)
    objective(params)
    objective.along(params, params, torch.tensor([0.1, 0.2]))
    objective.value_and_grad(params)
    objective.many_value_and_grad([params] * 3)
    objective.weighted_gradients([params] * 2, torch.ones(1, 2))
    objective.hessian(params)(params)
    assert dict(objective.evaluations) == {"losses": 3, "gradients": 6, "products": 1}


# ---------------------------------------------------------------- plain functions and forms of data


def quadratic(params: Params) -> Tensor:
    return 0.5 * P.dot(params, params) + params["w"].sum()


def test_a_plain_function_is_an_objective():
    theta = P.make({"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "s": torch.tensor(3.0, dtype=torch.float64)})
    for engine in ENGINES:
        objective = FunctionObjective(quadratic, engine)
        value, gradient = objective.value_and_grad(theta)
        assert float(objective(theta)) == float(value) == 7.0 + 3.0
        assert gradient["w"].tolist() == [2.0, 3.0] and float(gradient["s"]) == 3.0
        v = direction(theta)
        assert_close(objective.hessian(theta)(v), v, 1e-15)
        expected = torch.stack([quadratic(P.shift(theta, v, t)) for t in (0.1, 0.2)])
        assert relative(objective.along(theta, v, torch.tensor([0.1, 0.2], dtype=torch.float64)), expected) <= 1e-15
        assert objective.statistics is None and objective.batch_size is None
    own = FunctionObjective(quadratic)
    assert as_objective(own) is own and as_objective(quadratic).fn is quadratic
    with pytest.raises(InputError) as caught:
        as_objective(3)  # type: ignore[arg-type]
    assert "int" in one_line(caught.value)


class Sum(nn.Module):
    """Two inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(5, 3), nn.Linear(2, 3), nn.BatchNorm1d(3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.norm(self.a(left) + self.b(right))


def test_inputs_may_be_a_tuple_or_a_dictionary():
    net = Sum()
    left, y = examples(8)
    right, _ = examples(8, (2,), seed=2)
    expected = direct(net, (left, right), y)
    for x in ((left, right), {"right": right, "left": left}):
        objective = Objective(net, cross_entropy, (x, y))
        assert relative(objective(parameters(net)), expected) <= 1e-6 and objective.batch_size == 8
        objective.check(parameters(net))
    batches = [({"left": left, "right": right}, y), ((left, right), y)]
    assert relative(Objective(net, cross_entropy, batches)(parameters(net)), expected) <= 1e-6


def test_outputs_may_be_anything_the_criterion_takes():
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bn_mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    net, (x, y) = Dictionary(), examples(8)
    got = Objective(net, lambda out, y: cross_entropy(out["logits"], y), (x, y))(parameters(net))
    assert relative(got, direct(net.inner, x, y)) <= 1e-6


def test_targets_may_be_anything_the_criterion_takes():
    net, (x, y) = bn_mlp(), examples(8)

    def criterion(out: Tensor, target: dict[str, Tensor]) -> Tensor:
        return cross_entropy(out, target["label"])

    got = Objective(net, criterion, [(x, {"label": y})])(parameters(net))
    assert relative(got, direct(net, x, y)) <= 1e-6
    assert torch.equal(Objective(net, criterion, (x, {"label": y}))(parameters(net)), got)


def test_a_data_loader_and_a_list_of_batches_are_the_same_data():
    net, (x, y) = bn_mlp(), examples(11)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    a, b = (Objective(net, cross_entropy, d) for d in (loader, [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]))
    assert torch.equal(a(parameters(net)), b(parameters(net))) and a.batch_size == b.batch_size == 4
    two = Objective(net, cross_entropy, [(x[:4], y[:4]), [x[4:], y[4:]]])
    expected = (4 * direct(net, x[:4], y[:4]) + 7 * direct(net, x[4:], y[4:])) / 11
    assert relative(two(parameters(net)), expected) <= 1e-6
    pair = [x, y]
    assert torch.equal(Objective(net, cross_entropy, pair)(parameters(net)), direct(net, x, y))


# ---------------------------------------------------------------- what is refused


class Noise(nn.Module):
    """A network with its own generator, random in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = bn_mlp(), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn(x.shape, generator=self.generator))


class AlwaysDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = bn_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(nn.functional.dropout(x, 0.5, training=True))


def mean(out: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(out, y)


def one_shot() -> Iterator[Any]:
    yield examples(8)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(8)), batch_size=4, **options)


REFUSED_DATA = {
    "a generator": (one_shot, "iterate"),
    "an iterator": (lambda: iter([examples(8)]), "iterate"),
    "a zip": (lambda: zip([examples(8)[0]], [examples(8)[1]], strict=True), "iterate"),
    "a number": (lambda: 3, "batches"),
    "nothing": (lambda: None, "batches"),
    "no batches": (list, "no batch"),
    "an empty loader": (lambda: loader(drop_last=True, sampler=[]), "no batch"),
    "a shuffling loader": (lambda: loader(shuffle=True), "shuffle"),
    "no tensor": (lambda: (3, torch.zeros(2)), "tensor"),
    "a 0-d input": (lambda: (torch.tensor(1.0), torch.zeros(2)), "dimension 0"),
}


@pytest.mark.parametrize("name", sorted(REFUSED_DATA))
def test_unfit_data_is_refused_in_one_line(name):
    make, word = REFUSED_DATA[name]
    with pytest.raises(InputError) as caught:
        Objective(bn_mlp(), cross_entropy, make())
    assert word in one_line(caught.value)


def test_unknown_statistics_and_engines_are_refused_in_one_line():
    for make in (
        lambda: Objective(bn_mlp(), cross_entropy, examples(8), statistics="moving"),
        lambda: Objective(bn_mlp(), cross_entropy, examples(8), engine="pmap"),
        lambda: Engine("vmap", 0),
    ):
        with pytest.raises(InputError) as caught:
            make()
        one_line(caught.value)


@pytest.mark.parametrize("make", [
    lambda out, y: cross_entropy(out, y, reduction="none"),
    lambda out, y: cross_entropy(out, y).reshape(1),
    lambda out, y: float(cross_entropy(out, y)),
    lambda out, y: None,
], ids=["per example", "one element", "float", "none"])
def test_a_criterion_that_is_no_scalar_is_refused_in_one_line(make):
    net = bn_mlp()
    with torch.no_grad(), pytest.raises(InputError) as caught:
        Objective(net, make, examples(8))(parameters(net))
    assert "scalar" in one_line(caught.value)


def test_a_batch_of_one_has_no_batch_statistics():
    net = bn_mlp()
    for data in (examples(1), [examples(8), examples(1)]):
        with pytest.raises(InputError) as caught:
            Objective(net, cross_entropy, data)(parameters(net))
        assert "running" in one_line(caught.value)
    x, y = examples(1)
    running = Objective(net, cross_entropy, (x, y), statistics="running")
    assert relative(running(parameters(net)), direct(net, x, y, statistics="running")) <= 1e-6


def test_unknown_parameter_keys_are_refused_in_one_line():
    net = bn_mlp()
    objective, params = Objective(net, cross_entropy, examples(8)), dict(parameters(net).items())
    with pytest.raises(InputError) as caught:
        objective(P.make({**params, "9.weight": torch.zeros(2)}))
    assert "9.weight" in one_line(caught.value)


@pytest.mark.parametrize("make", [AlwaysDropout, Noise])
def test_a_layer_that_stays_random_is_refused_in_one_line(make):
    net = make()
    objective, params, state = Objective(net, cross_entropy, examples(8)), parameters(net), torch.get_rng_state()
    for _ in range(2):  # not only the first time
        with pytest.raises(InputError) as caught:
            objective.check(params)
        assert make.__name__ in one_line(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_measure_refuses_a_random_network():
    from bnsharp import measures

    net = AlwaysDropout()
    objective = Objective(net, cross_entropy, examples(8))
    for measure in (measures.gaussian(draws=2), measures.epsilon_sharpness(steps=0), measures.hessian_top()):
        with pytest.raises(InputError, match="stays random"):
            measure(objective, parameters(net))


@pytest.mark.parametrize("make", [bn_mlp, bn_conv, plain_mlp])
def test_a_deterministic_network_passes_the_check(make):
    net = make()
    data = examples(100, (2, 4, 4) if make is bn_conv else (5,))
    Objective(net, cross_entropy, data).check(parameters(net))
    Objective(net, cross_entropy, data, statistics="running").check(parameters(net))


# ---------------------------------------------------------------- what measuring leaves alone


def mixed() -> nn.Sequential:
    """Mixed modes, a frozen parameter, a stored gradient, a home-made normalization."""
    torch.manual_seed(0)
    net = generic(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), HomeMadeNorm(7), nn.Linear(7, 3)))
    net[0].bias.requires_grad_(False)
    net[4].bias.grad = torch.ones(3)
    net.train()
    net[1].eval()
    return net


def evaluate_everything(objective: Objective, params: Params) -> None:
    objective(params)
    objective.value_and_grad(params)
    objective.many(P.stack([params, params]))
    objective.many_value_and_grad([params, params])
    objective.weighted_gradients([params, params], torch.ones(1, 2))
    objective.hessian(params)(params)
    objective.check(params)
    torch.func.grad(objective)(params)


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("dtype", list(PRECISIONS), ids=lambda d: str(d)[6:])
def test_measuring_leaves_the_module_and_the_random_state_alone(statistics, dtype):
    net = mixed()
    params, data = P.pmap(lambda p: p.to(dtype), parameters(net)), examples(8, dtype=dtype)
    before = snapshot(net)
    for batches in (data, [data, data]):
        objective = Objective(net, cross_entropy, batches, statistics=statistics)
        if isinstance(batches, tuple):
            evaluate_everything(objective, params)
        else:
            objective.value_and_grad(params)
            objective.hessian(params)(params)
        assert_same(before, snapshot(net))


def explode(out: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("a fault of the user's criterion")


@pytest.mark.parametrize(("fault", "call"), [
    *itertools.product(
        ["module", "criterion", "vector"], ["value", "value_and_grad", "many", "hessian", "check", "grad"]
    ),
    ("random", "check"),  # only the check knows of random layers
])
def test_so_does_a_measurement_that_fails(fault, call):
    net = {"module": Failing, "random": AlwaysDropout}.get(fault, bn_mlp)()
    criterion = {"criterion": explode, "vector": lambda out, y: out, "random": lambda out, y: out}.get(fault, mean)
    objective, params = Objective(net, criterion, examples(8)), parameters(net)
    calls = {
        "value": lambda: objective(params), "value_and_grad": lambda: objective.value_and_grad(params),
        "many": lambda: objective.many([params, params]), "hessian": lambda: objective.hessian(params)(params),
        "check": lambda: objective.check(params), "grad": lambda: torch.func.grad(objective)(params),
    }
    before = snapshot(net)
    with pytest.raises((RuntimeError, InputError)):
        calls[call]()
    assert_same(before, snapshot(net))


# ---------------------------------------------------------------- precision and live references


@networks
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_float64_parameters_on_a_float32_module_are_the_float64_module(network, statistics):
    make, shape = NETWORKS[network]
    net = make()
    x, y = examples(8, shape, dtype=torch.float64)
    params = double(parameters(net))
    objective = Objective(net, cross_entropy, (x, y), statistics=statistics)
    expected = direct(net.double(), x, y, statistics=statistics)
    net.float()
    got = objective(params)
    assert got.dtype == torch.float64 and relative(got, expected) <= 1e-12
    assert P.first(objective.value_and_grad(params)[1]).dtype == torch.float64
    assert P.first(objective.hessian(params)(params)).dtype == torch.float64


def test_float64_parameters_with_a_frozen_float32_layer():
    net = bn_mlp()
    net[0].requires_grad_(False)
    x, y = examples(8, dtype=torch.float64)
    got = Objective(net, cross_entropy, (x, y))(double(parameters(net)))
    assert relative(got, direct(net.double(), x, y)) <= 1e-12


def test_the_objective_refers_to_the_live_module():
    net, (x, y) = bn_mlp(), examples(8)
    objective, params = Objective(net, cross_entropy, (x, y)), parameters(net)
    running = Objective(net, cross_entropy, (x, y), statistics="running")
    first = objective(params), running(params)
    net[1].eps = 0.5
    assert objective(params) != first[0] and torch.equal(objective(params), direct(net, x, y))
    net[1].eps = 1e-5
    net[1].running_mean.add_(1.0)
    assert torch.equal(objective(params), first[0])
    assert running(params) != first[1]
    assert torch.equal(running(params), direct(net, x, y, statistics="running"))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_home_made_normalization_is_measured_with_the_statistics_asked_for(statistics):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), HomeMadeNorm(7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, y = examples(8, dtype=torch.float64)
    net.train()
    net(x)
    before = snapshot(net)
    objective, params = Objective(net, cross_entropy, (x, y), statistics=statistics), parameters(net)
    assert relative(objective(params), direct(net, x, y, statistics=statistics)) <= 1e-12
    thetas = points(params, 3)
    expected = torch.stack([direct(net, x, y, theta, statistics) for theta in thetas])
    assert relative(objective.many(thetas), expected) <= 1e-12
    objective.value_and_grad(params)
    objective.hessian(params)(params)
    assert_same(before, snapshot(net))


class Checkpointed(nn.Module):
    """A network whose hidden layer is checkpointed in one of PyTorch's two ways, or not at all."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def hidden(self, x):
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x):
        if self.reentrant is None:
            return self.last(self.hidden(x))
        return self.last(checkpoint(self.hidden, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_measured_at_the_point_asked_for(reentrant):
    torch.manual_seed(0)
    plain, other = Checkpointed(None).double(), Checkpointed(reentrant).double()
    other.load_state_dict(plain.state_dict())
    before = copy.deepcopy(other.state_dict())
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    theta = P.pmap(lambda p: p + 0.3 * torch.randn_like(p), bnsharp.parameters(plain))
    v = P.pmap(torch.randn_like, theta)
    a, b = (bnsharp.Objective(m, nn.functional.cross_entropy, (x, y)) for m in (plain, other))
    pairs = [
        (a.value_and_grad(theta)[1], b.value_and_grad(theta)[1]),
        (a.hessian(theta)(v), b.hessian(theta)(v)),
        (a.many_value_and_grad([theta, v])[1], b.many_value_and_grad([theta, v])[1]),
    ]
    for expected, got in pairs:
        assert all(torch.equal(expected[k], got[k]) for k in expected.keys())
    norm = bnsharp.measures.fisher_rao()
    assert norm(a, theta).value == norm(b, theta).value
    assert all(torch.equal(before[k], t) for k, t in other.state_dict().items())
    other.train()
    other(x.requires_grad_()).sum().backward()  # and they are checkpointed again
    assert other.first.weight.grad is not None
