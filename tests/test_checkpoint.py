"""Files are replaced whole or not at all, checkpoints run no code, run folders are never overwritten by accident."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fast, one_line, tree
from hypothesis import given
from hypothesis import strategies as st

from bnsharp import checkpoint
from bnsharp.checkpoint import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    PREVIOUS,
    SUMMARY,
    TIMING,
    RunFolder,
    load,
    save,
    to_json,
    write_atomic,
)
from bnsharp.errors import InputError

PAYLOAD = {"epoch": 3, "module": {"w": torch.arange(6.0).reshape(2, 3)}, "name": "x", "nested": [1, 2.5, None]}


# ---------------------------------------------------------------- atomic files


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fault):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, fault, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    with pytest.raises(OSError, match="disk full"):
        save(path, PAYLOAD)
    assert tree(tmp_path) == {"file": b"old"}


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "file"
    for content in (b"a longer content", b"short", b""):
        write_atomic(path, content)
        assert tree(tmp_path) == {"file": content}


def test_files_have_the_permissions_that_open_gives(tmp_path):
    """Others in the group read a run's configuration as they read its metrics."""
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---------------------------------------------------------------- checkpoints


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "c.pt", PAYLOAD)
    again = load(tmp_path / "c.pt")
    assert torch.equal(again["module"]["w"], PAYLOAD["module"]["w"])
    assert {k: v for k, v in again.items() if k != "module"} == {k: v for k, v in PAYLOAD.items() if k != "module"}


