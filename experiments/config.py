"""What a run is: a validated, complete, JSON-able configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from bnsharp.algorithms import FAMILIES, options_of
from bnsharp.checks import suggest
from bnsharp.errors import InputError
from bnsharp.models import MODELS

LARGEST_SEED = 2**53
"""Generators start from small multiples of a seed, which torch takes below 2⁶⁴; and JSON keeps it exactly."""

MOST_THREADS = 1024
"""More than any machine has; numerical libraries end the process, or do not load, with many more."""


class RunConfig(BaseModel):
    """Everything needed to repeat a run. Dictionaries hold the options of the named thing.

    Attributes:
        warmup: epochs (fractions allowed) over which the rate rises linearly, before or within the schedule.
        min_lr: the cosine's last rate.
        label_smoothing: of the training criterion (and so of the recorded training loss) alone: evaluations and
            measures take plain cross-entropy.
        max_norm: the total gradient is clipped to this norm.
        ema: decay of averaged weights, which are evaluated beside the network: ``ema_test_accuracy``, …
        reestimate_batches: before each evaluation running statistics are rebuilt over the first so many training
            batches, without augmentation; training goes on with its own.
        channels_last: memory format of a convolutional network and its batches.
        ranks: processes that train together, as many as were started (torchrun); None accepts any number.
        rank_directions: ``"synchronised"`` is one process on the whole batch, up to rounding; ``"local"`` averages the
            steps that each rank takes on its part (m-SAM).
        together: seeds that are trained at once, this one included (a group of another size rounds differently).
        tensorboard: write every epoch's numbers as scalars to ``tensorboard/`` in the run folder.
        track: measures taken every ``track_every`` epochs (1) on the first ``track_examples`` training examples (at
            most 2000 by default), with ``track_options`` (measure → options).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    data_options: dict[str, Any] = Field(default_factory=dict)
    model: str = "bn-mlp"
    model_options: dict[str, Any] = Field(default_factory=dict)
    algorithm: str = "sgds-0"
    algorithm_options: dict[str, Any] = Field(default_factory=dict)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=64, ge=1)
    optimizer: str = "SGD"
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["constant", "multistep", "cosine"] = "cosine"
    milestones: list[int] = Field(default_factory=lambda: [60, 120, 160])
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_norm: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    reestimate_batches: int | None = Field(default=None, ge=1)
    channels_last: bool = False
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    data_seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)
    checkpoint_every: int = Field(default=1, ge=1)
    checkpoint_steps: int | None = Field(default=None, ge=1)
    engine: Literal["loop", "vmap"] = "loop"
    ranks: int | None = Field(default=None, ge=1)
    rank_directions: Literal["synchronised", "local"] = "synchronised"
    together: int = Field(default=1, ge=1)
    tensorboard: bool = False
    track: list[str] = Field(default_factory=list)
    track_every: int | None = Field(default=None, ge=1)
    track_examples: int | None = Field(default=None, ge=2)
    track_options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("lr", "momentum", "weight_decay", "gamma", "warmup", "min_lr", "label_smoothing", "max_norm")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("expected a finite number")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """``warmup=true`` is no number of epochs, though Python takes True for 1."""
        if isinstance(value, bool) and not isinstance(cls.model_fields[info.field_name or ""].default, bool):
            raise ValueError("expected no true or false")
        return value

    @field_validator("track", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """``a,b`` as well as a list; each name once."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        return list(dict.fromkeys(n for n in names if n != "")) if isinstance(names, list) else names

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for contradicts, say in CONTRADICTIONS:
            if contradicts(self):
                raise ValueError(say(self))
        return self

    @property
    def split_seed(self) -> int:
        """The seed of split, subset and label noise: the run's seed unless ``data_seed`` is given."""
        return self.seed if self.data_seed is None else self.data_seed


def _given(config: RunConfig, *fields: str) -> bool:
    """Whether one of the fields is not what it is by default."""
    return any(getattr(config, f) != RunConfig.model_fields[f].get_default(call_default_factory=True) for f in fields)


CONTRADICTIONS: tuple[tuple[Callable[[RunConfig], bool], Callable[[RunConfig], str]], ...] = (
    (lambda c: c.warmup > 0 and c.warmup >= c.epochs,
     lambda c: f"warmup={c.warmup:g} in a run of {c.epochs} epochs; expected a warm-up that is shorter than the run"),
    (lambda c: c.min_lr > 0 and c.schedule != "cosine",
     lambda c: f"min_lr={c.min_lr:g} with schedule={c.schedule!r}; expected schedule=cosine, the one with a floor"),
    (lambda c: c.schedule != "multistep" and _given(c, "milestones", "gamma"),
     lambda c: f"milestones={c.milestones}, gamma={c.gamma:g} with schedule={c.schedule!r}; expected "
               "schedule=multistep (an algorithm's own gamma is algorithm_options.gamma)"),
    (lambda c: c.together > 1 and (c.engine != "loop" or c.ranks not in (None, 1)),
     lambda c: f"together={c.together} with engine={c.engine!r}, ranks={c.ranks}; expected engine='loop', one process"),
    (lambda c: c.min_lr > c.lr,
     lambda c: f"min_lr={c.min_lr:g} above lr={c.lr:g}; expected a floor below the learning rate"),
    (lambda c: not c.track and c.track_every is not None,
     lambda c: f"track_every={c.track_every} and nothing to track; expected track=MEASURE,… beside it"),
    (lambda c: not c.track and c.track_examples is not None,
     lambda c: f"track_examples={c.track_examples} and nothing to track; expected track=MEASURE,… beside it"),
    (lambda c: bool(c.track) and (c.track_every or 1) > c.epochs,
     lambda c: f"track_every={c.track_every} in a run of {c.epochs} epochs; expected at most the number of epochs"),
    (lambda c: bool(set(c.track_options) - set(c.track)),
     lambda c: f"track_options for {', '.join(sorted(set(c.track_options) - set(c.track)))}; "
               f"expected options of tracked measures ({', '.join(c.track) or 'none'})"),
)
"""What settings cannot be together, each with its one line."""


DATA_OPTIONS = ("label_noise", "train_size", "validation", "augment", "image_size", "root", "download")


def shortcuts() -> dict[str, str]:
    """Options that can be set by their bare name, and the field that holds them; a field's own name is the field's."""
    homes = {
        **{k: "data_options" for k in DATA_OPTIONS},
        **{k: "model_options" for spec in MODELS.values() for k in spec.options},
        **{k: "algorithm_options" for family in FAMILIES.values() for k in options_of(family)},
    }
    return {k: home for k, home in homes.items() if k not in RunConfig.model_fields}


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` with the value read as JSON where it is JSON, else as a string.

    Raises:
        InputError: no ``=``.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise InputError(f"--set {text!r}; expected key=value, as in --set delta=0.05")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()


def make_config(values: dict[str, Any], settings: list[str] | None = None) -> RunConfig:
    """A validated configuration from plain values and ``key=value`` settings.

    A key is a field (``lr``), an option (``delta``, put where it belongs) or dotted (``data_options.root``). Of a key
    that comes several times the last counts; options given together join those given before.

    Raises:
        InputError: an unknown key (with the nearest known one) or a value out of range.
    """
    fields, homes = list(RunConfig.model_fields), shortcuts()
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in (parse_setting(s) for s in settings or []):
        head, _, tail = key.partition(".")
        if not tail and key in homes:
            head, tail = homes[key], key
        if head not in fields:
            known = [*fields, *homes]
            raise InputError(f"unknown setting {key!r}; expected one of {', '.join(known)}" + suggest(key, known))
        if tail:
            merged.setdefault(head, {})
            if not isinstance(merged[head], dict):
                raise InputError(f"setting {key!r}: {head} has no options; expected --set {head}=VALUE")
            _put(merged[head], tail, value, nested=head in NESTED)
        else:
            merged[head] = {**merged[head], **value} if _both_options(merged.get(head), value) else value
    try:
        return RunConfig(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # settings that contradict each other
            raise InputError(str(first["ctx"]["error"])) from error
        where = ".".join(str(part) for part in first["loc"])
        hint = suggest(where, fields) if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{where}={first.get('input')!r}: {first['msg'].lower()}{hint}") from error


def _both_options(before: Any, value: Any) -> bool:
    return isinstance(before, dict) and isinstance(value, dict)


NESTED = ("track_options",)
"""Fields whose options have options: ``track_options.hessian_top.iterations=10``."""


def _put(options: dict[str, Any], key: str, value: Any, *, nested: bool) -> None:
    name, dot, option = key.partition(".")
    if nested and dot:
        inner = options.get(name, {})
        options[name] = {**(inner if isinstance(inner, dict) else {}), option: value}
    else:
        options[key] = value
