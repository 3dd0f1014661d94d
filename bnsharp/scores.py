"""Scores: what a search over unit directions u maximises, its gradient, and what its owner keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.geometry import Frame
from bnsharp.profiles import Profile
from bnsharp.types import Params, Scored


class ExactScore:
    """A profile itself as what a search maximises (measuring, and exact gradients).

    ``slope`` is where an ascent starts, in unit coordinates; None is the loss's own slope ``∂L/∂u``.
    """

    def __init__(self, profile: Profile, frame: Frame, anchor: Anchor, keep_gradient: bool = False,
                 slope: Params | None = None):
        self.profile, self.frame, self.anchor, self.keep = profile, frame, anchor, keep_gradient
        self._slope = slope

    def slope(self) -> Params:
        return self.frame.pull(self.anchor.gradient) if self._slope is None else self._slope

    def image(self, u: Params) -> Params:
        """``M u`` where the score is a form ``uᵀMu``, without its value and errors."""
        return self.frame.pull(self.profile.image(self.anchor, self.frame.place(u)))

    def __call__(self, u: Params, last: bool = False) -> Scored:
        """Scores; ``last`` leaves out ``∂/∂u``, which no step needs any more."""
        v = self.frame.place(u)
        if last and not self.keep:
            known = self.profile.evaluate(self.anchor, v)
            return Scored(known.values, None, P.make({"error": known.errors}, (len(known.values),)))
        values, errors, d_v, d_theta = self.profile.differentiate(self.anchor, v, theta=self.keep)
        extra: dict[str, Any] = {"error": errors}
        if self.keep:
            extra |= {"d_v": d_v, "d_theta": d_theta}
        return Scored(values, None if last else self.frame.pull(d_v), P.make(extra, (len(values),)))


class SecantScore:
    """``κ|f(δ)|`` (or ``κ f(δ)``) as what a search maximises: one gradient per direction, kept for the step."""

    takes_points = True

    def __init__(self, profile: Profile, frame: Frame, anchor: Anchor, slope: Params | None = None):
        self.profile, self.frame, self.anchor, self._slope = profile, frame, anchor, slope
        self.kappa, self.delta = profile.secant()

    def slope(self) -> Params:
        return self.frame.pull(self.anchor.gradient) if self._slope is None else self._slope

    def at(self, point: Params) -> tuple[Tensor, float, Params]:
        """``f(δ)``, its sign as used, and ``∇L(θ+δv)``, at the point ``θ + δv`` of one direction."""
        loss, gradient = self.anchor.objective.value_and_grad(point)
        f = loss - self.anchor.loss
        return f, -1.0 if self.profile.absolute and bool(f < 0) else 1.0, gradient

    def _sign(self, f: Tensor) -> Tensor:
        return torch.where(f < 0, -1.0, 1.0).to(f.dtype) if self.profile.absolute else torch.ones_like(f)

    def __call__(self, u: Params, last: bool = False) -> Scored:
        """``extra`` holds ``f(δ) [n]``, its sign as used, and ``∇L(θ+δv) [n]``; without ``n`` for a single point u."""
        if not u.batch_size:
            return self._single(u, last)
        if P.count(u) == 1:
            one = self._single(P.pick(u, 0), last)
            return P.batch(replace(one, gradient=one.slope))  # type: ignore[no-any-return]
        losses, grads = self.anchor.objective.many_value_and_grad(self.frame.points(u, self.delta))
        f = losses - self.anchor.loss
        sign = self._sign(f)
        slope = self.kappa * sign
        d_u = None if last else P.times(self.delta * slope, self.frame.pull(grads))
        return Scored(slope * f, d_u, P.make({"rise": f, "sign": sign, "gradient": grads}, (len(f),)))

    def _single(self, u: Params, last: bool) -> Scored:
        """:meth:`__call__` for one direction, its gradient as a function: most candidates' is never asked for."""
        f, sign, gradient = self.at(self.frame.points(u, self.delta))
        slope = self.kappa * sign
        d_u = None if last else partial(self.frame.pull, gradient, self.delta * slope)
        extra: dict[str, Any] = {"rise": f, "sign": torch.full_like(f, sign), "gradient": gradient}
        return Scored(slope * f, d_u, P.make(extra))
