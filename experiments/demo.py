"""The demo: what a sharpness-aware step does for a small network, with clean and with wrong labels.

Four algorithms, five seeds, ``digits`` with clean labels and with 40% of the training labels replaced at random.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnsharp.checkpoint import write_atomic
from bnsharp.experiments.statistics import mean_interval
from bnsharp.experiments.study import Task

SETTINGS: dict[str, dict[str, Any]] = {
    "clean labels": {},
    "40% of the training labels replaced at random": {"label_noise": 0.4},
}
ALGORITHMS: dict[str, tuple[str, dict[str, Any], int]] = {
    # label: name, options, gradients per step (for the progress bar)
    "SGD": ("sgd", {}, 1),
    "SAM": ("sam", {"rho": 1.0}, 2),
    "SGDS-0": ("sgds-0", {"delta": 0.08}, 2),
    "SGDS-5": ("sgds-5", {"delta": 0.08}, 7),
}
MEASURING: dict[str, Any] = {
    "delta": 0.05, "steps": 6, "restarts": 6, "sigma": 0.02, "draws": 40, "line": 41,
}
EPOCHS, BATCH, TRAIN = 100, 64, 800


def tasks(out: Path, seeds: int = 5, epochs: int = EPOCHS) -> list[Task]:
    """The demo's runs, one folder each under ``out``."""
    made = []
    for setting, data_options in SETTINGS.items():
        for label, (algorithm, options, cost) in ALGORITHMS.items():
            for seed in range(seeds):
                noise = round(100 * data_options.get("label_noise", 0.0))
                config = {
                    "data": "digits", "data_options": data_options, "model": "bn-mlp", "algorithm": algorithm,
                    "algorithm_options": options, "epochs": epochs, "batch_size": BATCH, "seed": seed,
                    "checkpoint_every": 20,
                }
                folder = out / "runs" / f"noise{noise}-{algorithm}-{seed}"
                made.append(Task(setting, label, config, str(folder), MEASURING, epochs * (TRAIN // BATCH), cost))
    return made


@dataclass(frozen=True)
class Column:
    """A row of the demo's table: its title, where it comes from, its factor, digits, and whether seeds differ."""

    title: str
    key: str
    factor: float = 1.0
    digits: int = 3
    varies: bool = True


COLUMNS = (
    Column("test accuracy, %", "test_accuracy", 100, 4),
    Column("training loss", "loss"),
    Column("BN-Sharpness", "bn_sharpness"),
    Column("… after rescaling", "bn_sharpness_rescaled"),
    Column("Gaussian sharpness", "gaussian"),
    Column("… after rescaling", "gaussian_rescaled"),
    Column("λ_max", "hessian_top"),
    Column("gradient evaluations", "gradient_evaluations", digits=6, varies=False),
    Column("seconds of training", "seconds", digits=3),
)


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting and algorithm: mean and 95% half width of every column, over seeds."""
    rows = []
    for setting in SETTINGS:
        for label in ALGORITHMS:
            mine = [r for r in results if r["setting"] == setting and r["label"] == label]
            row: dict[str, Any] = {"setting": setting, "algorithm": label, "seeds": len(mine)}
            for column in COLUMNS:
                mean, half = mean_interval([column.factor * r[column.key] for r in mine])
                row[column.key], row[f"{column.key}_ci95"] = mean, half
            rows.append(row)
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The table as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write(out: Path, results: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """Write the table and the figure; where they are."""
    from bnsharp.experiments.figures import demo_figure

    table, figure = out / "table.csv", out / "figure.png"
    write_atomic(table, to_csv(summarize(results)).encode())
    write_atomic(figure, demo_figure(results, list(SETTINGS), list(ALGORITHMS), MEASURING["delta"]))
    return {"table": table, "figure": figure}


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    by = {(r["setting"], r["algorithm"]): r for r in rows}
    clean, noisy = SETTINGS
    lines = []
    for setting in (clean, noisy):
        base = by[setting, "SGD"]
        best = max((by[setting, a] for a in ALGORITHMS), key=lambda r: r["test_accuracy"])
        if best is base or best["test_accuracy"] - base["test_accuracy"] < (
            best["test_accuracy_ci95"] + base["test_accuracy_ci95"]
        ):
            lines.append(f"With {setting}: no algorithm is clearly better than SGD "
                         f"({base['test_accuracy']:.1f}% test accuracy).")
        else:
            lines.append(
                f"With {setting}: {best['algorithm']} reaches {best['test_accuracy']:.1f}% test accuracy, SGD "
                f"{base['test_accuracy']:.1f}% (its training loss on those labels is {base['loss']:.2g} against "
                f"{best['loss']:.2g}: SGD memorises them)."
            )

    def spread(key: str) -> float:
        pairs = [(r[key], r[f"{key}_rescaled"]) for r in rows]
        return max(max(a, b) / min(a, b) if min(a, b) > 0 else float("inf") for a, b in pairs)

    lines.append(
        "Rescaling each network's filters at random by 0.1 to 10 leaves its function as it is. BN-Sharpness changes by "
        f"a factor of at most {spread('bn_sharpness'):.6f}, Gaussian sharpness by up to {spread('gaussian'):.3g}."
    )
    return lines
