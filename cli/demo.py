"""``bnsharp demo``: what does it do for me?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="folder for run folders, table and figure")] = Path("bnsharp-demo"),
    seeds: Annotated[int, typer.Option(min=2, help="seeds per algorithm and setting")] = 5,
    epochs: Annotated[int, typer.Option(min=6, help="epochs per run")] = 100,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: one per core)")] = None,
) -> None:
    """Train SGD, SAM, SGDS-0 and SGDS-5 on digits, with clean and with wrong labels, and compare what they reach.

    Finished runs in the folder are kept and not run again.
    """
    from bnsharp.cli.display import console, fitted, progress, with_interval
    from bnsharp.experiments import demo as study
    from bnsharp.experiments.study import run_study, units

    tasks = study.tasks(out, seeds, epochs)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with progress(f"{len(tasks)} runs", sum(units(t) for t in tasks), "units") as bar:
            results = run_study(tasks, bar.advance, workers)
    except (KeyboardInterrupt, SystemExit) as stop:  # SIGINT, SIGTERM
        typer.echo(f"bnsharp: stopped; finished runs are kept in {out}: the same command goes on from there", err=True)
        raise typer.Exit(143 if isinstance(stop, SystemExit) else 130) from None
    rows = study.summarize(results)
    files = study.write(out, results)
    screen = console()
    for setting in study.SETTINGS:
        mine = [r for r in rows if r["setting"] == setting]
        shown = [
            [c.title, *(with_interval(r[c.key], r[f"{c.key}_ci95"] if c.varies else math.nan, c.digits) for r in mine)]
            for c in study.COLUMNS
        ]
        title = f"digits, {setting} ({seeds} seeds, mean ± 95% interval)"
        screen.print(fitted(screen.width, title, ["", *(r["algorithm"] for r in mine)], shown))
    for line in study.verdict(rows):
        screen.print(line)
    screen.print(f"run folders: {out / 'runs'}   table: {files['table']}   figure: {files['figure']}")
