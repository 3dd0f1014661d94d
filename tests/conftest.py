"""One thread, Hypothesis examples that are the same on every run, and commands run in this process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, Done, command
from hypothesis import Phase, settings
from PIL import Image

from bnsharp.cli import main

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell: tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=15,
    # networks do not shrink to anything simpler than what was drawn, and it takes minutes
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("default")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["bnsharp", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by a process of its own; tests read it only."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    done = command("train", "--algorithm", "sgds-1", *SMALL, "--out", path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "finished" in done.stdout
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: two classes, four training and two test images each, 32 × 32 pixels, RGB."""
    root, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for split, n in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
