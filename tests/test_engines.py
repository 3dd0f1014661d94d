"""Engines: all against one loss at a time, how one is chosen, what is kept, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bn_conv, bn_mlp, cross_entropy, direction, examples
from torch import Tensor, nn

import bnsharp
from bnsharp import Engine, InputError, Objective, choosing, grids, measures
from bnsharp import params as P
from bnsharp.evaluation import FunctionObjective
from bnsharp.types import Params

EAGER = ("loop", "vmap:1", "vmap:3", "vmap:16", "auto")
COMPILED = ("compiled", "compiled:3")


@pytest.fixture(autouse=True)
def _nothing_chosen() -> Iterator[None]:
    choosing.forget()
    yield
    choosing.forget()


def direct(net: nn.Module, x: Tensor, y: Tensor, theta: Params, statistics: str) -> Tensor:
    """The loss by the module itself, its parameters replaced one by one and put back."""
    own = dict(net.named_parameters())
    kept = {k: own[k].detach().clone() for k in theta.keys()}
    flags = {m: m.training for m in net.modules()}
    tracked = [m for m in net.modules() if getattr(m, "running_mean", None) is not None]
    buffers = [{k: b.clone() for k, b in m._buffers.items() if b is not None} for m in tracked]
    with torch.no_grad():
        for k, v in theta.items():
            own[k].copy_(v)
        for m in net.modules():
            m.training = statistics == "batch" and hasattr(m, "running_mean")
        loss = cross_entropy(net(x), y)
        for k, v in kept.items():
            own[k].copy_(v)
        for m, saved in zip(tracked, buffers, strict=True):
            for k, b in saved.items():
                m._buffers[k].copy_(b)  # type: ignore[union-attr]
    for m, flag in flags.items():
        m.training = flag
    return loss


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * (1 + float(expected.abs().max()))


def points_of(theta: Params, n: int) -> list[Params]:
    return [P.shift(theta, direction(theta, seed), 0.1) for seed in range(n)]


def unequal(shape: tuple[int, ...] = (5,)) -> list[tuple[Tensor, Tensor]]:
    """Three batches of 9, 4 and 7 examples."""
    x, y = examples(20, shape, dtype=torch.float64)
    return list(zip(x.split([9, 4, 7]), y.split([9, 4, 7]), strict=True))


# ---------------------------------------------------------------- every engine is the loop


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("network", ["perceptron", "convolutions"])
@pytest.mark.parametrize("engine", EAGER)
def test_every_engine_gives_the_losses_of_the_module(engine: str, network: str, statistics: str) -> None:
    make, shape = {"perceptron": (bn_mlp, (5,)), "convolutions": (bn_conv, (2, 6, 6))}[network]
    net, batches = make().double(), unequal(shape)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    objective = Objective(net, cross_entropy, batches, statistics=statistics, engine=engine)
    theta = P.parameters(net)
    thetas = points_of(theta, 7)
    expected = torch.stack([torch.stack([direct(net, x, y, t, statistics) for t in thetas]) for x, y in batches])
    weights = torch.tensor([9.0, 4.0, 7.0], dtype=torch.float64)
    mean = weights @ expected / 20
    with torch.no_grad():
        for source in (thetas, P.stack(thetas), P.Lazy(7, lambda i: thetas[i])):
            near(objective.many(source), mean)
            near(objective.many_by_batch(source)[1], expected)
        v, t = direction(theta), torch.linspace(-0.4, 0.4, 7, dtype=torch.float64)
        line = [P.shift(theta, v, s) for s in t]
        expected = torch.stack([
            sum(w * direct(net, x, y, p, statistics) for w, (x, y) in zip(weights, batches, strict=True)) / 20
            for p in line
        ])
        near(objective.along(theta, v, t), expected)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("engine", EAGER)
def test_every_engine_gives_the_gradients_of_one_point_at_a_time(engine: str) -> None:
    net = bn_mlp().double()
    objective = Objective(net, cross_entropy, unequal(), engine=engine)
    thetas = points_of(P.parameters(net), 7)
    values, gradients = zip(*(objective.value_and_grad(t) for t in thetas), strict=True)
    got, grads = objective.many_value_and_grad(thetas)
    near(got, torch.stack(values))
    weights = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = objective.weighted_gradients(P.stack(thetas), weights)
    for k, g in P.stack(gradients).items():
        near(grads[k], g)
        near(sums[k], torch.tensordot(weights, g, dims=1))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as by ``torch.compile`` and run as they are: making machine code takes most of a minute."""
    made = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: made(f, backend="aot_eager", **options))


