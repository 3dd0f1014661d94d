"""Regularised steps: published values, counted gradients, clipping, and a backward pass in one's own loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem, problem, problems
from torch import Tensor, nn

import bnsharp
from bnsharp import InputError, Objective, exact_norms, reduce
from bnsharp import params as P
from bnsharp.directions import Ascend
from bnsharp.geometry import Euclidean
from bnsharp.laws import Uniform
from bnsharp.measures import Measure, bn_sharpness, fisher_rao, gaussian, hessian_trace
from bnsharp.profiles import Line
from bnsharp.reduce import Maximum
from bnsharp.regularizers import Penalty, Plain, asam, sam
from bnsharp.types import Params

GRADIENTS = ("two-point", "central", "tangent", "exact")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take(regularizer: Any, objectives: Any, params: Params, weight: float = 1.0) -> bnsharp.Step:
    return regularizer.step(objectives, params, weight=weight, state=regularizer.init(params), generator=seeded())


# ---------------------------------------------------------------- published values


class Bowl(nn.Module):
    """``½ Σ a_i w_i²``, a = (1, 10), w₀ = (1, 0.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x * self.w**2).sum(1)


BOWL = torch.tensor([[1.0, 10.0]], dtype=torch.float64), torch.zeros(1)


@pytest.mark.parametrize("through", ["step", "backward"])
@pytest.mark.parametrize(
    ("regularizer", "expected"),
    [
        (sam(rho=0.1), (0.85020184965, 0.00145799366)),
        (asam(rho=0.5, eta=0.0), (0.80535819312, 0.02943570625)),
        (asam(rho=0.5, eta=0.01), (0.80489722658, 0.02836953421)),
    ],
    ids=["SAM", "ASAM eta=0", "ASAM eta=0.01"],
)
def test_published_values(regularizer: Penalty, expected: tuple[float, float], through: str) -> None:
    """Three steps of SGD, learning rate 0.05, against the authors' implementations."""
    module = Bowl()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    def criterion(output: Tensor, y: Tensor) -> Tensor:
        return output.mean()

    for _ in range(3):
        optimizer.zero_grad()
        if through == "step":
            step = take(regularizer, [Objective(module, criterion, BOWL)], P.parameters(module))
            module.w.grad = step.gradient["w"]
        else:
            bnsharp.backward(module, criterion, BOWL, regularizer)
        optimizer.step()
    assert module.w.tolist() == pytest.approx(list(expected), abs=1e-8)


def test_plain_is_the_gradient() -> None:
    p = problem(seed=1)
    step = take(Plain(), [p.objective()], p.params)
    torch.testing.assert_close(oracles.flatten(step.gradient), oracles.gradient(p.loss, p.params))
    assert step.evaluations == 1 and step.penalty.item() == step.ratio.item() == 0
    assert step.loss.item() == pytest.approx(p.loss(p.params).item())


# ---------------------------------------------------------------- sharpness-aware steps


@given(problems(activations=("tanh", "relu")), strategies.exponents(), strategies.deltas(1e-3, 0.05))
def test_c_equal_one_is_a_sharpness_aware_step(p: Problem, exponent: float, delta: float) -> None:
    """``λ = (p+1)^{1/p}``: the gradient at ``θ + δv``, v the group-wise steepest direction."""
    theta, v = oracles.flatten(p.params), oracles.steepest(p.loss, p.params, p.index)
    ahead = oracles.to_params(theta + delta * v, p.params)
    weight = (exponent + 1) ** (1 / exponent)
    measure = bn_sharpness(p.groups, delta=delta, p=exponent, steps=0, restarts=0)
    step = take(Penalty(measure), [p.objective()], p.params, weight)
    rise = float(p.loss(ahead) - p.loss(p.params))
    assert step.penalty.item() == pytest.approx(abs(rise) / weight, rel=1e-9)
    if rise > 0:
        expected = oracles.gradient(p.loss, ahead)
        torch.testing.assert_close(oracles.flatten(step.gradient), expected, rtol=1e-9, atol=1e-11)


