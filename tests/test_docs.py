"""The README's Python snippets run as written, one after the other; its commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