def test_compiled_losses_by_machine_code() -> None:
    net = bn_mlp().double()
    data, theta = examples(8, dtype=torch.float64), P.parameters(net)
    source = grids.Grid(theta, [direction(theta)], [0.1 * k for k in range(7)])
    with torch.no_grad():
        compiled, loop = (Objective(net, cross_entropy, data, engine=e).many(source) for e in ("compiled:3", "loop"))
    near(compiled, loop)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("engine", COMPILED)
def test_compiled_engines_are_the_loop(engine: str) -> None:
    """Seven points by three at a time, two batches of unequal size, both precisions of one module."""
    net, (x, y) = bn_mlp(), examples(16)
    data = [(x[:9], y[:9]), (x[9:], y[9:])]
    objective, loop = (Objective(net, cross_entropy, data, engine=e) for e in (engine, "loop"))
    theta = P.pmap(Tensor.double, P.parameters(net))
    source = grids.Grid(theta, [direction(theta)], [0.1 * k for k in range(7)])
    with torch.no_grad():
        near(objective.many(source), loop.many(source))
        single = P.stack([P.pmap(Tensor.float, P.pick(source, i)) for i in range(7)])
        near(objective.many(single), loop.many(single), 1e-6)
    values, gradients = objective.many_value_and_grad(source)
    expected, others = loop.many_value_and_grad(source)
    near(values, expected)
    for k, g in others.items():
        near(gradients[k], g)
    assert objective.engine_used == str(Engine.parse(engine))


def test_a_graph_of_the_losses_is_the_loops_where_an_engine_is_chosen_or_compiled() -> None:
    net = bn_mlp().double()
    data = examples(8, dtype=torch.float64)
    theta = P.parameters(net)
    leaves = P.pmap(lambda p: p.clone().requires_grad_(), P.stack(points_of(theta, 5)))
    expected = Objective(net, cross_entropy, data).many_value_and_grad(P.pmap(Tensor.detach, leaves))[1]
    for engine in ("auto", "compiled"):
        losses = Objective(net, cross_entropy, data, engine=engine).many(leaves)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        for g, other in zip(grads, expected.values(), strict=True):
            near(g, other)


