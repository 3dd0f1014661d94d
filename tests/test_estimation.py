"""How a value is taken: batches streamed and left out, sampling to a target, interruption, what an estimate says."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import strategies
import torch
from helpers import bn_mlp, cross_entropy, double, examples, one_line, plain_mlp
from torch import Tensor

from bnsharp import Engine, Estimate, InputError, Measure, Objective, ScaleGroups, measures
from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.composites import LargestRadius, OnCriterion, normalized_logits, zero_one
from bnsharp.directions import Ascend, Draw, Given, Own
from bnsharp.estimation import LONGEST, ROUND, Sampling
from bnsharp.forms import gauss_newton_form, hessian_form
from bnsharp.geometry import Elementwise, Euclidean, Geometry, GroupBall, JointBall
from bnsharp.laws import Gaussian
from bnsharp.maps import NeuronMix, Subspace
from bnsharp.profiles import Rise
from bnsharp.reduce import Maximum, Mean
from bnsharp.types import Params

CPU = torch.device("cpu")


class Counted:
    """Batches that count how often they were read, and how many are alive at once."""

    def __init__(self, x: Tensor, y: Tensor, cuts: list[int]):
        self.pairs = list(zip(x.split(cuts), y.split(cuts), strict=True))
        self.passes = self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for pair in self.pairs:
            self.read += 1
            yield pair


def streamed(cuts: list[int], net: torch.nn.Module | None = None) -> tuple[Objective, Params, Counted, Objective]:
    """A network without batch statistics on unequal batches, and on all examples at once; float64."""
    net = (plain_mlp() if net is None else net).double()
    x, y = examples(sum(cuts), dtype=torch.float64)
    data = Counted(x, y, cuts)
    return Objective(net, cross_entropy, data), P.parameters(net), data, Objective(net, cross_entropy, (x, y))


BUILT = {
    "gaussian": measures.gaussian(sigma=0.1, draws=40),
    "lebesgue_ball": measures.lebesgue_ball(delta=0.3, draws=40, p=3.0),
    "local_entropy": measures.local_entropy(gamma=30.0, draws=40),
    "bn_sharpness": measures.bn_sharpness(ScaleGroups({"0.weight": "row"}), delta=0.1, steps=3),
    "epsilon_sharpness": measures.epsilon_sharpness(delta=0.1, steps=3),
    "keskar": measures.keskar(epsilon=0.01, steps=2),
    "hessian_top": measures.hessian_top(),
    "hessian_trace": measures.hessian_trace(draws=10),
    "relative_flatness": measures.relative_flatness(draws=10),
    "fisher_rao": measures.fisher_rao(),
    "largest_sigma": measures.largest_sigma(rise=0.05, draws=5, halvings=6),
    "largest_sigma_accuracy": measures.largest_sigma_accuracy(drop=0.2, draws=5, halvings=6),
    "adaptive of logits": measures.adaptive(rho=0.1, steps=2, normalize_logits=True),
}


@pytest.mark.parametrize("name", BUILT)
def test_unequal_batches_are_one_data_set(name: str) -> None:
    """Cut 7 + 7 + 2, every example counts the same: the value on one batch of 16."""
    cut, params, _, whole = streamed([7, 7, 2])
    one, other = BUILT[name](whole, params), BUILT[name](cut, params)
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert other.stderr == pytest.approx(one.stderr, rel=1e-6)
    assert (one.examples, one.batches, one.batch_size) == (16, 1, 16)
    assert (other.examples, other.batches, other.batch_size) == (16, 3, 7)
    assert one.stderr_data is None


@pytest.mark.parametrize("name", ["gaussian", "lebesgue_ball", "local_entropy", "epsilon_sharpness", "hessian_trace",
                                  "fisher_rao", "bn_sharpness"])
def test_data_error_is_the_jackknife_over_batches(name: str) -> None:
    """Against measuring five times by hand with one batch left out, the directions held."""
    cuts = [4] * 5
    cut, params, _, _ = streamed(cuts)
    measure = BUILT[name]
    found = measure(cut, params)
    x, y = examples(20, dtype=torch.float64)
    again = measure if found.unit is None else Measure(
        measure.geometry, Given(found.unit), measure.profile, measure.reduce  # type: ignore[union-attr]
    )
    values = []
    for b in range(5):
        keep = torch.ones(20, dtype=torch.bool)
        keep[4 * b : 4 * b + 4] = False
        values.append(again(Objective(cut.module, cross_entropy, (x[keep], y[keep])), params).value)
    expected = math.sqrt(4 / 5 * sum((v - sum(values) / 5) ** 2 for v in values))
    assert found.stderr_data == pytest.approx(expected, rel=1e-8)


def test_data_errors_cover_what_other_batches_give() -> None:
    """Over 200 samples of 12 batches, ± 2.2 standard errors (t, 11 degrees) hold the mean 90 to 99% of the time."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Linear(4, 1, bias=False).double()
    measure, held, values = measures.hessian_trace(draws=2), 0, []
    for _ in range(200):
        x = torch.randn(48, 4, generator=generator, dtype=torch.float64)
        data = list(zip(x.split(4), x[:, :1].split(4), strict=True))
        objective = Objective(w, lambda z, y: 0.5 * (z - y).square().mean(), data)
        found = measure(objective, P.parameters(w), P.seeded(1, CPU))
        assert found.stderr_data is not None
        values.append((found.value, found.stderr_data))
    truth = sum(v for v, _ in values) / 200  # the expectation for these two draws, to 1/14 of an error
    held = sum(abs(v - truth) <= 2.2 * s for v, s in values)
    assert 180 <= held <= 198, held


