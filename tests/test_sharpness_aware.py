"""Sharpness-aware steps: published values, cases that must coincide, and each step written out by hand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
from helpers import one_line
from strategies import Problem, problem
from torch import Tensor, nn

import bnsharp
from bnsharp import InputError, Measure, Step, geometry, laws, profiles, reduce
from bnsharp import params as P
from bnsharp import regularizers as R
from bnsharp.algorithms import algorithm
from bnsharp.directions import Ascend, Draw, Own
from bnsharp.evaluation import as_objective
from bnsharp.measures import bn_sharpness, gaussian, keskar

BOWL = torch.tensor([1.0, 10.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bowl(nn.Module):
    """``½ Σ a_i w_i²``, a = (1, 10), w₀ = (1, 0.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x * self.w**2).sum(1)


def mean(output: Tensor, y: Tensor) -> Tensor:
    return output.mean()


def descend(regularizer: Any, steps: int = 3, weight: float = 1.0, examples: int = 1, **optimizer: Any) -> list[float]:
    """Steps of SGD, learning rate 0.05, on the bowl."""
    module = Bowl()
    sgd, state = torch.optim.SGD(module.parameters(), lr=0.05, **optimizer), None
    for _ in range(steps):
        sgd.zero_grad()
        batch = BOWL.expand(examples, 2), torch.zeros(examples)
        state = bnsharp.backward(module, mean, batch, regularizer, weight, state=state, generator=seeded()).state
        sgd.step()
    return module.w.tolist()


@pytest.mark.parametrize(("regularizer", "optimizer", "expected"), [
    (R.sam(rho=0.1), {}, (0.85020184965, 0.00145799366)),
    (R.asam(rho=0.5, eta=0.0), {}, (0.80535819312, 0.02943570625)),
    (R.asam(rho=0.5, eta=0.01), {}, (0.80489722658, 0.02836953421)),
    (R.friendly_sam(rho=0.1, sigma=1.0, decay=0.9), {}, (0.85671680763, 0.12521784592)),
    (R.msam(rho=0.1, momentum=0.9), {"momentum": 0.9}, (0.73464371214, -0.24852209879)),
], ids=["SAM", "ASAM eta=0", "ASAM eta=0.01", "FriendlySAM", "MSAM"])
def test_published_values(regularizer: Any, optimizer: dict[str, Any], expected: tuple[float, float]) -> None:
    """Three steps against the authors' implementations."""
    assert descend(regularizer, **optimizer) == pytest.approx(list(expected), abs=1e-8)


EQUAL_TO_SAM: dict[str, tuple[Any, float]] = {
    "WSAM, gamma 1/2": (R.sam(rho=0.1), R.wsam_weight(0.5)),
    "FriendlySAM, sigma 0": (R.friendly_sam(rho=0.1, sigma=0.0), 1.0),
    "LookSAM, k 1": (R.look_sam(rho=0.1, every=1), 1.0),
    "GSAM, alpha 0": (R.gsam(rho=0.1, alpha=0.0), 1.0),
    "m-SAM, one chunk": (R.m_sam(rho=0.1, chunks=1), 1.0),
    "m-SAM, equal chunks": (R.m_sam(rho=0.1, chunks=3), 1.0),
    "a smoothing by the worst direction": (
        R.Smoothing(Measure(geometry.Euclidean(0.1), Ascend(0), profiles.Rise(), reduce.Maximum())), 1.0
    ),
    "a direction used for one step": (R.Penalty(R.sam(rho=0.1).measure, reuse=1), 1.0),
}


@pytest.mark.parametrize("case", sorted(EQUAL_TO_SAM))
def test_what_coincides_with_sam(case: str) -> None:
    regularizer, weight = EQUAL_TO_SAM[case]
    expected = descend(R.sam(rho=0.1), 12, examples=3)
    assert descend(regularizer, 12, weight, examples=3) == pytest.approx(expected, abs=1e-13)


