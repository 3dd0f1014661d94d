"""Files that survive: replaced whole and durably, checked against their own checksum, folders held by one process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bnsharp.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_MARK, _HEX = b"sha256:", 64
_SEAL = len(_MARK) + _HEX
_END, _END_SIZE = b"PK\x05\x06", 22  # a zip archive's last record, without its comment


def write_atomic(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, never half of it.

    The content and the folder's entry are on disk when this returns. With ``keep`` the old file gets that name, and
    ``path`` exists at every moment where the file system has hard links.

    Raises:
        OSError: the file cannot be written, with its name; the old one is as it was.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep_as(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path) from error
        raise


def named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which errors of an open file (a full disk) lack."""
    return OSError(error.errno, error.strerror, str(path)) if error.errno and error.strerror else error


def _keep_as(path: Path, keep: Path) -> None:
    linked = path.parent / f".{keep.name}.{os.getpid()}.tmp"
    try:
        linked.unlink(missing_ok=True)
        os.link(path, linked)
    except OSError:  # a file system without hard links
        os.replace(path, keep)
        return
    try:
        os.replace(linked, keep)
    finally:
        linked.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a crash of the machine, where the system can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what :func:`write_atomic` left of these files where a process was killed within it."""
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.\d+\.tmp")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- checksums


def sealed(archive: memoryview) -> bytes:
    """A zip archive without comment (what ``torch.save`` writes) with its sha256 as comment: the same archive."""
    head = bytes(archive[:-2]) + struct.pack("<H", _SEAL)
    return head + _MARK + hashlib.sha256(head).hexdigest().encode()


def damage(path: Path) -> str | None:
    """What is wrong with a file by its own checksum; None if nothing is, or if it carries none.

    A zip archive that ends before its end is damaged too.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
        start = max(0, size - _SEAL - _END_SIZE)
        file.seek(start)
        tail = file.read()
        end, comment = tail.rfind(_END), 0
        if 0 <= end <= len(tail) - _END_SIZE:
            (comment,) = struct.unpack_from("<H", tail, end + 20)
            if end + _END_SIZE + comment != len(tail):
                return "it was cut off"
        if tail[-_SEAL:-_HEX] != _MARK:
            return "its checksum is not one" if comment == _SEAL else None
        return None if _digest(file, size - _SEAL).encode() == tail[-_HEX:] else "its checksum differs"


def _digest(file: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (part := file.read(min(length, 1 << 20))):
        digest.update(part)
        length -= len(part)
    return digest.hexdigest()


# ---------------------------------------------------------------- one process per folder

_held: set[int] = set()


def _forget_in_child() -> None:
    # a forked data worker must not hold the folder of a run that was killed
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which has the holder's process number in it and is removed afterwards.

    The lock is the operating system's (``flock``) and vanishes with a killed process. Where there is none, the file's
    existence is the lock, and a process that no longer runs does not count.

    Raises:
        InputError: another process (or another user of the lock in this one) holds it.
    """
    descriptor = _acquire(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        if os.name == "nt":  # an open file cannot be removed there
            os.close(descriptor)
            path.unlink(missing_ok=True)
        else:  # removed before the lock is given up, so that nobody else's is
            path.unlink(missing_ok=True)
            os.close(descriptor)


def holder(path: Path) -> str | None:
    """Who holds the lock file ``path``, as ``process N``; None if nobody does. Nothing is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        taken = _try_lock(descriptor)
        return _name(descriptor) if taken is False or (taken is None and _alive(descriptor)) else None
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor, made = _open(path)
        taken = _try_lock(descriptor)
        if taken is None and not made and not _alive(descriptor):
            os.close(descriptor)
            path.unlink(missing_ok=True)  # its process was killed
            continue
        if not (made if taken is None else taken):
            who = _name(descriptor)
            os.close(descriptor)
            raise InputError(
                f"{path.parent} is being written by {who}; expected a folder that no other run uses: wait for it, stop "
                "it, or choose another folder"
            )
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its last holder removed it in between
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _open(path: Path) -> tuple[int, bool]:
    """The lock file and whether this call made it."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR), False


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was taken; None where the system or the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _number(descriptor: int) -> int | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 32).strip()
    os.lseek(descriptor, 0, os.SEEK_SET)
    return int(text) if text.isdigit() else None


def _name(descriptor: int) -> str:
    number = _number(descriptor)
    return "another process" if number is None else f"process {number}"


def _alive(descriptor: int) -> bool:
    """Whether the process whose number is in a lock file still runs; yes where that cannot be asked."""
    number = _number(descriptor)
    if number is None or os.name != "posix":  # being made at this moment; elsewhere os.kill(number, 0) is no question
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
