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
    track: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="measures to take along training (bnsharp list measures)")
    ] = None,
    every: Annotated[int | None, typer.Option(help="epochs from one tracking to the next (default: 1)")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any other setting: delta=0.05, label_noise=0.4, ema=0.99, …"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="run folder (default: runs/DATA-MODEL-ALGORITHM-SEED)")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the folder's checkpoint; start where there is none")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that the folder holds")] = False,
) -> None:
    """Train a network with a named algorithm into a run folder: configuration, metrics, timing, checkpoint, summary."""
    from bnsharp.checkpoint import CHECKPOINT, RunFolder
    from bnsharp.cli.display import console, dashboard, load_progress, table
    from bnsharp.distributed import joined
    from bnsharp.errors import InputError, Interrupted, Terminated
    from bnsharp.experiments.config import make_config
    from bnsharp.experiments.run import train as run
    from bnsharp.experiments.tracking import cost

    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other; expected one of them")
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "track": track, "track_every": every}
    values: dict[str, Any] = {"data": data, "model": model, "algorithm": algorithm}
    config = make_config({**values, **{k: v for k, v in given.items() if v is not None}}, set_)
    name = f"{Path(config.data).name}-{config.model.replace(':', '-')}-{config.algorithm}-{config.seed}"
    where, tracked = out or Path("runs") / name, Latest()
    try:
        with (
            joined(config.device) as ranks, dashboard(f"{config.algorithm} on {Path(config.data).name}") as screen,
        ):

            def on_epoch(record: dict[str, Any]) -> None:
                tracked.see(record)
                screen.show({"epoch": f"{record['epoch']}/{config.epochs}", **numbers(record), **tracked.shown()})

            _, result = run(
                config, where, resume=resume, overwrite=overwrite, ranks=ranks, on_start=screen.bar.start,
                on_step=lambda epoch, step: screen.bar.advance(1), on_epoch=on_epoch,
                progress=load_progress("reading images"),
            )
    except (Interrupted, Terminated) as stop:
        typer.echo(f"bnsharp: {stop}: go on with --resume", err=True)
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    except KeyboardInterrupt:
        if not (where / CHECKPOINT).exists():
            raise
        typer.echo(f"bnsharp: stopped at once; the last checkpoint is kept in {where}: go on with --resume", err=True)
        raise typer.Exit(130) from None
    if not ranks.is_first:
        return
    record, spent = result.last, cost(RunFolder(where))
    for each in result.history:
        tracked.see(each)
    rows = {
        **numbers(record), "gradient evaluations": str(record["gradient_evaluations"]), **tracked.shown(),
        **({} if spent is None else {"evaluations for tracking": f"{spent[0]} ({spent[1]:.1f} s)"}),
    }
    console().print(table(f"{config.algorithm} on {Path(config.data).name}, epoch {record['epoch']}", ("", "value"),
                          list(rows.items())))
    console().print(f"run folder: {where}")


SHOWN = {
    "loss": "loss", "accuracy": "training accuracy", "test_accuracy": "test accuracy",
    "ema_test_accuracy": "test accuracy, averaged weights", "penalty": "penalty", "ratio": "|λr|/|∇L|",
    "lr": "learning rate", "parameter_norm": "parameter norm",
}
"""What is shown of an epoch's record, where it has it."""


def numbers(record: dict[str, Any]) -> dict[str, str]:
    """An epoch's numbers for the screen; fractions that are accuracies as per cent."""
    from bnsharp.cli.display import number

    def text(key: str, value: float | None) -> str:
        return f"{100 * value:.2f}%" if key.endswith("accuracy") and value is not None else number(value)

    return {label: text(key, record[key]) for key, label in SHOWN.items() if key in record}


class Latest:
    """The values of the last tracked epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.values: dict[str, Any] = {}

    def see(self, record: dict[str, Any]) -> None:
        """Take note of an epoch's record."""
        from bnsharp.experiments.tracking import tracked_values

        found = tracked_values(record)
        if found and record["epoch"] >= self.epoch:
            self.epoch, self.values = record["epoch"], found

    def shown(self) -> dict[str, str]:
        """The values for the screen, each with its epoch."""
        from bnsharp.cli.display import number

        return {f"{name} (epoch {self.epoch})": number(value) for name, value in self.values.items()}