EQUAL_TO_SGD: dict[str, Any] = {
    "Entropy-SGD, L 0": algorithm("entropy-sgd", inner_steps=0),
    "SmoothOut, a 0": algorithm("smoothout", a=0),
    "MSAM, rho 0": algorithm("msam", rho=0),
    "WSAM, gamma 0": algorithm("wsam", wsam_gamma=0),
}


@pytest.mark.parametrize("case", sorted(EQUAL_TO_SGD))
def test_what_coincides_with_the_base_optimizer(case: str) -> None:
    built = EQUAL_TO_SGD[case]
    got = descend(built.regularizer(0), 12, built.weight(0), momentum=0.9)
    assert got == pytest.approx(descend(R.Plain(), 12, momentum=0.9), abs=1e-13)


# ---------------------------------------------------------------- by hand


def run(regularizer: Any, p: Problem, steps: int, weight: float = 1.0, rate: float = 0.1,
        objectives: Callable[[int], list[Any]] | None = None) -> tuple[Tensor, list[Step]]:
    """Plain descent on a network through ``step``: the final parameters, and every step."""
    theta, generator, taken = p.params, seeded(), []
    state = regularizer.init(theta)
    for t in range(steps):
        given = [p.objective()] if objectives is None else objectives(t)
        step = regularizer.step(given, theta, weight=weight, state=state, generator=generator)
        theta, state = P.shift(theta, step.gradient, -rate), step.state
        taken.append(step)
    return oracles.flatten(theta), taken


def gradients(p: Problem) -> Callable[[Tensor], Tensor]:
    return lambda flat: oracles.gradient(p.loss, oracles.to_params(flat, p.params))


def test_friendly_sam_by_hand() -> None:
    p, rho, sigma, decay = problem(seed=3), 0.05, 0.7, 0.8
    grad, w, m = gradients(p), oracles.flatten(p.params), None
    for _ in range(6):
        g = grad(w)
        d = g if m is None else g - sigma * m
        m = g if m is None else decay * m + (1 - decay) * g
        w = w - 0.1 * grad(w + rho * d / d.norm())
    got, _ = run(R.friendly_sam(rho=rho, sigma=sigma, decay=decay), p, 6)
    torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-12)


def test_look_sam_by_hand() -> None:
    p, rho, k, alpha = problem(seed=4), 0.05, 3, 0.6
    grad, w, v = gradients(p), oracles.flatten(p.params), None
    for t in range(8):
        g = grad(w)
        if t % k == 0:
            total = grad(w + rho * g / g.norm())
            v = total - (total @ g) / (g @ g) * g
        else:
            assert v is not None
            total = g + alpha * g.norm() * v / v.norm()
        w = w - 0.1 * total
    got, steps = run(R.look_sam(rho=rho, every=k, alpha=alpha), p, 8)
    torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-12)
    assert [s.evaluations for s in steps] == [2, 1, 1, 2, 1, 1, 2, 1]
    assert steps[1].ratio.item() == pytest.approx(alpha)


def test_gsam_by_hand() -> None:
    p, rho, alpha = problem(seed=5), 0.05, 0.4
    grad, w = gradients(p), oracles.flatten(p.params)
    for _ in range(4):
        g = grad(w)
        ahead = grad(w + rho * g / g.norm())
        w = w - 0.1 * (ahead - alpha * (g - (g @ ahead) / (ahead @ ahead) * ahead))
    got, _ = run(R.gsam(rho=rho, alpha=alpha), p, 4)
    torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-12)


