"""Hypothesis strategies: small networks, batches, scale factors, transformations that keep a network, quadratic losses.

Every strategy checks its arguments when it is built. Networks are float64, at a generic point, and small enough that a
dense Hessian is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp.checks import one_of, positive, whole
from bnsharp.errors import InputError
from bnsharp.groups import ScaleGroups
from bnsharp.modes import NEGLIGIBLE_EPS
from bnsharp.objective import Objective
from bnsharp.testing.check import known_names
from bnsharp.testing.networks import ACTIVATIONS, NORMALIZERS, SMOOTH, Network, check_network, fits, network
from bnsharp.transformations import ReluRescaling
from bnsharp.types import Params

# ---------------------------------------------------------------- networks


def _names(what: str, value: str | Collection[str] | None, known: Collection[str]) -> tuple[str, ...]:
    """One name, several, or None for all of them."""
    if value is None:
        return tuple(known)
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        one_of(what, name, known)
    if not names:
        raise InputError(f"{what}={value!r}; expected at least one of {', '.join(known)}")
    return names


def networks(
    *,
    normalizer: str | Collection[str] | None = None,
    activation: str | Collection[str] | None = SMOOTH,
    conv: bool | None = None,
    bias: bool | None = None,
    min_width: int = 4,
    max_width: int = 6,
    min_examples: int = 12,
    max_examples: int = 12,
    dropout: float = 0.0,
    eps: float = NEGLIGIBLE_EPS,
) -> st.SearchStrategy[Network]:
    """Small float64 networks with two hidden layers.

    Args:
        normalizer: a name or several of ``"batch"``, ``"layer"``, ``"group"``, ``"instance"``, ``"rms"``, ``"weight"``,
            ``"none"``; None is any. Instance normalization comes with images only.
        activation: a name or several of ``"tanh"``, ``"softplus"``, ``"relu"``; None is any.
        conv: convolutions or linear layers; None is either.
        bias: of the hidden layers; None is either.
        min_width, max_width: hidden channels, even numbers in this range; group normalization of vectors takes 6 or
            more.
        min_examples, max_examples: size of the batch.
        dropout, eps: see :func:`network`.

    Raises:
        InputError: an unknown name, an empty range, a range that holds no even width.
    """
    normalizers = _names("normalizer", normalizer, NORMALIZERS)
    activations = _names("activation", activation, ACTIVATIONS)
    convs = (False, True) if conv is None else (conv,)
    kinds = [(n, c) for n in normalizers for c in convs if c or n != "instance"]
    if not kinds:
        check_network("instance", activations[0], False)
    for n, c in kinds:
        check_network(n, activations[0], c)
    _check_range("width", min_width, max_width, 2)
    _check_range("examples", min_examples, max_examples, 4)
    shapes = [(n, c, w) for n, c in kinds for w in range(min_width, max_width + 1) if fits(n, c, w)]
    if not shapes:
        raise InputError(
            f"min_width={min_width}, max_width={max_width}; expected an even number between them, for group "
            "normalization of vectors at least 6"
        )
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout!r}; expected 0 <= dropout < 1")
    positive("eps", eps)
    return st.builds(
        lambda shape, act, b, examples, seed: network(
            shape[0], act, shape[1], bias=b, width=shape[2], examples=examples, dropout=dropout, eps=eps, seed=seed
        ),
        st.sampled_from(shapes), st.sampled_from(activations), st.booleans() if bias is None else st.just(bias),
        st.integers(min_examples, max_examples), seeds(),
    )


def _check_range(what: str, low: int, high: int, least: int) -> None:
    whole(f"min_{what}", low, least)
    whole(f"max_{what}", high, least)
    if low > high:
        raise InputError(f"min_{what}={low}, max_{what}={high}; expected min_{what} <= max_{what}")


def seeds() -> st.SearchStrategy[int]:
    """Seeds of generators."""
    return st.integers(0, 2**16)


def batches(
    shape: tuple[int, ...] = (3,), *, min_examples: int = 4, max_examples: int = 16, classes: int | None = 3
) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Batches ``(x, y)``: standard normal inputs ``[n, *shape]`` in float64 and labels ``[n]``.

    Args:
        shape: of one example.
        min_examples, max_examples: n.
        classes: number of classes; None makes y standard normal ``[n, 3]``, for a squared error.

    Raises:
        InputError: an empty range, or a number below 1.
    """
    _check_range("examples", min_examples, max_examples, 1)
    for size in shape:
        whole("shape", size)
    if classes is not None:
        whole("classes", classes)

    def made(n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((n, *shape), generator=generator, dtype=torch.float64)
        if classes is None:
            return x, torch.randn((n, 3), generator=generator, dtype=torch.float64)
        return x, torch.randint(0, classes, (n,), generator=generator)

    return st.builds(made, st.integers(min_examples, max_examples), seeds())


# ---------------------------------------------------------------- what keeps the network


def _check_factors(low: float, high: float) -> None:
    positive("low", low)
    positive("high", high)
    if low > high:
        raise InputError(f"low={low}, high={high}; expected low <= high")


def scale_factors(
    groups: ScaleGroups, params: Params, low: float = 0.1, high: float = 10.0
) -> st.SearchStrategy[Params]:
    """Factors a of ``T_a``, one per scale group in [low, high], for ``groups.rescale(params, a)``.

    Raises:
        InputError: not 0 < low ≤ high < ∞, groups of another network.
    """
    _check_factors(low, high)
    partition = groups.resolve(params).partition
    own = P.make({k: params[k] for g in partition for k in g.members})

    def made(logs: list[float]) -> Params:
        values = torch.tensor(logs, dtype=torch.float64).exp().clamp(low, high)
        return partition.spread(values.to(P.first(params)), own)

    each = st.floats(math.log(low), math.log(high), allow_nan=False)
    return st.lists(each, min_size=partition.count, max_size=partition.count).map(made)


@dataclass(frozen=True)
class Transform:
    """A function on parameters that keeps the network: calling it gives a transformed copy.

    Attributes:
        kind: ``"scale"``, ``"permutation"`` or ``"relu"``.
        factors: of the scale groups; None for the other kinds.
    """

    kind: str
    apply: Callable[[Params], Params]
    factors: Params | None = None

    def __call__(self, params: Params) -> Params:
        return self.apply(params)


FOUND_AS = {"scale": "rescaling", "permutation": "permutation", "relu": "relu_rescaling"}
"""Kinds of transformations, and what :func:`bnsharp.transformations.find` calls them."""


def transformations(
    net: Network, kinds: Collection[str] = tuple(FOUND_AS), *, low: float = 0.1, high: float = 10.0
) -> st.SearchStrategy[Transform]:
    """Functions on parameters that keep the network's function.

    Args:
        net: the network; one's own module becomes one by ``Network(module, x, y, criterion)``.
        kinds: ``"scale"`` (``T_a`` on the scale groups), ``"permutation"`` (of hidden channels), ``"relu"`` (rescaling
            of a channel against what reads it).
        low, high: range of the factors, log-uniform.

    Raises:
        InputError: an unknown kind, one that the network does not have, not 0 < low ≤ high < ∞.
    """
    known_names("transformation", kinds, FOUND_AS)
    _check_factors(low, high)
    if not kinds:
        raise InputError(f"kinds={kinds!r}; expected at least one of {', '.join(FOUND_AS)}")
    for kind in kinds:
        if not (net.groups.partition.groups if kind == "scale" else net.transformations[FOUND_AS[kind]].sites):
            raise InputError(f"the network has no {kind} transformation; expected a kind that applies to it")

    def made(kind: str, seed: int) -> Transform:
        generator = torch.Generator().manual_seed(seed)
        if kind == "scale":
            factors = net.groups.random_factors(net.params, generator, low, high)
            return Transform(kind, lambda params: net.groups.rescale(params, factors), factors)
        found = net.transformations[FOUND_AS[kind]]
        if isinstance(found, ReluRescaling):
            found = replace(found, low=low, high=high)
        return Transform(kind, lambda params: found.apply(params, torch.Generator().manual_seed(seed)))

    return st.builds(made, st.sampled_from(list(kinds)), seeds())


# ---------------------------------------------------------------- losses with a closed form


class _Carrier(nn.Module):
    """A network whose output is its parameters, as one vector."""

    def __init__(self, theta: Params):
        super().__init__()
        self.names = list(theta.keys())
        for name, value in theta.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name).reshape(-1) for name in self.names])


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``L(θ) = ½ θᵀAθ + bᵀθ + c + ⅙ Σ_j k_j (θ_j − θ*_j)³`` as a plain function of a parameter dictionary.

    Attributes:
        A: symmetric ``[d, d]``.
        b: ``[d]``.
        theta: θ*, the point at which a measure is taken.
        cubic: k ``[d]``, zero unless asked for: then A is not the Hessian but at θ*.
        constant: c, such that ``L(θ*) = 1``.
        groups: scale groups by hand, for a measure's geometry: the rows of ``"weight"`` (the loss is not invariant).
    """

    A: Tensor
    b: Tensor
    theta: Params
    cubic: Tensor
    constant: float = 0.0
    groups: ScaleGroups = field(default_factory=lambda: ScaleGroups({"weight": "row"}))

    def __call__(self, params: Params) -> Tensor:
        x = P.flatten(params)
        A, b, k = (m.to(x) for m in (self.A, self.b, self.cubic))
        third = (k * (x - P.flatten(self.theta).to(x)) ** 3).sum() / 6
        return 0.5 * x @ A @ x + b @ x + third + self.constant

    def objective(self, change: Callable[[Callable[[Params], Tensor]], Callable[[Params], Tensor]] | None = None
                  ) -> Objective:
        """The same loss as the criterion of a network whose output is θ: its Gauss–Newton matrix is the Hessian.

        Args:
            change: the loss ↦ the loss that is measured in its place.
        """
        loss: Callable[[Params], Tensor] = self if change is None else change(self)
        one = torch.zeros(2, 1, dtype=torch.float64)
        return Objective(_Carrier(self.theta), lambda z, y: loss(P.unflatten(z, self.theta_like(z))), (one, one))

    def theta_like(self, z: Tensor) -> Params:
        """θ* in the precision of ``z``."""
        return P.pmap(lambda p: p.to(z.dtype), self.theta)

    @property
    def gradient(self) -> Tensor:
        """``∇L(θ*) = Aθ* + b``, ``[d]``."""
        return self.A @ P.flatten(self.theta) + self.b


def quadratics(
    *, stationary: bool | None = False, definite: bool | None = None, cubic: float = 0.0, rows: int = 3,
    columns: int = 2,
) -> st.SearchStrategy[Quadratic]:
    """Random quadratic losses on ``{"weight": [rows, columns], "bias": [rows]}`` with A and b known and ``L(θ*) = 1``.

    Args:
        stationary: whether θ* is stationary (``b = −Aθ*``); None is either.
        definite: True for A positive definite, False for negative definite, None for any symmetric A.
        cubic: standard deviation of the cubic coefficients, ≥ 0.
        rows, columns: of the weight.

    Raises:
        InputError: a number out of range.
    """
    whole("rows", rows)
    whole("columns", columns)
    if not (math.isfinite(cubic) and cubic >= 0):
        raise InputError(f"cubic={cubic!r}; expected a finite number >= 0")

    def made(at_rest: bool, seed: int) -> Quadratic:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        theta = P.make({"weight": normal(rows, columns), "bias": normal(rows)})
        d = P.numel(theta)
        root = normal(d, d)
        A = (root + root.T) / 2 if definite is None else (1.0 if definite else -1.0) * root @ root.T / d
        b = -A @ P.flatten(theta) if at_rest else normal(d)
        loss = Quadratic(A, b, theta, cubic * normal(d))
        return replace(loss, constant=1.0 - float(loss(theta)))

    return st.builds(made, st.booleans() if stationary is None else st.just(stationary), seeds())


def reflected(loss: Callable[[Params], Tensor], theta: Params) -> Callable[[Params], Tensor]:
    """``θ* + v ↦ L(θ* − v)``."""
    return lambda params: loss(P.combine(2.0, theta, -1.0, params))
