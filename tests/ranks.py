"""What several ranks do at once in ``test_distributed.py``, each in a process of its own; one process for comparison.

A piece of work is a function of the ranks that gives tensors; one process gives what all of them should.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from helpers import HomeMadeNorm, bn_conv, bn_mlp, cross_entropy, examples
from torch import Tensor, nn

from bnsharp import Objective, Trainer, measures, parameters, scale_groups
from bnsharp import params as P
from bnsharp.algorithms import algorithm
from bnsharp.cli import main
from bnsharp.distributed import Ranks, joined
from bnsharp.objective import check_parts
from bnsharp.synchronised import synchronised
from bnsharp.trainer import evaluate

Work = Callable[[Ranks], dict[str, Any]]


SECONDS = 240
"""After which ranks that are not done are given up."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What ``torchrun`` sets."""
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def together(folder: Path, *work: Work, count: int = 2) -> list[dict[str, Any]]:
    """Results of some pieces of work on every rank, by their names: one launch."""
    context = mp.spawn(  # type: ignore[no-untyped-call]
        _process, (count, f"file://{folder / 'meeting'}", str(folder), work), nprocs=count, join=False
    )
    try:
        until = time.monotonic() + SECONDS
        while not context.join(timeout=1):
            if time.monotonic() > until:
                raise TimeoutError(f"{count} ranks were not done within {SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank: int, count: int, meeting: str, folder: str, work: tuple[Work, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment(rank, count, 0))  # what commands see; the ranks meet in a file, which no one else has
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    with joined() as ranks:
        torch.save({w.__name__: w(ranks) for w in work}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- exchanges


def exchanges(ranks: Ranks) -> dict[str, Any]:
    """Every kind of exchange once."""
    i = ranks.index
    mixed = {"single": torch.full((2,), 1.0 + i), "double": torch.full((3,), 10.0 * (1 + i), dtype=torch.float64)}
    point = P.make({"a": torch.tensor([1.0 + i, 2.0]), "n": torch.tensor(7)})
    equal, other = torch.tensor([float("inf"), 0.1]), torch.tensor([1.0, 2.0 + i])
    ranks.unify_([equal, other, torch.tensor([i])])

    def bad() -> int:
        from bnsharp.errors import InputError

        raise InputError("said by rank 0 alone")

    told = ""
    try:
        ranks.from_first(bad)
    except ValueError as error:
        told = f"{type(error).__name__}: {error}"
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(2, generator=ranks.own(generator))
    x, y = examples(7)
    part = ranks.share(({"x": x, "scale": torch.ones(2)}, y))
    drift = ""
    try:
        ranks.check_equal(P.make({"a": torch.tensor(1.0 + i * 1e-7)}), "here")
    except RuntimeError as error:
        drift = str(error)
    ranks.check_equal(P.make({"a": torch.tensor(1.0)}), "here")
    return {
        "mean": ranks.mean(mixed, weight=1.0 + 2 * i), "point": dict(ranks.mean(point, 1.0 + 2 * i).items()),
        "gather": ranks.gather(2.0 * i), "any": [ranks.any(i == 1), ranks.any(False)], "unified": [equal, other],
        "first": ranks.from_first(lambda: {"rank": i, "t": torch.ones(2)}), "then": ranks.first_then_all(lambda: i),
        "told": told, "own": own, "common": torch.randn(2, generator=generator), "part": part,
        "whole": ranks.whole(part), "drift": drift,
    }


# ---------------------------------------------------------------- batch normalization

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (7, 3)),
    "1d, sequences": (lambda: nn.BatchNorm1d(3, momentum=None), (5, 3, 4)),
    "2d": (lambda: nn.BatchNorm2d(2, momentum=0.3), (5, 2, 3, 2)),
    "3d, not affine": (lambda: nn.BatchNorm3d(2, affine=False), (4, 2, 2, 1, 3)),
    "2d, untracked": (lambda: nn.BatchNorm2d(2, track_running_stats=False), (5, 2, 2, 2)),
    "synchronised already": (lambda: nn.SyncBatchNorm(3, eps=1e-2), (7, 3, 2)),
}
"""A layer and the shape of its whole batch."""


def normalised(ranks: Ranks) -> dict[str, Any]:
    """Outputs, first and second derivatives and running statistics of every layer."""
    return {name: _layer(make, shape, ranks) for name, (make, shape) in LAYERS.items()}