def test_m_sam_by_hand_with_its_own_batch_statistics() -> None:
    """12 examples in chunks of 5, 4 and 3 are not what tensor_split makes: 4, 4, 4; 13 are 5, 4, 4."""
    p, rho = problem(seed=6, examples=13), 0.05
    parts = [slice(0, 5), slice(5, 9), slice(9, 13)]
    total = torch.zeros_like(oracles.flatten(p.params))
    for part in parts:
        q = Problem(p.module, p.x[part], p.y[part], p.criterion, p.rows, p.inert)
        g = gradients(q)(oracles.flatten(p.params))
        total += len(p.x[part]) / 13 * gradients(q)(oracles.flatten(p.params) + rho * g / g.norm())
    module = copy.deepcopy(p.module)
    step = bnsharp.backward(module, p.criterion, (p.x, p.y), R.m_sam(rho=rho, chunks=3), generator=seeded())
    torch.testing.assert_close(oracles.flatten(step.gradient), total, rtol=1e-10, atol=1e-12)
    assert step.evaluations == 6 and step.output.shape == (13, 3)


@dataclass
class Answer:
    logits: Tensor
    size: Tensor


@pytest.mark.parametrize("wrap", [
    lambda z: (z, z.mean()), lambda z: {"logits": z, "size": z.mean(), "none": None}, lambda z: Answer(z, z.mean()),
], ids=["tuple", "dictionary", "dataclass"])
def test_m_sam_puts_the_outputs_of_chunks_together(wrap: Any) -> None:
    """All examples, in whatever the module returns; numbers are stacked."""
    p = problem(seed=26)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(p.module)

        def forward(self, x: Tensor) -> Any:
            return wrap(self.body(x))

    def logits(output: Any) -> Tensor:
        return output.logits if isinstance(output, Answer) else output["logits" if isinstance(output, dict) else 0]

    net = Wrapped()
    step = bnsharp.backward(
        net, lambda output, y: p.criterion(logits(output), y), (p.x, p.y), R.m_sam(chunks=3), generator=seeded()
    )
    expected = torch.cat([logits(net(part)) for part in p.x.split(4)])
    torch.testing.assert_close(logits(step.output), expected)
    size = step.output.size if isinstance(step.output, Answer) else step.output[
        "size" if isinstance(step.output, dict) else 1
    ]
    assert size.shape == (3,)


def test_m_sam_updates_running_statistics_once_per_chunk() -> None:
    p = problem(seed=7)
    one, other = copy.deepcopy(p.module), copy.deepcopy(p.module)
    bnsharp.backward(one, p.criterion, (p.x, p.y), R.m_sam(chunks=3), generator=seeded())
    for part in torch.arange(len(p.x)).tensor_split(3):
        other(p.x[part])
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("descent", [False, True])
def test_the_averaged_direction_by_hand(descent: bool) -> None:
    """One gradient per step, at ``θ + δv`` with ``v_i = ‖θ_i‖ m_i/‖m_i‖``."""
    p, delta, beta = problem(seed=8), 0.05, 0.6
    grad, w, m = gradients(p), oracles.flatten(p.params), torch.zeros_like(oracles.flatten(p.params))
    losses = []
    for _ in range(6):
        point = w
        if m.norm() > 0:
            v = torch.zeros_like(w)
            for i in p.index:
                v[i] = w[i].norm() * m[i] / m[i].norm()
            point = w + (-delta if descent else delta) * v
        g = grad(point)
        losses.append(float(p.loss(oracles.to_params(point, p.params))))
        m = beta * m + (1 - beta) * g
        w = w - 0.1 * g
    measure = bn_sharpness(p.groups, delta=delta, steps=0)
    got, steps = run(R.Averaged(measure, beta, descent), p, 6, 3**0.5)
    torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-12)
    assert [float(s.loss) for s in steps] == pytest.approx(losses)
    assert all(s.evaluations == 1 and s.penalty.isnan() and s.ratio.isnan() for s in steps)


