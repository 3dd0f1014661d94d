"""Ten seeds of a small network: trained at once, one after the other, and by bare loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import bnsharp
from benchmarks.paired import Case, Run
from benchmarks.training import MLP, SGD, bare, cross_entropy
from bnsharp.algorithms import algorithm
from bnsharp.data import ImageData, load
from bnsharp.models import build
from bnsharp.together import Together

SEEDS = 10
EPOCHS = 10


def trainers(data: ImageData, name: str, **options: Any) -> list[bnsharp.Trainer]:
    """A trainer per seed, each with its own network, nothing evaluated or written."""
    parts, made = MLP.batches(torch.device("cpu")), []
    for seed in range(SEEDS):
        module = build("bn-mlp", data.input_shape, len(data.classes), seed=seed).train()
        chosen = algorithm(name, bnsharp.scale_groups(module, data.train_set(16)[0]), **options)
        made.append(bnsharp.Trainer(
            module, cross_entropy, lambda generator: iter(parts), optimizer=lambda p: torch.optim.SGD(p, **SGD),
            regularizer=chosen.regularizer, weight=chosen.weight, epochs=EPOCHS, seed=seed,
        ))
    return made


def at_once(data: ImageData, name: str, **options: Any) -> Run:
    """All seeds by :class:`bnsharp.together.Together`, from the same initial weights in every round."""
    made = trainers(data, name, **options)

    def run() -> None:
        for trainer in made:
            trainer._begun = False
        Together(made).fit()

    return run


def in_turn(data: ImageData, name: str, **options: Any) -> Run:
    """Each seed by its own trainer."""
    made = trainers(data, name, **options)

    def run() -> None:
        for trainer in made:
            trainer._begun = False
            trainer.fit()

    return run


def bare_loops(data: ImageData) -> Run:
    """Each seed by the loop that anyone would write."""
    loops = [
        bare(build("bn-mlp", data.input_shape, len(data.classes), seed=seed).train(), MLP.batches(torch.device("cpu")))
        for seed in range(SEEDS)
    ]

    def run() -> None:
        for loop in loops:
            for _ in range(EPOCHS):
                loop()

    return run


def sgd() -> dict[str, Run]:
    data = load("digits", seed=0)
    return {
        "together": at_once(data, "sgd"), "one after the other": in_turn(data, "sgd"), "bare loops": bare_loops(data)
    }


def regularised(name: str, **options: Any) -> Callable[[], Mapping[str, Run]]:
    def setup() -> dict[str, Run]:
        data = load("digits", seed=0)
        return {"together": at_once(data, name, **options), "one after the other": in_turn(data, name, **options)}

    return setup


NAME = "10 seeds of bn-mlp on digits, {}: together / one after the other"
CASES = (
    Case(NAME.format("SGD"), sgd, 0.5, 5),
    Case(NAME.format("SAM"), regularised("sam", rho=1.0), 0.5, 5),
    Case(NAME.format("SGDS-0"), regularised("sgds-0"), 0.5, 5),
    Case(NAME.format("SGDS-averaged"), regularised("sgds-averaged"), 0.5, 5),
    Case(NAME.format("SGDS-5"), regularised("sgds-5"), 0.5, 3),
)
