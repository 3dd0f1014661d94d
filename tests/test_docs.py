"""Python snippets of the README and the pages run as written; commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_snippets_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "{'0.weight': 'row', '0.bias': 'inert'}" in printed
    pairs = [line.split() for line in printed.splitlines() if re.fullmatch(r"-?[\d.e-]+ -?[\d.e-]+", line)]
    (sharp, sharp_rescaled), (noise, noise_rescaled) = [[float(v) for v in pair] for pair in pairs]
    assert sharp_rescaled == pytest.approx(sharp, rel=1e-3)  # float32
    assert abs(noise_rescaled / noise - 1) > 0.1


OWN_LOOP = (ROOT / "docs" / "own-loop.md").read_text()
FIRST, *PARTS = [
    (heading.splitlines()[0], block)
    for heading in re.split(r"^##? ", OWN_LOOP, flags=re.M)[1:]
    for block in re.findall(r"```python\n(.*?)```", heading, flags=re.S)
]
OPTIONAL = ("lightning", "timm", "transformers")


@pytest.mark.parametrize(("heading", "block"), PARTS, ids=[f"{i} {heading}" for i, (heading, _) in enumerate(PARTS)])
def test_own_loop_snippets(heading: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each after the first alone; one that needs an optional package is skipped where it is missing."""
    for package in OPTIONAL:
        if re.search(rf"^(import|from) {package}\b", block, flags=re.M):
            pytest.importorskip(package, reason=f"{heading} needs {package}")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code in (FIRST[1], block):
        exec(compile(code, "own-loop.md", "exec"), namespace)
    step = namespace["step"]
    assert bool(step.loss.isfinite()) and all(bool(g.isfinite().all()) for g in step.gradient.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_command_in_the_readme_is_one() -> None:
    commands = {m.split()[1] for m in re.findall(r"^ {4}(bnsharp \S+)", README, flags=re.M)}
    assert commands
    shown = subprocess.run(
        [sys.executable, "-m", "bnsharp.cli", "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert all(command in shown for command in commands)


def test_the_theory_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)(?:…`|`(?!\.py))", (ROOT / "docs" / "theory.md").read_text()))
    source = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("theory", "minima"))
    missing = {name for name in named if f"def {name}" not in source}
    assert named
    assert not missing


def test_every_algorithm_and_option_is_on_the_page_of_algorithms() -> None:
    import inspect

    from bnsharp.algorithms import FAMILIES

    page = (ROOT / "docs" / "algorithms.md").read_text()
    for name, family in FAMILIES.items():
        assert f"| `{name}` |" in page, name
        for option in inspect.signature(family.build).parameters.values():
            if option.kind is option.KEYWORD_ONLY:
                assert f"`{option.name}`" in page, (name, option.name)


def test_the_algorithm_on_the_page_of_algorithms_is_one() -> None:
    from bnsharp.algorithms import algorithm
    from bnsharp.families import FAMILIES
    from bnsharp.regularizers import Look

    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "algorithms.md").read_text(), re.S)
    try:
        exec(compile("\n".join(block), "docs/algorithms.md", "exec"), {})
        regularizer = algorithm("sam-then-look", rho=0.2).regularizer(0)
        assert isinstance(regularizer, Look) and regularizer.every == 2
    finally:
        FAMILIES.pop("sam-then-look", None)
