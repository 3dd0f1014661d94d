"""Upper bounds of searched maxima, where the second-order term rules.

With ``M = SHS`` in unit coordinates (S the scale) and K spheres ``‖u_i‖ = 1``, for any multipliers w

    max_u uᵀMu  ≤  Σ_i w_i + K·λ_max(M − D_w),

``D_w`` multiplying group i by ``w_i``: convex in w, at the cost of an extreme eigenvalue per evaluation. At
``w_i = ⟨u_i, (Mu)_i⟩`` of a true maximiser λ_max is often 0: it is certified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.geometry import Frame, JointBall, PartitionBall
from bnsharp.lanczos import Ritz, top_eigenpair
from bnsharp.laws import Sphere
from bnsharp.profiles import Profile
from bnsharp.types import Params

FIRST_ORDER = 0.1
"""Largest share of the first-order term in the value for which a second-order bound is given."""
HIGHER_ORDER = 0.05
"""Largest relative difference between the value and its second-order prediction along the direction found."""


@dataclass(frozen=True)
class QuadraticBound:
    """``max_{‖u_i‖ = 1} uᵀMu ≤ value``.

    Attributes:
        value: the bound.
        start: the bound at the first multipliers, those of the direction found.
        products: Hessian products spent.
    """

    value: float
    start: float
    products: int


def multiplier_bound(
    apply: Callable[[Params], Params],
    frame: Frame,
    u: Params,
    generator: torch.Generator,
    *,
    iterations: int = 30,
    lanczos: int = 60,
    tolerance: float = 1e-3,
) -> QuadraticBound:
    """The bound minimised over w by Polyak's subgradient steps towards the value attained at u.

    Args:
        apply: ``u ↦ M u``, M in unit coordinates.
        frame: whose ball is a product over K groups (zero-norm groups are left out).
        u: the direction found; the multipliers start at ``⟨u_i, (Mu)_i⟩``.
        iterations: eigenvalue solves, at most; it ends when the gap is below ``tolerance`` of the attained value.
        lanczos: products per eigenvalue solve, at most.
    """
    ball = frame.ball
    assert isinstance(ball, PartitionBall)
    partition = ball.partition(u)
    active = ball.active(frame.scale, frame.like)
    k = int(active.sum())
    image = apply(u)
    products = 1
    w = partition.dots(u, image)
    attained = float(w.sum())
    start = _random(frame, generator)
    bounds: list[float] = []
    for _ in range(max(1, iterations)):
        top = _shifted_top(apply, partition.spread(w, u), start, lanczos, tolerance * abs(attained) / (20 * k))
        products += top.products
        # an upper end for the eigenvalue; u itself shows that it is not negative
        excess = max(0.0, top.value + top.residual)
        bound = float(w.sum()) + k * excess
        bounds.append(bound)
        gap = bound - attained
        if gap <= tolerance * max(abs(attained), 1e-300):
            break
        slope = active.to(w) - k * partition.dots(top.vector, top.vector)  # of the bound in w
        size = float(slope.square().sum())
        if size <= 1e-12:
            break
        w = w - (gap / size) * slope
        # as much noise as eigenvector: a start inside an invariant subspace never sees what lies outside
        start = P.combine(1.0, top.vector, 1.0, _random(frame, generator))
    return QuadraticBound(min(bounds), bounds[0], products)


def _random(frame: Frame, generator: torch.Generator) -> Params:
    """A uniform direction over all coordinates."""
    return Sphere()(JointBall(), frame.like, generator)


def _shifted_top(
    apply: Callable[[Params], Params], shift: Params, start: Params, lanczos: int, floor: float
) -> Ritz:
    def operator(x: Params) -> Params:
        return P.pmap(lambda mx, d, a: mx - d * a, apply(x), shift, x)

    return top_eigenpair(operator, start, lanczos, 1e-4, floor)


def upper_bound(
    profile: Profile, anchor: Anchor, frame: Frame, u: Params, value: float, generator: torch.Generator, iterations: int
) -> float | None:
    """An upper bound of the profile's maximum over the ball, None where the second-order term does not rule.

    By Minkowski ``value(v) ≤ c₁|⟨v, ∇L⟩| + c₂|vᵀHv|`` up to third order (:meth:`Profile.expansion`): the first term
    is at most ``c₁ Σ_i ‖(∂L/∂u)_i‖``, the second at most c₂ times the larger of the bounds for M and −M. Their sum is
    given, plus the deviation of the value from its second-order prediction along u, if the first is below
    ``FIRST_ORDER`` and the last below ``HIGHER_ORDER`` of the value.
    """
    ball = frame.ball
    if not isinstance(ball, PartitionBall) or not value > 0:
        return None
    c1, c2 = profile.expansion(anchor)
    first = c1 * float(ball.partition(frame.like).norms(frame.pull(anchor.gradient)).sum()) if c1 else 0.0

    def apply(x: Params) -> Params:
        return frame.pull(anchor.hessian(frame.place(x)))

    def negative(x: Params) -> Params:
        return P.scaled(apply(x), -1.0)

    predicted = c2 * float(P.dot(u, apply(u)))
    deviation = abs(value - abs(predicted))
    if first > FIRST_ORDER * value or deviation > HIGHER_ORDER * value:
        return None
    signed = (apply, negative) if predicted >= 0 else (negative, apply)
    bound = multiplier_bound(signed[0], frame, u, generator, iterations=iterations).value
    if profile.absolute:
        bound = max(bound, _other_sign(signed[1], frame, bound, generator, iterations))
    return first + c2 * bound + deviation


def _other_sign(
    apply: Callable[[Params], Params], frame: Frame, enough: float, generator: torch.Generator, iterations: int
) -> float:
    """A bound of ``max uᵀMu`` for the sign that was not found: ``K·λ_max`` if that is enough, else minimised over w."""
    ball = frame.ball
    assert isinstance(ball, PartitionBall)
    k = int(ball.count(frame.scale, frame.like))
    top = top_eigenpair(apply, _random(frame, generator), 60, 1e-3)
    plain = k * max(0.0, top.value + top.residual)
    if plain <= enough:
        return plain
    found = multiplier_bound(apply, frame, ball.retract(top.vector), generator, iterations=iterations)
    return min(plain, found.value)

