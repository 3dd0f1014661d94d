"""The checks of a regulariser; each body is one property, told in the words of its failure."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bnsharp import params as P
from bnsharp.evaluation import AbstractObjective, as_objective
from bnsharp.groups import ScaleGroups
from bnsharp.loop import backward
from bnsharp.objective import Objective
from bnsharp.testing.check import Rule, agree, calling, five_point, for_all, refusal, require
from bnsharp.testing.networks import SMOOTH, Network
from bnsharp.testing.snapshots import changed, in_use, random_states, snapshot, told
from bnsharp.testing.strategies import Quadratic, Transform, networks, quadratics, seeds, transformations
from bnsharp.types import Params, Step

PROPERTIES: dict[str, str] = {
    "penalty": "the gradient is ∇L + λ r: weight 0 gives ∇L, and twice the weight twice the difference",
    "evaluates-loss": "Step.loss is L(θ) on objectives[0]",
    "exact": "r is the gradient of the penalty's value, or of the function given as penalised",
    "equivariant": "under T_a the gradient of group i is divided by a_i",
    "second-batch": "r is taken on objectives[1] where one is given",
    "weighted": "a weight that is negative or not finite is refused",
}
"""What a regulariser can declare."""

Penalised = Callable[[AbstractObjective, Params, Params, torch.Generator], float]


@dataclass(frozen=True)
class Declared:
    """What a regulariser's author says about it; see :func:`check_regularizer`."""

    build: Callable[[ScaleGroups], Any]
    name: str
    properties: frozenset[str]
    penalised: Penalised | None
    weight: float
    rtol: float
    examples: int

    def made(self, groups: ScaleGroups) -> Any:
        """The regulariser for these groups."""
        with calling(f"{self.name}: building it"):
            return self.build(groups)

    def step(
        self, regularizer: Any, objectives: Sequence[Any], params: Params, *, weight: float | None = None,
        state: Any = None, seed: int = 0,
    ) -> Step:
        """One step with a generator of this seed, from ``init``'s state unless one is given."""
        with calling(f"{self.name}: a step"):
            state = regularizer.init(params) if state is None else state
            step = regularizer.step(
                [as_objective(o) for o in objectives], params, weight=self.weight if weight is None else weight,
                state=state, generator=torch.Generator().manual_seed(seed),
            )
            missing = params.keys() - step.gradient.keys()
            require(not missing, f"{self.name}: the step's gradient lacks {told(sorted(missing))}")
        return step

    def gradient(self, *args: Any, **options: Any) -> Params:
        """The gradient of :meth:`step`, finite."""
        gradient = self.step(*args, **options).gradient
        finite = all(bool(g.isfinite().all()) for g in gradient.values())
        require(finite, f"{self.name}: the step's gradient is not finite")
        return gradient


def _same(declared: Declared, a: Params, b: Params, sentence: str, allowed: float) -> None:
    off, size = float(P.norm(P.combine(1.0, a, -1.0, b))), max(float(P.norm(a)), float(P.norm(b)))
    require(off <= allowed * size + 1e-14, f"{declared.name}: {sentence}: they differ by {off:.3g} of {size:.3g}")


# ---------------------------------------------------------------- protocol


