"""``bnsharp measure``: any measures of any network."""

from __future__ import annotations

from typing import Annotated, Any

import typer

DEFAULT = ("bn_sharpness", "gaussian", "hessian_top")


def measure(
    source: Annotated[str, typer.Argument(help="a run folder, a checkpoint, torchvision:NAME or timm:NAME")],
    data: Annotated[str | None, typer.Option(help="data set or image folder; a run folder's own by default")] = None,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", metavar="NAME", help=f"repeatable (default: {', '.join(DEFAULT)})")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option of the measures that have it: delta=0.05, "
                     "or of one: gaussian.draws=500"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the model that a bare checkpoint holds")] = None,
    examples: Annotated[int | None, typer.Option(help="training examples measured on, as one batch (all)")] = None,
    statistics: Annotated[str, typer.Option(help="normalizers' statistics: batch or running")] = "batch",
    precision: Annotated[str, typer.Option(help="float64 or float32")] = "float64",
    exact: Annotated[bool, typer.Option("--exact-norms", help="with every normalizer's eps negligible")] = False,
    seed: Annotated[int, typer.Option(help="of draws, random starts and untrained networks")] = 0,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Measure the sharpness of a network on its training data, with sampling and numerical errors."""
    from bnsharp.checkpoint import to_json
    from bnsharp.cli.display import console, load_progress, number, progress, table
    from bnsharp.experiments.measuring import measure_all, options_for
    from bnsharp.experiments.sources import open_source

    names = list(dict.fromkeys(measures or DEFAULT))
    options = options_for(names, set_ or [])
    opened = open_source(source, data=data, model=model, seed=seed, progress=load_progress("reading images"))
    with progress("measuring", 0, "evaluations") as bar:
        results: dict[str, Any] = measure_all(
            opened.module, opened.data, options, examples=examples, statistics=statistics, precision=precision,
            exact=exact, seed=seed, on_start=bar.start, on_measure=bar.note, advance=bar.advance,
        )
    if json:
        print(to_json(results))
        return
    rows = [
        (name, number(r["value"], 6), number(r["stderr"], 2), number(r["error"], 2), number(r["upper"], 6),
         f"{r['seconds']:.1f}")
        for name, r in results.items()
    ]
    first = next(iter(results.values()))
    title = (f"{source}: {first['batch_size']} examples, {first['statistics']} statistics, {precision}"
             f"{', exact norms' if exact else ''}")
    console().print(table(title, ("measure", "value", "± sampling", "± numerical", "upper", "seconds"), rows))
