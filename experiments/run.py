"""One run: a configuration made into data, network, algorithm and trainer; and a run folder read back."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from bnsharp.algorithms import Algorithm, algorithm, find
from bnsharp.checkpoint import CHECKPOINT, CONFIG, SUMMARY, RunFolder
from bnsharp.checkpoint import load as load_checkpoint
from bnsharp.checks import flag, unknown
from bnsharp.data import ImageData, load
from bnsharp.distributed import SINGLE, SMALLEST_SHARE, Ranks, own_device
from bnsharp.errors import InputError
from bnsharp.experiments import recipe, recording, tracking
from bnsharp.experiments.config import DATA_OPTIONS, RunConfig
from bnsharp.experiments.networks import network
from bnsharp.experiments.objectives import MEASURED_AT_ONCE, objective_of, probe_batch
from bnsharp.groups import ScaleGroups, scale_groups
from bnsharp.objective import Objective
from bnsharp.ordering import epoch_indices
from bnsharp.params import parameters
from bnsharp.trainer import Evaluation, Result, Trainer
from bnsharp.training_objective import TrainingObjective

MAY_DIFFER = ("versions", "threads", "checkpoint_every", "checkpoint_steps", "tensorboard")
"""What a resumed run may change: none of it is meant to change the numbers."""
MAY_DIFFER_FOR: dict[str, tuple[str, ...]] = {"synchronised": ("ranks",), "local": ()}
"""… and for the directions of ranks: local ones are another algorithm for another number of ranks."""


TRAINED = "trained"
"""The network's own weights, as opposed to an average of them."""


@dataclass(frozen=True)
class Prepared:
    """What a configuration stands for.

    Attributes:
        place: brings a batch of images into the network's memory format.
        evaluations: what is evaluated after each epoch.
        tracked: measures taken along training, if any.
    """

    config: RunConfig
    data: ImageData
    module: nn.Module
    groups: ScaleGroups
    algorithm: Algorithm
    place: Callable[[Tensor], Tensor]
    evaluations: dict[str, Evaluation]
    tracked: tracking.Tracked | None


def versions() -> dict[str, str]:
    """What the numbers of a run can depend on."""
    import tensordict
    import torchvision

    return {
        "bnsharp": bnsharp.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
        "tensordict": tensordict.__version__, "python": platform.python_version(),
    }


def device_of(config: RunConfig) -> torch.device:
    """The device, or an error that says what there is."""
    try:
        device = own_device(config.device)
        torch.zeros(1, device=device)
    except InputError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={config.device!r} cannot be used here; expected 'cpu' or a device that exists "
                         f"({str(error).splitlines()[0][:80]})") from error
    return device


