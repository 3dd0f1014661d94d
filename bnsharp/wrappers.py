"""Regularisers made of regularisers: chunks of a batch, corrections used again, the surrogate gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import at_least, whole
from bnsharp.errors import InputError
from bnsharp.evaluation import AbstractObjective
from bnsharp.penalties import Regularizer, check_weight, unknown_value
from bnsharp.starts import count, counted, packed, unpacked
from bnsharp.types import Params, State, Step


def nested(state: State) -> State:
    """A wrapped regulariser's state as entries ``inner/KEY``."""
    return {f"inner/{k}": v for k, v in state.items()}


def inside(state: State) -> State:
    """The state that :func:`nested` put there."""
    return {k.removeprefix("inner/"): v for k, v in state.items() if k.startswith("inner/")}


def mean_state(states: Sequence[State], shares: Sequence[float]) -> State:
    """Floating-point entries averaged; counters, which are equal, taken from the first."""

    def mean(values: list[Tensor]) -> Tensor:
        if not values[0].is_floating_point():
            return values[0]
        return torch.stack([share * v for share, v in zip(shares, values, strict=True)]).sum(0)

    return {k: mean([s[k] for s in states]) for k in states[0]}


@dataclass(frozen=True)
class Chunked:
    """The batch cut into chunks, each with its own step of ``inner``; gradients averaged (m-SAM, Foret et al. 2021).

    Chunks are consecutive and differ by at most one example; each is normalized with its own batch statistics and
    updates running statistics once. Every chunk starts from the same state, and the states after it are averaged: this
    is what as many processes with local directions do.

    Raises:
        InputError: fewer examples than chunks.
    """

    inner: Regularizer
    chunks: int

    def __post_init__(self) -> None:
        whole("chunks", self.chunks)

    def init(self, params: Params) -> State:
        return self.inner.init(params)

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        columns = [objective.parts(self.chunks) for objective in objectives]
        steps = [
            self.inner.step(list(row), params, weight=weight, state=state, generator=generator)
            for row in zip(*columns, strict=True)
        ]
        sizes = [float(part.examples or 1) for part in columns[0]]  # over all ranks, where several hold a chunk
        shares = [size / sum(sizes) for size in sizes]

        def mean(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([share * v for share, v in zip(shares, values, strict=True)]).sum(0)

        def mean_params(values: Sequence[Params]) -> Params:
            return P.make({k: mean([v[k] for v in values]) for k in values[0].keys()})

        plain = [s.plain for s in steps if s.plain is not None]
        return Step(
            mean([s.loss for s in steps]), mean([s.penalty for s in steps]), mean_params([s.gradient for s in steps]),
            sum(s.evaluations for s in steps), mean_state([s.state for s in steps], shares),
            mean([s.ratio for s in steps]), plain=mean_params(plain) if len(plain) == len(steps) else None,
        )


@dataclass(frozen=True)
class Look:
    """A step of ``inner`` every k steps, its correction used again in between (LookSAM, Liu et al. 2022).

    With g the loss's gradient and g' the inner step's, every k-th step descends g' and keeps ``v = g' − proj_g g'``;
    the others descend ``g + α ‖g‖ v/‖v‖``. Norms and projections are over all parameters jointly. k = 1 is ``inner``.

    Args:
        inner: a regulariser that computes ``∇L(θ)`` in its step, as penalties do.
        every: k ≥ 1.
        alpha: α ≥ 0.
    """

    inner: Regularizer
    every: int = 10
    alpha: float = 0.7

    def __post_init__(self) -> None:
        whole("every", self.every)
        at_least("alpha", self.alpha, 0)

    def init(self, params: Params) -> State:
        return {"steps": count(0), **packed("correction", P.zeros_like(params)), **nested(self.inner.init(params))}

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        t = counted(state)
        if t % self.every == 0:
            step = self.inner.step(objectives, params, weight=weight, state=inside(state), generator=generator)
            correction = across(step.gradient, _plain(step, self))
            after = {"steps": count(t + 1), **packed("correction", correction), **nested(step.state)}
            return replace(step, state=after)
        check_weight(weight)
        loss, g = objectives[0].value_and_grad(params)
        v = unpacked(state, "correction", params)
        factor = self.alpha * P.safe_divide(P.norm(g), P.norm(v))
        after = {**state, "steps": count(t + 1)}
        ratio = P.safe_divide(factor * P.norm(v), P.norm(g))
        return Step(loss, unknown_value(loss), P.shift(g, v, factor), 1, after, ratio, plain=g)


@dataclass(frozen=True)
class SurrogateGap:
    """``g' − α (g − proj_{g'} g)``: the inner step, less what of g lies across it (GSAM, Zhuang et al. 2022, alg. 1).

    g is the loss's gradient, g' the inner step's. α = 0 is ``inner``.

    Args:
        inner: a regulariser that computes ``∇L(θ)`` in its step, as penalties do.
        alpha: α ≥ 0.
    """

    inner: Regularizer
    alpha: float = 0.4

    def __post_init__(self) -> None:
        at_least("alpha", self.alpha, 0)

    def init(self, params: Params) -> State:
        return self.inner.init(params)

    def step(
        self,
        objectives: Sequence[AbstractObjective],
        params: Params,
        *,
        weight: float,
        state: State,
        generator: torch.Generator,
    ) -> Step:
        step = self.inner.step(objectives, params, weight=weight, state=state, generator=generator)
        gap = across(_plain(step, self), step.gradient)
        return replace(step, gradient=P.combine(1.0, step.gradient, -self.alpha, gap))


def across(x: Params, y: Params) -> Params:
    """``x − proj_y x``, over all parameters jointly; x where y = 0."""
    return P.shift(x, y, -P.safe_divide(P.dot(x, y), P.dot(y, y)))


def _plain(step: Step, wrapper: object) -> Params:
    if step.plain is None:
        raise InputError(f"{type(wrapper).__name__} needs the loss's own gradient, which its inner step does not take; "
                         "expected a penalty inside")
    return step.plain
