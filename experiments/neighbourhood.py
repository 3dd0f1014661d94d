"""Where the mass of a Gaussian neighbourhood lies: how far from θ the local entropy of a large network is decided.

``python -m bnsharp.experiments.neighbourhood FILE.png [FILE.svg …]`` draws the figure.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special

from bnsharp.checkpoint import write_atomic
from bnsharp.checks import one_of, whole
from bnsharp.errors import InputError
from bnsharp.experiments.figures import COLORS
from bnsharp.models import build

RADII = (1, 3, 10, 100, 1000)
"""Radii of the curves, in units of ``γ^{−1/2}``."""
DRAWN = (1, 2, 3, 5, 10, 20, 50, 100, 200)
"""Dimensions checked by drawing."""
DRAWS = 4000
FORMATS = (".png", ".svg")


def mass_inside(dimension: ArrayLike, radius: ArrayLike) -> NDArray[np.float64]:
    """``P(‖x‖ ≤ r)`` for ``x ~ N(0, I/γ)`` in d dimensions: ``P(d/2, γr²/2)``, the regularised lower gamma function.

    Args:
        dimension: d > 0.
        radius: ``r√γ ≥ 0``; broadcast against d.
    """
    return np.asarray(special.gammainc(np.asarray(dimension) / 2, np.square(radius, dtype=np.float64) / 2))


def distance_quantile(dimension: ArrayLike, probability: ArrayLike) -> NDArray[np.float64]:
    """The distance ``‖x‖√γ`` that a draw stays below with this probability: the inverse of :func:`mass_inside` in r."""
    return np.asarray(np.sqrt(2 * special.gammaincinv(np.asarray(dimension) / 2, probability)))


def drawn_inside(dimension: int, radius: float, draws: int, generator: torch.Generator) -> int:
    """How many of ``draws`` standard normal points of d coordinates lie within ``r√γ``: :func:`mass_inside` by drawing.

    Raises:
        InputError: fewer than one dimension or draw.
    """
    shape = whole("draws", draws), whole("dimension", dimension)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return int((torch.linalg.vector_norm(x, dim=1) <= radius).sum())


def agreement(count: int, draws: int) -> tuple[float, float]:
    """The exact (Clopper-Pearson) 95% interval of a probability seen ``count`` times in ``draws``."""
    low = special.betaincinv(count, draws - count + 1, 0.025) if count else 0.0
    high = special.betaincinv(count + 1, draws - count, 0.975) if count < draws else 1.0
    return float(low), float(high)


def network_sizes() -> dict[str, int]:
    """Trainable parameters of three networks: two for CIFAR-10, one for ImageNet."""
    from torchvision.models import resnet18

    with torch.device("meta"):
        large = resnet18()
    networks = {
        "LeNet-BN": build("lenet-bn", (3, 32, 32), 10, seed=0),
        "VGG11-BN": build("vgg11-bn", (3, 32, 32), 10, seed=0),
        "ResNet-18": large,
    }
    return {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in networks.items()}


def figure(sizes: dict[str, int], form: str = ".png", *, seed: int = 0) -> bytes:
    """Mass inside a radius against the dimension, with points by drawing, and how far draws lie; as a file's bytes.

    Args:
        sizes: numbers of parameters to mark, by network.
        form: one of :data:`FORMATS`.
        seed: of the draws.

    Raises:
        InputError: another format.
    """
    one_of("form", form, FORMATS)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "neighbourhood", "svg.fonttype": "path"}):
        drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        _mass(left, torch.Generator().manual_seed(seed))
        _distance(right)
        for axis in (left, right):
            _mark(axis, sizes)
            axis.set(xscale="log", xlim=(1, 1e8), xlabel="d, number of parameters")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        drawing.suptitle("Gaussian neighbourhood N(θ, I/γ) of a point θ in d dimensions", fontsize=12)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format=form[1:], dpi=130, metadata={"Software" if form == ".png" else "Date": None})
        plt.close(drawing)
    return buffer.getvalue()


def _mass(axis: Any, generator: torch.Generator) -> None:
    d = np.geomspace(1, 1e8, 1200)
    for color, radius in zip(COLORS, RADII, strict=False):
        axis.plot(d, mass_inside(d, radius), color=color, lw=1.8)
        half = d[int(np.abs(mass_inside(d, radius) - 0.5).argmin())]
        label = f"r√γ = {radius}" if radius == RADII[-1] else f"{radius}"
        axis.text(1.15 * half, 0.55, label, color=color, fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 0.8})
        for dimension in DRAWN if radius <= 10 else ():  # the others keep all their mass there
            count = drawn_inside(dimension, radius, DRAWS, generator)
            low, high = agreement(count, DRAWS)
            axis.plot([dimension] * 2, [low, high], color=color, lw=1)
            axis.plot(dimension, count / DRAWS, "o", color=color, ms=4, mfc="white")
    axis.set(title="share of its mass within distance r of θ", ylabel="P(‖v‖ ≤ r)", ylim=(-0.03, 1.05))
    axis.plot([], [], "o", color="k", ms=4, mfc="white", label=f"{DRAWS} draws")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.27, 0.3))


def _distance(axis: Any) -> None:
    d = np.geomspace(1, 1e8, 600)
    low, middle, high = (distance_quantile(d, p) for p in (0.001, 0.5, 0.999))
    axis.fill_between(d, low, high, color=COLORS[2], alpha=0.25, lw=0, label="99.8% of the mass")
    axis.plot(d, middle, color=COLORS[2], lw=1.8, label="median, about √d")
    axis.set(title="distance of its mass from θ", ylabel="‖v‖√γ", yscale="log", ylim=(1e-2, 2e4))
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _mark(axis: Any, sizes: dict[str, int]) -> None:
    """Vertical lines at networks' sizes; of two that are close the larger is named on its right."""
    last = 0.0
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        axis.axvline(size, color="k", lw=0.8, ls=":")
        near = size < 3 * last
        axis.text(size * (1.15 if near else 0.87), 0.3, name, rotation=90, fontsize=8, va="center",
                  ha="left" if near else "right", transform=axis.get_xaxis_transform())
        last = size


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figure into every file named; exit code 2 and one line where one cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m bnsharp.experiments.neighbourhood", description=__doc__)
    parser.add_argument("out", nargs="+", type=Path, metavar="FILE", help="where to write: NAME.png or NAME.svg")
    out: list[Path] = parser.parse_args(arguments).out
    try:
        for path in out:
            if path.suffix not in FORMATS:
                raise InputError(f"{path} ends in {path.suffix!r}; expected a name that ends in {' or '.join(FORMATS)}")
            if not path.parent.is_dir() or path.is_dir():
                raise InputError(f"{path} cannot be written; expected a file in a folder that exists")
        sizes = network_sizes()
        for path in out:
            write_atomic(path, figure(sizes, path.suffix))
    except InputError as error:
        print(f"neighbourhood: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