def test_one_pass_over_the_data_per_evaluation() -> None:
    """20 draws take two passes: the loss at θ, and all perturbed points of a round together."""
    cut, params, data, _ = streamed([6, 6, 4])
    measures.gaussian(sigma=0.1, draws=20)(cut, params)
    # the others look at the first batch: whether there is any, and whether it stays the same
    assert data.passes <= 5 and data.read <= 3 * 3
    before = data.passes
    measures.hessian_trace(draws=20)(cut, params)
    assert data.passes - before == 1


def test_exact_gradient_over_the_set() -> None:
    cut, params, _, whole = streamed([7, 7, 2])
    (a, g), (b, h) = cut.value_and_grad(params), whole.value_and_grad(params)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(P.flatten(g), P.flatten(h))


def test_one_batch_is_alive_at_a_time() -> None:
    """Batches made on demand are let go: at most the current one and the one being made are in memory."""
    refs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Made:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(12):
                x, y = examples(8, seed=i, dtype=torch.float64)
                refs.append(weakref.ref(x))
                alive.append(sum(r() is not None for r in refs))
                yield x, y

    objective, params = Objective(plain_mlp().double(), cross_entropy, Made()), P.parameters(plain_mlp().double())
    for measure in (measures.gaussian(sigma=0.1, draws=3), measures.hessian_trace(draws=3), measures.fisher_rao(),
                    measures.epsilon_sharpness(steps=1, certify=0)):
        measure(objective, params)
    assert max(alive) <= 2


def test_progress_is_told_batch_by_batch() -> None:
    cut, params, _, _ = streamed([6, 6, 4])
    told: list[int] = []
    cut.on_evaluation = told.append
    measure = measures.gaussian(sigma=0.1, draws=10)
    measure(cut, params)
    assert sum(told) == measure.cost() * 3 and max(told) == 1


# ---------------------------------------------------------------- sampling


def test_sampling_goes_on_until_the_target_is_met() -> None:
    objective, params, _, _ = streamed([16])
    measure = measures.gaussian(sigma=0.2, draws=20)
    plain = measure(objective, params)
    assert plain.draws == 20 and plain.converged is None
    target = plain.half_width / abs(plain.value) / 4
    found = measure(objective, params, None, Sampling(target))
    assert found.converged and found.draws > 20 and found.half_width <= target * abs(found.value)
    assert found.effective_samples == found.draws
    again = measures.gaussian(sigma=0.2, draws=found.draws)(objective, params)
    assert again.value == found.value and again.stderr == found.stderr
    assert measure(objective, params, None, Sampling(10.0)).value == plain.value  # met by its own draws
    hopeless = measures.gaussian(sigma=0.2, draws=2)(objective, params, None, Sampling(1e-9))
    assert hopeless.converged is False and hopeless.draws == 2 * LONGEST


def test_the_first_draws_do_not_depend_on_how_many_follow() -> None:
    objective, params, _, _ = streamed([16])
    seen: list[Estimate] = []
    measures.gaussian(sigma=0.2, draws=ROUND)(objective, params, None, Sampling(1e-3, on_estimate=seen.append))
    assert seen[0].draws == ROUND
    assert seen[0].value == measures.gaussian(sigma=0.2, draws=ROUND)(objective, params).value
    assert [e.draws for e in seen] == sorted({e.draws for e in seen})


