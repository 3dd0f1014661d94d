"""Training is reproducible to the byte, resumes as if never interrupted, and is plain PyTorch underneath."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    assert_same,
    bn_mlp,
    cross_entropy,
    examples,
    one_line,
    plain_mlp,
    read_lines,
    snapshot,
)
from torch import Tensor, nn

from bnsharp import Trainer, parameters, scale_groups
from bnsharp import params as P
from bnsharp.algorithms import algorithm
from bnsharp.checkpoint import CHECKPOINT, METRICS, TIMING, RunFolder, load
from bnsharp.errors import DivergedError, InputError
from bnsharp.regularizers import Plain
from bnsharp.schedules import constant, cosine, multistep
from bnsharp.trainer import accuracy, evaluate
from bnsharp.types import Params, Step, TrackingContext

N, BATCH, EPOCHS = 24, 6, 4
STEPS = N // BATCH
X, Y = examples(N)
TEST = examples(10, seed=9)


def epoch(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled pass, with noise as an augmentation."""
    for indices in torch.randperm(N, generator=generator).split(BATCH):
        yield X[indices] + 0.01 * torch.randn(BATCH, 5, generator=generator), Y[indices]


def sgd(lr: float = 0.1, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def trainer(name: str = "sgd", options: dict[str, Any] | None = None, net: nn.Module | None = None,
            **settings: Any) -> Trainer:
    """A trainer of a network with BN and Dropout by a named algorithm."""
    net = bn_mlp() if net is None else net
    chosen = algorithm(name, scale_groups(net, X[:8]), **(options or {}))
    defaults: dict[str, Any] = {
        "optimizer": sgd(momentum=0.9), "regularizer": chosen.regularizer, "weight": chosen.weight,
        "other_batches": chosen.other_batches, "epochs": EPOCHS, "seed": 3,
        "evaluations": {"test": lambda module: evaluate(module, cross_entropy, [TEST])},
    }
    return Trainer(net, cross_entropy, settings.pop("epoch", epoch), **{**defaults, **settings})


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sam": ("sam", {"rho": 0.1}),
    "sgds-2": ("sgds-2", {"delta_growth": 1.1}),
    "independent batch": ("sgds-1", {"independent_batch": True, "weight_growth": 1.2}),
    "paper": ("sgds-1-paper-delta", {"delta": 0.01}),
}
runs = pytest.mark.parametrize("run", sorted(RUNS))


def folder(path: Path) -> RunFolder:
    return RunFolder.create(path, {"a": "run"})


# ---------------------------------------------------------------- one seed, one run


@runs
def test_two_runs_with_one_seed_write_the_same_bytes(tmp_path, run):
    finals = []
    for i in range(2):
        torch.manual_seed(100 + i)  # of no influence
        made = trainer(*RUNS[run], folder=folder(tmp_path / str(i)))
        made.fit()
        finals.append(parameters(made.module))
    first, second = ((tmp_path / str(i) / METRICS).read_bytes() for i in range(2))
    assert first == second and len(first.splitlines()) == EPOCHS
    assert_same(dict(finals[0].items()), dict(finals[1].items()))


def test_another_seed_is_another_run():
    results = [trainer(seed=seed).fit().history for seed in (0, 1)]
    assert results[0] != results[1]


def test_the_callers_random_state_is_left_alone():
    made = trainer("sgds-1")
    state = torch.get_rng_state()
    made.fit()
    assert torch.equal(torch.get_rng_state(), state)


def test_callbacks_and_folders_do_not_change_the_run(tmp_path):
    seen: list[tuple[int, int]] = []
    records: list[dict[str, Any]] = []
    plain = trainer("sgds-1").fit()
    watched = trainer(
        "sgds-1", folder=folder(tmp_path), on_step=lambda e, s: seen.append((e, s)), on_epoch=records.append
    ).fit()
    assert plain.history == watched.history == records == read_lines(tmp_path / METRICS)
    assert seen == [(e, s) for e in range(EPOCHS) for s in range(STEPS)]
    assert plain.last == plain.history[-1] and plain.steps == EPOCHS * STEPS


