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
    from bnsharp import algorithms, data, measures, models
    from bnsharp.checks import suggest
    from bnsharp.cli.display import console, definitions
    from bnsharp.errors import InputError


    entries: dict[str, list[tuple[str, str, str, str]]] = {
        "measures": [
            (n, s.summary + (" (invariant under rescaling)" if s.invariant else ""), _options(s.options()), s.source)
            for n, s in measures.MEASURES.items()
        ],
        "algorithms": [
            (n, f.summary, _options(algorithms.own_options(f)), f.source) for n, f in algorithms.FAMILIES.items()
        ],
        "models": [
            *((n, s.summary, _options(s.options), s.source) for n, s in models.MODELS.items()),
            ("torchvision:NAME", "a classifier of torchvision, untrained", "those of its constructor", ""),
            ("timm:NAME", "a network of timm (the extra timm), untrained", "those of its constructor", ""),
        ],
        "data": [
            *((n, s.summary, "", s.source) for n, s in data.DATASETS.items()),
            ("FOLDER", "any folder with train/CLASS/* and test/CLASS/* images", "", ""),
        ],
    }
    if what and what not in entries:
        raise InputError(f"cannot list {what!r}; expected one of {', '.join(entries)}" + suggest(what, entries))
    for kind in [what] if what else entries:
        console().print(definitions(kind, entries[kind]))
