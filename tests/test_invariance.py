"""The invariance matrix: what its numbers are, and the command that writes it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command, tree

from bnsharp import Estimate, InputError
from bnsharp import params as P
from bnsharp.data import load
from bnsharp.experiments import invariance as study
from bnsharp.experiments.invariance import Cell, Matrix, Row, cell, cheap_options, compare, figure, text, to_csv
from bnsharp.experiments.measuring import options_for
from bnsharp.measures import MEASURES
from bnsharp.models import build

FILES = {f"invariance.{kind}" for kind in ("json", "csv", "png")}
KINDS = ("rescaling", "relu_rescaling", "permutation")
MEASURED = ["--measure", "bn_sharpness", "--measure", "gaussian", "--set", "steps=1", "--set", "draws=8",
            "--transformations", "2"]


def estimate(value: float, stderr: float = 0.0, error: float = 0.0) -> Estimate:
    return Estimate(value=value, stderr=stderr, error=error)


# ---------------------------------------------------------------- numbers


def test_a_cell_by_hand() -> None:
    c = cell(estimate(2.0, 0.3, 0.01), [estimate(3.0, 0.4, 0.02), estimate(1.0), estimate(2.0)])
    assert c == Cell(median=0.5, largest=0.5, ratio=2.0, explained=pytest.approx((4 * 0.5 + 0.03) / 2), changed=False,
                     draws=3)


@pytest.mark.parametrize(("base", "other", "changed"), [
    (estimate(1.0), estimate(1.0 + 1e-9), False),  # rounding
    (estimate(1.0), estimate(1.0 + 1e-5), True),
    (estimate(1.0, error=2e-5), estimate(1.0 + 1e-5), False),
    (estimate(1.0, stderr=0.1), estimate(1.5, stderr=0.1), False),
    (estimate(1.0, stderr=0.1), estimate(1.6, stderr=0.1), True),
    (estimate(0.0), estimate(0.0), False),
    (estimate(0.0), estimate(1.0), True),
    (estimate(-1.0), estimate(-3.0), True),
])
def test_only_what_stated_errors_do_not_explain_is_a_change(base: Estimate, other: Estimate, changed: bool) -> None:
    assert cell(base, [other]).changed == changed
    assert cell(base, [base, other, base]).changed == changed


@pytest.mark.parametrize(("c", "shown"), [
    (None, "–"), (Cell(0, 2e-15, 1, 0, False, 5), "2e-15"), (Cell(0, 0, 1, 0, False, 5), "0"),
    (Cell(0, 22.0, 23.0, 0.1, True, 5), "23×"), (Cell(0, 0.96, 25.0, 0.1, True, 5), "25×"),
    (Cell(0, 0.31, 1.31, 0.1, True, 5), "0.31"), (Cell(0, 0.31, 1.31, 0.9, False, 5), "≈ 0.31"),
    (Cell(0, 2.5, math.inf, 0.1, True, 5), "2.5"), (Cell(0, math.inf, math.inf, 0, True, 5), "∞"),
    (Cell(0, 122.0, 123.4, 0, True, 5), "123×"), (Cell(0, 4.2e4, 4.2e4, 0, True, 5), "4e4×"),
])
def test_a_cell_as_text(c: Cell | None, shown: str) -> None:
    assert text(c) == shown


def test_cheap_settings_are_options_of_the_measures_that_have_them() -> None:
    assert set(study.LARGE) <= set(MEASURES)
    for name, spec in MEASURES.items():
        chosen, known = cheap_options(name), spec.options()
        assert set(chosen) == {k for k in {**study.CHEAP, **study.LARGE.get(name, {})} if k in known}
        assert set(study.LARGE.get(name, {})) <= set(known)


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    data = load("digits", seed=0, train_size=96)
    module = build("bn-mlp", data.input_shape, len(data.classes), seed=0, width=6, depth=2)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return Matrix(module, data, transformations=3, examples=64)


def measured(matrix: Matrix, *names: str, settings: tuple[str, ...] = ()) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    compare(matrix, options_for(names, settings), rows, failed)
    assert not failed
    return rows


def test_known_invariances(matrix: Matrix) -> None:
    """The function stays; rescaling scale groups leaves BN-Sharpness alone, any rescaling adaptive sharpness and the
    Fisher–Rao norm, none λ_max; permuting channels changes none of them."""
    rows = measured(matrix, "bn_sharpness", "adaptive", "hessian_top", "fisher_rao", settings=("tolerance=1e-10",))
    assert list(rows) == [study.OUTPUT, "bn_sharpness", "adaptive", "hessian_top", "fisher_rao"]
    changed = {name: tuple(row.cells[k].changed for k in KINDS) for name, row in rows.items()}  # type: ignore[union-attr]
    assert changed == {
        study.OUTPUT: (False, False, False), "bn_sharpness": (False, True, False), "adaptive": (False, False, False),
        "hessian_top": (True, True, False), "fisher_rao": (False, False, False),
    }
    for row in rows.values():
        for c in row.cells.values():
            assert c is not None and c.draws == 3 and 0 <= c.median <= c.largest
            assert c.changed or c.largest <= max(study.ROUNDING, c.explained)
    assert max(c.largest for c in rows[study.OUTPUT].cells.values() if c) < 1e-12


def test_a_row_is_what_measuring_each_network_gives(matrix: Matrix) -> None:
    """The same seed on both sides, the options that the row names, θ transformed as the transformation says."""
    (_, row) = measured(matrix, "gaussian", settings=("draws=7", "sigma=0.1")).values()
    assert row.options["draws"] == 7 and row.options["sigma"] == 0.1
    measure = MEASURES["gaussian"].build(draws=7, sigma=0.1)
    with study.exact_norms(matrix.module):
        base = measure(matrix.objective, matrix.theta, torch.Generator().manual_seed(0))
        for transformation in matrix.applicable:
            changes = []
            for i in range(3):
                other = transformation.apply(matrix.theta, torch.Generator().manual_seed(i))
                found = measure(matrix.objective, other, torch.Generator().manual_seed(0))
                changes.append(abs(found.value - base.value) / abs(base.value))
            c = row.cells[transformation.name]
            assert c is not None and c.median == pytest.approx(sorted(changes)[1]) and max(changes) == c.largest
    assert row.value == base.value and row.stderr == base.stderr


def test_a_measure_that_fails_is_left_out_and_all_failing_is_an_error(matrix: Matrix) -> None:
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    compare(matrix, options_for(["gaussian", "hessian_trace"], ["sigma=1e200"]), rows, failed)
    assert list(failed) == ["gaussian"] and "finite" in failed["gaussian"] and "hessian_trace" in rows
    with pytest.raises(InputError, match="none of the measures"):
        compare(matrix, options_for(["gaussian"], ["sigma=1e200"]), {}, {})


def test_a_transformation_that_applies_nowhere_has_no_cells() -> None:
    data = load("digits", seed=0, train_size=96)
    shape, classes = data.input_shape, len(data.classes)
    tanh = Matrix(build("bn-mlp", shape, classes, seed=0, width=6, activation="tanh"), data, transformations=1)
    rows = measured(tanh, "gaussian", settings=("draws=2",))
    assert all(row.cells["relu_rescaling"] is None and row.cells["permutation"] is not None for row in rows.values())
    assert "relu_rescaling" not in {line["transformation"] for line in csv.DictReader(to_csv(rows).splitlines())}
    assert figure(rows, "tanh").startswith(b"\x89PNG")
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    with pytest.raises(InputError, match="no transformation"):
        Matrix(linear, data)
    with pytest.raises(InputError, match="does not take"):
        Matrix(torch.nn.Linear(3, classes), data)
    with pytest.raises(InputError, match="labels run"):
        Matrix(build("bn-mlp", shape, 3, seed=0, width=6), data)


def test_the_module_is_left_as_it_was(matrix: Matrix) -> None:
    before = P.parameters(matrix.module), {k: b.clone() for k, b in matrix.module.named_buffers()}
    measured(matrix, "bn_sharpness", settings=("steps=0",))
    assert all(torch.equal(v, before[0][k]) for k, v in P.parameters(matrix.module).items())
    assert all(torch.equal(b, before[1][k]) for k, b in matrix.module.named_buffers())


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests give another --out, or look at what is added."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    done = command("train", "--algorithm", "sgd", "--epochs", "1", "--batch-size", "32", "--set", "train_size=96",
                   "--set", "width=6", "--set", "depth=1", "--set", "threads=1", "--out", path)
    assert done.returncode == 0, done.stderr
    return path


def test_files_and_table(run: Any, finished: Path, tmp_path: Path) -> None:
    before = tree(finished)
    done = run("invariance", finished, *MEASURED, "--out", tmp_path / "a" / "b")
    assert done.code == 0 and done.err == ""
    assert all(word in done.out for word in ("network output", "bn_sharpness", "gaussian", "permutation"))
    assert "96 examples" in done.out
    assert set(tree(tmp_path)) == {f"a/b/{name}" for name in FILES} and tree(finished) == before
    found = json.loads((tmp_path / "a" / "b" / "invariance.json").read_text())
    assert found["settings"]["finished"] and found["settings"]["examples"] == 96 and found["failed"] == {}
    assert found["sites"]["relu_rescaling"] == found["sites"]["permutation"] == 1
    assert list(found["measures"]) == ["bn_sharpness", "gaussian"]
    lines = list(csv.DictReader((tmp_path / "a" / "b" / "invariance.csv").read_text().splitlines()))
    assert len(lines) == 9
    for line in lines:
        name, kind = line["measure"], line["transformation"]
        source = found["output"] if name == study.OUTPUT else found["measures"][name]["transformations"]
        assert float(line["largest"]) == source[kind]["largest"] and line["changed"] == str(source[kind]["changed"])
    assert (tmp_path / "a" / "b" / "invariance.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_object_and_the_same_on_every_run(run: Any, finished: Path, tmp_path: Path) -> None:
    """By default beside the run's own files."""
    before = tree(finished)
    first, second = (run("invariance", finished, *MEASURED, "--json", "--examples", "40") for _ in range(2))
    assert first.code == 0 and first.err == "" and len(first.out.splitlines()) == 1
    a, b = json.loads(first.out), json.loads(second.out)
    for found in (a, b):
        for measure in found["measures"].values():
            assert measure.pop("seconds") > 0
    assert a == b and a["settings"]["examples"] == 40
    assert a["measures"]["bn_sharpness"]["transformations"]["rescaling"]["largest"] < 1e-10
    assert a["measures"]["bn_sharpness"]["transformations"]["relu_rescaling"]["changed"]
    after = tree(finished)
    assert after.keys() - before.keys() == FILES and all(after[k] == v for k, v in before.items())
    assert list(tmp_path.iterdir()) == []
    for name in FILES:
        (finished / name).unlink()


