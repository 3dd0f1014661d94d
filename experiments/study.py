"""Studies: many runs (settings × algorithms × seeds) on all cores, each in its own folder, each kept when finished."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURES_FILE = "measures.json"


@dataclass(frozen=True)
class Task:
    """One run of a study: its place in the tables, its configuration, its folder, and how it is measured."""

    setting: str
    label: str
    config: dict[str, Any]
    folder: str
    measuring: dict[str, Any]
    steps: int
    """Training steps, for the progress bar."""
    cost: int = 1
    """Gradients per step, for the progress bar and to start the longest runs first."""
    measure: str = "before_and_after"
    """The function of :mod:`bnsharp.experiments.measuring` that measures the trained network."""
    may_diverge: bool = False
    """Whether a run that diverges is a result (every number NaN, ``diverged`` says why) and not an error."""


MEASURE_UNITS = 350
"""How many gradients one part of the measuring counts as in a progress bar."""


def units(task: Task) -> int:
    """Units of work for the progress bar: training steps, and the measuring."""
    from bnsharp.experiments.measuring import PARTS

    return task.steps * task.cost + PARTS[task.measure] * MEASURE_UNITS


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_task(task: Task, tick: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Train and measure one task; a finished one is read back, an unfinished one goes on from its checkpoint.

    ``tick(n)`` is called as n more units are done, :func:`units` in all.
    """
    import torch

    from bnsharp.errors import DivergedError
    from bnsharp.experiments.config import RunConfig
    from bnsharp.experiments.run import train

    torch.set_num_threads(1)
    finished = _finished(task)
    if finished is not None:
        tick(units(task))
        return finished
    count = Ticking(task.cost, tick)
    try:
        trained = train(RunConfig(**task.config), task.folder, resume=True, on_step=count.step)
    except DivergedError as error:
        if not task.may_diverge:
            raise
        tick(units(task) - count.told)
        return _diverged(task, str(error))
    tick(task.cost * task.steps - count.told)
    return _measured(task, *trained, tick)