def test_momentum_sam_is_an_average() -> None:
    """SGD's momentum buffer and an average of gradients point in one direction, whatever their scale."""
    p, rho, beta = problem(seed=9), 0.1, 0.9
    grad, w, v = gradients(p), oracles.flatten(p.params), torch.zeros_like(oracles.flatten(p.params))
    for _ in range(5):
        g = grad(w - rho * v / v.norm().clamp(min=1e-12))
        v = beta * v + g
        w = w - 0.1 * g
    got, _ = run(R.msam(rho=rho, momentum=beta), p, 5)
    torch.testing.assert_close(got, w, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- what a search remembers


def test_a_direction_is_used_again() -> None:
    """Searched on steps 0, 3, 6; its unit coordinates held in between."""
    p = problem(seed=10)
    measure = bn_sharpness(p.groups, delta=0.05, steps=2, restarts=0)
    _, steps = run(R.Penalty(measure, reuse=3), p, 7, 0.5)
    assert [s.evaluations for s in steps] == [4, 2, 2, 4, 2, 2, 4]
    held = [torch.cat([v.reshape(-1) for k, v in s.state.items() if k.startswith("held/")]) for s in steps]
    assert torch.equal(held[0], held[2]) and not torch.equal(held[2], held[3])


def test_a_used_direction_gives_the_two_point_gradient_there() -> None:
    p = problem(seed=11)
    measure = bn_sharpness(p.groups, delta=0.05, steps=2, restarts=0)
    _, steps = run(R.Penalty(measure, reuse=2), p, 1, 0.5)
    theta = P.shift(p.params, steps[0].gradient, -0.1)
    flat, u = oracles.flatten(theta), torch.cat([
        v.reshape(-1) for k, v in steps[0].state.items() if k.startswith("held/")
    ])
    v = torch.zeros_like(flat)
    for i in p.index:
        v[i] = flat[i].norm() * u[i]
    rise = p.loss(oracles.to_params(flat + 0.05 * v, theta)) - p.loss(theta)
    grad = gradients(p)
    r = rise.sign() * (grad(flat + 0.05 * v) - grad(flat)) / 3**0.5
    _, both = run(R.Penalty(measure, reuse=2), p, 2, 0.5)
    torch.testing.assert_close(oracles.flatten(both[1].gradient), grad(flat) + 0.5 * r, rtol=1e-9, atol=1e-11)


def test_a_warm_start_begins_where_the_last_search_ended() -> None:
    """At fixed θ a warm-started search only climbs, and beats the cold one with as many steps."""
    p = problem("mlp", "relu", seed=5)
    measure = bn_sharpness(p.groups, delta=0.3, steps=1, restarts=0)
    warm, cold = R.Penalty(measure, start=R.Warm()), R.Penalty(measure)
    state, values = warm.init(p.params), []
    for _ in range(8):
        step = warm.step([p.objective()], p.params, weight=0.0, state=state, generator=seeded())
        state = step.state
        values.append(float(step.penalty))
        assert step.evaluations == 3
    once = float(cold.step([p.objective()], p.params, weight=0.0, state={}, generator=seeded()).penalty)
    assert values[0] == pytest.approx(once)
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(values)) and values[-1] > 1.3 * values[0]


def test_a_warm_start_in_a_box_begins_inside_it() -> None:
    """The best point of a concave loss is inside the box, where a corner would throw the search back each time."""
    best = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    theta = P.make({"w": torch.zeros(4, dtype=torch.float64)})
    objective = as_objective(lambda q: -((q["w"] - best) ** 2).sum())
    search = Ascend(3, rule="riemannian", rate=0.2)
    measure = Measure(geometry.Euclidean(1.0, "box"), search, profiles.Rise(), reduce.Maximum())
    ends = {}
    for start in (R.Warm(), R.Steepest()):
        regularizer = R.Penalty(measure, start=start)
        state, values = regularizer.init(theta), []
        for _ in range(30):
            step = regularizer.step([objective], theta, weight=0.0, state=state, generator=seeded())
            state = step.state
            values.append(float(step.penalty))
        assert all(b >= a for a, b in pairwise(values))
        ends[type(start)] = values[-1]
    top = float((best**2).sum())
    assert ends[R.Warm] > 0.95 * top and ends[R.Steepest] < 0.85 * top