def test_with_its_own_eps_a_network_is_only_nearly_invariant(run: Any, finished: Path, tmp_path: Path) -> None:
    done = run("invariance", finished, *MEASURED, "--own-eps", "--json", "--out", tmp_path)
    found = json.loads(done.out)["output"]
    assert found["rescaling"]["largest"] > 1e-8 and found["permutation"]["largest"] < 1e-12


def test_an_interruption_keeps_finished_rows(
    run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, seen = Matrix.row, []

    def interrupted(self: Matrix, *arguments: Any) -> Row:
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return row(self, *arguments)

    monkeypatch.setattr(Matrix, "row", interrupted)
    done = run("invariance", finished, *MEASURED, "--out", tmp_path)
    assert done.code == 130 and "stopped" in done.err and len(done.err.splitlines()) == 1
    found = json.loads((tmp_path / "invariance.json").read_text())
    assert list(found["measures"]) == ["bn_sharpness"] and not found["settings"]["finished"]
    assert set(tree(tmp_path)) == FILES


@pytest.mark.parametrize(("arguments", "word"), [
    (["--measure", "gausian"], "did you mean 'gaussian'"), (["--set", "detla=1"], "delta"), (["--set", "steps"], "key"),
    (["--set", "draws=0"], "draws"), (["--transformations", "0"], "transformations"), (["--low", "0"], "low"),
    (["--low", "3", "--high", "2"], "high"), (["--high", "inf"], "high"), (["--examples", "0"], "expected"),
    (["--examples", "97"], "96"), (["--seed", "-1"], "seed"), (["--data", "digitz"], "digits"),
    (["--transformations", "many"], "--transformations"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_usage_is_refused_in_one_line_and_nothing_is_written(
    run: Any, finished: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    before = tree(finished)
    done = run("invariance", finished, *arguments)
    assert done.code == 2 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("bnsharp: ") and word in line
    assert tree(finished) == before and list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_and_a_source_that_is_none_are_refused(run: Any, finished: Path) -> None:
    for arguments, word in (([finished, "--out", finished / "config.json"], "config.json"), (["nothing"], "nothing")):
        done = run("invariance", *arguments)
        assert done.code == 2 and word in done.err and len(done.err.splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_told_before_measuring(run: Any, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("invariance", finished, *MEASURED, "--out", tmp_path / "file" / "below")
    assert done.code == 2 and done.out == "" and len(done.err.splitlines()) == 1 and "file" in done.err
