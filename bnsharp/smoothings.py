"""Smoothings: regularisers that replace the loss by an average of it over a neighbourhood, or by its free energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.balls import JointBall
from bnsharp.checks import at_least, flag, positive, whole
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective
from bnsharp.laws import Gaussian
from bnsharp.measures import Measure
from bnsharp.penalties import unknown_value
from bnsharp.penalty_gradients import weighted
from bnsharp.profiles import Rise
from bnsharp.reduce import Reduce, derivative
from bnsharp.scores import SecantScore
from bnsharp.starts import count, counted, fraction
from bnsharp.types import Params, State, Step


def check_weight_one(weight: float, what: str) -> None:
    """Raise :class:`InputError` unless λ = 1: what replaces the loss has no weight of its own."""
    if weight != 1:
        raise InputError(f"weight={weight!r} with {what}, which replaces the loss; expected weight=1: change its own "
                         "radius instead")


@dataclass(frozen=True)
class Smoothing:
    """``∇_θ`` of ``reduce_i L(θ + v_i)``: the loss replaced by its smoothed form.

    With ``Mean`` this is ``E L(θ+v)``: SmoothOut (uniform noise; Wen et al. 2018, arXiv:1805.07898), Gaussian smoothing
    (Wang et al. 2018, arXiv:1809.07402) and their scale-invariant forms, by the measure's geometry and law. With
    ``FreeEnergy(β)`` it is ``−(1/β) log E exp(−β L(θ+v))``, with ``Maximum`` the worst of the directions.

    The perturbations are drawn anew at each step and held while differentiating; ``moving`` differentiates
    ``v = s(θ) ⊙ u`` as well, which makes the gradient that of the smoothed loss also where the scale depends on θ. One
    gradient per direction, all of them held at once. The loss reported is the smoothed one; where directions
    are drawn ``L(θ)`` is never evaluated. Penalty and ratio are not known (NaN). Running statistics are those of the
    first network evaluated: a perturbed one, or where directions are searched that at θ.

    Args:
        measure: geometry, directions, ``Rise()`` and a reduction under which adding a constant to all values adds it to
            the result.
        moving: whether v moves with θ.

    Raises:
        InputError: another profile, a power mean, a weight other than 1, a second batch.
    """

    measure: Measure
    moving: bool = False

    def __post_init__(self) -> None:
        flag("moving", self.moving)
        if self.measure.profile != Rise():
            raise InputError(f"a smoothing of {self.measure.profile}; expected Rise(): use Penalty for other profiles")
        if not _shifts(self.measure.reduce):
            raise InputError(f"a smoothing by {self.measure.reduce}; expected a reduction of L itself: Mean(), "
                             "FreeEnergy(beta) or Maximum()")

    def init(self, params: Params) -> State:
        return {}

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        check_weight_one(weight, "a smoothing")
        if len(objectives) > 1:
            raise InputError("a second batch with a smoothing; expected the loss's own batch alone")
        objective, measure = objectives[0], self.measure
        before = objective.evaluations["gradients"]
        frame, anchor = measure.geometry.at(params), Anchor(objective, params)
        found = measure.directions(SecantScore(measure.profile, frame, anchor), frame, generator)
        n = P.count(found.u)
        if found.scored is None:
            points = P.Lazy(n, lambda i: frame.points(P.pick(found.u, i)))
            losses, grads = objective.many_value_and_grad(points)
        else:
            losses, grads = anchor.loss + found.scored.extra["rise"], found.scored.extra["gradient"]
        value, w = derivative(measure.reduce, losses)
        gradient = weighted(w, grads)
        for i in range(n if self.moving else 0):
            u = P.pick(found.u, i)
            moved = P.pullback(
                lambda x, u=u: measure.directions.moving(u, measure.geometry, x), params, P.pick(grads, i)  # type: ignore[misc]
            )
            gradient = P.combine(1.0, gradient, w[i], moved)
        nothing, spent = unknown_value(value), objective.evaluations["gradients"] - before
        return Step(value, nothing, gradient, spent, state, nothing)


def _shifts(reduce: Reduce) -> bool:
    """Whether ``reduce(x + c) = reduce(x) + c``."""
    values = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    return bool(torch.isclose(reduce(values + 3)[0], reduce(values)[0] + 3))


@dataclass(frozen=True)
class LocalEntropy:
    """Entropy-SGD: the gradient ``θ − μ``, μ an average of SGLD iterates around θ (Chaudhari et al. 2017, algorithm 1).

    From ``w = μ = θ`` and ``m = 0``, L times, each on its own batch::

        g ← ∇L(w) + decay·w;   m ← momentum·m + g;   g ← g + momentum·m (Nesterov), else m
        w ← w − η'·( g − γ_t (θ − w) + ε·N(0, I)/√(η'/2) )
        μ ← α μ + (1−α) w

    with scoping ``γ_t = γ(1+s)^t``, t the step. This is ``(1/γ)∇`` of the negative local entropy with the expectation
    replaced by the average; the factor γ is left out as in the authors' code. L = 0 is the loss's own gradient.

    Args:
        steps: L, inner steps; each costs a gradient.
        gamma: γ > 0.
        scoping: s ≥ 0.
        noise: ε ≥ 0.
        rate: η' > 0.
        averaging: α in [0, 1).
        momentum: inner momentum in [0, 1), from zero at each step.
        nesterov: its form.
        decay: inner weight decay ≥ 0.

    ``objectives`` hold one batch, used in all inner steps, or L batches. The loss reported is ``L(θ)`` on the first;
    penalty and ratio are not known (NaN).

    Raises:
        InputError: a setting out of range, a weight other than 1, another number of batches.
    """

    steps: int = 20
    gamma: float = 1e-4
    scoping: float = 1e-3
    noise: float = 1e-4
    rate: float = 0.1
    averaging: float = 0.75
    momentum: float = 0.9
    nesterov: bool = True
    decay: float = 0.0

    def __post_init__(self) -> None:
        whole("steps", self.steps, 0)
        positive("gamma", self.gamma)
        positive("rate", self.rate)
        flag("nesterov", self.nesterov)
        for name in ("scoping", "noise", "decay"):
            at_least(name, getattr(self, name), 0)
        for name in ("averaging", "momentum"):
            fraction(name, getattr(self, name))

    def init(self, params: Params) -> State:
        return {"steps": count(0)}

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        check_weight_one(weight, "local entropy")
        if len(objectives) not in (1, max(self.steps, 1)):
            raise InputError(f"{len(objectives)} batches for {self.steps} inner steps; expected one, or one for each")
        t = counted(state)
        gamma = self.gamma * (1 + self.scoping) ** t
        losses: list[Tensor] = []
        w = mean = params
        momentum = P.zeros_like(params)
        for i in range(self.steps):
            loss, g = objectives[i % len(objectives)].value_and_grad(w)
            losses.append(loss)
            w, momentum = self._inner(w, g, momentum, params, gamma, generator)
            mean = P.combine(self.averaging, mean, 1 - self.averaging, w)
        if self.steps:
            gradient = P.combine(1.0, params, -1.0, mean)
        else:
            loss, gradient = objectives[0].value_and_grad(params)
            losses.append(loss)
        nothing = unknown_value(losses[0])
        return Step(losses[0], nothing, gradient, len(losses), {"steps": count(t + 1)}, nothing)

    def _inner(
        self, w: Params, g: Params, momentum: Params, center: Params, gamma: float, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """One SGLD step and the momentum after it."""
        if self.decay:
            g = P.shift(g, w, self.decay)
        if self.momentum:
            momentum = P.combine(self.momentum, momentum, 1.0, g)
            g = P.shift(g, momentum, self.momentum) if self.nesterov else momentum
        g = P.shift(g, P.combine(1.0, center, -1.0, w), -gamma)
        if self.noise:
            g = P.shift(g, Gaussian()(JointBall(), w, generator), self.noise / (0.5 * self.rate) ** 0.5)
        return P.shift(w, g, -self.rate), momentum
