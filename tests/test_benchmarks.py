"""The benchmark harness: its arithmetic, table, JSON and command line. No timing is asserted."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import curvature, document, growth, paired, sampling
from benchmarks.allocations import highest, peak_bytes
from benchmarks.hessians import with_references
from benchmarks.paired import EXCESS, PEAK, Case, Missing, Outcome, Quantity, interval_of_median, measure, needing
from benchmarks.progress import Progress, clock
from benchmarks.tables import COLUMNS, HEAD, rows, table
from bnsharp import params as P

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


def test_rounds_fill_the_seconds():
    """Five rounds that took 2 s: 20 in 8 s, but no more than the case has and never fewer than five."""
    assert paired.rounds_within(8.0, 2.0, 5, 31) == 20
    assert paired.rounds_within(8.0, 2.0, 5, 11) == 11
    assert paired.rounds_within(8.0, 50.0, 5, 31) == paired.rounds_within(0.0, 2.0, 5, 31) == 5
    assert paired.rounds_within(8.0, 0.0, 5, 31) == paired.rounds_within(math.inf, 2.0, 5, 31) == 31


@pytest.mark.parametrize(
    ("options", "most", "expected"),
    [({"seconds": 8.0}, 31, 16), ({"seconds": 8.0}, 7, 7), ({"seconds": 0.1}, 31, 5), ({"seconds": 0.1}, 1, 1),
     ({}, 31, 31), ({"rounds": 40, "seconds": 0.1}, 31, 40), ({"rounds": 2, "seconds": 8.0}, 31, 2)],
    ids=str,
)
def test_rounds_of_a_case(options, most, expected, monkeypatch: pytest.MonkeyPatch):
    """A clock on which a round takes half a second, after a warm-up that is not counted."""
    now, calls = 0.0, 0

    def run() -> None:
        nonlocal now, calls
        calls += 1
        now += 0.25 if calls > 2 else 100.0

    monkeypatch.setattr(paired, "time", SimpleNamespace(perf_counter=lambda: now))
    outcome = measure(Case("c", lambda: {"ours": run, "theirs": run}, rounds=most, memory=False), **options)
    assert [len(times) for times in outcome.times.values()] == [expected, expected]
    assert calls == 2 * (expected + 1)


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


def names_in(folder: Path) -> list[str]:
    """Cases in the JSON and, the same, in the table."""
    records = json.loads((folder / "results.json").read_text())["cases"]
    lines = [line for record in records for line in rows(record)]
    assert (folder / "table.md").read_text().splitlines() == [*HEAD, *lines]
    return [record["case"] for record in records]


def test_rows_are_replaced_one_by_one(tiny, tmp_path: Path, capsys):
    """Some rows again: those alone. All again: the others stay until theirs is there, and what is no case goes."""

    def counted() -> list[int]:
        return [r["rounds"] for r in json.loads((tmp_path / "results.json").read_text())["cases"]]

    every = [f"--out={tmp_path}", "--device=cpu"]
    tiny.append(Case("old", lambda: {"one": lambda: None}, rounds=1, memory=False))
    assert command.main([*every, "--rounds=3"]) == 0
    assert command.main([*every, "--rounds=2", "products"]) == 0
    assert names_in(tmp_path) == ["sums", "memory of products", "old"] and counted() == [3, 2, 3]

    def stop() -> None:
        raise KeyboardInterrupt

    tiny[1:] = [Case("memory of products", lambda: {"one": stop}, memory=False), *tiny[1:2]]
    assert command.main([*every, "--rounds=4"]) == command.INTERRUPTED
    assert names_in(tmp_path) == ["sums", "memory of products", "old"] and counted() == [4, 2, 3]
    del tiny[1]
    assert command.main([*every, "--rounds=5"]) == 0
    assert names_in(tmp_path) == ["sums", "memory of products"] and counted() == [5, 5]
    capsys.readouterr()
    assert command.main(every) == 0
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == ["1/2", "2/2"]
    assert counted() == [2, 1]


def test_expected_time_is_corrected_by_what_was_taken():
    screen = io.StringIO()
    progress = Progress([10.0, 20.0, 30.0], screen)
    progress.start("first")
    assert screen.getvalue() == "1/3, about 1 min 00 s left: first\n"
    progress.start("second")
    assert progress.left(20.0) == pytest.approx(100)  # twice as long as expected
    progress.start("third")
    assert progress.left(15.0) == pytest.approx(15)
    assert [clock(s) for s in (0.4, 59.6, 61)] == ["0 s", "1 min 00 s", "1 min 01 s"]


@pytest.mark.parametrize(
    "arguments",
    [["--rounds=0"], ["--seconds=-1"], ["--seconds=nan"], ["--rounds=3", "--seconds=3"], ["--threads=x"],
     ["--device=tpu"], ["--nonsense"], ["no such word"]],
    ids=str,
)
def test_what_cannot_be_used_is_one_line(arguments, tiny, capsys):
    try:
        code = command.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture(scope="module")
def problem():
    """A small trained network, its dense Hessian's trace and largest eigenvalue beside its references."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    made = with_references(net, (x, y), 40, 300)
    products = made.products()()
    dense = torch.stack([products.direct(row) for row in torch.eye(products.size)]).double()
    return made, dense


