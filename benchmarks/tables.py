"""Rows of Markdown tables from the records that benchmarks write."""

from __future__ import annotations

from typing import Any

from benchmarks.paired import EXCESS, PEAK, RATIO, SECONDS, STATED, mebibytes

HEAD = [
    "| what | ours | against | median | quartiles | 95% of the median | aim | peak memory, ours and theirs | |",
    "|---|---|---|---|---|---|---|---|---|",
]
COLUMNS = HEAD[0].count("|") - 1
QUANTITIES = {q.name: q for q in (SECONDS, STATED, PEAK)}
COMPARISONS = {c.name: c for c in (RATIO, EXCESS)}


def row(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join([row(head), "|" + "---|" * len(head), *map(row, lines)])


def rows(record: dict[str, Any]) -> list[str]:
    """A case: ours against its reference, then against every other alternative."""
    if "failed" in record:
        return [row([record["case"], *[""] * (COLUMNS - 2), f"failed: {record['failed']}"])]
    lacking = [f"{name}: {package} not installed".removeprefix(": ")
               for name, package in record["not_installed"].items()]
    if not record.get("medians"):
        return [row([record["case"], *[""] * (COLUMNS - 2), ", ".join(lacking)])]
    others = sorted(record["ratios"], key=lambda name: name != record["reference"])
    lines = [_compared(record, other) for other in others] or [[record["case"], *[""] * (COLUMNS - 1)]]
    lines[0][-1] = ", ".join([*([record["note"]] if record["note"] else []), *lacking])
    return [row(cells) for cells in lines]


def _compared(record: dict[str, Any], other: str) -> list[str]:
    quantity, comparison = QUANTITIES[record["quantity"]], COMPARISONS[record["comparison"]]
    found, ours, show = record["ratios"][other], record["ours"], comparison.show
    is_reference, peaks = other == record["reference"], record["peak_bytes"]
    several = record["rounds"] > 1
    return [
        record["case"] if is_reference else "",
        quantity.show(record["medians"][ours]) if is_reference else "",
        f"{other}: {quantity.show(record['medians'][other])}",
        show(found["median"]),
        f"{show(found['low'])} to {show(found['high'])}" if several else "",
        f"{show(found['interval'][0])} to {show(found['interval'][1])}" if several else "",
        aim(record["limit"], found["median"], comparison.show) if is_reference else "",
        f"{mebibytes(peaks[ours])}, {mebibytes(peaks[other])}" if ours in peaks and other in peaks else "",
        "",
    ]


def aim(limit: float | None, median: float, show: Any) -> str:
    """The aim, and whether the median keeps it."""
    return "" if limit is None else f"{show(limit)}: {'reached' if median <= limit else 'not reached'}"