def test_an_interrupted_measurement_has_told_its_last_estimate() -> None:
    objective, params, _, _ = streamed([16])
    seen: list[Estimate] = []

    def interrupt(n: int) -> None:
        if objective.evaluations["losses"] > 150:
            raise KeyboardInterrupt

    objective.on_evaluation = interrupt
    with pytest.raises(KeyboardInterrupt):
        measures.gaussian(sigma=0.2, draws=1000)(objective, params, None, Sampling(on_estimate=seen.append))
    objective.on_evaluation = None
    draws = seen[-1].draws
    assert draws >= ROUND and draws % ROUND == 0
    short = measures.gaussian(sigma=0.2, draws=draws)(objective, params)
    assert seen[-1].value == short.value


def test_a_target_for_a_search_is_about_its_numerical_error() -> None:
    p = strategies.problem("mlp", seed=1)
    measure = measures.bn_sharpness(p.groups, delta=0.1, p=3.0, steps=1, nodes=3)
    assert measure(p.objective(), p.params, None, Sampling(0.5)).converged is True
    assert measure(p.objective(), p.params, None, Sampling(1e-12)).converged is False


def test_the_interval_is_a_student_one_widened_by_the_numerical_error() -> None:
    e = Estimate(value=1.0, stderr=0.1, error=0.01, effective_samples=5.0)
    assert e.half_width == pytest.approx(2.7764 * 0.1 + 0.01, rel=1e-4)
    assert e.interval == (1 - e.half_width, 1 + e.half_width)
    assert Estimate(1.0, 0.0, 0.01).half_width == 0.01
    assert Estimate(1.0, 0.0, 0.0, restarts=(2.0, 1.0, 1.5)).spread == pytest.approx(0.25)
    assert Estimate(1.0, 0.0, 0.0, restarts=(2.0,)).spread is None


def test_an_estimate_says_what_it_was_taken_on() -> None:
    net = bn_mlp().double()
    data = examples(16, dtype=torch.float64)
    objective = Objective(net, cross_entropy, data, statistics="running", engine=Engine("vmap", 8))
    found = measures.gaussian(sigma=0.1, draws=9)(objective, P.parameters(net))
    assert (found.statistics, found.engine, found.precision) == ("running", "vmap(8)", "float64")
    assert (found.draws, found.batches, found.examples, found.promoted) == (9, 1, 16, False)
    plain = measures.gaussian(sigma=0.1, draws=9)(lambda q: q["w"].sum(), P.make({"w": torch.zeros(2).double()}))
    assert (plain.statistics, plain.examples, plain.batch_size, plain.batches) == (None, None, None, 1)


# ---------------------------------------------------------------- other criteria, other maps


def test_another_criterion_is_the_same_network() -> None:
    _, params, _, whole = streamed([16])
    net, (x, y) = whole.module, examples(16, dtype=torch.float64)
    other = whole.with_criterion(zero_one)
    assert float(other(params)) == float((net(x).argmax(1) != y).double().mean())
    z = net(x)
    z = (z - z.mean(1, keepdim=True)) / z.var(1, correction=0, keepdim=True).sqrt()
    normalized = whole.with_criterion(normalized_logits(cross_entropy))
    assert float(normalized(params)) == pytest.approx(float(cross_entropy(z, y)), rel=1e-12)
    # scaling the last layer does not change it
    scaled = P.make({k: (5.0 if k == "2.weight" or k == "2.bias" else 1.0) * v for k, v in params.items()})
    assert float(normalized(scaled)) == pytest.approx(float(normalized(params)), rel=1e-12)
    assert float(whole(scaled)) != pytest.approx(float(whole(params)), rel=1e-3)
    for measure in (measures.largest_sigma_accuracy(), measures.adaptive_average(normalize_logits=True)):
        assert isinstance(measure, OnCriterion)
        with pytest.raises(InputError) as caught:
            measure(lambda q: q["w"].sum(), params)
        assert "Objective" in one_line(caught.value)
    assert float(measures.adaptive(normalize_logits=True, steps=1).penalty(whole, params)) > 0  # type: ignore[attr-defined]
    with pytest.raises(InputError):
        measures.largest_sigma_accuracy().penalty(whole, params)


