"""Measures along training: the values of the measure command, numbers of training left alone, costs told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL as COMMAND
from helpers import assert_same, bn_mlp, examples, one_line, read_lines, tree

from bnsharp import Objective, ScaleGroups, parameters, scale_groups
from bnsharp.checkpoint import CHECKPOINT, CONFIG, METRICS, SUMMARY, TIMING, RunFolder, load
from bnsharp.errors import InputError, NotFiniteError
from bnsharp.experiments import tracking
from bnsharp.experiments.config import RunConfig, make_config
from bnsharp.experiments.measuring import Setting, measure_all
from bnsharp.experiments.recipe import criterion
from bnsharp.experiments.run import read_run, train
from bnsharp.measures import MEASURES
from bnsharp.types import TrackingContext

SMALL: dict[str, Any] = {
    "epochs": 4, "batch_size": 32, "data_options": {"train_size": 96}, "model_options": {"width": 8, "depth": 1},
    "algorithm": "sgds-1", "threads": 1,
}
TRACKED: dict[str, Any] = {
    "track": "bn_sharpness,hessian_top, gaussian", "track_every": 2, "track_examples": 64,
    "track_options": {"bn_sharpness": {"steps": 1}},
}
COLUMNS = [
    *(f"{name}{part}" for name in ("bn_sharpness", "hessian_top", "gaussian") for part in ("", "_stderr", "_error")),
    "lr_hessian_top", *tracking.RATES, tracking.EVALUATIONS,
]


def config(**changes: Any) -> RunConfig:
    return make_config({**SMALL, **changes})


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with tracking; tests read it only."""
    path = tmp_path_factory.mktemp("runs") / "tracked"
    train(config(**TRACKED), path)
    return path


def test_training_is_the_same_with_and_without_tracking(tracked, tmp_path):
    train(config(), tmp_path)
    plain, watched = read_lines(tmp_path / METRICS), read_lines(tracked / METRICS)
    assert [{k: v for k, v in r.items() if k not in COLUMNS} for r in watched] == plain
    a, b = load(tmp_path / CHECKPOINT), load(tracked / CHECKPOINT)
    for part in ("module", "optimizer"):
        assert_same(dict(a[part]), dict(b[part]))


def test_every_other_epoch_has_every_column(tracked):
    metrics, timing = read_lines(tracked / METRICS), read_lines(tracked / TIMING)
    for record, times in zip(metrics, timing, strict=True):
        found = [k for k in record if k in COLUMNS]
        assert sorted(found) == (sorted(COLUMNS) if record["epoch"] % 2 == 0 else [])
        assert ("tracking_seconds" in times) == (record["epoch"] % 2 == 0)
        assert all(math.isfinite(record[k]) for k in found)
    assert not any("second" in k for record in metrics for k in record)


def test_values_are_those_of_the_measure_command(tracked):
    read, net, data = read_run(tracked)
    setting = Setting(examples=64, precision="float32", seed=read.seed)
    results = measure_all(net, data, read.track_options, setting)
    last = read_lines(tracked / METRICS)[-1]
    for name, result in results.items():
        assert (last[name], last[f"{name}_stderr"], last[f"{name}_error"]) == (
            result["value"], result["stderr"], result["error"]
        )
    spent = sum(sum(r["evaluations"].values()) for r in results.values())
    assert last["lr_hessian_top"] == last["lr"] * last["hessian_top"] and last[tracking.EVALUATIONS] == spent
    steps = last["steps"]
    assert last["gradient_evaluations"] == 3 * steps  # of sgds-1 alone
    evaluations, seconds = tracking.cost(RunFolder(tracked)) or (0, 0.0)
    assert evaluations == sum(r.get(tracking.EVALUATIONS, 0) for r in read_lines(tracked / METRICS))
    assert seconds == sum(r.get("tracking_seconds", 0.0) for r in read_lines(tracked / TIMING))


