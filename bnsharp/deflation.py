"""Traces from few products: the sharpest directions exactly, random draws for what is left.

With Q an orthonormal basis of k directions,

    tr M = Σ_i qᵢᵀM qᵢ + tr (I − QᵀQ) M (I − QᵀQ),

and a draw ``ε`` with ``E εεᵀ = I``, independent of Q, estimates the second term by ``(Pε)ᵀM(Pε)``, ``P = I − QᵀQ``: an
unbiased mean whose standard error is that of independent draws (Meyer et al. 2021, Hutch++). Q is the Krylov basis of a
Lanczos run, for which ``qᵢᵀM qᵢ`` are known: k products in place of the 2k of a random sketch (Chen and Hallman 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bnsharp import params as P
from bnsharp.anchor import Anchor
from bnsharp.balls import JointBall
from bnsharp.directions import Directions, Draw
from bnsharp.errors import InputError
from bnsharp.geometry import Frame
from bnsharp.lanczos import Basis, krylov_basis
from bnsharp.laws import Gaussian, Rademacher, Sphere
from bnsharp.profiles import Curvature, Profile
from bnsharp.reduce import Mean, Reduce
from bnsharp.types import Evaluated, Params

COORDINATES = (Gaussian, Rademacher)
"""Laws of independent coordinates: a mean of a quadratic form over them is a trace."""


@dataclass(frozen=True)
class Deflation:
    """A Krylov basis in the coordinates ``ε`` of a law with independent coordinates, ``u = w ⊙ ε``.

    Attributes:
        basis: k orthonormal vectors ``[d]``.
        std: ``w``, the standard deviation of each coordinate of u; 0 where nothing is perturbed.
        alphas: ``qᵢᵀM qᵢ``, M the form in ``ε``.
    """

    basis: Basis
    std: Params
    alphas: tuple[float, ...]

    def project(self, u: Params) -> Params:
        """The draw u without its part in the basis: ``w ⊙ P(u ⊘ w)``."""
        epsilon = P.pmap(lambda a, w: a * P.safe_reciprocal(w), u, self.std)
        flat = P.flatten(epsilon)
        for _ in range(2):  # orthogonal to rounding
            flat = self.basis.project_out(flat)
        return P.pmap(lambda a, w: a * w, P.unflatten(flat, u), self.std)

    def directions(self) -> P.Lazy:
        """``w ⊙ q_i``, in u's coordinates."""
        std = self.std

        def direction(i: int) -> Params:
            return P.pmap(lambda a, w: a * w, P.unflatten(self.basis.vector(i), std), std)

        return P.Lazy(self.basis.count, direction)

    def known(self) -> Evaluated:
        """``Σ qᵢᵀM qᵢ`` as the Lanczos run knows it."""
        alphas = P.first(self.std).new_tensor(self.alphas)
        largest = alphas.abs().max().expand_as(alphas)
        return total(Evaluated(alphas, 8 * torch.finfo(alphas.dtype).eps * largest))


def is_trace(directions: Directions, profile: Profile, reduce: Reduce) -> bool:
    """Whether a measure of these slots is a mean of ``vᵀHv`` over independent coordinates."""
    drawn = isinstance(directions, Draw) and isinstance(directions.law, COORDINATES)
    return drawn and isinstance(profile, Curvature) and isinstance(reduce, Mean)


def deflated(
    directions: Directions, profile: Profile, reduce: Reduce, anchor: Anchor, frame: Frame, rank: int,
    generator: torch.Generator,
) -> tuple[Deflation, Evaluated]:
    """The Krylov basis of the gradient plus a random direction, and its part of the trace, by batch if there are many.

    Args:
        directions, profile, reduce: a measure's, which must be a trace.
        anchor, frame: the objective and the geometry at θ.
        rank: k products, fewer where the space is exhausted; on several batches k more, each batch's part being wanted.
        generator: of the random direction.

    Raises:
        InputError: what is no trace.
    """
    if not is_trace(directions, profile, reduce):
        raise InputError(
            f"deflate={rank} with {type(profile).__name__} and {type(reduce).__name__} over "
            f"{type(directions).__name__}; expected a trace (Curvature, Mean, Rademacher or Gaussian), or deflate=0"
        )
    profile.prepare(anchor)
    std = P.pmap(lambda u, w: w.expand_as(u).contiguous(), frame.like, frame.ball.coordinate_std(frame.like))

    def apply(epsilon: Params) -> Params:
        u = P.pmap(torch.mul, epsilon, std)
        return P.pmap(torch.mul, frame.pull(anchor.hessian(frame.place(u))), std)

    random = Sphere()(JointBall(), P.pmap(torch.zeros_like, frame.like), generator)
    random = P.pmap(lambda a, w: a * (w != 0), random, std)
    gradient = P.pmap(torch.mul, frame.pull(anchor.gradient), std)
    start = P.combine(P.safe_reciprocal(P.norm(gradient)), gradient, P.safe_reciprocal(P.norm(random)), random)
    basis, alphas = krylov_basis(apply, start, rank)
    found = Deflation(basis, std, tuple(alphas))
    if anchor.objective.batches_seen == 1:
        return found, found.known()
    known = found.directions()
    return found, total(profile.evaluate(anchor, P.Lazy(len(known), lambda i: frame.place(known[i]))))


def total(known: Evaluated) -> Evaluated:
    """The sum over directions, ``[1]``."""
    left = None if known.left_out is None else known.left_out.sum(1, keepdim=True)
    return Evaluated(known.values.sum(0, keepdim=True), known.errors.sum(0, keepdim=True), left)


def plus(known: Evaluated, base: Evaluated) -> Evaluated:
    """Every draw's value with the part that is known added."""
    left = known.left_out
    if left is not None and base.left_out is not None:
        left = left + base.left_out
    return Evaluated(known.values + base.values, known.errors + base.errors, left)