@pytest.mark.parametrize(("linear", "word"), [
    (NeuronMix("1.weight"), "0.weight"), (NeuronMix("0.wieght"), "0.weight"), (Subspace(10_000), "at most"),
])
def test_bad_maps_are_refused_in_one_line(linear: NeuronMix | Subspace, word: str) -> None:
    params = double(P.parameters(plain_mlp()))
    with pytest.raises(InputError) as caught:
        Geometry(linear, JointBall()).at(params).place(linear.like(params))
    assert word in one_line(caught.value)
    with pytest.raises(InputError):
        Geometry(linear, GroupBall(ScaleGroups({})))
    with pytest.raises(InputError):
        NeuronMix().like(P.make({"b": torch.zeros(3)}))
    with pytest.raises(InputError):
        Own()(None, Geometry(Subspace(2), JointBall()).at(params), P.seeded(0, CPU))  # type: ignore[arg-type]


@pytest.mark.parametrize("linear", [NeuronMix(), NeuronMix("0.weight"), Subspace(4, 0.3)])
def test_pull_is_the_adjoint_of_place(linear: NeuronMix | Subspace) -> None:
    params = double(P.parameters(plain_mlp()))
    geometry = Geometry(linear, JointBall())
    frame, like = geometry.at(params), linear.like(params)
    u, g = Gaussian()(JointBall(), like, P.seeded(1, CPU)), Gaussian()(JointBall(), params, P.seeded(2, CPU))
    assert float(P.dot(frame.place(u), g)) == pytest.approx(float(P.dot(u, frame.pull(g))), rel=1e-12)
    both = P.stack([u, P.scaled(u, 2.0)])
    torch.testing.assert_close(P.flatten(P.pick(frame.place(both), 1)), 2 * P.flatten(frame.place(u)))
    torch.testing.assert_close(
        P.flatten(P.pick(frame.points(both, 0.5), 0)), P.flatten(P.shift(params, frame.place(u), 0.5))
    )
    torch.testing.assert_close(P.flatten(geometry.place(u, params)), P.flatten(frame.place(u)))
    # a search works in these coordinates, and penalties differentiate through the map
    objective = streamed([16])[0]
    measure = Measure(geometry, Ascend(3, 2), Rise(), Maximum())
    assert measure(objective, params).value > 0
    leaves = P.pmap(lambda p: p.clone().requires_grad_(), params)
    measure.penalty(objective, leaves).backward()
    assert all(p.grad is not None for p in leaves.values())


def test_own_directions_are_the_parameters() -> None:
    params = double(P.parameters(plain_mlp()))
    for geometry in (Euclidean(0.5), Elementwise(0.3, 0.1)):
        frame = geometry.at(params)
        found = Own()(None, frame, P.seeded(0, CPU))  # type: ignore[arg-type]
        torch.testing.assert_close(P.flatten(P.pick(frame.place(found.u), 0)), P.flatten(params))


def test_forms_agree_with_products_and_need_outputs() -> None:
    objective, params, _, whole = streamed([9, 7])
    v = Gaussian()(JointBall(), params, P.seeded(3, CPU))
    weights, values = objective.forms_by_batch(params, [v], hessian_form)
    assert weights.tolist() == [9.0, 7.0]
    mean = float((weights / 16) @ values[:, 0, 0])
    assert mean == pytest.approx(float(P.dot(v, whole.hessian(params)(v))), rel=1e-9)
    with pytest.raises(InputError) as caught:
        measures.fisher_rao()(lambda q: sum(p.square().sum() for p in q.values()), params)
    assert "Objective" in one_line(caught.value)
    assert gauss_newton_form is not hessian_form


def test_losses_by_batch_are_the_batches_losses() -> None:
    objective, params, data, _ = streamed([9, 7])
    weights, losses = objective.many_by_batch([params])
    for (x, y), loss in zip(data.pairs, losses[:, 0], strict=True):
        own = Objective(objective.module, cross_entropy, (x, y))(params)
        assert float(loss) == pytest.approx(float(own), rel=1e-12)
    assert float(weights @ losses[:, 0] / 16) == pytest.approx(float(Anchor(objective, params).loss), rel=1e-12)


