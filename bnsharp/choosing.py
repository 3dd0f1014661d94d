"""Which engine is fastest for a kind of call: timed once on the first points of the call at hand, and kept."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bnsharp.engines import LOOP, Engine, first_line
from bnsharp.errors import InputError
from bnsharp.files import write_atomic

CHUNKS = (4, 16, 64)
"""Points at once that a choice tries."""
FEWEST = 4
"""Calls with fewer points are left to the loop: there is nothing to gain."""
MARGIN = 1.04
"""Another engine is chosen when the loop takes this many times as long: within noise the loop stays."""
SLACK = 0.25
"""Seconds that trying one engine may take, or half of what the call takes, whichever is longer; compiling is extra."""
ROUNDS = 5
"""Engines that are not far behind are timed so often, one after the other in every round: the median counts."""
TRIES = 3
"""Quick engines are timed so often more before those far behind are left out; there the least counts."""
CLOSE = 2.0
"""Not far behind: at most so many times the least."""
SHARE = 0.5
"""Part of the free memory that the points of a chunk may take."""


# ---------------------------------------------------------------- memory


class WorkingSet(TorchDispatchMode):
    """Bytes of what operations read and write while it is on.

    Attributes:
        total: of all results.
        largest: arguments and results of one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = _bytes(result)
        self.total += own
        self.largest = max(self.largest, own + _bytes(args))
        return result


def _bytes(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in tree_flatten(values)[0] if isinstance(v, Tensor))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [n for n in (_available(), _left_to_group()) if n is not None]
    return min(known) if known else None


