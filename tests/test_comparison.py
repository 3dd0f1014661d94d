"""Algorithms side by side: rows, pairing by seed, diverged runs, files, and the command."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import one_line

from bnsharp.algorithms import FAMILIES, algorithm, find, options_of
from bnsharp.errors import InputError
from bnsharp.experiments import comparison
from bnsharp.experiments.comparison import ABLATION, ALGORITHMS, BASELINE, Row, parse_row, rows_of, summarize
from bnsharp.experiments.study import run_study

QUICK = ("width=8", "depth=1", "train_size=100", "batch_size=50")


def test_every_algorithm_has_a_row() -> None:
    rows = rows_of("algorithms", [])
    assert next(iter(rows)) == BASELINE
    assert {find(row.algorithm)[0].pattern for row in rows.values()} == {f.pattern for f in FAMILIES.values()}


@pytest.mark.parametrize("title", [*ALGORITHMS, *ABLATION])
def test_every_row_has_options_that_its_algorithm_knows(title: str) -> None:
    row = (ALGORITHMS | ABLATION)[title]
    family, matched = find(row.algorithm)
    assert set(row.options) <= set(options_of(family, *matched))


def test_a_row_by_hand() -> None:
    title, row = parse_row("sgds-1:warm=true,delta=0.02")
    assert (title, row) == ("sgds-1:warm=true,delta=0.02", Row("sgds-1", {"warm": True, "delta": 0.02}))
    assert list(rows_of("algorithms", ["sam:rho=1", "sgd"])) == [BASELINE, "sam:rho=1"]
    with pytest.raises(InputError) as caught:
        parse_row("sam:rh=1")
    assert "rho" in one_line(caught.value)
    with pytest.raises(InputError):
        parse_row("sma")


def result(label: str, seed: int, accuracy: float, gradients: float = 100, **more: Any) -> dict[str, Any]:
    return {"label": label, "seed": seed, "test_accuracy": accuracy, "gradient_evaluations": gradients, "seconds": 2.0,
            "loss": 0.1, "bn_sharpness": 0.5, "hessian_top": 1.0, **more}


def test_differences_are_paired_by_seed() -> None:
    """Seeds that differ by 10 points, an algorithm that is 1 point better on each: the interval is that of the gain."""
    results = [result(BASELINE, s, 0.5 + 0.1 * s) for s in range(3)]
    results += [result("ours", s, 0.51 + 0.1 * s, 250) for s in range(3)]
    line = summarize([BASELINE, "ours"], results)[1]
    assert line["accuracy_gain"] == pytest.approx(1.0) and line["accuracy_gain_ci95"] == pytest.approx(0.0, abs=1e-9)
    assert line["test_accuracy"] == pytest.approx(61.0) and line["test_accuracy_ci95"] > 20
    assert line["relative_gradients"] == 2.5 and line["seeds"] == 3


def test_a_diverged_run_is_told_and_not_averaged() -> None:
    results = [result(BASELINE, s, 0.5) for s in range(2)]
    results += [result("ours", 0, 0.5), {"label": "ours", "seed": 1, "diverged": "nan", "test_accuracy": math.nan,
                                         "gradient_evaluations": math.nan, "seconds": math.nan}]
    line = summarize([BASELINE, "ours"], results)[1]
    assert comparison.cell(line, "test_accuracy", 4) == "1 of 2 diverged"
    assert "1 of 2 diverged" in comparison.markdown([line])


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    rows = {BASELINE: Row("sgd"), "far": Row("sam", {"rho": 1e30})}
    made = comparison.tasks(tmp_path, rows, QUICK, data="digits", model="bn-mlp", seeds=1, epochs=1,
                            train_size=lambda options: 100)
    first, second = run_study(made, lambda n: None, 1)
    assert "diverged" not in first and "diverged" in second and math.isnan(second["test_accuracy"])


def test_the_command(run: Any, tmp_path: Path) -> None:
    words = ["compare", "--algorithm", "sam:rho=0.1", "--algorithm", "entropy-sgd:inner_steps=2"]
    words += [w for setting in QUICK for w in ("--set", setting)]
    words += ["--seeds", "2", "--epochs", "2", "--workers", "1", "--label-noise", "0.2", "--out", "all"]
    done = run(*words)
    assert done.code == 0, done.err
    for word in ("sam:rho=0.1", "entropy-sgd:inner_steps=2", BASELINE, "accuracy, %", "20% of the training labels"):
        assert word in done.out
    table = list(csv.DictReader((tmp_path / "all/table.csv").open()))
    assert [line["row"] for line in table] == [BASELINE, "sam:rho=0.1", "entropy-sgd:inner_steps=2"]
    assert [float(line["relative_gradients"]) for line in table] == [1.0, 2.0, 2.0]
    config = json.loads((tmp_path / "all/runs/01-sam-1/config.json").read_text())
    assert config["algorithm_options"]["rho"] == 0.1 and config["data_options"]["label_noise"] == 0.2
    again = run(*words, "--json")
    stored = json.loads(again.out)  # finished runs are read back
    assert stored["table"][1]["test_accuracy"] == pytest.approx(float(table[1]["test_accuracy"]))


@pytest.mark.parametrize(("words", "word"), [
    (("--rows", "ablaton"), "did you mean 'ablation'"), (("--algorithm", "smaa"), "unknown algorithm"),
    (("--set", "epoch=3"), "did you mean 'epochs'"), (("--algorithm", "sam:rho=-1"), "rho=-1"),
    (("--set", "algorithm=sam"), "--algorithm"), (("--set", "seed=3"), "--seeds"), (("--set", "epochs=3"), "--epochs"),
    (("--set", "model=lenet-bn"), "--model"), (("--set", "algorithm_options.rho=1"), "--algorithm"),
    (("--model", "bn-mpl"), "bn-mlp"), (("--label-noise", "0.2", "--set", "label_noise=0.4"), "one of the two"),
    (("--label-noise", "2"), "label noise"),
])
def test_bad_usage_is_one_line(run: Any, tmp_path: Path, words: tuple[str, ...], word: str) -> None:
    done = run("compare", *words, "--out", "all")
    assert done.code == 2 and word in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "all").exists()


def test_presets_are_algorithms_that_build() -> None:
    from test_algorithms import GROUPS

    for row in (ALGORITHMS | ABLATION).values():
        assert algorithm(row.algorithm, GROUPS, **row.options).options.items() >= dict(row.options).items()


def test_an_ablation_is_compared_with_what_it_changes() -> None:
    assert comparison.REFERENCE["ablation"] in ABLATION and set(comparison.REFERENCE) == set(comparison.ROWS)
    results = [result(label, s, a + 0.1 * s) for label, a in ((BASELINE, 0.3), ("two-point", 0.5), ("central", 0.48))
               for s in range(2)]
    lines = summarize([BASELINE, "two-point", "central"], results, "two-point")
    assert [line["accuracy_gain"] for line in lines] == pytest.approx([-20.0, 0.0, -2.0])
    assert "− two-point's" in comparison.markdown(lines, "two-point").splitlines()[0]
