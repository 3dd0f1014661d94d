"""``bnsharp invariance``: which measures give equal functions equal values?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def invariance(
    source: Annotated[str, typer.Argument(help="a run folder, a checkpoint, torchvision:NAME or timm:NAME")],
    data: Annotated[str | None, typer.Option(help="data set or image folder; a run folder's own by default")] = None,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", metavar="NAME", help="repeatable (default: all of them)")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option of the measures that have it: delta=0.05, "
                     "or of one: gaussian.draws=500"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the model that a bare checkpoint holds")] = None,
    weights: Annotated[
        str, typer.Option(help="of a run: trained, or an average that it kept (ema, of a run with ema=…)")
    ] = "trained",
    transformations: Annotated[int, typer.Option(help="random transformations of each kind")] = 5,
    examples: Annotated[int | None, typer.Option(help="training examples measured on, as one batch (all)")] = None,
    low: Annotated[float, typer.Option(help="smallest random factor")] = 0.1,
    high: Annotated[float, typer.Option(help="largest random factor")] = 10.0,
    exact: Annotated[
        bool, typer.Option("--exact-norms/--own-eps", help="every normalizer's eps negligible, or as it is")
    ] = True,
    seed: Annotated[int, typer.Option(help="of transformations, draws, random starts and untrained networks")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="folder for JSON, CSV and figure (the run folder, or bnsharp-invariance)")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Measure a network and equal ones (rescaled, permuted) and show which measures change.

    Searches are short and draws few unless --set says otherwise: what is compared is two networks, not two searches.
    """
    from bnsharp.checkpoint import to_json
    from bnsharp.cli.display import console, fitted, load_progress, number, progress
    from bnsharp.experiments import invariance as study
    from bnsharp.experiments.measuring import options_for
    from bnsharp.experiments.sources import open_source
    from bnsharp.measures import MEASURES

    options = options_for(list(dict.fromkeys(measures or MEASURES)), set_ or [])
    folder = out or (Path(source) if Path(source).is_dir() else Path("bnsharp-invariance"))
    study.check_out(folder)
    opened = open_source(source, data=data, model=model, seed=seed, weights=weights,
                         progress=load_progress("reading images"))
    rows: dict[str, study.Row] = {}
    failed: dict[str, str] = {}
    stopped = False
    with progress("measuring", 0, "evaluations") as bar:
        bar.note("looking for transformations")
        matrix = study.Matrix(
            opened.module, opened.data, transformations=transformations, examples=examples, low=low, high=high,
            exact=exact, seed=seed,
        )
        folder.mkdir(parents=True, exist_ok=True)  # told now if it cannot be made, not after minutes of measuring
        try:
            study.compare(matrix, options, rows, failed, on_start=bar.start, on_measure=bar.note, advance=bar.advance)
        except KeyboardInterrupt:
            stopped = True
    n = matrix.objective.batch_size
    settings: dict[str, Any] = {
        "source": source, "weights": weights, "examples": n,
        "transformations": transformations, "low": low, "high": high, "seed": seed,
        "exact_norms": exact, "precision": "float64", "statistics": "batch", "finished": not stopped,
    }
    results = study.summary(matrix, rows, failed, settings)
    averaged = "" if weights == "trained" else f" ({weights})"
    title = f"{Path(source).name}{averaged}: {n} examples of {opened.data.name}"
    paths = study.write(folder, results, rows, title) if rows else {}
    if json and not stopped:
        print(to_json(results))
    elif not json:
        kinds = list(matrix.found)
        shown = [(name, number(r.value, 4), *(study.text(r.cells[k]) for k in kinds)) for name, r in rows.items()]
        screen = console()
        heading = (f"{source}{averaged}: {n} examples, {transformations} transformations of each kind, "
                   "largest relative change")
        columns = ("measure", "value", *(k.replace("_", " ") for k in kinds))
        screen.print(fitted(screen.width, heading, columns, shown))
        screen.print("≈ within the measure's own stated errors   – applies nowhere   × factor between the two values")
        for name, reason in failed.items():
            screen.print(f"{name}: left out: {reason}")
        screen.print("   ".join(f"{kind}: {path}" for kind, path in paths.items()))
    if stopped:
        kept = f"; finished rows are kept in {folder}" if rows else ""
        typer.echo(f"bnsharp: stopped{kept}", err=True)
        raise typer.Exit(130)
