"""What people expect of a trainer, each against what it stands for, and refused where it cannot work."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL as COMMAND
from helpers import assert_same, one_line, read_lines, tree

from bnsharp import parameters
from bnsharp import params as P
from bnsharp.averages import reestimated
from bnsharp.checkpoint import CHECKPOINT, CONFIG, METRICS, load
from bnsharp.errors import InputError
from bnsharp.experiments.config import RunConfig, make_config
from bnsharp.experiments.recipe import criterion, training_criterion
from bnsharp.experiments.run import prepare, read_run, train, trainer
from bnsharp.trainer import evaluate

SMALL: dict[str, Any] = {
    "epochs": 3, "batch_size": 32, "data_options": {"train_size": 96}, "model_options": {"width": 8, "depth": 1},
    "algorithm": "sgds-1", "threads": 1,
}
CONV: dict[str, Any] = {"model": "conv-bn", "model_options": {"width": 4}}


def config(**changes: Any) -> RunConfig:
    return make_config({**SMALL, **changes})


def records(**changes: Any) -> list[dict[str, Any]]:
    """A run's records, in memory."""
    return trainer(prepare(config(**changes))).fit().history


def without(history: list[dict[str, Any]], *parts: str) -> list[dict[str, Any]]:
    """Records without the columns that begin with one of these words."""
    return [{k: v for k, v in r.items() if not k.startswith(parts)} for r in history]


# ---------------------------------------------------------------- schedules


def test_rates_of_warmup_and_floor():
    found = [r["lr"] for r in records(epochs=4, warmup=1.5, min_lr=0.01, lr=0.1, algorithm="sgd")]
    total, warm = 12, 4.5

    def cosine(step: int) -> float:
        return 0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

    assert found == pytest.approx([0.1 / 5.5, 0.1 * 4 / 5.5, cosine(6), cosine(9)])
    found = [r["lr"] for r in records(schedule="multistep", milestones=[2], warmup=1, lr=0.1, algorithm="sgd")]
    assert found == pytest.approx([0.1 / 4, 0.1, 0.01])


# ---------------------------------------------------------------- smoothing and clipping