def sizes(seeds: int, together: int) -> list[int]:
    """Groups of at most ``together`` seeds, as equal as can be: ``sizes(5, 2) == [2, 2, 1]``."""
    count = -(-seeds // together)
    return [seeds // count + (i < seeds % count) for i in range(count)]


def grouped(tasks: Sequence[Task]) -> list[list[int]]:
    """Indices of tasks that are run at once: as many in a row, equal but for the seed, as ``together`` says."""
    groups: list[list[int]] = []
    for i, task in enumerate(tasks):
        last = groups[-1] if groups else []
        if last and len(last) < task.config.get("together", 1) and _apart_in_seed(tasks[last[0]], task):
            last.append(i)
        else:
            groups.append([i])
    return groups


def _apart_in_seed(one: Task, other: Task) -> bool:
    a, b = ({**t.config, "seed": None} for t in (one, other))
    return (a, one.setting, one.label, one.measuring, one.measure) == (
        b, other.setting, other.label, other.measuring, other.measure
    )


def run_group(tasks: Sequence[Task], tick: Callable[[int], None] = lambda n: None) -> list[dict[str, Any]]:
    """:func:`run_task` of each; those that are not finished are trained at once where their configuration says so."""
    left = [task for task in tasks if _finished(task) is None]
    if tasks[0].config.get("together", 1) > 1 and left:
        trained = dict(zip([task.folder for task in left], _train_group(left, tick), strict=True))
        return [
            _measured(task, *trained[task.folder], tick) if task.folder in trained else run_task(task, tick)
            for task in tasks
        ]
    return [run_task(task, tick) for task in tasks]


def _train_group(tasks: Sequence[Task], tick: Callable[[int], None]) -> list[tuple[Any, Any]]:
    """What each was made of, and its result or how it diverged."""
    import torch

    from bnsharp.errors import DivergedError
    from bnsharp.experiments.config import RunConfig
    from bnsharp.experiments.together import train_together

    torch.set_num_threads(1)
    count = Ticking(tasks[0].cost, tick)
    trained = train_together(
        [RunConfig(**task.config) for task in tasks], [task.folder for task in tasks], resume=True, on_step=count.step
    )
    for task, (_, outcome) in zip(tasks, trained, strict=True):
        if isinstance(outcome, DivergedError) and not task.may_diverge:
            raise outcome
    tick(sum(task.cost * task.steps for task in tasks) - count.told)
    return trained


class Ticking:
    """Steps told to a progress bar, a hundred units at a time."""

    def __init__(self, cost: int, tick: Callable[[int], None]):
        self.cost, self.tick, self.told, self.waiting = cost, tick, 0, 0

    def step(self, epoch: int, step: int) -> None:
        """One step of one run."""
        self.waiting += self.cost
        if self.waiting >= 100:
            self.tick(self.waiting)
            self.told, self.waiting = self.told + self.waiting, 0


def _finished(task: Task) -> dict[str, Any] | None:
    """The result of a task that is finished."""
    from bnsharp.checkpoint import METRICS, SUMMARY, TIMING, RunFolder

    folder = RunFolder(Path(task.folder))
    path = folder.path / MEASURES_FILE
    known = json.loads(path.read_text()) if path.exists() and (folder.path / SUMMARY).exists() else {}
    if known.get("task") != {"config": task.config, "measuring": task.measuring}:
        return None
    return _result(task, folder.records(METRICS), folder.records(TIMING), known["values"])


def _measured(task: Task, prepared: Any, outcome: Any, tick: Callable[[int], None]) -> dict[str, Any]:
    """Measure a trained network, and keep the values in its folder."""
    from bnsharp.checkpoint import TIMING, RunFolder
    from bnsharp.errors import DivergedError
    from bnsharp.experiments import measuring

    if isinstance(outcome, DivergedError):
        tick(units(task) - task.steps * task.cost)
        return _diverged(task, str(outcome))
    folder = RunFolder(Path(task.folder))
    values = getattr(measuring, task.measure)(
        prepared.module, prepared.data, prepared.groups, seed=prepared.config.seed, tick=lambda: tick(MEASURE_UNITS),
        **task.measuring,
    )
    folder.write_json(MEASURES_FILE, {"task": {"config": task.config, "measuring": task.measuring}, "values": values})
    return _result(task, outcome.history, folder.records(TIMING), values)


def _result(task: Task, history: list[dict[str, Any]], timing: list[dict[str, Any]],
            values: dict[str, Any]) -> dict[str, Any]:
    last = history[-1]
    return {
        "setting": task.setting, "label": task.label, "seed": task.config["seed"],
        "seconds": sum(t["train_seconds"] for t in timing),
        "test_accuracy": last["test_accuracy"], "gradient_evaluations": last["gradient_evaluations"],
        "curve": [[r["epoch"], r["test_accuracy"]] for r in history], **values,
    }


def _diverged(task: Task, reason: str) -> dict[str, Any]:
    return {
        "setting": task.setting, "label": task.label, "seed": task.config["seed"], "diverged": reason, "curve": [],
        **dict.fromkeys(("seconds", "test_accuracy", "gradient_evaluations"), math.nan),
    }


_ticks: Any = None
"""In a worker: the queue of units done."""


def _start_worker(ticks: Any) -> None:
    from bnsharp.allocator import keep_freed_memory

    global _ticks
    _ticks = ticks
    keep_freed_memory()
    ticks.cancel_join_thread()  # a worker ends although nobody reads any more
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A study that was killed takes its workers along: they would hold its folders, and wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _worker(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    try:
        return run_group(tasks, _ticks.put)
    except (KeyboardInterrupt, SystemExit) as stop:
        # the pool would report it and hand this process the next task
        os._exit(143 if isinstance(stop, SystemExit) else 130)


def run_study(
    tasks: Sequence[Task], advance: Callable[[int], None], workers: int | None = None
) -> list[dict[str, Any]]:
    """All tasks, one thread each, on as many processes as there are cores; results in the order of the tasks.

    Tasks whose configurations say ``together`` are trained at once, so many in a row (:func:`grouped`).
    The numbers do not depend on the number of workers. An interruption (SIGINT, SIGTERM) lets each run under way finish
    its step and write a checkpoint, from which the same call goes on; so does this process's end, however it came.

    Raises:
        RankLostError: a worker died; the others end like interrupted ones.
    """
    groups = grouped(tasks)
    workers = min(workers or cores(), len(groups))
    if workers == 1:
        return [result for group in groups for result in run_group([tasks[i] for i in group], advance)]
    context = multiprocessing.get_context("spawn")
    with _terminable():
        ticks = context.Queue()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(ticks,))
        try:
            longest_first = sorted(range(len(groups)), key=lambda g: -sum(units(tasks[i]) for i in groups[g]))
            started = {g: pool.submit(_worker, [tasks[i] for i in groups[g]]) for g in longest_first}
            futures, seen = [started[g] for g in range(len(groups))], 0
            while True:
                done, _ = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
                seen += _drain(ticks, advance)
                for future in done:
                    future.result()
                if len(done) < len(futures) and _any_ended(pool):
                    # the pool itself does not watch a worker that was started while it looked away (Python 3.11)
                    raise BrokenProcessPool("a worker ended")
                if len(done) == len(futures):
                    advance(max(0, sum(map(units, tasks)) - seen))  # what is still on its way
                    return [result for future in futures for result in future.result()]
        except BaseException as error:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                from bnsharp.errors import RankLostError

                raise RankLostError(
                    f"one of {workers} worker processes died; expected all of them to last: is there enough memory for "
                    "so many? What is finished is kept: the same command goes on"
                ) from error
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            ticks.close()


def _any_ended(pool: ProcessPoolExecutor) -> bool:
    """Whether a worker has ended; none does before the pool is shut down, unless it dies."""
    return any(process.exitcode is not None for process in list((pool._processes or {}).values()))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the study like an interruption does: no worker is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drain(ticks: Any, advance: Callable[[int], None]) -> int:
    """Pass on the units that workers have told since the last time; their number."""
    total = 0
    while True:
        try:
            total += ticks.get_nowait()
        except queue.Empty:
            break
    if total:
        advance(total)
    return total
