"""The benchmark harness: its arithmetic, table, JSON and command line. No timing is asserted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import document, growth, paired, sampling
from benchmarks.allocations import highest, peak_bytes
from benchmarks.paired import EXCESS, PEAK, Case, Missing, Outcome, Quantity, interval_of_median, measure, needing
from benchmarks.tables import COLUMNS, HEAD, rows, table

CPU = torch.device("cpu")
CALLS = Quantity("time", lambda run, device: float(run()), paired.seconds)
"""What a call returns in the place of its time."""


def scripted(*values: float):
    """A call that returns these values one after the other; the first is the warm-up's."""
    left = iter(values)
    return lambda: next(left)


def two(**options) -> Case:
    return Case(
        "two", lambda: {"ours": scripted(9, 2, 4, 3), "theirs": scripted(9, 4, 4, 4), "third": scripted(9, 1, 1, 1)},
        rounds=3, memory=False, quantity=CALLS, **options,
    )


def test_ratios_are_taken_within_rounds():
    outcome = measure(two())
    assert outcome.times == {"ours": [2, 4, 3], "theirs": [4, 4, 4], "third": [1, 1, 1]}
    assert outcome.compared("theirs") == [0.5, 1.0, 0.75]
    assert outcome.ratio("theirs") == (0.75, 0.5, 1.0)
    assert outcome.reference == "theirs" and measure(two(best=True)).reference == "third"


def test_divisors_and_differences():
    outcome = measure(two(divide={"ours": 2.0}, comparison=EXCESS))
    assert outcome.compared("theirs") == [-3.0, -2.0, -2.5]


def test_every_alternative_runs_in_every_round_in_a_changing_order():
    seen: list[str] = []
    runs = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    measure(Case("order", lambda: runs, rounds=20, memory=False))
    orders = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(orders) == 21 and all(set(order) == set("abc") for order in orders)
    assert len(set(orders[1:])) > 2


@pytest.mark.parametrize("n", [1, 5, 6, 9, 15, 41])
def test_interval_of_the_median_has_its_coverage(n):
    """Ranks from the binomial law, and no narrower interval of the kind would do."""
    low, high = interval_of_median(list(range(n)))
    rank = int(low)
    assert high == n - 1 - rank

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    assert coverage(rank) >= 0.95 or rank == 0
    assert coverage(rank + 1) < 0.95


def test_a_missing_package_is_a_row():
    assert needing("no_such_package_anywhere", lambda: pytest.fail("made")) == Missing("no_such_package_anywhere")
    case = Case("c", lambda: {"ours": lambda: None, "theirs": Missing("theirs_package")}, rounds=1, memory=False)
    (line,) = rows(command.outcome_of(case, CPU, None))
    assert "theirs: theirs_package not installed" in line

    def setup():
        import no_such_package_anywhere  # noqa: F401

    (line,) = rows(command.outcome_of(Case("d", setup), CPU, None))
    assert "no_such_package_anywhere not installed" in line


def test_a_failure_is_a_row():
    def fail():
        raise ValueError("too | far\nmore")

    (line,) = rows(command.outcome_of(Case("c", lambda: {"ours": fail}), CPU, None))
    assert "failed: ValueError: too \\| far" in line


def test_peak_memory():
    assert highest([(3, -4), (1, 4), (2, 4), (4, 2)]) == 8
    assert highest([]) == 0

    def run() -> None:
        first = torch.empty(1000)
        second = first * 2
        del first
        second.add_(1)
        torch.empty(500)

    assert 8000 <= peak_bytes(run, CPU) < 9000