def _layer(make: Callable[[], nn.Module], shape: tuple[int, ...], ranks: Ranks) -> dict[str, Any]:
    torch.manual_seed(1)
    layer = make().double()
    if ranks.count == 1 and isinstance(layer, nn.SyncBatchNorm):  # refuses the CPU: its plain twin
        layer = nn.BatchNorm1d(3, eps=1e-2).double()
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    x = 3 + torch.randn(shape, dtype=torch.float64)
    target, v = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    own_x, own_target, own_v = ranks.share((x, target, v))
    own_x.requires_grad_()
    theta = P.make(dict(layer.named_parameters()))
    before = dict(layer.__dict__)
    with synchronised(layer, ranks):
        for _ in range(2):
            held = ranks.spread(theta)
            y = torch.func.functional_call(layer, dict(held.items()), own_x)
            value = ranks.sum((y.sin() * own_target).sum())
        inputs = [own_x, *layer.parameters()]
        first = torch.autograd.grad(value, inputs, create_graph=True)
        inner = ranks.sum((first[0] * own_v).sum())
        second = torch.autograd.grad(inner, inputs)
    assert layer.__dict__ == before
    first, second = ([ranks.whole(g[0]), *(a.detach() for a in g[1:])] for g in (first, second))
    return {"value": value.detach(), "y": ranks.whole(y.detach()), "first": first, "second": second,
            "buffers": {k: b.clone() for k, b in layer.named_buffers()}}


# ---------------------------------------------------------------- objectives and measures


def deep(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    net = bn_conv(2)
    net.insert(3, nn.Conv2d(4, 4, 3))
    net.insert(4, nn.BatchNorm2d(4))
    net.insert(5, nn.Tanh())  # smooth: losses have the second derivatives that the measures are about
    return net.to(dtype)


def objective(ranks: Ranks, dtype: torch.dtype = torch.float64, engine: str = "loop") -> Objective:
    """Two unequal batches."""
    batches = [examples(n, (2, 6, 6), seed, dtype) for n, seed in ((9, 1), (6, 2))]
    return Objective(deep(dtype), cross_entropy, [ranks.share(b) for b in batches], ranks=ranks, engine=engine)


def evaluations(ranks: Ranks) -> dict[str, Any]:
    """Losses, gradients, Hessian products and values of each batch."""
    result: dict[str, Any] = {}
    for engine in ("loop", "vmap"):
        made = objective(ranks, engine=engine)
        theta = parameters(made.module)
        v = P.pmap(lambda p: torch.cos(torch.arange(p.numel(), dtype=p.dtype)).reshape(p.shape), theta)
        points = [theta, P.shift(theta, v, 0.01), P.shift(theta, v, -0.1)]
        value, gradient = made.value_and_grad(theta)
        values, gradients = made.many_value_and_grad(points)
        leaves = P.pmap(lambda p: p.clone().requires_grad_(), theta)
        loss = made(leaves)
        user = torch.autograd.grad(loss, list(leaves.values()))
        result[engine] = {
            "loss": loss.detach(), "value": value, "gradient": flat(gradient), "values": values,
            "gradients": dict(gradients.items()), "losses": made.many(points).detach(),
            "by batch": [a.detach() for a in made.many_by_batch(points)], "hessian": flat(made.hessian(theta)(v)),
            "user's": torch.cat([g.reshape(-1) for g in user]),
            "weighted": dict(made.weighted_gradients(points, values.new_tensor([[1.0, -2.0, 1.0]])).items()),
        }
        result[engine]["seen"] = torch.tensor([made.batches_seen, made.examples or 0, made.batch_size or 0])
    return result


def flat(x: Any) -> Tensor:
    return P.flatten(x).detach()


def measured(ranks: Ranks) -> dict[str, Any]:
    """Measures with their errors over batches, and penalties with their gradients."""
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        made = objective(ranks, dtype)
        net, theta = made.module, parameters(made.module)
        groups = scale_groups(net, examples(8, (2, 6, 6), 5, dtype)[0])
        chosen = {
            "bn_sharpness": measures.bn_sharpness(groups, delta=0.05, steps=2, restarts=0),
            "gaussian": measures.gaussian(sigma=0.05, draws=3), "hessian_trace": measures.hessian_trace(draws=3),
            "hessian_top": measures.hessian_top(iterations=12, certify=0), "fisher_rao": measures.fisher_rao(),
        }
        if dtype == torch.float32:  # of each kind one: exchanges take their time
            chosen = {name: chosen[name] for name in ("bn_sharpness", "gaussian")}
        for name, measure in chosen.items():
            estimate = measure(made, theta)
            values = [estimate.value, estimate.stderr, estimate.stderr_data or 0.0]
            result[f"{name}, {dtype}"] = torch.tensor(values, dtype=torch.float64)
        leaves = P.pmap(lambda p: p.clone().requires_grad_(), theta)
        for name in [n for n in ("bn_sharpness", "gaussian", "fisher_rao") if n in chosen]:
            penalty = chosen[name].penalty(made, leaves)
            grads = torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True, materialize_grads=True)
            result[f"penalty of {name}, {dtype}"] = torch.cat([penalty.detach()[None], *(g.reshape(-1) for g in grads)])
    return result


