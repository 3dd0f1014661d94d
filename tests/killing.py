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
from bnsharp.checkpoint import CHECKPOINT, SUMMARY, RunFolder
from bnsharp.experiments.run import versions

RUN = ["--batch-size", "16", "--epochs", "10", "--set", "train_size=96", "--set", "width=4", "--set", "depth=1",
       "--set", "threads=1", "--set", "checkpoint_steps=1"]
"""60 steps, each with a checkpoint."""

N, BATCH = 48, 16
X, Y = examples(N)


def forked(work: Callable[[], Any], log: Path) -> int:
    """Start ``work`` in a process of its own."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(log, "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
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
    return {"commands": commands, "trainer": {"killed": killed, "runs": [r for x in results for r in x["runs"]]}}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    print(json.dumps(main(target)))
