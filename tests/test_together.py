"""Several seeds trained at once: the numbers of single runs, whatever the regulariser; folders, kills, refusals."""

from __future__ import annotations

import _thread
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cross_entropy, one_line
from torch import Tensor, nn

import bnsharp
from bnsharp.algorithms import algorithm
from bnsharp.averages import Ema
from bnsharp.checkpoint import CHECKPOINT, METRICS, PREVIOUS, RunFolder, load
from bnsharp.companions import check_batches
from bnsharp.errors import DivergedError, InputError, Interrupted
from bnsharp.experiments import comparison
from bnsharp.experiments.comparison import BASELINE, Row
from bnsharp.experiments.config import RunConfig
from bnsharp.experiments.run import read_run
from bnsharp.experiments.run import train as train_alone
from bnsharp.experiments.study import grouped, run_study, sizes
from bnsharp.experiments.together import obstacle, train_together
from bnsharp.lockstep import Lockstep
from bnsharp.models import build
from bnsharp.observing import evaluate
from bnsharp.schedules import cosine
from bnsharp.stacked import Stack
from bnsharp.together import Together
from bnsharp.trainer import Result, Trainer

SEEDS, EXAMPLES, BATCH, EPOCHS = 3, 36, 12, 3
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def network(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build("bn-mlp", (1, 4, 4), 3, seed=seed, width=8).to(dtype)


def trainer(
    seed: int, name: str = "sgd", *, optimizer: str = "SGD", dtype: torch.dtype = torch.float64, epochs: int = EPOCHS,
    settings: dict[str, Any] | None = None, module: Callable[[int, torch.dtype], nn.Module] = network,
    criterion: Any = cross_entropy, more: dict[str, Any] | None = None, **options: Any,
) -> Trainer:
    """A run on data of its own."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(EXAMPLES, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (EXAMPLES,), generator=generator)

    def epoch(generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(EXAMPLES, generator=generator).split(BATCH):
            yield x[rows], y[rows]

    net = module(seed, dtype)
    chosen = algorithm(name, bnsharp.scale_groups(net, x), **options)
    given = {"lr": 0.02} if settings is None and optimizer != "SGD" else (SGD if settings is None else settings)
    return Trainer(
        net, criterion, epoch, optimizer=lambda p: getattr(torch.optim, optimizer)(p, **given),
        regularizer=chosen.regularizer, weight=chosen.weight, other_batches=chosen.other_batches, epochs=epochs,
        evaluations={"test": lambda m: evaluate(m, cross_entropy, [(x, y)])}, seed=seed,
        schedule=cosine(epochs * EXAMPLES // BATCH), **(more or {}),
    )


def apart(one: Result, other: Any) -> float:
    """The largest difference between two runs' records, relative where they are large."""
    assert isinstance(other, Result) and len(one.history) == len(other.history)
    worst = 0.0
    for a, b in zip(one.history, other.history, strict=True):
        assert list(a) == list(b)
        for key, value in a.items():
            assert math.isnan(value) == math.isnan(b[key])
            worst = max(worst, 0.0 if math.isnan(value) else abs(value - b[key]) / (1 + abs(value)))
    return worst


def check_equal(make: Callable[[int], Trainer], tolerance: float) -> None:
    """A group's records and final states are those of single runs."""
    alone, group = [make(s) for s in range(SEEDS)], [make(s) for s in range(SEEDS)]
    results, outcomes = [t.fit() for t in alone], Together(group).fit()
    assert max(apart(a, b) for a, b in zip(results, outcomes, strict=True)) < tolerance
    for one, other in zip(alone, group, strict=True):
        ours = other.module.state_dict()
        for key, value in one.module.state_dict().items():
            torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance)
            assert ours[key].untyped_storage().nbytes() == value.untyped_storage().nbytes()  # its own again


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}), ("sam", {"rho": 0.5}), ("asam", {}), ("wsam", {}), ("m-sam", {"chunks": 2}), ("friendly-sam", {}),
    ("look-sam", {"every": 3}), ("gsam", {}), ("msam", {}), ("sgds-0", {}), ("sgds-5", {"clip": 0.5}),
    ("sgds-1", {"independent_batch": True, "warm": True}), ("sgds-2", {"reuse_direction": 2}),
    ("sgds-0", {"gradient": "exact", "nodes": 3}), ("sgds-0", {"gradient": "central"}),
    ("sgds-0", {"gradient": "tangent"}), ("sgds-averaged", {}), ("smoothout", {}),
    ("gaussian-smoothing", {"draws": 2, "relative_to": "groups"}), ("entropy-sgd", {"inner_steps": 3}),
    ("penalty-hessian_trace", {"weight": 1e-3}), ("penalty-bn_sharpness", {}),
]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_group_is_its_runs(name: str, options: dict[str, Any]) -> None:
    check_equal(lambda seed: trainer(seed, name, **options), 1e-9)


