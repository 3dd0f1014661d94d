"""Named algorithms: every family builds, options arrive, the paper's presets are the paper's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import bn_mlp, cross_entropy, examples, one_line

from bnsharp import parameters, scale_groups
from bnsharp import params as P
from bnsharp.algorithms import FAMILIES, algorithm, find, options_of
from bnsharp.errors import InputError
from bnsharp.regularizers import Penalty, Plain, Warm
from bnsharp.training_objective import TrainingObjective

NET = bn_mlp()
X, Y = examples(8)
GROUPS = scale_groups(NET, X)
NAMES = {family: family.replace("-N", "-2").replace("MEASURE", "gaussian") for family in FAMILIES}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_builds_with_its_defaults_and_takes_a_step(family):
    name = NAMES[family]
    built = algorithm(name, GROUPS)
    assert built.name == name and find(name)[0] is FAMILIES[family]
    assert built.options == options_of(*map_first(find(name)))
    batches = [(X.roll(i, 0), Y.roll(i, 0)) for i in range(1 + built.other_batches)]
    objectives = [TrainingObjective(NET, cross_entropy, batch) for batch in batches]
    regularizer, params = built.regularizer(0), parameters(NET)
    step = regularizer.step(
        objectives, params, weight=built.weight(0), state=regularizer.init(params),
        generator=torch.Generator().manual_seed(0),
    )
    assert bool((step.loss + P.norm(step.gradient)).isfinite()) and step.evaluations >= 1
    for value in (step.penalty, step.ratio):
        assert value.ndim == 0 and (value.isnan() or value.isfinite())
    assert all(isinstance(v, torch.Tensor) for v in step.state.values())
    assert FAMILIES[family].summary and FAMILIES[family].source


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_groups_are_needed_where_the_family_says_so(family):
    if FAMILIES[family].needs_groups:
        with pytest.raises(InputError) as caught:
            algorithm(NAMES[family])
        assert "scale_groups" in one_line(caught.value)
    else:
        algorithm(NAMES[family])


def map_first(found: Any) -> tuple[Any, ...]:
    """``(family, (matched, …))`` as arguments of ``options_of``."""
    return (found[0], *found[1])


def penalty(name: str, epoch: int = 0, **options: Any) -> Penalty:
    made = algorithm(name, GROUPS, **options).regularizer(epoch)
    assert isinstance(made, Penalty)
    return made


def test_sgd_is_plain():
    built = algorithm("sgd")
    assert built.regularizer(0) == Plain() and built.weight(9) == 1.0 and not built.other_batches


def test_sam_has_its_radius():
    made = penalty("sam", rho=0.3)
    assert made.measure.geometry.scale.value == 0.3 and algorithm("sam", weight=0.5).weight(3) == 0.5


@pytest.mark.parametrize("steps", [0, 1, 12])
def test_the_number_in_the_name_is_the_number_of_search_steps(steps):
    for name in (f"sgds-{steps}", f"sgds-{steps}-effective", f"sgds-{steps}-paper-lambda", f"sgds-{steps}-paper-delta"):
        assert penalty(name).measure.directions.steps == steps


@pytest.mark.parametrize("p", [1.0, 2.0, 5.0])
def test_the_default_weight_makes_a_whole_sharpness_aware_step(p):
    """c = λκ = 1 at λ = (p+1)^{1/p}, with δ = 0.08, no clip and the loss's own batch."""
    built = algorithm("sgds-0", GROUPS, p=p)
    kappa, delta = built.regularizer(0).measure.profile.secant()
    assert built.weight(0) * kappa == pytest.approx(1.0, rel=1e-12) and delta == 0.08
    assert built.regularizer(0).clip is None and not built.other_batches
    assert built.weight(0) == built.weight(50)


def test_the_papers_settings_read_as_lambda():
    built = algorithm("sgds-5-paper-lambda", GROUPS)
    for epoch in (0, 1, 100):
        made = built.regularizer(epoch)
        assert made.measure.profile.secant()[1] == pytest.approx(1e-3, rel=1e-12)
        assert built.weight(epoch) == pytest.approx(1e-4 * 1.02**epoch, rel=1e-12)
    paper(built)


def test_the_papers_settings_read_as_delta():
    built = algorithm("sgds-5-paper-delta", GROUPS)
    for epoch in (0, 1, 100):
        made = built.regularizer(epoch)
        assert made.measure.profile.secant()[1] == pytest.approx(1e-4 * 1.02**epoch, rel=1e-12)
        assert built.weight(epoch) == 1.0
    paper(built)


def paper(built: Any) -> None:
    made = built.regularizer(0)
    assert made.clip == 0.1 and made.gradient == "two-point" and built.other_batches
    assert made.measure.directions.rule == "riemannian" and made.measure.geometry.ball.rest == "joint"
    assert made.measure.directions.steps == 5 and made.measure.profile.p == 2.0


