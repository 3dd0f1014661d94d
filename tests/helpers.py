"""Small networks, snapshots and subprocesses shared by the tests of objectives, training and commands."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp.types import Params

torch.set_num_threads(1)

fast = settings(max_examples=30, deadline=None, derandomize=True)
cross_entropy = nn.functional.cross_entropy


# ---------------------------------------------------------------- parameters


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """A batch size, ``[]`` or ``[n]``, and the shapes of one to four parameters, 0-d among them."""
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    shape = st.lists(st.integers(1, 4), max_size=3).map(tuple)
    return lead, dict(enumerate_names(draw(st.lists(shape, min_size=1, max_size=4))))


def enumerate_names(shapes: Sequence[tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"layer{i}.weight", shape) for i, shape in enumerate(shapes)]


def random_params(shapes: dict[str, tuple[int, ...]], lead: tuple[int, ...] = (), seed: int = 0) -> Params:
    """Standard normal float64 parameters."""
    generator = torch.Generator().manual_seed(seed)
    return P.make(
        {k: torch.randn((*lead, *s), generator=generator, dtype=torch.float64) for k, s in shapes.items()}, lead
    )


def flat(params: Params) -> list[list[float]]:
    """The coordinates of every point, as plain lists."""
    if not params.batch_size:
        return [[x for v in params.values() for x in v.reshape(-1).tolist()]]
    return [flat(P.pick(params, i))[0] for i in range(params.batch_size[0])]


def double(params: Params) -> Params:
    return P.pmap(Tensor.double, params)


def direction(params: Params, seed: int = 5) -> Params:
    """A standard normal direction of the dtype of ``params``."""
    generator = torch.Generator().manual_seed(seed)
    return P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params)


# ---------------------------------------------------------------- networks


def bn_mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3))
    return generic(net)


def bn_conv(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )
    return generic(net)


def plain_mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def generic(net: nn.Sequential) -> nn.Sequential:
    """Weights, biases and running statistics of normalizers that are not those of initialisation."""
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 1.5)
                m.num_batches_tracked.fill_(7)
    return net


class HomeMadeNorm(nn.Module):
    """Batch normalization in its author's own words: updates buffers in place and crashes if they are None."""

    running_mean: Tensor
    running_scale: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_scale", torch.ones(features))
        self.updates = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.gain * (x - self.running_mean) / self.running_scale
        mean, scale = x.mean(0), (x.var(0, unbiased=False) + 1e-5).sqrt()
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(0.1 * mean)
            self.running_scale = 0.9 * self.running_scale + 0.1 * scale
            self.updates += 1
        return self.gain * (x - mean) / scale


def examples(n: int, shape: tuple[int, ...] = (5,), seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """``(x, y)``: standard normal inputs and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that measuring must leave alone, and torch's global random state."""
    own = {
        name: {k: copy.deepcopy(v) for k, v in m.__dict__.items() if not k.startswith("_")}
        for name, m in module.named_modules()
    }
    return {
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "identity": {k: id(v) for k, v in [*module.named_parameters(), *module.named_buffers()]},
        "attributes": own,
        "requires_grad": {k: p.requires_grad for k, p in module.named_parameters()},
        "grad": {k: None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Equal, down to the bits of tensors."""
    assert type(before) is type(after), where
    if isinstance(before, Tensor):
        assert before.dtype == after.dtype and torch.equal(before, after), where
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}.{key}")
    else:
        assert before == after, where


def assert_close(a: Params, b: Params, rtol: float) -> None:
    """``‖a − b‖ ≤ rtol ‖b‖``, of the same keys and shapes."""
    assert list(a.keys()) == list(b.keys()) and a.batch_size == b.batch_size
    assert all(a[k].shape == b[k].shape for k in a.keys())
    difference, size = P.norm(P.combine(1.0, a, -1.0, b)), P.norm(b)
    assert bool((difference <= rtol * size + 1e-300).all()), (difference / size).max()


def one_line(error: BaseException) -> str:
    """The message, after checking that it is a single line of words."""
    message = str(error)
    assert message.strip() and "\n" not in message, repr(message)
    return message


# ---------------------------------------------------------------- commands


def command(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``bnsharp ARGUMENTS`` in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "bnsharp.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=cwd,
    )


SMALL = ["--epochs", "2", "--batch-size", "32", "--set", "train_size=96", "--set", "width=8", "--set", "depth=1",
         "--set", "threads=1"]
"""A training run of a second."""


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
