"""The rule that imports go one way, and that light entry points stay light.

DESIGN: types ← params ← {objective, groups, geometry, laws, reduce} ← profiles ← directions ← measures ← regularizers ←
trainer ← experiments ← cli; models and data feed only experiments and cli.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "bnsharp": "bnsharp", "bnsharp.cli": "cli", "bnsharp.experiments": "experiments",
    "bnsharp.testing": "bnsharp/testing",
}

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "types"),  # errors import nothing, so that a command can fail without torch
    # of arguments; files, random states, signals, ranks; kernels
    ("checks", "files", "randomness", "stopping", "exchange", "convolutions", "lockstep", "stacked",
     "allocator"),
    # engines: one point or several
    ("params", "checkpoint", "schedules", "quadrature", "divergence", "engines", "stacked_optimizers"),
    ("structure", "grids", "choosing"),  # one walk over a module; points on lines; the fastest engine
    ("partition", "modes", "lanczos", "composed", "loopstate", "distributed"),  # groups; modes; where a run is
    ("forms", "synchronised", "pointwise"),  # quadratic forms, losses of one batch; batch statistics over ranks
    ("evaluation", "probing"),  # how losses are evaluated; how groups are found: the insides of objective and groups
    ("anchor", "balls"),  # an objective at one θ; sets of unit directions
    ("objective", "groups", "geometry", "maps", "laws", "reduce"),
    ("profiles", "channels", "averages", "passes"),  # channels: who writes and reads them; passes of a training step
    ("directions", "scores", "transformations", "training_objective"),  # maps that keep the function
    ("bounds", "deflation", "precision", "shared_passes"),  # of maxima; of traces; rounding; passes of several runs
    ("estimation",),  # the four slots put together
    ("composites", "spectrum"),  # measures that are functions over measures
    ("pacbayes",),  # a bound as a measure
    ("second_order",),  # measures of curvature
    ("measures",),
    ("starts", "penalty_gradients"),  # what a step remembers; the gradient of a penalty
    ("penalties",),
    ("smoothings", "wrappers", "families"),  # families: algorithms by name
    ("regularizers",),  # the published steps as combinations
    ("loop", "algorithms", "observing"),  # one regularised step; regularisers by name: what a trainer repeats
    ("trainer",),
    ("companions",),  # which runs can go together
    ("together",),
)
"""A module imports from strictly lower layers only, so modules of one layer do not know each other."""

FEED: dict[str, set[str]] = {"resnets": set(), "models": {"resnets"}, "data": {"ordering"},
                             "ordering": set()}
"""These know only errors, checks and the modules named here, and only experiments and cli know them."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def sources() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


SOURCES = sources()


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(), str(SOURCES[module]))


def imports(module: str) -> Iterator[str]:
    """Modules that a module imports, anywhere in it; of this project the submodule where a name is one."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide the layer"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else str(node.module)


def own(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "bnsharp"} - {module}


CORE = sorted(m.removeprefix("bnsharp.") for m in SOURCES if m.count(".") == 1 and m not in FOLDERS)
OUTER = sorted(m for m in SOURCES if m.startswith(("bnsharp.cli", "bnsharp.experiments")))
KIT = sorted(m for m in SOURCES if m.startswith("bnsharp.testing"))


@pytest.mark.parametrize("name", CORE)
def test_a_module_imports_only_lower_layers(name):
    if name in FEED:
        assert own(f"bnsharp.{name}") <= {f"bnsharp.{other}" for other in ("errors", "checks", *FEED[name])}
        return
    assert name in RANK, f"give bnsharp/{name}.py a place in LAYERS"
    for other in own(f"bnsharp.{name}"):
        lower = other.removeprefix("bnsharp.")
        assert lower in RANK, f"{name} may not import {other}"
        assert RANK[lower] < RANK[name], f"{name} (layer {RANK[name]}) imports {lower} (layer {RANK[lower]})"


def test_every_layer_is_a_file():
    assert {*RANK, *FEED} <= set(CORE)


@pytest.mark.parametrize("module", KIT)
def test_the_conformance_kit_knows_the_core_alone(module):
    """It ranks above the trainer: it may import every layer, and no module of the core may import it."""
    for other in own(module):
        assert other.startswith("bnsharp.testing.") or other.removeprefix("bnsharp.") in RANK, other


def test_the_conformance_kit_has_no_cycles():
    graph = {m: {o for o in own(m) if o in KIT and o not in FOLDERS} for m in KIT if m not in FOLDERS}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", [m for m in OUTER if m.startswith("bnsharp.experiments")])
def test_experiments_do_not_know_the_command_line(module):
    assert not [other for other in own(module) if other.startswith("bnsharp.cli")]


def test_experiments_and_commands_have_no_cycles():
    graph = {m: {o for o in own(m) if o in OUTER and o not in FOLDERS} for m in OUTER if m not in FOLDERS}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_package_itself_imports_nothing_of_its_own_at_run_time():
    tree = parse("bnsharp")
    for node in tree.body:
        if isinstance(node, ast.If):  # TYPE_CHECKING
            assert isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] != "bnsharp"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_rich_is_imported_by_the_command_line_alone(module):
    if not module.startswith("bnsharp.cli"):
        assert not [name for name in imports(module) if name.split(".")[0] in ("rich", "typer", "click")]


def loaded(code: str) -> set[str]:
    """Modules in memory after running some code in a fresh interpreter."""
    program = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent, timeout=100)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert lines, done.stderr
    return set(lines[-1].split()[1:])


def test_help_does_not_import_torch():
    code = (
        "from bnsharp.cli import main\n"
        "for words in ([], ['train'], ['measure'], ['list'], ['demo']):\n"
        "    sys.argv = ['bnsharp', *words, '--help']\n"
        "    try:\n        main()\n    except SystemExit as done:\n        assert not done.code, done.code"
    )
    heavy = {"torch", "tensordict", "torchvision", "numpy", "scipy", "sklearn", "matplotlib"}
    assert not heavy & loaded(code)


def test_importing_the_package_is_light():
    modules = loaded("import bnsharp\nbnsharp.__version__\ndir(bnsharp)")
    assert not {"torch", "tensordict", "numpy", "rich"} & modules
    assert not [name for name in modules if name.startswith("bnsharp.")]


def test_every_public_name_can_be_imported():
    import bnsharp

    assert sorted(bnsharp.__all__) == list(bnsharp.__all__)
    for name in bnsharp.__all__:
        assert getattr(bnsharp, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bnsharp.nonsense


# ---------------------------------------------------------------- names are data, never cases


def is_name(text: object) -> bool:
    from bnsharp.algorithms import FAMILIES
    from bnsharp.measures import MEASURES

    return isinstance(text, str) and (
        text in MEASURES or text in FAMILIES or any(re.fullmatch(f.pattern, text) for f in FAMILIES.values())
    )


def constants(node: ast.AST) -> Iterator[object]:
    """Literal strings of an operand: one, or those of a display."""
    for inner in [node, *(node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [])]:
        if isinstance(inner, ast.Constant):
            yield inner.value


@pytest.mark.parametrize("module", ["bnsharp.trainer", "bnsharp.loop", *OUTER, *KIT])
def test_nothing_compares_with_the_name_of_an_algorithm_or_measure(module):
    """If the trainer or a command asks for a name, the slot is wrong."""
    found = []
    for node in ast.walk(parse(module)):
        operands: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith", "fullmatch"):
            operands = list(node.args)
        found += [f"line {node.lineno}: {c!r}" for o in operands for c in constants(o) if is_name(c)]  # type: ignore
    assert not found
