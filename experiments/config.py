"""What a run is: a validated, complete, JSON-able configuration."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bnsharp.algorithms import FAMILIES, options_of
from bnsharp.checks import suggest
from bnsharp.errors import InputError
from bnsharp.models import MODELS


class RunConfig(BaseModel):
    """Everything needed to repeat a run. Dictionaries hold the options of the named thing."""

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
    seed: int = Field(default=0, ge=0)
    data_seed: int | None = Field(default=None, ge=0)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=1, ge=1)
    checkpoint_steps: int | None = Field(default=None, ge=1)
    engine: Literal["loop", "vmap"] = "loop"

    @field_validator("lr", "momentum", "weight_decay", "gamma")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("expected a finite number")
        return value

    @property
    def split_seed(self) -> int:
        """The seed of split, subset and label noise: the run's seed unless ``data_seed`` is given."""
        return self.seed if self.data_seed is None else self.data_seed


DATA_OPTIONS = ("label_noise", "train_size", "augment", "image_size", "root", "download")


def shortcuts() -> dict[str, str]:
    """Options that can be set by their bare name, and the field that holds them."""
    return {
        **{k: "data_options" for k in DATA_OPTIONS},
        **{k: "model_options" for spec in MODELS.values() for k in spec.options},
        **{k: "algorithm_options" for family in FAMILIES.values() for k in options_of(family)},
    }


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

    A key is a field (``lr``), an option (``delta``, put where it belongs) or dotted (``data_options.root``).

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
            merged[head][tail] = value
        else:
            merged[head] = value
    try:
        return RunConfig(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        hint = suggest(where, fields) if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{where}={first.get('input')!r}: {first['msg'].lower()}{hint}") from error