@pytest.mark.parametrize("name", ["sgd", "sgds-0"])
def test_in_single_precision(name: str) -> None:
    check_equal(lambda seed: trainer(seed, name, dtype=torch.float32), 2e-4)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta",
                                       "Adamax", "Rprop"])
def test_optimizers(optimizer: str) -> None:
    check_equal(lambda seed: trainer(seed, optimizer=optimizer), 1e-8)


def test_clipping_averages_and_label_smoothing() -> None:
    def smoothed(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y, label_smoothing=0.1)

    more = {"max_norm": 0.5, "averages": {"ema": Ema(0.9)}}
    check_equal(lambda seed: trainer(seed, "sam", criterion=smoothed, more=more), 1e-9)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4, momentum=None))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inside(x))


def residual(seed: int, dtype: torch.dtype) -> nn.Module:
    """Convolutions, a skip, batch and layer normalization, a cumulative average of statistics, no affine part."""

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4, affine=False), Skip(), nn.Flatten(),
        nn.LayerNorm(16), nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(), nn.Linear(8, 3),
    ).to(dtype)


def test_other_networks() -> None:
    check_equal(lambda seed: trainer(seed, "sam", module=residual, rho=0.1), 1e-9)


class Half(nn.Sequential):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self[1].eval()
        return self


