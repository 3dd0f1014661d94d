"""``bnsharp.backward`` in anyone's loop: accumulation, autocast, scalers, compiled, wrapped and odd modules."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, bn_mlp, cross_entropy, examples, generic, one_line, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnsharp
from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.regularizers import Chunked, Penalty, Plain, Smoothing, msam, sam
from bnsharp.structure import Structure
from bnsharp.types import Step

HALVES = [torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grads(module: nn.Module) -> Tensor:
    """All gradients as one vector, zeros where there is none."""
    inner = P.unwrap(module)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in inner.parameters()])


def flat(params: Any) -> Tensor:
    return torch.cat([v.reshape(-1) for v in params.values()])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))


def wide_mlp(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 3),
    )
    return generic(net)


def by_row(delta: float = 0.05, steps: int = 1, gradient: str = "two-point") -> Penalty:
    groups = bnsharp.ScaleGroups({"0.weight": "row"})
    return Penalty(bnsharp.measures.bn_sharpness(groups, delta=delta, steps=steps, restarts=0, nodes=3), gradient)


def take(module: nn.Module, regularizer: Any, *, batch: Any = None, **options: Any) -> Step:
    """One call of ``backward`` under fixed seeds, on gradients that are None."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    batch = examples(64) if batch is None else batch
    return bnsharp.backward(module, cross_entropy, batch, regularizer, generator=seeded(), **options)