def test_effective_rates_are_those_of_each_row(tracked):
    _, net, _ = read_run(tracked)
    last = read_lines(tracked / METRICS)[-1]
    rates = [last["lr"] / float(row.double().square().sum()) for row in parameters(net)["linear1.weight"]]
    found = [last[k] for k in tracking.RATES]
    assert found == pytest.approx([sum(rates) / len(rates), min(rates), max(rates)], rel=1e-6)


def test_effective_rates_leave_out_groups_without_norm_and_inert_parameters():
    net = bn_mlp()
    theta = parameters(net)
    theta["0.weight"][0] = 0
    groups = ScaleGroups({"0.weight": "row", "4.bias": "inert"})
    squares = theta["0.weight"].double().square().sum(1)[1:]
    found = tracking.effective_rates(groups, theta, 0.1)
    assert list(found.values()) == pytest.approx(
        [float((0.1 / squares).mean()), 0.1 / float(squares.max()), 0.1 / float(squares.min())], rel=1e-6
    )
    assert tracking.effective_rates(ScaleGroups({"4.bias": "inert"}), theta, 0.1) == {}


def test_the_stored_configuration_repeats_the_run_and_an_interrupted_one_goes_on(tracked, tmp_path):
    stored = json.loads((tracked / CONFIG).read_text())
    del stored["versions"]
    options = stored["track_options"]
    assert (options["bn_sharpness"]["steps"], options["bn_sharpness"]["certify"], options["gaussian"]["draws"]) == (
        1, 0, 20)

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RunConfig(**stored), tmp_path, on_epoch=interrupt)
    train(config(**TRACKED), tmp_path, resume=True)
    for name in (CONFIG, METRICS, SUMMARY):
        assert (tmp_path / name).read_bytes() == (tracked / name).read_bytes(), name


def test_random_numbers_are_the_same_at_every_epoch_and_apart_from_other_measures(tmp_path):
    """With a rate of almost 0 nothing moves, and nothing tracked does."""
    options = {"schedule": "constant", "weight_decay": 0.0, "lr": 1e-30, "epochs": 2, "algorithm": "sgd"}
    train(config(**options, track=["gaussian"]), tmp_path / "one")
    train(config(**options, track=["hessian_trace", "gaussian"]), tmp_path / "two")
    one, two = (read_lines(tmp_path / name / METRICS) for name in ("one", "two"))
    assert one[0]["gaussian"] == one[1]["gaussian"] == two[0]["gaussian"] == two[1]["gaussian"]


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_measure_has_cheap_options_that_it_takes(name):
    options = tracking.tracked_options(config(track=[name]))[name]
    assert options.keys() == MEASURES[name].options().keys()
    for key, most in tracking.CHEAP.items():
        assert key not in options or options[key] <= most
    net = bn_mlp().double()
    x, y = examples(12, dtype=torch.float64)
    built = tracking.build_measure(name, scale_groups(net, x), **options)
    made = tracking.Tracked({name: built}, lambda m: Objective(m, criterion, (x, y)), ScaleGroups({}), 0)
    generator = torch.Generator().manual_seed(0)
    found = made(net, TrackingContext(1, 1, 0.1, 1.0, 1.0, generator, {}))
    assert math.isfinite(found[name]) and found[tracking.EVALUATIONS] > 0


def test_a_measure_that_is_not_finite_leaves_training_alone():
    def infinite(*arguments: Any) -> Any:
        raise NotFiniteError("the loss is not finite at 1 of 1 perturbed points")

    net = bn_mlp()
    objective = Objective(net, criterion, examples(8))
    made = tracking.Tracked({"hessian_top": infinite}, lambda m: objective, ScaleGroups({}), 0)  # type: ignore[dict-item]
    found = made(net, TrackingContext(1, 1, 0.1, 1.0, 1.0, torch.Generator(), {}))
    assert math.isnan(found["hessian_top"]) and math.isnan(found["lr_hessian_top"]) and len(found) == 5
    made.attempt(net, objective)


