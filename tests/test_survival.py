"""Runs that are killed, stopped, out of disk or damaged go on as if nothing had happened, to the byte."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, bn_mlp, cross_entropy, examples, one_line, read_lines, tree
from killing import RUN, endless
from processes import done, within
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnsharp import Trainer, files, scale_groups
from bnsharp.algorithms import algorithm
from bnsharp.checkpoint import CHECKPOINT, CONFIG, LOCK, METRICS, PREVIOUS, SUMMARY, TIMING, RunFolder, load, save
from bnsharp.errors import DataError, InputError, Interrupted, Notice, RankLostError, StorageError, Terminated
from bnsharp.experiments.study import run_study
from bnsharp.regularizers import Plain
from bnsharp.schedules import cosine
from bnsharp.stopping import StopRequest
from bnsharp.types import Params, Step

N, BATCH, EPOCHS = 24, 6, 3
STEPS = N // BATCH
X, Y = examples(N)


def epoch(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled pass, with noise as an augmentation."""
    for indices in torch.randperm(N, generator=generator).split(BATCH):
        yield X[indices] + 0.01 * torch.randn(BATCH, 5, generator=generator), Y[indices]


def careless(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Order and augmentation from the global random states."""
    for indices in torch.from_numpy(np.random.permutation(N)).split(BATCH):
        yield X[indices] + random.gauss(0, 0.01) + 0.01 * torch.randn(BATCH, 5), Y[indices]


def loader(generator: torch.Generator) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), BATCH, shuffle=True, generator=generator)


class Momentum:
    """A regulariser with state: descends an average of gradients."""

    def init(self, params: Params) -> dict[str, Tensor]:
        return {k: torch.zeros_like(p) for k, p in params.items()}

    def step(self, objectives: Any, params: Params, *, weight: float, state: Any, generator: Any) -> Step:
        step = Plain().step(objectives, params, weight=weight, state={}, generator=generator)
        state = {k: 0.9 * state[k] + g for k, g in step.gradient.items()}
        for k, value in state.items():
            step.gradient[k] = value
        return Step(step.loss, step.penalty, step.gradient, 1, state, step.ratio)


def trainer(path: Path | None = None, resume: bool = False, name: str = "sgd", **settings: Any) -> Trainer:
    """A trainer of a network with BN and Dropout, with a checkpoint after every step."""
    torch.manual_seed(77)  # of no influence
    net = bn_mlp()
    chosen = algorithm(name, scale_groups(net, X[:8]), **settings.pop("options", {}))
    folder = None
    if path is not None:
        folder = RunFolder.resume(path, {"a": "run"}) if resume else RunFolder.create(path, {"a": "run"})
    defaults: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "regularizer": chosen.regularizer,
        "weight": chosen.weight, "other_batches": chosen.other_batches, "epochs": EPOCHS, "seed": 3,
        "schedule": cosine(EPOCHS * STEPS), "checkpoint_steps": 1, "folder": folder, "resume": resume,
    }
    return Trainer(net, cross_entropy, settings.pop("epoch", epoch), **{**defaults, **settings})


class Stop(Exception):
    """What an interruption looks like."""


def stop_after(steps: int) -> Callable[[int, int], None]:
    def on_step(e: int, s: int) -> None:
        if e * STEPS + s + 1 == steps:
            raise Stop

    return on_step


def same(first: Trainer, second: Trainer) -> None:
    """Two finished runs wrote the same metrics and ended in the same state, generators and optimizer included."""
    assert first.folder is not None and second.folder is not None
    assert (first.folder.path / METRICS).read_bytes() == (second.folder.path / METRICS).read_bytes()
    assert len(read_lines(second.folder.path / TIMING)) == EPOCHS
    one, two = first.checkpoint(), second.checkpoint()
    assert_same(plain(one), plain(two))


def plain(value: Any) -> Any:
    """State dictionaries as plain containers, tensors inside lists included."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return {i: plain(v) for i, v in enumerate(value)} if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------- within an epoch

VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)},
    "two streams": {"name": "sgds-1", "options": {"independent_batch": True, "weight_growth": 1.2}},
    "state": {"regularizer": Momentum()},
    "global random states": {"epoch": careless},
    "data loader": {"epoch": loader},
    "sparse checkpoints": {"checkpoint_steps": 3},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("steps", [2, STEPS, STEPS + 3])