# ---------------------------------------------------------------- resuming


class Stop(Exception):
    """What an interruption looks like."""


def stop_at(at: int, step: int | None = None) -> dict[str, Any]:
    """Callbacks that interrupt after ``at`` epochs, or ``step`` steps later."""

    def on_step(e: int, s: int) -> None:
        if (e, s) == (at, step):
            raise Stop

    def on_epoch(record: dict[str, Any]) -> None:
        if step is None and record["epoch"] == at:
            raise Stop

    return {"on_step": on_step, "on_epoch": on_epoch}


def resumed(tmp_path: Path, interruption: dict[str, Any], make: Callable[..., Trainer]) -> None:
    """An interrupted and resumed run equals an uninterrupted one."""
    whole = make(folder=folder(tmp_path / "whole"))
    result = whole.fit()
    with pytest.raises(Stop):
        make(folder=folder(tmp_path / "cut"), **interruption).fit()
    torch.manual_seed(77)
    cut = make(folder=RunFolder.resume(tmp_path / "cut", {"a": "run"}), resume=True)
    again = cut.fit()
    assert (tmp_path / "cut" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    assert len(read_lines(tmp_path / "cut" / TIMING)) == EPOCHS
    assert again.history == result.history and again.steps == result.steps
    assert_same(whole.module.state_dict(), cut.module.state_dict())


@runs
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, run):
    resumed(tmp_path, stop_at(2), lambda **options: trainer(*RUNS[run], **options))