def test_smoothing_is_in_the_training_criterion_alone():
    prepared = prepare(config(label_smoothing=0.3))
    x, y = prepared.data.train_set(8)
    z = prepared.module(x)
    logs = z.log_softmax(1)
    expected = 0.7 * -logs.gather(1, y[:, None]).mean() - 0.3 * logs.mean()
    torch.testing.assert_close(training_criterion(prepared.config)(z, y), expected)
    run = trainer(prepared)
    record = run.fit().last
    plain = evaluate(prepared.module, criterion, [prepared.data.test_set()])
    assert record["test_loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert training_criterion(config()) is criterion


def test_clipping_bounds_every_step():
    prepared = prepare(config(max_norm=1e-3, lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant"))
    before = parameters(prepared.module)
    steps = trainer(prepared).fit().steps
    moved = float(P.norm(P.combine(1.0, parameters(prepared.module), -1.0, before)))
    assert 0 < moved <= 0.5 * 1e-3 * steps * 1.0001


# ---------------------------------------------------------------- averages


def test_averaged_weights_are_evaluated_beside_the_network():
    prepared = prepare(config(ema=0.8))
    seen: list[dict[str, Any]] = []
    run = trainer(prepared, on_step=lambda e, s: seen.append(copy.deepcopy(prepared.module.state_dict())))
    last = run.fit().last
    weights = [0.8 ** (len(seen) - 1 - k) for k in range(len(seen))]
    average = copy.deepcopy(prepared.module)
    average.load_state_dict({
        k: sum(w * s[k].double() for w, s in zip(weights, seen, strict=True)) / sum(weights) for k in seen[0]
    })
    expected = evaluate(average, criterion, [prepared.data.test_set()])
    assert last["ema_test_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert last["ema_test_accuracy"] == expected["accuracy"] and last["ema_test_loss"] != last["test_loss"]
    assert without([last], "ema_") == [records()[-1]]  # training and its evaluation are the same


def test_statistics_are_re_estimated_before_each_evaluation_and_training_goes_on_with_its_own(tmp_path):
    changes = {"data_options": {"train_size": 96, "augment": True}, "momentum": 0.0}
    prepared, result = train(config(reestimate_batches=2, **changes), tmp_path / "a")
    _, plain = train(config(**changes), tmp_path / "b")
    assert without(result.history, "test_") == without(plain.history, "test_")
    assert result.last["test_loss"] != plain.last["test_loss"]
    for part in ("module", "optimizer"):
        assert_same(dict(load(tmp_path / "a" / CHECKPOINT)[part]), dict(load(tmp_path / "b" / CHECKPOINT)[part]))
    data, net = prepared.data, prepared.module
    images = data.normalize(data.train_images[:64])  # as stored: not augmented
    with reestimated(net, [(images[:32], None), (images[32:], None)]):
        expected = evaluate(net, criterion, [data.test_set()])
    assert result.last["test_loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_averaged_weights_have_re_estimated_statistics_too():
    together = records(ema=0.8, reestimate_batches=3)
    alone, estimated = records(ema=0.8), records(reestimate_batches=3)
    assert without(together, "ema_") == estimated and without(together, "test_", "ema_") == without(
        alone, "test_", "ema_")
    assert together[-1]["ema_test_loss"] != alone[-1]["ema_test_loss"]


def test_an_interrupted_run_with_everything_on_goes_on_to_the_same_bytes(tmp_path):
    chosen = config(ema=0.9, reestimate_batches=1, max_norm=1.0, label_smoothing=0.1, warmup=0.5)
    train(chosen, tmp_path / "whole")

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "cut", on_epoch=interrupt)
    train(chosen, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


# ---------------------------------------------------------------- channels last


def test_channels_last_gives_the_same_numbers_up_to_rounding():
    prepared = prepare(config(channels_last=True, epochs=2, **CONV))
    weight = prepared.module.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    seen: list[bool] = []
    prepared.module.conv2.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    found, plain = trainer(prepared).fit().history, records(epochs=2, **CONV)
    assert seen and all(seen) and prepared.module.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found, plain, strict=True):
        assert a == pytest.approx(b, rel=2e-2, abs=1e-4)


# ---------------------------------------------------------------- tensorboard


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_scalars_of(path: Path) -> None:
    found, lines = scalars(path), read_lines(path / METRICS)
    assert found.keys() == {k for r in lines for k, v in r.items() if isinstance(v, int | float)} - {"epoch"}
    for tag, points in found.items():
        expected = [(r["epoch"], r[tag]) for r in lines if r.get(tag) is not None]
        assert [step for step, _ in points] == [step for step, _ in expected]
        assert [v for _, v in points] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_scalars_are_those_of_the_records_also_after_an_interruption(tmp_path):
    pytest.importorskip("tensorboard")
    chosen = config(tensorboard=True, ema=0.9, track="gaussian", track_every=2, checkpoint_every=2, algorithm="sgd")

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config({**chosen.model_dump(), "epochs": 4}), tmp_path, on_epoch=interrupt)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3]  # and the checkpoint is of epoch 2
    train(make_config({**chosen.model_dump(), "epochs": 4}), tmp_path, resume=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert_scalars_of(tmp_path)
    train(make_config({**chosen.model_dump(), "epochs": 2}), tmp_path, overwrite=True)
    assert_scalars_of(tmp_path)


def test_a_resumed_run_may_begin_to_write_scalars(tmp_path):
    pytest.importorskip("tensorboard")

    def interrupt(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(algorithm="sgd"), tmp_path, on_epoch=interrupt)
    train(config(algorithm="sgd", tensorboard=True), tmp_path, resume=True)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 3]


def test_scalars_change_nothing_else(tmp_path):
    pytest.importorskip("tensorboard")
    for name, on in (("with", True), ("without", False)):
        train(config(tensorboard=on, algorithm="sgd", epochs=2), tmp_path / name)
    a, b = (tree(tmp_path / name) for name in ("with", "without"))
    assert a[METRICS] == b[METRICS] and not [k for k in b if k.startswith("tensorboard")]


def test_a_missing_package_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError) as caught:
        train(config(tensorboard=True), tmp_path / "run")
    assert "bnsharp[tensorboard]" in one_line(caught.value) and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- from the command line


def test_everything_is_a_setting(run, tmp_path):
    settings = {"ema": 0.9, "reestimate_batches": 2, "max_norm": 1.0, "label_smoothing": 0.1, "warmup": 0.5,
                "min_lr": 0.001}
    given = [f"--set={k}={v}" for k, v in settings.items()]
    done = run("train", "--algorithm", "sgd", *COMMAND, *given, "--out", "run")
    assert done.code == 0 and "test accuracy, averaged weights" in done.out, done.err
    stored = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert {k: stored[k] for k in settings} == settings
    assert read_run(tmp_path / "run")[0].ema == 0.9


def test_the_averaged_weights_of_a_run_are_measured(run, tmp_path):
    """Those whose test loss was recorded; ``trained`` are the others."""
    given = [*COMMAND, "--algorithm", "sgd", "--set", "ema=0.9"]
    assert run("train", *given, "--out", "run").code == 0
    last = read_lines(tmp_path / "run" / METRICS)[-1]
    assert last["test_loss"] != last["ema_test_loss"]
    for name, column in (("trained", "test_loss"), ("ema", "ema_test_loss")):
        _, module, data = read_run(tmp_path / "run", weights=name)
        assert evaluate(module, criterion, [data.test_set()])["loss"] == pytest.approx(last[column], rel=1e-6)
    found = {}
    for name in ("trained", "ema"):
        done = run("measure", "run", "--measure", "fisher_rao", "--weights", name, "--json")
        found[name] = json.loads(done.out)["fisher_rao"]
        assert found[name]["weights"] == name
    assert found["ema"]["value"] != found["trained"]["value"]
    table = run("measure", "run/checkpoint.pt", "--measure", "fisher_rao", "--weights", "ema")
    assert "run/checkpoint.pt (ema)" in table.out
    done = run("invariance", "run", "--measure", "fisher_rao", "--transformations", "1", "--weights", "ema", "--json")
    assert json.loads(done.out)["settings"]["weights"] == "ema"


def test_an_average_that_a_run_did_not_keep_is_refused_in_one_line(run, finished):
    for words in (("measure", finished), ("invariance", finished), ("measure", "torchvision:resnet18")):
        done = run(*words, "--data", "digits", "--weights", "ema")
        assert done.code == 2 and done.out == "" and "weights='ema'" in done.err, done
        assert len(done.err.splitlines()) == 1 and "'trained'" in done.err and list(Path.cwd().iterdir()) == []


BAD: list[tuple[list[str], str]] = [
    (["warmup=true"], "warmup=True"), (["epochs=true"], "epochs=True"), (["threads=100000"], "threads"),
    (["seed=1e30"], "seed"), (["seed=9007199254740993"], "seed"),
    (["warmup=3"], "shorter"), (["warmup=-1"], "warmup"), (["warmup=nan"], "warmup"),
    (["warmpu=1"], "did you mean 'warmup'"),
    (["min_lr=1"], "lr=0.05"), (["min_lr=0.001", "schedule=constant"], "schedule"),
    (["label_smoothing=1"], "label_smoothing"), (["label_smoothing=-0.1"], "label_smoothing"),
    (["max_norm=0"], "max_norm"), (["max_norm=inf"], "max_norm"),
    (["ema=1"], "ema"), (["ema=0"], "ema"), (["ema=nan"], "ema"), (["emma=0.9"], "did you mean 'ema'"),
    (["reestimate_batches=0"], "reestimate_batches"), (["reestimate_batches=4"], "at most 3"),
    (["reestimate_batches=1.5"], "reestimate_batches"), (["channels_last=true"], "bn-mlp has no convolution"),
    (["channels_last=maybe"], "channels_last"), (["tensorboard=3"], "tensorboard"),
    (["tensorbord=true"], "did you mean 'tensorboard'"), (["track_every=1"], "track"),
]


@pytest.mark.parametrize(("settings", "word"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_settings_are_refused_in_one_line_and_nothing_is_written(run, settings, word):
    done = run("train", *COMMAND, *(f"--set={s}" for s in settings), "--out", "run")
    assert done.code == 2 and done.out == "" and len(done.err.splitlines()) == 1, done
    assert word in done.err and list(Path.cwd().iterdir()) == []


def test_re_estimation_without_running_statistics_is_refused_in_one_line(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(InputError) as caught:
        train(config(model="timm:test_vit", model_options={"patch_size": 4}, reestimate_batches=1), tmp_path / "run")
    assert "no running statistics" in one_line(caught.value) and list(tmp_path.iterdir()) == []