def test_a_run_resumes_within_an_epoch(tmp_path, variant, steps):
    """At the second step, at the first epoch's last, in the second; every random stream, sum and state goes on."""
    settings = VARIANTS[variant]
    whole, cut = trainer(tmp_path / "whole", **settings), trainer(tmp_path / "cut", **settings)
    whole.fit()
    cut.on_step = stop_after(steps + 1)  # after that step's own checkpoint, not yet written, there is the one before
    with pytest.raises(Stop):
        cut.fit()
    stored = load(tmp_path / "cut" / CHECKPOINT) if (tmp_path / "cut" / CHECKPOINT).exists() else None
    every = settings.get("checkpoint_steps", 1)
    reached = max(steps // every * every, steps // STEPS * STEPS)
    assert reached == (0 if stored is None else stored["count"]["steps"])
    random.seed(1), np.random.seed(1)
    again = trainer(tmp_path / "cut", resume=True, **settings)
    again.fit()
    same(whole, again)


def test_random_states_of_the_caller_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist()
    made = trainer(epoch=careless)
    state = torch.get_rng_state()
    made.fit()
    assert torch.equal(torch.get_rng_state(), state)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_batches_that_come_out_otherwise_are_told(tmp_path):
    """A stream that is no function of its generator cannot be drawn again."""
    calls = 0

    def forgetful(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal calls
        calls += 1
        torch.rand(calls, generator=generator)
        yield from epoch(generator)

    cut = trainer(tmp_path, epoch=forgetful, on_step=stop_after(3))
    with pytest.raises(Stop):
        cut.fit()
    with pytest.warns(Notice, match="came out otherwise") as caught:
        trainer(tmp_path, resume=True, epoch=forgetful).fit()
    assert len(caught) == 1


def test_settings_of_checkpoints_are_checked():
    for steps in (0, -1, 1.5):
        with pytest.raises(InputError, match="checkpoint_steps"):
            trainer(checkpoint_steps=steps)


# ---------------------------------------------------------------- signals


def send(number: int, steps: int, times: int = 1) -> Callable[[int, int], None]:
    def on_step(e: int, s: int) -> None:
        if e * STEPS + s + 1 == steps:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return on_step


KINDS = {signal.SIGINT: (Interrupted, 130), signal.SIGTERM: (Terminated, 143)}


@pytest.mark.parametrize("steps", [3, STEPS, EPOCHS * STEPS])
@pytest.mark.parametrize("number", sorted(KINDS))
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, number, steps):
    before = [signal.getsignal(n) for n in KINDS]
    whole = trainer(tmp_path / "whole", checkpoint_steps=None)
    whole.fit()
    kind, code = KINDS[number]
    cut = trainer(tmp_path / "cut", checkpoint_steps=None, on_step=send(number, steps))
    with pytest.raises(kind) as caught:
        cut.fit()
    assert caught.value.code == code and [signal.getsignal(n) for n in KINDS] == before
    e, s = divmod(steps - 1, STEPS)
    assert f"epoch {e + 1}, step {s + 1};" in one_line(caught.value) and str(tmp_path / "cut") in str(caught.value)
    assert load(tmp_path / "cut" / CHECKPOINT)["count"]["steps"] == steps
    again = trainer(tmp_path / "cut", resume=True, checkpoint_steps=None)
    again.fit()
    same(whole, again)


def test_a_signal_while_evaluating_lets_the_epoch_end(tmp_path):
    def evaluation(module: nn.Module) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    with pytest.raises(Terminated, match="after epoch 1;"):
        trainer(tmp_path, evaluations={"test": evaluation}, checkpoint_every=100, checkpoint_steps=None).fit()
    assert len(read_lines(tmp_path / METRICS)) == load(tmp_path / CHECKPOINT)["epoch"] == 1


def test_a_second_interrupt_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer(tmp_path, checkpoint_steps=None, on_step=send(signal.SIGINT, 2, times=2)).fit()
    assert not isinstance(caught.value, Interrupted) and not (tmp_path / CHECKPOINT).exists()
    assert not (tmp_path / LOCK).exists()


def test_termination_outweighs_an_interrupt():
    def both(e: int, s: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        trainer(on_step=both).fit()


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer(on_step=send(signal.SIGINT, 2)).fit()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_may_train():
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(trainer().fit().steps))
    thread.start()
    thread.join()
    assert done == [EPOCHS * STEPS]


def test_a_signal_on_one_rank_is_every_rank_s():
    for own, others, kind in ((None, [signal.SIGINT], Interrupted), (signal.SIGINT, [signal.SIGTERM, 0], Terminated),
                              (signal.SIGTERM, [signal.SIGINT], Terminated)):
        stop = StopRequest()
        stop.signal = own
        assert stop.asked(lambda x, others=others: [x, *map(float, others)])
        assert type(stop.error("stopped")) is kind
    assert not StopRequest().asked(lambda x: [x, 0.0])


# ---------------------------------------------------------------- what a run leaves behind


def failing(where: str) -> dict[str, Any]:
    """Settings of a run whose ``where`` raises sooner or later, evaluations after they have switched the modes."""

    def evaluation(module: nn.Module) -> dict[str, float]:
        module.eval()
        return fail() if len(calls) else calls.append(1) or {"a": 1.0}

    def fail(*arguments: Any) -> Any:
        raise Stop

    calls: list[int] = []
    return {
        "evaluation": {"evaluations": {"test": evaluation}}, "tracker": {"trackers": {"t": fail}, "track_every": 2},
        "step": {"on_step": stop_after(STEPS + 1)}, "epoch": {"on_epoch": lambda r: fail() if r["epoch"] > 1 else None},
        "batches": {"epoch": fail}, "nothing": {},
    }[where]


@pytest.mark.parametrize("where", ["evaluation", "tracker", "step", "epoch", "batches", "nothing"])
def test_a_run_puts_back_what_it_changed(tmp_path, where):
    """However it ends: signal handlers, random states, the network's modes, the lock."""
    made = trainer(tmp_path, **failing(where))
    made.module.eval()
    made.module[1].train()
    modes = [m.training for m in made.module.modules()]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    handlers, state, drawn = [signal.getsignal(n) for n in numbers], torch.get_rng_state(), random.getstate()
    with contextlib.suppress(Stop):
        made.fit()
        assert where == "nothing"
    assert [m.training for m in made.module.modules()] == modes and any(modes) and not all(modes)
    assert [signal.getsignal(n) for n in numbers] == handlers
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == drawn
    assert not (tmp_path / LOCK).exists()


def test_a_second_fit_goes_on_from_a_checkpoint_or_not_at_all(tmp_path):
    """Its schedule is spent and its momenta are those of the end: not what a first fit would give."""
    whole, cut = trainer(tmp_path / "whole"), trainer(tmp_path / "cut", resume=True, on_step=stop_after(STEPS + 3))
    whole.fit()
    with pytest.raises(Stop):
        cut.fit()
    cut.on_step = None
    cut.fit()
    same(whole, cut)
    records = (tmp_path / "cut" / METRICS).read_bytes()
    cut.fit()
    same(whole, cut)
    cut.resume = False
    alone = trainer()
    alone.fit()
    for again, word in ((cut, "resume=True"), (alone, "new Trainer")):
        with pytest.raises(InputError, match=word) as caught:
            again.fit()
        one_line(caught.value)
    assert (tmp_path / "cut" / METRICS).read_bytes() == records


# ---------------------------------------------------------------- a full disk


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at(monkeypatch: pytest.MonkeyPatch, operation: str, call: int) -> None:
    """The disk is full at the call of this number."""
    original, calls = getattr(os, operation), 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise FULL
        return original(*arguments, **options)

    monkeypatch.setattr(os, operation, fail)


@pytest.mark.parametrize("call", range(4, 26, 3))
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, operation, call):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    cut = trainer(tmp_path / "cut")
    with monkeypatch.context() as patch:
        full_at(patch, operation, call)
        with pytest.raises(StorageError) as caught:
            cut.fit()
    message = one_line(caught.value)
    assert "No space left" in message and str(tmp_path / "cut") in message and "is kept" in message
    assert not [name for name in tree(tmp_path / "cut") if name.endswith((".tmp", ".lock"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = trainer(tmp_path / "cut", resume=True)
        again.fit()
    same(whole, again)


@pytest.mark.parametrize("name", [METRICS, TIMING])
def test_a_disk_that_fills_within_a_line(tmp_path, monkeypatch, name):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    original = RunFolder.append

    def half(self: RunFolder, to: str, record: dict[str, Any]) -> None:
        if to == name and record["epoch"] == 2:
            with open(self.path / to, "a") as file:
                file.write('{"epoch": 2, "lo')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / to))
        original(self, to, record)

    cut = trainer(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", half)
        with pytest.raises(StorageError, match=f"{name}: No space left"):
            cut.fit()
    again = trainer(tmp_path / "cut", resume=True)
    again.fit()
    same(whole, again)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_error_of_an_open_file_names_it(tmp_path):
    (tmp_path / METRICS).symlink_to("/dev/full")
    with pytest.raises(OSError, match=METRICS) as caught:
        RunFolder(tmp_path).append(METRICS, {"epoch": 1})
    assert caught.value.errno == errno.ENOSPC


# ---------------------------------------------------------------- damage


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray()
    path.write_bytes(bytes(content))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that stopped after seven steps, two checkpoints beside it."""
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", on_step=stop_after(STEPS + 3)).fit()
    assert load(tmp_path / "cut" / CHECKPOINT)["count"]["steps"] == STEPS + 2
    assert load(tmp_path / "cut" / PREVIOUS)["count"]["steps"] == STEPS + 1
    return tmp_path / "cut"


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path, stopped, how):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    damaged(stopped / CHECKPOINT, how)
    with pytest.raises(InputError, match=PREVIOUS) as caught:
        RunFolder(stopped).load()  # for measuring, another network is no substitute
    one_line(caught.value)
    again = trainer(stopped, resume=True)
    with pytest.warns(Notice, match=CHECKPOINT) as notices:
        again.fit()
    assert len(notices) == 1 and PREVIOUS in one_line(notices[0].message)
    same(whole, again)


def test_a_damaged_checkpoint_never_replaces_the_good_one(stopped):
    damaged(stopped / CHECKPOINT, "flipped")
    with pytest.warns(Notice), pytest.raises(Stop):
        trainer(stopped, resume=True, on_step=stop_after(STEPS + 3)).fit()
    assert load(stopped / PREVIOUS)["count"]["steps"] == STEPS + 1
    assert load(stopped / CHECKPOINT)["count"]["steps"] == STEPS + 2


def test_two_damaged_checkpoints_are_refused_in_one_line(stopped):
    for name in (CHECKPOINT, PREVIOUS):
        damaged(stopped / name, "truncated")
    with pytest.raises(InputError, match="both damaged") as caught:
        trainer(stopped, resume=True).fit()
    assert "--overwrite" in one_line(caught.value)


def test_a_single_damaged_checkpoint_is_refused_in_one_line(stopped):
    damaged(stopped / CHECKPOINT, "flipped")
    (stopped / PREVIOUS).unlink()
    with pytest.raises(InputError, match="damaged") as caught:
        trainer(stopped, resume=True).fit()
    one_line(caught.value)


def test_a_kill_between_two_renames_leaves_the_one_before(tmp_path, stopped):
    (stopped / CHECKPOINT).unlink()
    whole, again = trainer(tmp_path / "whole"), trainer(stopped, resume=True)
    assert RunFolder(stopped).load()["count"]["steps"] == STEPS + 1
    whole.fit(), again.fit()
    same(whole, again)


def test_file_systems_without_links_keep_two_checkpoints_too(tmp_path, monkeypatch):
    def no_links(*paths: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    trainer(tmp_path).fit()
    assert [load(tmp_path / n)["count"]["steps"] for n in (PREVIOUS, CHECKPOINT)] == [EPOCHS * STEPS] * 2
    assert [load(tmp_path / n)["step"] for n in (PREVIOUS, CHECKPOINT)] == [STEPS, 0]


def test_what_does_not_belong_together_is_refused_in_one_line(tmp_path, stopped):
    metrics = (stopped / METRICS).read_bytes()
    (stopped / METRICS).unlink()
    with pytest.raises(InputError, match="0 records") as caught:
        trainer(stopped, resume=True).fit()
    one_line(caught.value)
    (stopped / METRICS).write_bytes(metrics)
    stored = load(stopped / CHECKPOINT)
    save(stopped / CHECKPOINT, {k: v for k, v in stored.items() if k != "version"})
    with pytest.raises(InputError, match="version 1") as caught:
        trainer(stopped, resume=True).fit()
    one_line(caught.value)
    save(stopped / CHECKPOINT, stored["module"])
    with pytest.raises(InputError, match="no checkpoint of a run") as caught:
        trainer(stopped, resume=True).fit()
    one_line(caught.value)
    assert (stopped / METRICS).read_bytes() == metrics


def test_what_a_killed_write_left_is_removed_and_nothing_else(stopped):
    for name in (f".{CHECKPOINT}.123.tmp", f".{METRICS}.9.tmp", ".mine.123.tmp", f"{CHECKPOINT}.tmp"):
        (stopped / name).write_bytes(b"half")
    trainer(stopped, resume=True).fit()
    left = set(tree(stopped)) - {CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS}
    assert left == {".mine.123.tmp", f"{CHECKPOINT}.tmp"}


# ---------------------------------------------------------------- one process per folder


def test_a_folder_is_held_by_one_run_and_free_afterwards(tmp_path):
    folder = RunFolder.create(tmp_path, {"a": "run"})
    with folder.locked(), folder.locked():
        for attempt in (lambda: RunFolder.resume(tmp_path, {"a": "run"}), lambda: trainer(tmp_path, resume=True),
                        lambda: RunFolder(tmp_path).check_free(overwrite=True),
                        lambda: RunFolder.create(tmp_path, {}, overwrite=True)):
            with pytest.raises(InputError, match=f"process {os.getpid()}") as caught:
                attempt()
            assert str(tmp_path) in one_line(caught.value)
        assert folder.config() == {"a": "run"}
    assert set(tree(tmp_path)) == {CONFIG}
    trainer(tmp_path, resume=True).fit()


def dead() -> int:
    """The number of a process that no longer runs."""
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no locks"])
def test_a_lock_file_of_a_killed_process_is_no_lock(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(files, "fcntl", None)
    path = tmp_path / LOCK
    path.write_text(f"{dead()}\n")
    assert files.holder(path) is None
    with files.locked(path):
        assert path.read_text() == f"{os.getpid()}\n" and files.holder(path) == f"process {os.getpid()}"
        with pytest.raises(InputError, match=str(os.getpid())), files.locked(path):
            pass
        assert path.exists()
    assert not path.exists() and files.holder(path) is None


def test_file_systems_that_refuse_locks_are_locked_by_the_file(tmp_path, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    path = tmp_path / LOCK
    with files.locked(path), pytest.raises(InputError, match=str(os.getpid())), files.locked(path):
        pass
    assert not path.exists()


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``tests/killing.py`` did."""
    root = tmp_path_factory.mktemp("killed") / "runs"
    program = Path(__file__).parent / "killing.py"
    ended = done([sys.executable, program, root], 400)
    log = root / "log.txt"
    assert ended.returncode == 0, ended.stderr + (log.read_text() if log.exists() else "")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def test_ten_kills_at_random_moments_leave_no_trace(killed):
    """``bnsharp train``, killed and resumed until it ends: the same bytes as the run that nobody killed."""
    assert sum(killed["commands"]["killed"].values()) == 10
    for folder, whole in killed["commands"]["runs"]:
        for name in (CONFIG, METRICS, SUMMARY):
            assert (Path(folder) / name).read_bytes() == (Path(whole) / name).read_bytes()
        assert_same(load(Path(folder) / CHECKPOINT)["module"], load(Path(whole) / CHECKPOINT)["module"])


def test_a_kill_at_any_file_operation_leaves_no_trace(killed):
    """For every algorithm that carries state, too."""
    runs, counts = killed["trainer"]["runs"], killed["trainer"]["killed"]
    assert counts["sgds-1"] == 20 and len(counts) > 1 and len(runs) == sum(counts.values())
    for folder, whole in runs:
        assert (Path(folder) / METRICS).read_bytes() == (Path(whole) / METRICS).read_bytes(), folder
        one, two = (load(Path(f) / CHECKPOINT) for f in (folder, whole))
        assert_same(plain(one), plain(two), folder)


@pytest.mark.parametrize("number", sorted(KINDS))
def test_a_signal_ends_the_command_with_a_line_and_the_run_goes_on(killed, number):
    """And meanwhile a second command is refused the folder."""
    told = killed["stopped"][str(int(number))]
    folder, whole = Path(told["folder"]), Path(killed["commands"]["runs"][0][1])
    assert told["refused"] == 2 and told["refused out"] == "" and len(told["refused err"].splitlines()) == 1
    assert f"process {told['process']}" in told["refused err"]
    assert told["code"] == KINDS[number][1] and told["out"] == "" and told["at"] == [1, 2]
    assert told["err"].splitlines()[-1] == (
        f"bnsharp: stopped after epoch 2, step 2; that state is kept in {folder}: go on with --resume"
    )
    assert set(told["left"]) == {CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS}
    for name in (CONFIG, METRICS, SUMMARY):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert_same(load(folder / CHECKPOINT)["module"], load(whole / CHECKPOINT)["module"])


def under_way(folders: list[Path]) -> None:
    """Two runs that stopped with a checkpoint although none was due, and that nobody holds."""
    begun = [f for f in folders if f.exists()]
    assert len(begun) == 2 and all(files.holder(f / LOCK) is None for f in begun)
    for folder in begun:
        stored = load(folder / CHECKPOINT)
        assert stored["count"]["steps"] > 0 and len(read_lines(folder / METRICS)) == stored["epoch"]


def test_terminating_a_study_leaves_checkpoints_and_no_worker(tmp_path):
    tasks = endless(tmp_path)
    folders, handler = [Path(task.folder) for task in tasks], signal.getsignal(signal.SIGTERM)

    def advance(n: int) -> None:
        if sum((f / METRICS).exists() for f in folders) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with within(150), pytest.raises(SystemExit) as caught:
        run_study(tasks, advance, workers=2)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler
    assert not multiprocessing.active_children()
    under_way(folders)


def test_a_study_that_is_killed_takes_its_workers_along(killed):
    """They would hold its folders, and wait for tasks that nobody gives."""
    under_way([Path(f) for f in killed["study"]])


def test_a_worker_that_is_killed_ends_the_study_in_one_line(tmp_path):
    tasks, killed = endless(tmp_path, 2), []

    def advance(n: int) -> None:
        # several calls can come before the pool sees that a worker is gone: one of the two is killed, once
        if not killed and all((Path(task.folder) / METRICS).exists() for task in tasks):
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    with within(150), pytest.raises(RankLostError, match="one of 2 worker processes died") as caught:
        run_study(tasks, advance, workers=2)
    one_line(caught.value)
    assert not multiprocessing.active_children()
    assert sum((Path(task.folder) / CHECKPOINT).exists() for task in tasks) == 1  # the other one stopped like any


# ---------------------------------------------------------------- the command's own lines


def test_a_damaged_checkpoint_is_one_line_of_the_command(run, tmp_path):
    arguments = ["train", "--algorithm", "sgd", *RUN, "--epochs", "2", "--out", "run"]
    assert run(*arguments).code == 0
    before = tree(tmp_path / "run")
    damaged(tmp_path / "run" / CHECKPOINT, "truncated")
    told = run(*arguments, "--resume")
    (line,) = told.err.splitlines()
    assert told.code == 0 and line.startswith("bnsharp: ") and CHECKPOINT in line and PREVIOUS in line
    assert tree(tmp_path / "run")[METRICS] == before[METRICS]
    damaged(tmp_path / "run" / CHECKPOINT, "truncated")
    damaged(tmp_path / "run" / PREVIOUS, "flipped")
    told = run(*arguments, "--resume")
    assert told.code == 2 and len(told.err.splitlines()) == 1 and "both damaged" in told.err


def test_a_full_disk_is_one_line_of_the_command(run, tmp_path, monkeypatch):
    arguments = ["train", "--algorithm", "sgd", *RUN, "--epochs", "2", "--out", "run"]
    with monkeypatch.context() as patch:
        full_at(patch, "fsync", 9)
        told = run(*arguments)
    (line,) = told.err.splitlines()
    assert told.code == 1 and "No space left" in line and "--resume" in line
    assert run(*arguments, "--resume").code == 0 and len(read_lines(tmp_path / "run" / METRICS)) == 2


# ---------------------------------------------------------------- data workers


class Fatal(TensorDataset):
    """A data set whose worker is killed at one example."""

    def __getitem__(self, index: int) -> Any:
        if index == N - 1 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_data_worker_is_one_line_and_the_checkpoint_is_kept(tmp_path):
    def workers(generator: torch.Generator) -> Any:
        nonlocal calls
        calls += 1
        data = Fatal(X, Y) if calls == 2 else TensorDataset(X, Y)
        return DataLoader(data, BATCH, num_workers=calls - 1)

    calls = 0
    with pytest.raises(DataError) as caught:
        trainer(tmp_path, epoch=workers, checkpoint_steps=None).fit()
    message = one_line(caught.value)
    assert "data worker was lost" in message and "epoch 2" in message and "checkpoint of epoch 1 is kept" in message
    assert load(tmp_path / CHECKPOINT)["epoch"] == 1


def test_other_errors_of_the_data_are_the_users_own():
    def broken(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        yield X[:BATCH], Y[:BATCH]
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trainer(epoch=broken).fit()
    assert math.isfinite(trainer().fit().last["loss"])
