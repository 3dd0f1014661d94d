"""``bnsharp measure``: any measures of any network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

DEFAULT = ("bn_sharpness", "gaussian", "hessian_top")


def measure(
    source: Annotated[
        str,
        typer.Argument(help="a run folder, a checkpoint, weights (.pt, .safetensors), torchvision:NAME or timm:NAME"),
    ],
    data: Annotated[str | None, typer.Option(help="data set or image folder; a run folder's own by default")] = None,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", metavar="NAME", help=f"repeatable (default: {', '.join(DEFAULT)})")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option of the measures that have it: delta=0.05, "
                     "or of one: gaussian.draws=500"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the network whose weights a file holds: a model, torchvision:NAME or timm:NAME")
    ] = None,
    model_set: Annotated[
        list[str] | None, typer.Option("--model-set", metavar="KEY=VALUE", help="an option of that model: width=8")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="the first so many training examples (default: all)")] = None,
    batch_size: Annotated[
        int, typer.Option(help="examples per batch; the data is streamed, each batch with its own statistics")
    ] = 2000,
    weights: Annotated[
        str, typer.Option(help="of a run: trained, or an average that it kept (ema, of a run with ema=…)")
    ] = "trained",
    statistics: Annotated[str, typer.Option(help="normalizers' statistics: batch or running")] = "batch",
    precision: Annotated[str, typer.Option(help="float64 or float32")] = "float64",
    promote: Annotated[
        bool, typer.Option(help="take a float32 value again in float64 when its rounding error is too large for it")
    ] = True,
    target_error: Annotated[
        float | None,
        typer.Option(help="sample on until the 95% interval's half width is at most this fraction of the value"),
    ] = None,
    deflate: Annotated[
        int,
        typer.Option(help="of a trace (hessian_trace, relative_trace): products spent first on the sharpest "
                     "directions, whose part is then exact"),
    ] = 0,
    engine: Annotated[
        str, typer.Option(help="how several points are evaluated: loop, vmap, vmap:CHUNK, compiled, compiled:CHUNK, or "
                          "the fastest by a short timing that is kept: auto, auto:compiled")
    ] = "loop",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="say on standard error which engine was taken, and the times of all tried")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact-norms", help="with every normalizer's eps negligible")] = False,
    seed: Annotated[int, typer.Option(help="of draws, random starts and untrained networks")] = 0,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Measure the sharpness of a network on its training data, with sampling and numerical errors."""
    from bnsharp.checkpoint import to_json
    from bnsharp.cli.display import console, fitted, load_progress, number, progress
    from bnsharp.engines import Engine
    from bnsharp.experiments.config import parse_setting
    from bnsharp.experiments.measuring import Setting, measure_each, options_for
    from bnsharp.experiments.sources import open_source

    given = Engine.parse(engine)
    names = list(dict.fromkeys(measures or DEFAULT))
    options = options_for(names, set_ or [])
    setting = Setting(
        examples=examples, batch_size=batch_size, statistics=statistics, precision=precision, promote=promote,
        exact=exact, seed=seed, target=target_error, engine=engine,
        deflate=deflate,
    )
    opened = open_source(
        source, data=data, model=model, model_options=dict(parse_setting(s) for s in model_set or []), seed=seed,
        weights=weights, progress=load_progress("reading images"),
    )
    results: dict[str, Any] = {}
    stopped = False
    with _kept_choices(given.name == "auto"), progress("measuring", 0, "evaluations") as bar:
        try:
            for name, record in measure_each(opened.module, opened.data, options, setting, bar):
                results[name] = record | {"weights": weights}
                if record["interrupted"]:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            stopped = True
    if verbose:
        _tell_engines(results, given.name == "auto")
    if json:
        print(to_json(results))
    elif results:
        rows = [_row(n, r, number) for n, r in results.items()]
        width = len(COLUMNS) if any(row[-1] for row in rows) else len(COLUMNS) - 1
        screen = console()
        screen.print(fitted(screen.width, _title(source, results), COLUMNS[:width], [row[:width] for row in rows]))
    if stopped:
        typer.echo(f"bnsharp: stopped; {len(results)} of {len(names)} measures were taken"
                   + _partly(results), err=True)
        raise typer.Exit(130)


COLUMNS = ("measure", "value", "± 95%", "numerical", "data", "upper", "s", "")
"""± 95%: half width of the interval, sampling and numerical; data: standard error over batches."""


def _row(name: str, record: dict[str, Any], number: Any) -> tuple[str, ...]:
    notes = [
        *(["promoted to float64"] if record["promoted"] else []),
        *(["not converged"] if record["converged"] is False else []),
        *([f"{record['draws']} draws"] if record["interrupted"] else []),
        *([f"{record['effective_samples']:.0f} effective draws"]
          if record["effective_samples"] < 0.5 * record["draws"] else []),
    ]
    return (
        name, number(record["value"], 5), number(record["half_width"], 2), number(record["error"], 2),
        number(record["stderr_data"], 2), number(record["upper"], 5), f"{record['seconds']:.1f}", ", ".join(notes),
    )


@contextmanager
def _kept_choices(chosen: bool) -> Iterator[None]:
    """Engines chosen before on this machine are taken again, and new choices kept for the next time."""
    if not chosen:
        yield
        return
    import warnings

    from bnsharp import choosing
    from bnsharp.errors import Notice

    path = choosing.kept()
    choosing.load(path)
    yield
    try:
        choosing.save(path)
    except OSError as error:
        warnings.warn(Notice(
            f"{path} cannot be written ({error.strerror or error}): the next run may choose another engine, with other "
            "last bits; set XDG_CACHE_HOME to a folder, or pass the engine"
        ), stacklevel=2)


def _tell_engines(results: dict[str, Any], chosen: bool) -> None:
    """Engines by measure, and of the calls that were timed the times per point."""
    for name, record in results.items():
        used = "–" if record["engine"] == "auto" else record["engine"]  # nothing to choose for: no several points
        typer.echo(f"{name}: {used}", err=True)
    if not chosen:
        return
    from bnsharp import choosing

    for choice in choosing.choices(taken=True):
        times = [f"{name} {1e3 * s:.3g} ms" for name, s in choice.seconds.items()]
        others = [f"{name}: {why}" for name, why in choice.left_out.items()]
        typer.echo(f"{choice.call}: {choice.engine} taken; per point: {', '.join([*times, *others])}", err=True)


def _title(source: str, results: dict[str, Any]) -> str:
    first = next(iter(results.values()))
    batches = f" in {first['batches']} batches of {first['batch_size']}" if first["batches"] > 1 else ""
    exact = ", exact norms" if first["exact_norms"] else ""
    averaged = "" if first["weights"] == "trained" else f" ({first['weights']})"
    return (f"{source}{averaged}: {first['examples']} examples{batches}, {first['statistics']} statistics, "
            f"{first['precision']}{exact}")


def _partly(results: dict[str, Any]) -> str:
    partly = [f"{name} from {r['draws']} draws" for name, r in results.items() if r["interrupted"]]
    return f", {partly[0]}" if partly else ""