def test_bad_radii_are_refused() -> None:
    for options in ({"rise": 0.0}, {"largest": -1.0}, {"halvings": 0}, {"largest": 1e-9}):
        with pytest.raises(InputError):
            LargestRadius(lambda s: measures.gaussian(sigma=s), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        Sampling(target=0.0)
    with pytest.raises(InputError):
        Measure(Euclidean(1.0), Draw(Gaussian(), 3), Rise(), Mean(), certify=-1)


# ---------------------------------------------------------------- data as users have it


def test_a_loader_whose_batches_change_is_refused() -> None:
    x, y = examples(60)
    data = torch.utils.data.TensorDataset(x, y)
    net = bn_mlp()
    fixed = torch.utils.data.DataLoader(data, 20)
    assert measures.gaussian(sigma=0.1, draws=2)(Objective(net, cross_entropy, fixed), P.parameters(net)).batches == 3
    sampler = torch.utils.data.SubsetRandomSampler(range(60))
    shuffled = Objective(net, cross_entropy, torch.utils.data.DataLoader(data, 20, sampler=sampler))
    with pytest.raises(InputError) as caught:
        measures.gaussian(sigma=0.1, draws=2)(shuffled, P.parameters(net))
    assert "another first batch" in one_line(caught.value)


def test_inputs_beside_the_examples_are_not_cut() -> None:
    """A mask that has no examples along dimension 0, and targets in a tuple, over 64 examples."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(5, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(x * mask)

    x, y = examples(100)
    net = Masked()
    objective = Objective(net, lambda z, t: cross_entropy(z, t[0]), [((x, torch.ones(5)), (y, y))])
    assert measures.gaussian(sigma=0.1, draws=2)(objective, P.parameters(net)).examples == 100


def test_class_weights_follow_into_float64() -> None:
    net, (x, y) = bn_mlp(), examples(32)
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    found = measures.gaussian(sigma=1e-5, draws=4)(Objective(net, criterion, (x, y)), P.parameters(net))
    assert found.promoted and found.precision == "float64"
    assert criterion.weight.dtype == torch.float32


def test_equal_logits_have_a_gradient_under_normalization() -> None:
    net, data = plain_mlp().double(), examples(8, dtype=torch.float64)
    torch.nn.init.zeros_(net[2].weight)
    torch.nn.init.zeros_(net[2].bias)
    found = measures.adaptive(rho=0.1, eta=0.1, steps=2, normalize_logits=True)(
        Objective(net, cross_entropy, data), P.parameters(net)
    )
    assert math.isfinite(found.value)


def test_a_radius_that_overflows_is_more_than_is_borne() -> None:
    params = P.make({"w": torch.zeros(2, dtype=torch.float64)})
    measure = LargestRadius(lambda s: measures.gaussian(sigma=s, draws=5), rise=0.1, largest=100.0)
    found = measure(lambda q: torch.exp(50 * (q["w"] ** 2).sum() ** 2), params)
    assert found.converged and 1e-3 < found.value < 1.0
    outside = measures.largest_sigma(rise=1e9, draws=5)(lambda q: (q["w"] ** 2).sum(), params)
    assert outside.converged is False and math.isinf(outside.half_width)
    aimed = measures.largest_sigma(rise=0.1, draws=5)(lambda q: (q["w"] ** 2).sum(), params, None, Sampling(1e-3))
    assert aimed.converged is False and aimed.half_width > 1e-3 * aimed.value


def test_restarts_of_an_eigenvalue_problem_are_refused() -> None:
    with pytest.raises(InputError):
        measures.hessian_top(restarts=3)


@pytest.mark.parametrize("matrix", ["m @ q", "q @ q * m.sum()", "linear"])
def test_a_function_that_holds_float32_tensors_keeps_the_modelled_error(matrix):
    m = torch.eye(3)
    losses = {
        "m @ q": lambda q: (m @ q["w"]).pow(2).sum(),
        "q @ q * m.sum()": lambda q: q["w"] @ q["w"] * m.sum(),
        "linear": lambda q: torch.nn.functional.linear(q["w"], m).pow(2).sum(),
    }
    found = measures.gaussian(draws=4)(losses[matrix], P.make({"w": torch.ones(3)}))
    assert found.precision == ("float64" if found.promoted else "float32") and found.error > 0


@pytest.mark.parametrize("message", ["boom", "CUDA out of memory. Tried to allocate 2 bytes",
                                     "DefaultCPUAllocator: can't allocate memory: 8 bytes of type"])
def test_a_failure_of_the_check_in_float64_is_not_hidden(message):
    def loss(q):
        if q["w"].dtype == torch.float64:
            raise RuntimeError(message)
        return q["w"] @ q["w"]

    with pytest.raises(RuntimeError, match=message[:4]):
        measures.gaussian(draws=4)(loss, P.make({"w": torch.ones(3)}))
