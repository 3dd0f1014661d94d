"""The demo, small: its runs, table, figure and sentences; finished runs are not run again."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from bnsharp.experiments import demo
from bnsharp.experiments.statistics import mean_interval
from bnsharp.experiments.study import MEASURES_FILE, run_study, units


def _tasks(out: Path) -> list[demo.Task]:
    kept = ("sgd", "sgds-0")
    return [t for t in demo.tasks(out, seeds=2, epochs=6) if t.config["algorithm"] in kept]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], int]:
    out = tmp_path_factory.mktemp("demo")
    done: list[int] = []
    results = run_study(_tasks(out), done.append, workers=1)
    return out, results, sum(done)


def test_progress_adds_up(study: tuple[Path, list[dict], int]) -> None:
    out, _, ticked = study
    assert ticked == sum(units(t) for t in _tasks(out))


def test_every_run_folder_is_complete(study: tuple[Path, list[dict], int]) -> None:
    out, results, _ = study
    assert len(results) == 8
    for task in _tasks(out):
        names = {p.name for p in Path(task.folder).iterdir()}
        assert {"config.json", "metrics.jsonl", "timing.jsonl", "summary.json", "checkpoint.pt", MEASURES_FILE} <= names
        assert json.loads((Path(task.folder) / "config.json").read_text())["seed"] == task.config["seed"]


def test_bn_sharpness_keeps_its_value_and_gaussian_does_not(study: tuple[Path, list[dict], int]) -> None:
    for result in study[1]:
        assert result["loss_change"] < 1e-10
        assert result["bn_sharpness_rescaled"] == pytest.approx(result["bn_sharpness"], rel=1e-8)
        assert abs(result["gaussian_rescaled"] / result["gaussian"] - 1) > 0.2


def test_the_line_passes_through_the_network(study: tuple[Path, list[dict], int]) -> None:
    for result in study[1]:
        middle = len(result["line_t"]) // 2
        assert result["line_t"][middle] == pytest.approx(0, abs=1e-15)
        assert result["line_loss"][middle] == pytest.approx(result["loss"], rel=1e-12)


def test_finished_runs_are_read_back(study: tuple[Path, list[dict], int]) -> None:
    out, results, _ = study
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert run_study(_tasks(out), lambda n: None, workers=1) == results
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_numbers_do_not_depend_on_the_workers(study: tuple[Path, list[dict], int], tmp_path: Path) -> None:
    tasks = _tasks(tmp_path)[:2]
    again = run_study(tasks, lambda n: None, workers=2)
    for new, old in zip(again, study[1][:2], strict=True):
        assert {**new, "seconds": 0} == {**old, "seconds": 0}


def test_table_and_figure(study: tuple[Path, list[dict], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {k: v for k, v in demo.ALGORITHMS.items() if k in ("SGD", "SGDS-0")}
    monkeypatch.setattr(demo, "ALGORITHMS", kept)
    files = demo.write(tmp_path, study[1])
    rows = list(csv.DictReader(files["table"].read_text().splitlines()))
    assert [(r["setting"], r["algorithm"]) for r in rows] == [(s, a) for s in demo.SETTINGS for a in kept]
    accuracies = [100 * r["test_accuracy"] for r in study[1] if r["setting"] == "clean labels" and r["label"] == "SGD"]
    assert float(rows[0]["test_accuracy"]) == pytest.approx(sum(accuracies) / 2)
    assert files["figure"].read_bytes().startswith(b"\x89PNG")
    assert len(demo.verdict(demo.summarize(study[1]))) == 3


def test_mean_interval_against_a_worked_example() -> None:
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert math.isnan(mean_interval([1.0])[1])
