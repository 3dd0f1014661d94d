"""``bnsharp.backward`` with compiled and odd modules, and those of other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import assert_same, bn_mlp, cross_entropy, examples, one_line, snapshot
from stepping import by_row, flat, grads, plain_loop, seeded, take, tied, wide_mlp, words
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnsharp
from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.regularizers import Penalty, Plain, msam, sam

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
