"""``bnsharp compare``: algorithms side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    data: Annotated[str, typer.Option(help="a data set (bnsharp list data) or an image folder")] = "digits",
    model: Annotated[str, typer.Option(help="a model (bnsharp list models)")] = "bn-mlp",
    algorithm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:KEY=VALUE,…]", help="a row (default: every algorithm with its preset)"),
    ] = None,
    rows: Annotated[str, typer.Option(help="which rows where none is named: algorithms or ablation")] = "algorithms",
    label_noise: Annotated[float, typer.Option(help="fraction of training labels replaced at random")] = 0.0,
    seeds: Annotated[int, typer.Option(min=2, help="seeds per row")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="epochs per run")] = 100,
    together: Annotated[
        int | None, typer.Option(min=1, help="seeds of a row trained at once (default: all, where that is faster)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting of every run: lr=0.1, …")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder (default: runs/compare-ROWS-DATA-MODEL-NOISE)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: one per core)")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of the table")] = False,
) -> None:
    """Train every algorithm over seeds and print accuracy, final sharpness and cost relative to SGD.

    Finished runs in the folder are kept and not run again. Entropy-SGD trains a fifth of the epochs: each of its steps
    takes 20 batches.
    """
    from bnsharp.cli.display import console, fitted, progress
    from bnsharp.errors import InputError
    from bnsharp.experiments import comparison
    from bnsharp.experiments.config import make_config
    from bnsharp.experiments.run import load_data
    from bnsharp.experiments.study import run_study, units
    from bnsharp.experiments.together import obstacle

    chosen = comparison.rows_of(rows, algorithm or [])
    comparison.check_settings(set_ or [], label_noise)
    settings = [*(set_ or []), *([f"label_noise={label_noise}"] if label_noise else [])]
    where = out or Path("runs") / f"compare-{rows}-{Path(data).name}-{model.replace(':', '-')}-{label_noise:g}"
    loaded = load_data(make_config({"data": data, "model": model}, settings))
    at_once = seeds if together is None else together
    if at_once > 1:
        reason = obstacle(make_config({"data": data, "model": model}, settings), forced=together is not None)
        if reason is not None and together is not None:
            raise InputError(f"--together {together}: {reason}")
        if reason is not None:
            typer.echo(f"bnsharp: seeds are trained one after the other: {reason}", err=True)
            at_once = 1
    tasks = comparison.tasks(where, chosen, settings, data=data, model=model, seeds=seeds, epochs=epochs,
                             train_size=lambda options: len(loaded.train_labels), together=at_once)
    comparison.check(tasks, loaded)
    where.mkdir(parents=True, exist_ok=True)
    try:
        with progress(f"{len(tasks)} runs", sum(units(t) for t in tasks), "units") as bar:
            results = run_study(tasks, bar.advance, workers)
    except (KeyboardInterrupt, SystemExit) as stop:  # SIGINT, SIGTERM
        typer.echo(f"bnsharp: stopped; finished runs are kept in {where}: the same command goes on", err=True)
        raise typer.Exit(143 if isinstance(stop, SystemExit) else 130) from None
    reference = comparison.BASELINE if algorithm else comparison.REFERENCE[rows]
    lines = comparison.summarize(list(chosen), results, reference)
    files = comparison.write(where, lines, results, reference)
    if json:
        typer.echo(files["results.json"].read_text().rstrip())
        return
    shown = [[r["row"], *(comparison.cell(r, key, digits) for _, key, _, digits in comparison.COLUMNS)] for r in lines]
    noise = f", {100 * label_noise:g}% of the training labels replaced" if label_noise else ""
    title = f"{Path(data).name}, {model}{noise} ({seeds} seeds, mean ± 95% interval; differences paired by seed)"
    screen = console()
    screen.print(fitted(screen.width, title, ["", *comparison.titles(reference)], shown))
    screen.print(f"run folders: {where / 'runs'}   table: {files['table.md']}, {files['table.csv']}")
