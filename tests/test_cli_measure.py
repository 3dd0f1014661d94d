"""``bnsharp measure``: streaming, targets, promotion, what is recorded, interruption."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import tree
from test_cli import refused, results

from bnsharp.experiments.measuring import Setting, measure_all, options_for
from bnsharp.experiments.objectives import Batches
from bnsharp.experiments.run import read_run
from bnsharp.measures import MEASURES

CHEAP = {"steps": 1, "restarts": 0, "draws": 4, "iterations": 5, "certify": 1, "halvings": 6, "pilot": 1, "rise": 0.5}


def test_every_measure_is_taken_and_says_on_what(run: Any, finished: Path) -> None:
    before = tree(finished)
    options = {o for spec in MEASURES.values() for o in spec.options()}
    settings = [a for k, v in CHEAP.items() if k in options for a in ("--set", f"{k}={v}")]
    names = [a for name in MEASURES for a in ("--measure", name)]
    found = results(run("measure", finished, *names, *settings, "--json"))
    assert list(found) == list(MEASURES)
    for name, r in found.items():
        assert (r["precision"], r["engine"], r["examples"], r["batches"], r["confidence"]) == (
            "float64", "loop", 96, 1, 0.95,
        ), name
        low, high = r["interval"]
        assert low <= r["value"] <= high and r["half_width"] >= r["error"]
        assert r["stderr_data"] is None and not r["promoted"] and not r["interrupted"]
        assert r["upper"] is None or r["upper"] >= r["value"]
    assert found["gaussian"]["draws"] == 4 and found["gaussian"]["stderr"] > 0
    assert found["largest_sigma"]["converged"] in (True, False)
    assert tree(finished) == before


def test_streamed_batches(run: Any, finished: Path) -> None:
    common = ["--measure", "gaussian", "--measure", "hessian_trace", "--set", "draws=4", "--json"]
    whole = results(run("measure", finished, *common, "--statistics", "running"))
    cut = results(run("measure", finished, *common, "--statistics", "running", "--batch-size", "40"))
    for name in whole:
        assert cut[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-9)  # running statistics: one function
        assert (cut[name]["batches"], cut[name]["batch_size"], cut[name]["examples"]) == (3, 40, 96)
        assert cut[name]["stderr_data"] > 0
    batch = results(run("measure", finished, *common, "--batch-size", "40"))
    assert batch["gaussian"]["value"] != pytest.approx(
        results(run("measure", finished, *common))["gaussian"]["value"], rel=1e-6
    )  # batch statistics of 40 are another function than those of 96


def test_a_single_last_example_joins_the_batch_before(finished: Path) -> None:
    _, net, data = read_run(finished)
    assert [len(y) for _, y in Batches(data, 96, 95)] == [96]
    assert [len(y) for _, y in Batches(data, 91, 30)] == [30, 30, 31]
    assert len(Batches(data, 96, 40)) == 3
    record = measure_all(net, data, options_for(["gaussian"], ["draws=2"]), Setting(examples=91, batch_size=30))
    assert record["gaussian"]["examples"] == 91


def test_a_target_error_is_met(run: Any, finished: Path) -> None:
    common = ["measure", finished, "--measure", "gaussian", "--set", "draws=10", "--set", "sigma=0.1", "--json"]
    plain, aimed = results(run(*common))["gaussian"], results(run(*common, "--target-error", "0.2"))["gaussian"]
    assert plain["draws"] == 10 and plain["converged"] is None
    assert aimed["converged"] and aimed["draws"] > 10 and aimed["half_width"] <= 0.2 * aimed["value"]
    done = run("measure", finished, "--measure", "gaussian", "--set", "draws=2", "--target-error", "1e-6")
    assert done.code == 0 and "not converged" in done.out
    refused(run("measure", finished, "--target-error", "-1"), "target")


def test_float32_is_promoted_where_it_must(run: Any, finished: Path) -> None:
    common = ["measure", finished, "--measure", "gaussian", "--set", "draws=4", "--set", "sigma=1e-5", "--json"]
    double = results(run(*common))["gaussian"]
    single = results(run(*common, "--precision", "float32"))["gaussian"]
    assert single["promoted"] and single["precision"] == "float64" and single["value"] == double["value"]
    kept = results(run(*common, "--precision", "float32", "--no-promote"))["gaussian"]
    assert not kept["promoted"] and kept["precision"] == "float32"
    assert abs(kept["value"] - double["value"]) <= kept["error"]
    done = run("measure", finished, "--measure", "gaussian", "--set", "sigma=1e-5", "--precision", "float32")
    assert "promoted to float64" in done.out


def test_engines_agree(run: Any, finished: Path) -> None:
    common = ["measure", finished, "--measure", "gaussian", "--set", "draws=20", "--json"]
    one, two = (results(run(*common, "--engine", e))["gaussian"] for e in ("loop", "vmap"))
    assert two["value"] == pytest.approx(one["value"], rel=1e-10) and two["engine"] == "vmap(16)"
    refused(run("measure", finished, "--engine", "warp"), "loop")


def test_only_calls_at_several_points_have_an_engine(
    run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace is made of Hessian products alone; three draws are too few for a choice and left to the loop."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    common = ["measure", finished, "--measure", "gaussian", "--measure", "hessian_trace", "--set", "draws=3"]
    done = run(*common, "--engine", "auto", "--verbose")
    assert done.code == 0
    assert [line for line in done.err.splitlines() if ": " in line][-2:] == [
        "gaussian: loop (chosen)", "hessian_trace: –"
    ]


def test_a_trace_is_deflated(run: Any, finished: Path) -> None:
    common = ["measure", finished, "--measure", "gaussian", "--measure", "hessian_trace", "--set", "draws=4", "--json"]
    plain, found = results(run(*common)), results(run(*common, "--deflate", "10"))
    assert found["hessian_trace"]["evaluations"]["products"] == plain["hessian_trace"]["evaluations"]["products"] + 10
    assert found["hessian_trace"]["stderr"] < plain["hessian_trace"]["stderr"]
    assert {name: record["deflate"] for name, record in found.items()} == {"gaussian": 0, "hessian_trace": 10}
    assert found["gaussian"]["value"] == plain["gaussian"]["value"]
    refused(run("measure", finished, "--measure", "gaussian", "--deflate", "10"), "hessian_trace or relative_trace")
    refused(run("measure", finished, "--deflate", "-1"), "deflate")


@pytest.mark.parametrize("arguments", [["--batch-size", "1"], ["--batch-size", "0"], ["--model-set", "width"],
                                       ["--model-set", "width=3"], ["--seed", "9" * 30]])
def test_bad_settings_are_refused(run: Any, finished: Path, arguments: list[str]) -> None:
    refused(run("measure", finished, *arguments), "expected")


def test_interruption_keeps_what_was_done(finished: Path) -> None:
    """Ctrl-C in the middle of the second measure: the first, and the second from the draws so far; exit code 130."""
    before = tree(finished)
    process = subprocess.Popen(
        [sys.executable, "-m", "bnsharp.cli", "measure", str(finished), "--measure", "fisher_rao", "--measure",
         "gaussian", "--measure", "hessian_top", "--set", "draws=1000000", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:  # its progress says when the draws are under way
        if "gaussian" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "2 of 3 measures" in err and "Traceback" not in err
    found = json.loads(out)
    assert list(found) == ["fisher_rao", "gaussian"]
    assert found["gaussian"]["interrupted"] and 32 <= found["gaussian"]["draws"] < 1_000_000
    assert math.isfinite(found["gaussian"]["value"]) and not found["fisher_rao"]["interrupted"]
    assert tree(finished) == before