def plain_loop(module: nn.Module, batch: Any, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradients of the loop everyone writes."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    x, y = batch
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = cross_entropy(module(x), y)
    loss.backward()
    return loss.detach(), grads(module)


# ---------------------------------------------------------------- accumulation


def test_micro_batches_are_m_sam() -> None:
    """k calls with ``scale=1/k`` give ``1/k Σ ∇L_k(θ + ρ g_k/‖g_k‖)``: each micro-batch has its own direction."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = examples(24, dtype=torch.float64)
    parts = list(zip(x.chunk(3), y.chunk(3), strict=True))
    expected = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    for part in parts:
        _, g = plain_loop(net, part)
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), g.split([q.numel() for q in net.parameters()]), strict=True):
                p.add_(0.05 * d.reshape(p.shape) / g.norm())
        expected += plain_loop(moved, part)[1] / 3
    net.zero_grad(set_to_none=True)
    for part in parts:
        bnsharp.backward(net, cross_entropy, part, sam(rho=0.05), scale=1 / 3)
    torch.testing.assert_close(grads(net), expected)
    chunked = take(net, Chunked(sam(rho=0.05), 3), batch=(x, y))
    torch.testing.assert_close(flat(chunked.gradient), expected)


def test_state_goes_from_micro_batch_to_micro_batch() -> None:
    """Each call continues from the state it was given, and does not write to it."""
    net, regularizer = bn_mlp(), msam(rho=0.3)
    state = None
    averages = []
    for k in range(3):
        kept = None if state is None else {key: v.clone() for key, v in state.items()}
        step = bnsharp.backward(net, cross_entropy, examples(16, seed=k), regularizer, state=state, scale=1 / 3)
        if state is not None:
            assert_same(kept, state)
        state = step.state
        averages.append(torch.cat([v.reshape(-1) for key, v in state.items() if key.startswith("average/")]))
        previous = averages[-2] if k else torch.zeros_like(averages[-1])
        torch.testing.assert_close(averages[-1], 0.9 * previous + 0.1 * flat(step.gradient))


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", HALVES)
def test_plain_is_the_autocast_loop(dtype: torch.dtype) -> None:
    """The same bits: loss, gradients, running statistics, random state; the output in low precision."""
    ours, theirs = wide_mlp(), wide_mlp()
    with torch.autocast("cpu", dtype=dtype):
        step = take(ours, Plain())
    random = torch.get_rng_state()
    loss, expected = plain_loop(theirs, examples(64), dtype)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(step.loss, loss) and torch.equal(grads(ours), expected) and step.output.dtype == dtype
    assert_same(dict(theirs.named_buffers()), dict(ours.named_buffers()))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_a_target_keeps_its_precision_under_autocast() -> None:
    """Regression: PyTorch promotes the output to the target's float32, and so must we."""
    net = wide_mlp(0.0)
    x, _ = examples(32)
    y = torch.randn(32, 3, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = bnsharp.backward(net, F.mse_loss, (x, y), Plain())
        expected = F.mse_loss(net(x), y)
    assert step.loss.dtype == torch.float32
    assert torch.equal(step.loss, expected.detach())


@pytest.mark.parametrize("delta", [5e-4, 1e-2])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_penalty_is_that_of_float32(dtype: torch.dtype, delta: float) -> None:
    """Both ends of a difference in float32 by default; in autocast's precision it is rounding error at small δ."""

    def penalty_part(**options: Any) -> tuple[Tensor, Step]:
        step = take(wide_mlp(), by_row(delta), **options)
        return flat(step.gradient) - flat(take(wide_mlp(), Plain(), **options).gradient), step

    exact, _ = penalty_part()
    with torch.autocast("cpu", dtype=dtype):
        default, step = penalty_part()
        ambient, cheap = penalty_part(precision="ambient")
    assert cosine(default, exact) > 0.9999
    assert cosine(ambient, exact) < (0.95 if delta < 1e-3 else 0.9999)
    assert step.evaluations == cheap.evaluations + 1  # ∇L(θ) for the loss and for the difference


def test_masks_and_statistics_under_autocast() -> None:
    """The float32 passes see the mask of the loss's own, whatever its precision, and statistics move once."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))

    net, twin = made(), made()
    seen: list[tuple[torch.dtype, Tensor]] = []
    net[1].register_forward_hook(lambda m, args, out: seen.append((out.dtype, out == 0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = take(net, by_row(steps=2))
    plain_loop(twin, examples(64), torch.bfloat16)
    assert [dtype for dtype, _ in seen] == [torch.bfloat16] + [torch.float32] * 4 and step.evaluations == 5
    assert all(torch.equal(mask, seen[0][1]) for _, mask in seen) and bool(seen[0][1].any())
    assert_same(dict(twin.named_buffers()), dict(net.named_buffers()))


def test_other_batches_run_in_float32() -> None:
    """A fresh batch is the regulariser's: its gradients are those without autocast, at no extra evaluation."""
    other = examples(64, seed=5)

    def parts() -> tuple[Tensor, Step]:
        step = take(wide_mlp(0.0), by_row(), other_batches=[other])
        return flat(step.gradient) - flat(take(wide_mlp(0.0), Plain()).gradient), step

    exact, plain = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, amp = parts()
    assert amp.evaluations == plain.evaluations
    torch.testing.assert_close(low, exact, rtol=1e-4, atol=1e-6)


def test_one_pass_regularisers_under_autocast() -> None:
    """What is no difference takes one objective: perturbed passes in float32, the loss's own under autocast."""
    seen: list[torch.dtype] = []
    net = wide_mlp(0.0)
    net[6].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    smoothing = Smoothing(bnsharp.measures.gaussian(sigma=0.01, draws=2))
    for regularizer, dtypes in ((smoothing, [torch.float32] * 2), (msam(rho=0.3), [torch.bfloat16])):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            take(net, regularizer)
        assert seen == dtypes


def test_regularisers_compute_outside_autocast() -> None:
    """Weighted sums of gradients are not autocast's either: a smoothing equals its float32 self."""
    smoothing = Smoothing(bnsharp.measures.gaussian(sigma=0.05, draws=4))
    exact = take(wide_mlp(0.0), smoothing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flat(take(wide_mlp(0.0), smoothing).gradient), flat(exact.gradient))
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


# ---------------------------------------------------------------- scalers


def scaled_loop(net: nn.Module, steps: int, scaler: torch.amp.GradScaler, ours: bool) -> list[float]:
    """A float16 loop with SGD; the scale after each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scales = []
    for k in range(steps):
        x, y = examples(32, seed=k)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            if ours:
                bnsharp.backward(net, cross_entropy, (x, y), Plain(), scaler=scaler)
            else:
                loss = cross_entropy(net(x), y)
        if not ours:
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_plain_is_the_scaler_loop() -> None:
    """Skipped steps, scales and parameters as in the usual float16 loop; the first steps overflow."""
    made = [(wide_mlp(0.0), torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=4)) for _ in range(2)]
    one, two = (scaled_loop(net, 25, scaler, ours) for (net, scaler), ours in zip(made, (True, False), strict=True))
    assert one == two and one[0] < 2.0**30 and one[-1] > min(one)
    for ours, theirs in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "ambient"])
def test_grad_holds_the_scaled_total(precision: str) -> None:
    """``.grad`` is ``scale·s·gradient``; the step itself is not scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    net = wide_mlp()
    with torch.autocast("cpu", dtype=torch.float16):
        plain = take(wide_mlp(), by_row(0.05), precision=precision)
        step = take(net, by_row(0.05), scaler=scaler, precision=precision, scale=0.5)
    torch.testing.assert_close(grads(net), 0.5 * 2.0**10 * flat(step.gradient))
    assert cosine(flat(step.gradient), flat(plain.gradient)) > 0.999
    assert float(step.penalty) == pytest.approx(float(plain.penalty), rel=0.05)


def test_small_gradients_do_not_underflow() -> None:
    """A loss whose float16 gradients round to zero, unless it is multiplied before it is differentiated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1))

    def tiny(out: Tensor, y: Tensor) -> Tensor:
        return 1e-9 * out.float().mean()

    def take_one(scaler: torch.amp.GradScaler | None) -> Step:
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            return bnsharp.backward(net, tiny, (x, y), Plain(), scaler=scaler)

    x, y = examples(16)
    exact = bnsharp.backward(net, tiny, (x, y), Plain())
    lost, kept = take_one(None), take_one(torch.amp.GradScaler("cpu", init_scale=2.0**26))
    assert float(lost.gradient["0.weight"].abs().max()) == 0
    torch.testing.assert_close(kept.gradient["0.weight"], exact.gradient["0.weight"], rtol=2e-2, atol=1e-13)


class BreaksAt(nn.Module):
    """A linear layer that gives an infinite output at one of its evaluations."""

    def __init__(self, at: int):
        super().__init__()
        self.layer, self.at, self.calls = nn.Linear(5, 3), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (float("inf") if self.calls == self.at else 1.0)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "ambient"])
def test_an_overflow_in_any_pass_skips_the_step(at: int, precision: str) -> None:
    """Nothing moves, the scale shrinks, the state is the one passed in, and the next step is taken."""
    torch.manual_seed(0)
    net = BreaksAt(10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = bnsharp.regularizers.friendly_sam(rho=0.05)

    def one(state: Any) -> Step:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            step = bnsharp.backward(
                net, cross_entropy, examples(16), regularizer, state=state, scaler=scaler, precision=precision
            )
        scaler.step(optimizer)
        scaler.update()
        return step

    good = one(None)
    passes = net.calls
    assert passes == good.evaluations == (3 if precision == "float32" else 2)
    before, kept = dict(copy.deepcopy(net.state_dict())), {k: v.clone() for k, v in good.state.items()}
    net.calls, net.at = 0, min(at, passes)
    bad = one(good.state)
    assert not any(bool(g.isfinite().any()) for g in bad.gradient.values()) and bad.evaluations == min(at, passes)
    assert_same(before, dict(net.state_dict()))
    assert_same(kept, bad.state)
    assert scaler.get_scale() == 512.0
    net.calls, net.at = 0, 10
    assert flat(one(bad.state).gradient).isfinite().all() and not torch.equal(net.layer.weight, before["layer.weight"])


def test_a_scaler_that_is_off_is_no_scaler() -> None:
    """The usual ``GradScaler(enabled=use_amp)``."""
    one, two = bn_mlp(), bn_mlp()
    take(one, sam(), scaler=torch.amp.GradScaler("cpu", enabled=False))
    take(two, sam())
    assert torch.equal(grads(one), grads(two))


# ---------------------------------------------------------------- compiled modules


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs have been compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_eager(backend: str, graphs: Callable[[], int]) -> None:
    """The same numbers; two graphs (statistics that move, statistics that do not), however many steps are taken."""
    net, twin = wide_mlp(), wide_mlp()
    compiled = torch.compile(net, backend=backend)
    for k in range(4):
        batch = examples(64, seed=k)
        ours, theirs = take(compiled, by_row(steps=2), batch=batch), take(twin, by_row(steps=2), batch=batch)
        torch.testing.assert_close(flat(ours.gradient), flat(theirs.gradient))
        torch.testing.assert_close(grads(net), grads(twin))
        assert list(ours.gradient.keys()) == list(theirs.gradient.keys())
    assert graphs() == 2
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_compiled_under_autocast(graphs: Callable[[], int]) -> None:
    """Three graphs: the loss's own under autocast, float32 passes, and no others."""
    compiled, twin = torch.compile(wide_mlp(), backend="aot_eager"), wide_mlp()
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = take(compiled, by_row(steps=1)), take(twin, by_row(steps=1))
        torch.testing.assert_close(flat(ours.gradient), flat(theirs.gradient), rtol=1e-2, atol=1e-3)
    assert 2 <= graphs() <= 3


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_what_cannot_be_compiled_runs_eagerly(engine: str, graphs: Callable[[], int]) -> None:
    """Second derivatives and ``vmap`` through a compiled module: as through the module inside."""
    curved = Penalty(bnsharp.Measure(
        bnsharp.geometry.Euclidean(0.1), bnsharp.directions.Draw(bnsharp.laws.Gaussian(), 2),
        bnsharp.profiles.Curvature(), bnsharp.reduce.Mean(),
    ), "exact")
    net = wide_mlp(0.0)
    for regularizer in (curved, Penalty(bnsharp.measures.gaussian(sigma=0.1, draws=3))):
        ours = take(torch.compile(net, backend="aot_eager"), regularizer, engine=engine)
        theirs = take(wide_mlp(0.0), regularizer, engine=engine)
        torch.testing.assert_close(flat(ours.gradient), flat(theirs.gradient), rtol=1e-4, atol=1e-5)
    assert graphs() <= 3


# ---------------------------------------------------------------- odd modules


class Tied(nn.Module):
    """An embedding used twice, one layer that is never used, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unused, self.frozen = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(self.embed(tokens)))).mean(1)


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


def words() -> tuple[Tensor, Tensor]:
    generator = seeded(1)
    return torch.randint(11, (8, 5), generator=generator), torch.randint(11, (8,), generator=generator)


def test_tied_frozen_and_unused_parameters() -> None:
    """A tied weight moves wherever it is used; without a gradient ``.grad`` stays None, as in the usual loop."""
    net = tied()
    before = snapshot(net)
    step = take(net, sam(rho=0.05), batch=words())
    assert net.unused.weight.grad is None and net.frozen.weight.grad is None
    assert list(step.gradient.keys()) == ["embed.weight", "unused.weight", "unused.bias"]
    assert net.head.weight is net.embed.weight and step.gradient["unused.bias"].eq(0).all()
    _, g = plain_loop(moved := tied(), words())
    weight = net.embed.weight.numel()
    with torch.no_grad():
        moved.embed.weight.add_(0.05 * (g[:weight] / g.norm()).reshape(moved.embed.weight.shape))
    torch.testing.assert_close(grads(net), plain_loop(moved, words())[1])
    after = snapshot(net)
    assert_same({k: before[k] for k in ("state", "identity", "requires_grad")},
                {k: after[k] for k in ("state", "identity", "requires_grad")})


def test_an_unused_parameter_is_not_decayed() -> None:
    """Regression: a gradient of zeros in place of None would let AdamW shrink the layer."""
    net = tied()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    before = net.unused.weight.detach().clone()
    take(net, sam(), batch=words())
    optimizer.step()
    assert torch.equal(net.unused.weight, before)


class Routed(nn.Module):
    """A layer that only the second pass of a step reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.late, self.calls = nn.Linear(5, 3), nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.always(x) + (self.late(x) if self.calls > 1 else 0.0)


def test_a_gradient_that_one_pass_lacks() -> None:
    """It counts as zero there; ``.grad`` is written if any pass has one."""
    torch.manual_seed(0)
    net = Routed()
    step = take(net, sam(), batch=examples(16))
    assert net.late.weight.grad is not None and bool(net.late.weight.grad.any())
    torch.testing.assert_close(net.late.weight.grad, step.gradient["late.weight"])


class Checkpointed(nn.Module):
    """Layers whose forward pass is repeated inside the backward pass."""

    def __init__(self, on: bool, reentrant: bool = False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8))
        self.head, self.on, self.reentrant = nn.Linear(8, 3), on, reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=self.reentrant) if self.on else self.body(x)
        return self.head(torch.tanh(hidden))


