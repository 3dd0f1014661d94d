"""What starting does not import: help without torch, the package without what only some of it uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import MAIN

ROOT = Path(__file__).parent.parent
HELP = (
    "import sys\nsys.path.insert(0, {root!r})\nfrom {module} import {call}\n"
    "sys.argv = ['program', *{words!r}, '--help']\n"
    "try:\n    {call}()\nexcept SystemExit as done:\n    assert not done.code"
)
HEAVY = {"torch", "tensordict", "torchvision", "numpy", "scipy", "sklearn", "matplotlib", "pydantic", "PIL"}
"""What no help text needs."""
OCCASIONAL = {"scipy", "sklearn", "matplotlib", "pydantic", "torchvision", "PIL", "typer", "rich", "hypothesis"}
"""What the main names can be had without."""


def loaded(code: str) -> set[str]:
    """Top-level names of modules in memory after running code in a fresh interpreter."""
    program = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert lines, done.stderr
    return {name.split(".")[0] for name in lines[-1].split()[1:]}


def help_of(module: str, call: str, *words: str) -> set[str]:
    """Modules in memory after a help text."""
    return loaded(HELP.format(root=str(ROOT), module=module, call=call, words=list(words)))


def test_help_imports_nothing_heavy():
    found = help_of("bnsharp.cli", "main")
    assert "typer" in found
    assert not HEAVY & found


@pytest.mark.parametrize("command", ["train", "compare", "groups"])
def test_help_of_a_command_imports_nothing_heavy(command):
    """Beyond what Typer itself imports to show an option."""
    found = help_of("bnsharp.cli", "main", command)
    assert "typer" in found
    assert not (HEAVY & found) - help_of("benchmarks.two_commands", "app", "first")


def test_importing_the_package_imports_nothing_heavy():
    assert not HEAVY & loaded("import bnsharp")


def test_the_main_names_import_nothing_beyond_torch():
    """Beyond what torch and tensordict import themselves."""
    found = loaded(MAIN)
    assert {"torch", "tensordict", "bnsharp"} <= found
    assert not (OCCASIONAL & found) - loaded("import torch, tensordict")