class Once(torch.autograd.Function):
    """A layer with a first derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative\nis implemented")
        return 2 * gradient


class OnceLayer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Once.apply(x)


def test_a_network_without_second_derivatives_is_refused_in_one_line():
    net = torch.nn.Sequential(torch.nn.Linear(5, 3), OnceLayer())
    made = tracking.Tracked({"hessian_top": tracking.build_measure("hessian_top")}, lambda m: None,  # type: ignore
                            ScaleGroups({}), 0)
    with pytest.raises(InputError) as caught:
        made.attempt(net, Objective(net, criterion, examples(8)))
    assert "hessian_top cannot be taken" in one_line(caught.value)


def test_what_tracking_wrote_is_told_from_the_rest(tracked):
    first, second = read_lines(tracked / METRICS)[:2]
    assert tracking.tracked_values(first) == {}
    assert list(tracking.tracked_values(second)) == [
        "bn_sharpness", "hessian_top", "lr_hessian_top", "gaussian", *tracking.RATES
    ]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"track": ["bn_sharpnes"]}, "did you mean 'bn_sharpness'"), ({"track": "gaussian,zzz"}, "zzz"),
    ({"track": "gaussian", "track_options": {"gaussian": {"darws": 3}}}, "did you mean 'draws'"),
    ({"track": "gaussian", "track_options": {"gaussian": {"draws": 0}}}, "draws"),
    ({"track": "gaussian", "track_options": {"hessian_top": {"draws": 0}}}, "hessian_top"),
    ({"track": "relative_flatness", "track_options": {"relative_flatness": {"layer": "nonsense"}}}, "nonsense"),
    ({"track": "gaussian", "track_examples": 97}, "96"), ({"track": "gaussian", "track_examples": 1}, "track_examples"),
    ({"track": "gaussian", "track_every": 0}, "track_every"), ({"track": "gaussian", "track_every": 5}, "4 epochs"),
    ({"track_every": 2}, "track"), ({"track_examples": 8}, "track"), ({"track": 3}, "track"),
    ({"track_options": {"gaussian": {}}}, "track_options"), ({"track_options": {"gaussian": 3}}, "track_options"),
]


@pytest.mark.parametrize(("changes", "word"), BAD, ids=lambda v: str(v))
def test_bad_tracking_is_refused_in_one_line_and_nothing_is_written(tmp_path, changes, word):
    with pytest.raises(InputError) as caught:
        train(config(**changes), tmp_path / "run")
    assert word in one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_tracking_from_the_command_line(run, tmp_path):
    done = run("train", "--algorithm", "sgd", *COMMAND, "--track", "bn_sharpness,hessian_top", "--every", "2",
               "--set", "track_options.hessian_top.iterations=5", "--set", "track_options.hessian_top.certify=1",
               "--set", "track_examples=32", "--out", "run")
    assert done.code == 0, done.err
    for word in ("bn_sharpness (epoch 2)", "lr_hessian_top", "effective_lr_mean", "evaluations for tracking"):
        assert word in done.out
    stored = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert stored["track"] == ["bn_sharpness", "hessian_top"] and stored["track_every"] == 2
    options = stored["track_options"]["hessian_top"]
    assert (options["iterations"], options["certify"], stored["track_examples"]) == (5, 1, 32)
    first, second = read_lines(tmp_path / "run" / METRICS)
    assert "hessian_top" not in first and second["hessian_top"] > 0
    shown = next(line for line in done.out.splitlines() if "evaluations for tracking" in line)
    assert str(second[tracking.EVALUATIONS]) in shown
    for arguments, word in ((["--every", "2"], "track"), (["--track", "hesian_top"], "did you mean 'hessian_top'")):
        before = tree(tmp_path)
        code, out, err = run("train", *COMMAND, *arguments, "--out", "other")
        assert (code, out, len(err.splitlines())) == (2, "", 1) and word in err and tree(tmp_path) == before
