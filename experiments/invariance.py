"""Which measures are those of the function: every measure before and after transformations that keep the function.

For a measure S and a transformation T the relative change ``|S(Tθ) − S(θ)| / |S(θ)|`` over k random T, next to the
part of it that the measure's own stated errors explain. All randomness inside a measure is the same on both sides.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnsharp import measures
from bnsharp import params as P
from bnsharp.checkpoint import to_json, write_atomic
from bnsharp.checks import whole
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.measuring import doubled
from bnsharp.experiments.objectives import objective_of, probe_batch
from bnsharp.modes import exact_norms, measuring
from bnsharp.transformations import Transformation, find
from bnsharp.types import Estimate, Params

CHEAP: dict[str, Any] = {"steps": 5, "draws": 50, "restarts": 0, "polish": 0, "iterations": 40, "certify": 0}
"""Settings of every measure that has the option, unless said otherwise: a small network takes about a minute."""
LARGE: dict[str, dict[str, Any]] = {
    "bn_ball": {"delta": 0.3}, "bn_gaussian": {"sigma": 0.3}, "bn_entropy": {"gamma": 10.0},
    "bn_random_line": {"delta": 0.3}, "gaussian": {"sigma": 0.05}, "lebesgue_ball": {"delta": 3.0},
    "local_entropy": {"gamma": 400.0}, "largest_sigma": {"halvings": 8, "draws": 20},
    "largest_sigma_accuracy": {"halvings": 8, "draws": 20},
}
"""Settings of single measures: perturbations so large that few draws see more than their own noise."""
SIGMAS = 4.0
"""Standard errors of a difference that sampling is taken to explain."""
ROUNDING = 1e-6
"""Relative changes below this are rounding, amplified by a search; above, they need an explanation."""
OUTPUT = "network output"
"""The row that shows that the function stays."""


@dataclass(frozen=True)
class Cell:
    """Relative changes of one quantity under k draws of one transformation.

    Attributes:
        median, largest: of ``|S(Tθ) − S(θ)| / |S(θ)|``; infinite where S(θ) = 0 and S(Tθ) is not.
        ratio: the largest factor between S(Tθ) and S(θ), either way; infinite where the sign changes.
        explained: the largest relative change that stated errors explain:
            ``SIGMAS·√(stderr² + stderr'²) + error + error'``, over ``|S(θ)|``.
        changed: whether a change is larger than ``ROUNDING`` and than what its errors explain.
        draws: k.
    """

    median: float
    largest: float
    ratio: float
    explained: float
    changed: bool
    draws: int


@dataclass(frozen=True)
class Row:
    """One measure: its value at θ, its options, and a cell per transformation (None where it applies nowhere)."""

    value: float
    stderr: float
    error: float
    cells: dict[str, Cell | None]
    options: dict[str, Any]
    seconds: float


def cell(base: Estimate, others: Sequence[Estimate]) -> Cell:
    """The changes from ``base`` to ``others``."""
    size = abs(base.value)

    def relative(difference: float) -> float:
        return difference / size if size else (0.0 if difference == 0 else math.inf)

    changes = [relative(abs(e.value - base.value)) for e in others]
    explained = [
        relative(SIGMAS * math.hypot(e.stderr, base.stderr) + e.error + base.error) for e in others
    ]
    return Cell(
        statistics.median(changes), max(changes), max(_ratio(base.value, e.value) for e in others), max(explained),
        any(c > max(e, ROUNDING) for c, e in zip(changes, explained, strict=True)), len(others),
    )


def _ratio(a: float, b: float) -> float:
    if a == b:
        return 1.0
    return max(a / b, b / a) if a * b > 0 else math.inf


def cheap_options(name: str) -> dict[str, Any]:
    """The options of :data:`CHEAP` and :data:`LARGE` that the named measure has."""
    known = measures.MEASURES[name].options()
    return {k: v for k, v in {**CHEAP, **LARGE.get(name, {})}.items() if k in known}


class Matrix:
    """A network's transformations, and one row per measure on demand.

    On the first ``examples`` training examples as one batch, with batch statistics, in float64.

    Args:
        transformations: k, how many times each transformation is drawn.
        examples: how many training examples (all by default).
        low, high: range of the random factors.
        exact: with every normalizer's ε negligible; otherwise rescaling is an approximate invariance only.
        seed: of the transformations and of every measure.

    Raises:
        InputError: a network that does not take the data or where no transformation applies.
    """

    def __init__(
        self, module: nn.Module, data: ImageData, *, transformations: int = 5, examples: int | None = None,
        low: float = 0.1, high: float = 10.0, exact: bool = True, seed: int = 0,
    ):
        self.draws, self.seed, self.exact = whole("transformations", transformations), whole("seed", seed, 0), exact
        self.module, self.theta = module, doubled(module)
        self.objective = objective_of(module, data, examples, dtype=torch.float64)
        self.inputs = data.train_set(examples)[0].double()
        try:
            with torch.no_grad():
                self.objective(self.theta)
            self.found = find(module, probe_batch(data), seed=seed, low=low, high=high)
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{type(module).__name__} does not take {data.name}'s inputs of shape {data.input_shape} "
                             f"and {len(data.classes)} classes ({str(error).splitlines()[0][:100]})") from error
        if not self.applicable:
            raise InputError(f"no transformation of {type(module).__name__} keeps its function; expected scale groups, "
                             "or hidden channels that can be rescaled or permuted: there is nothing to compare")

    @property
    def applicable(self) -> list[Transformation]:
        """The transformations that apply somewhere."""
        return [t for t in self.found.values() if t.sites]

    def build(self, options: Mapping[str, Mapping[str, Any]]) -> dict[str, measures.Measured]:
        """Measures by name with cheap settings, where ``options`` do not say otherwise."""
        groups = self.found["rescaling"].groups  # type: ignore[attr-defined]
        return {k: measures.build_measure(k, groups, **{**cheap_options(k), **o}) for k, o in options.items()}

    def cost(self, measure: measures.Measured) -> int:
        """About how many evaluations a row takes: for progress displays."""
        return measure.cost() * (1 + self.draws * len(self.applicable))

    def points(self, transformation: Transformation) -> list[Params]:
        """The k transformed networks, each made when it is asked for."""
        device = P.first(self.theta).device

        def make(i: int) -> Params:
            return transformation.apply(self.theta, P.seeded(1000 * self.seed + i, device))

        return P.Lazy(self.draws, make)  # type: ignore[return-value]

    def output(self) -> Row:
        """Change of the network's output: the largest, relative to the root mean square of all outputs."""
        started = time.perf_counter()
        with self._norms():
            base = self._outputs(self.theta)
            size = float(base.square().mean().sqrt()) or 1.0
            cells = {
                t.name: _output_cell([float((self._outputs(p) - base).abs().max()) / size for p in self.points(t)])
                if t.sites else None
                for t in self.found.values()
            }
        return Row(size, 0.0, 0.0, cells, {}, time.perf_counter() - started)

    def row(self, measure: measures.Measured, options: dict[str, Any]) -> Row:
        """One measure at θ and at every transformed network, with the same seed."""
        started = time.perf_counter()
        with self._norms():
            base = self._measured(measure, self.theta)
            cells = {
                t.name: cell(base, [self._measured(measure, p) for p in self.points(t)]) if t.sites else None
                for t in self.found.values()
            }
        return Row(base.value, base.stderr, base.error, cells, options, time.perf_counter() - started)

    def _norms(self) -> AbstractContextManager[Any]:
        return exact_norms(self.module) if self.exact else nullcontext()

    def _measured(self, measure: measures.Measured, params: Params) -> Estimate:
        return measure(self.objective, params, P.seeded(self.seed, P.first(params).device))

    def _outputs(self, params: Params) -> Tensor:
        rest = [*self.module.named_parameters(), *self.module.named_buffers()]
        others = {k: t.detach().double() for k, t in rest if t.is_floating_point() and k not in params.keys()}
        with torch.no_grad(), measuring(self.module):
            made: Tensor = torch.func.functional_call(self.module, {**others, **dict(params.items())}, (self.inputs,))
        return made


def _output_cell(changes: Sequence[float]) -> Cell:
    largest = max(changes)
    return Cell(statistics.median(changes), largest, 1.0 + largest, 0.0, largest > ROUNDING, len(changes))


def compare(
    matrix: Matrix,
    options: Mapping[str, Mapping[str, Any]],
    rows: dict[str, Row],
    failed: dict[str, str],
    *,
    on_start: Callable[[int], None] = lambda total: None,
    on_measure: Callable[[str], None] = lambda name: None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Fill ``rows`` one after the other, the output first, so that an interruption keeps what is finished.

    A measure that cannot be taken at one of the networks is told in ``failed`` and left out.

    Raises:
        InputError: bad options, before anything is measured; every measure failed.
    """
    built = matrix.build(options)
    rows[OUTPUT] = matrix.output()
    on_start(sum(matrix.cost(m) for m in built.values()))
    spent = 0

    def count(n: int) -> None:
        nonlocal spent
        spent += n
        advance(n)

    matrix.objective.on_evaluation = count
    for name, measure in built.items():
        on_measure(name)
        spent = 0
        try:
            rows[name] = matrix.row(measure, {**measures.MEASURES[name].options(), **cheap_options(name),
                                              **options[name]})
        except InputError as error:
            failed[name] = str(error)
        advance(max(0, matrix.cost(measure) - spent))
    if len(failed) == len(built):
        raise InputError(f"none of the measures can be taken: {next(iter(failed.values()))}")


# ---------------------------------------------------------------- what is written


def summary(matrix: Matrix, rows: Mapping[str, Row], failed: Mapping[str, str], settings: Mapping[str, Any]) -> Any:
    """Everything, as plain values for JSON."""
    cells = {name: {k: None if c is None else asdict(c) for k, c in row.cells.items()} for name, row in rows.items()}
    return {
        "settings": dict(settings),
        "sites": {t.name: len(t.sites) for t in matrix.found.values()},
        "output": cells.get(OUTPUT),
        "measures": {
            name: {"value": r.value, "stderr": r.stderr, "error": r.error, "transformations": cells[name],
                   "options": r.options, "seconds": r.seconds}
            for name, r in rows.items() if name is not OUTPUT
        },
        "failed": dict(failed),
    }


def to_csv(rows: Mapping[str, Row]) -> str:
    """One line per measure and transformation that applies."""
    buffer = io.StringIO()
    fields = ["measure", "transformation", "value", "stderr", "error", *Cell.__dataclass_fields__]
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    for name, row in rows.items():
        for transformation, c in row.cells.items():
            if c is not None:
                writer.writerow({"measure": name, "transformation": transformation, "value": row.value,
                                 "stderr": row.stderr, "error": row.error, **asdict(c)})
    return buffer.getvalue()


def text(c: Cell | None) -> str:
    """A cell's largest change: ``2e-15``, ``0.3``, from a factor 2 on ``23×``; ``≈`` where stated errors explain it."""
    if c is None:
        return "–"
    factor = c.ratio >= 2 and math.isfinite(c.ratio)
    shown = _short(c.ratio) + "×" if factor else _short(c.largest)
    return f"≈ {shown}" if is_explained(c) else shown


def is_explained(c: Cell) -> bool:
    """Whether the value moved, by no more than its stated errors."""
    return not c.changed and c.largest > ROUNDING


def _short(value: float) -> str:
    """Two digits between 0.01 and 100, whole numbers up to 1000, else a power of ten with one digit."""
    if value == 0 or 0.01 <= value < 999.5:
        return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"
    if not math.isfinite(value):
        return "∞"
    digits, _, power = f"{value:.0e}".partition("e")
    return f"{digits}e{int(power)}"


TITLES = {"rescaling": "rescaling of\nscale groups", "relu_rescaling": "rescaling across\nReLU",
          "permutation": "permutation of\nchannels"}


def figure(rows: Mapping[str, Row], title: str) -> bytes:
    """A heat map of the largest relative change, log10, with the numbers in the cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    names = list(next(iter(rows.values())).cells)
    low, high = -16.0, 2.0
    colors = LinearSegmentedColormap.from_list("change", ["#1b6ca8", "#a9cfe8", "#f7f3e9", "#f2a65a", "#b3261e"])
    cells = [list(row.cells.values()) for row in rows.values()]
    shown = [[math.nan if c is None or is_explained(c) else _log10(c.largest, low, high) for c in r] for r in cells]
    image, axis = plt.subplots(figsize=(2.6 + 1.75 * len(names), 1.9 + 0.42 * len(rows)), layout="constrained")
    mesh = axis.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(cells):
        for j, c in enumerate(row):
            value = shown[i][j]
            if c is not None and math.isnan(value):
                axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc="#ececec", ec="#d2d2d2", hatch="///", lw=0))
            dark = abs(value - (low + high) / 2) > 0.3 * (high - low)  # False for NaN
            axis.text(j, i, text(c), ha="center", va="center", fontsize=10, color="white" if dark else "black",
                      weight="bold" if c is not None and c.changed else "normal")
    axis.set_xticks(range(len(names)), [TITLES.get(n, n) for n in names])
    axis.set_yticks(range(len(rows)), list(rows))
    axis.tick_params(length=0)
    axis.set_xticks([j - 0.5 for j in range(1, len(names))], minor=True)
    axis.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axis.grid(which="minor", color="white", lw=2)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)
    if OUTPUT in rows and len(rows) > 1:
        axis.axhline(0.5, color="black", lw=1.2)
    image.colorbar(mesh, ax=axis, label="log10 of the largest relative change", ticks=range(-16, 3, 3), pad=0.02)
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.set_xlabel("a×: by a factor a     ≈ (hatched): within the stated errors     –: applies nowhere", fontsize=9)
    buffer = io.BytesIO()
    image.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(image)
    return buffer.getvalue()


def _log10(value: float, low: float, high: float) -> float:
    return min(max(math.log10(value), low), high) if value > 0 else low


def check_out(out: Path) -> None:
    """Raise :class:`InputError` unless files can be written into ``out``; nothing is made."""
    existing = next(p for p in (out, *out.parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; expected a folder for the matrix: choose another --out")


def write(out: Path, results: Any, rows: Mapping[str, Row], title: str) -> dict[str, Path]:
    """Write JSON, CSV and figure, each atomically; where they are."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {"json": (to_json(results, indent=2) + "\n").encode(), "csv": to_csv(rows).encode(),
                "png": figure(rows, title)}
    paths = {kind: out / f"invariance.{kind}" for kind in contents}
    for kind, content in contents.items():
        write_atomic(paths[kind], content)
    return paths
