"""Several processes give the numbers of one: batch statistics, derivatives, measures, training; and one that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ranks as R
import torch
from helpers import SMALL, assert_same, one_line, read_lines, tree
from processes import done, process
from torch import Tensor

from bnsharp.checkpoint import CHECKPOINT, CONFIG, METRICS, SUMMARY, TIMING, load
from bnsharp.distributed import SINGLE, Ranks, _telling, joined, own_device
from bnsharp.errors import InputError, RankLostError
from bnsharp.experiments.config import make_config
from bnsharp.experiments.run import check_ranks

WORK = (R.exchanges, R.normalised, R.evaluations, R.measured, R.uneven, R.refused, R.trained, R.local, R.masks,
        R.ended, R.bad_usage, R.documented)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks computed, in one launch."""
    return R.together(tmp_path_factory.mktemp("ranks"), *WORK)


def assert_near(a: Any, b: Any, tolerance: float, where: str = "") -> None:
    """Tensors whose largest difference is at most ``tolerance`` times the largest number (at least 1)."""
    if isinstance(b, Tensor):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape, where
        if b.numel():
            difference = float((a - b).abs().max())
            assert difference <= tolerance * max(1.0, float(b.abs().max())), (where, difference)
    elif isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in b:
            assert_near(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(b, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_near(x, y, tolerance, f"{where}[{i}]")
    elif isinstance(b, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True), where
    else:
        assert a == b, where


# ---------------------------------------------------------------- exchanges


def test_exchanges(both):
    first, second = (r["exchanges"] for r in both)
    for x in (first, second):
        torch.testing.assert_close(x["mean"]["single"], torch.full((2,), 1.75))  # (1·1 + 3·2)/4
        torch.testing.assert_close(x["mean"]["double"], torch.full((3,), 17.5, dtype=torch.float64))
        torch.testing.assert_close(x["point"]["a"], torch.tensor([1.75, 2.0]))
        assert x["point"]["n"] == 7
        assert x["gather"] == [0.0, 2.0] and x["any"] == [True, False]
        assert torch.equal(x["unified"][0], torch.tensor([float("inf"), 0.1]))  # equal numbers are left alone
        assert torch.equal(x["unified"][1], torch.tensor([1.0, 2.5]))
        assert x["first"]["rank"] == 0 and torch.equal(x["first"]["t"], torch.ones(2))
        assert x["told"] == "InputError: said by rank 0 alone"
        assert "different parameters here" in x["drift"]
    assert (first["then"], second["then"]) == (0, 1)
    assert torch.equal(first["common"], second["common"]) and not torch.equal(first["own"], second["own"])
    x, y = R.examples(7)
    for i, result in enumerate((first, second)):
        rows = slice(0, 4) if i == 0 else slice(4, 7)
        assert_near(result["part"], ({"x": x[rows], "scale": torch.ones(2)}, y[rows]), 0.0)
        assert_near(result["whole"], ({"x": x, "scale": torch.ones(2)}, y), 0.0)


def test_one_process_exchanges_nothing():
    x, batch = torch.ones(3), R.examples(5)
    assert SINGLE.sum(x) is x and SINGLE.mean(x, 2.0) is x and SINGLE.share(batch) is batch
    assert SINGLE.from_first(lambda: 7) == 7 and SINGLE.any(True) and not SINGLE.any(False)
    generator = torch.Generator().manual_seed(0)
    assert SINGLE.own(generator) is generator
    with joined() as ranks:
        assert ranks == SINGLE


def test_settings_that_cannot_be(monkeypatch):
    for make, word in (
        (lambda: Ranks(2, 2), "from 0 to 1"), (lambda: Ranks(0, 2), "without a process group"),
        (lambda: check_ranks(make_config({"ranks": 2}), SINGLE), "torchrun --nproc-per-node 2"),
        (lambda: check_ranks(make_config({"rank_directions": "local"}), SINGLE), "m-sam"),
    ):
        with pytest.raises(InputError, match=word) as error:
            make()
        one_line(error.value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(InputError, match="whole numbers"):
        own_device("cuda")
    monkeypatch.setenv("RANK", "1")
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="each rank takes its own"):
        own_device("cuda:1")


def test_ranks_with_other_numbers_of_batches_are_told_on_all(both):
    assert both[0]["uneven"] == both[1]["uneven"]
    assert "ranks [1] of 2 have no batch 2" in both[0]["uneven"]["told"]


def test_a_loss_that_is_not_the_mean_of_its_parts_is_refused(both):
    assert both[0]["refused"] == both[1]["refused"]
    assert both[0]["refused"].keys() == {"weighted", "home-made"}
    assert all("expected a criterion that is a mean over examples" in line for line in both[0]["refused"].values())


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("layer", sorted(R.LAYERS))
def test_batch_normalization_is_that_of_the_whole_batch(both, layer):
    one = R.normalised(SINGLE)[layer]
    for result in both:
        assert_near(result["normalised"][layer], one, 1e-12)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_losses_and_derivatives_are_those_of_one_process(both, engine):
    one = R.evaluations(SINGLE)[engine]
    assert_near(both[0]["evaluations"], both[1]["evaluations"], 0.0)  # to the bit
    assert_near(both[0]["evaluations"][engine], one, 1e-12)


def test_measures_and_penalties_are_those_of_one_process(both):
    one = R.measured(SINGLE)
    assert_same(both[0]["measured"], both[1]["measured"])
    for name, value in one.items():
        assert value.isfinite().all() and float(value[0]) > 0, name
        assert_near(both[0]["measured"][name], value, 1e-5 if "float32" in name else 1e-10, name)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return R.trained(SINGLE)


@pytest.mark.parametrize("name", [name for name in R.ALGORITHMS if name != "chunks"])
def test_ten_steps_on_two_ranks_are_those_of_one_process(both, alone, name):
    one = alone[name]
    untrained = R.deep(torch.float32).state_dict()
    assert all(not torch.equal(one["state"][k], untrained[k]) for k in ("0.weight", "4.weight", "4.running_mean"))
    for result in both:
        assert_near(result["trained"][name], one, 1e-5)


@pytest.mark.parametrize("name", R.ALGORITHMS)
def test_parameters_are_the_same_bits_on_all_ranks(both, name):
    assert_same(both[0]["trained"][name]["state"], both[1]["trained"][name]["state"])


def test_local_directions_are_m_sam(both):
    by_hand = R.m_sam_by_hand(2)
    assert_near(both[0]["local"]["sam"]["state"], by_hand, 1e-12)
    synchronised = R.local(SINGLE)["sam"]["state"]
    assert float((synchronised["0.weight"] - by_hand["0.weight"]).abs().max()) > 1e-3  # another algorithm


@pytest.mark.parametrize("name", ["sam", "noise", "state"])
def test_local_directions_do_not_let_ranks_drift_apart(both, name):
    first, second = (result["local"][name] for result in both)
    assert_same(first["state"], second["state"])
    assert_same(first["regularizer"], second["regularizer"])
    assert_near(first["record"], second["record"], 0.0)
    assert bool(first["regularizer"]) == (name == "state")


def test_random_layers_draw_other_masks_on_every_rank(both):
    first, second = (result["masks"] for result in both)
    for drawn in (first["drawn"], second["drawn"]):
        assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(first["drawn"][0], second["drawn"][0])
    assert torch.equal(first["common"], second["common"])  # the global state goes on as before
    assert_same(first["state"], second["state"])


def test_the_page_s_program_runs_on_two_ranks_as_in_one_process(both, capsys):
    R.documented(SINGLE)
    alone = [float(word.rstrip(",")) for word in capsys.readouterr().out.split() if word[0].isdigit()]
    assert len(alone) == 2 and both[1]["documented"]["printed"] == ""
    assert_near(both[0]["documented"]["numbers"], alone, 1e-3)


@pytest.mark.parametrize(("name", "kind"), [("interrupt", "Interrupted"), ("termination", "Terminated")])
def test_a_signal_on_one_rank_stops_all_alike(both, name, kind):
    assert both[0]["ended"][name] == both[1]["ended"][name] == [kind, "stopped after epoch 1, step 3"]


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_at_the_same_step(both):
    first, second = (result["ended"]["not finite"] for result in both)
    assert first == second and first[0] == "DivergedError" and "epoch 1, step " in first[1]


def test_a_loss_that_is_no_mean_is_noticed_in_a_later_epoch_too(both):
    first, second = (result["ended"]["parts"] for result in both)
    assert first[0] == "InputError" and "expected a criterion that is a mean over examples" in first[1]
    assert second[0] == "RankLostError" and second[1].startswith("rank 1: ")


def test_a_data_worker_lost_within_an_exchange_is_not_a_lost_rank():
    """The loader tells by a signal, wherever the process is at that moment."""
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught, _telling():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert not isinstance(caught.value, RankLostError)
    with pytest.raises(RankLostError, match="Connection closed"), _telling():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")


# ---------------------------------------------------------------- the command


def start(folder: Path, rank: int, port: int, *arguments: Any) -> AbstractContextManager[subprocess.Popen[str]]:
    """One of two processes of ``bnsharp train``, as ``torchrun`` starts them."""
    environment = {**os.environ, **R.environment(rank, 2, port), "OMP_NUM_THREADS": "1"}
    return process(
        [sys.executable, "-m", "bnsharp.cli", "train", *map(str, arguments), "--out", folder], env=environment
    )


def test_torchrun(tmp_path, run):
    arguments = ["train", "--algorithm", "sgds-2", *SMALL, "--set", "batch_size=31"]
    told = done(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bnsharp.cli",
         *arguments, "--out", tmp_path / "two"],
        200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("run folder:") == told.stdout.count("test accuracy") == 1
    assert run(*arguments, "--out", tmp_path / "one").code == 0
    one, two = (read_lines(tmp_path / name / METRICS) for name in ("one", "two"))
    assert_near(two, one, 1e-5)
    stored = json.loads((tmp_path / "two" / CONFIG).read_text())
    assert stored["ranks"] == 2 and stored["rank_directions"] == "synchronised"
    files = set(tree(tmp_path / "two"))
    assert {CONFIG, METRICS, TIMING, CHECKPOINT, SUMMARY} <= files and not [f for f in files if f.startswith(".")]
    states = [load(tmp_path / name / CHECKPOINT)["module"] for name in ("one", "two")]
    assert_near(states[1], states[0], 1e-5)


BAD = {
    "small batch": "batch_size=3 for 2 ranks; expected at least 4: batch statistics need two examples on each rank",
    "unknown": "unknown setting 'nonsense'", "late": "batch_size=97; expected at most 96",
    "command": "several processes were started; expected one",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_of_one_rank(both, name):
    told, silent = (result["bad_usage"][name] for result in both)
    assert told["code"] == silent["code"] == 2 and not (told["made"] or silent["made"])
    lines = [line for line in told["err"].splitlines() if "0/100 steps" not in line]  # progress, on a slow machine
    assert len(lines) == 1 and lines[0].startswith(f"bnsharp: {BAD[name]}")
    assert not (told["out"] or silent["out"] or silent["err"])


def test_a_rank_that_is_killed_ends_the_job_and_the_run_resumes(tmp_path, run):
    port, arguments = R.free_port(), ["--algorithm", "sgds-1", *SMALL[2:], "--epochs", 60]
    metrics, deadline = tmp_path / "run" / METRICS, time.monotonic() + 150
    survivor, victim = (start(tmp_path / "run", rank, port, *arguments) for rank in (0, 1))
    with survivor as survivor, victim as victim:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            assert time.monotonic() < deadline and survivor.poll() is None and victim.poll() is None
            time.sleep(0.01)
        victim.kill()
        _, told = survivor.communicate(timeout=100)
    assert survivor.returncode == 1
    lines = [line for line in told.splitlines() if line.startswith("bnsharp: ")]
    assert len(lines) == 1 and "a rank has died" in lines[0], told
    assert "; the checkpoint of epoch" in lines[0] and lines[0].endswith("is kept: go on with --resume"), told
    before = len(metrics.read_text().splitlines())
    assert before < 60
    again = run("train", *arguments, "--out", tmp_path / "run", "--resume")  # with one process
    assert again.code == 0, again.err
    assert [r["epoch"] for r in read_lines(metrics)] == list(range(1, 61))