@given(problems(activations=("tanh", "relu")), st.sampled_from([0.01, 0.1]))
def test_sam_is_the_gradient_uphill(p: Problem, rho: float) -> None:
    theta, g = oracles.flatten(p.params), oracles.gradient(p.loss, p.params)
    step = take(sam(rho=rho), [p.objective()], p.params)
    expected = oracles.gradient(p.loss, oracles.to_params(theta + rho * g / g.norm(), p.params))
    torch.testing.assert_close(oracles.flatten(step.gradient), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradient_is_loss_plus_weighted_penalty(gradient: str) -> None:
    """``∇L + λr`` and ``ratio = ‖λr‖/‖∇L‖``, with r and the penalty's value from ``penalty``."""
    p = problem("conv", seed=2)
    regularizer = Penalty(bn_sharpness(p.groups, delta=0.05, steps=2, restarts=0), gradient=gradient)
    value, r = regularizer.penalty(p.objective(), p.params)
    step = take(regularizer, [p.objective()], p.params, 0.3)
    g, flat = oracles.gradient(p.loss, p.params), oracles.flatten(r)
    torch.testing.assert_close(oracles.flatten(step.gradient), g + 0.3 * flat)
    assert step.penalty.item() == pytest.approx(value.item())
    assert step.ratio.item() == pytest.approx(float(0.3 * flat.norm() / g.norm()))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_independent_batch(gradient: str) -> None:
    """``∇L_B + λ r_{B'}``."""
    one, two = problem("mlp", seed=3), problem("mlp", seed=3)
    two = strategies.Problem(one.module, two.x.flip(0) + 0.1, two.y, two.criterion, two.rows, two.inert)
    regularizer = Penalty(bn_sharpness(one.groups, delta=0.05, steps=1, restarts=0), gradient=gradient)
    _, r = regularizer.penalty(two.objective(), one.params)
    step = take(regularizer, [one.objective(), two.objective()], one.params, 0.5)
    torch.testing.assert_close(
        oracles.flatten(step.gradient), oracles.gradient(one.loss, one.params) + 0.5 * oracles.flatten(r)
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_weight_zero_is_the_loss_gradient(gradient: str) -> None:
    p = problem(seed=4)
    step = take(Penalty(bn_sharpness(p.groups, steps=1, restarts=0), gradient=gradient), [p.objective()], p.params, 0.0)
    torch.testing.assert_close(oracles.flatten(step.gradient), oracles.gradient(p.loss, p.params))
    assert step.ratio.item() == 0


@pytest.mark.parametrize("gradient", ["two-point", "exact"])
def test_random_directions_penalise_their_mean(gradient: str) -> None:
    """A smoothing penalty: two-point is ``mean ∇L(θ+σε) − ∇L(θ)``, which is its exact gradient."""
    p = problem(seed=5)
    measure = gaussian(sigma=0.05, draws=6)
    value, r = Penalty(measure, gradient=gradient).penalty(p.objective(), p.params, seeded(3))
    leaves = {k: x.clone().requires_grad_() for k, x in p.params.items()}
    expected = measure.penalty(p.objective(), P.make(leaves), seeded(3))
    grads = torch.autograd.grad(expected, list(leaves.values()))
    assert value.item() == pytest.approx(expected.item())
    torch.testing.assert_close(oracles.flatten(r), torch.cat([g.reshape(-1) for g in grads]))


def test_curvature_penalty_against_differences() -> None:
    """The trace's gradient, which needs a third derivative."""
    p = problem("mlp", "softplus", seed=6)
    measure = hessian_trace(draws=2)
    value, r = Penalty(measure, gradient="exact").penalty(p.objective(), p.params)
    theta = oracles.flatten(p.params)
    assert value.item() == pytest.approx(measure(p.objective(), p.params).value)
    for seed in range(3):
        d = torch.randn(len(theta), generator=seeded(seed), dtype=theta.dtype)

        def at(h: float, d: Tensor = d) -> float:
            return measure(p.objective(), oracles.to_params(theta + h * d, p.params)).value

        slope = oracles.central_difference(at, 1e-4)
        flat = oracles.flatten(r)
        assert float(flat @ d) == pytest.approx(slope, rel=1e-4, abs=1e-5 * float(flat.norm()))


def test_the_penalty_of_a_norm_along_theta_moves_with_it() -> None:
    """Fisher–Rao: v = θ, so that v is differentiated too."""
    p = problem("mlp", "softplus", seed=7)
    value, r = Penalty(fisher_rao(), gradient="exact").penalty(p.objective(), p.params)
    theta, flat = oracles.flatten(p.params), oracles.flatten(r)
    assert value.item() == pytest.approx(fisher_rao()(p.objective(), p.params).value)
    for seed in range(3):
        d = torch.randn(len(theta), generator=seeded(seed), dtype=theta.dtype)

        def at(h: float, d: Tensor = d) -> float:
            return fisher_rao()(p.objective(), oracles.to_params(theta + h * d, p.params)).value

        slope = oracles.central_difference(at, 1e-4)
        assert float(flat @ d) == pytest.approx(slope, rel=1e-4, abs=1e-5 * float(flat.norm()))


# ---------------------------------------------------------------- counted gradients


class Counting(Objective):
    """Counts gradient evaluations on its own, point by point."""

    counted = 0

    def value_and_grad(self, params: Params) -> Any:
        self.counted += 1
        return super().value_and_grad(params)

    def many_value_and_grad(self, source: Any) -> Any:
        self.counted += P.count(source)
        return super().many_value_and_grad(source)

    def weighted_gradients(self, source: Any, weights: Tensor) -> Any:
        self.counted += P.count(source)
        return super().weighted_gradients(source, weights)


def spend(regularizer: Any, p: Problem, independent: bool = False) -> int:
    objectives = [Counting(p.module, p.criterion, (p.x, p.y)) for _ in range(2 if independent else 1)]
    step = take(regularizer, objectives, p.params)
    counted = sum(o.counted for o in objectives)
    assert counted == step.evaluations == sum(o.evaluations["gradients"] for o in objectives)
    assert all(o.evaluations["losses"] == o.evaluations["products"] == 0 for o in objectives)
    return counted


@pytest.mark.parametrize("rule", ["riemannian", "power", "alternate"])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_gradients_per_step(steps: int, rule: str) -> None:
    """SGDS-n: n + 2 on the loss's own batch, n + 3 on a batch of its own; central costs one more; no other losses."""
    p = problem(seed=7)
    measure = bn_sharpness(p.groups, delta=0.05, steps=steps, restarts=0, rule=rule)
    for gradient, more in (("two-point", 0), ("tangent", 0), ("central", 1)):
        assert spend(Penalty(measure, gradient), p) == steps + 2 + more
        assert spend(Penalty(measure, gradient), p, independent=True) == steps + 3 + more


def test_gradients_of_the_others() -> None:
    p = problem(seed=7)
    assert spend(Plain(), p) == 1
    assert spend(sam(), p) == spend(asam(), p) == 2
    assert spend(Penalty(bn_sharpness(p.groups, delta=0.1, steps=0, restarts=0)), p) == 2


# ---------------------------------------------------------------- clip, tangent, bad input


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("clip", [1e-4, 1e-2, 1e6])
def test_clip_bounds_the_penalty_gradient(gradient: str, clip: float) -> None:
    """``‖r‖ ≤ clip`` before λ; below the bound nothing changes; the direction never does."""
    p = problem(seed=8)
    measure = bn_sharpness(p.groups, delta=0.1, steps=1, restarts=0)
    g = oracles.gradient(p.loss, p.params)
    free, clipped = (
        oracles.flatten(take(Penalty(measure, gradient, c), [p.objective()], p.params, 2.0).gradient) - g
        for c in (None, clip)
    )
    assert float(clipped.norm()) <= 2 * clip * (1 + 1e-9)
    assert float(clipped.norm()) == pytest.approx(min(2 * clip, float(free.norm())), rel=1e-7)
    assert float(clipped @ free) == pytest.approx(float(clipped.norm() * free.norm()), rel=1e-7)
    step = take(Penalty(measure, gradient, clip), [p.objective()], p.params, 2.0)
    assert step.ratio.item() == pytest.approx(float(clipped.norm() / g.norm()), rel=1e-7)


@given(problems(activations=("tanh", "relu")), strategies.deltas(), st.sampled_from(["tangent", "exact"]))
def test_projected_gradients_are_orthogonal_to_invariant_groups(p: Problem, delta: float, gradient: str) -> None:
    """And so is the whole update, since ``∇L`` is: no step changes invariant norms at first order."""
    measure = bn_sharpness(p.groups, delta=delta, steps=1, restarts=0, nodes=4)
    step = take(Penalty(measure, gradient), [p.objective()], p.params)
    theta, g = oracles.flatten(p.params), oracles.flatten(step.gradient)
    for name in p.rows:
        for row, slope in zip(p.params[name], step.gradient[name], strict=True):
            assert abs(float((row * slope).sum())) < 1e-8 * float(row.norm() * g.norm())
    assert len(theta) == len(g)


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.nan, math.inf])
def test_bad_weights(weight: float) -> None:
    p = problem(seed=1)
    with pytest.raises(InputError, match="weight=") as caught:
        take(Penalty(bn_sharpness(p.groups)), [p.objective()], p.params, weight)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="weight="):
        bnsharp.backward(p.module, p.criterion, (p.x, p.y), sam(), weight)
    assert all(q.grad is None for q in p.module.parameters())


