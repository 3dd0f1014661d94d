"""Configurations of runs: settings from the command line go where they belong, or are refused in one line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from helpers import fast, one_line
from hypothesis import given
from hypothesis import strategies as st

from bnsharp.algorithms import FAMILIES, options_of
from bnsharp.errors import InputError
from bnsharp.experiments.config import RunConfig, make_config, parse_setting
from bnsharp.models import MODELS


@pytest.mark.parametrize(("text", "expected"), [
    ("lr=0.1", ("lr", 0.1)), ("epochs=3", ("epochs", 3)), ("optimizer=Adam", ("optimizer", "Adam")),
    (' optimizer = "Adam" ', ("optimizer", "Adam")), ("root=/a=b/c", ("root", "/a=b/c")), ("clip=null", ("clip", None)),
    ("independent_batch=true", ("independent_batch", True)), ("milestones=[1, 2]", ("milestones", [1, 2])),
    ("delta=1e-3", ("delta", 1e-3)), ("root=", ("root", "")), ("rule= riemannian ", ("rule", "riemannian")),
    ("image_size=[8,8]", ("image_size", [8, 8])),
])
def test_a_setting_is_a_key_and_json_or_text(text, expected):
    assert parse_setting(text) == expected


@given(st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False), st.lists(st.integers())))
@fast
def test_settings_undo_json(value):
    assert parse_setting(f"key={json.dumps(value)}") == ("key", value)


@pytest.mark.parametrize("text", ["lr", "", "=3", " =3"])
def test_a_setting_without_key_or_sign_is_refused_in_one_line(text):
    with pytest.raises(InputError) as caught:
        parse_setting(text)
    assert "key=value" in one_line(caught.value)


def test_the_defaults_are_those_of_the_documentation():
    config = make_config({})
    assert config == RunConfig() and make_config(config.model_dump()) == config
    assert (config.data, config.model, config.epochs, config.batch_size) == ("digits", "bn-mlp", 100, 64)
    assert (config.lr, config.momentum, config.weight_decay, config.seed) == (0.05, 0.9, 5e-4, 0)
    json.dumps(config.model_dump())


def test_fields_shortcuts_and_dotted_keys():
    config = make_config(
        {"algorithm": "sgds-2", "lr": 0.5, "data_options": {"train_size": 100}},
        ["lr=0.25", "delta=0.01", "label_noise=0.4", "width=16", "optimizer_options.nesterov=true",
         "data_options.augment=true", "algorithm_options.clip=0.1", "milestones=[2, 5]", "delta=0.02",
         "schedule=multistep"],
    )
    assert config.lr == 0.25 and config.milestones == [2, 5]
    assert config.algorithm_options == {"delta": 0.02, "clip": 0.1}
    assert config.data_options == {"train_size": 100, "label_noise": 0.4, "augment": True}
    assert config.model_options == {"width": 16} and config.optimizer_options == {"nesterov": True}


def test_a_configuration_is_not_changed_by_settings():
    values: dict[str, Any] = {"data_options": {"train_size": 100}}
    make_config(values, ["label_noise=0.4", "delta=0.1"])
    assert values == {"data_options": {"train_size": 100}}


@pytest.mark.parametrize("option", sorted({o for f in FAMILIES.values() for o in options_of(f)}))
def test_every_option_of_every_algorithm_is_a_setting(option):
    """By its bare name, but for one that is a field's name."""
    key = f"algorithm_options.{option}" if option in RunConfig.model_fields else option
    assert make_config({}, [f"{key}=1"]).algorithm_options == {option: 1}


@pytest.mark.parametrize("option", sorted({o for spec in MODELS.values() for o in spec.options}))
def test_every_option_of_every_model_is_a_setting(option):
    assert option not in RunConfig.model_fields
    assert make_config({}, [f"{option}=1"]).model_options == {option: 1}


@pytest.mark.parametrize(("setting", "meant"), [
    ("learning_rat=1", None), ("epoch=1", "epochs"), ("detla=1", "delta"), ("batchsize=1", "batch_size"),
    ("algorithm_option.delta=1", None), ("optimiser=SGD", "optimizer"), ("Lr=1", "lr"), ("model_config=1", None),
])
def test_an_unknown_key_is_refused_with_the_nearest_one(setting, meant):
    with pytest.raises(InputError) as caught:
        make_config({}, [setting])
    message = one_line(caught.value)
    assert setting.split("=")[0] in message
    if meant:
        assert f"did you mean '{meant}'" in message


BAD = [
    ({"epochs": 0}, "epochs"), ({"epochs": 1.5}, "epochs"), ({"epochs": "many"}, "epochs"),
    ({"batch_size": 0}, "batch_size"),
    ({"lr": 0.0}, "lr"), ({"lr": -1.0}, "lr"), ({"lr": math.nan}, "lr"), ({"lr": math.inf}, "lr"),
    ({"lr": "fast"}, "lr"),
    ({"lr": None}, "lr"), ({"lr": [0.1]}, "lr"), ({"momentum": 1.0}, "momentum"), ({"momentum": -0.1}, "momentum"),
    ({"weight_decay": -1e-4}, "weight_decay"), ({"weight_decay": math.inf}, "weight_decay"), ({"gamma": 0.0}, "gamma"),
    ({"gamma": 2.0}, "gamma"), ({"seed": -1}, "seed"), ({"seed": 0.5}, "seed"), ({"data_seed": -1}, "data_seed"),
    ({"schedule": "linear"}, "schedule"), ({"engine": "pmap"}, "engine"), ({"threads": 0}, "threads"),
    ({"milestones": 3}, "milestones"), ({"milestones": ["a"]}, "milestones"), ({"data": 3}, "data"),
    ({"model": None}, "model"),
    ({"algorithm_options": 3}, "algorithm_options"), ({"nonsense": 3}, "nonsense"), ({"optimizer": 3}, "optimizer"),
    ({"data_options": [1]}, "data_options"),
]


@pytest.mark.parametrize(("values", "word"), BAD, ids=lambda v: str(v))
def test_a_wrong_type_or_a_value_out_of_range_is_refused_in_one_line(values, word):
    with pytest.raises(InputError) as caught:
        make_config(values)
    assert word in one_line(caught.value)
    if word != "nonsense":
        settings = [f"{word}={json.dumps(values[word])}"]
        with pytest.raises(InputError) as caught:
            make_config({}, settings)
        assert word in one_line(caught.value)


def test_an_option_of_something_without_options_is_refused_in_one_line():
    with pytest.raises(InputError) as caught:
        make_config({"lr": 0.1}, ["lr.decay=3"])
    assert "lr" in one_line(caught.value)
    with pytest.raises(InputError) as caught:
        make_config({}, ["epochs.x=3"])
    assert "epochs" in one_line(caught.value)


def test_the_seed_of_the_data_is_the_runs_unless_given():
    assert make_config({"seed": 3}).split_seed == 3
    assert make_config({"seed": 3, "data_seed": 0}).split_seed == 0


def test_options_given_together_join_those_given_before():
    made = make_config({}, ["width=8", 'model_options={"depth": 2}', "width=9"])
    assert made.model_options == {"width": 9, "depth": 2}
