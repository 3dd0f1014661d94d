"""Ten seeds of a small network: trained at once, one after the other, and by bare loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import Case, Run
from benchmarks.training import SGD, bare
from bnsharp.algorithms import algorithm
from bnsharp.data import load
from bnsharp.models import build
from bnsharp.together import Together

SEEDS = 10
BATCH = 64


def batches() -> list[tuple[Tensor, Tensor]]:
    """The training digits in full batches."""
    x, y = load("digits", seed=0).train_set()
    n = len(y) // BATCH * BATCH
    return list(zip(x[:n].split(BATCH), y[:n].split(BATCH), strict=True))


def network(seed: int) -> nn.Module:
    """The BN perceptron of the demo."""
    return build("bn-mlp", (1, 8, 8), 10, seed=seed).train()


def trainers(name: str, epochs: int, **options: Any) -> list[bnsharp.Trainer]:
    """A trainer per seed, each with its own network, nothing evaluated or written."""
    parts, made = batches(), []
    for seed in range(SEEDS):
        module = network(seed)
        chosen = algorithm(name, bnsharp.scale_groups(module, parts[0][0]), **options)
        made.append(bnsharp.Trainer(
            module, nn.functional.cross_entropy, lambda generator: iter(parts),
            optimizer=lambda p: torch.optim.SGD(p, **SGD), regularizer=chosen.regularizer, weight=chosen.weight,
            epochs=epochs, seed=seed,
        ))
    return made


def at_once(name: str, epochs: int, **options: Any) -> Run:
    """All seeds by :class:`bnsharp.together.Together`."""
    return lambda: Together(trainers(name, epochs, **options)).fit()


def in_turn(name: str, epochs: int, **options: Any) -> Run:
    """Each seed by its own trainer."""

    def run() -> None:
        for trainer in trainers(name, epochs, **options):
            trainer.fit()

    return run


def bare_loops(epochs: int) -> Run:
    """Each seed by the loop that anyone would write."""

    def run() -> None:
        parts = batches()
        for seed in range(SEEDS):
            bare(network(seed), parts, epochs)()

    return run


def sgd(epochs: int) -> dict[str, Run]:
    return regularised("sgd", epochs) | {"bare loops": bare_loops(epochs)}


def regularised(name: str, epochs: int, **options: Any) -> dict[str, Run]:
    return {
        "together": at_once(name, epochs, **options), "one after the other": in_turn(name, epochs, **options),
    }


NAME = "10 seeds of bn-mlp on digits, {}: together / one after the other"
CASES = (
    Case(NAME.format("SGD"), partial(sgd, 10), 0.5, 11),
    Case(NAME.format("SAM"), partial(regularised, "sam", 5, rho=1.0), 0.5, 5),
    Case(NAME.format("SGDS-0"), partial(regularised, "sgds-0", 5), 0.5, 5),
    Case(NAME.format("SGDS-averaged"), partial(regularised, "sgds-averaged", 5), 0.5, 5),
    Case(NAME.format("SGDS-5"), partial(regularised, "sgds-5", 3), 0.5, 5),
)
