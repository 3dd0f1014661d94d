"""``bnsharp train``: one run into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    data: Annotated[str, typer.Option(help="a data set (bnsharp list data) or an image folder")] = "digits",
    model: Annotated[str, typer.Option(help="a model (bnsharp list models)")] = "bn-mlp",
    algorithm: Annotated[str, typer.Option(help="an algorithm (bnsharp list algorithms)")] = "sgds-0",
    epochs: Annotated[int | None, typer.Option(help="passes over the data (default: 100)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per step (default: 64)")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate (default: 0.05)")] = None,
    seed: Annotated[int | None, typer.Option(help="of initialisation, order, directions (default: 0)")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any other setting: delta=0.05, label_noise=0.4, schedule=…"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="run folder (default: runs/DATA-MODEL-ALGORITHM-SEED)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the folder's checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that the folder holds")] = False,
) -> None:
    """Train a network with a named algorithm into a run folder: configuration, metrics, timing, checkpoint, summary."""
    from bnsharp.checkpoint import CHECKPOINT
    from bnsharp.cli.display import console, load_progress, number, progress, table
    from bnsharp.errors import InputError, Interrupted, Terminated
    from bnsharp.experiments.config import make_config
    from bnsharp.experiments.run import train as run

    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other; expected one of them")
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    values: dict[str, Any] = {"data": data, "model": model, "algorithm": algorithm}
    config = make_config({**values, **{k: v for k, v in given.items() if v is not None}}, set_)
    where = out or Path("runs") / f"{Path(config.data).name}-{config.model}-{config.algorithm}-{config.seed}"
    with progress(f"{config.algorithm} on {Path(config.data).name}", config.epochs) as bar:

        def on_epoch(record: dict[str, Any]) -> None:
            bar.note(f"epoch {record['epoch']}/{config.epochs}, loss {number(record['loss'])}, "
                     f"test accuracy {100 * record['test_accuracy']:.2f}%")

        try:
            _, result = run(
                config, where, resume=resume, overwrite=overwrite, on_start=bar.start,
                on_step=lambda epoch, step: bar.advance(1), on_epoch=on_epoch, progress=load_progress("reading images"),
            )
        except (Interrupted, Terminated) as stop:
            typer.echo(f"bnsharp: {stop}: go on with --resume", err=True)
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
        except KeyboardInterrupt:
            kept = "the last checkpoint is kept" if (where / CHECKPOINT).exists() else "nothing was saved yet"
            typer.echo(f"bnsharp: stopped at once; {kept} in {where}: go on with --resume", err=True)
            raise typer.Exit(130) from None
    record = result.last
    rows = {
        "test accuracy": f"{100 * record['test_accuracy']:.2f}%",
        "training accuracy": f"{100 * record['accuracy']:.2f}%",
        "loss": number(record["loss"]), "penalty": number(record["penalty"]),
        "|λr|/|∇L|": number(record["ratio"]), "gradient evaluations": str(record["gradient_evaluations"]),
        "parameter norm": number(record["parameter_norm"]),
    }
    console().print(table(f"{config.algorithm} on {Path(config.data).name}, epoch {record['epoch']}", ("", "value"),
                          list(rows.items())))
    console().print(f"run folder: {where}")
