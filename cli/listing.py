"""``bnsharp list``: measures, algorithms, models, data."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items())


def listing(
    what: Annotated[str, typer.Argument(help="measures, algorithms, models or data; all of them by default")] = "",
) -> None:
    """List the measures, algorithms, models and data sets that there are, with their options."""
    from bnsharp.cli.display import console, table

    from bnsharp import algorithms, data, measures, models
    from bnsharp.types import InputError, suggest

    tables = {
        "measures": (
            ("measure", "what it is", "invariant", "options", "source"),
            [(n, s.summary, "yes" if s.invariant else "no", _options(s.options()), s.source)
             for n, s in measures.MEASURES.items()],
        ),
        "algorithms": (
            ("algorithm", "what it does", "options", "source"),
            [(n, f.summary, _options(algorithms.options_of(f)), f.source) for n, f in algorithms.FAMILIES.items()],
        ),
        "models": (
            ("model", "what it is", "options", "source"),
            [(n, s.summary, _options(s.options), s.source) for n, s in models.MODELS.items()],
        ),
        "data": (
            ("data", "what it is", "source"),
            [(n, s.summary, s.source) for n, s in data.DATASETS.items()]
            + [("FOLDER", "any folder with train/CLASS/* and test/CLASS/* images", "-")],
        ),
    }
    if what and what not in tables:
        raise InputError(f"cannot list {what!r}; expected one of {', '.join(tables)}" + suggest(what, tables))
    for name in [what] if what else tables:
        columns, rows = tables[name]
        console().print(table(name, columns, rows, right=False))
