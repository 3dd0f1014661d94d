"""Algorithms side by side: accuracy, final sharpness, and what they cost, over seeds, against SGD.

Two lists of rows are known by name: ``algorithms``, every algorithm with its preset for ``digits``, and ``ablation``,
the choices inside BN-Sharpness one by one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnsharp.algorithms import FAMILIES, algorithm, find, options_of
from bnsharp.checkpoint import to_json, write_atomic
from bnsharp.checks import one_of
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.config import RunConfig, make_config, parse_setting
from bnsharp.experiments.run import prepare
from bnsharp.experiments.statistics import mean_interval
from bnsharp.experiments.study import Task, sizes

MEASURING: dict[str, Any] = {"delta": 0.05, "steps": 6, "restarts": 6}
BASELINE = "SGD"


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    Attributes:
        algorithm, options: as in ``bnsharp train``.
        cost: gradients per step, about: for the progress bar.
        passes: epochs as a fraction of the others' (Entropy-SGD counts its inner steps' batches).
        config: other settings of its runs.
    """

    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 2
    passes: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)


ALGORITHMS: dict[str, Row] = {
    BASELINE: Row("sgd", cost=1),
    "SAM": Row("sam", {"rho": 1.0}),
    "ASAM": Row("asam", {"rho": 2.0, "eta": 0.01}),
    "m-SAM, m = 2": Row("m-sam", {"rho": 0.5, "chunks": 2}, cost=4),
    "WSAM": Row("wsam", {"rho": 0.2, "wsam_gamma": 0.8}),
    "FriendlySAM": Row("friendly-sam", {"rho": 1.0}),
    "LookSAM, k = 5": Row("look-sam", {"rho": 1.0, "every": 5}, cost=1.2),
    "MSAM": Row("msam", {"rho": 1.0}, cost=1),
    "SGDS-0": Row("sgds-0"),
    "SGDS-5": Row("sgds-5", cost=7),
    "SGDS-1, warm start": Row("sgds-1", {"warm": True}, cost=3),
    "SGDS-0, tangent": Row("sgds-0", {"gradient": "tangent"}),
    "SGDS-0, exact": Row("sgds-0", {"gradient": "exact", "nodes": 3}, cost=7),
    "SGDS-averaged": Row("sgds-averaged", cost=1),
    "SGDS-5, paper λ": Row("sgds-5-paper-lambda", cost=8),
    "SGDS-5, paper δ": Row("sgds-5-paper-delta", cost=8),
    "SmoothOut": Row("smoothout", {"a": 0.05}, cost=1),
    "Gaussian smoothing": Row("gaussian-smoothing", {"sigma": 0.03}, cost=1),
    "BN-Gaussian smoothing": Row("gaussian-smoothing", {"sigma": 0.5, "relative_to": "groups"}, cost=1),
    "Entropy-SGD": Row("entropy-sgd", cost=20, passes=0.2),
    "trace penalty": Row("penalty-hessian_trace", {"weight": 1e-3}, cost=4),
}
"""Every algorithm with its preset for ``digits``."""

ABLATION: dict[str, Row] = {
    BASELINE: Row("sgd", cost=1),
    "two-point": Row("sgds-0"),
    "central": Row("sgds-0", {"gradient": "central"}, cost=3),
    "tangent": Row("sgds-0", {"gradient": "tangent"}),
    "exact": Row("sgds-0", {"gradient": "exact", "nodes": 3}, cost=7),
    "1 search step": Row("sgds-1", cost=3),
    "5 search steps": Row("sgds-5", cost=7),
    "1 step from a warm start": Row("sgds-1", {"warm": True}, cost=3),
    "5 steps, direction used 4 times": Row("sgds-5", {"reuse_direction": 4}, cost=3.25),
    "second batch": Row("sgds-0", {"independent_batch": True}, cost=3),
    "second batch, 5 steps": Row("sgds-5", {"independent_batch": True}, cost=8),
    "clip 1": Row("sgds-0", {"clip": 1.0}),
    "clip 0.1": Row("sgds-0", {"clip": 0.1}),
    "averaged direction, 0.5": Row("sgds-averaged", {"delta": 0.12, "averaging": 0.5}, cost=1),
    "averaged direction, 0.9": Row("sgds-averaged", {"delta": 0.12, "averaging": 0.9}, cost=1),
    "averaged, descent side": Row("sgds-averaged", {"delta": 0.12, "descent": True}, cost=1),
    "the paper's λ, δ = 1e-3, clip 0.1": Row("sgds-0-paper-lambda", cost=3),
}
"""What matters in SGDS: everything at δ = 0.08 and c = 1 unless said otherwise (averaged directions: δ = 0.12)."""

