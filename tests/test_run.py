"""A configuration becomes a run folder, and a run folder becomes a network again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, cross_entropy, one_line, read_lines, tree

from bnsharp import Objective, parameters
from bnsharp.checkpoint import CHECKPOINT, CONFIG, METRICS, PREVIOUS, SUMMARY, TIMING, load
from bnsharp.errors import DivergedError, InputError
from bnsharp.experiments.config import RunConfig, make_config
from bnsharp.experiments.measuring import Setting, measure_all, options_for
from bnsharp.experiments.objectives import objective_of
from bnsharp.experiments.recipe import criterion
from bnsharp.experiments.run import load_state, prepare, read_run, train
from bnsharp.experiments.sources import open_source
from bnsharp.trainer import evaluate

SMALL: dict[str, Any] = {
    "epochs": 3, "batch_size": 32, "data_options": {"train_size": 96}, "model_options": {"width": 8, "depth": 1},
    "algorithm": "sgds-1", "threads": 1,
}


def config(**changes: Any) -> RunConfig:
    return make_config({**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests read it only."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    train(config(), path)
    return path


def test_a_run_folder_holds_what_the_documentation_says(finished):
    assert set(tree(finished)) == {CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS, SUMMARY}
    metrics, timing = read_lines(finished / METRICS), read_lines(finished / TIMING)
    assert [r["epoch"] for r in metrics] == [r["epoch"] for r in timing] == [1, 2, 3]
    assert {"epoch", "train_seconds"} <= set(timing[0]) and not {k for k in metrics[0] if "second" in k}
    summary = json.loads((finished / SUMMARY).read_text())
    assert summary == {"epochs": 3, "steps": 9, **metrics[-1]}


def test_the_configuration_is_complete_and_repeats_the_run(finished, tmp_path):
    stored = json.loads((finished / CONFIG).read_text())
    versions = stored.pop("versions")
    assert versions["torch"] == torch.__version__ and "bnsharp" in versions and "python" in versions
    assert stored["engine"] == "loop" and stored["threads"] == 1 and stored["seed"] == 0
    assert stored["algorithm_options"]["delta"] == 0.08 and len(stored["algorithm_options"]) > 8  # defaults included
    torch.manual_seed(123)
    train(RunConfig(**stored), tmp_path / "again")
    again = tree(tmp_path / "again")
    for name in (CONFIG, METRICS, SUMMARY):
        assert again[name] == (finished / name).read_bytes(), name


def test_the_network_is_read_back(finished):
    read, net, data = read_run(finished)
    assert read.algorithm == "sgds-1" and len(data.train_labels) == 96
    last = read_lines(finished / METRICS)[-1]
    result = evaluate(net, criterion, [data.test_set()])
    assert result["accuracy"] == last["test_accuracy"] and result["loss"] == pytest.approx(last["test_loss"], rel=1e-5)
    assert_same(dict(net.state_dict()), dict(load(finished / CHECKPOINT)["module"]))
    for source in (finished, finished / CHECKPOINT):
        assert_same(net.state_dict(), open_source(str(source)).module.state_dict())


def test_a_bare_checkpoint_is_read_with_a_model_and_data(finished, tmp_path):
    payload = load(finished / CHECKPOINT)
    for i, content in enumerate((payload, payload["module"])):
        torch.save(content, tmp_path / f"{i}.pt")
        made = open_source(
            str(tmp_path / f"{i}.pt"), data="digits", model="bn-mlp", model_options={"width": 8, "depth": 1}
        )
        assert_same(dict(made.module.state_dict()), dict(payload["module"]))


def test_a_folder_from_before_a_setting_existed_resumes_with_its_default(tmp_path):
    train(config(epochs=1), tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    del stored["together"]
    (tmp_path / CONFIG).write_text(json.dumps(stored))
    train(config(epochs=1), tmp_path, resume=True)
    del stored["lr"]
    (tmp_path / CONFIG).write_text(json.dumps(stored))
    with pytest.raises(InputError, match="lr=None"):
        train(config(epochs=1, lr=0.3), tmp_path, resume=True)


def test_an_interrupted_run_resumes_to_the_same_folder(finished, tmp_path):
    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path, on_epoch=interrupt)
    assert set(tree(tmp_path)) == {CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS}
    train(config(), tmp_path, resume=True)
    for name in (CONFIG, METRICS, SUMMARY):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    before = tree(tmp_path)
    train(config(), tmp_path, resume=True)
    assert tree(tmp_path) == before  # after the end there is nothing left to do


def test_an_existing_run_is_refused_before_any_work(finished):
    before = tree(finished)
    with pytest.raises(InputError) as caught:
        train(config(data="no-such-data"), finished)
    assert "--resume" in one_line(caught.value)
    with pytest.raises(InputError) as caught:
        train(config(lr=0.2), finished, resume=True)
    assert "lr" in one_line(caught.value)
    assert tree(finished) == before


def test_overwrite_starts_afresh(tmp_path):
    for epochs in (2, 1):
        train(config(epochs=epochs), tmp_path, overwrite=True)
    assert len(read_lines(tmp_path / METRICS)) == 1 and json.loads((tmp_path / CONFIG).read_text())["epochs"] == 1


def test_settings_reach_the_run(tmp_path):
    prepared, result = train(
        config(algorithm="sgd", epochs=1, optimizer="Adam", lr=0.01, weight_decay=0.0, schedule="constant",
               data_options={"train_size": 96, "label_noise": 0.5}, model="conv-bn", model_options={"width": 4}),
        tmp_path,
    )
    assert "conv1.weight" in parameters(prepared.module).keys() and int(prepared.data.noisy.sum()) == 48
    assert result.last["lr"] == 0.01 and result.last["gradient_evaluations"] == result.steps == 3
    assert set(load(tmp_path / CHECKPOINT)["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_seeds_of_data_and_run_are_separate():
    a, b = (prepare(config(seed=s, data_seed=7)) for s in (0, 1))
    assert torch.equal(a.data.train_images, b.data.train_images)
    assert not torch.equal(parameters(a.module)["head.weight"], parameters(b.module)["head.weight"])
    assert not torch.equal(prepare(config(seed=1)).data.train_images, a.data.train_images)


def test_a_diverging_run_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(DivergedError) as caught:
        train(config(algorithm_options={"weight_growth": 1e37}), tmp_path)
    assert "epoch 2, step" in one_line(caught.value) or "epoch 3, step" in str(caught.value)
    kept = read_lines(tmp_path / METRICS)
    assert SUMMARY not in tree(tmp_path) and load(tmp_path / CHECKPOINT)["epoch"] == len(kept) > 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": "digitz"}, "digits"), ({"model": "bn-mpl"}, "bn-mlp"), ({"algorithm": "sgsd-1"}, "sgds-N"),
    ({"optimizer": "SDG"}, "SDG"), ({"optimizer": "Optimizer"}, "Optimizer"),
    ({"optimizer_options": {"momentums": 1}}, "momentums"),
    ({"algorithm_options": {"detla": 1}}, "delta"), ({"model_options": {"widht": 1}}, "width"),
    ({"data_options": {"label_nose": 1}}, "label_noise"), ({"data_options": {"label_noise": 1.5}}, "noise"),
    ({"data_options": {"train_size": 10**6}}, "train_size"), ({"data_options": {"train_size": 0}}, "train_size"),
    ({"batch_size": 10**6}, "batch_size"), ({"device": "nonsense"}, "device"), ({"device": "cuda:99"}, "device"),
    ({"schedule": "multistep", "milestones": [3, 1]}, "milestones"), ({"model": "vgg11-bn", "model_options": {}}, "32"),
    ({"model_options": {"width": 0}}, "width"), ({"algorithm_options": {"delta": -1.0}}, "delta"),
    ({"batch_size": 1}, "batch"),
    # wrong types, as they come from --set
    ({"data_options": {"label_noise": "half"}}, "noise"), ({"data_options": {"train_size": "all"}}, "train_size"),
    ({"data_options": {"image_size": "big"}}, "image_size"), ({"data_options": {"root": 5}, "data": "mnist"}, "root"),
    ({"data_options": {"augment": "yes"}}, "augment"), ({"model_options": {"width": "wide"}}, "width"),
    ({"model_options": {"activation": 3}}, "activation"), ({"model_options": {"activation": ["relu"]}}, "activation"),
    ({"algorithm_options": {"delta": "big"}}, "delta"), ({"algorithm_options": {"clip": "big"}}, "clip"),
    # names of the builders' own arguments
    ({"algorithm_options": {"name": "x"}}, "name"), ({"algorithm_options": {"groups": 1}}, "groups"),
    ({"model_options": {"seed": 1}}, "seed"), ({"model_options": {"classes": 3}}, "classes"),
    ({"data_options": {"seed": 1}}, "seed"), ({"optimizer_options": {"params": 1}}, "params"),
]


@pytest.mark.parametrize(("changes", "word"), BAD, ids=lambda v: str(v))
def test_a_bad_configuration_is_refused_in_one_line_and_nothing_is_written(tmp_path, changes, word):
    with pytest.raises(InputError) as caught:
        train(config(**changes), tmp_path / "run")
    assert word in one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- reading what does not fit


def test_what_is_no_run_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / CONFIG).write_text('{"hidden_size": 768}')
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / CONFIG).write_text(json.dumps(config().model_dump()))
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / CONFIG).write_text("[1, 2]")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "foreign", "started", "listed", "missing"):
        with pytest.raises(InputError) as caught:
            open_source(str(tmp_path / name))
        assert name in one_line(caught.value)


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(finished, tmp_path):
    other, _ = train(config(model="conv-bn", model_options={}, epochs=1), tmp_path / "other")
    with pytest.raises(InputError) as caught:
        open_source(str(tmp_path / "other" / CHECKPOINT), data="digits", model="bn-mlp")
    message = one_line(caught.value)
    assert "linear1.weight" in message and "Sequential" in message
    with pytest.raises(InputError) as caught:
        open_source(str(finished / CHECKPOINT), data="digits", model="bn-mlp")  # width 128, depth 2
    assert "linear2.weight" in one_line(caught.value)
    before = {k: v.clone() for k, v in other.module.state_dict().items()}
    wrong = {**before, "head.weight": torch.zeros(2, 2)}
    extra = {**before, "tail.weight": torch.zeros(2)}
    for state, key in ((wrong, "head.weight"), (extra, "tail.weight")):
        with pytest.raises(InputError) as caught:
            load_state(other.module, state, "here")
        assert key in one_line(caught.value)
    assert_same(before, dict(other.module.state_dict()))


@pytest.mark.parametrize(("source", "options", "word"), [
    ("torchvision:resnet81", {"data": "digits"}, "resnet18"), ("torchvision:resnet18", {}, "--data"),
    ("torchvision:", {"data": "digits"}, "torchvision:"), ("nothing-here", {}, "run folder"), ("timm:", {}, "timm:"),
    ("torchvision:resnet18", {"data": "digits", "seed": -1}, "seed"),
    ("torchvision:resnet18", {"data": "digitz"}, "digits"),
])
def test_an_unknown_source_is_refused_in_one_line(source, options, word):
    with pytest.raises(InputError) as caught:
        open_source(source, **options)
    assert word in one_line(caught.value)


# ---------------------------------------------------------------- measuring


def test_the_measured_loss_is_that_of_all_training_examples_as_one_batch(finished):
    _, net, data = read_run(finished)
    x, y = data.train_set()
    objective = objective_of(net, data)
    assert objective.batch_size == 96
    assert torch.equal(objective(parameters(net)), Objective(net, cross_entropy, (x, y))(parameters(net)))
    assert objective_of(net, data, 10).batch_size == 10


def test_measures_come_with_errors_and_on_what_they_were_taken(finished):
    _, net, data = read_run(finished)
    options = options_for(["bn_sharpness", "gaussian"], ["steps=1", "gaussian.draws=3"])
    assert options == {"bn_sharpness": {"steps": 1}, "gaussian": {"draws": 3}}
    before = tree(finished)
    setting = Setting(examples=64, statistics="running", precision="float32", promote=False, exact=True)
    results = measure_all(net, data, options, setting)
    for name, result in results.items():
        assert {"value", "stderr", "error", "upper", "seconds", "statistics", "batch_size"} <= set(result), name
        assert (result["statistics"], result["batch_size"], result["precision"]) == ("running", 64, "float32")
        assert math.isfinite(result["value"]) and result["stderr"] >= 0 and result["error"] >= 0
        assert result["options"] | options[name] == result["options"]
    again = measure_all(net, data, options, setting)
    assert [r["value"] for r in again.values()] == [r["value"] for r in results.values()]
    assert tree(finished) == before


@pytest.mark.parametrize(("names", "settings", "word"), [
    (["gausian"], [], "gaussian"), (["gaussian"], ["detla=1"], "detla"), (["gaussian"], ["draw=1"], "draws"),
    (["gaussian"], ["bn_sharpness.delta=1"], "bn_sharpness"), (["gaussian"], ["draws"], "key=value"),
])
def test_unknown_measures_and_options_are_refused_in_one_line(names, settings, word):
    with pytest.raises(InputError) as caught:
        options_for(names, settings)
    assert word in one_line(caught.value)


@pytest.mark.parametrize(("options", "settings", "word"), [
    ({"gaussian": {"draws": 0}}, {}, "draws"), ({"gaussian": {"sigma": -1.0}}, {}, "sigma"),
    ({"gaussian": {"sigma": "big"}}, {}, "sigma"), ({"gaussian": {"draws": "many"}}, {}, "draws"),
    ({"gaussian": {"nonsense": 1}}, {}, "nonsense"), ({"bn_sharpness": {"delta": 0}}, {}, "delta"),
    ({"bn_sharpness": {"p": 0.5}}, {}, "p="), ({"bn_sharpness": {"steps": -1}}, {}, "steps"),
    ({"bn_sharpness": {"steps": 1.5}}, {}, "steps"),
    ({"gaussian": {}}, {"examples": 0}, "expected"), ({"gaussian": {}}, {"examples": 97}, "96"),
    ({"gaussian": {}}, {"examples": -1}, "expected"), ({"gaussian": {}}, {"examples": 1}, "batch"),
    ({"gaussian": {}}, {"statistics": "moving"}, "statistics"), ({"gaussian": {}}, {"precision": "float16"}, "float64"),
], ids=lambda v: str(v))
def test_bad_measurements_are_refused_in_one_line(finished, options, settings, word):
    _, net, data = read_run(finished)
    with pytest.raises(InputError) as caught:
        measure_all(net, data, options, Setting(**settings))
    assert word in one_line(caught.value)
