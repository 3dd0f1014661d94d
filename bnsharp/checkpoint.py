"""Run folders: atomic and checked files, no unpickling, one process at a time, refusal to overwrite.

A run folder holds ``config.json`` (everything needed to repeat the run), ``metrics.jsonl`` (one record per epoch,
nothing in it depends on time), ``timing.jsonl``, ``checkpoint.pt`` and the one before it, and ``summary.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bnsharp.errors import InputError, Notice
from bnsharp.files import damage, holder, locked, named, remove_unfinished, sealed, write_atomic

CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS, SUMMARY = (
    "config.json", "metrics.jsonl", "timing.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "summary.json"
)
LOCK = "run.lock"
"""Held while a run is written; not there otherwise, unless a run was killed."""


def save(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Save tensors, numbers, strings and containers of them, atomically, in an archive that knows its sha256.

    With ``keep`` the file that was there gets that name.
    """
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    write_atomic(path, sealed(buffer.getbuffer()), keep)


def load(path: Path) -> dict[str, Any]:
    """Load what :func:`save` wrote; code is never unpickled.

    Raises:
        InputError: a missing or foreign file, one that is not what was written (truncated, bits flipped: checked
            against the checksum in it, if it has one), or one that holds more than tensors and plain values.
    """
    try:
        wrong = damage(path)
        if wrong is not None:
            raise InputError(f"{path} is damaged ({wrong}); expected the file as it was written: use a copy of it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {path}; expected a file written by a training run") from error
    except Exception as error:  # a foreign file can fail in any way inside the reader
        code = isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower()
        reason = "it names code to run, which is never done" if code else f"{type(error).__name__} while reading it"
        raise InputError(
            f"{path} is not a checkpoint of plain tensors ({reason}); expected a file of tensors, numbers and strings "
            "written by torch.save"
        ) from error
    if not isinstance(payload, dict):
        raise InputError(f"{path} holds a {type(payload).__name__}; expected a dictionary of tensors")
    return payload


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with non-finite numbers as null and keys in the order given."""

    def clean(v: Any) -> Any:
        if isinstance(v, float) and (v != v or v in (float("inf"), float("-inf"))):
            return None
        if isinstance(v, dict):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [clean(x) for x in v]
        return v

    return json.dumps(clean(value), indent=indent, allow_nan=False)


class RunFolder:
    """One run's files. Open it with :meth:`create` or :meth:`resume`."""

    def __init__(self, path: Path):
        self.path = path
        self._depth = 0
        self._rotate = True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, against other processes; this object may hold it several times.

        Raises:
            InputError: another process writes a run here.
        """
        if self._depth:
            guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            guard = locked(self.path / LOCK)
        with guard:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def check_free(self, *, overwrite: bool = False) -> None:
        """Raise :class:`InputError` unless a run can be started here: nothing is written."""
        parents = [p for p in (self.path, *self.path.parents) if p.exists()]
        if parents and not parents[0].is_dir():
            raise InputError(f"{parents[0]} is a file; expected a folder for the run: choose another --out")
        if self.exists() and not overwrite:
            raise InputError(
                f"{self.path} already holds a run; expected an empty folder: choose another one, or pass --resume or "
                "--overwrite"
            )
        who = None if self._depth else holder(self.path / LOCK)
        if who is not None:
            raise InputError(
                f"{self.path} is being written by {who}; expected a folder that no other run uses: wait for it, stop "
                "it, or choose another folder"
            )

    def start(self, config: dict[str, Any], *, overwrite: bool = False) -> None:
        """A new run; an existing one is refused, or with ``overwrite`` its files are removed (nothing else is).

        Raises:
            InputError: the path is a file, or holds a run already, or another process writes one.
        """
        self.check_free(overwrite=overwrite)
        with self.locked():
            self.check_free(overwrite=overwrite)
            remove_unfinished(self.path, _FILES)
            if self.exists():
                for name in _FILES:
                    (self.path / name).unlink(missing_ok=True)
            self.write_json(CONFIG, config)

    def go_on(self, config: dict[str, Any], may_differ: tuple[str, ...] = ()) -> None:
        """An existing run with the same configuration, or a new one where there is none.

        Raises:
            InputError: the stored configuration differs in a key that is not in ``may_differ``, or another process
                writes the run.
        """
        if not self.exists():
            return self.start(config)
        stored = self.config()
        for key in sorted({*stored, *config}):
            if key not in may_differ and stored.get(key) != config.get(key):
                raise InputError(
                    f"{self.path} was run with {key}={stored.get(key)!r}, now {config.get(key)!r}; a run resumes "
                    "with its own configuration: change it back, choose another folder, or pass --overwrite"
                )
        with self.locked():
            remove_unfinished(self.path, _FILES)

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any], *, overwrite: bool = False) -> RunFolder:
        """The folder of a new run, see :meth:`start`."""
        folder = cls(Path(path))
        folder.start(config, overwrite=overwrite)
        return folder

    @classmethod
    def resume(cls, path: str | Path, config: dict[str, Any], may_differ: tuple[str, ...] = ()) -> RunFolder:
        """The folder of an existing run, or of a new one where there is none, see :meth:`go_on`."""
        folder = cls(Path(path))
        folder.go_on(config, may_differ)
        return folder

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    def begun(self) -> bool:
        """Whether a run has left records or a checkpoint here."""
        return any((self.path / name).exists() for name in (METRICS, CHECKPOINT, PREVIOUS))

    def config(self) -> dict[str, Any]:
        """The stored configuration."""
        try:
            stored = json.loads((self.path / CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} is not a run folder: {CONFIG} is missing or not JSON") from error
        if not isinstance(stored, dict):
            raise InputError(f"{self.path} is not a run folder: {CONFIG} holds a {type(stored).__name__}")
        return stored

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write one JSON file atomically."""
        write_atomic(self.path / name, (to_json(value, indent=2) + "\n").encode())

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one record to a JSON-lines file; :meth:`save` makes it last through a crash of the machine."""
        path = self.path / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")
        except OSError as error:
            raise named(error, path) from error

    def records(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file; an unfinished last line is left out."""
        path = self.path / name
        if not path.exists():
            return []
        complete = path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in complete]

    def keep(self, name: str, count: int) -> None:
        """Cut a JSON-lines file to its first ``count`` records; a file that holds just those is not touched."""
        path = self.path / name
        if path.exists():
            found = path.read_bytes()
            kept = b"".join(line + b"\n" for line in found.split(b"\n")[:-1][:count])
            if kept != found:
                write_atomic(path, kept)

    def save(self, payload: dict[str, Any]) -> None:
        """The newest checkpoint, once the records that it stands for are on disk; the last one is kept beside it."""
        for path in (self.path / METRICS, self.path / TIMING):
            if path.exists():
                with open(path, "ab") as file:
                    os.fsync(file.fileno())
        save(self.path / CHECKPOINT, payload, self.path / PREVIOUS if self._rotate else None)
        self._rotate = True

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None if there is none yet.

        Raises:
            InputError: it is damaged; the message names the one before it where there is one.
        """
        newest, previous = self.path / CHECKPOINT, self.path / PREVIOUS
        if not newest.exists():  # killed between two renames
            return load(previous) if previous.exists() else None
        try:
            return load(newest)
        except InputError as error:
            if not previous.exists():
                raise
            raise InputError(f"{error}; {previous.name} holds the state before it") from error

    def recover(self) -> dict[str, Any] | None:
        """The newest checkpoint that is intact, or None if there is none yet; a damaged one is a :class:`Notice`.

        Raises:
            InputError: both are damaged.
        """
        newest, previous = self.path / CHECKPOINT, self.path / PREVIOUS
        if not (newest.exists() and previous.exists()):
            return self.load()
        try:
            return load(newest)
        except InputError as first:
            try:
                payload = load(previous)
            except InputError:
                raise InputError(f"{newest} and {previous.name} are both damaged; expected one that is intact: start "
                                 "again with --overwrite") from first
            warnings.warn(Notice(f"{str(first).split(';')[0]}; going on from {previous.name}"), stacklevel=2)
            self._rotate = False  # the damaged one must not take the place of the good one
            return payload

    def reopen(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """What a resumed run goes on from: :meth:`recover`, and the records, cut to those that it stands for.

        Raises:
            InputError: both checkpoints are damaged, or records are missing; nothing is cut then.
        """
        payload = self.recover()
        count = 0 if payload is None else payload.get("epoch")
        if not isinstance(count, int):
            raise InputError(f"{self.path / CHECKPOINT} is no checkpoint of a run; expected one that training wrote: "
                             "measure it, or train again with --overwrite")
        records = self.records(METRICS)[:count]
        if len(records) != count:
            raise InputError(
                f"{self.path / METRICS} holds {len(records)} records; expected the {count} that the checkpoint stands "
                "for: train again with --overwrite"
            )
        for name in (METRICS, TIMING):
            self.keep(name, count)
        return payload, records


_FILES = (CONFIG, METRICS, TIMING, CHECKPOINT, PREVIOUS, SUMMARY)
