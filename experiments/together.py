"""Several seeds of one configuration trained at once, each into a run folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from bnsharp.checkpoint import SUMMARY, RunFolder
from bnsharp.companions import check_batches, check_together
from bnsharp.errors import DivergedError, InputError
from bnsharp.experiments import recording
from bnsharp.experiments.config import RunConfig
from bnsharp.experiments.run import Prepared, check_folder, go_on, prepare, stored_config, trainer
from bnsharp.stacked import dense
from bnsharp.together import Outcome, Together
from bnsharp.trainer import Trainer


def train_together(
    configs: Sequence[RunConfig],
    outs: Sequence[str | Path],
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[int, dict[str, Any]], None] | None = None,
) -> list[tuple[Prepared, Outcome]]:
    """What :func:`bnsharp.experiments.run.train` does of each configuration, at once (:mod:`bnsharp.together`).

    Args:
        configs: equal but for the seed; ``together`` says how many there are when the group begins.
        outs: a run folder for each.
        on_step: called after every step of every run.
        on_epoch: called with the seed and an epoch's record.

    Returns:
        For each run what it was made of, and its result, or how it diverged.

    Raises:
        InputError: configurations that differ in more, a network or setting that cannot be trained so, or what
            ``train`` raises; nothing is written then.
    """
    folders = [RunFolder(Path(out)) for out in outs]
    _check_configs(configs, outs)
    threads = configs[0].threads
    if threads is None and resume and folders[0].exists():
        threads = folders[0].config().get("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    for folder in folders:
        check_folder(folder, overwrite or resume)
    made = [prepare(config) for config in configs]
    scalars = [recording.Scalars() if config.tensorboard else None for config in configs]

    def finished(i: int) -> Callable[[dict[str, Any]], None]:
        def record(values: dict[str, Any]) -> None:
            writer = scalars[i]
            if writer is not None:
                writer.write(folders[i].path, values)
            if on_epoch is not None:
                on_epoch(configs[i].seed, values)

        return record

    runs = [trainer(p, resume=resume, on_step=on_step, on_epoch=finished(i)) for i, p in enumerate(made)]
    group = _checked(made, runs)
    with ExitStack() as stack:
        for folder, p, run, writer in zip(folders, made, runs, scalars, strict=True):
            stack.enter_context(folder.locked())
            if resume:
                go_on(folder, stored_config(p))
            else:
                folder.start(stored_config(p), overwrite=overwrite)
                recording.clear(folder.path)
            run.folder = folder
            if writer is not None:
                stack.enter_context(closing(writer))
        outcomes = group.fit()
        for folder, outcome in zip(folders, outcomes, strict=True):
            if not isinstance(outcome, DivergedError):
                folder.write_json(SUMMARY, {"epochs": len(outcome.history), "steps": outcome.steps, **outcome.last})
    return list(zip(made, outcomes, strict=True))


def obstacle(config: RunConfig, forced: bool = False) -> str | None:
    """Why several seeds of this configuration are better trained one after the other; None where at once is better.

    Unless it is ``forced``, that is also where the network is not dense: on a CPU grouped convolutions take longer than
    one network after the other.
    """
    made = [prepare(config.model_copy(update={"seed": config.seed + i, "together": 2})) for i in range(2)]
    if not (forced or dense(made[0].module) or made[0].config.device != "cpu"):
        return f"{config.model} has layers that are slower at once on a CPU"
    try:
        _checked(made, [trainer(p) for p in made])
    except InputError as error:
        return str(error)
    return None


def _checked(made: Sequence[Prepared], runs: Sequence[Trainer]) -> Together:
    check_together(runs)
    batches = [p.data.train_set(p.config.batch_size) for p in made]
    check_batches(runs, [(p.place(x), y) for p, (x, y) in zip(made, batches, strict=True)])
    return Together(runs)


def _check_configs(configs: Sequence[RunConfig], outs: Sequence[str | Path]) -> None:
    first = configs[0].model_dump()
    for config in configs:
        other = config.model_dump()
        odd = [k for k in first if k != "seed" and first[k] != other[k]]
        if odd:
            raise InputError(f"{odd[0]}={first[odd[0]]!r} and {other[odd[0]]!r} in runs together; expected "
                             "configurations that differ in their seeds alone")
    if len({Path(out).resolve() for out in outs}) < len(configs) or len(outs) != len(configs):
        raise InputError(f"{len(set(outs))} folder(s) for {len(configs)} runs; expected one for each")
    if len(configs) > configs[0].together:
        raise InputError(f"together={configs[0].together} and {len(configs)} runs; expected together={len(configs)}")