def test_rows_have_the_columns_of_the_head():
    for options in ({}, {"limit": 0.8, "best": True}, {"limit": 0.5, "comparison": EXCESS}):
        for line in rows(measure(two(**options)).record() | {"machine": {}}):
            assert line.replace("\\|", "").count("|") == COLUMNS + 1 == HEAD[0].count("|")
    first, *_ = rows(measure(two(limit=0.8)).record())
    assert "0.750×" in first and "0.800×: reached" in first
    assert table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The command with small cases of its own."""
    x = torch.ones(1000)
    cases = [
        Case("sums", lambda device: {"sum": x.sum, "plus": lambda: x + 1}, 100.0, 2),
        Case("memory of products", lambda: {"one": lambda: x * 2}, rounds=1, memory=False, quantity=PEAK),
    ]
    monkeypatch.setattr(command, "find_cases", lambda: (cases, []))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return cases


def test_the_command_writes_table_and_json(tiny, tmp_path: Path, capsys):
    assert command.main([f"--out={tmp_path}", "--device=cpu", "--rounds=3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "table.md").read_text().splitlines() == printed
    first, second = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert [len(v) for v in first["values"].values()] == [3, 3]
    assert set(first["ratios"]["plus"]) == {"median", "low", "high", "interval"}
    assert first["peak_bytes"]["plus"] >= 4000
    assert second["medians"]["one"] >= 4000
    known = first["machine"]
    assert known["processor"] and known["cores"] and known["device"] == "cpu"
    assert known["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert command.main([f"--out={tmp_path}", "--device=cpu", "--rounds=1", "products"]) == 0
    kept = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert [r["case"] for r in kept] == ["sums", "memory of products"]


def test_an_interruption_keeps_the_rows_so_far(tiny, tmp_path: Path, capsys):
    def stop() -> None:
        raise KeyboardInterrupt

    tiny.append(Case("stopped", lambda: {"ours": stop}))
    assert command.main([f"--out={tmp_path}", "--device=cpu"]) == command.INTERRUPTED
    assert len(json.loads((tmp_path / "results.json").read_text())["cases"]) == 2
    assert "stopped; 2 cases are in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--rounds=0"], ["--threads=x"], ["--device=tpu"], ["--nonsense"], ["no such word"]], ids=str
)
def test_what_cannot_be_used_is_one_line(arguments, tiny, capsys):
    try:
        code = command.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_module_of_cases_is_found():
    cases, lacking = command.find_cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert lacking or any("--help" in name for name in names)


def test_shares_sum_to_one_and_frames_have_kinds():
    found = sampling.shares(lambda: sum(range(20_000)), 0.05)
    assert sum(found.values()) == pytest.approx(1)
    layer, own = "/x/torch/nn/modules/linear.py", "/x/bnsharp/"
    for frames, kind in (
        ([(layer, "forward"), (own + "loop.py", "backward")], sampling.FORWARD),
        ([("/x/torch/autograd/__init__.py", "grad"), (own + "loop.py", "f")], sampling.BACKWARD),
        ([("/x/torch/_tensor.py", "f"), (own + "balls.py", "f"), (layer, "f")], sampling.ARITHMETIC),
        ([("/x/torch/optim/sgd.py", "step")], sampling.OPTIMIZER),
        ([(own + "checks.py", "f")], sampling.OTHER),
        ([], sampling.OTHER),
    ):
        assert sampling.kind_of(frames) == kind


@pytest.mark.skipif(sys.platform == "win32", reason="no interval timer")
def test_time_is_found_where_it_is_spent():
    layer, x = torch.nn.Linear(300, 300), torch.ones(300, 300)
    found = sampling.shares(lambda: layer(x), 0.1)
    assert max(found, key=found.__getitem__) == sampling.FORWARD


def test_exponents_of_powers():
    sizes = [2, 4, 8, 16]
    assert growth.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.exponent([1, 2], [1.0, 0.5]) == pytest.approx(-1)


def test_the_page_is_filled_from_results(tmp_path: Path):
    case = Outcome(two(), {"ours": [1.0], "theirs": [2.0]}).record()
    known = {"processor": "P", "cores": 2, "threads": 1, "accelerator": None, "device": "cpu", "python": "3",
             "versions": {"torch": "2"}}
    (tmp_path / "results.json").write_text(json.dumps({"cases": [case | {"machine": known}]}))
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    first, done = document.filled(page, tmp_path)
    assert done == ["machine", "comparisons"]
    assert "| two | 1 s | theirs: 2 s | 0.500× |" in first and "- P: 2 cores" in first
    assert document.filled(first, tmp_path)[0] == first
    with pytest.raises(ValueError, match="growth"):
        document.filled(page.replace("<!-- growth -->", ""), tmp_path)


def test_the_figure_is_drawn(tmp_path: Path):
    found = [growth.series(axis, what, [1, 2], [1.0, 2.0]) for axis in (*growth.AXES, "ranks") for what in growth.WHAT]
    growth.draw(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