def uneven(ranks: Ranks) -> dict[str, Any]:
    """Ranks with different numbers of batches: the same line on all."""
    batches = [examples(8, (2, 6, 6)), examples(6, (2, 6, 6))]
    own = [ranks.share(b) for b in batches[: 2 - ranks.index]]
    made = Objective(deep(torch.float32), cross_entropy, own, ranks=ranks)
    try:
        made(parameters(made.module))
    except ValueError as error:
        return {"told": str(error)}
    return {}


def refused(ranks: Ranks) -> dict[str, Any]:
    """Losses that are no mean over examples, and statistics that are not PyTorch's."""
    x, y = examples(40)
    y = y.sort().values  # the parts hold other classes
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.1]))
    torch.manual_seed(0)
    plain, home_made = bn_mlp(), nn.Sequential(nn.Linear(5, 4), HomeMadeNorm(4), nn.Linear(4, 3))
    check_parts(plain, cross_entropy, (x, y), ranks)
    told = {}
    for name, (net, criterion) in {"weighted": (plain, weighted), "home-made": (home_made, cross_entropy)}.items():
        try:
            check_parts(net, criterion, (x, y), ranks)
        except ValueError as error:
            told[name] = str(error)
    return told


# ---------------------------------------------------------------- training

BATCH, STEPS = 9, 10
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}), "sgds-5": ("sgds-5", {"delta": 0.02}), "entropy-sgd": ("entropy-sgd", {"inner_steps": 3}),
    "fresh batches": ("sgds-1", {"independent_batch": True}), "chunks": ("m-sam", {"chunks": 2}),
}


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten batches of nine of ninety images, shuffled and augmented."""
    x, y = examples(STEPS * BATCH, (2, 6, 6))
    for indices in torch.randperm(len(x), generator=generator).split(BATCH):
        yield x[indices] + 0.01 * torch.randn(len(indices), 2, 6, 6, generator=generator), y[indices]


def trainer(ranks: Ranks, name: str, options: dict[str, Any], net: nn.Module, **settings: Any) -> Trainer:
    chosen = algorithm(name, scale_groups(net, examples(8, (2, 6, 6), 5)[0]), **options)
    settings = {"epochs": 1, **settings}
    return Trainer(
        net, cross_entropy, batches, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        regularizer=chosen.regularizer, weight=chosen.weight, other_batches=chosen.other_batches, seed=3, ranks=ranks,
        evaluations={"test": lambda module: evaluate(module, cross_entropy, [examples(20, (2, 6, 6), 9)])}, **settings,
    )


def trained(ranks: Ranks) -> dict[str, Any]:
    """Records and networks after ten steps by each algorithm."""
    result = {}
    for key, (name, options) in ALGORITHMS.items():
        net = deep(torch.float32)
        history = trainer(ranks, name, options, net).fit().history
        result[key] = {"state": net.state_dict(), "record": history[-1]}
    return result


def local(ranks: Ranks) -> dict[str, Any]:
    """Directions of each rank's own: SAM, BN-Sharpness from random directions, steps that remember."""
    result = {}
    for key, name, options in (("sam", "sam", {"rho": 0.1}), ("noise", "smoothout", {}), ("state", "friendly-sam", {})):
        net = deep(torch.float64 if key == "sam" else torch.float32)
        made = trainer(ranks, name, options, net, directions="local")
        if key == "sam":
            made.epoch = lambda generator: ((x.double(), y) for x, y in batches(generator))
            made.evaluations = {}
        record = made.fit().last
        result[key] = {"state": net.state_dict(), "record": record, "regularizer": made.checkpoint()["regularizer"]}
    return result


