"""Runs in processes of their own that are killed with SIGKILL and resumed until they end; a program, not a test.

PyTorch is imported once and every run is a fork, so that a kill costs half a second. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  imported before the forks, not in each
import torch
from helpers import bn_mlp, cross_entropy, examples

import bnsharp.cli
import bnsharp.cli.display
from bnsharp import Trainer, backward, scale_groups
from bnsharp.algorithms import FAMILIES, algorithm
from bnsharp.checkpoint import CHECKPOINT, LOCK, METRICS, SUMMARY, RunFolder, load
from bnsharp.experiments.run import versions
from bnsharp.experiments.study import Task, run_study
from bnsharp.files import holder

RUN = ["--batch-size", "16", "--epochs", "10", "--set", "train_size=96", "--set", "width=4", "--set", "depth=1",
       "--set", "threads=1", "--set", "checkpoint_steps=1"]
"""60 steps, each with a checkpoint."""

N, BATCH = 48, 16
X, Y = examples(N)


def forked(work: Callable[[], Any], log: Path, errors: Path | None = None) -> int:
    """Start ``work`` in a process of its own; what it prints goes to ``log``."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(log, "a") as output, open(errors or log, "a") as other:
            os.dup2(output.fileno(), 1)
            os.dup2(other.fileno(), 2)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> bool:
    """Whether a run came to its end (else it was killed); anything else stops this program."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"a run ended with status {status}")
    return True


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Look again and again, but not for ever."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"waited {seconds} s for {what}")
        time.sleep(0.005)


# ---------------------------------------------------------------- the command


def command(name: str, folder: Path, *more: str) -> Callable[[], None]:
    def work() -> None:
        sys.argv = ["bnsharp", "train", "--algorithm", name, *RUN, "--out", str(folder), *more]
        bnsharp.cli.main()

    return work


def kill_soon(process: int, folder: Path, rng: random.Random) -> bool:
    """Kill a run after a few more checkpoints and a moment; whether it was still running."""
    path, seen, left = folder / CHECKPOINT, None, rng.randrange(4)
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = path.stat().st_mtime_ns if path.exists() else None
        left -= now != seen
        if left < 0:
            time.sleep(rng.uniform(0.0, 0.015))
            os.kill(process, signal.SIGKILL)
            break
        seen = now
        time.sleep(0.0005)
    return not ended(process)


def kill_commands(root: Path, names: list[str], kills: int, rng: random.Random) -> dict[str, Any]:
    """``bnsharp train`` killed ``kills`` times for each name, and resumed to its end."""
    result: dict[str, Any] = {"killed": {}, "runs": []}
    for name in names:
        assert ended(forked(command(name, root / f"command-{name}-whole"), root / "log.txt"))
        killed, round_ = 0, 0
        while killed < kills:  # again from the start where a run was quicker than its killer
            folder = root / f"command-{name}-{round_}"
            running = True
            while running:
                process = forked(command(name, folder, "--resume"), root / "log.txt")
                running = killed < kills and kill_soon(process, folder, rng)
                killed += running
            if not (folder / SUMMARY).exists():
                assert ended(process)
            result["runs"].append([str(folder), str(root / f"command-{name}-whole")])
            round_ += 1
        result["killed"][name] = killed
    return result


def stop_command(root: Path, name: str, number: int) -> dict[str, Any]:
    """``bnsharp train`` sent a signal at its seventh step, while a second one tries its folder; then resumed."""
    folder, here, go = root / f"signal-{number}", root / f"here-{number}", root / f"go-{number}"
    logs = {key: root / f"{key}-{number}.txt" for key in ("out", "err", "refused out", "refused err")}

    def work() -> None:
        save = RunFolder.save

        def paused(self: RunFolder, payload: dict[str, Any]) -> None:
            save(self, payload)
            if payload["count"]["steps"] == 7:
                here.touch()
                wait_for(go.exists, "the signal")

        signal.signal(signal.SIGINT, signal.default_int_handler)
        RunFolder.save = paused  # type: ignore[method-assign]
        command(name, folder)()

    process = forked(work, logs["out"], logs["err"])
    wait_for(here.exists, "the seventh step")
    second = forked(command(name, folder, "--resume"), logs["refused out"], logs["refused err"])
    refused = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    os.kill(process, number)
    go.touch()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    left = sorted(path.name for path in folder.iterdir())
    stored = load(folder / CHECKPOINT)
    assert ended(forked(command(name, folder, "--resume"), root / "log.txt"))
    return {
        "process": process, "code": code, "refused": refused, "left": left, "folder": str(folder),
        "at": [stored["epoch"], stored["step"]], **{key: log.read_text() for key, log in logs.items()},
    }


# ---------------------------------------------------------------- a study


def endless(root: Path, runs: int = 4) -> list[Task]:
    """Runs that go on until they are stopped."""
    config = {"data": "digits", "data_options": {"train_size": 96}, "model": "bn-mlp", "model_options": {"width": 4},
              "algorithm": "sgd", "epochs": 100000, "checkpoint_every": 100000, "threads": 1}
    return [Task("a", str(i), {**config, "seed": i}, str(root / f"run{i}"), {}, 1) for i in range(runs)]


def kill_study(root: Path) -> list[str]:
    """A study on two workers whose own process is killed; the folders that its workers have let go of."""
    tasks = endless(root / "study")
    process = forked(lambda: run_study(tasks, lambda n: None, workers=2), root / "log.txt")
    folders = [Path(task.folder) for task in tasks]
    wait_for(lambda: sum((f / METRICS).exists() for f in folders) == 2, "two runs under way")
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    wait_for(lambda: all(holder(f / LOCK) is None for f in folders), "workers to end")
    return [str(f) for f in folders if f.exists()]


# ---------------------------------------------------------------- the trainer


def train(name: str, folder: Path) -> None:
    def epoch(generator: torch.Generator) -> Any:
        for rows in torch.randperm(N, generator=generator).split(BATCH):
            yield X[rows] + 0.01 * torch.randn(BATCH, 5, generator=generator), Y[rows]

    net = bn_mlp()
    chosen = algorithm(name, scale_groups(net, X[:BATCH]))
    Trainer(
        net, cross_entropy, epoch, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        regularizer=chosen.regularizer, weight=chosen.weight, other_batches=chosen.other_batches, epochs=2,
        folder=RunFolder.resume(folder, {"algorithm": name}), resume=True, checkpoint_steps=1,
    ).fit()


OPERATIONS = ("replace", "fsync", "link", "open", "write", "unlink")


def killed_at(operation: int | None, work: Callable[[], None], count: Path | None = None) -> Callable[[], None]:
    """``work``, which kills itself before its file operation of this number; ``count`` gets their number."""

    def run() -> None:
        done = 0

        def before(name: str) -> Callable[..., Any]:
            original = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal done
                if done == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return original(*arguments, **options)

            return call

        for name in OPERATIONS:
            setattr(os, name, before(name))
        work()
        if count is not None:
            count.write_text(str(done))

    return run


def kill_operations(root: Path, name: str, choose: Callable[[int], list[int]]) -> dict[str, Any]:
    """A training run killed at its file operations (those that ``choose`` picks of all), and resumed."""
    whole, log = root / f"{name}-whole", root / "log.txt"
    assert ended(forked(killed_at(None, lambda: train(name, whole), root / "count"), log))
    operations = choose(int((root / "count").read_text()))
    runs = []
    for operation in operations:
        folder = root / f"{name}-{operation}"
        assert not ended(forked(killed_at(operation, lambda to=folder: train(name, to)), log))
        assert ended(forked(lambda to=folder: train(name, to), log))
        runs.append([str(folder), str(whole)])
    return {"killed": {name: len(operations)}, "runs": runs}


def stateful() -> list[str]:
    """Every algorithm whose regulariser carries state from one step to the next."""
    net, found = bn_mlp(), []
    groups = scale_groups(net, X[:BATCH])
    for key in FAMILIES:
        chosen = algorithm(key.replace("-N", "-1").replace("MEASURE", "bn_sharpness"), groups)
        others = [(X[:BATCH], Y[:BATCH])] * chosen.other_batches
        step = backward(
            net, cross_entropy, (X[:BATCH], Y[:BATCH]), chosen.regularizer(0), chosen.weight(0), other_batches=others
        )
        if step.state:
            found.append(chosen.name)
    return found


def main(root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    versions()  # imports what it names
    rng = random.Random(2)
    root.mkdir()
    commands = kill_commands(root, ["sgds-1"], 10, rng)
    # every operation around the end of the first epoch: checkpoints within and after it, metrics
    results = [kill_operations(root, "sgds-1", lambda n: list(range(n // 2 - 12, n // 2 + 8)))]
    results += [kill_operations(root, name, lambda n: [rng.randrange(n // 2, n)]) for name in stateful()]
    killed = {k: v for r in results for k, v in r["killed"].items()}
    stopped = {number: stop_command(root, "sgds-1", number) for number in (signal.SIGINT, signal.SIGTERM)}
    study = kill_study(root)
    return {
        "commands": commands, "stopped": stopped, "study": study,
        "trainer": {"killed": killed, "runs": [r for x in results for r in x["runs"]]},
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    print(json.dumps(main(target)))
