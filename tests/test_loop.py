"""``bnsharp.backward`` in anyone's loop: accumulation, autocast, scalers, wrong arguments, what loops hand in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, bn_mlp, cross_entropy, examples, generic, one_line
from stepping import BreaksAt, by_row, cosine, flat, grads, plain_loop, seeded, take, tied, wide_mlp
from torch import Tensor, nn

import bnsharp
from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.regularizers import Chunked, Plain, Smoothing, msam, sam
from bnsharp.structure import Structure
from bnsharp.types import Step

HALVES = [torch.bfloat16, torch.float16]


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