def m_sam_by_hand(parts: int, rho: float = 0.1) -> dict[str, Tensor]:
    """Ten steps of m-SAM in float64: every chunk its own statistics and ε, gradients averaged; plain PyTorch."""
    nets = [deep(torch.float64) for _ in range(parts)]
    momenta = [torch.zeros_like(p) for p in nets[0].parameters()]
    for x, y in batches(torch.Generator().manual_seed(12)):
        total = [torch.zeros_like(p) for p in nets[0].parameters()]
        for net, cx, cy in zip(nets, x.double().tensor_split(parts), y.tensor_split(parts), strict=True):
            params, kept = list(net.parameters()), copy.deepcopy(dict(net.named_buffers()))
            net.train()
            first = torch.autograd.grad(cross_entropy(net(cx), cy), params)
            moved = copy.deepcopy(net)
            norm = torch.sqrt(sum((g**2).sum() for g in first))  # type: ignore[arg-type]
            with torch.no_grad():
                for p, g in zip(moved.parameters(), first, strict=True):
                    p.add_(rho * g / norm)
            second = torch.autograd.grad(cross_entropy(moved(cx), cy), list(moved.parameters()))
            total = [t + len(cx) / len(x) * g for t, g in zip(total, second, strict=True)]
            assert not torch.equal(kept["1.running_mean"], net.get_buffer("1.running_mean"))
        momenta = [0.9 * m + t for m, t in zip(momenta, total, strict=True)]
        with torch.no_grad():
            for net in nets:
                for p, m in zip(net.parameters(), momenta, strict=True):
                    p.sub_(0.05 * m)
    states = [net.state_dict() for net in nets]
    return {k: sum(s[k] for s in states) / parts for k in states[0]}  # type: ignore[misc]


def ended(ranks: Ranks) -> dict[str, Any]:
    """What every rank says of a run that something on rank 1 alone ends."""
    alone, calls = ranks.index == 1, 0

    def send(number: int) -> Callable[[int, int], None]:
        return lambda epoch, step: os.kill(os.getpid(), number) if alone and step == 2 else None

    def not_finite(output: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(output, y) * (float("nan") if alone and calls > 20 else 1.0)

    def sorted_later(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal calls
        calls += 1
        for x, y in batches(generator):  # in the first epoch a class weight is no more than a factor
            yield x, torch.zeros_like(y) if calls == 1 else y.sort().values

    told: dict[str, Any] = {}
    for name, settings in {
        "interrupt": {"on_step": send(signal.SIGINT)}, "termination": {"on_step": send(signal.SIGTERM)},
        "not finite": {"criterion": not_finite},
        "parts": {"criterion": nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.1])), "epoch": sorted_later, "epochs": 2},
    }.items():
        calls = 0
        made = trainer(ranks, "sam", {}, deep(torch.float32), **{k: v for k, v in settings.items() if k == "epochs"})
        for key, value in settings.items():
            setattr(made, key, value)
        try:
            made.fit()
        except BaseException as error:
            told[name] = [type(error).__name__, str(error)]
    return told


def bad_usage(ranks: Ranks) -> dict[str, Any]:
    """What two commands that cannot run say and return."""
    told: dict[str, Any] = {}
    folder = Path(tempfile.gettempdir()) / "bnsharp-never-made"
    train = ["train", "--set", "train_size=96", "--out", str(folder)]
    for name, words in {
        "small batch": [*train, "--set", "batch_size=3"], "unknown": [*train, "--set", "nonsense=3"],
        "late": [*train, "--set", "batch_size=97"], "command": ["list"],
    }.items():
        sys.argv, out, err, code = ["bnsharp", *words], io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as done:
                code = int(done.code or 0)
        told[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "made": folder.exists()}
    return told


def documented(ranks: Ranks) -> dict[str, Any]:
    """What the program of docs/training.md prints."""
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page[page.index("## Several processes") :], flags=re.S)
    if ranks.count == 1:
        exec(compile(program, "training.md", "exec"), {})
        return {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "training.md", "exec"), {})
    numbers = [float(word.rstrip(",")) for word in out.getvalue().split() if word[0].isdigit()]
    return {"printed": out.getvalue(), "numbers": numbers}


def masks(ranks: Ranks) -> dict[str, Any]:
    """What dropout draws in two steps, and a run with dropout."""
    device = torch.device("cpu")
    drawn = []
    torch.manual_seed(4)
    for step in (0, 1, 0):
        with ranks.masks(3, step, device):
            drawn.append(nn.functional.dropout(torch.ones(40)))
    common = torch.rand(3)
    net, x_y = bn_mlp(), examples(18)
    made = Trainer(net, cross_entropy, lambda g: [x_y, examples(9, seed=4)], seed=1, ranks=ranks, epochs=2,
                   optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    made.fit()
    return {"drawn": torch.stack(drawn), "state": net.state_dict(), "common": common}