def test_references_are_those_of_the_dense_hessian(problem):
    """The trace within four standard errors."""
    made, dense = problem
    assert made.top == pytest.approx(float(torch.linalg.eigvalsh((dense + dense.T) / 2)[-1]), rel=1e-5)
    assert 0 < made.error < 0.01 * made.trace
    assert abs(made.trace - float(dense.trace())) < 4 * made.error
    off = (dense - dense.diag().diag()).norm() * math.sqrt(2) / dense.trace()
    assert made.spread == pytest.approx(float(off), rel=0.25)
    with pytest.raises(ArithmeticError, match="larger rank"):
        with_references(made.module, made.batch, 2, 3)


@pytest.mark.parametrize("method", [curvature.traces(2)["ours"], curvature.TOPS["ours"],
                                    curvature.TOPS["PyHessian, power iteration"]], ids=["trace", "top", "power"])
def test_larger_budgets_extend_smaller_ones(method, problem):
    """The values of operators that remember nothing, and no product beyond the largest budget."""
    made, _ = problem
    products = made.products()()
    run = method.estimate(made, products)
    for i, budget in enumerate((4, 6, 9, 12), 1):
        fresh = method.estimate(made, made.products()())(budget, 3)
        assert run(budget, 3) == pytest.approx(fresh, rel=1e-5)
        assert len(products.vectors) <= budget and products.asked >= len(products.vectors)
        assert products.asked <= sum((4, 6, 9, 12)[:i])


def test_products_are_linear_and_counted(problem):
    made, dense = problem
    products = made.products()()
    x = torch.randn(products.size, 3, generator=torch.Generator().manual_seed(1))
    for columns in (x, x @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]])):
        torch.testing.assert_close((products @ columns).double(), dense.T @ columns.double(), rtol=1e-4, atol=1e-4)
    assert products.asked == 5 and len(products.vectors) == len(products.images) == 3
    point = P.unflatten(x[:, 0], products.theta)
    torch.testing.assert_close(P.flatten(products(point)).double(), dense.T @ x[:, 0].double(), rtol=1e-4, atol=1e-4)


def test_a_coarse_reference_is_a_failure(problem):
    made, _ = problem
    case = curvature.case("c", {}, lambda: made, "trace", made.error / made.trace)
    assert "standard error" in command.outcome_of(case, CPU)["failed"]


def test_the_smallest_budget_is_looked_for_from_below():
    tried: list[int] = []

    def passes(budget: int) -> bool:
        tried.append(budget)
        return budget >= 20

    assert curvature.smallest(passes, curvature.GRID, 6) == 24
    assert max(tried) == 24
    assert curvature.smallest(lambda budget: budget >= 5, curvature.STEPS, 1) == 5
    assert curvature.smallest(lambda budget: False, curvature.STEPS, 1) is None


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