def _init(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        regularizer = declared.made(loss.groups)
        with calling(f"{declared.name}: init"):
            state = regularizer.init(loss.theta)
        _check_state(declared, state, "init")
        _check_state(declared, declared.step(regularizer, [loss], loss.theta).state, "a step")

    for_all(quadratics(), body, declared.examples)


def _check_state(declared: Declared, state: Any, where: str) -> None:
    what = f"{declared.name}: the state of {where}"
    require(isinstance(state, dict), f"{what} is {type(state).__name__}; expected a dict")
    for key, value in state.items():
        require(
            isinstance(key, str) and isinstance(value, Tensor),
            f"{what} holds {key!r} of type {type(value).__name__}; expected tensors by name",
        )


def _deterministic(declared: Declared) -> None:
    def body(net: Network) -> None:
        one, two = (
            declared.step(declared.made(net.groups), [net.objective()], net.params, seed=3) for _ in range(2)
        )
        differ = [k for k, v in one.gradient.items() if not torch.equal(v, two.gradient[k])]
        require(not differ, f"{declared.name}: two steps with one seed differ in the gradient of {told(differ)}")
        agree(float(one.loss), float(two.loss), 0.0, f"{declared.name}: two steps with one seed lost {{a}} and {{b}}")

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


def _leaves_network_alone(declared: Declared) -> None:
    def body(seed: int) -> None:
        net = in_use(seed=seed)
        groups, params, objective = net.groups, net.params, net.objective()
        regularizer = declared.made(groups)
        state = regularizer.init(params)
        kept = {k: v.clone() for k, v in state.items()}
        before, given, outside = snapshot(net.module), params.clone(), random_states()
        declared.step(regularizer, [objective], params, state=state)
        differ = changed({**before, **outside}, {**snapshot(net.module), **random_states()})
        require(not differ, f"{declared.name}: a step changed {told(differ)}")
        moved = [k for k, v in given.items() if not torch.equal(v, params[k])]
        require(not moved, f"{declared.name}: a step wrote to the parameters it was given: {told(moved)}")
        written = changed(kept, dict(state))
        require(not written, f"{declared.name}: a step wrote to the state it was given: {told(written)}")

    for_all(seeds(), body, declared.examples)


def _running_statistics(declared: Declared) -> None:
    """One step in a training loop moves running statistics as one plain forward pass does."""

    def body(seed: int) -> None:
        net = in_use(seed=seed)
        twin = copy.deepcopy(net.module)
        with torch.no_grad():
            twin(net.x)
        regularizer = declared.made(net.groups)
        with calling(f"{declared.name}: bnsharp.backward"):
            backward(net.module, net.criterion, (net.x, net.y), regularizer, declared.weight,
                     generator=torch.Generator().manual_seed(0))
        for (name, ours), (_, plain) in zip(net.module.named_buffers(), twin.named_buffers(), strict=True):
            off = float((ours.double() - plain.double()).abs().max())
            require(off <= 1e-12, f"{declared.name}: after one step buffer {name} is {off:.3g} from one forward pass's")

    for_all(seeds(), body, declared.examples)


def _counts(declared: Declared) -> None:
    def body(net: Network) -> None:
        objectives = [net.objective(), net.objective()] if "second-batch" in declared.properties else [net.objective()]
        step = declared.step(declared.made(net.groups), objectives, net.params)
        counted = sum(o.evaluations["gradients"] + o.evaluations["products"] for o in objectives)
        require(
            step.evaluations == counted,
            f"{declared.name}: the step reports {step.evaluations} gradients, its objectives evaluated {counted}",
        )

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


def _loss(declared: Declared) -> None:
    def body(net: Network) -> None:
        step, objective = declared.step(declared.made(net.groups), [net.objective()], net.params), net.objective()
        loss = float(objective(net.params).detach())
        allowed = 1e-10 * (1 + abs(loss))
        agree(float(step.loss), loss, allowed, f"{declared.name}: the step's loss is {{a}}, L(θ) is {{b}}")

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


# ---------------------------------------------------------------- gradients


def _plain(objective: Any, params: Params) -> Params:
    return as_objective(objective).value_and_grad(params)[1]


def _weight(declared: Declared) -> None:
    def body(net: Network) -> None:
        regularizer, params = declared.made(net.groups), net.params
        plain = _plain(net.objective(), params)
        none, once, twice = (
            declared.gradient(regularizer, [net.objective()], params, weight=k * declared.weight) for k in (0, 1, 2)
        )
        _same(declared, none, plain, "at weight 0 the gradient is not ∇L", declared.rtol)
        r, more = (P.combine(1.0, g, -1.0, plain) for g in (once, twice))
        _same(declared, more, P.scaled(r, 2.0), "twice the weight does not add twice the gradient", declared.rtol)

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


def _gradient(declared: Declared) -> None:
    """``⟨gradient, d⟩`` against differences of ``L + λ S``."""

    def body(loss: Quadratic) -> None:
        regularizer, theta = declared.made(loss.groups), loss.theta
        penalised = declared.penalised or _own_value(declared, regularizer)
        generator = torch.Generator().manual_seed(1)
        d = P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), theta)

        def total(h: float) -> float:
            at = P.shift(theta, d, h)
            with calling(f"{declared.name}: penalised"):
                added = float(penalised(as_objective(loss), at, theta, torch.Generator().manual_seed(0)))
            return float(loss(at)) + declared.weight * added

        gradient = declared.gradient(regularizer, [loss], theta)
        slope = five_point(total)
        agree(
            float(P.dot(gradient, d)), slope, 1e-5 * (float(P.norm(gradient) * P.norm(d)) + abs(slope)),
            f"{declared.name}: the gradient's component along a direction is {{a}}, differences of L + λS give {{b}}",
        )

    for_all(quadratics(cubic=0.5), body, declared.examples)


def _own_value(declared: Declared, regularizer: Any) -> Penalised:
    """The value that the regulariser reports, with the same seed: right where what is held does not depend on θ."""

    def value(objective: AbstractObjective, params: Params, held: Params, generator: torch.Generator) -> float:
        return float(declared.step(regularizer, [objective], params).penalty)

    return value


def _equivariant(declared: Declared) -> None:
    @st.composite
    def pairs(draw: st.DrawFn) -> tuple[Network, Transform]:
        net = draw(networks(normalizer=("batch", "layer", "group", "weight"), activation=SMOOTH, conv=False))
        return net, draw(transformations(net, ("scale",)))

    def body(pair: tuple[Network, Transform]) -> None:
        net, transform = pair
        regularizer = declared.made(net.groups)
        assert transform.factors is not None
        one, two = (declared.gradient(regularizer, [net.objective()], t) for t in (net.params, transform(net.params)))
        back = net.groups.rescale(two, transform.factors)
        _same(declared, back, one, "a times the gradient at T_a θ is not the gradient at θ", max(declared.rtol, 1e-6))

    for_all(pairs(), body, declared.examples)


