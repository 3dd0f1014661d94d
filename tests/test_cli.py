"""The command line as its users see it: exit codes, one line on standard error, files, and nothing else."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, Done, read_lines, tree
from PIL import Image

from bnsharp.checkpoint import CHECKPOINT, CONFIG, METRICS, PREVIOUS, SUMMARY, TIMING, load

KEYS = {"value", "stderr", "error", "upper", "seconds", "statistics", "batch_size"}
CHEAP = ["--set", "draws=3", "--measure", "gaussian"]


def refused(done: Done, word: str) -> None:
    """Bad usage: exit code 2, one line on standard error, nothing else, nothing written."""
    assert done.code == 2 and done.out == "", done
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("bnsharp: ") and word in lines[0], done.err
    assert list(Path.cwd().iterdir()) == []


def results(done: Done) -> dict[str, Any]:
    """The one JSON object on standard output."""
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(done.out, parse_constant=refuse)
    for name, result in found.items():
        assert set(result) >= KEYS, name
        assert math.isfinite(result["value"]) and result["stderr"] >= 0 and result["error"] >= 0
        assert result["seconds"] > 0
    return found


# ---------------------------------------------------------------- train


def test_a_run_folder_holds_what_the_documentation_says(finished):
    assert set(tree(finished)) == {CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS, SUMMARY}
    stored = json.loads((finished / CONFIG).read_text())
    assert stored["algorithm"] == "sgds-1" and stored["epochs"] == 2 and stored["batch_size"] == 32
    assert stored["data_options"] == {"train_size": 96} and stored["model_options"] == {"width": 8, "depth": 1}
    assert [r["epoch"] for r in read_lines(finished / METRICS)] == [1, 2]


def test_an_existing_run_is_refused_and_left_alone(run, finished):
    before = tree(finished)
    refused(run("train", "--algorithm", "sgds-1", *SMALL, "--out", finished), "--overwrite")
    refused(run("train", "--algorithm", "sgds-1", *SMALL, "--out", finished, "--lr", "0.5", "--resume"), "lr")
    refused(run("train", "--algorithm", "sgds-1", *SMALL, "--out", finished, "--resume", "--overwrite"), "--resume")
    assert tree(finished) == before


def test_resuming_after_the_end_is_harmless_and_overwriting_repeats_the_run(run, finished, tmp_path):
    """Equal bytes from two processes."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = tree(copy)
    arguments = ["train", "--algorithm", "sgds-1", *SMALL, "--out", copy]
    done = run(*arguments, "--resume")
    assert done.code == 0 and "test accuracy" in done.out and tree(copy) == before
    (copy / "notes.txt").write_text("mine")
    assert run(*arguments, "--overwrite").code == 0
    after = tree(copy)
    assert after.pop("notes.txt") == b"mine"
    assert {k: after[k] for k in (METRICS, CONFIG, SUMMARY)} == {k: before[k] for k in (METRICS, CONFIG, SUMMARY)}


def test_the_default_folder_says_what_the_run_is(run, tmp_path):
    assert run("train", "--algorithm", "sgd", "--seed", "3", *SMALL, "--epochs", "1").code == 0
    assert (tmp_path / "runs" / "digits-bn-mlp-sgd-3" / SUMMARY).exists()


def test_training_on_an_image_folder(run, images, tmp_path):
    done = run(
        "train", "--data", images, "--model", "conv-bn", "--algorithm", "sam", "--epochs", "1", "--batch-size", "4",
        "--out", "run",
    )
    assert done.code == 0 and done.err == ""
    read = results(run("measure", "run", *CHEAP, "--json"))
    assert read["gaussian"]["batch_size"] == 8


def test_a_loss_that_is_not_finite_is_exit_code_1(run, tmp_path):
    done = run("train", "--algorithm", "sgds-0", *SMALL, "--set", "weight_growth=1e37", "--epochs", "4", "--out", "run")
    assert done.code == 1 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("bnsharp: training stopped: ") and re.search(r"epoch \d, step \d", line)
    kept = read_lines(tmp_path / "run" / METRICS)
    assert kept and load(tmp_path / "run" / CHECKPOINT)["epoch"] == len(kept)
    assert SUMMARY not in tree(tmp_path / "run")
    assert results(run("measure", "run", *CHEAP, "--json"))  # the last good network can be measured


