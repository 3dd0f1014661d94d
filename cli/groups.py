"""``bnsharp groups``: what of a network can be rescaled without changing its function."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bnsharp.groups import ScaleGroups

SHAPE = "3,64,64"
EXAMPLES = 8


def groups(
    source: Annotated[str, typer.Argument(help="a run folder, a checkpoint, torchvision:NAME or timm:NAME")],
    data: Annotated[str | None, typer.Option(help="data set or image folder; a run folder's own by default, random "
                                                  "inputs for torchvision and timm")] = None,
    shape: Annotated[str | None, typer.Option(metavar="C,H,W", help=f"of one random input ({SHAPE})")] = None,
    examples: Annotated[int, typer.Option(help="inputs that the network is probed on, 4 to 16")] = EXAMPLES,
    model: Annotated[str | None, typer.Option(help="the model that a file of weights holds")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option of the network, as in --set image_size=64"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of random inputs, untrained networks and the points probed")] = 0,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Find a network's scale groups by how it behaves, and verify them by rescaling."""
    from bnsharp.checkpoint import to_json
    from bnsharp.groups import scale_groups

    module, x = _opened(source, data, shape, examples, model, set_ or [], seed)
    started = time.perf_counter()
    found = scale_groups(module, x, seed=seed)
    seconds = time.perf_counter() - started
    record = {"source": source, "network": type(module).__name__, "inputs": list(x.shape), "seed": seed,
              **describe(found, module), "seconds": seconds}
    print(to_json(record)) if json else _show(record)


def describe(found: ScaleGroups, module: nn.Module) -> dict[str, Any]:
    """Every group, and counts over the parameters that require grad: parameters are tensors, coordinates numbers."""
    from bnsharp.params import parameters

    sizes = {name: value.numel() for name, value in parameters(module).items()}
    inert = [name for name, kind in found.invariant.items() if kind == "inert"]
    invariant = [name for name, kind in found.invariant.items() if kind != "inert"]
    return {
        "parameters": len(sizes),
        "coordinates": sum(sizes.values()),
        "invariant_parameters": len(invariant),
        "invariant_coordinates": sum(sizes[k] for k in invariant),
        "inert_parameters": len(inert),
        "inert_coordinates": sum(sizes[k] for k in inert),
        "groups": found.partition.count,
        "forwards": found.forwards,
        "residual": found.residual,
        "found": [
            {"kind": g.kind, "members": list(g.members), "blocks": g.blocks,
             "coordinates": sum(sizes[k] for k in g.members)}
            for g in found
        ],
    }


def _opened(
    source: str, data: str | None, shape: str | None, examples: int, model: str | None, settings: list[str], seed: int
) -> tuple[nn.Module, Tensor]:
    """The network, and real inputs where there are any, else random ones."""
    import torch

    from bnsharp.cli.display import load_progress
    from bnsharp.errors import InputError
    from bnsharp.experiments.config import parse_setting
    from bnsharp.experiments.networks import LIBRARIES
    from bnsharp.experiments.objectives import probe_batch
    from bnsharp.experiments.sources import open_source

    if not 4 <= examples <= 16:
        raise InputError(f"examples={examples}; expected 4 to 16: with fewer, batch statistics make false groups")
    options = dict(parse_setting(s) for s in settings)
    kind, _, name = source.partition(":")
    of_library = kind in LIBRARIES and bool(name)
    if options and not of_library and model is None:
        raise InputError(f"{source} says itself how its network is built; expected no --set (got {', '.join(options)})")
    if data is None and of_library:
        if model is not None:
            raise InputError(f"{source} says itself what network it is; expected no --model beside it (got {model!r})")
        sides = _sides(SHAPE if shape is None else shape)
        x = torch.randn(examples, *sides, generator=torch.Generator().manual_seed(seed))
        return LIBRARIES[kind](name)(seed, options), x
    if shape is not None:
        raise InputError(f"shape={shape!r} for inputs that are data; expected one of the two: leave --shape out")
    opened = open_source(
        source, data=data, model=model, model_options=options, seed=seed, progress=load_progress("reading images")
    )
    return opened.module, probe_batch(opened.data, examples)


def _sides(shape: str) -> list[int]:
    from bnsharp.errors import InputError

    parts = shape.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise InputError(f"shape={shape!r}; expected whole numbers >= 1 with commas between, as in --shape {SHAPE}")
    return [int(p) for p in parts]


def _show(record: dict[str, Any]) -> None:
    from bnsharp.cli.display import console, number, table

    rows = [
        ("\n".join(g["members"]), g["kind"], str(g["blocks"]) if g["kind"] != "inert" else "–", str(g["coordinates"]))
        for g in record["found"]
    ]
    title = f"{record['source']} ({record['network']}), {' × '.join(map(str, record['inputs']))} inputs"
    out = console()
    out.print(table(title, ("parameter", "kind", "groups", "coordinates"), rows))
    for what in ("invariant", "inert"):
        tensors, numbers = record[f"{what}_parameters"], record[f"{what}_coordinates"]
        out.print(f"{what}: {tensors} of {record['parameters']} parameters, {numbers} of {record['coordinates']} "
                  f"coordinates ({100 * numbers / record['coordinates']:.2f}%)"
                  + (f", in {record['groups']} groups" if what == "invariant" else ""))
    verified = f"; all groups rescaled at once change the output by {number(record['residual'], 2)} of its size"
    out.print(f"{record['forwards']} forward passes, {record['seconds']:.1f} s" + (verified if rows else ""))