def _second_batch(declared: Declared) -> None:
    def body(net: Network) -> None:
        regularizer, params = declared.made(net.groups), net.params
        other = Objective(net.module, net.criterion, (net.x.flip(0) + 0.3, net.y))
        step = declared.step(regularizer, [net.objective(), other], params)
        loss, plain = net.objective().value_and_grad(params)
        agree(float(step.loss), float(loss), 1e-10 * (1 + abs(float(loss))),
              f"{declared.name}: with a second batch the loss is {{a}}, that of the first batch {{b}}")
        alone = declared.step(regularizer, [other], params)
        r = P.combine(1.0, step.gradient, -1.0, plain)
        expected = P.combine(1.0, alone.gradient, -1.0, _plain(other, params))
        _same(declared, r, expected, "what is added to the first batch's ∇L is not the second batch's r", declared.rtol)

    for_all(networks(normalizer=("batch", "none")), body, declared.examples)


# ---------------------------------------------------------------- state, bad input


STEPS = 4


def _resumes(declared: Declared) -> None:
    """Saved and loaded after each of a few steps by a regulariser built anew, it goes on identically."""

    def body(net: Network) -> None:
        plain, resumed = (_run(declared, net, again) for again in (False, True))
        differ = [k for k, v in plain.items() if not torch.equal(v, resumed[k])]
        require(
            not differ, f"{declared.name}: after {STEPS} steps, saved and loaded in between, {told(differ)} "
            "is not what it is without; everything carried over must be in the state",
        )

    for_all(networks(normalizer=("batch", "none"), conv=False), body, declared.examples)


def _run(declared: Declared, net: Network, resume: bool) -> Params:
    params, regularizer = net.params, declared.made(net.groups)
    with calling(f"{declared.name}: init"):
        state = regularizer.init(params)
    for k in range(STEPS):
        if resume and k:
            regularizer, state = declared.made(net.groups), _reloaded(declared, state)
        step = declared.step(regularizer, [net.objective()], params, state=state, seed=k)
        params, state = P.shift(params, step.gradient, -0.05), step.state
    return params


def _reloaded(declared: Declared, state: Any) -> Any:
    file = io.BytesIO()
    with calling(f"{declared.name}: saving its state"):
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def _bare_step(regularizer: Any, loss: Quadratic, params: Params, weight: float) -> Step:
    """A step whose errors are not caught."""
    generator = torch.Generator().manual_seed(0)
    state = regularizer.init(params)
    return regularizer.step([as_objective(loss)], params, weight=weight, state=state, generator=generator)


def _bad_weight(declared: Declared) -> None:
    def body(loss: Quadratic) -> None:
        regularizer = declared.made(loss.groups)
        for weight in (-1.0, math.nan, math.inf):
            refusal(
                f"{declared.name}: weight={weight}",
                functools.partial(_bare_step, regularizer, loss, loss.theta, weight),
            )

    for_all(quadratics(), body, 1)


def _shows_nan(declared: Declared) -> None:
    """Parameters with a NaN are refused in one line, or the step shows it: never a finite loss and gradient."""

    def body(loss: Quadratic) -> None:
        regularizer, theta = declared.made(loss.groups), loss.theta.clone()
        theta["bias"][0] = math.nan
        run = functools.partial(_bare_step, regularizer, loss, theta, declared.weight)
        try:
            step = run()
        except Exception:
            refusal(f"{declared.name}: a step at parameters with a NaN", run)
            return
        finite = bool(step.loss.isfinite()) and all(bool(g.isfinite().all()) for g in step.gradient.values())
        require(not finite, f"{declared.name}: a step at parameters with a NaN gave a finite loss and gradient")

    for_all(quadratics(), body, 1)


def _has(name: str) -> Callable[[Declared], bool]:
    return lambda declared: name in declared.properties


RULES: tuple[Rule[Declared], ...] = (
    Rule("state_is_tensors", _init),
    Rule("deterministic", _deterministic),
    Rule("leaves_network_alone", _leaves_network_alone),
    Rule("moves_running_statistics_once", _running_statistics),
    Rule("counts_its_gradients", _counts),
    Rule("loss_is_the_loss", _loss, _has("evaluates-loss")),
    Rule("weight_scales_the_penalty", _weight, _has("penalty")),
    Rule("gradient", _gradient, _has("exact")),
    Rule("equivariant", _equivariant, _has("equivariant")),
    Rule("second_batch", _second_batch, _has("second-batch")),
    Rule("resumes", _resumes),
    Rule("refuses_bad_weights", _bad_weight, _has("weighted")),
    Rule("shows_nan", _shows_nan),
)