KEEPERS: dict[str, tuple[Callable[[Problem], Any], float]] = {
    "msam": (lambda p: R.msam(), 1.0),
    "friendly": (lambda p: R.friendly_sam(sigma=0.5), 1.0),
    "look": (lambda p: R.look_sam(every=3), 1.0),
    "warm": (lambda p: R.Penalty(bn_sharpness(p.groups, steps=1), start=R.Warm()), 0.5),
    "reuse": (lambda p: R.Penalty(bn_sharpness(p.groups, steps=1), reuse=3), 0.5),
    "subspace": (lambda p: R.Penalty(keskar(subspace=9, steps=1), "exact", reuse=3), 0.5),
}


@pytest.mark.parametrize("name", sorted(set(KEEPERS) - {"subspace"}))
@pytest.mark.parametrize("trained", [True, False])
def test_a_state_of_other_parameters_is_one_line(name: str, trained: bool) -> None:
    """A layer that was frozen, or set free, between two steps."""
    p = problem(seed=24)
    net, (build, weight) = copy.deepcopy(p.module), KEEPERS[name]
    layer = dict(net.named_parameters())["6.weight"]
    layer.requires_grad_(trained)
    regularizer = build(p)
    state = bnsharp.backward(net, p.criterion, (p.x, p.y), regularizer, weight, generator=seeded()).state
    layer.requires_grad_(not trained)
    with pytest.raises(InputError) as caught:
        bnsharp.backward(net, p.criterion, (p.x, p.y), regularizer, weight, generator=seeded(), state=state)
    assert "6.weight" in one_line(caught.value) and "state=None" in str(caught.value)


@pytest.mark.parametrize("name", sorted(KEEPERS))
def test_a_state_in_another_precision_is_taken(name: str) -> None:
    """A checkpoint of float64 goes on in float32, and its next step is the same up to rounding."""
    p = problem(seed=25)
    build, weight = KEEPERS[name]
    regularizer, steps = build(p), []
    state = bnsharp.backward(
        copy.deepcopy(p.module), p.criterion, (p.x, p.y), regularizer, weight, generator=seeded()
    ).state
    for dtype in (torch.float64, torch.float32):
        net = copy.deepcopy(p.module).to(dtype)
        steps.append(bnsharp.backward(
            net, p.criterion, (p.x.to(dtype), p.y), regularizer, weight, generator=seeded(), state=state
        ))
        assert all(q.grad is not None and q.grad.dtype == dtype for q in net.parameters())
    ours, theirs = (oracles.flatten(s.gradient).double() for s in steps)
    assert float((ours - theirs).norm()) < 1e-2 * float(ours.norm())


@pytest.mark.parametrize("build", [
    lambda: R.friendly_sam(), lambda: R.look_sam(), lambda: R.msam(), lambda: R.LocalEntropy(),
    lambda: R.Penalty(R.sam().measure, reuse=2),
])
def test_another_state_is_refused_in_one_line(build: Callable[[], Any]) -> None:
    p = problem(seed=13)
    with pytest.raises(InputError, match="init"):
        build().step([p.objective()], p.params, weight=1.0, state={"other": torch.zeros(1)}, generator=seeded())


