"""The smallest command line of two commands: what ``--help`` of any Typer program costs."""

from __future__ import annotations

import typer

app = typer.Typer(help="Two commands.", add_completion=False, pretty_exceptions_enable=False)


@app.command()
def first(number: int = 1) -> None:
    """Print a number."""
    print(number)


@app.command()
def second(text: str = "") -> None:
    """Print a text."""
    print(text)


if __name__ == "__main__":
    app()