@pytest.mark.parametrize(
    "schedule", [cosine(EPOCHS * STEPS), multistep([1, 3], 0.1, STEPS)], ids=["cosine", "multistep"]
)
@pytest.mark.parametrize("optimizer", [sgd(momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("at", [(1, None), (2, 1), (0, 2)], ids=["after an epoch", "within an epoch", "in the first"])
def test_so_it_does_with_schedules_and_optimizers(tmp_path, schedule, optimizer, at):
    resumed(
        tmp_path, stop_at(*at),
        lambda **options: trainer(*RUNS["independent batch"], schedule=schedule, optimizer=optimizer, **options),
    )


@pytest.mark.parametrize("fault", ["save", "append"])
def test_a_run_killed_while_writing_resumes_too(tmp_path, monkeypatch, fault):
    """Between metrics and checkpoint, or half a line into the metrics."""
    original, calls = getattr(RunFolder, fault), 0

    def killed(self: RunFolder, *args: Any) -> None:
        nonlocal calls
        if "cut" in self.path.parts:
            calls += fault == "save" or args[0] == METRICS
            if calls == 3:
                if fault == "append":
                    with open(self.path / METRICS, "a") as file:
                        file.write('{"epoch": 3, "lo')
                calls += 1
                raise Stop
        original(self, *args)

    monkeypatch.setattr(RunFolder, fault, killed)
    resumed(tmp_path, {}, lambda **options: trainer("sgds-1", **options))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    made = trainer(folder=folder(tmp_path))
    result = made.fit()
    before = {name: (tmp_path / name).read_bytes() for name in (METRICS, TIMING, CHECKPOINT)}
    again = trainer(folder=RunFolder(tmp_path), resume=True).fit()
    assert again.history == result.history and again.steps == result.steps
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


# ---------------------------------------------------------------- plain PyTorch underneath


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_sgd_is_the_loop_that_everyone_writes(dtype):
    """With momentum, weight decay, Dropout, a schedule and running statistics, step by step."""
    x, y, net = X.to(dtype), Y, bn_mlp().to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    by_hand = copy.deepcopy(net)

    def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((x[i], y[i]) for i in torch.arange(N).split(BATCH))

    states: list[dict[str, Tensor]] = []
    made = Trainer(
        net, cross_entropy, batches, optimizer=sgd(momentum=0.9, weight_decay=0.01), schedule=cosine(2 * STEPS),
        epochs=2, seed=5,
        on_step=lambda e, s: states.append({k: v.clone() for k, v in net.state_dict().items()}),
    )
    records = made.fit().history

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    torch.manual_seed(5)
    by_hand.train()
    for step in range(2 * STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / (2 * STEPS)))
        rows = torch.arange(N).split(BATCH)[step % STEPS]
        loss = cross_entropy(by_hand(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % STEPS == 0:
            total = 0.0
        total += float(loss.detach()) / STEPS
        if step % STEPS == STEPS - 1:
            assert records[step // STEPS]["loss"] == pytest.approx(total, rel=tolerance)
        for name, value in by_hand.state_dict().items():
            torch.testing.assert_close(states[step][name], value, rtol=tolerance, atol=tolerance)


def test_sam_is_two_passes_of_the_loop():
    """``∇L(θ + ρ g/‖g‖)`` at weight 1; only the first pass moves the running statistics; one Dropout mask for both."""
    net = bn_mlp().double()
    by_hand, x = copy.deepcopy(net), X.double()
    made = Trainer(
        net, cross_entropy, lambda g: [(x[:8], Y[:8]), (x[8:16], Y[8:16])], optimizer=sgd(), epochs=1, seed=5,
        regularizer=algorithm("sam", rho=0.05).regularizer,
    )
    made.fit()
    torch.manual_seed(5)
    by_hand.train()
    for rows in (slice(0, 8), slice(8, 16)):
        random, weights = torch.get_rng_state(), list(by_hand.parameters())
        gradient = torch.autograd.grad(cross_entropy(by_hand(x[rows]), Y[rows]), weights)
        after, buffers = torch.get_rng_state(), {k: v.clone() for k, v in by_hand.named_buffers()}
        norm = torch.sqrt(sum((g * g).sum() for g in gradient))
        with torch.no_grad():
            for w, g in zip(weights, gradient, strict=True):
                w.add_(0.05 * g / norm)
        torch.set_rng_state(random)
        second = torch.autograd.grad(cross_entropy(by_hand(x[rows]), Y[rows]), weights)
        torch.set_rng_state(after)
        with torch.no_grad():
            for w, g, s in zip(weights, gradient, second, strict=True):
                w.sub_(0.05 * g / norm + 0.1 * s)
            for name, buffer in by_hand.named_buffers():
                buffer.copy_(buffers[name])
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- schedules, weights, growth


@dataclass
class Spy:
    """A plain regulariser that notes what it is asked."""

    epoch: int
    calls: list[tuple[int, float, int]] = field(default_factory=list)

    def init(self, params: Params) -> dict[str, Tensor]:
        return {"count": torch.zeros(())}

    def step(self, objectives: Any, params: Params, *, weight: float, state: Any, generator: Any) -> Step:
        self.calls.append((self.epoch, weight, len(objectives)))
        step = Plain().step(objectives, params, weight=weight, state=state, generator=generator)
        return Step(step.loss, step.penalty, step.gradient, 1, {"count": state["count"] + 1}, step.ratio)


@pytest.mark.parametrize("independent", [False, True])
def test_the_regulariser_gets_its_epoch_weight_and_batches(independent):
    calls: list[tuple[int, float, int]] = []
    made = trainer(
        regularizer=lambda e: Spy(e, calls), weight=lambda e: 2.0**e, other_batches=int(independent), epochs=3
    )
    history = made.fit().history
    assert calls == [(e, 2.0**e, 1 + independent) for e in range(3) for _ in range(STEPS)]
    assert [r["weight"] for r in history] == [1.0, 2.0, 4.0]
    assert float(made.checkpoint()["regularizer"]["count"]) == 3 * STEPS


def test_an_independent_batch_is_another_batch():
    seen: list[bool] = []

    class Compare(Spy):
        def step(self, objectives: Any, params: Params, **rest: Any) -> Step:
            seen.append(torch.equal(objectives[0].x, objectives[1].x))
            return super().step(objectives, params, **rest)

    trainer(regularizer=Compare(0), other_batches=1).fit()
    assert seen and not any(seen)


def test_growth_reaches_the_step():
    """A run with growth is, epoch by epoch, a run with that δ and that λ."""
    options = {"delta": 0.05, "delta_growth": 1.5, "weight": 0.4, "weight_growth": 0.5}
    grown = trainer("sgds-1", options, epochs=3).fit().history
    assert [r["weight"] for r in grown] == [0.4, 0.2, 0.1]
    groups = scale_groups(bn_mlp(), X[:8])
    fixed = [algorithm("sgds-1", groups, delta=0.05 * 1.5**e, weight=0.4 * 0.5**e) for e in range(3)]
    by_hand = trainer(
        "sgds-1", regularizer=lambda e: fixed[e].regularizer(0), weight=lambda e: fixed[e].weight(0), epochs=3
    )
    assert by_hand.fit().history == grown


@pytest.mark.parametrize(("schedule", "expected"), [
    (None, [0.1] * 4),
    (constant(), [0.1] * 4),
    (multistep([1, 3], 0.1, STEPS), [0.1, 0.01, 0.01, 0.001]),
    (cosine(4 * STEPS), [0.1 * 0.5 * (1 + math.cos(math.pi * e / 4)) for e in range(4)]),
])
def test_schedules(schedule, expected):
    history = trainer(schedule=schedule).fit().history
    assert [r["lr"] for r in history] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("make", [
    lambda: multistep([2, 1], 0.1, 4), lambda: multistep([1, 1], 0.1, 4), lambda: multistep([0], 0.1, 4),
    lambda: multistep([1], 0.0, 4), lambda: multistep([1], math.nan, 4), lambda: cosine(0),
])
def test_bad_schedules_are_refused_in_one_line(make):
    with pytest.raises(InputError) as caught:
        make()
    one_line(caught.value)


# ---------------------------------------------------------------- the record


KEYS = {
    "epoch", "steps", "lr", "weight", "loss", "accuracy", "penalty", "ratio", "gradient_evaluations", "parameter_norm",
    "test_loss", "test_accuracy",
}


@pytest.mark.parametrize(("run", "per_step"), [
    (("sgd", {}), 1), (("sam", {}), 2), (("sgds-0", {}), 2), (("sgds-3", {}), 5),
    (("sgds-3", {"independent_batch": True}), 6),
])
def test_the_record_of_an_epoch(run, per_step):
    made = trainer(*run, epochs=2)
    history = made.fit().history
    for e, record in enumerate(history, start=1):
        assert set(record) == KEYS
        assert record["epoch"] == e and record["steps"] == e * STEPS
        assert record["gradient_evaluations"] == per_step * e * STEPS
        assert all(math.isfinite(record[key]) for key in KEYS)
        assert 0 <= record["accuracy"] <= 1 and record["penalty"] >= 0 and record["ratio"] >= 0
    assert history[-1]["parameter_norm"] == pytest.approx(float(P.norm(parameters(made.module))), rel=1e-6)
    after = evaluate(made.module, cross_entropy, [TEST])
    assert (after["loss"], after["accuracy"]) == (history[-1]["test_loss"], history[-1]["test_accuracy"])


def test_training_loss_and_accuracy_weight_unequal_batches():
    net = plain_mlp()

    def unequal(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((X[:16], Y[:16]), (X[16:21], Y[16:21]), (X[21:], Y[21:]))

    record = trainer(net=net, epoch=unequal, optimizer=sgd(lr=1e-30), epochs=1).fit().last
    out = net(X)
    assert record["loss"] == pytest.approx(float(cross_entropy(out, Y).detach()), rel=1e-6)
    assert record["accuracy"] == pytest.approx(float((out.argmax(1) == Y).double().mean()), rel=1e-12)


def test_evaluate_weights_unequal_batches_and_leaves_the_module_alone():
    net = bn_mlp()
    net.train()
    net[3].eval()
    before = snapshot(net)
    whole = evaluate(net, cross_entropy, [(X, Y)])
    cut = evaluate(net, cross_entropy, [(X[:17], Y[:17]), (X[17:18], Y[17:18]), (X[18:], Y[18:])])
    assert_same(before, snapshot(net))
    assert cut == pytest.approx(whole, rel=1e-6)
    net.eval()
    with torch.no_grad():
        assert whole["loss"] == pytest.approx(float(cross_entropy(net(X), Y)), rel=1e-6)
    with pytest.raises(InputError) as caught:
        evaluate(net, cross_entropy, [])
    one_line(caught.value)


def test_accuracy_is_for_class_scores_only():
    assert float(accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))) == 0.5
    assert math.isnan(accuracy(torch.zeros(4), torch.zeros(4))) and math.isnan(accuracy({}, torch.zeros(4)))


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bn_mlp()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.inner(left + right)


@pytest.mark.parametrize("form", ["tuple", "dictionary"])
def test_inputs_may_be_a_tuple_or_a_dictionary(form):
    """What an objective takes, the trainer and its evaluation take."""
    x = (X, X) if form == "tuple" else {"left": X, "right": X}
    Trainer(Two(), cross_entropy, lambda g: [(x, Y)], optimizer=sgd()).fit()
    evaluate(Two(), cross_entropy, [(x, Y)])


# ---------------------------------------------------------------- what stops it


@pytest.mark.parametrize("epochs", [0, -1, 1.5, math.nan, math.inf])
def test_epochs_are_a_whole_number_of_at_least_one(epochs):
    with pytest.raises(InputError) as caught:
        trainer(epochs=epochs)
    assert "epochs" in one_line(caught.value)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_bad_weight_is_refused_before_training(weight):
    with pytest.raises(InputError) as caught:
        trainer(weight=weight)
    assert "weight" in one_line(caught.value)


def test_an_epoch_without_batches_is_refused_in_one_line():
    with pytest.raises(InputError) as caught:
        trainer(epoch=lambda generator: []).fit()
    assert "batch" in one_line(caught.value)


@pytest.mark.parametrize("name", ["sgd", "sgds-1"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, name):
    def poisoned(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal passes
        passes += 1
        for index, (x, y) in enumerate(epoch(generator)):
            yield (x * math.nan if (passes, index) == (3, 1) else x), y

    passes = 0
    made = trainer(name, epoch=poisoned, folder=folder(tmp_path))
    with pytest.raises(DivergedError) as caught:
        made.fit()
    message = one_line(caught.value)
    assert "epoch 3" in message and "step 2" in message and "epoch 2 is kept" in message
    assert load(tmp_path / CHECKPOINT)["epoch"] == 2 and len(read_lines(tmp_path / METRICS)) == 2
    good = trainer(name, epochs=2)
    good.fit()
    assert_same(good.module.state_dict(), load(tmp_path / CHECKPOINT)["module"])


def test_a_learning_rate_too_large_stops_training():
    with pytest.raises(DivergedError) as caught:
        trainer(net=plain_mlp(), optimizer=sgd(lr=1e38)).fit()
    assert "learning rate" in one_line(caught.value)


def test_gradients_do_not_pile_up_from_step_to_step():
    nets = [bn_mlp() for _ in range(2)]
    for p in nets[1].parameters():
        p.grad = torch.full_like(p, 100.0)  # left by earlier work
    for net in nets:
        trainer(net=net).fit()
    assert_close(parameters(nets[0]), parameters(nets[1]), 0.0)


def test_frozen_parameters_stay_where_they_are():
    net = bn_mlp()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.detach().clone()
    trainer("sgds-1", net=net, optimizer=sgd(weight_decay=0.1)).fit()
    assert torch.equal(net[0].weight, before) and net[0].weight.grad is None


@pytest.mark.parametrize("clipped", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_told_and_not_applied(tmp_path, clipped):
    """The loss is finite, and so are penalty and ratio."""

    class Broken(Spy):
        def step(self, objectives: Any, params: Params, **rest: Any) -> Step:
            step = super().step(objectives, params, **rest)
            if len(self.calls) == STEPS + 2:
                step.gradient["4.bias"] = step.gradient["4.bias"] * math.inf
            return step

    states: list[dict[str, Tensor]] = []
    net = bn_mlp()
    made = trainer(
        net=net, regularizer=Broken(0), folder=folder(tmp_path), max_norm=clipped,
        on_step=lambda e, s: states.append({k: p.detach().clone() for k, p in net.named_parameters()}),
    )
    with pytest.raises(DivergedError) as caught:
        made.fit()
    message = one_line(caught.value)
    assert "gradient" in message and "epoch 2, step 2" in message and "checkpoint of epoch 1 is kept" in message
    assert len(states) == STEPS + 1
    assert_same(states[-1], {k: p.detach() for k, p in net.named_parameters()})


def test_a_method_need_not_know_penalty_and_ratio():
    """NaN is what stands for a number that is not computed; it is no divergence."""

    class Unknown(Spy):
        def step(self, objectives: Any, params: Params, **rest: Any) -> Step:
            step = super().step(objectives, params, **rest)
            unknown = torch.full((), math.nan)
            return Step(step.loss, unknown, step.gradient, 1, step.state, unknown)

    record = trainer(regularizer=Unknown(0)).fit().last
    assert math.isnan(record["penalty"]) and math.isnan(record["ratio"]) and math.isfinite(record["loss"])


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("name", ["sgd", "sam"])
def test_clipping_bounds_the_whole_gradient(name):
    """The step is ``lr·g·min(1, c/‖g‖)``, g the gradient of loss and regulariser over all parameters."""
    free, clipped = bn_mlp(), bn_mlp()
    before = parameters(free)
    for net, max_norm in ((free, None), (clipped, 0.05)):
        trainer(name, net=net, optimizer=sgd(lr=1.0), epoch=lambda g: [(X, Y)], epochs=1, max_norm=max_norm).fit()
    moved, bounded = (P.combine(1.0, parameters(net), -1.0, before) for net in (free, clipped))
    norm = float(P.norm(moved))
    assert norm > 0.1 and float(P.norm(bounded)) == pytest.approx(0.05, rel=1e-4)
    assert_close(bounded, P.scaled(moved, 0.05 / norm), 1e-4)


def test_a_bound_that_no_gradient_reaches_changes_nothing():
    assert trainer(max_norm=1e6).fit().history == trainer().fit().history


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_bound_is_refused_in_one_line(bound):
    with pytest.raises(InputError, match="max_norm") as caught:
        trainer(max_norm=bound)
    one_line(caught.value)


# ---------------------------------------------------------------- averages


class Half:
    """``m ← (m + θ)/2``, and what it was asked."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def init(self, module: nn.Module) -> dict[str, Tensor]:
        return dict(parameters(module).items())

    def update(self, module: nn.Module, state: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.steps.append(step)
        return {k: 0.5 * (state[k] + p) for k, p in parameters(module).items()}

    @contextmanager
    def applied(self, module: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
        own = parameters(module)
        for k, p in P.live(module).items():
            p.copy_(state[k])
        yield
        for k, p in P.live(module).items():
            p.copy_(own[k])


def test_averages_follow_every_step_and_are_evaluated(tmp_path):
    half, seen, net = Half(), [], bn_mlp()
    made = trainer(net=net, averages={"half": half}, on_step=lambda e, s: seen.append(parameters(net)))
    start = parameters(net)
    history = made.fit().history
    assert half.steps == list(range(1, EPOCHS * STEPS + 1))
    mean = start
    for theta in seen:
        mean = P.pmap(lambda m, p: 0.5 * (m + p), mean, theta)
    assert_same(dict(mean.items()), dict(made.checkpoint()["averages"]["half"]))
    added = {"half_test_loss", "half_test_accuracy"}
    assert all(set(record) == KEYS | added for record in history)
    assert [{k: v for k, v in r.items() if k not in added} for r in history] == trainer().fit().history
    with half.applied(net, dict(mean.items())):
        assert evaluate(net, cross_entropy, [TEST])["loss"] == history[-1]["half_test_loss"]


def test_averages_are_resumed(tmp_path):
    resumed(
        tmp_path, stop_at(1, 2),
        lambda **options: trainer(averages={"half": Half()}, checkpoint_steps=1, **options),
    )
    with pytest.raises(InputError, match="averages") as caught:
        trainer(folder=RunFolder(tmp_path / "whole"), resume=True).fit()
    one_line(caught.value)


# ---------------------------------------------------------------- trackers


@pytest.mark.parametrize("every", [1, 2])
def test_a_tracker_adds_to_the_record_and_disturbs_nothing(tmp_path, every):
    contexts: list[TrackingContext] = []

    def nosy(module: nn.Module, context: TrackingContext) -> dict[str, float]:
        contexts.append(context)
        torch.rand(3), random.random(), np.random.rand()
        return {"size": float(P.norm(parameters(module))), "draw": float(torch.rand((), generator=context.generator))}

    plain = trainer("sgds-1").fit().history
    watched = trainer("sgds-1", trackers={"nosy": nosy}, track_every=every, folder=folder(tmp_path)).fit().history
    assert [{k: v for k, v in r.items() if k not in ("size", "draw")} for r in watched] == plain
    tracked = [r for r in watched if "size" in r]
    assert [r["epoch"] for r in tracked] == [c.epoch for c in contexts] == list(range(every, EPOCHS + 1, every))
    for record, context in zip(tracked, contexts, strict=True):
        assert record["size"] == pytest.approx(record["parameter_norm"], rel=1e-6)
        assert context.parameter_norm == record["parameter_norm"] and context.steps == record["steps"]
        assert context.lr == record["lr"] and context.weight == record["weight"]
        assert set(context.record) == KEYS
    assert len({r["draw"] for r in tracked}) == len(tracked)
    timing = read_lines(tmp_path / TIMING)
    assert [t["epoch"] for t in timing if t.get("tracking_seconds", 0) > 0] == [r["epoch"] for r in tracked]
    assert not [k for r in watched for k in r if "second" in k]


def test_tracking_is_resumed_with_the_same_draws(tmp_path):
    def draw(module: nn.Module, context: TrackingContext) -> dict[str, float]:
        return {"draw": float(torch.rand((), generator=context.generator))}

    resumed(tmp_path, stop_at(2, 1), lambda **options: trainer(trackers={"a": draw}, checkpoint_steps=1, **options))


def test_two_numbers_of_one_name_are_refused_in_one_line():
    for settings in (
        {"trackers": {"mine": lambda module, context: {"loss": 0.0}}},
        {"evaluations": {"a": lambda m: {"b_c": 0.0}, "a_b": lambda m: {"c": 0.0}}},
        {"evaluations": {"test": lambda m: {"loss": 0.0}, "half_test": lambda m: {"loss": 0.0}},
         "averages": {"half": Half()}},
    ):
        with pytest.raises(InputError, match="record holds already") as caught:
            trainer(**settings).fit()
        one_line(caught.value)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_track_every_is_a_whole_number_of_at_least_one(every):
    with pytest.raises(InputError, match="track_every"):
        trainer(track_every=every)