BAD: dict[str, Callable[[], Any]] = {
    "gradient": lambda: Penalty(gaussian(), gradient="three-point"),
    "tangent without groups": lambda: Penalty(gaussian(), gradient="tangent"),
    "no two-point form": lambda: Penalty(hessian_trace()),
    **{f"clip={c}": lambda c=c: Penalty(gaussian(), clip=c) for c in (0.0, -1.0, math.nan, math.inf)},
    **{f"rho={r}": lambda r=r: sam(rho=r) for r in (0.0, -0.1, math.nan, math.inf)},
    **{f"asam rho={r}": lambda r=r: asam(rho=r) for r in (0.0, math.nan)},
    "asam eta": lambda: asam(eta=-1.0),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_options(name: str) -> None:
    with pytest.raises(InputError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- backward, in one's own loop


class WithDropout(nn.Module):
    """A normalized layer, dropout and a head; remembers the masks it used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        self.masks.append(self.drop(torch.ones_like(h)).detach())
        return self.head(h.tanh() * self.masks[-1])


def a_batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    return torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def a_module() -> tuple[WithDropout, bnsharp.ScaleGroups]:
    torch.manual_seed(0)
    return WithDropout().double().train(), bnsharp.ScaleGroups({"first.weight": "row"})


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_mask_per_step(gradient: str) -> None:
    """Every evaluation of one step sees the same dropout mask, the next step another."""
    module, groups = a_module()
    regularizer = Penalty(bn_sharpness(groups, steps=2, restarts=0, nodes=3), gradient)
    seen = []
    for _ in range(2):
        module.masks.clear()
        bnsharp.backward(module, F.cross_entropy, a_batch(), regularizer, generator=seeded())
        assert len(module.masks) >= 3
        assert all(torch.equal(m, module.masks[0]) for m in module.masks)
        assert (module.masks[0] == 0).any() and (module.masks[0] > 0).any()
        seen.append(module.masks[0])
    assert not torch.equal(*seen)


def test_a_step_draws_as_much_as_a_forward_pass() -> None:
    """The global random state moves on as after one plain forward, whatever the regulariser."""
    states = []
    for regularizer in (None, sam(), Penalty(bn_sharpness(a_module()[1], steps=2, restarts=0))):
        module, _ = a_module()
        torch.manual_seed(5)
        if regularizer is None:
            module(a_batch()[0])
        else:
            bnsharp.backward(module, F.cross_entropy, a_batch(), regularizer, generator=seeded())
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("gradient", [*GRADIENTS, "sam", "plain"])
@pytest.mark.parametrize("other", [False, True])
def test_running_statistics_move_once_per_step(gradient: str, other: bool) -> None:
    """As after one plain forward on the loss's batch; the regulariser's own batch leaves them alone."""
    module, groups = a_module()
    twin, _ = a_module()
    regularizer: Any = {"sam": sam(), "plain": Plain()}.get(gradient)
    if regularizer is None:
        regularizer = Penalty(bn_sharpness(groups, steps=2, restarts=0, nodes=3), gradient)
    for k in range(2):
        others = [a_batch(9)] if other else []
        bnsharp.backward(module, F.cross_entropy, a_batch(k), regularizer, other_batches=others, generator=seeded())
        twin(a_batch(k)[0])
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer, rtol=1e-14, atol=0)
    assert int(module.norm.num_batches_tracked) == 2
    assert module.training and module.norm.training and module.norm.track_running_stats


def test_plain_backward_is_loss_backward() -> None:
    module, _ = a_module()
    twin, _ = a_module()
    x, y = a_batch()
    torch.manual_seed(3)
    step = bnsharp.backward(module, F.cross_entropy, (x, y), Plain(), generator=seeded())
    torch.manual_seed(3)
    output = twin(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-14)
    torch.testing.assert_close(step.output, output.detach())
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["sam", "two-point", "exact"])
def test_gradient_accumulation(name: str) -> None:
    """Micro-batches with ``scale=1/k`` add up to the mean of their steps; parameters do not move in between."""
    p = problem(seed=9, examples=24)
    p.module.train()
    regularizer = sam() if name == "sam" else Penalty(bn_sharpness(p.groups, steps=1, restarts=0, nodes=3), name)
    parts = [(p.x[k::3], p.y[k::3]) for k in range(3)]
    before = P.parameters(p.module)
    separate = []
    for part in parts:
        p.module.zero_grad(set_to_none=True)
        step = bnsharp.backward(p.module, p.criterion, part, regularizer, 0.7, generator=seeded())
        grads = torch.cat([q.grad.reshape(-1) for q in p.module.parameters()])
        torch.testing.assert_close(grads, oracles.flatten(step.gradient))
        separate.append(grads)
    p.module.zero_grad(set_to_none=True)
    for part in parts:
        bnsharp.backward(p.module, p.criterion, part, regularizer, 0.7, generator=seeded(), scale=1 / 3)
    together = torch.cat([q.grad.reshape(-1) for q in p.module.parameters()])
    torch.testing.assert_close(together, torch.stack(separate).mean(0))
    assert torch.equal(oracles.flatten(P.parameters(p.module)), oracles.flatten(before))


def test_existing_gradients_are_added_to() -> None:
    """``.grad`` None is made, an existing one is added to in place, a frozen parameter gets none."""
    p = problem(seed=10, bias=True)
    p.module.train()
    parameters = dict(p.module.named_parameters())
    parameters["6.bias"].requires_grad_(False)
    kept = torch.full_like(parameters["3.weight"], 2.0)
    parameters["3.weight"].grad = kept
    step = bnsharp.backward(p.module, p.criterion, (p.x, p.y), sam(), generator=seeded())
    assert parameters["3.weight"].grad is kept
    torch.testing.assert_close(kept, 2 + step.gradient["3.weight"])
    torch.testing.assert_close(parameters["6.weight"].grad, step.gradient["6.weight"])
    assert parameters["6.bias"].grad is None and "6.bias" not in step.gradient.keys()
    # what was added is a copy: a later step does not change the step returned
    value = step.gradient["6.weight"].clone()
    parameters["6.weight"].grad.zero_()
    torch.testing.assert_close(step.gradient["6.weight"], value)


def test_backward_is_the_step_of_the_regularizer() -> None:
    """In train mode a BN network without dropout is the measured objective."""
    p = problem("conv", seed=11)
    p.module.train()
    with exact_norms(p.module):
        regularizer = Penalty(bn_sharpness(p.groups, delta=0.05, steps=3, restarts=0))
        ours = bnsharp.backward(p.module, p.criterion, (p.x, p.y), regularizer, 0.5, generator=seeded())
        plain = take(regularizer, [p.objective()], p.params, 0.5)
    torch.testing.assert_close(oracles.flatten(ours.gradient), oracles.flatten(plain.gradient))
    assert ours.evaluations == plain.evaluations and ours.penalty.item() == pytest.approx(plain.penalty.item())


def test_backward_without_generator_reads_the_global_one() -> None:
    """Reproducible under ``torch.manual_seed``; two steps differ."""
    p = problem(seed=12)
    p.module.train()
    smoothing = Penalty(gaussian(sigma=0.1, draws=2))

    def run() -> list[float]:
        torch.manual_seed(0)
        return [bnsharp.backward(p.module, p.criterion, (p.x, p.y), smoothing).penalty.item() for _ in range(2)]

    first = run()
    assert first == run() and first[0] != first[1]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_zero_gradient_is_finite(gradient: str) -> None:
    """At an exact minimum nothing divides by zero."""
    p = strategies.at_own_output(problem(seed=13))
    step = take(Penalty(bn_sharpness(p.groups, delta=0.05, steps=2, restarts=0), gradient), [p.objective()], p.params)
    assert oracles.flatten(step.gradient).isfinite().all() and step.penalty.item() > 0


def test_line_in_a_fixed_ball() -> None:
    """A line profile needs no groups: κ and δ are the law's, and the ball's radius multiplies δ."""
    p = problem(seed=14)
    measure = Measure(Euclidean(0.2), Ascend(0), Line(Uniform(0.5), 3.0), Maximum())
    theta, g = oracles.flatten(p.params), oracles.gradient(p.loss, p.params)
    ahead = oracles.to_params(theta + 0.1 * g / g.norm(), p.params)
    value, r = Penalty(measure).penalty(p.objective(), p.params)
    assert value.item() == pytest.approx(4 ** (-1 / 3) * float(p.loss(ahead) - p.loss(p.params)))
    torch.testing.assert_close(oracles.flatten(r), 4 ** (-1 / 3) * (oracles.gradient(p.loss, ahead) - g))


@dataclass(frozen=True)
class Doubled(reduce.Mean):
    """Derived from a reduction and another function, of a single value too."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, stderr, size = super().__call__(values)
        return 2 * value, 2 * stderr, size


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "one", [reduce.Mean(), reduce.Maximum(), reduce.PowerMean(3.0), reduce.FreeEnergy(2.0), Doubled()]
)
def test_derivatives_of_reductions_against_differences(one: reduce.Reduce, n: int) -> None:
    values, h = torch.tensor([0.3, -1.2, 0.9], dtype=torch.float64)[:n], 1e-6
    value, w = reduce.derivative(one, values)
    assert torch.equal(value, one(values)[0])
    for i, e in enumerate(torch.eye(n, dtype=torch.float64)):
        difference = (one(values + h * e)[0] - one(values - h * e)[0]) / (2 * h)
        torch.testing.assert_close(w[i], difference, rtol=1e-6, atol=1e-8)
