"""Run folders: atomic files, checkpoints without unpickling, refusal to overwrite.

A run folder holds ``config.json`` (everything needed to repeat the run), ``metrics.jsonl`` (one record per epoch,
nothing in it depends on time), ``timing.jsonl``, ``checkpoint.pt`` and ``summary.json``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from bnsharp.errors import InputError

CONFIG, METRICS, TIMING, CHECKPOINT, SUMMARY = (
    "config.json", "metrics.jsonl", "timing.jsonl", "checkpoint.pt", "summary.json"
)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, never half of it."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, payload: dict[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them, atomically."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Load what :func:`save` wrote; code is never unpickled.

    Raises:
        InputError: a missing, truncated or foreign file, or one that holds more than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            payload = torch.load(path, map_location="cpu", weights_only=True)
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

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any], *, overwrite: bool = False) -> RunFolder:
        """A new run; an existing one is refused, or with ``overwrite`` its files are removed (nothing else is).

        Raises:
            InputError: the path is a file, or holds a run already.
        """
        folder = cls(Path(path))
        folder.check_free(overwrite=overwrite)
        if folder.exists():
            for name in (CONFIG, METRICS, TIMING, CHECKPOINT, SUMMARY):
                (folder.path / name).unlink(missing_ok=True)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_json(CONFIG, config)
        return folder

    @classmethod
    def resume(cls, path: str | Path, config: dict[str, Any], may_differ: tuple[str, ...] = ()) -> RunFolder:
        """An existing run with the same configuration, or a new one where there is none.

        Raises:
            InputError: the stored configuration differs in a key that is not in ``may_differ``.
        """
        folder = cls(Path(path))
        if not folder.exists():
            return cls.create(path, config)
        stored = folder.config()
        for key in sorted({*stored, *config}):
            if key not in may_differ and stored.get(key) != config.get(key):
                raise InputError(
                    f"{folder.path} was run with {key}={stored.get(key)!r}, now {config.get(key)!r}; a run resumes "
                    "with its own configuration: change it back, or pass --overwrite"
                )
        return folder

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

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
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def records(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file; an unfinished last line is left out."""
        path = self.path / name
        if not path.exists():
            return []
        complete = path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in complete]

    def keep(self, name: str, count: int) -> None:
        """Cut a JSON-lines file to its first ``count`` records."""
        path = self.path / name
        if path.exists():
            lines = path.read_text().split("\n")[:-1][:count]
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())

    def save(self, payload: dict[str, Any]) -> None:
        """Replace the checkpoint, once the records that it stands for are on disk."""
        for path in (self.path / METRICS, self.path / TIMING):
            if path.exists():
                with open(path, "ab") as file:
                    os.fsync(file.fileno())
        save(self.path / CHECKPOINT, payload)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, or None if there is none yet."""
        return load(self.path / CHECKPOINT) if (self.path / CHECKPOINT).exists() else None