ROWS: dict[str, Callable[[], dict[str, Row]]] = {
    "algorithms": lambda: {**ALGORITHMS, **_without_preset()}, "ablation": lambda: dict(ABLATION),
}


def _without_preset() -> dict[str, Row]:
    """Algorithms that no row of :data:`ALGORITHMS` has, with their defaults."""
    present = [find(row.algorithm)[0] for row in ALGORITHMS.values()]
    missing = [name for name, family in FAMILIES.items() if family not in present]
    return {name: Row(name.replace("-N", "-0")) for name in missing}


def parse_row(text: str) -> tuple[str, Row]:
    """``NAME`` or ``NAME:key=value,key=value``: an algorithm with options, as a row that is titled by the text.

    Raises:
        InputError: an unknown algorithm or option, a value without ``=``.
    """
    name, _, rest = text.partition(":")
    family, matched = find(name)
    options = dict(parse_setting(part) for part in rest.split(",") if part)
    known = options_of(family, *matched)
    for key in options:
        if key not in known:
            raise InputError(f"algorithm {name!r} has no option {key!r}; expected one of {', '.join(known) or 'none'}")
    return text, Row(name, options)


def rows_of(kind: str, given: Sequence[str]) -> dict[str, Row]:
    """The rows asked for, SGD first; the whole list of that kind where none is."""
    one_of("rows", kind, ROWS)
    chosen = dict(map(parse_row, given)) if given else ROWS[kind]()
    plain = ALGORITHMS[BASELINE].algorithm
    base = next((title for title, row in chosen.items() if row.algorithm == plain), None)
    if base is not None:
        chosen.pop(base)
    return {BASELINE: ALGORITHMS[BASELINE], **chosen}


def tasks(
    out: Path, rows: Mapping[str, Row], settings: Sequence[str], *, data: str, model: str, seeds: int, epochs: int,
    train_size: Callable[[dict[str, Any]], int], together: int = 1,
) -> list[Task]:
    """One run folder per row and seed under ``out``.

    Args:
        together: seeds of a row that are trained at once, at most.
        settings: ``key=value`` for every run.
        train_size: ``data options -> training examples``, for the progress bar.

    Raises:
        InputError: bad settings.
    """
    made = []
    for index, (title, row) in enumerate(rows.items()):
        values = {
            "data": data, "model": model, "algorithm": row.algorithm, "algorithm_options": dict(row.options),
            "epochs": max(1, round(row.passes * epochs)), **row.config,
        }
        groups = [size for size in sizes(seeds, together) for _ in range(size)]
        for seed, size in enumerate(groups):
            own = {"seed": seed, "checkpoint_every": 20, **({"together": size} if size > 1 else {})}
            config = make_config({**values, **own}, list(settings))
            given = config.model_dump(exclude_unset=True)
            steps = config.epochs * max(1, train_size(config.data_options) // config.batch_size)
            folder = out / "runs" / f"{index:02d}-{row.algorithm}-{seed}"
            made.append(Task("", title, given, str(folder), MEASURING, steps, max(1, round(row.cost)), "sharpness",
                             may_diverge=True))
    return made


OWNED: dict[str, str] = {
    "algorithm": "--algorithm NAME", "algorithm_options": "--algorithm NAME:KEY=VALUE", "data": "--data",
    "model": "--model", "epochs": "--epochs", "seed": "--seeds", "together": "--together",
}
"""Settings that a comparison gives its runs itself, and how they are said."""


def check_settings(settings: Sequence[str], label_noise: float) -> None:
    """Raise :class:`InputError` for a setting of every run that would undo what tells the runs apart."""
    for key in (parse_setting(text)[0] for text in settings):
        head = key.partition(".")[0]
        if head in OWNED:
            raise InputError(f"{key} for every run of a comparison; expected {OWNED[head]} instead")
        if label_noise and key.rpartition(".")[2] == "label_noise":
            raise InputError(f"--label-noise {label_noise:g} and --set {key}; expected one of the two")


def check(tasks: Sequence[Task], data: ImageData) -> None:
    """Build every row's algorithm, so that a bad option is told before anything is written.

    Raises:
        InputError: what a run of it would raise.
    """
    first = prepare(RunConfig(**tasks[0].config), data)
    for task in tasks:
        config = RunConfig(**task.config)
        algorithm(config.algorithm, first.groups, **config.algorithm_options)


COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    # title ({} is the row that accuracies are compared with), key, factor, digits
    ("accuracy, %", "test_accuracy", 100, 4),
    ("− {}'s", "accuracy_gain", 100, 2),
    ("training loss", "loss", 1, 2),
    ("BN-Sharpness", "bn_sharpness", 1, 2),
    ("λ_max", "hessian_top", 1, 2),
    ("gradients ×", "relative_gradients", 1, 3),
    ("seconds ×", "relative_seconds", 1, 2),
)


