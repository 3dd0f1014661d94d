"""The ``bnsharp`` command. Torch is imported only when a command needs it."""

from __future__ import annotations

import sys

import typer
from bnsharp.cli import demo, listing, measure, train

app = typer.Typer(
    name="bnsharp",
    help="Sharpness of neural-network minima, measured and regularised so that equal functions get equal values.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("measure")(measure.measure)
app.command("list")(listing.listing)


def main() -> None:
    """Run the command line: exit code 0 on success, 2 on bad usage with one line, 1 where training failed."""
    from bnsharp.types import DivergedError, InputError

    try:
        app()
    except InputError as error:
        print(f"bnsharp: {error}", file=sys.stderr)
        sys.exit(2)
    except DivergedError as error:
        print(f"bnsharp: training stopped: {error}", file=sys.stderr)
        sys.exit(1)
