"""What a configuration says of training: optimizer, schedule, criterion, memory format, evaluations, averages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from bnsharp import schedules
from bnsharp.averages import Ema, has_statistics, reestimated
from bnsharp.data import ImageData
from bnsharp.errors import InputError
from bnsharp.experiments.config import RunConfig
from bnsharp.trainer import Criterion, Evaluation, evaluate
from bnsharp.types import Average

criterion = nn.functional.cross_entropy
"""What evaluations and measures take."""

EVALUATION_BATCH = 1000


def training_criterion(config: RunConfig) -> Criterion:
    """Cross-entropy with the configuration's label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""
    if not config.label_smoothing:
        return criterion
    return functools.partial(criterion, label_smoothing=config.label_smoothing)


def optimizer(config: RunConfig) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """``parameters -> optimizer``; a bad name is told at once, bad options when it is made."""
    kind = getattr(torch.optim, config.optimizer, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(f"optimizer={config.optimizer!r}; expected the name of a torch.optim optimizer: SGD, AdamW, …")
    options = {"lr": config.lr, "weight_decay": config.weight_decay, **config.optimizer_options}
    if "momentum" in kind.__init__.__code__.co_varnames:
        options.setdefault("momentum", config.momentum)

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            return kind(parameters, **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer {config.optimizer} with {options}: {error}") from error

    return make


def schedule(config: RunConfig, steps_per_epoch: int) -> schedules.Schedule:
    """The configuration's schedule after its warm-up."""
    warmup, steps = config.warmup * steps_per_epoch, config.epochs * steps_per_epoch
    makers: dict[str, Callable[[], schedules.Schedule]] = {
        "constant": lambda: schedules.constant(warmup=warmup),
        "multistep": lambda: schedules.multistep(config.milestones, config.gamma, steps_per_epoch, warmup=warmup),
        "cosine": lambda: schedules.cosine(steps, warmup=warmup, floor=config.min_lr / config.lr),
    }
    return makers[config.schedule]()


def memory_format(config: RunConfig, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module in the configuration's memory format, and what brings a batch of images into it.

    Raises:
        InputError: channels last for a network without two-dimensional convolutions.
    """
    if not config.channels_last:
        return lambda x: x
    if not any(isinstance(m, nn.Conv2d) for m in module.modules()):
        raise InputError(f"channels_last=true: {config.model} has no convolution of images; expected a convolutional "
                         "network, or channels_last=false")
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda x: x.contiguous(memory_format=torch.channels_last)


def averages(config: RunConfig) -> dict[str, Average]:
    """Averaged weights that are evaluated beside the network."""
    return {} if config.ema is None else {"ema": Ema(config.ema)}


def evaluations(config: RunConfig, module: nn.Module, data: ImageData,
                place: Callable[[Tensor], Tensor]) -> dict[str, Evaluation]:
    """Loss and accuracy on the test set, with running statistics re-estimated first where the configuration says so.

    Raises:
        InputError: a network without running statistics, more batches than an epoch has.
    """
    x, y = data.test_set()
    count, size = config.reestimate_batches, config.batch_size

    def test(module: nn.Module) -> dict[str, float]:
        return evaluate(module, criterion, batches(place(x), y))

    if count is None:
        return {"test": test}
    if not has_statistics(module):
        raise InputError(f"reestimate_batches={count}: {config.model} has no running statistics; expected a network "
                         "with batch normalization, or no reestimate_batches")
    if count * size > len(data.train_labels):
        raise InputError(f"reestimate_batches={count} batches of {size}; expected at most "
                         f"{len(data.train_labels) // size}, those of an epoch")

    def reestimated_test(module: nn.Module) -> dict[str, float]:
        parts = ((place(data.normalize(part)), None) for part in data.train_images[: count * size].split(size))
        with reestimated(module, parts):
            return test(module)

    return {"test": reestimated_test}


def batches(x: Tensor, y: Tensor, size: int = EVALUATION_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive batches."""
    yield from zip(x.split(size), y.split(size), strict=True)