@pytest.mark.parametrize("gradient", ["two-point", "exact", "plain"])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_layers(gradient: str, compiled: bool, graphs: Callable[[], int]) -> None:
    """The repeated pass sees the perturbed weights, the same mask, and leaves running statistics alone."""
    made = []
    for on in (True, False):
        torch.manual_seed(0)
        made.append(Checkpointed(on).double())
    groups = bnsharp.ScaleGroups({"body.0.weight": "row"})
    measure = bnsharp.measures.bn_sharpness(groups, delta=0.5, steps=1, restarts=0, nodes=3)
    regularizer: Any = Plain() if gradient == "plain" else Penalty(measure, gradient)
    batch = examples(16, dtype=torch.float64)
    called = torch.compile(made[0], backend="aot_eager") if compiled else made[0]
    ours, theirs = take(called, regularizer, batch=batch), take(made[1], regularizer, batch=batch)
    torch.testing.assert_close(flat(ours.gradient), flat(theirs.gradient))
    for (name, a), (_, b) in zip(made[0].named_buffers(), made[1].named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert int(made[0].body[1].num_batches_tracked) == 1


def test_curvature_through_checkpointed_layers() -> None:
    curved = Penalty(bnsharp.measures.hessian_trace(draws=2), "exact")
    steps = []
    for on in (True, False):
        torch.manual_seed(0)
        steps.append(take(Checkpointed(on).double(), curved, batch=examples(16, dtype=torch.float64)))
    torch.testing.assert_close(flat(steps[0].gradient), flat(steps[1].gradient), rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_one_line() -> None:
    net = Checkpointed(True, reentrant=True)
    before = snapshot(net)
    with pytest.raises(InputError, match="use_reentrant=False") as error:
        take(net, sam(), batch=(examples(16)[0].requires_grad_(), examples(16)[1]))
    one_line(error.value)
    assert_same(before["identity"], snapshot(net)["identity"])


def test_recurrent_layers_see_the_perturbed_weights() -> None:
    """LSTMs keep a flat list of their weights."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][:, -1])

    torch.manual_seed(0)
    net = Recurrent().double()
    batch = examples(8, (5, 4), dtype=torch.float64)
    _, g = plain_loop(net, batch)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for p, d in zip(moved.parameters(), g.split([q.numel() for q in net.parameters()]), strict=True):
            p.add_(0.5 * d.reshape(p.shape) / g.norm())
    take(net, sam(rho=0.5), batch=batch)
    torch.testing.assert_close(grads(net), plain_loop(moved, batch)[1])


@dataclass
class Answer:
    """An output that PyTorch does not know as a tree."""

    logits: Tensor
    hidden: dict[str, Tensor]


class Structured(nn.Module):
    """Nested inputs, a dataclass for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, views: dict[str, Any], shift: Tensor) -> Answer:
        hidden = views["inner"]["x"] + views["other"] + shift
        return Answer(self.layer(hidden), {"hidden": hidden})


def test_nested_inputs_and_structured_outputs() -> None:
    torch.manual_seed(0)
    net = Structured()
    x, y = examples(16)
    inputs = {"views": {"inner": {"x": x}, "other": 2 * x}, "shift": torch.ones(5)}
    step = bnsharp.backward(net, lambda out, y: cross_entropy(out.logits, y), (inputs, y), sam())
    assert isinstance(step.output, Answer) and not step.output.logits.requires_grad
    expected = cross_entropy(net.layer(3 * x + 1), y)
    assert step.loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(context: Any) -> None:
    """The same step as outside, also on a batch made in there, and plain tensors for gradients."""
    one, two = bn_mlp(), bn_mlp()
    take(one, by_row())
    with context():
        take(two, by_row(), batch=examples(64))
        assert not torch.is_grad_enabled()
    assert torch.equal(grads(one), grads(two)) and not grads(two).is_inference()
    assert_same(dict(one.named_buffers()), dict(two.named_buffers()))


def test_after_an_error_the_module_is_as_it_was() -> None:
    net = bn_mlp()
    before = snapshot(net)
    calls = []

    def criterion(output: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return cross_entropy(output, y)

    with pytest.raises(ZeroDivisionError):
        bnsharp.backward(net, criterion, examples(16), sam())
    after = snapshot(net)
    assert_same(before["identity"], after["identity"])
    assert_same(before["requires_grad"], after["requires_grad"])
    assert all(p.grad is None for p in net.parameters()) and net[1].running_mean is not None


@pytest.mark.parametrize("k", [0, 2])
def test_costs(k: int) -> None:
    """The table of docs/own-loop.md: gradients in float32, under autocast, and under autocast throughout."""
    other = {"other_batches": [examples(64, seed=3)]}
    table: list[tuple[Any, dict[str, Any], tuple[int, int, int]]] = [
        (Plain(), {}, (1, 1, 1)),
        (sam(), {}, (2, 3, 2)),
        (by_row(steps=k), {}, (2 + k, 3 + k, 2 + k)),
        (by_row(steps=k), other, (3 + k, 3 + k, 3 + k)),
        (by_row(steps=k, gradient="central"), {}, (3 + k, 4 + k, 3 + k)),
        (msam(rho=0.3), {}, (1, 1, 1)),
    ]
    for regularizer, options, expected in table:
        net, passes = wide_mlp(), []
        net[6].register_forward_hook(lambda m, args, out, passes=passes: passes.append(1))
        counted = [take(net, regularizer, **options).evaluations]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            counted += [take(net, regularizer, precision=p, **options).evaluations for p in ("float32", "ambient")]
        assert tuple(counted) == expected and sum(counted) == len(passes), regularizer


# ---------------------------------------------------------------- other libraries


def test_fabric() -> None:
    """Names without the wrapper's; in mixed precision the step under plain autocast; outside of it one line."""
    fabric_module = pytest.importorskip("lightning.fabric", reason="needs lightning")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net, twin = wide_mlp(), wide_mlp()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert P.unwrap(model) is net and P.parameters(model).keys() == P.parameters(net).keys()
    with pytest.raises(InputError, match=r"fabric\.autocast") as error:
        take(model, by_row())
    one_line(error.value)
    with fabric.autocast():
        ours = take(model, by_row())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = take(twin, by_row())
    assert torch.equal(flat(ours.gradient), flat(theirs.gradient)) and torch.equal(grads(net), grads(twin))
    optimizer.step()
    assert not torch.equal(net[0].weight, twin[0].weight)


def test_fabric_compiled(graphs: Callable[[], int]) -> None:
    """Fabric takes a compiled module apart and compiles it again around its own strategy: still compiled here."""
    fabric_module = pytest.importorskip("lightning.fabric", reason="needs lightning")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(torch.compile(wide_mlp(), backend="eager"))
    ours, theirs = take(model, by_row()), take(wide_mlp(), by_row())
    torch.testing.assert_close(flat(ours.gradient), flat(theirs.gradient))
    assert graphs() == 2


def tiny_bert(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )).train()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_hugging_face_model(checkpointed: bool) -> None:
    """Dropout on: SAM's second gradient is the plain loop's at the moved weights under the same seed."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    net = tiny_bert(transformers)
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    encoded = transformers.BatchEncoding({"input_ids": words()[0], "attention_mask": torch.ones(8, 5)})
    y = words()[1] % 3

    def plain(module: nn.Module) -> Tensor:
        module.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        cross_entropy(module(**encoded).logits, y).backward()
        return grads(module)

    moved = tiny_bert(transformers)
    g = plain(moved)
    with torch.no_grad():
        for p, d in zip(moved.parameters(), g.split([q.numel() for q in moved.parameters()]), strict=True):
            p.add_(0.5 * d.reshape(p.shape) / g.norm())
    torch.manual_seed(7)
    step = bnsharp.backward(
        net, lambda out, y: cross_entropy(out.logits, y), (encoded, y), sam(rho=0.5), generator=seeded()
    )
    torch.testing.assert_close(grads(net), plain(moved), rtol=1e-4, atol=1e-6)
    assert step.output.logits.shape == (8, 3) and not step.output.logits.requires_grad


def test_hugging_face_reentrant_checkpointing_is_one_line() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    net = tiny_bert(transformers)
    net.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant=False") as error:
        bnsharp.backward(
            net, lambda out, y: cross_entropy(out.logits, y), ({"input_ids": words()[0]}, words()[1] % 3), sam()
        )
    one_line(error.value)


# ---------------------------------------------------------------- several processes


def shared_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def smoothing() -> Smoothing:
    return Smoothing(bnsharp.measures.gaussian(sigma=0.1, draws=2))


def whole_batch() -> tuple[Tensor, Tensor]:
    return examples(20, dtype=torch.float64)


def part_of(rank: int) -> tuple[Tensor, Tensor]:
    """Parts of unequal size."""
    x, y = whole_batch()
    rows = slice(0, 12) if rank == 0 else slice(12, 20)
    return x[rows], y[rows]


class HalfUsed(nn.Module):
    """A parameter that only one rank's examples reach."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gate if len(x) == 12 else self.layer(x)


def on_rank(rank: int, port: int, folder: str) -> None:
    """Every case of one launch; what each gave is stored for the tests."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    parallel = nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {}

    def case(name: str, net: nn.Module, regularizer: Any, batch: Any, **options: Any) -> Step:
        torch.manual_seed(rank)
        options.setdefault("generator", seeded())
        step = bnsharp.backward(parallel(net), cross_entropy, batch, regularizer, **options)
        found[name] = {"grad": grads(net), "loss": step.loss, "state": step.state, "buffers": dict(net.named_buffers()),
                       "none": [k for k, p in net.named_parameters() if p.grad is None]}
        return step

    part = part_of(rank)
    for directions in ("synchronised", "local"):
        case(f"penalty {directions}", shared_net(), by_row(0.3), part, directions=directions)
        case(f"state {directions}", shared_net(), msam(rho=0.3), part, directions=directions)
        case(f"smoothing {directions}", shared_net(), smoothing(), part, directions=directions, generator=None)
    case("plain local", shared_net(), Plain(), part, directions="local")
    case("compiled", torch.compile(shared_net(), backend="eager"), by_row(0.3), part)  # type: ignore[arg-type]
    torch.manual_seed(0)
    case("unused", HalfUsed().double(), sam(), part, directions="local")
    for directions in ("synchronised", "local"):
        net = BreaksAt(2 if rank == 0 else 100)
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype=torch.float16):
            step = case(f"overflow {directions}", net, sam(), (part[0].float(), part[1]), scaler=scaler,
                        directions=directions, precision="ambient")
        before = net.layer.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        found[f"overflow {directions}"] |= {
            "scale": scaler.get_scale(), "moved": not torch.equal(before, net.layer.weight),
            "finite": flat(step.gradient).isfinite().any(),
        }
    usual = shared_net()
    wrapped = parallel(usual)
    cross_entropy(wrapped(part[0]), part[1]).backward()
    found["usual"] = {"grad": grads(usual)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_every_rank_has_the_same_gradient(ranks: list[dict[str, Any]]) -> None:
    """To the last bit, in every case, and no parameter is left out on one rank alone."""
    for name, found in ranks[0].items():
        torch.testing.assert_close(found["grad"], ranks[1][name]["grad"], rtol=0, atol=0, equal_nan=True)
        assert found.get("none", []) == ranks[1][name].get("none", []) == [], name


@pytest.mark.parametrize("name", ["penalty", "state", "compiled"])
def test_synchronised_is_one_process_on_the_whole_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    net = shared_net()
    step = take(net, msam(rho=0.3) if name == "state" else by_row(0.3), batch=whole_batch())
    key = name if name == "compiled" else f"{name} synchronised"
    for found in ranks:
        torch.testing.assert_close(found[key]["grad"], grads(net))
        torch.testing.assert_close(found[key]["loss"], step.loss)
        torch.testing.assert_close(found[key]["state"], step.state)
        torch.testing.assert_close(
            {k.removeprefix("_orig_mod."): v for k, v in found[key]["buffers"].items()}, dict(net.named_buffers())
        )


@pytest.mark.parametrize("name", ["penalty", "state"])
def test_local_is_the_mean_of_the_parts_steps(name: str, ranks: list[dict[str, Any]]) -> None:
    """Weighted by their examples; each with its own direction and batch statistics; states averaged alike."""
    made: Any = msam(rho=0.3) if name == "state" else by_row(0.3)
    steps = [take(shared_net(), made, batch=part_of(rank)) for rank in range(2)]
    for found in ranks:
        mean = 0.6 * flat(steps[0].gradient) + 0.4 * flat(steps[1].gradient)
        torch.testing.assert_close(found[f"{name} local"]["grad"], mean)
        for key, value in found[f"{name} local"]["state"].items():
            expected = 0.6 * steps[0].state[key] + 0.4 * steps[1].state[key]
            torch.testing.assert_close(value, expected.to(value.dtype))
    assert cosine(mean, ranks[0][f"{name} synchronised"]["grad"]) < 0.9999


def test_local_and_plain_is_what_ddp_does(ranks: list[dict[str, Any]]) -> None:
    """But for the weights of unequal parts: DDP takes the mean of the ranks' means."""
    parts = [plain_loop(shared_net(), part_of(rank))[1] for rank in range(2)]
    torch.testing.assert_close(ranks[0]["usual"]["grad"], 0.5 * parts[0] + 0.5 * parts[1])
    torch.testing.assert_close(ranks[0]["plain local"]["grad"], 0.6 * parts[0] + 0.4 * parts[1])


def test_directions_are_drawn_together_or_apart(ranks: list[dict[str, Any]]) -> None:
    """Without a generator all ranks agree on a seed; local ones draw different noise from it."""
    net = shared_net()
    torch.manual_seed(0)
    bnsharp.backward(net, cross_entropy, whole_batch(), smoothing())
    torch.testing.assert_close(ranks[0]["smoothing synchronised"]["grad"], grads(net))
    assert cosine(ranks[0]["smoothing local"]["grad"], grads(net)) < 0.9999


@pytest.mark.parametrize("directions", ["synchronised", "local"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(directions: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        overflow = found[f"overflow {directions}"]
        assert overflow["scale"] == 32.0 and not overflow["moved"] and not overflow["finite"]


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"precision": "bf16"}, "expected one of float32, ambient"),
        ({"directions": "locale"}, "did you mean 'local'"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "no autocast"),
        ({"other_batches": examples(4)}, "expected a pair"),
        ({"other_batches": torch.zeros(2, 2)}, "list of batches"),
        ({"batch": torch.zeros(2, 5)}, "expected a pair"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_contradicting_options_are_one_line(options: dict[str, Any], said: str) -> None:
    net = bn_mlp()
    with pytest.raises(InputError, match=said) as error:
        take(net, sam(), **options)
    one_line(error.value)
    assert all(p.grad is None for p in net.parameters())


def test_a_scaler_in_bfloat16_is_one_line() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InputError, match="bfloat16") as error:
        take(bn_mlp(), sam(), scaler=torch.amp.GradScaler("cpu"))
    one_line(error.value)


def test_a_detached_output_is_one_line() -> None:
    net = bn_mlp()
    with pytest.raises(InputError, match="depends on no parameter") as error:
        bnsharp.backward(net, lambda out, y: cross_entropy(out.detach(), y), examples(16), sam())
    one_line(error.value)


def test_parameters_made_in_inference_mode_are_one_line() -> None:
    with torch.inference_mode():
        net = nn.Linear(5, 3)
        with pytest.raises(InputError, match="inference_mode") as error:
            take(net, sam(), batch=examples(8))
    one_line(error.value)


# ------------------------------------------------------------ what a loop of many steps hands in


def test_a_shared_gradient_is_the_steps_own_tensor() -> None:
    net, batch = generic(bn_mlp().double()), examples(16, dtype=torch.float64)
    structure = Structure(net)
    for share in (False, True):
        net.zero_grad(set_to_none=True)
        step = bnsharp.backward(net, cross_entropy, batch, sam(rho=0.1), share_gradient=share, structure=structure)
        for name, p in net.named_parameters():
            assert p.grad is not None and torch.equal(p.grad, step.gradient[name])
            assert (p.grad.data_ptr() == step.gradient[name].data_ptr()) is share
    before = grads(net).clone()
    step = bnsharp.backward(net, cross_entropy, batch, sam(rho=0.1), share_gradient=True, structure=structure)
    torch.testing.assert_close(grads(net), before + flat(step.gradient), rtol=1e-12, atol=0)


def test_a_structure_knows_tied_weights_and_owners() -> None:
    structure = Structure(tied())
    assert list(structure.parameters) == [name for name, _ in tied().named_parameters()]
    assert max(len(structure.places(name)) for name in structure.parameters) == 2
    assert structure.places("nothing") == []
    assert [type(m) for m in Structure(generic(bn_mlp())).owners] == [
        type(m) for m in bn_mlp().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


class SummedShifts(nn.Module):
    """Autograd gives ``p`` and ``q`` one gradient tensor, and ``r`` one number for all of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
        self.last = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + (self.p + self.q)) * self.r.sum()


@dataclass(frozen=True)
class Remembering(Plain):
    """Keeps the last gradient as its state, and descends that very tensor."""

    def step(self, *args: Any, **kwargs: Any) -> Step:
        step = super().step(*args, **kwargs)
        return Step(*(getattr(step, k) for k in ("loss", "penalty", "gradient", "evaluations")),
                    dict(step.gradient.items()), step.ratio)


def test_shared_gradients_may_be_changed_in_place() -> None:
    x, y = torch.randn(5, 3, generator=seeded(), dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    torch.manual_seed(0)
    net = SummedShifts()
    cross_entropy(net(x), y).backward()
    wanted = 1e-3 * grads(net) / grads(net).norm()
    net.zero_grad()
    step = bnsharp.backward(net, cross_entropy, (x, y), Plain(), share_gradient=True)
    assert net.last.weight.grad is step.gradient["last.weight"]
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert torch.allclose(grads(net), wanted, rtol=1e-4, atol=0)


def test_a_state_that_is_the_gradient_is_not_changed_with_it() -> None:
    net = generic(bn_mlp().double())
    step = bnsharp.backward(net, cross_entropy, examples(16, dtype=torch.float64), Remembering(), share_gradient=True)
    before = {k: v.clone() for k, v in step.state.items()}
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert all(torch.equal(v, before[k]) and v.any() for k, v in step.state.items())
    assert grads(net).norm() < 2e-3


def test_scripted_layers_are_measured_and_trained_as_others_are() -> None:
    def made(layers: Callable[..., Any]) -> nn.Module:
        torch.manual_seed(0)
        first = layers(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)).double())
        return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3).double())

    x, y = torch.randn(16, 12, generator=seeded(), dtype=torch.float64), torch.arange(16) % 3
    plain, scripted = made(lambda layers: layers), made(torch.jit.script)
    values = []
    for net in (plain, scripted):
        step = bnsharp.backward(net, cross_entropy, (x, y), sam(rho=0.1))
        theta = P.scaled(bnsharp.parameters(net), 1.5)
        values.append([flat(step.gradient), grads(net), bnsharp.Objective(net, cross_entropy, (x, y))(theta),
                       *(b.double() for b in net.buffers())])
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-12)
    assert all(isinstance(p, nn.Parameter) for p in scripted.parameters())


def test_a_structure_that_is_no_longer_the_modules_is_made_anew() -> None:
    def replaced_parameter(net: nn.Module) -> None:
        first = next(m for m in net.modules() if isinstance(m, nn.Linear))
        first.weight = nn.Parameter(first.weight.detach() + 0.1)

    def replaced_layer(net: nn.Module) -> None:
        name, last = [(k, m) for k, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
        net.set_submodule(name, generic(nn.Linear(last.in_features, last.out_features).double()))

    def added_parameter(net: nn.Module) -> None:
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        last.register_parameter("shift", nn.Parameter(torch.zeros(last.out_features, dtype=torch.float64)))
        last.register_forward_hook(lambda m, _, out: out + m.shift)

    batch = examples(16, dtype=torch.float64)
    for change in (replaced_parameter, replaced_layer, added_parameter):
        net = generic(bn_mlp().double())
        structure = Structure(net)
        assert structure.is_of(net) and not structure.is_of(copy.deepcopy(net))
        change(net)
        assert not structure.is_of(net)
        torch.manual_seed(0)
        bnsharp.backward(net, cross_entropy, batch, sam(rho=0.1), structure=structure)
        got = grads(net)
        assert all(p.grad is not None for p in net.parameters())
        net.zero_grad()
        torch.manual_seed(0)
        bnsharp.backward(net, cross_entropy, batch, sam(rho=0.1))
        assert torch.equal(got, grads(net))