# ---------------------------------------------------------------- smoothings


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("average", [reduce.Mean(), reduce.FreeEnergy(3.0), reduce.Maximum()], ids=repr)
def test_a_smoothing_is_the_gradient_of_the_smoothed_loss(average: Any, moving: bool) -> None:
    """``∇_θ reduce_i L(θ + s(θ)u_i)`` by autograd on the plain loss, u_i held, v held or moving."""
    p = problem(seed=14)
    shape = geometry.Groupwise(p.groups, radius=0.3)
    measure = Measure(shape, Draw(laws.Gaussian(), 4), profiles.Rise(), average)
    step = R.Smoothing(measure, moving).step([p.objective()], p.params, weight=1.0, state={}, generator=seeded(5))
    found = measure.directions(None, shape.at(p.params), seeded(5))  # type: ignore[arg-type]
    leaves = {k: v.clone().requires_grad_() for k, v in p.params.items()}
    theta = P.make(leaves)
    losses = []
    for i in range(4):
        v = shape.place(found.u[i], theta if moving else p.params)
        losses.append(p.loss(dict(P.shift(theta, v).items())))
    value = average(torch.stack(losses))[0]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(leaves.values()))])
    torch.testing.assert_close(oracles.flatten(step.gradient), expected, rtol=1e-9, atol=1e-11)
    assert step.loss.item() == pytest.approx(value.item()) and step.evaluations == 4


def test_moving_smoothing_keeps_to_the_spheres() -> None:
    """The gradient of a scale-invariant function is orthogonal to every invariant group."""
    p = problem(seed=15)
    built = algorithm("gaussian-smoothing", p.groups, sigma=0.3, draws=3, relative_to="groups", moving=True)
    step = built.regularizer(0).step([p.objective()], p.params, weight=1.0, state={}, generator=seeded())
    for name in p.rows:
        inner = (step.gradient[name] * p.params[name]).sum(1)
        assert float(inner.abs().max()) < 1e-12


@pytest.mark.parametrize("relative_to", ["constant", "magnitude", "filters"])
def test_smoothout_noise_is_uniform_and_leaves_vectors_alone(relative_to: str) -> None:
    p = problem(seed=16)
    measure = algorithm("smoothout", a=0.2, relative_to=relative_to).regularizer(0).measure  # type: ignore[attr-defined]
    frame = measure.geometry.at(p.params)
    v = frame.place(measure.directions(None, frame, seeded(2)).u[0])
    for name, w in p.params.items():
        if w.ndim < 2:
            assert not v[name].any()
            continue
        scale = {"constant": torch.ones_like(w), "magnitude": w.abs(),
                 "filters": w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)).expand_as(w)}[relative_to]
        ratio = v[name] / scale
        assert float(ratio.abs().max()) <= 0.2 and float(ratio.abs().max()) > 0.1


