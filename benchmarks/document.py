"""Put the numbers of ``benchmarks/results/`` into ``docs/performance.md``: ``python -m benchmarks.document``.

What stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` is replaced; a table whose results are not there is
left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import growth, profile
from benchmarks.arguments import OUT, Parser
from benchmarks.tables import HEAD, rows, table

PAGE = Path("docs") / "performance.md"
Record = Mapping[str, Any]


def comparisons(record: Record) -> str:
    """Ours against others."""
    return "\n".join([*HEAD, *(line for case in record["cases"] for line in rows(case))])


def machines(record: Record) -> str:
    """What the numbers were taken on, each machine once."""
    kept = {json.dumps(case["machine"], sort_keys=True): case["machine"] for case in record["cases"]}
    return "\n".join(f"- {described(machine)}" for machine in kept.values())


def described(machine: Record) -> str:
    """One machine in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = f", {machine['accelerator']}" if machine["accelerator"] else ""
    return (f"{machine['processor']}{device}: {machine['cores']} cores, {machine['threads']} threads in use; Python "
            f"{machine['python']}; {versions}")


def profiles(record: Record) -> str:
    """Where the time goes."""
    return table(profile.HEAD, [profile.line(found) for found in record["profiles"]])


def exponents(record: Record) -> str:
    """How cost grows."""
    return table(growth.HEAD, [growth.line(found) for found in record["growth"]])


PARTS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "machine": ("results.json", machines),
    "comparisons": ("results.json", comparisons),
    "profiles": ("profile.json", profiles),
    "growth": ("growth.json", exponents),
}
"""By name of a part: the file that its numbers are in, and how it is written."""


def filled(page: str, results: Path) -> tuple[str, list[str]]:
    """The page with every part replaced whose results are there, and the names of those parts.

    Raises:
        ValueError: a part that the page has no place for.
    """
    done = []
    for name, (file, write) in PARTS.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.S)
        if not place.search(page):
            raise ValueError(f"no <!-- {name} --> … <!-- end {name} --> in the page; expected one of each")
        if (results / file).exists():
            text = write(json.loads((results / file).read_text()))
            page = place.sub(lambda found, text=text: found[1] + text + found[2], page)  # type: ignore[misc]
            done.append(name)
    return page, done


def main() -> int:
    """Fill the page; the exit code."""
    parser = Parser("benchmarks.document", __doc__)
    parser.add_argument("--results", type=Path, default=OUT, metavar="FOLDER", help=f"(default: {OUT})")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help=f"(default: {PAGE})")
    given = parser.parse_args()
    try:
        page, done = filled(given.page.read_text(), given.results)
    except (OSError, ValueError) as error:
        print(f"benchmarks: {given.page}: {error}", file=sys.stderr)
        return 2
    if not done:
        print(f"benchmarks: no results in {given.results}; expected those of make bench", file=sys.stderr)
        return 2
    given.page.write_text(page)
    print(f"{given.page}: {', '.join(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