class Branching(nn.Module):
    """Python code that depends on data: no single graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if float(z.sum()) > 0 else 2 * z


@pytest.mark.usefixtures("quick")
def test_what_is_no_single_graph_is_refused_compiled_and_left_out_of_a_choice() -> None:
    net = Branching().double()
    theta, data = P.parameters(net), examples(8, dtype=torch.float64)
    source = points_of(theta, 4)
    with torch.no_grad():
        with pytest.raises(InputError, match="one graph") as caught:
            Objective(net, cross_entropy, data, engine="compiled").many(source)
        assert "\n" not in str(caught.value)
        expected = Objective(net, cross_entropy, data).many(source)
        objective = Objective(net, cross_entropy, data, engine="auto:compiled")
        near(objective.many(source), expected)
    (choice,) = choosing.choices()
    assert objective.engine_used == "loop (chosen)" and "loop" in choice.seconds
    assert "one graph" in choice.left_out["compiled"] and "vmap(4)" in choice.left_out


# ---------------------------------------------------------------- points on lines


def test_a_grid_is_its_points_however_they_are_asked_for() -> None:
    theta = P.parameters(bn_mlp().double())
    vs = [direction(theta, s) for s in range(3)]
    t = [-0.2, 0.0, 0.3, 1.0]
    for directions in (vs, P.stack(vs), P.Lazy(3, lambda i: vs[i])):
        grid = grids.Grid(theta, directions, t)
        expected = [P.pmap(lambda p, d, s=s: p + s * d, theta, v) for v in vs for s in t]
        assert len(grid) == 12
        scratch = P.pmap(torch.empty_like, theta)
        for indices in (range(12), range(1, 3), range(5, 9), range(11, 12)):
            chunk = grid.stacked(indices)
            for row, i in enumerate(indices):
                written = grid.write_(i, scratch)
                for k, p in expected[i].items():
                    near(grid[i][k], p, 1e-15)
                    near(chunk[k][row], p, 1e-15)
                    near(written[k], p, 1e-15)
    assert grid[-1]["0.weight"].equal(grid[11]["0.weight"]) and len(grid[2:4]) == 2
    with pytest.raises(IndexError):
        grid[12]


def test_points_share_memory_only_where_nothing_can_tell() -> None:
    theta = P.parameters(bn_mlp().double())
    grid = grids.Grid(theta, [direction(theta)], [0.1, 0.2])
    with torch.no_grad():
        shared = grids.Points(grid, reuse=True)
        assert shared.shared and shared[0]["0.weight"].data_ptr() == shared[1]["0.weight"].data_ptr()
        assert not grids.Points(grid).shared and not grids.Points([theta], reuse=True).shared
        mixed = grids.Grid(P.pmap(Tensor.float, theta), [direction(theta)], [0.1])
        assert not grids.Points(mixed, reuse=True).shared
        # a loss that is a view of the point itself
        entry = FunctionObjective(lambda p: p["0.weight"][0, 0])
        first, v = theta["0.weight"][0, 0], direction(theta)["0.weight"][0, 0]
        near(entry.many(grid), torch.stack([first + 0.1 * v, first + 0.2 * v]), 1e-15)
    assert not grids.Points(grid, reuse=True).shared


# ---------------------------------------------------------------- choosing


class Clock:
    """Stands in for the clock: each engine takes the seconds per point that it is given."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.now, self.calls = seconds, 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def run(self, engine: Engine, n: int) -> None:
        self.now += self.seconds[str(engine)] * n
        self.calls += 1


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"loop": 1e-4, "vmap(4)": 8e-5, "vmap(16)": 3e-5, "vmap(64)": 4e-5}, "vmap(16)"),
        ({"loop": 1e-4, "vmap(4)": 2e-4, "vmap(16)": 1.5e-4, "vmap(64)": 9.7e-5}, "loop"),  # not 4% better
        ({"loop": 1e-4, "vmap(4)": 2e-4, "vmap(16)": 1.5e-4, "vmap(64)": 5e-5}, "vmap(64)"),
    ],
)
def test_the_fastest_is_chosen_and_the_loop_within_noise(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], best: str
) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(choosing, "time", clock)
    for _ in range(2):
        chosen = choosing.choose("key", "call", 64, False, clock.run, torch.device("cpu"), False)
        assert str(chosen) == best
        calls, clock.calls = clock.calls, 0
    assert calls == 0  # kept
    (choice,) = choosing.choices(taken=True)
    assert choice.seconds == pytest.approx(seconds) and choice.call == "call"


def test_what_is_too_long_too_large_or_getting_worse_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({"loop": 0.5, "vmap(4)": 0.9, "vmap(16)": 2.0, "vmap(64)": 2.0})
    monkeypatch.setattr(choosing, "time", clock)
    choosing.choose("long", "", 4, False, clock.run, torch.device("cpu"), False)
    choosing.choose("worse", "", 64, False, clock.run, torch.device("cpu"), False)
    long, worse = choosing.choices()
    assert long.left_out == {"vmap(4)": "too long to try"} and str(long.engine) == "loop"
    assert worse.left_out["vmap(16)"] == "smaller chunks were slower" and str(worse.engine) == "loop"
    monkeypatch.setattr(choosing, "free_memory", lambda device: 20_000)

    def run(engine: Engine, n: int) -> None:
        torch.ones(n, 100, dtype=torch.float64) + 1  # 800 bytes a point to write, as many to read
        clock.run(Engine(), n)

    choosing.choose("large", "", 16, False, run, torch.device("cpu"), True)
    left = choosing.choices()[2].left_out
    assert "vmap(4)" not in left or left["vmap(4)"] != "not enough memory"
    assert left["vmap(16)"] == "not enough memory"