def test_a_ghost_batch_has_noise_of_its_own() -> None:
    p = problem(seed=17)
    inner = R.Smoothing(gaussian(sigma=0.1, draws=1))
    step = bnsharp.backward(copy.deepcopy(p.module), p.criterion, (p.x, p.y), R.Chunked(inner, 2), generator=seeded(4))
    generator, total = seeded(4), torch.zeros_like(oracles.flatten(p.params))
    for part in (slice(0, 6), slice(6, 12)):
        frame = inner.measure.geometry.at(p.params)
        noise = inner.measure.directions(None, frame, generator).u[0]  # type: ignore[arg-type]
        q = Problem(p.module, p.x[part], p.y[part], p.criterion, p.rows, p.inert)
        total += 0.5 * gradients(q)(oracles.flatten(frame.points(noise)))
    torch.testing.assert_close(oracles.flatten(step.gradient), total, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("law", [Own(), Draw(laws.Gaussian(), 3)], ids=["own", "drawn"])
def test_moving_smoothing_moves_as_its_directions_do(law: Any) -> None:
    """Along θ itself the perturbed point is 2θ, whose derivative is twice the gradient there."""
    p = problem(seed=22)
    measure = Measure(geometry.Euclidean(1.0), law, profiles.Rise(), reduce.Mean())
    moving, held = (
        R.Smoothing(measure, on).step([p.objective()], p.params, weight=1.0, state={}, generator=seeded())
        for on in (True, False)
    )
    factor = 2.0 if isinstance(law, Own) else 1.0
    torch.testing.assert_close(oracles.flatten(moving.gradient), factor * oracles.flatten(held.gradient))


def test_a_smoothing_by_vmap_is_the_loop() -> None:
    """Running statistics, one mask for all draws, and the output are those of the first perturbed network."""
    p, ends = problem(seed=23), []
    for engine in ("loop", "vmap"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
        smoothing = R.Smoothing(gaussian(sigma=0.1, draws=3))
        step = bnsharp.backward(net, p.criterion, (p.x, p.y), smoothing, generator=seeded(), engine=engine)
        ends.append([oracles.flatten(step.gradient), step.output, step.loss, *net.buffers()])
        assert step.evaluations == 3 and int(net[2].num_batches_tracked) == 1
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- Entropy-SGD


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_entropy_sgd_is_its_published_update(nesterov: bool, fresh: bool) -> None:
    """Two outer steps of the authors' inner loop, written out; the noise is read off the same generator."""
    p, steps = problem(seed=18), 5
    gamma, scoping, eps, rate, alpha, momentum, decay = 0.3, 0.5, 0.02, 0.1, 0.75, 0.9, 1e-2
    batches = [(p.x.roll(i, 0) + 0.1 * i, p.y.roll(i, 0)) for i in range(steps)]

    def at(i: int) -> Problem:
        x, y = batches[i if fresh else 0]
        return Problem(p.module, x, y, p.criterion, p.rows, p.inert)

    generator, theta = seeded(), oracles.flatten(p.params)
    shapes = [v.shape for v in p.params.values()]
    for t in range(2):
        g_t = gamma * (1 + scoping) ** t
        w, mu, m = theta.clone(), theta.clone(), torch.zeros_like(theta)
        for i in range(steps):
            dw = gradients(at(i))(w) + decay * w
            m = momentum * m + dw
            dw = dw + momentum * m if nesterov else m.clone()
            eta = torch.cat([torch.randn(s, generator=generator).double().reshape(-1) for s in shapes])
            dw = dw - g_t * (theta - w) + eps / (0.5 * rate) ** 0.5 * eta
            w = w - rate * dw
            mu = alpha * mu + (1 - alpha) * w
        theta = theta - 0.7 * (theta - mu)
    entropy = R.LocalEntropy(steps, gamma, scoping, eps, rate, alpha, momentum, nesterov, decay)
    got, taken = run(entropy, p, 2, rate=0.7,
                     objectives=lambda t: [at(i).objective() for i in range(steps if fresh else 1)])
    torch.testing.assert_close(got, theta, rtol=1e-10, atol=1e-12)
    assert [s.evaluations for s in taken] == [steps, steps]
    assert taken[0].loss.item() == pytest.approx(float(at(0).loss(p.params)))


# ---------------------------------------------------------------- contradictions


ONE_LINE: dict[str, tuple[Callable[[Problem], Any], str]] = {
    "clip with one gradient": (lambda p: algorithm("sgds-averaged", p.groups, clip=0.1), "max_norm"),
    "second batch with one gradient": (lambda p: algorithm("msam", independent_batch=True), "one batch"),
    "Entropy-SGD with a second batch": (lambda p: algorithm("entropy-sgd", independent_batch=True), "fresh"),
    "a smoothing with a second batch": (lambda p: algorithm("smoothout", independent_batch=True), "second batch"),
    "warm with no search": (lambda p: algorithm("sgds-0", p.groups, warm=True), "steps >= 1"),
    "warm with drawn directions": (lambda p: R.Penalty(gaussian(), start=R.Warm()), "Ascend"),
    "reuse of drawn directions": (lambda p: R.Penalty(gaussian(), reuse=3), "Ascend"),
    "a smoothing of a line": (lambda p: R.Smoothing(bn_sharpness(p.groups)), "Rise"),
    "a smoothing by a power mean": (
        lambda p: R.Smoothing(Measure(geometry.Euclidean(1.0), Draw(laws.Ball(), 2), profiles.Rise(),
                                      reduce.PowerMean(2.0))), "reduction"),
    "one gradient with a search": (lambda p: R.Averaged(bn_sharpness(p.groups, steps=3)), "Ascend(0)"),
    "gamma one": (lambda p: algorithm("wsam", wsam_gamma=1.0), "gamma"),
    "a measure without slots": (lambda p: algorithm("penalty-largest_sigma", p.groups), "largest_sigma"),
    "an unknown measure": (lambda p: algorithm("penalty-gausian"), "did you mean 'gaussian'"),
    "an unknown option of a measure": (lambda p: algorithm("penalty-gaussian", sigmma=0.1), "did you mean 'sigma'"),
    "tangent without groups": (lambda p: algorithm("penalty-gaussian", gradient="tangent"), "groupwise"),
    "negative inner steps": (lambda p: algorithm("entropy-sgd", inner_steps=-1), "steps"),
    "averaging of one": (lambda p: algorithm("entropy-sgd", averaging=1.0), "averaging"),
    "vectors without filters": (lambda p: algorithm("smoothout", relative_to="filters", vectors=True), "vectors"),
    "no chunk": (lambda p: algorithm("m-sam", chunks=0), "chunks"),
}


@pytest.mark.parametrize("case", sorted(ONE_LINE))
def test_contradictions_are_told_in_one_line(case: str) -> None:
    make, word = ONE_LINE[case]
    with pytest.raises(InputError) as caught:
        make(problem(seed=19))
    assert word in one_line(caught.value)


AT_STEP: dict[str, tuple[Any, float, int, str]] = {
    "a smoothing with a weight": (R.Smoothing(gaussian()), 0.5, 1, "weight"),
    "a smoothing with two batches": (R.Smoothing(gaussian()), 1.0, 2, "second batch"),
    "local entropy with a weight": (R.LocalEntropy(), 2.0, 1, "weight"),
    "local entropy with some batches": (R.LocalEntropy(steps=5), 1.0, 3, "inner steps"),
    "one gradient with another c": (R.msam(), 0.5, 1, "weight=1"),
    "one gradient with two batches": (R.msam(), 1.0, 2, "second batch"),
    "look without the loss's gradient": (R.Look(R.msam()), 1.0, 1, "penalty inside"),
    "chunks of an objective without a batch to cut": (R.m_sam(), 1.0, 1, "cut"),
}


@pytest.mark.parametrize("case", sorted(AT_STEP))
def test_steps_that_cannot_be_are_told_in_one_line(case: str) -> None:
    regularizer, weight, batches, word = AT_STEP[case]
    p = problem(seed=20)
    with pytest.raises(InputError) as caught:
        regularizer.step([p.objective()] * batches, p.params, weight=weight, state=regularizer.init(p.params),
                         generator=seeded())
    assert word in one_line(caught.value)


def test_more_chunks_than_examples() -> None:
    p = problem(seed=21)
    with pytest.raises(InputError, match="13 chunks of a batch of 12"):
        bnsharp.backward(p.module, p.criterion, (p.x, p.y), R.m_sam(chunks=13))


# ---------------------------------------------------------------- one function in one file


def test_a_new_algorithm_is_one_function() -> None:
    """Registering is all that an algorithm takes: name, options, errors and steps follow."""
    from bnsharp.families import FAMILIES, always, family, find, options_of

    @family("always-uphill", "SAM far away", "none")
    def uphill(name: str, *, far: float = 2.0) -> Any:
        return always(name, R.sam(rho=far))

    try:
        assert options_of(find("always-uphill")[0]) == {"far": 2.0} and "far" in inspect.signature(uphill).parameters
        assert algorithm("always-uphill", far=3.0).regularizer(0) == R.sam(rho=3.0)
        with pytest.raises(InputError, match="did you mean 'far'"):
            algorithm("always-uphill", fat=3.0)
    finally:
        del FAMILIES["always-uphill"]