BAD_TRAINING = [
    (["--algorithm", "sgds--1"], "sgds"), (["--algorithm", "sgsd-1"], "did you mean"),
    (["--model", "bn-mpl"], "bn-mlp"),
    (["--data", "digitz"], "digits"), (["--set", "delta=0"], "delta"), (["--set", "delta=-0.1"], "delta"),
    (["--set", "p=0.5"], "p="), (["--set", "weight=-1"], "weight"), (["--set", "weight=NaN"], "weight"),
    (["--set", "detla=0.1"], "did you mean 'delta'"), (["--set", "delta"], "key=value"), (["--set", "clip=0"], "clip"),
    (["--set", "algorithm_options.steps=3"], "steps"), (["--set", "model_options.dept=3"], "depth"),
    (["--algorithm", "sam", "--set", "rho=0"], "rho"), (["--algorithm", "sgd", "--set", "delta=0.1"], "delta"),
    (["--epochs", "0"], "epochs"), (["--lr", "-1"], "lr"), (["--lr", "nan"], "lr"), (["--seed", "-1"], "seed"),
    (["--batch-size", "0"], "batch_size"), (["--batch-size", "100000"], "batch_size"), (["--batch-size", "1"], "batch"),
    (["--set", "optimizer=SDG"], "SDG"), (["--set", "schedule=linear"], "schedule"),
    (["--set", "label_noise=2"], "noise"),
    (["--set", "label_noise=half"], "noise"), (["--set", "delta=big"], "delta"),
    (["--set", "train_size=100000"], "train_size"),
    (["--set", "device=gpu"], "device"), (["--set", "width=wide"], "width"), (["--model", "vgg11-bn"], "32"),
    (["--resume", "--overwrite"], "--overwrite"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD_TRAINING, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_training_is_refused_in_one_line_and_nothing_is_written(run, arguments, word):
    refused(run("train", *arguments, "--out", "run"), word)


def test_an_out_that_is_a_file_or_lies_below_one_is_refused(run, finished):
    for out in (finished / SUMMARY, finished / SUMMARY / "run"):
        refused(run("train", *SMALL, "--epochs", "1", "--out", out), SUMMARY)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("target", ["bnsharp.experiments.config.make_config", "bnsharp.experiments.run.load_data"])
def test_an_interruption_before_anything_began_is_one_line(run, monkeypatch, target, wrapped):
    def interrupted(*arguments: Any, **options: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            if wrapped:  # as the import of a compiled module does
                raise ImportError("initialization failed") from stop
            raise

    monkeypatch.setattr(target, interrupted)
    done = run("train", *SMALL, "--out", "run")
    assert (done.code, done.out, done.err) == (130, "", "bnsharp: stopped\n")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_stopped_comparison_says_so(run, monkeypatch, signal, code):
    def stopped(*arguments: Any) -> None:
        raise signal

    monkeypatch.setattr("bnsharp.experiments.study.run_study", stopped)
    done = run("compare", "--algorithm", "sam", "--set", "width=8", "--set", "train_size=96", "--out", "all")
    assert done.code == code and done.out == "" and "all: the same command goes on" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["--resume"], ["--overwrite"]])
def test_another_programs_checkpoint_is_left_alone(run, tmp_path, words):
    torch.save({"net": torch.zeros(2)}, tmp_path / CHECKPOINT)
    before = tree(tmp_path)
    done = run("train", *SMALL, "--out", ".", *words)
    assert done.code == 2 and CHECKPOINT in done.err and len(done.err.splitlines()) == 1
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- usage


BAD_USAGE = [
    (["train", "--epochs", "many"], "--epochs"), (["train", "--epoch", "1"], "--epoch"), (["train", "extra"], "extra"),
    (["measure"], "source"), (["measure", "x", "--examples", "all"], "--examples"), (["trian"], "trian"),
    (["list", "models", "data"], "data"), (["demo", "--seeds", "1"], "--seeds"), (["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD_USAGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_usage_is_refused_in_one_line(run, arguments, word):
    refused(run(*arguments), word)


@pytest.mark.parametrize("arguments", [[], ["train"], ["measure"], ["list"], ["demo"]])
def test_help_is_on_standard_output(run, arguments):
    done = run(*arguments, "--help")
    assert done.code == 0 and "--help" in done.out and done.err == ""
    assert not any(word in done.out for word in ("Traceback", "None"))


def test_the_command_is_installed():
    script = Path(sys.executable).parent / "bnsharp"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == ""
    assert all(word in done.stdout for word in ("train", "measure", "list", "demo"))


# ---------------------------------------------------------------- list


def test_everything_there_is_is_listed(run):
    from bnsharp.algorithms import FAMILIES
    from bnsharp.data import DATASETS
    from bnsharp.measures import MEASURES
    from bnsharp.models import MODELS

    known: dict[str, Any] = {"measures": MEASURES, "algorithms": FAMILIES, "models": MODELS, "data": DATASETS}
    everything = run("list")
    assert everything.code == 0 and everything.err == ""
    for kind, names in known.items():
        done = run("list", kind)
        assert done.code == 0 and done.err == ""
        for name in names:
            assert name in done.out and name in everything.out, name


def test_what_cannot_be_listed_is_refused(run):
    refused(run("list", "measure"), "did you mean 'measures'")


# ---------------------------------------------------------------- measure


def test_a_run_folder_and_its_checkpoint_are_one_network(run, finished):
    before = tree(finished)
    found = [results(run("measure", s, "--set", "steps=1", *CHEAP, "--measure", "bn_sharpness", "--json"))
             for s in (finished, finished / CHECKPOINT)]
    assert list(found[0]) == ["gaussian", "bn_sharpness"]
    for name in found[0]:
        assert found[0][name]["value"] == found[1][name]["value"]
        assert found[0][name]["statistics"] == "batch" and found[0][name]["batch_size"] == 96
    assert tree(finished) == before


def test_precision_and_statistics(run, finished):
    values = {
        (statistics, precision): results(run(
            "measure", finished, *CHEAP, "--measure", "bn_sharpness", "--set", "steps=1", "--json",
            "--statistics", statistics, "--precision", precision,
        ))
        for statistics in ("batch", "running") for precision in ("float64", "float32")
    }
    for statistics in ("batch", "running"):
        double, single = values[statistics, "float64"], values[statistics, "float32"]
        for name in double:
            assert double[name]["statistics"] == statistics
            assert double[name]["error"] < single[name]["error"]
        bn = "bn_sharpness"
        assert single[bn]["value"] == pytest.approx(double[bn]["value"], abs=single[bn]["error"] + double[bn]["error"])
    assert values["batch", "float64"] != values["running", "float64"]


def test_a_table_names_source_and_measures(run, finished):
    done = run("measure", finished, *CHEAP, "--examples", "40")
    assert done.code == 0 and "gaussian" in done.out and "40 examples" in done.out and done.err == ""


def test_a_bare_checkpoint_needs_a_model_and_data(run, finished, tmp_path, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare") / "weights.pt"
    shutil.copy(finished / CHECKPOINT, bare)
    refused(run("measure", bare), "--model")
    refused(run("measure", bare, "--model", "bn-mlp"), "--data")
    refused(run("measure", bare, "--model", "bn-mpl", "--data", "digits"), "bn-mlp")
    refused(run("measure", bare, "--model", "conv-bn", "--data", "digits"), "conv1.weight")


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(run, finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    shutil.copy(finished / CONFIG, folder / CONFIG)
    torch.save({"module": {"conv1.weight": torch.zeros(3)}}, folder / CHECKPOINT)
    refused(run("measure", folder), "linear1.weight")
    torch.save({"module": torch.zeros(3)}, folder / CHECKPOINT)
    refused(run("measure", folder), "expected")
    torch.save({"module": {"linear1.weight": 3}}, folder / CHECKPOINT)
    refused(run("measure", folder), "head.weight")


@pytest.mark.parametrize("content", [b"", b"hello", b"a text of notes", b"\x80\x04K\x01.", b"PK\x03\x04"])
def test_a_checkpoint_that_is_none_is_refused(run, finished, tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(finished / CONFIG, folder / CONFIG)
    (folder / CHECKPOINT).write_bytes(content)
    refused(run("measure", folder), CHECKPOINT)


def test_what_is_no_run_folder_is_refused(run, tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("no-run")
    refused(run("measure", folder), "not a run folder")
    shutil.copy(finished / CONFIG, folder / CONFIG)
    refused(run("measure", folder), "no checkpoint")
    refused(run("measure", "nothing-here"), "nothing-here")


BAD_MEASURING = [
    (["--measure", "gausian"], "did you mean 'gaussian'"), (["--set", "detla=1"], "delta"),
    (["--set", "delta=0"], "delta"),
    (["--set", "p=0.5"], "p="), (["--set", "steps=-1"], "steps"), (["--set", "delta=big"], "delta"),
    (["--set", "draws=0"], "draws"), (["--set", "sigma=0"], "sigma"), (["--statistics", "moving"], "statistics"),
    (["--precision", "half"], "float64"), (["--examples", "0"], "expected"), (["--examples", "97"], "96"),
    (["--set", "hessian_trace.draws=3"], "hessian_trace"), (["--set", "draws"], "key=value"),
    (["--data", "digitz"], "digits"),
    (["--set", "draws=1.5"], "draws"), (["--seed", "-1", "--data", "nothing"], "nothing"),
    (["--set", "nodes=many"], "nodes"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD_MEASURING, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_bad_measuring_is_refused_in_one_line(run, finished, arguments, word, form):
    refused(run("measure", finished, *arguments, *form), word)


# ---------------------------------------------------------------- networks of torchvision on image folders


def test_a_network_of_torchvision_on_an_image_folder(run, images):
    arguments = ["torchvision:resnet18", "--data", images, *CHEAP, "--precision", "float32", "--json"]
    found = [results(run("measure", *arguments)) for _ in range(2)]
    assert found[0]["gaussian"]["batch_size"] == 8 and found[0]["gaussian"]["value"] == found[1]["gaussian"]["value"]


def test_a_network_that_does_not_take_the_data_is_refused(run, images, tmp_path_factory):
    gray = tmp_path_factory.mktemp("data") / "gray"
    for path in images.rglob("*.png"):
        target = gray / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(target)
    refused(run("measure", "torchvision:resnet18", "--data", gray, *CHEAP), "(1, 32, 32)")


@pytest.mark.parametrize(("source", "arguments", "word"), [
    ("torchvision:resnet81", ["--data", "digits"], "resnet18"), ("torchvision:resnet18", [], "--data"),
    ("torchvision:resnet18", ["--data", "digits", "--seed", "-1"], "seed"),
    ("tv:resnet18", ["--data", "digits"], "tv:"),
])
def test_unknown_networks_are_refused(run, source, arguments, word):
    refused(run("measure", source, *arguments), word)


@pytest.mark.parametrize("fault", [
    "missing", "empty", "no test", "other classes", "empty class", "text file", "two sizes", "truncated",
])
def test_a_malformed_image_folder_is_refused(run, images, tmp_path_factory, fault):
    root = tmp_path_factory.mktemp("data") / "broken"
    if fault == "empty":
        root.mkdir()
    elif fault != "missing":
        shutil.copytree(images, root)
    if fault == "no test":
        shutil.rmtree(root / "test")
    elif fault == "other classes":
        (root / "test" / "dog").rename(root / "test" / "wolf")
    elif fault == "empty class":
        for path in (root / "train" / "dog").iterdir():
            path.unlink()
    elif fault == "text file":
        (root / "train" / "dog" / "notes.txt").write_text("mine")
    elif fault == "two sizes":
        Image.new("RGB", (16, 16)).save(root / "train" / "dog" / "9.png")
    elif fault == "truncated":
        path = root / "train" / "dog" / "0.png"
        path.write_bytes(path.read_bytes()[:200])
    for arguments in (["train", "--data", root, "--model", "conv-bn", "--batch-size", "4", "--out", "run"],
                      ["measure", "torchvision:resnet18", "--data", root, *CHEAP]):
        refused(run(*arguments), "broken")