def test_no_memory_for_a_chunk_leaves_it_out() -> None:
    def run(engine: Engine, n: int) -> None:
        if n > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    choosing.choose("key", "", 16, False, run, torch.device("cpu"), False)
    assert choosing.choices()[0].left_out == {"vmap(16)": "not enough memory"}

    def broken(engine: Engine, n: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        choosing.choose("other", "", 16, False, broken, torch.device("cpu"), False)


def test_memory_is_asked_of_the_system_and_of_a_containers_limit(tmp_path: Path) -> None:
    free = choosing.free_memory(torch.device("cpu"))
    assert free is None or free > 2**20
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert choosing._left_to_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert choosing._left_to_group(tmp_path) is None and choosing._left_to_group(tmp_path / "none") is None


def test_one_choice_for_calls_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal networks, data shapes and numbers of points share it; another precision, batch or number does not."""
    nets = [bn_mlp(seed).double() for seed in (0, 1)]
    theta = P.parameters(nets[0])
    objectives = [Objective(n, cross_entropy, examples(8, dtype=torch.float64), engine="auto") for n in nets]
    with torch.no_grad():
        for objective in objectives:
            for n in (3, 4, 5, 7):
                objective.many(points_of(theta, n))
        assert len(choosing.choices()) == 1
        objectives[0].many(points_of(theta, 9))
        objectives[0].many_value_and_grad(points_of(theta, 4))
        objectives[0].many([P.pmap(Tensor.float, p) for p in points_of(theta, 4)])
        Objective(nets[0], cross_entropy, examples(9, dtype=torch.float64), engine="auto").many(points_of(theta, 4))
    assert len(choosing.choices()) == 5
    assert sum("gradients" in c.call for c in choosing.choices()) == 1
    assert sum("float32" in c.call for c in choosing.choices()) == 1


def test_choices_are_kept_in_a_file_and_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "engines.json"
    choosing.load(path)
    clock = Clock({"loop": 1e-4, "vmap(4)": 1e-5})
    choosing.choose("a", "losses", 4, False, lambda e, n: None, torch.device("cpu"), False)
    choosing.save(path)
    first = json.loads(path.read_text())["a"]
    choosing.forget()
    choosing._chosen["a"] = choosing.Choice("losses", Engine("vmap", 64))
    choosing._chosen["b"] = choosing.Choice("losses", Engine("vmap", 4, True))
    choosing.save(path)
    kept = json.loads(path.read_text())
    assert kept["a"] == first and kept["b"]["engine"] == "compiled(4)"
    choosing.forget()
    choosing.load(path)
    assert str(choosing.choose("b", "", 4, False, clock.run, torch.device("cpu"), False)) == "compiled(4)"
    assert clock.calls == 0
    for damaged in ("", "[]", '{"c": {"engine": "auto"}}', '{"c": {"engine": "warp", "seconds": {}}}', '{"c": 1}'):
        path.write_text(damaged)
        choosing.forget()
        choosing.load(path)
        assert choosing.choices() == []


# ---------------------------------------------------------------- names, estimates, training


def test_engines_by_name() -> None:
    for text in ("loop", "vmap", "vmap:8", "compiled", "compiled:8", "auto", "auto:compiled"):
        engine = Engine.parse(text)
        assert Engine.parse(str(engine)) == engine
    assert Engine.parse("vmap(8)") == Engine("vmap", 8) and Engine.parse("compiled:8").compile
    for text in ("warp", "vmap:0", "vmap:x", "loop:3", "auto:8", "", "vmap:compiled"):
        with pytest.raises(InputError) as caught:
            Engine.parse(text)
        assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_an_estimate_says_which_engine_was_chosen() -> None:
    net = bn_mlp().double()
    data = examples(16, dtype=torch.float64)
    objective, loop = (Objective(net, cross_entropy, data, engine=e) for e in ("auto", "loop"))
    measure = measures.gaussian(sigma=0.1, draws=9)
    first, again, other = (measure(o, P.parameters(net)) for o in (objective, objective, loop))
    assert first.engine.endswith("(chosen)") and other.engine == "loop"
    assert first.value == again.value and first.value == pytest.approx(other.value, rel=1e-11)
    forced = Objective(net, cross_entropy, data, engine=first.engine.removesuffix(" (chosen)"))
    assert measure(forced, P.parameters(net)).value == first.value


@pytest.mark.parametrize("engine", ["auto", "compiled", "auto:compiled"])
def test_training_takes_one_engine_for_all_steps(engine: str) -> None:
    net = bn_mlp()
    groups = bnsharp.scale_groups(net, examples(8)[0])
    sgds = bnsharp.regularizers.Penalty(measures.bn_sharpness(groups, delta=0.1, steps=0), gradient="two-point")
    with pytest.raises(InputError, match="in training") as caught:
        bnsharp.backward(net, cross_entropy, examples(8), sgds, engine=engine)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in net.parameters())


def test_random_networks_are_refused_as_with_the_loop() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.randn_like(x))

    for engine in ("loop", "auto"):
        net = Noisy()
        with pytest.raises(InputError, match="random"):
            measures.gaussian(sigma=0.1, draws=4)(Objective(net, cross_entropy, examples(8), engine=engine),
                                                  P.parameters(net))


def test_a_sequence_made_on_demand_is_asked_once_a_pass() -> None:
    net = bn_mlp().double()
    theta, made = P.parameters(net), []

    def make(i: int) -> Params:
        made.append(i)
        return P.shift(theta, theta, 0.01 * i)

    for engine in ("loop", "vmap:3"):
        made.clear()
        with torch.no_grad():
            Objective(net, cross_entropy, examples(8, dtype=torch.float64), engine=engine).many(P.Lazy(7, make))
        assert made == list(range(7))


def test_the_command_tells_and_repeats_a_choice(
    run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = ["measure", finished, "--measure", "gaussian", "--set", "draws=20", "--json", "--verbose"]

    def values(*more: str) -> tuple[dict[str, Any], str]:
        done = run(*common, *more)
        assert done.code == 0, done.err
        record = json.loads(done.out)["gaussian"]
        del record["seconds"]
        return record, done.err

    first, said = values("--engine", "auto")
    assert "losses at 16 to 31 points" in said and "taken; per point: loop " in said
    assert first["engine"].endswith("(chosen)")
    assert (tmp_path / "cache" / "bnsharp" / "engines.json").exists()
    choosing.forget()
    assert values("--engine", "auto")[0] == first  # to the last bit
    forced, said = values("--engine", first["engine"].removesuffix(" (chosen)"))
    assert forced["value"] == first["value"] and "per point" not in said
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    choosing.forget()
    again, said = values("--engine", "auto")
    assert again["value"] == pytest.approx(first["value"], rel=1e-10) and "cannot be written" in said


def test_the_pages_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    exec(compile(block, "engines.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().endswith("(chosen)")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("engine", COMPILED)
def test_a_measure_by_a_compiled_engine(engine: str) -> None:
    """Searches, draws and rounding checks in float64, where convolutions are sliced by a function mode."""
    net, data = bn_conv(), examples(8, (2, 6, 6))
    groups, theta = bnsharp.scale_groups(net, data[0]), P.parameters(net)
    searched = measures.bn_sharpness(groups, delta=0.05, steps=1, restarts=1)
    for measure in (searched, measures.gaussian(sigma=0.1, draws=9)):
        one, other = (measure(Objective(net, cross_entropy, data, engine=e), theta) for e in ("loop", engine))
        assert other.value == pytest.approx(one.value, rel=1e-4) and other.precision == one.precision
        assert other.engine == str(Engine.parse(engine))


def test_a_modelled_rounding_error_costs_nothing_and_promotes_nothing() -> None:
    net, data = bn_mlp(), examples(16)
    theta, measure = P.parameters(net), measures.gaussian(sigma=0.1, draws=6)
    objective = Objective(net, cross_entropy, data)
    kept = measure(objective, theta, sampling=bnsharp.Sampling(promote=False, rounding="modelled"))
    exact = measure(objective, P.pmap(Tensor.double, theta))
    assert kept.precision == "float32" and not kept.promoted and kept.evaluations["losses"] == 7
    assert 0 < kept.error < 1e-4 and abs(kept.value - exact.value) <= kept.error
    for options in ({"rounding": "modelled"}, {"rounding": "guessed", "promote": False}):
        with pytest.raises(InputError) as caught:
            bnsharp.Sampling(**options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