def test_frozen_parameters_and_a_normalizer_in_evaluation_mode() -> None:
    def module(seed: int, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(seed)
        net = Half(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        net[2].weight.requires_grad_(False)
        return net.to(dtype)

    check_equal(lambda seed: trainer(seed, "smoothout", module=module), 1e-9)


# ---------------------------------------------------------------- passes side by side


def test_functions_side_by_side_meet_where_they_ask() -> None:
    """Function i asks i times; every meeting has those that still ask, and answers reach the ones that asked."""
    meetings: list[dict[int, int]] = []

    def meet(asked: Any) -> dict[int, int]:
        meetings.append(dict(asked))
        return {place: 10 * value for place, value in asked.items()}

    with Lockstep(3) as steps:
        calls = [lambda i=i: [steps.ask(i, i + k) for k in range(i)] for i in range(3)]
        assert steps.run(calls, meet) == [[], [10], [20, 30]]
        assert meetings == [{1: 1, 2: 2}, {2: 3}]

        def fails(place: int) -> int:
            if place:
                raise ValueError(f"from {place}")
            return steps.ask(0, 1)

        with pytest.raises(ValueError, match="from 1"):
            steps.run([lambda i=i: fails(i) for i in range(3)], meet)
        with pytest.raises(ZeroDivisionError):
            steps.run([lambda: steps.ask(0, 0)], lambda asked: {0: 1 // 0})
        assert steps.run([lambda: steps.ask(0, 4)], meet) == [40]


@pytest.mark.parametrize("where", ["meet", "function"])
def test_an_interruption_leaves_no_thread(where: str) -> None:
    """Functions that wait for an answer which will not come end, and so do those that compute."""
    before = threading.active_count()

    def meet(asked: Any) -> Any:
        if where == "meet":
            raise KeyboardInterrupt
        return asked

    def function(steps: Lockstep, place: int) -> None:
        for _ in range(3):
            if where == "function" and place == 1:
                _thread.interrupt_main()
                time.sleep(0.05)
            steps.ask(place, place)

    with pytest.raises(KeyboardInterrupt), Lockstep(3) as steps:
        steps.run([lambda i=i: function(steps, i) for i in range(3)], meet)
    assert threading.active_count() == before


def test_a_source_may_fill_the_same_memory_again() -> None:
    """Batches are read anew in every step, though the tensors are those of the last one."""

    def filling(own: Trainer) -> Trainer:
        epoch, x = own.epoch, torch.empty(BATCH, 1, 4, 4, dtype=torch.float64)
        y = torch.empty(BATCH, dtype=torch.long)

        def refilled(generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
            for each in epoch(generator):
                x.copy_(each[0])
                y.copy_(each[1])
                yield x, y

        own.epoch = refilled
        return own

    found = Together([filling(trainer(s)) for s in range(2)]).fit()
    for seed, outcome in enumerate(found):
        assert isinstance(outcome, Result)
        assert outcome.last["loss"] == pytest.approx(trainer(seed).fit().last["loss"], rel=1e-9)


def test_a_stack_is_views_until_it_is_released() -> None:
    nets = [network(s) for s in range(2)]
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in nets]
    stack = Stack(nets)
    x = torch.randn(10, 1, 4, 4, dtype=torch.float64)
    both = stack.network.eval()(torch.cat([x, x])).split(10)
    for net, own, output in zip(nets, before, both, strict=True):
        torch.testing.assert_close(net.eval()(x), output)
        assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        stack.parameters["head.bias"][1] = 7.0
    assert float(nets[1].head.bias.detach()[0]) == 7.0
    stack.release()
    with torch.no_grad():
        stack.parameters["head.bias"][1] = 8.0
    assert float(nets[1].head.bias.detach()[0]) == 7.0


# ---------------------------------------------------------------- refusals


def changed(**settings: Any) -> list[Trainer]:
    return [trainer(0), trainer(1, **settings)]


def dropping(seed: int, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)


class Coupled(nn.Module):
    """Examples see their batch's mean outside of a normalizer."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def coupled(seed: int, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Coupled(), nn.Linear(16, 3)).to(dtype)


def recurrent(seed: int, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.PReLU(), nn.Linear(16, 3)).to(dtype)


def rescheduled() -> list[Trainer]:
    """The second one's cosine is longer."""
    made = [trainer(s) for s in range(2)]
    made[1].scheduler = cosine(100)(made[1].optimizer)
    return made


@pytest.mark.parametrize(("make", "word"), [
    (lambda: [], "no trainer"),
    (lambda: changed(epochs=4), "epochs"),
    (lambda: changed(module=coupled), "another structure"),
    (lambda: changed(settings={**SGD, "lr": 0.1}), "lr"),
    (lambda: changed(settings={**SGD, "weight_decay": 0.0}), "weight_decay"),
    (lambda: changed(optimizer="Adam"), "optimizers"),
    (lambda: rescheduled(), "schedules"),
    (lambda: changed(more={"engine": "vmap"}), "engine"),
    (lambda: [trainer(0, optimizer="Adafactor"), trainer(1, optimizer="Adafactor")], "Adafactor"),
    (lambda: [trainer(s, module=recurrent) for s in range(2)], "PReLU"),
    (lambda: [trainer(s, module=dropping) for s in range(2)], "random numbers"),
    (lambda: [trainer(s, module=coupled) for s in range(2)], "coupled"),
])
def test_what_cannot_be_trained_at_once_is_refused_in_one_line(make: Callable[[], list[Trainer]], word: str) -> None:
    with pytest.raises(InputError) as caught:
        Together(make()).fit()
    assert word in one_line(caught.value)


def test_checking_changes_nothing() -> None:
    made = [trainer(s) for s in range(2)]
    before = [{k: v.clone() for k, v in t.module.state_dict().items()} for t in made]
    batches = [next(iter(t.epoch(torch.Generator().manual_seed(0)))) for t in made]
    check_batches(made, batches)
    for t, own in zip(made, before, strict=True):
        assert all(torch.equal(v, own[k]) for k, v in t.module.state_dict().items())


# ---------------------------------------------------------------- one that diverges, kills, stops


def test_a_run_that_diverges_ends_alone() -> None:
    def make(seed: int) -> Trainer:
        made = trainer(seed, "sgds-0")
        if seed == 1:
            good = made.epoch
            count = iter(range(10**6))
            made.epoch = lambda g: ((x * (math.nan if next(count) == 4 else 1.0), y) for x, y in good(g))
        return made

    outcomes = Together([make(s) for s in range(3)]).fit()
    assert isinstance(outcomes[1], DivergedError) and "epoch 2, step 2" in one_line(outcomes[1])
    for seed in (0, 2):
        assert apart(make(seed).fit(), outcomes[seed]) < 1e-9


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no signals")
def test_ctrl_c_stops_all_after_one_step(tmp_path: Path) -> None:
    in_folders(tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"3 runs stopped after epoch 1, step 2"):
        in_folders(tmp_path / "stopped", at=SEEDS + 2, how=lambda: signal.raise_signal(signal.SIGINT))
    for seed in range(SEEDS):
        assert load(tmp_path / "stopped" / str(seed) / CHECKPOINT)["step"] == 2
    in_folders(tmp_path / "stopped", resume=True)
    for seed in range(SEEDS):
        names = (tmp_path / kind / str(seed) / METRICS for kind in ("whole", "stopped"))
        assert len({name.read_bytes() for name in names}) == 1


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


def in_folders(
    path: Path, *, at: int | None = None, resume: bool = False, how: Callable[[], None] = kill
) -> list[Any]:
    """A group in run folders, killed after so many steps of all runs together."""
    steps = iter(range(1, 10**6))

    def on_step(epoch: int, step: int) -> None:
        if next(steps) == at:
            how()

    made = []
    for seed in range(SEEDS):
        folder = (RunFolder.resume if resume else RunFolder.create)(path / str(seed), {"seed": seed})
        more = {"folder": folder, "resume": resume, "checkpoint_steps": 2, "on_step": on_step}
        made.append(trainer(seed, "sgds-averaged", more=more))
    return Together(made).fit()


@pytest.mark.parametrize("at", [2, SEEDS * 3 + 1, SEEDS * 5 + 2])
def test_a_killed_group_resumes_to_the_same_bytes(tmp_path: Path, at: int) -> None:
    in_folders(tmp_path / "whole")
    with pytest.raises(Killed):
        in_folders(tmp_path / "killed", at=at)
    in_folders(tmp_path / "killed", resume=True)
    for seed in range(SEEDS):
        one, other = tmp_path / "whole" / str(seed), tmp_path / "killed" / str(seed)
        assert (one / METRICS).read_bytes() == (other / METRICS).read_bytes()
        a, b = load(one / CHECKPOINT), load(other / CHECKPOINT)
        assert all(torch.equal(v, b["module"][k]) for k, v in a["module"].items())


def test_runs_killed_between_their_checkpoints_go_back_to_one_point(tmp_path: Path) -> None:
    in_folders(tmp_path / "whole")
    with pytest.raises(Killed):
        in_folders(tmp_path / "killed", at=SEEDS * 5 + 1)
    for seed in (1, 2):  # as if the process had ended while these were still to be written
        folder = tmp_path / "killed" / str(seed)
        (folder / PREVIOUS).replace(folder / CHECKPOINT)
    in_folders(tmp_path / "killed", resume=True)
    for seed in range(SEEDS):
        names = (tmp_path / kind / str(seed) / METRICS for kind in ("whole", "killed"))
        assert len({name.read_bytes() for name in names}) == 1


def test_a_checkpoint_holds_one_run(tmp_path: Path) -> None:
    """Not the storage of all of them; and it is one that the single trainer's would be."""
    in_folders(tmp_path / "group")
    folder = RunFolder.create(tmp_path / "alone", {})
    trainer(0, "sgds-averaged", more={"folder": folder, "checkpoint_steps": 2}).fit()
    one, other = load(tmp_path / "alone" / CHECKPOINT), load(tmp_path / "group" / "0" / CHECKPOINT)
    assert one.keys() == other.keys()
    for key in ("module", "regularizer"):
        for k, v in one[key].items():
            torch.testing.assert_close(other[key][k], v)
    for k, v in one["optimizer"]["state"].items():
        torch.testing.assert_close(other["optimizer"]["state"][k], v)
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert one["scheduler"] == other["scheduler"]
    sizes_ = [(tmp_path / p / CHECKPOINT).stat().st_size for p in ("alone", "group/0")]
    assert sizes_[1] < 1.05 * sizes_[0]


# ---------------------------------------------------------------- experiments

QUICK: dict[str, Any] = {
    "model_options": {"width": 8, "depth": 1}, "data_options": {"train_size": 100}, "batch_size": 50, "epochs": 2,
    "threads": 1,
}


def test_run_folders_are_those_of_single_runs(tmp_path: Path) -> None:
    configs = [RunConfig(**QUICK, seed=s, together=2, algorithm="sam", track=["bn_sharpness"]) for s in range(2)]
    made = train_together(configs, [tmp_path / f"{s}" for s in range(2)])
    for seed, (_, result) in enumerate(made):
        alone = train_alone(configs[seed].model_copy(update={"together": 1}), tmp_path / f"alone-{seed}")[1]
        assert apart(alone, result) < 1e-3
        stored = json.loads((tmp_path / f"{seed}" / "config.json").read_text())
        assert stored["together"] == 2 and stored["seed"] == seed
        names = {p.name for p in (tmp_path / f"{seed}").iterdir()}
        assert names == {p.name for p in (tmp_path / f"alone-{seed}").iterdir()}
        config, module, _ = read_run(tmp_path / f"{seed}")
        assert config.together == 2
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in made[seed][0].module.state_dict().items())
    with pytest.raises(InputError) as caught:
        train_alone(configs[0], tmp_path / "no")
    assert "together" in one_line(caught.value) and not (tmp_path / "no").exists()


@pytest.mark.parametrize(("changes", "word"), [
    (({}, {"lr": 0.1}), "lr"), (({"together": 1}, {"together": 1}), "together"),
    (({"model": "resnet18", "model_options": {}}, {}), "model"),
])
def test_bad_groups_write_nothing(tmp_path: Path, changes: Any, word: str) -> None:
    with pytest.raises(InputError) as caught:
        train_together(
            [RunConfig(**{**QUICK, "together": 2, "seed": s, **own}) for s, own in enumerate(changes)],
            [tmp_path / "a", tmp_path / "b"],
        )
    assert word in one_line(caught.value) and not list(tmp_path.iterdir())


def test_where_it_pays() -> None:
    assert obstacle(RunConfig(**QUICK)) is None
    conv = RunConfig(**{**QUICK, "model": "conv-bn", "model_options": {}})
    assert "slower" in str(obstacle(conv)) and obstacle(conv, forced=True) is None
    assert "Adafactor" in str(obstacle(RunConfig(**QUICK, optimizer="Adafactor")))


def test_groups_of_a_study() -> None:
    assert [sizes(5, 2), sizes(3, 3), sizes(4, 8), sizes(3, 1)] == [[2, 2, 1], [3], [4], [1, 1, 1]]
    made = comparison.tasks(Path("x"), {BASELINE: Row("sgd"), "SAM": Row("sam")}, [], data="digits", model="bn-mlp",
                            seeds=3, epochs=1, train_size=lambda options: 100, together=2)
    assert grouped(made) == [[0, 1], [2], [3, 4], [5]]
    assert [t.config.get("together") for t in made[:3]] == [2, 2, None]


def test_a_study_at_once_is_the_study(tmp_path: Path) -> None:
    """The same accuracies and gradients; a run that diverges is a result; finished groups are read back."""
    rows = {BASELINE: Row("sgd"), "far": Row("sam", {"rho": 1e30})}
    words = ("width=8", "depth=1", "train_size=100", "batch_size=50")
    found = []
    for together in (1, 2, 2):
        made = comparison.tasks(tmp_path / str(together), rows, words, data="digits", model="bn-mlp", seeds=2,
                                epochs=1, train_size=lambda options: 100, together=together)
        ticks: list[int] = []
        found.append(run_study(made, ticks.append, 1))
        assert sum(ticks) > 0
    for alone, group, again in zip(*found, strict=True):
        assert ("diverged" in alone) == ("diverged" in group) == ("diverged" in again)
        for key in ("test_accuracy", "gradient_evaluations", "bn_sharpness"):
            expected = alone.get(key, math.nan)
            assert group.get(key, math.nan) == pytest.approx(expected, rel=1e-3, nan_ok=True)
    assert found[1][0] == found[2][0]


def test_the_command_says_why_it_cannot(run: Any, tmp_path: Path) -> None:
    words = ["compare", "--algorithm", "sgd", "--seeds", "2", "--epochs", "1", "--together", "2", "--out",
             str(tmp_path / "c"), "--set", "optimizer=Adafactor"]
    code, _, err = run(*words)
    assert code == 2 and "Adafactor" in err and not (tmp_path / "c").exists()
