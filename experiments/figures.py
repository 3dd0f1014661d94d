"""Figures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnsharp.experiments.statistics import mean_interval

COLORS = ("#4d4d4d", "#d98c00", "#2b7bba", "#b5179e", "#2a9d4a", "#c1272d")


def _band(axis: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: str, label: str) -> None:
    stats = [mean_interval(values) for values in zip(*curves, strict=True)]
    mean = np.array([m for m, _ in stats])
    half = np.nan_to_num(np.array([h for _, h in stats]))
    axis.plot(x, mean, color=color, label=label, lw=1.8)
    axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, lw=0)


def demo_figure(results: Sequence[dict[str, Any]], settings: Sequence[str], labels: Sequence[str],
                delta: float) -> bytes:
    """Per setting: the loss along the sharpest direction, and test accuracy along training; means and 95% bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 4 * len(settings)), squeeze=False, layout="constrained")
    for row, setting in zip(axes, settings, strict=True):
        for color, label in zip(COLORS, labels, strict=False):
            mine = [r for r in results if r["setting"] == setting and r["label"] == label]
            if not mine:
                continue
            rises = [[v - r["loss"] for v in r["line_loss"]] for r in mine]
            _band(row[0], mine[0]["line_t"], rises, color, label)
            epochs = [e for e, _ in mine[0]["curve"]]
            _band(row[1], epochs, [[100 * a for _, a in r["curve"]] for r in mine], color, label)
        row[0].axvspan(-delta, delta, color="k", alpha=0.06, lw=0)
        row[0].set(title=f"loss along the sharpest direction\n{setting}", ylabel="L(θ + t v) − L(θ)",
                   xlabel="t, relative to each filter's norm (shaded: where BN-Sharpness averages)")
        row[1].set(title=f"accuracy along training\n{setting}", xlabel="epoch", ylabel="test accuracy, %")
        low = min(100 * a for r in results if r["setting"] == setting for e, a in r["curve"] if e > 5)
        row[1].set_ylim(max(0.0, low - 3), 100.5)
        high = max(v - r["loss"] for r in results if r["setting"] == setting for v in r["line_loss"])
        row[0].set_ylim(-0.15 * high, 1.05 * high)
        for axis in row:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    seeds = len({r["seed"] for r in results})
    figure.suptitle(f"digits, BN perceptron: mean and 95% interval over {seeds} seeds", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
