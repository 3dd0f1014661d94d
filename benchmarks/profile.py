"""Where the time of a training step and of a BN-Sharpness evaluation goes: ``python -m benchmarks.profile``.

The floor is what the step's own counters say was evaluated, at the price of a bare forward and backward pass on the
same network and batch, taken in the same rounds. A loss in float64 (the check of rounding) is priced like one in
float32. Writes ``benchmarks/results/profile.json``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.__main__ import machine
from benchmarks.arguments import settle, timing
from benchmarks.paired import Case, Run, measure
from benchmarks.sampling import KINDS, shares
from benchmarks.tables import table
from bnsharp.algorithms import algorithm
from bnsharp.data import load
from bnsharp.models import build

cross_entropy = nn.functional.cross_entropy
Batch = tuple[Tensor, Tensor]
ALGORITHMS: dict[str, dict[str, Any]] = {"sgd": {}, "sgds-0": {}, "sgds-averaged": {}, "sgds-5": {}, "sam": {}}
ROUNDS = 9
SECONDS = 1.0
"""Time for which one subject's stack is sampled."""
HEAD = ["network, batch", "what", "time", *KINDS, "gradients", "losses", "floor", "time / floor"]


def perceptron() -> tuple[nn.Module, Batch]:
    """The BN perceptron of the demo on 64 digits."""
    data = load("digits", seed=0)
    x, y = data.train_set(64)
    return build("bn-mlp", data.input_shape, len(data.classes), seed=0).train(), (x, y)


def lenet() -> tuple[nn.Module, Batch]:
    """LeNet-BN on 256 random images."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 3, 32, 32, generator=generator), torch.randint(10, (256,), generator=generator)
    return build("lenet-bn", (3, 32, 32), 10, seed=0).train(), (x, y)


NETWORKS = {"BN perceptron, 64": perceptron, "LeNet-BN, 256": lenet}


def training_step(module: nn.Module, batch: Batch, name: str, **options: Any) -> tuple[Run, Callable[[], dict]]:
    """A training step, and what its last call evaluated."""
    made = algorithm(name, bnsharp.scale_groups(module, batch[0][:16]), **options)
    regularizer, weight = made.regularizer(0), made.weight(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
    generator, state, spent = torch.Generator().manual_seed(0), regularizer.init(bnsharp.parameters(module)), 0

    def run() -> None:
        nonlocal state, spent
        optimizer.zero_grad()
        step = bnsharp.backward(module, cross_entropy, batch, regularizer, weight, generator=generator, state=state)
        optimizer.step()
        state, spent = step.state, step.evaluations

    return run, lambda: {"gradients": spent, "losses": 0}


def evaluation(module: nn.Module, batch: Batch) -> tuple[Run, Callable[[], dict]]:
    """BN-Sharpness from the steepest start, 2×8 nodes, and what its last call evaluated."""
    measure = bnsharp.measures.bn_sharpness(bnsharp.scale_groups(module, batch[0][:16]), delta=0.01, steps=0)
    objective, theta = bnsharp.Objective(module, cross_entropy, batch), bnsharp.parameters(module)
    spent: dict[str, int] = {}

    def run() -> None:
        spent.update(measure(objective, theta, sampling=bnsharp.Sampling(promote=False)).evaluations)

    return run, lambda: {k: spent.get(k, 0) for k in ("gradients", "losses")}


def bare(module: nn.Module, batch: Batch) -> tuple[Run, Run]:
    """A forward pass without gradients; a forward and a backward pass."""
    owned = list(module.parameters())

    def forward() -> None:
        with torch.no_grad():
            cross_entropy(module(batch[0]), batch[1])

    return forward, lambda: torch.autograd.grad(cross_entropy(module(batch[0]), batch[1]), owned)


SUBJECTS: dict[str, Callable[[nn.Module, Batch], tuple[Run, Callable[[], dict]]]] = {
    **{f"{name} step": lambda m, b, n=name, o=options: training_step(m, b, n, **o)
       for name, options in ALGORITHMS.items()},
    "BN-Sharpness, 16 nodes": evaluation,
}


def profiled(network: str, what: str, rounds: int, seconds: float) -> dict[str, Any]:
    """One subject: seconds, shares by kind, evaluations, floor."""
    module, batch = NETWORKS[network]()
    run, counts = SUBJECTS[what](module, batch)
    forward, gradient = bare(*NETWORKS[network]())
    alternatives = {"ours": run, "forward": forward, "gradient": gradient}
    times = measure(Case(what, lambda: alternatives, rounds=rounds, memory=False)).times
    spent = counts()
    floors = [spent["losses"] * f + spent["gradients"] * g
              for f, g in zip(times["forward"], times["gradient"], strict=True)]
    return {
        "network": network, "what": what, "seconds": statistics.median(times["ours"]), **spent,
        "shares": shares(run, seconds), "floor": statistics.median(floors),
        "forward": statistics.median(times["forward"]), "gradient": statistics.median(times["gradient"]),
        "distance": statistics.median(t / f for t, f in zip(times["ours"], floors, strict=True)),
    }


def line(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        found["network"], found["what"], f"{1e3 * found['seconds']:.2f} ms",
        *(f"{100 * found['shares'][kind]:.0f}%" for kind in KINDS), str(found["gradients"]), str(found["losses"]),
        f"{1e3 * found['floor']:.2f} ms", f"{found['distance']:.2f}×",
    ]


def main() -> None:
    """Profile every subject, print a table, write the JSON."""
    given = timing("benchmarks.profile", __doc__, ROUNDS).parse_args()
    settle(given.threads)
    found = []
    print(table(HEAD, []), flush=True)
    for network in NETWORKS:
        for what in SUBJECTS:
            found.append(profiled(network, what, given.rounds, SECONDS))
            print("| " + " | ".join(line(found[-1])) + " |", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(torch.device("cpu")), "profiles": found}
    (given.out / "profile.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