def _available() -> int | None:
    """``MemAvailable`` in bytes; without it the pages that are free."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024 * int(found[1])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _left_to_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves."""
    try:
        limit, used = ((folder / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


# ---------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Choice:
    """An engine that was chosen, and why.

    Attributes:
        call: what was evaluated, in words.
        engine: the choice.
        seconds: seconds per point of every engine that was tried, by its name.
        left_out: engines that were not, and why.
    """

    call: str
    engine: Engine
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


_chosen: dict[str, Choice] = {}
_taken: set[str] = set()


def choices(taken: bool = False) -> list[Choice]:
    """All choices of this process so far, those read from a file included; or those that a call has ``taken``."""
    return [choice for key, choice in _chosen.items() if not taken or key in _taken]


def forget() -> None:
    """Forget all choices: the next calls are timed anew."""
    _chosen.clear()
    _taken.clear()


def bucket(n: int) -> int:
    """The largest power of two up to n, at most the largest chunk: calls of one bucket share a choice."""
    return min(1 << (n.bit_length() - 1), CHUNKS[-1])


def candidates(n: int, compile: bool) -> list[Engine]:
    """Engines for calls of n points, the loop first and larger chunks later."""
    chunks = [c for c in CHUNKS if c <= n]
    return [Engine(name, chunk, flag) for flag in ((False, True) if compile else (False,))
            for name, chunk in (("loop", 16), *(("vmap", c) for c in chunks))]


def choose(key: str, call: str, n: int, compile: bool, run: Callable[[Engine, int], Any], device: torch.device,
           gradients: bool) -> Engine:
    """The fastest engine for calls like this one; timed at the first of them.

    Args:
        key: what calls have in common that share a choice.
        call: the same in words.
        n: points of this call, at least ``FEWEST``.
        compile: whether compiled engines are tried.
        run: ``(engine, m)``: evaluate the first m points and drop the result.
        device: where that happens.
        gradients: whether gradients are taken: all results of a pass are then held.
    """
    if key not in _chosen:
        _chosen[key] = _Trial(n, compile, run, device, gradients).choice(call)
    _taken.add(key)
    return _chosen[key].engine


class _Trial:
    """Engines timed on the first points of a call."""

    def __init__(self, n: int, compile: bool, run: Callable[[Engine, int], Any], device: torch.device,
                 gradients: bool):
        self.n, self.compile, self.run, self.device, self.gradients = n, compile, run, device, gradients
        self.seconds: dict[Engine, float] = {}
        self.left_out: dict[str, str] = {}

    def choice(self, call: str) -> Choice:
        most = self._most_at_once()
        for engine in candidates(self.n, self.compile):
            reason = self._reason(engine, most)
            if reason is None:
                reason = self._time(engine)
            if reason is not None:
                self.left_out[str(engine)] = reason
        self._again()
        best = min(self.seconds, key=self.seconds.__getitem__)
        if self.seconds[LOOP] <= MARGIN * self.seconds[best]:
            best = LOOP
        return Choice(call, best, {str(e): s for e, s in self.seconds.items()}, self.left_out)

    def _most_at_once(self) -> int | None:
        """Points whose activations fit into the free memory; the loop's first point, which measures them, warms up."""
        with WorkingSet() as seen:
            self.run(LOOP, 1)
        free = free_memory(self.device)
        one = seen.total if self.gradients else 3 * seen.largest
        return None if free is None else int(SHARE * free / max(1, one))

    def _reason(self, engine: Engine, most: int | None) -> str | None:
        """Why an engine is not tried; None where it is."""
        if most is not None and engine.size > max(1, most):
            return "not enough memory"
        if engine.name != "vmap":
            return None
        same = {e: s for e, s in self.seconds.items() if e.compile == engine.compile}
        if not same:
            return "smaller ones failed"
        least = min(same.values())
        if engine.size * least > max(SLACK, 0.5 * self.n * least):
            return "too long to try"
        largest = max(same, key=lambda e: e.size)
        return "smaller chunks were slower" if least > 1e-3 and same[largest] > 1.5 * least else None

    def _time(self, engine: Engine) -> str | None:
        """Take seconds per point, or say why there are none."""
        try:
            spent = self._once(engine)
            if engine.compile or spent < SLACK / 2:  # the first time also warmed up
                spent = self._once(engine)
            if spent < SLACK / TRIES:  # a moment in which the machine was busy must not rule an engine out
                spent = min(spent, *(self._once(engine) for _ in range(TRIES)))
        except InputError as error:
            if not engine.compile:
                raise
            return str(error)
        except RuntimeError as error:
            if engine == LOOP or not (engine.name == "vmap" or is_out_of_memory(error)):
                raise
            return "not enough memory" if is_out_of_memory(error) else first_line(error)
        self.seconds[engine] = spent / engine.size
        return None

    def _again(self) -> None:
        """The same for those close to the best, on equally many points: medians of rounds.

        Whatever slows the machine slows a round, and all in it; a short run would find a quiet moment more easily.
        """
        least = min(self.seconds.values())
        close = [e for e, s in self.seconds.items() if s <= CLOSE * least]
        most, started = max(e.size for e in close), time.perf_counter()
        spent: dict[Engine, list[float]] = {e: [] for e in close}
        for _ in range(ROUNDS if len(close) > 1 else 0):
            for engine in close:
                runs = max(1, most // engine.size)
                spent[engine].append(sum(self._once(engine) for _ in range(runs)) / (runs * engine.size))
            if time.perf_counter() - started > 2 * SLACK:
                break
        self.seconds |= {e: statistics.median(values) for e, values in spent.items() if values}

    def _once(self, engine: Engine) -> float:
        self._wait()
        started = time.perf_counter()
        self.run(engine, engine.size)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------- choices that are kept


def machine(device: torch.device) -> str:
    """What a choice is valid for besides the call: processor, PyTorch, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def kept() -> Path:
    """The file in which ``bnsharp measure --engine auto`` keeps its choices, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnsharp" / "engines.json"


def load(path: Path) -> None:
    """Take over the choices of earlier processes; a file that is missing or unreadable holds none."""
    try:
        for key, row in json.loads(path.read_text()).items():
            engine, seconds = Engine.parse(row["engine"]), {str(k): float(s) for k, s in row["seconds"].items()}
            if engine.name != "auto":
                _chosen.setdefault(str(key), Choice(str(row["call"]), engine, seconds, dict(row["left_out"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError):
        return


def save(path: Path) -> None:
    """Keep this process's choices; of a call that another process chose for meanwhile, the other's stay.

    Raises:
        OSError: the file cannot be written.
    """
    own = dict(_chosen)
    _chosen.clear()
    load(path)
    merged = {**own, **_chosen}
    _chosen.clear()
    _chosen.update(merged)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({k: _row(c) for k, c in merged.items()}, indent=1).encode())


def _row(choice: Choice) -> dict[str, Any]:
    return {"call": choice.call, "engine": str(choice.engine), "seconds": choice.seconds, "left_out": choice.left_out}