def test_options_arrive_and_are_recorded():
    options = {
        "delta": 0.02, "delta_growth": 1.1, "p": 3.0, "weight": 0.7, "weight_growth": 0.9, "gradient": "central",
        "clip": 0.5, "rest": "joint", "rule": "riemannian", "coordinates": "ambient", "nodes": 4,
        "independent_batch": True, "warm": False, "reuse_direction": 1,
    }
    built = algorithm("sgds-4", GROUPS, **options)
    assert set(options) == set(built.options) and built.options == options
    warm = algorithm("sgds-4", GROUPS, warm=True, reuse_direction=3).regularizer(0)
    assert isinstance(warm, Penalty) and warm.start == Warm() and warm.reuse == 3
    made = built.regularizer(2)
    line, search = made.measure.profile, made.measure.directions
    assert line.secant()[1] == pytest.approx(0.02 * 1.1**2, rel=1e-12)
    assert (line.p, line.nodes, made.gradient, made.clip) == (3.0, 4, "central", 0.5)
    assert (search.steps, search.rule, search.coordinates) == (4, "riemannian", "ambient")
    assert built.weight(2) == pytest.approx(0.7 * 0.9**2, rel=1e-12) and built.other_batches
    preset = algorithm("sgds-4-paper-lambda", GROUPS, clip=None, delta=0.01)
    assert preset.options["clip"] is None and preset.options["weight"] == 1e-4 and preset.regularizer(0).clip is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("given", "meant"), [
    ("sdg", "sgd"), ("sgds", None), ("sgds-", "sgds-N"), ("sgds--1", "sgds-N"), ("sgds-1.5", "sgds-N"),
    ("sgds-x", "sgds-N"), ("SAM", None), ("", None), ("sgds-3-paper-lamda", "sgds-N-paper-lambda"),
    ("sgds-3 ", "sgds-N"),
    ("sgds-3\n", "sgds-N"),
])
def test_an_unknown_name_is_refused_with_the_nearest_one(given, meant):
    with pytest.raises(InputError) as caught:
        algorithm(given, GROUPS)
    message = one_line(caught.value)
    assert all(name in message for name in FAMILIES)
    if meant:
        assert f"did you mean '{meant}'" in message


@pytest.mark.parametrize(("name", "option", "meant"), [
    ("sgds-2", "detla", "delta"), ("sgds-2-paper-delta", "weigth", "weight"), ("sam", "rh", "rho"),
    ("sgd", "rho", None),
    ("sgds-2", "steps", None), ("sgds-2-paper-delta", "options", None),
])
def test_an_unknown_option_is_refused_with_the_nearest_one(name, option, meant):
    with pytest.raises(InputError) as caught:
        algorithm(name, GROUPS, **{option: 1})
    message = one_line(caught.value)
    assert name in message and option in message
    if meant:
        assert f"did you mean '{meant}'" in message


BAD = [
    ("sgds-2", {"delta": 0.0}, "delta"), ("sgds-2", {"delta": -0.1}, "delta"), ("sgds-2", {"delta": math.nan}, "delta"),
    ("sgds-2", {"delta": math.inf}, "delta"), ("sgds-2", {"p": 0.5}, "p="), ("sgds-2", {"p": math.inf}, "p="),
    ("sgds-2", {"p": 0}, "p="), ("sgds-2", {"weight": -1.0}, "weight"), ("sgds-2", {"weight": math.nan}, "weight"),
    ("sgds-2", {"clip": 0.0}, "clip"), ("sgds-2", {"clip": -1.0}, "clip"),
    ("sgds-2", {"gradient": "exactly"}, "gradient"),
    ("sgds-2", {"rest": "none"}, "rest"), ("sgds-2", {"rule": "newton"}, "rule"), ("sgds-2", {"nodes": 0}, "nodes"),
    ("sgds-2", {"nodes": 2.5}, "nodes"), ("sgds-2", {"coordinates": "polar"}, "coordinates"),
    ("sgds-2", {"delta_growth": 0.0}, "delta_growth"), ("sgds-2", {"weight_growth": -1.0}, "weight_growth"),
    ("sam", {"rho": 0.0}, "rho"), ("sam", {"rho": -1.0}, "rho"), ("sam", {"weight": -1.0}, "weight"),
    ("sgds-2-paper-lambda", {"delta": -1.0}, "delta"),
    # wrong types, as they come from --set
    ("sgds-2", {"delta": "big"}, "delta"), ("sgds-2", {"delta": None}, "delta"), ("sgds-2", {"p": "two"}, "p="),
    ("sgds-2", {"weight": "big"}, "weight"), ("sgds-2", {"clip": "big"}, "clip"),
    ("sgds-2", {"nodes": "many"}, "nodes"),
    ("sgds-2", {"delta_growth": "big"}, "delta_growth"), ("sgds-2", {"weight_growth": "big"}, "weight_growth"),
    ("sgds-2", {"gradient": 3}, "gradient"), ("sgds-2", {"gradient": ["exact"]}, "gradient"),
    ("sgds-2", {"rule": ["alternate"]}, "rule"), ("sgds-2", {"independent_batch": "yes"}, "independent_batch"),
    ("sam", {"rho": "big"}, "rho"), ("sam", {"rho": [1]}, "rho"), ("sam", {"weight": None}, "weight"),
]


@pytest.mark.parametrize(("name", "options", "word"), BAD, ids=lambda v: str(v))
def test_an_option_out_of_range_or_of_the_wrong_type_is_refused_in_one_line(name, options, word):
    with pytest.raises(InputError) as caught:
        algorithm(name, GROUPS, **options)
    assert word in one_line(caught.value)