def load_data(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> ImageData:
    """The configuration's data on its device."""
    options = dict(config.data_options)
    for key in options:
        if key not in DATA_OPTIONS:
            raise unknown("data option", key, DATA_OPTIONS)
    for key in ("augment", "download"):
        flag(key, options.get(key, False))
    if not isinstance(options.get("root", ""), str):
        raise InputError(f"root={options['root']!r}; expected a folder")
    return load(config.data, seed=config.split_seed, progress=progress, **options).to(device_of(config))


def prepare(config: RunConfig, data: ImageData | None = None,
            progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Build everything; bad names and options are told before anything is written."""
    find(config.algorithm)
    make, _ = network(config.model), tracking.tracked_options(config)
    if "seed" in config.model_options:
        raise InputError(f"model_options.seed={config.model_options['seed']!r}; expected the run's own: set seed")
    data = load_data(config, progress) if data is None else data
    module = make(data, config.seed, config.model_options).to(device_of(config))
    place = recipe.memory_format(config, module)
    with _taking(config, data):
        _try_batch(config, data, module, place)
        groups = scale_groups(module, probe_batch(data))
    prepared = Prepared(
        config, data, module, groups, algorithm(config.algorithm, groups, **config.algorithm_options), place,
        recipe.evaluations(config, module, data, place), tracking.tracker(config, groups, data, _tracked_objective),
    )
    if prepared.tracked is not None:
        prepared.tracked.objective(module)  # as many examples as asked for
        prepared.tracked.attempt(module, _tracked_objective(module, data, min(tracking.TRIED, len(data.train_labels))))
    return prepared


@contextmanager
def _taking(config: RunConfig, data: ImageData) -> Iterator[None]:
    """A network that is not ours refuses inputs, or gives other outputs than logits, in any way: one line."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"{config.model} cannot be trained on {data.name}, images {data.input_shape} in {len(data.classes)} classes"
            f" ({reason}); expected a classifier of such images: choose another, or resize them by image_size"
        ) from error


def _tracked_objective(module: nn.Module, data: ImageData, n: int) -> Objective:
    return objective_of(module, data, n, batch_size=MEASURED_AT_ONCE)


def _try_batch(config: RunConfig, data: ImageData, module: nn.Module, place: Callable[[Tensor], Tensor]) -> None:
    """Evaluate the loss on one batch of the run's size: one that cannot work is told before anything is written."""
    n = len(data.train_labels)
    if config.batch_size > n:
        raise InputError(f"batch_size={config.batch_size}; expected at most {n}, the number of training examples")
    was_training = module.training
    x, y = data.train_set(config.batch_size)
    objective = TrainingObjective(
        module.train(), recipe.training_criterion(config), (place(x), y), update_statistics=False
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        objective(parameters(module))
    module.train(was_training)


def trainer(
    prepared: Prepared,
    folder: RunFolder | None = None,
    *,
    resume: bool = False,
    ranks: Ranks = SINGLE,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Trainer:
    """The trainer of a prepared run."""
    config, data = prepared.config, prepared.data
    n = len(data.train_labels)

    def epoch(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in epoch_indices(n, config.batch_size, generator):
            x, y = data.train_batch(indices, generator)
            yield prepared.place(x), y

    return Trainer(
        prepared.module, recipe.training_criterion(config), epoch,
        optimizer=recipe.optimizer(config),
        regularizer=prepared.algorithm.regularizer,
        weight=prepared.algorithm.weight,
        other_batches=prepared.algorithm.other_batches,
        schedule=recipe.schedule(config, steps_per_epoch(prepared)),
        epochs=config.epochs, max_norm=config.max_norm,
        evaluations=prepared.evaluations, averages=recipe.averages(config),
        trackers={} if prepared.tracked is None else {"measures": prepared.tracked},
        track_every=config.track_every or 1,
        seed=config.seed, folder=folder, checkpoint_every=config.checkpoint_every,
        checkpoint_steps=config.checkpoint_steps, resume=resume,
        engine=config.engine, ranks=ranks, directions=config.rank_directions, on_step=on_step, on_epoch=on_epoch,
    )


def steps_per_epoch(prepared: Prepared) -> int:
    """Training steps in an epoch (the last short batch is dropped)."""
    return max(1, len(prepared.data.train_labels) // prepared.config.batch_size)


def stored_config(prepared: Prepared, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """What ``config.json`` holds: the configuration with every default, the algorithm's options, and the versions."""
    config = prepared.config.model_dump()
    config["algorithm_options"] = prepared.algorithm.options
    if prepared.tracked is not None:
        config["track_every"] = prepared.config.track_every or 1
        config["track_examples"] = tracking.tracked_examples(prepared.config, prepared.data)
        config["track_options"] = tracking.tracked_options(prepared.config)
    config["ranks"] = ranks.count
    config["threads"] = torch.get_num_threads() if config["threads"] is None else config["threads"]
    return {**config, "versions": versions()}


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: ImageData | None = None,
    ranks: Ranks = SINGLE,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Prepared, Result]:
    """Run a configuration into a run folder, which rank 0 of several alone writes.

    Raises:
        InputError: bad configuration, or a folder that holds a run already or that another process writes; nothing
            is written then.
        DivergedError, StorageError, DataError, Interrupted, Terminated, RankLostError: see
            :class:`bnsharp.trainer.Trainer`.
    """
    check_ranks(config, ranks)
    if config.together > 1:
        raise InputError(f"together={config.together} in a single run; expected together=1, or several seeds by "
                         "bnsharp compare --together or bnsharp.experiments.together.train_together")
    folder, threads = RunFolder(Path(out)), config.threads
    if threads is None and resume:  # the same bytes as without the interruption
        threads = ranks.from_first(lambda: folder.config().get("threads") if folder.exists() else None)
    if threads is not None:
        torch.set_num_threads(threads)
    ranks.from_first(lambda: check_folder(folder, overwrite or resume))
    scalars = recording.Scalars() if config.tensorboard else None
    if data is None and config.data_options.get("download"):
        data = ranks.first_then_all(lambda: load_data(config, progress))
    prepared = prepare(config, data, progress)

    def finished(record: dict[str, Any]) -> None:
        if scalars is not None and run.folder is not None:  # one process of several has it
            scalars.write(folder.path, record)
        if on_epoch is not None:
            on_epoch(record)

    run = trainer(prepared, resume=resume, ranks=ranks, on_step=on_step, on_epoch=finished)
    stored = stored_config(prepared, ranks)
    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(folder.locked())
            if resume:
                go_on(folder, stored, MAY_DIFFER_FOR[config.rank_directions])
            else:
                folder.start(stored, overwrite=overwrite)
                recording.clear(folder.path)
            run.folder = folder

        ranks.from_first(claim)
        if on_start is not None:
            on_start(steps_per_epoch(prepared) * config.epochs)
        if scalars is not None:
            stack.enter_context(closing(scalars))
        result = run.fit()
        if ranks.is_first:
            folder.write_json(SUMMARY, {"epochs": len(result.history), "steps": result.steps, **result.last})
    return prepared, result


def go_on(folder: RunFolder, stored: dict[str, Any], more: tuple[str, ...] = ()) -> None:
    """:meth:`bnsharp.checkpoint.RunFolder.go_on`; a setting that the folder's configuration lacks has its default.

    Args:
        stored: of the run now, see :func:`stored_config`.
        more: what may differ beside :data:`MAY_DIFFER`.
    """
    known = folder.config() if folder.exists() else stored
    lacking = tuple(
        key for key, field in RunConfig.model_fields.items()
        if key not in known and stored.get(key) == field.get_default(call_default_factory=True)
    )
    folder.go_on(stored, MAY_DIFFER + more + lacking)


def check_folder(folder: RunFolder, taken: bool) -> None:
    """A folder that a run can use (``taken``: also one that holds a run); not one with a foreign checkpoint."""
    folder.check_free(overwrite=taken)
    if not folder.exists() and (folder.path / CHECKPOINT).exists():
        raise InputError(f"{folder.path} holds a {CHECKPOINT} that is of no run here ({CONFIG} is missing); expected "
                         "an empty folder: choose another one")


def check_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Raise :class:`InputError` unless the job has the processes that the configuration asks for, all with work."""
    if config.ranks not in (None, ranks.count):
        raise InputError(f"ranks={config.ranks} and {ranks.count} process(es) were started; expected as many: start "
                         f"the command by torchrun --nproc-per-node {config.ranks}")
    if ranks.count > 1 and config.batch_size < SMALLEST_SHARE * ranks.count:
        raise InputError(f"batch_size={config.batch_size} for {ranks.count} ranks; expected at least "
                         f"{SMALLEST_SHARE * ranks.count}: batch statistics need two examples on each rank")
    if ranks.count == 1 and config.rank_directions != "synchronised":
        raise InputError(f"rank_directions={config.rank_directions!r} in one process; expected several, started by "
                         "torchrun, or algorithm=m-sam, which cuts its batches in chunks")


def read_run(
    path: str | Path, checkpoint: Path | None = None, weights: str = TRAINED
) -> tuple[RunConfig, nn.Module, ImageData]:
    """The configuration, the trained network (of another checkpoint of the same run, if given) and the data.

    Args:
        weights: ``"trained"``, or the name of an average that the run kept (``"ema"``): the network then has its
            parameters and running statistics.

    Raises:
        InputError: not a run folder, no checkpoint yet, a checkpoint that does not fit, or no such average.
    """
    folder = RunFolder(Path(path))
    stored = folder.config()
    stored.pop("versions", None)
    try:
        config = RunConfig(**stored)
    except ValueError as error:
        raise InputError(f"{path}: config.json is not a run's configuration ({str(error).splitlines()[0]})") from error
    payload = folder.load() if checkpoint is None else load_checkpoint(checkpoint)
    if payload is None:
        raise InputError(f"{path} holds no checkpoint yet; expected at least one finished epoch")
    data = load_data(config)
    module = network(config.model)(data, config.seed, config.model_options)
    load_state(module, payload.get("module", payload), str(path))
    if weights != TRAINED:
        _load_average(module, config, payload, weights, str(path))
    return config, module.to(device_of(config)), data


def _load_average(module: nn.Module, config: RunConfig, payload: dict[str, Any], name: str, where: str) -> None:
    averages, states = recipe.averages(config), payload.get("averages", {})
    kept = [k for k in averages if k in states]
    if name not in kept:
        held = ", ".join(map(repr, (TRAINED, *kept)))
        raise InputError(f"weights={name!r}; {where} holds {held}: choose among these"
                         + ("" if kept else ", or train with --set ema=0.99"))
    with averages[name].applied(module, states[name]):
        averaged = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(averaged)


def load_state(module: nn.Module, state: Any, where: str) -> None:
    """Load a state dictionary, or say which keys do not fit."""
    own = module.state_dict()
    if not isinstance(state, dict):
        raise InputError(f"{where} holds a {type(state).__name__}; expected a dictionary of the network's tensors")
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [k for k in own if k in state and getattr(state[k], "shape", None) != own[k].shape]
    for label, names in (("lacks", missing), ("has unknown", unexpected), ("has other shapes for", wrong)):
        if names:
            raise InputError(f"{where} {label} {', '.join(map(repr, names[:4]))}{' …' if len(names) > 4 else ''}; "
                             f"expected the parameters of {type(module).__name__}")
    module.load_state_dict(state)
