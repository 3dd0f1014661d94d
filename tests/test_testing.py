"""The conformance kit bites: every check catches a bug planted for it, and passes the same subject without the bug."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnsharp import InputError, ScaleGroups, exact_norms
from bnsharp import params as P
from bnsharp.geometry import Euclidean, Groupwise
from bnsharp.measures import bn_sharpness
from bnsharp.regularizers import asam, sam
from bnsharp.testing import (
    Check,
    CheckFailed,
    UnexpectedPass,
    batches,
    check_geometry,
    check_measure,
    check_regularizer,
    data_rules,
    geometry_rules,
    measure_rules,
    network,
    networks,
    penalty_rules,
    quadratics,
    regularizer_rules,
    scale_factors,
    transformations,
)
from bnsharp.testing.measure_subject import hold_unit

# ---------------------------------------------------------------- planted bugs


@dataclass(frozen=True)
class Bug:
    """A bug and the check that catches it.

    Attributes:
        check: the name of the check.
        wrong, right: builders of the subject with the bug and without it.
        says: what both declare.
        right_says: what the right one declares, where that is the difference.
    """

    check: str
    wrong: Callable[..., Any]
    right: Callable[..., Any]
    says: dict[str, Any] = field(default_factory=dict)
    right_says: dict[str, Any] | None = None


TOY = planted.Toy
SIGNED = {"properties": {"sampled"}, "closed_form": planted.signed_form}
SEARCHED = {"properties": {"searched"}, "invariant": {"scale"}, "hold": hold_unit}
HELD = {"properties": {"searched"}, "hold": lambda measure, unit: hold_unit(getattr(measure, "measure", measure), unit)}

MEASURE_BUGS: dict[str, Bug] = {
    "joint norm instead of one per group": Bug(
        "invariant_under_scale", planted.JointNorm, TOY, {"invariant": {"scale"}, "properties": {"sampled"}}
    ),
    "absolute value forgotten": Bug("nonnegative", planted.Signed, TOY, {"properties": {"sampled", "nonnegative"}}),
    "one-sided interval": Bug("two_sided", planted.OneSided, TOY, {"properties": {"sampled", "two-sided"}}),
    "v frozen where it must move, off the sphere": Bug(
        "penalty_orthogonal", planted.FrozenPerturbation, TOY, {"invariant": {"scale"}, "properties": {"sampled"}}
    ),
    "v frozen where it must move": Bug(
        "penalty_gradient", planted.FrozenPerturbation, TOY, {"properties": {"sampled"}}
    ),
    "running statistics used": Bug("ignores_running_statistics", planted.RunningStatistics, TOY),
    "baseline loss in another mode": Bug("ignores_running_statistics", planted.BaselineInAnotherMode, TOY),
    "tied weight counted twice": Bug("counts_a_tied_weight_once", planted.TiedTwice, TOY),
    "law not normalised": Bug("closed_form", planted.LawNotNormalized, planted.Signed, SIGNED),
    "δ² for δ": Bug("closed_form", planted.SquaredDelta, planted.Signed, SIGNED),
    "sum over draws instead of their mean": Bug("closed_form", planted.SumOverDraws, planted.Signed, SIGNED),
    "variance for standard deviation": Bug(
        "standard_error", planted.VarianceForDeviation, TOY, {"properties": {"sampled"}}
    ),
    "unequal batches averaged unweighted": Bug("weighs_batches_by_examples", planted.UnweightedBatches, TOY),
    "sum over batches instead of their mean": Bug("weighs_batches_by_examples", planted.SumOverBatches, TOY),
    "buffers left changed": Bug("leaves_network_alone", planted.LeavesBuffersChanged, TOY),
    "global random numbers": Bug("leaves_random_state_alone", planted.GlobalRandomNumbers, TOY),
    "not reproducible": Bug("deterministic", planted.NotReproducible, TOY, {"properties": {"sampled"}}),
    "random, and not said so": Bug("deterministic", TOY, TOY, {}, {"properties": {"sampled"}}),
    "0/0 at a group of norm zero": Bug("finite_at_a_group_of_norm_zero", planted.ZeroOverZero, TOY),
    "cancellation in float32": Bug("float32_is_close", planted.Vanishing, TOY),
    "directions beyond the first chunk dropped": Bug("engines_agree", planted.FirstChunkAlone, TOY),
    "divided by the loss": Bug("ignores_a_constant", planted.OverTheLoss, TOY, {"properties": {"offset"}}),
    "root forgotten": Bug("homogeneous_in_the_loss", planted.Squared, TOY, {"properties": {"homogeneous"}}),
    "root of a power forgotten": Bug(
        "monotone_in_p", TOY, TOY, {"powers": planted.RootForgotten}, {"powers": planted.PowerToy}
    ),
    "plain functions refused": Bug("accepts_a_plain_function", planted.NeedsAModule, TOY),
    "NaN hidden": Bug("refuses_nan", planted.HidesNaN, TOY),
    "penalty of another size": Bug("penalty_is_the_value", planted.TwiceAsPenalty, TOY),
    "gradient of the baseline forgotten": Bug("penalty_gradient", planted.ForgetsTheBaseline, TOY),
    "slope of a root at zero": Bug("penalty_finite_at_a_group_of_norm_zero", planted.RootOfSquares, TOY),
    "depends on the order of neurons": Bug(
        "invariant_under_permutation", planted.first_weight, planted.gradient_norm, {"invariant": {"permutation"}}
    ),
    "changes under ReLU rescaling": Bug(
        "invariant_under_relu", planted.gradient_norm, lambda groups: lambda *_: planted.Estimate(1.0, 0.0, 0.0),
        {"invariant": {"relu"}},
    ),
    "declared not scale invariant, and is": Bug(
        "changes_under_scale", TOY, planted.gradient_norm, {"not_invariant": {"scale"}}
    ),
    "declared not permutation invariant, and is": Bug(
        "changes_under_permutation", planted.gradient_norm, planted.first_weight, {"not_invariant": {"permutation"}}
    ),
    "declared to change under ReLU rescaling, and does not": Bug(
        "changes_under_relu", lambda groups: lambda *_: planted.Estimate(1.0, 0.0, 0.0), planted.gradient_norm,
        {"not_invariant": {"relu"}},
    ),
    "ambient step in the search": Bug(
        "search_is_equivariant", lambda groups: planted.searched(groups, coordinates="ambient"), planted.searched,
        SEARCHED,
    ),
    "ambient step, seen in the value": Bug(
        "invariant_under_scale", lambda groups: planted.searched(groups, coordinates="ambient"), planted.searched,
        SEARCHED,
    ),
    "best direction forgotten": Bug("search_beats_its_start", planted.wandering, planted.searched, SEARCHED),
    "another direction reported": Bug("search_attains_its_value", planted.wrong_direction, planted.searched, HELD),
    "upper bound below the value": Bug("upper_bound", planted.wrong_bound, planted.searched, HELD),
}

ROUND = {"equivariant": True, "second_moment": "group"}
GEOMETRY_BUGS: dict[str, Bug] = {
    "u normalized on the way": Bug("place_is_linear", planted.as_class(planted.PlaceNormalizes), Groupwise),
    "scale detached": Bug("place_is_differentiable", planted.as_class(planted.PlaceDetached), Groupwise),
    "v frozen": Bug("moving", planted.as_class(planted.NothingMoves), Groupwise),
    "pull by the inverse": Bug("pull_is_the_adjoint", planted.framed(planted.PullByTheInverse), Groupwise),
    "0/0 in the scale": Bug("finite_at_a_group_of_norm_zero", planted.inverse_norms, Groupwise),
    "steepest not normalized": Bug("steepest_is_feasible", planted.framed(planted.SteepestUnnormalized), Groupwise),
    "joint norm instead of one per group": Bug(
        "steepest_is_steepest", planted.framed(planted.SteepestJointly), Groupwise
    ),
    "one ball's steepest point": Bug("summit", planted.framed(planted.SummitOfOneBall), Groupwise),
    "retraction that stops halfway": Bug("retract", planted.balled(planted.RetractHalfway), Groupwise),
    "projection forgotten": Bug("tangent", planted.balled(planted.TangentForgotten), Groupwise),
    "walls of the box forgotten": Bug(
        "tangent_is_first_order", planted.box(planted.BoxWithoutWalls), planted.box(planted.BoxBall), {"ball": "box"}
    ),
    "length forgotten": Bug("back", planted.balled(planted.BackWithoutLength), Groupwise),
    "power step that stays put": Bug("power", planted.balled(planted.PowerStaysPut), Groupwise),
    "downhill": Bug("uphill", planted.framed(planted.Downhill), Groupwise),
    "constant scale declared equivariant": Bug("equivariance", lambda groups: Euclidean(1.0), Groupwise, ROUND),
    "law not normalised": Bug("laws", planted.balled(planted.UnitCoordinates), Groupwise, ROUND),
}

PENALTY = {"properties": {"penalty", "second-batch", "weighted", "evaluates-loss"}}


def central(groups: ScaleGroups) -> planted.Central:
    return planted.Central()


def wrapped(**changes: Any) -> Callable[[ScaleGroups], planted.Wrapped]:
    return lambda groups: planted.Wrapped(**changes)


REGULARIZER_BUGS: dict[str, Bug] = {
    "state of numbers": Bug("state_is_tensors", lambda groups: planted.NumberAsState(), central),
    "not reproducible": Bug("deterministic", lambda groups: planted.RandomSteps(), central),
    "parameters written to": Bug("leaves_network_alone", wrapped(before=planted.in_place), central),
    "another forward pass": Bug("moves_running_statistics_once", wrapped(before=planted.another_forward), central),
    "a gradient not counted": Bug("counts_its_gradients", wrapped(after=lambda s: {"evaluations": 2}), central),
    "another loss reported": Bug(
        "loss_is_the_loss", wrapped(after=lambda s: {"loss": s.loss * 1.01}), central, PENALTY
    ),
    "weight squared": Bug("weight_scales_the_penalty", lambda groups: planted.SquaredWeight(), central, PENALTY),
    "central difference without one half": Bug(
        "gradient", lambda groups: planted.WithoutHalf(), central,
        {"properties": {"exact"}, "penalised": planted.central_value},
    ),
    "fixed radius declared equivariant": Bug(
        "equivariant", lambda groups: sam(rho=0.1), lambda groups: asam(rho=0.1, eta=0.0),
        {"properties": {"equivariant"}},
    ),
    "second batch ignored": Bug("second_batch", lambda groups: planted.FirstBatchAlone(), central, PENALTY),
    "state not saved": Bug(
        "resumes", lambda groups: planted.StateOnTheInstance(0.9), lambda groups: planted.Central(0.9)
    ),
    "any weight taken": Bug("refuses_bad_weights", lambda groups: planted.AnyWeight(), central, PENALTY),
    "NaN hidden": Bug("shows_nan", wrapped(before=planted.without_nan), central),
}

MEASURE_RULES = (*measure_rules.RULES, *data_rules.DATA_RULES, *penalty_rules.PENALTY_RULES)
KITS: dict[str, tuple[Callable[..., list[Check]], dict[str, Bug], set[str]]] = {
    "measure": (check_measure, MEASURE_BUGS, {r.name for r in MEASURE_RULES}),
    "geometry": (check_geometry, GEOMETRY_BUGS, {r.name for r in geometry_rules.RULES}),
    "regularizer": (check_regularizer, REGULARIZER_BUGS, {r.name for r in regularizer_rules.RULES}),
}


def named(checks: list[Check], name: str) -> Check:
    (check,) = [c for c in checks if c.name == name]
    return check


@pytest.mark.parametrize(("kit", "bug"), [(k, b) for k, (_, bugs, _) in KITS.items() for b in bugs])
def test_a_planted_bug_is_caught_by_its_check(kit: str, bug: str) -> None:
    """The message is one line that names the subject; the same subject without the bug passes."""
    check, bugs, _ = KITS[kit]
    b = bugs[bug]
    with pytest.raises(CheckFailed) as caught:
        named(check(b.wrong, name="planted", **b.says), b.check)()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("planted: ")
    says = b.says if b.right_says is None else b.right_says
    named(check(b.right, name="right", examples=1, **says), b.check)()


@pytest.mark.parametrize("kit", list(KITS))
def test_every_check_is_shown_to_bite(kit: str) -> None:
    _, bugs, names = KITS[kit]
    assert {b.check for b in bugs.values()} == names


@pytest.mark.parametrize("kit", list(KITS))
def test_every_check_is_documented(kit: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "testing.md").read_text()
    assert not [name for name in KITS[kit][2] if f"`{name}`" not in page]


@pytest.mark.parametrize(
    "check",
    check_measure(
        TOY, name="toy", invariant={"scale", "permutation"}, not_invariant={"relu"}, examples=1,
        properties={"offset", "homogeneous", "two-sided", "nonnegative", "sampled"}, powers=planted.PowerToy,
    ),
    ids=str,
)
def test_a_measure_of_ones_own(check: Check) -> None:
    """A measure that shares no code with ours passes all that it declares."""
    check()


# ---------------------------------------------------------------- checks as values


def test_messages_hold_the_numbers() -> None:
    bug = MEASURE_BUGS["joint norm instead of one per group"]
    with pytest.raises(CheckFailed) as caught:
        named(check_measure(bug.wrong, name="joint", **bug.says), bug.check)()
    assert len(re.findall(r"\d\.\d+", str(caught.value))) >= 2
    with pytest.raises(CheckFailed) as again:
        named(check_measure(bug.wrong, name="joint", **bug.says), bug.check)()
    assert str(again.value) == str(caught.value)  # the same examples on every run


def test_ids_are_readable() -> None:
    checks = check_measure(TOY, name="mine", invariant={"scale"})
    assert str(checks[0]) == "mine-deterministic"
    assert len({str(c) for c in checks}) == len(checks)
    assert str(Check("bare", lambda: None)) == "bare"


def test_an_expected_failure_must_fail() -> None:
    bug, reason = MEASURE_BUGS["running statistics used"], "on purpose"
    failing = named(check_measure(bug.wrong, name="x", expected_failures={bug.check: reason}), bug.check)
    failing()
    assert failing.reason == reason
    with pytest.raises(UnexpectedPass, match=r"x: check ignores_running_statistics passed .*on purpose"):
        named(check_measure(bug.right, name="x", expected_failures={bug.check: reason}), bug.check)()


def test_a_bug_of_the_kit_is_no_expected_failure() -> None:
    """Only what the subject does counts as its failure."""
    broken = Check("broken", lambda: 1 / 0, reason="whatever")  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        broken()


def test_a_subject_that_raises_fails_its_checks() -> None:
    def build(groups: ScaleGroups) -> Any:
        raise RuntimeError("no such\nluck")

    for check in check_measure(build, name="broken"):
        with pytest.raises(CheckFailed, match=r"broken: building it raised RuntimeError: no such$"):
            check()


def test_checks_follow_the_declaration() -> None:
    names = {c.name for c in check_measure(lambda groups: lambda *_: None, name="bare")}
    assert not names & {"standard_error", "closed_form", "penalty_gradient", "invariant_under_scale", "upper_bound"}
    full = {c.name for c in check_measure(bn_sharpness, name="s", invariant={"scale"}, properties={"searched"})}
    assert {"penalty_orthogonal", "search_is_equivariant", "search_beats_its_start", "invariant_under_scale"} <= full


BAD: dict[str, Callable[[], Any]] = {
    "property": lambda: check_measure(TOY, name="x", properties={"sample"}),
    "property as a string": lambda: check_measure(TOY, name="x", properties="sampled"),
    "invariance": lambda: check_measure(TOY, name="x", invariant={"rescaling"}),
    "both ways": lambda: check_measure(TOY, name="x", invariant={"scale"}, not_invariant={"scale"}),
    "unknown expected failure": lambda: check_measure(TOY, name="x", expected_failures={"determinist": "why"}),
    "check not chosen": lambda: check_measure(TOY, name="x", expected_failures={"standard_error": "why"}),
    "no reason": lambda: check_measure(TOY, name="x", expected_failures={"deterministic": " "}),
    "examples": lambda: check_measure(TOY, name="x", examples=0),
    "rtol": lambda: check_measure(TOY, name="x", rtol=0.0),
    "ball": lambda: check_geometry(Groupwise, name="x", ball="round"),
    "moment": lambda: check_geometry(Groupwise, name="x", second_moment="third"),
    "regularizer property": lambda: check_regularizer(central, name="x", properties={"penal"}),
    "regularizer weight": lambda: check_regularizer(central, name="x", weight=-1.0),
    "normalizer": lambda: networks(normalizer="bach"),
    "no normalizer": lambda: networks(normalizer=()),
    "activation": lambda: networks(activation="sine"),
    "instance without images": lambda: networks(normalizer="instance", conv=False),
    "widths": lambda: networks(min_width=6, max_width=4),
    "odd width": lambda: networks(min_width=5, max_width=5),
    "odd width of one": lambda: network(width=5),
    "blocks of two": lambda: network("group", width=4),
    "blocks of two drawn": lambda: networks(normalizer="group", conv=False, max_width=4),
    "examples of a network": lambda: networks(min_examples=2),
    "dropout": lambda: networks(dropout=1.0),
    "eps": lambda: networks(eps=0.0),
    "batch": lambda: batches(min_examples=5, max_examples=4),
    "shape": lambda: batches((0,)),
    "classes": lambda: batches(classes=0),
    "factors": lambda: scale_factors(network().groups, network().params, 2.0, 1.0),
    "factor of zero": lambda: scale_factors(network().groups, network().params, 0.0, 1.0),
    "transformation": lambda: transformations(network(), ("rotation",)),
    "no transformation": lambda: transformations(network(), ()),
    "no scale groups": lambda: transformations(network("none"), ("scale",)),
    "cubic": lambda: quadratics(cubic=float("nan")),
    "rows": lambda: quadratics(rows=0),
}


@pytest.mark.parametrize("name", list(BAD))
def test_arguments_are_checked_at_once(name: str) -> None:
    with pytest.raises(InputError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- strategies

few = settings(max_examples=12)

KNOWN: dict[tuple[str, bool, bool], dict[str, str]] = {
    ("batch", False, False): {"0.weight": "row", "3.weight": "row"},
    ("batch", False, True): {"0.weight": "row", "0.bias": "inert", "3.weight": "row", "3.bias": "inert"},
    ("batch", True, True): {"0.weight": "row", "0.bias": "inert", "3.weight": "row", "3.bias": "inert"},
    ("layer", False, False): {"0.weight": "tensor", "3.weight": "tensor"},
    ("layer", False, True): {"0.weight": "joint", "0.bias": "joint", "3.weight": "joint", "3.bias": "joint"},
    ("group", False, False): {"0.weight": "block", "3.weight": "block"},
    ("instance", True, False): {"0.weight": "row", "3.weight": "row"},
    ("rms", False, True): {"0.weight": "joint", "0.bias": "joint", "3.weight": "joint", "3.bias": "joint"},
    ("weight", False, True): {
        "0.parametrizations.weight.original1": "row", "3.parametrizations.weight.original1": "row",
    },
    ("none", True, True): {},
}


@pytest.mark.parametrize("kind", list(KNOWN), ids=str)
def test_networks_have_the_groups_of_their_normalizer(kind: tuple[str, bool, bool]) -> None:
    normalizer, conv, bias = kind
    assert network(normalizer, "tanh", conv, bias=bias, seed=1).groups.invariant == KNOWN[kind]


@few
@given(st.data())
def test_transformations_keep_the_network(data: st.DataObject) -> None:
    """Every kind, on every network that has it: the same loss at other parameters."""
    net = data.draw(networks(activation=None))
    kinds = ["permutation"] + ["scale"] * bool(net.groups.partition.groups)
    kinds += ["relu"] * bool(net.transformations["relu_rescaling"].sites)
    transform = data.draw(transformations(net, kinds))
    objective, params = net.objective(), net.params
    moved = transform(params)
    assert float(P.norm(P.combine(1.0, moved, -1.0, params))) > 1e-3
    with exact_norms(net.module):
        assert objective(moved).item() == pytest.approx(objective(params).item(), rel=1e-9)


@few
@given(st.data(), st.floats(0.1, 1.0), st.floats(1.0, 10.0))
def test_scale_factors_stay_in_their_range(data: st.DataObject, low: float, high: float) -> None:
    net = network("group", seed=3)
    factors = data.draw(scale_factors(net.groups, net.params, low, high))
    assert all(bool(((low <= a) & (a <= high)).all()) for a in factors.values())
    moved = net.groups.rescale(net.params, factors)
    assert net.objective()(moved).item() == pytest.approx(net.objective()(net.params).item(), rel=1e-9)


@few
@given(batches((2, 3), min_examples=2, max_examples=5, classes=4), batches(classes=None))
def test_batches(labelled: tuple[torch.Tensor, torch.Tensor], real: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = labelled
    assert x.dtype == torch.float64 and x.shape[1:] == (2, 3) and 2 <= len(x) == len(y) <= 5
    assert y.dtype == torch.int64 and int(y.min()) >= 0 and int(y.max()) < 4
    assert real[1].shape == (len(real[0]), 3) and real[1].is_floating_point()


@few
@given(quadratics(stationary=None, definite=True, cubic=0.3), st.integers(0, 99))
def test_quadratics_are_what_they_say(loss: Any, seed: int) -> None:
    """Gradient and Hessian at θ* by autograd; the same loss as a network's; ``L(θ*) = 1``."""
    theta = P.flatten(loss.theta)
    leaf = theta.clone().requires_grad_()

    def value(x: torch.Tensor) -> torch.Tensor:
        return loss(P.unflatten(x, loss.theta))

    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(gradient, loss.gradient)
    torch.testing.assert_close(torch.autograd.functional.hessian(value, theta), loss.A)
    assert float(torch.linalg.eigvalsh(loss.A)[0]) > 0 and value(theta).item() == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(seed)
    at = P.unflatten(torch.randn(len(theta), generator=generator, dtype=theta.dtype), loss.theta)
    assert loss.objective()(at).item() == pytest.approx(loss(at).item(), rel=1e-12)
    assert loss.objective(lambda fn: lambda p: 2 * fn(p))(at).item() == pytest.approx(2 * loss(at).item(), rel=1e-12)
