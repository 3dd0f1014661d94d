"""What a training run shows: live on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from bnsharp.cli import display
from bnsharp.cli.train import Latest, numbers

NUMBERS = {"epoch": "2/5", "loss": "0.25 [bold]", "bn_sharpness (epoch 2)": "0.01"}


def test_a_terminal_shows_bar_eta_and_numbers(monkeypatch):
    screen, make = io.StringIO(), display.Console
    monkeypatch.setattr(
        display, "Console", lambda **options: make(file=screen, force_terminal=True, width=100, color_system=None)
    )
    with display.dashboard("sgd on [digits]", 4) as shown:
        shown.bar.start(8)
        shown.bar.advance(3)
        shown.show(NUMBERS)
    text = screen.getvalue()
    for word in ("sgd on [digits]", "3/8", "eta", *(f"{k} {v}" for k, v in NUMBERS.items())):
        assert word in text, word


class Clock:
    """Time that a test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_log_has_a_line_every_ten_seconds_at_most(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    with display.dashboard("sgd on digits", 4) as shown:
        shown.bar.start(8)
        for i in range(6):
            clock.now += 4.0
            shown.bar.advance(1)
            shown.show({"epoch": str(i)})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sgd on digits: 3/8 steps, 12 s, eta 20 s epoch 1", "sgd on digits: 6/8 steps, 24 s, eta 8 s epoch 4"
    ]


def test_what_went_wrong_before_the_first_step_stands_alone(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    with display.dashboard("sgd on digits"):
        clock.now += 100.0
    assert capsys.readouterr() == ("", "")


TITLES = ["", "test accuracy, %", "training loss", "BN-Sharpness", "gradients ×"]
ROWS = [["SGD", "95.94 ± 3", "0.12 ± 0.1", "0.11 ± 0.01", "1"], ["5 search steps", "93.08 ± 9", "0.4", "0.1", "7"]]


@pytest.mark.parametrize("width", [130, 80, 60, 40])
def test_a_table_is_readable_at_any_width(width):
    """Every word and every cell in one piece, every row's title beside its cells, no line wider than the screen."""
    screen = io.StringIO()
    display.Console(file=screen, width=width).print(display.fitted(width, "a title", TITLES, ROWS))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for title in TITLES for word in title.split())
    for row in ROWS:
        lines = [line for line in text.splitlines() if line.strip().startswith(row[0])]
        rest = "".join(line.replace(row[0], "", 1) for line in lines)
        assert [c.strip() for c in rest.split("  ") if c.strip()] == row[1:]


def test_a_table_that_fits_is_one(monkeypatch):
    assert isinstance(display.fitted(130, "a title", TITLES, ROWS), display.Table)


def test_a_short_run_is_silent(capsys):
    with display.dashboard("sgd on digits", 4) as shown:
        shown.bar.advance(1)
        shown.show(NUMBERS)
    assert capsys.readouterr() == ("", "") and not sys.stderr.isatty()


RECORD: dict[str, Any] = {
    "epoch": 3, "loss": 0.5, "accuracy": 0.9, "test_accuracy": 0.875, "penalty": float("nan"), "ratio": 0.0, "lr": 0.1,
    "parameter_norm": 3.0,
}


def test_numbers_of_a_record():
    shown = numbers(RECORD)
    assert shown["test accuracy"] == "87.50%" and shown["loss"] == "0.5" and shown["penalty"] == "–"
    assert "test accuracy, averaged weights" not in shown
    assert numbers({**RECORD, "ema_test_accuracy": 1.0})["test accuracy, averaged weights"] == "100.00%"


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_last_tracked_values_stay(order):
    latest = Latest()
    latest.see(RECORD)
    assert latest.shown() == {}
    for epoch in order:
        latest.see({**RECORD, "epoch": epoch, "hessian_top": 10.0 * epoch, "tracking_evaluations": 3})
    latest.see(RECORD)
    assert latest.shown() == {"hessian_top (epoch 2)": "20"}
