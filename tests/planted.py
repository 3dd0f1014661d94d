"""Small measures, geometries and regularisers written out by hand, and the same ones with one bug planted in each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnsharp import InputError, Objective, ScaleGroups
from bnsharp import params as P
from bnsharp.directions import Ascend
from bnsharp.evaluation import as_objective
from bnsharp.geometry import BoxBall, Constant, Frame, Geometry, GroupBall, Groupwise, JointBall
from bnsharp.laws import Sphere
from bnsharp.measures import Measure, bn_sharpness
from bnsharp.types import Estimate, Found, Params, State, Step

counter = itertools.count(1)


# ---------------------------------------------------------------- measures


class Toy:
    """``E_u E_t |L(θ + t v) − L(θ)|``, ``v_i = ‖θ_i‖ u_i``, u uniform on the spheres, t one of ±δ/2, ±δ."""

    delta, draws, absolute = 0.1, 6, True

    def __init__(self, groups: ScaleGroups):
        self.groups = groups

    def scale(self, params: Params) -> Params:
        partition = self.groups.partition_with(params)
        return partition.spread(partition.norms(params), params)

    def law(self, params: Params, generator: torch.Generator) -> Params:
        normal = P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params)
        return self.groups.partition_with(params).normalize(normal)

    def times(self) -> list[float]:
        return [-self.delta, -self.delta / 2, self.delta / 2, self.delta]

    def base(self, objective: Any, params: Params) -> Tensor:
        return self.loss(objective, params)

    def loss(self, objective: Any, params: Params) -> Tensor:
        return objective(params)

    def shifted(self, objective: Any, params: Params, v: Params, t: float) -> Params:
        return P.shift(params, v, t)

    def along(self, objective: Any, params: Params, v: Params) -> Tensor:
        base = self.base(objective, params)
        f = torch.stack([self.loss(objective, self.shifted(objective, params, v, t)) - base for t in self.times()])
        return (f.abs() if self.absolute else f).mean()

    def values(self, objective: Any, params: Params, generator: torch.Generator) -> Tensor:
        fixed = P.pmap(Tensor.detach, params)
        us = [self.law(fixed, generator) for _ in range(self.draws)]
        scale = self.scale(params)
        return torch.stack([self.along(objective, params, P.pmap(lambda a, s: a * s, u, scale)) for u in us])

    def reduce(self, values: Tensor) -> Tensor:
        return values.mean()

    def stderr(self, values: Tensor) -> float:
        return float(values.std()) / math.sqrt(len(values))

    def __call__(self, objective: Any, params: Params, generator: torch.Generator) -> Estimate:
        if not all(bool(v.isfinite().all()) for v in params.values()):
            raise InputError("parameters hold NaN; expected finite ones")
        with torch.no_grad():
            values = self.values(objective, params, generator)
        rounding = 8 * torch.finfo(values.dtype).eps * (1 + abs(float(values.mean())))
        return Estimate(float(self.reduce(values)), self.stderr(values), rounding)

    def penalty(self, objective: Any, params: Params, generator: torch.Generator) -> Tensor:
        return self.reduce(self.values(objective, params, generator))


class Signed(Toy):
    """The same without absolute values: on a quadratic ``(E t²/2) Σ_i ‖θ_i‖²/d_i tr A_ii``."""

    absolute = False


def signed_form(A: Tensor, b: Tensor, theta: Params, groups: ScaleGroups) -> float:
    """The value of :class:`Signed` on a quadratic."""
    partition = groups.partition_with(theta)
    per = partition.spread((partition.norms(theta) ** 2) / partition.sizes(theta), theta)
    variances = P.flatten(P.pmap(lambda p, s: s.expand(p.shape), theta, per))
    mean_square = Toy.delta**2 * (1 + 0.25) / 2
    return 0.5 * mean_square * float((variances * A.diagonal()).sum())


class JointNorm(Toy):
    def scale(self, params: Params) -> Params:
        return P.pmap(lambda p: P.norm(params).reshape((1,) * p.ndim), params)


class OneSided(Toy):
    def times(self) -> list[float]:
        return [self.delta / 2, self.delta]


class FrozenPerturbation(Toy):
    def scale(self, params: Params) -> Params:
        return super().scale(P.pmap(Tensor.detach, params))


def _running(objective: Any) -> Any:
    if not isinstance(objective, Objective):
        return objective
    return Objective(objective.module, objective.criterion, objective.batches, statistics="running")


class RunningStatistics(Toy):
    def loss(self, objective: Any, params: Params) -> Tensor:
        return _running(objective)(params)


class BaselineInAnotherMode(Toy):
    def base(self, objective: Any, params: Params) -> Tensor:
        return _running(objective)(params)


class TiedTwice(Toy):
    """Adds v once per name of a parameter."""

    def shifted(self, objective: Any, params: Params, v: Params, t: float) -> Params:
        if not isinstance(objective, Objective):
            return super().shifted(objective, params, v, t)
        first = {id(p): name for name, p in objective.module.named_parameters()}
        moved = dict(params.items())
        for _, p in objective.module.named_parameters(remove_duplicate=False):
            name = first[id(p)]
            if name in moved:
                moved[name] = moved[name] + t * v[name]
        return P.make(moved)


class LawNotNormalized(Signed):
    def law(self, params: Params, generator: torch.Generator) -> Params:
        return P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params)


class SquaredDelta(Signed):
    def times(self) -> list[float]:
        return [t * self.delta for t in super().times()]


class SumOverDraws(Signed):
    def reduce(self, values: Tensor) -> Tensor:
        return values.sum()


class VarianceForDeviation(Toy):
    def stderr(self, values: Tensor) -> float:
        return float(values.var()) / len(values)


class UnweightedBatches(Toy):
    def loss(self, objective: Any, params: Params) -> Tensor:
        if not isinstance(objective, Objective):
            return objective(params)
        parts = [Objective(objective.module, objective.criterion, batch) for batch in objective.batches]
        return torch.stack([part(params) for part in parts]).mean()


class SumOverBatches(UnweightedBatches):
    def loss(self, objective: Any, params: Params) -> Tensor:
        return super().loss(objective, params) * (len(list(objective.batches)) if hasattr(objective, "batches") else 1)


class LeavesBuffersChanged(Toy):
    """A "restart" that runs the network as training does."""

    def base(self, objective: Any, params: Params) -> Tensor:
        if isinstance(objective, Objective):
            modes = [(m, m.training) for m in objective.module.modules()]
            generator = torch.get_rng_state()
            objective.module.train()
            objective.module(next(iter(objective.batches))[0])
            for m, mode in modes:
                m.training = mode
            torch.set_rng_state(generator)
        return super().base(objective, params)


class GlobalRandomNumbers(Toy):
    def law(self, params: Params, generator: torch.Generator) -> Params:
        return super().law(params, torch.default_generator)


class NotReproducible(Toy):
    def reduce(self, values: Tensor) -> Tensor:
        return values.mean() * (1 + 1e-9 * next(counter))


class ZeroOverZero(Toy):
    def scale(self, params: Params) -> Params:
        scale = super().scale(params)
        return P.pmap(lambda s: s * s / s, scale)


class Vanishing(Toy):
    """A perturbation that float32 cannot see, and no error told."""

    delta = 1e-9

    def __call__(self, objective: Any, params: Params, generator: torch.Generator) -> Estimate:
        return replace(super().__call__(objective, params, generator), error=0.0)


class FirstChunkAlone(Toy):
    """Forgets the directions beyond the first where the engine takes many at once."""

    def values(self, objective: Any, params: Params, generator: torch.Generator) -> Tensor:
        values = super().values(objective, params, generator)
        return values[:2] if as_objective(objective).engine.name == "vmap" else values


class OverTheLoss(Toy):
    def along(self, objective: Any, params: Params, v: Params) -> Tensor:
        return super().along(objective, params, v) / (1 + self.base(objective, params))


class Squared(Toy):
    def along(self, objective: Any, params: Params, v: Params) -> Tensor:
        return super().along(objective, params, v) ** 2


class NeedsAModule(Toy):
    def loss(self, objective: Any, params: Params) -> Tensor:
        assert objective.module is not None
        return objective(params)


class HidesNaN(Toy):
    def __call__(self, objective: Any, params: Params, generator: torch.Generator) -> Estimate:
        return super().__call__(objective, P.pmap(torch.nan_to_num, params), generator)


class TwiceAsPenalty(Toy):
    def penalty(self, objective: Any, params: Params, generator: torch.Generator) -> Tensor:
        return 2 * super().penalty(objective, params, generator)


class ForgetsTheBaseline(Toy):
    """A penalty whose gradient is that of the perturbed losses alone."""

    def base(self, objective: Any, params: Params) -> Tensor:
        return super().base(objective, params).detach()


class RootOfSquares(Toy):
    """Norms by a root, whose slope at zero is not a number."""

    def scale(self, params: Params) -> Params:
        partition = self.groups.partition_with(params)
        return partition.spread(partition.dots(params, params).sqrt(), params)


class PowerToy(Toy):
    """``(E_u E_t |f|^p)^{1/p}``."""

    def __init__(self, groups: ScaleGroups, p: float):
        super().__init__(groups)
        self.p = p

    def along(self, objective: Any, params: Params, v: Params) -> Tensor:
        base = self.base(objective, params)
        f = torch.stack([self.loss(objective, P.shift(params, v, t)) - base for t in self.times()])
        return (f.abs() ** self.p).mean()

    def reduce(self, values: Tensor) -> Tensor:
        return values.mean() ** (1 / self.p)


class RootForgotten(PowerToy):
    def reduce(self, values: Tensor) -> Tensor:
        return values.mean()


def gradient_norm(groups: ScaleGroups) -> Callable[..., Estimate]:
    """``‖∇L‖``, which no rescaling keeps."""

    def measure(objective: Any, params: Params, generator: torch.Generator) -> Estimate:
        return Estimate(float(P.norm(as_objective(objective).value_and_grad(params)[1])), 0.0, 0.0)

    return measure


def first_weight(groups: ScaleGroups) -> Callable[..., Estimate]:
    """``|∂L/∂θ_1|``, which depends on the order of neurons."""

    def measure(objective: Any, params: Params, generator: torch.Generator) -> Estimate:
        gradient = as_objective(objective).value_and_grad(params)[1]
        return Estimate(float(P.first(gradient).reshape(-1)[0].abs()), 0.0, 0.0)

    return measure


# ---------------------------------------------------------------- searches


def searched(groups: ScaleGroups, **options: Any) -> Measure:
    return bn_sharpness(groups, delta=0.3, steps=3, nodes=4, rule="riemannian", **options)


class Wandering(Ascend):
    """Returns a random direction in the place of the best one seen."""

    def __call__(self, score: Any, frame: Frame, generator: torch.Generator) -> Found:
        super().__call__(score, frame, generator)
        return Found(P.batch(Sphere()(frame.ball, frame.like, generator)))


def wandering(groups: ScaleGroups) -> Measure:
    return replace(searched(groups), directions=Wandering(1))


class Misreporting:
    """A search that reports another direction than its own, or half its value as a bound."""

    def __init__(self, measure: Measure, change: Callable[[Estimate], dict[str, Any]]):
        self.measure, self.change = measure, change

    def __call__(self, objective: Any, params: Params, generator: torch.Generator) -> Estimate:
        estimate = self.measure(objective, params, generator)
        return replace(estimate, **self.change(estimate))


def wrong_direction(groups: ScaleGroups) -> Misreporting:
    def change(estimate: Estimate) -> dict[str, Any]:
        assert estimate.unit is not None
        return {"unit": groups.partition_with(estimate.unit).normalize(P.pmap(torch.ones_like, estimate.unit))}

    return Misreporting(searched(groups), change)


def wrong_bound(groups: ScaleGroups) -> Misreporting:
    return Misreporting(searched(groups), lambda estimate: {"upper": estimate.value / 2})


# ---------------------------------------------------------------- geometries


class PlaceNormalizes(Geometry):
    def place(self, u: Params, params: Params) -> Params:
        return super().place(P.scaled(u, 1 / float(P.norm(u))), params)


class PlaceDetached(Geometry):
    def place(self, u: Params, params: Params) -> Params:
        return super().place(u, P.pmap(Tensor.detach, params))


class NothingMoves(Geometry):
    def moving(self, u: Params, gradient_v: Params, params: Params) -> Params:
        return P.zeros_like(params)


class Framed(Geometry):
    """A geometry with another frame."""

    frame: type[Frame] = Frame

    def at(self, params: Params) -> Frame:
        return self.frame(self, params)


class PullByTheInverse(Frame):
    def pull(self, g: Params, factor: float = 1.0) -> Params:
        return P.pmap(lambda a, s: factor * a * P.safe_reciprocal(s), g, self.scale)


class SteepestUnnormalized(Frame):
    def steepest(self, g: Params, fill: Callable[[], Params]) -> Params:
        return P.scaled(g, 10.0)


class SteepestJointly(Frame):
    def steepest(self, g: Params, fill: Callable[[], Params]) -> Params:
        return P.scaled(g, 1 / P.norm(g))


class SummitOfOneBall(Frame):
    def summit(self, g: Params, factor: float, fill: Callable[[], Params]) -> Params:
        return self.points(P.scaled(g, 1 / P.norm(g)), factor)


class Downhill(Frame):
    def uphill(self, u: Params, g: Params, rate: Tensor, ambient: bool = False) -> Params:
        return super().uphill(u, g, -rate, ambient)


def framed(frame: type[Frame]) -> Callable[[ScaleGroups], Geometry]:
    made = type("Framed", (Framed,), {"frame": frame})

    def build(groups: ScaleGroups) -> Geometry:
        plain = Groupwise(groups)
        return made(plain.scale, plain.ball)

    return build


def as_class(kind: type[Geometry]) -> Callable[[ScaleGroups], Geometry]:
    def build(groups: ScaleGroups) -> Geometry:
        plain = Groupwise(groups)
        return kind(plain.scale, plain.ball)

    return build


class Balled(GroupBall):
    """A groupwise ball for a bug to be planted in."""


class RetractHalfway(Balled):
    def retract(self, u: Params) -> Params:
        return P.combine(0.5, u, 0.5, super().retract(u))


class TangentForgotten(Balled):
    def tangent(self, u: Params, g: Params) -> Params:
        return g


class BoxWithoutWalls(BoxBall):
    def tangent(self, u: Params, g: Params) -> Params:
        return g


class BackWithoutLength(Balled):
    def back(self, raw: Params, u: Params, g: Params) -> Params:
        return self.tangent(u, g)


class PowerStaysPut(Balled):
    def power(self, u: Params, g: Params) -> Params:
        return u


class UnitCoordinates(Balled):
    def coordinate_std(self, like: Params) -> Params:
        return JointBall().coordinate_std(like)


class InverseNorms:
    """A scale that is infinite where a group is zero."""

    def __init__(self, ball: GroupBall):
        self.ball = ball

    def __call__(self, params: Params) -> Params:
        partition = self.ball.partition(params)
        norms = partition.spread(partition.norms(params), params)
        return P.pmap(lambda n: n * n / n if n.numel() else n, norms)


def balled(ball: type[GroupBall]) -> Callable[[ScaleGroups], Geometry]:
    return lambda groups: Geometry(Groupwise(groups).scale, ball(groups))


def box(ball: type[BoxBall]) -> Callable[[ScaleGroups], Geometry]:
    return lambda groups: Geometry(Constant(0.3), ball())


def inverse_norms(groups: ScaleGroups) -> Geometry:
    return Geometry(InverseNorms(GroupBall(groups)), GroupBall(groups))


# ---------------------------------------------------------------- regularisers


@dataclass
class Central:
    """``∇L + λ (∇L(θ+v) − ∇L(θ−v))/2`` with v a fixed direction: the gradient of ``(L(θ+v) − L(θ−v))/2``.

    With ``momentum`` the gradient added is averaged over steps, the average being kept in the state.
    """

    momentum: float = 0.0
    half: float = 0.5
    kept: Params | None = field(default=None, compare=False)

    def init(self, params: Params) -> State:
        return {k: torch.zeros_like(v) for k, v in params.items()} if self.momentum else {}

    def direction(self, params: Params) -> Params:
        return P.pmap(lambda p: 0.05 * torch.ones_like(p), params)

    def own(self, objectives: Any) -> Any:
        return objectives[-1]

    def check(self, weight: float) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"weight={weight}; expected a finite weight >= 0")

    def factor(self, weight: float) -> float:
        return weight

    def added(self, objective: Any, params: Params) -> Params:
        v = self.direction(params)
        up, down = (objective.value_and_grad(P.shift(params, v, t))[1] for t in (1.0, -1.0))
        return P.combine(self.half, up, -self.half, down)

    def step(self, objectives: Any, params: Params, *, weight: float, state: State, generator: torch.Generator) -> Step:
        self.check(weight)
        loss, gradient = objectives[0].value_and_grad(params)
        r = self.added(self.own(objectives), params)
        if self.momentum:
            r = P.combine(1 - self.momentum, r, self.momentum, P.make(state))
            state = dict(r.items())
        total = P.combine(1.0, gradient, self.factor(weight), r)
        return Step(loss, torch.zeros_like(loss), total, 3, state, torch.zeros_like(loss))


def central_value(objective: Any, params: Params, held: Params, generator: torch.Generator) -> float:
    """What :class:`Central` adds the gradient of."""
    v = Central().direction(held)
    return float(objective(P.shift(params, v)) - objective(P.shift(params, v, -1.0))) / 2


class WithoutHalf(Central):
    def added(self, objective: Any, params: Params) -> Params:
        return P.scaled(super().added(objective, params), 2.0)


class StateOnTheInstance(Central):
    def init(self, params: Params) -> State:
        return {}

    def step(self, objectives: Any, params: Params, *, weight: float, state: State, generator: torch.Generator) -> Step:
        kept = P.zeros_like(params) if self.kept is None else self.kept
        step = super().step(objectives, params, weight=weight, state=dict(kept.items()), generator=generator)
        self.kept = P.make(step.state)
        return replace(step, state={})


class NumberAsState(Central):
    def init(self, params: Params) -> Any:
        return {"steps": 0}


class FirstBatchAlone(Central):
    def own(self, objectives: Any) -> Any:
        return objectives[0]


class AnyWeight(Central):
    def check(self, weight: float) -> None:
        pass


class SquaredWeight(Central):
    def factor(self, weight: float) -> float:
        return weight**2


class RandomSteps(Central):
    def factor(self, weight: float) -> float:
        return weight * (1 + 1e-9 * next(counter))


@dataclass
class Wrapped(Central):
    """Changes a step after or before it is taken."""

    before: Callable[[Any, Params], Params] = lambda objectives, params: params
    after: Callable[[Step], dict[str, Any]] = lambda step: {}

    def step(self, objectives: Any, params: Params, *, weight: float, state: State, generator: torch.Generator) -> Step:
        params = self.before(objectives, params)
        step = super().step(objectives, params, weight=weight, state=state, generator=generator)
        return replace(step, **self.after(step))


def in_place(objectives: Any, params: Params) -> Params:
    for value in params.values():
        value.mul_(1.0001)
    return params


def another_forward(objectives: Any, params: Params) -> Params:
    module = getattr(objectives[0], "module", None)
    if module is not None:
        state = torch.get_rng_state()
        module(objectives[0].x if hasattr(objectives[0], "x") else next(iter(objectives[0].batches))[0])
        torch.set_rng_state(state)
    return params


def without_nan(objectives: Any, params: Params) -> Params:
    return P.pmap(torch.nan_to_num, params)