REFERENCE = {"algorithms": BASELINE, "ablation": "two-point"}
"""The row that accuracies are compared with, by list; costs are relative to SGD's everywhere."""


def titles(reference: str) -> list[str]:
    """The columns' titles."""
    return [title.format(reference) for title, *_ in COLUMNS]


def summarize(
    rows: Sequence[str], results: Sequence[dict[str, Any]], reference: str = BASELINE
) -> list[dict[str, Any]]:
    """One dictionary per row: mean and half width of the 95% interval of every column; comparisons paired by seed.

    A row of which a run diverged has NaN for its numbers and the number of such runs in ``diverged``.
    """
    base, other = ({r["seed"]: r for r in results if r["label"] == title} for title in (BASELINE, reference))
    for r in results:
        mine = base[r["seed"]]
        r["accuracy_gain"] = r["test_accuracy"] - other[r["seed"]]["test_accuracy"]
        r["relative_gradients"] = r["gradient_evaluations"] / mine["gradient_evaluations"]
        r["relative_seconds"] = r["seconds"] / mine["seconds"]
    table = []
    for title in rows:
        mine_all = [r for r in results if r["label"] == title]
        diverged = sum("diverged" in r for r in mine_all)
        line: dict[str, Any] = {"row": title, "seeds": len(mine_all), "diverged": diverged}
        for _, key, factor, _ in COLUMNS:
            values = [factor * float(r.get(key, math.nan)) for r in mine_all]
            line[key], line[f"{key}_ci95"] = mean_interval(values)
        table.append(line)
    return table


def write(
    out: Path, table: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], reference: str = BASELINE
) -> dict[str, Path]:
    """``table.csv``, ``table.md`` and ``results.json``; where they are."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    plain = [{k: v for k, v in r.items() if k != "curve"} for r in results]
    contents = {"table.csv": buffer.getvalue(), "table.md": markdown(table, reference),
                "results.json": to_json({"reference": reference, "table": list(table), "runs": plain}, indent=1) + "\n"}
    for name, content in contents.items():
        write_atomic(out / name, content.encode())
    return {name: out / name for name in contents}


def cell(line: Mapping[str, Any], key: str, digits: int) -> str:
    """``mean ± half width``; the mean alone where seeds do not differ."""
    mean, half = line[key], line[f"{key}_ci95"]
    if line["diverged"]:
        return f"{line['diverged']} of {line['seeds']} diverged"
    text = f"{mean:+.{digits}g}" if key == "accuracy_gain" else f"{mean:.{digits}g}"
    return text if math.isnan(half) or half <= 1e-9 * abs(mean) else f"{text} ± {half:.1g}"


def markdown(table: Sequence[Mapping[str, Any]], reference: str = BASELINE) -> str:
    """The table in Markdown."""
    head = ["", *titles(reference)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in table:
        cells = [line["row"], *(cell(line, key, digits) for _, key, _, digits in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