class Attack:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "c.pt", tmp_path / "trace"
    payload = {"module": Attack(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(path) in one_line(caught.value)
    assert not trace.exists()


def test_a_missing_file_a_folder_and_a_bare_tensor_are_refused_in_one_line(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "tensor.pt"):
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(path) in one_line(caught.value)


def test_a_truncated_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "c.pt"
    save(path, PAYLOAD)
    whole = path.read_bytes()
    for length in [0, 1, 10, *range(50, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(path) in one_line(caught.value), length


@pytest.mark.parametrize("start", range(8))
def test_a_file_with_one_bit_flipped_is_refused_in_one_line(tmp_path, start):
    """Every eighth byte from ``start`` on: every byte of the file in all."""
    path = tmp_path / "c.pt"
    save(path, PAYLOAD)
    whole = path.read_bytes()
    for place in range(start, len(whole), 8):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place // 8 % 8)
        path.write_bytes(bytes(flipped))
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(path) in one_line(caught.value), place


def test_a_checkpoint_is_an_ordinary_archive_and_ordinary_archives_are_read(tmp_path):
    path = tmp_path / "c.pt"
    save(path, PAYLOAD)
    for read in (torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        assert torch.equal(read["module"]["w"], PAYLOAD["module"]["w"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    for new in (True, False):  # written elsewhere: without a checksum
        torch.save(PAYLOAD, path, _use_new_zipfile_serialization=new)
        assert load(path)["epoch"] == 3


PICKLES = [b"\x80\x02", b"\x80\x04K\x01", b"(", b"h\x00.", b"a.", b"c__main__\nX\n.", b"\x80\x02}q\x00."]


@given(st.one_of(st.binary(max_size=60), st.tuples(st.sampled_from(PICKLES), st.binary(max_size=20)).map(b"".join)))
@fast
def test_foreign_bytes_are_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("foreign") / "c.pt"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    one_line(caught.value)


# ---------------------------------------------------------------- run folders


def test_a_new_run_makes_its_folder_with_the_configuration(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b", {"lr": 0.1})
    assert folder.exists() and folder.config() == {"lr": 0.1}
    assert list(tree(tmp_path)) == ["a/b/config.json"]


def fill(folder: RunFolder) -> None:
    for name in (METRICS, TIMING):
        folder.append(name, {"epoch": 1})
    folder.save(PAYLOAD)
    folder.write_json(SUMMARY, {"epochs": 1})


def test_an_existing_run_is_refused_and_left_alone(tmp_path):
    fill(RunFolder.create(tmp_path, {"lr": 0.1}))
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        RunFolder.create(tmp_path, {"lr": 0.2})
    assert "--overwrite" in one_line(caught.value) and "--resume" in str(caught.value)
    assert tree(tmp_path) == before


def test_overwrite_removes_the_runs_files_and_nothing_else(tmp_path):
    fill(RunFolder.create(tmp_path, {"lr": 0.1}))
    mine = {"notes.txt": b"mine", "plots/figure.png": b"png", "checkpoint-best.pt": b"weights", "config.yaml": b"a: 1"}
    for name, content in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder = RunFolder.create(tmp_path, {"lr": 0.2}, overwrite=True)
    after = tree(tmp_path)
    assert folder.config() == {"lr": 0.2} and after.pop(CONFIG) and after == mine


def test_a_folder_of_other_things_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    assert not folder.exists() and folder.load() is None and folder.records(METRICS) == []
    with pytest.raises(InputError) as caught:
        folder.config()
    assert "not a run folder" in one_line(caught.value)
    RunFolder.create(tmp_path, {"lr": 0.1})
    assert set(tree(tmp_path)) == {"notes.txt", CONFIG}


def test_a_damaged_configuration_is_refused_in_one_line(tmp_path):
    (tmp_path / CONFIG).write_text('{"lr": 0.')
    with pytest.raises(InputError) as caught:
        RunFolder(tmp_path).config()
    one_line(caught.value)


def test_a_path_that_is_a_file_or_lies_below_one_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError) as caught:
            RunFolder.create(path, {"lr": 0.1})
        assert "file" in one_line(caught.value)
    assert tree(tmp_path) == {"file": b"mine"}


def test_resume_wants_the_same_configuration(tmp_path):
    config = {"lr": 0.1, "seed": 0, "versions": {"torch": "1"}}
    assert RunFolder.resume(tmp_path, config).config() == config  # where there is none, a new one
    fill(RunFolder(tmp_path))
    before = tree(tmp_path)
    RunFolder.resume(tmp_path, {**config, "versions": {"torch": "2"}}, may_differ=("versions",))
    for other in ({**config, "lr": 0.2}, {**config, "extra": 1}, {"lr": 0.1, "versions": {"torch": "1"}}):
        with pytest.raises(InputError) as caught:
            RunFolder.resume(tmp_path, other)
        key = next(k for k in ("lr", "extra", "seed") if config.get(k) != other.get(k))
        assert key in one_line(caught.value)
    assert tree(tmp_path) == before


def test_an_unfinished_last_line_is_left_out(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    records = [{"epoch": i, "loss": 0.5 * i} for i in range(3)]
    for record in records:
        folder.append(METRICS, record)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"epoch": 3, "lo')
    assert folder.records(METRICS) == records
    folder.keep(METRICS, 2)
    assert folder.records(METRICS) == records[:2]
    assert (tmp_path / METRICS).read_text() == "".join(to_json(r) + "\n" for r in records[:2])
    folder.append(METRICS, records[2])
    assert folder.records(METRICS) == records
    folder.keep(TIMING, 0)
    assert not (tmp_path / TIMING).exists()


@pytest.mark.parametrize("text", ["", '{"epoch": 1}', "{"])
def test_a_file_without_a_finished_line_holds_no_records(tmp_path, text):
    (tmp_path / METRICS).write_text(text)
    assert RunFolder(tmp_path).records(METRICS) == []


def test_the_last_two_checkpoints_are_kept(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    assert folder.load() is None and folder.recover() is None
    for epoch in range(1, 4):
        folder.save({"epoch": epoch})
        assert folder.load() == folder.recover() == {"epoch": epoch}
    assert set(tree(tmp_path)) == {CONFIG, CHECKPOINT, PREVIOUS} and load(tmp_path / PREVIOUS) == {"epoch": 2}


@pytest.mark.parametrize("operation", ["fsync", "replace", "link"])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_failed_save_leaves_a_checkpoint_at_every_point(tmp_path, monkeypatch, operation, call):
    folder = RunFolder.create(tmp_path, {})
    for epoch in (1, 2):
        folder.save({"epoch": epoch})
    original, calls = getattr(os, operation), 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, operation, fail)
    failed: list[OSError] = []
    try:
        folder.save({"epoch": 3})
    except OSError as error:
        failed.append(error)
    assert all(error.filename == str(tmp_path / CHECKPOINT) for error in failed)
    # after a failure the old one, or the new one: the folder's own sync comes after the rename
    assert folder.load() in ([{"epoch": 2}, {"epoch": 3}] if failed else [{"epoch": 3}])
    assert load(tmp_path / PREVIOUS)["epoch"] in (1, 2) and set(tree(tmp_path)) == {CONFIG, CHECKPOINT, PREVIOUS}


def test_a_failed_append_of_a_checkpoint_keeps_the_last_one(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, {})
    folder.save(PAYLOAD)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.save({"epoch": 4})
    assert folder.load()["epoch"] == 3 and set(tree(tmp_path)) == {CONFIG, CHECKPOINT}


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
))
@fast
def test_json_is_one_standard_line_with_null_for_what_is_not_finite(value):
    def clean(v: Any) -> Any:
        if isinstance(v, float) and (v != v or abs(v) == float("inf")):
            return None
        if isinstance(v, list):
            return [clean(x) for x in v]
        return {k: clean(x) for k, x in v.items()} if isinstance(v, dict) else v

    text = to_json(value)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert "\n" not in text and json.loads(text, parse_constant=refuse) == clean(value)
