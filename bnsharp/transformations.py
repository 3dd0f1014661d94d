"""Transformations of a network's parameters that keep its function, found by how the network behaves.

With batch statistics, three families leave every output as it is: rescaling of scale groups (``T_a``; with negligible
ε), rescaling of a channel against the columns that read it (Dinh et al. 2017), and permutations of hidden channels.
:func:`find` looks for the places where each applies and verifies them in float64. A measure of
sharpness that belongs to the *function* has the same value before and after each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnsharp import params as P
from bnsharp.channels import Site, find_sites
from bnsharp.errors import InputError
from bnsharp.groups import TOLERANCE, ScaleGroups, scale_groups
from bnsharp.modes import probing
from bnsharp.partition import Group
from bnsharp.probing import NotGeneric, Probe, log_uniform, output_change, screened
from bnsharp.types import Params

REPAIRS = 16
"""Most evaluations spent on permutations that fail as found: channels also written before a normalizer, blocks."""


@dataclass(frozen=True)
class Transformation(ABC):
    """A random map of parameters that keeps the network's function.

    Attributes:
        sites: the places where it applies; empty where it applies nowhere, and then it changes nothing.
        residual: largest relative change of an output when all sites were transformed at once, in float64.
    """

    name: ClassVar[str]
    sites: tuple[Any, ...] = ()
    residual: float = 0.0

    @abstractmethod
    def apply(self, params: Params, generator: torch.Generator | None) -> Params:
        """A transformed copy of one point: the same keys, shapes and precision, drawn from ``generator``.

        Raises:
            InputError: no generator, or parameters of another network.
        """


@dataclass(frozen=True)
class ScaleRescaling(Transformation):
    """``T_a θ``: every scale group times its own factor, log-uniform in [low, high].

    Keeps the function under batch statistics and with negligible ε (:func:`bnsharp.exact_norms`) only. Source: Yi et
    al. 2019. ``sites`` are the groups.
    """

    name: ClassVar[str] = "rescaling"
    groups: ScaleGroups = field(default_factory=ScaleGroups)
    low: float = 0.1
    high: float = 10.0

    def apply(self, params: Params, generator: torch.Generator | None) -> Params:
        return self.groups.rescale(params, self.groups.random_factors(params, generator, self.low, self.high))


@dataclass(frozen=True)
class ReluRescaling(Transformation):
    """Row r of what writes a channel times ``α_r^k``, the columns that read it over ``α_r``, α log-uniform.

    Source: Dinh et al. 2017, section 5. k is 1 where a positively homogeneous function (ReLU, the identity, max
    pooling) lies between: rows are those of a layer's weight and bias, or γ and β of a normalizer. Also between layers
    with nothing in between, on a whole residual stream, and between the values and the output of attention.
    """

    name: ClassVar[str] = "relu_rescaling"
    low: float = 0.1
    high: float = 10.0

    def apply(self, params: Params, generator: torch.Generator | None) -> Params:
        return self.rescale(params, self.random_factors(params, generator))

    def random_factors(self, params: Params, generator: torch.Generator | None) -> list[Tensor]:
        """``α`` of each site, ``[n]`` in float64."""
        if not (0 < self.low <= self.high < math.inf):
            raise InputError(f"low={self.low}, high={self.high}; expected 0 < low <= high < inf")
        generator = P.generator_for(params, generator, self.name)
        return [log_uniform(site.channels, generator, self.low, self.high) for site in self.sites]

    def rescale(self, params: Params, factors: Sequence[Tensor]) -> Params:
        """The map with these factors, ``[n]`` for each site; factors ``1/α`` undo ``α``."""
        return _each(params, self.sites, factors, Site.rescaled)


@dataclass(frozen=True)
class Permutation(Transformation):
    """Hidden channels in another order: rows of all that writes them, γ and β between, columns of all that read them.

    Source: Hecht-Nielsen 1990. It maps parameters only: running statistics are not parameters, so the function is kept
    under batch statistics, not in eval mode. No site is left as it is (unless its blocks hold one channel each).
    """

    name: ClassVar[str] = "permutation"

    def apply(self, params: Params, generator: torch.Generator | None) -> Params:
        return self.permute(params, self.random_orders(params, generator))

    def random_orders(self, params: Params, generator: torch.Generator | None) -> list[Tensor]:
        """A permutation of each site's channels, ``[n]``."""
        generator = P.generator_for(params, generator, self.name)
        return [_random_order(site, generator) for site in self.sites]

    def permute(self, params: Params, orders: Sequence[Tensor]) -> Params:
        """The map with these permutations, ``[n]`` for each site; ``argsort`` of them undoes it."""
        return _each(params, self.sites, orders, Site.permuted)


def find(
    module: nn.Module,
    x: Any,
    groups: ScaleGroups | None = None,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    low: float = 0.1,
    high: float = 10.0,
) -> dict[str, Transformation]:
    """The transformations that keep a network's function: ``"rescaling"``, ``"relu_rescaling"``, ``"permutation"``.

    Each is verified in float64: all sites at once at two generic points and at the network's own parameters, bisecting
    where the output changes. What is not looked for: transposed convolutions' columns, channel shuffles, a layer of one
    channel, queries against keys in one weight. The module is left as it was.

    Args:
        module: any module that can run in float64.
        x: inputs as for :func:`bnsharp.scale_groups`; the first 16 examples are used.
        groups: scale groups, found if None.
        seed: of points, masks and factors.
        tolerance: relative change of an output that counts as rounding.
        low, high: range of the factors that ``apply`` draws.

    Raises:
        InputError: as :func:`bnsharp.scale_groups`; groups given that are not scale invariant; not 0 < low ≤ high < ∞.
    """
    if not (0 < low <= high < math.inf):
        raise InputError(f"low={low}, high={high}; expected 0 < low <= high < inf")
    given = groups is not None
    groups = scale_groups(module, x, seed=seed, tolerance=tolerance) if groups is None else groups
    groups = groups.resolve(P.live(P.unwrap(module)))
    module = P.unwrap(module)
    with probing(module):
        probe = Probe(module, x, seed)
        check = _Check.at_points(probe, tolerance)
        residual = check.groups(groups) if given else groups.residual
        sites = find_sites(probe)
        scaled = [_without_zero_degrees(s) for s in sites if s.degrees]
        relu = check.holding(scaled, _rescaled)
        permuted = check.holding(_repaired(check, [replace(s, degrees=()) for s in sites]), _permuted)
    return {
        ScaleRescaling.name: ScaleRescaling(
            tuple(g for g in groups if g.kind != "inert"), residual, groups, low, high
        ),
        ReluRescaling.name: ReluRescaling(tuple(relu[0]), relu[1], low, high),
        Permutation.name: Permutation(tuple(permuted[0]), permuted[1]),
    }


# ---------------------------------------------------------------- verifying

Change = Callable[[Site, Mapping[str, Tensor], torch.Generator], dict[str, Tensor]]


def _own(probe: Probe) -> dict[str, Tensor]:
    return {k: v.double() for k, v in probe.values.items()}


@dataclass(frozen=True)
class _Check:
    """Outputs of a probed network at two generic points and at its own parameters, and what changes them."""

    probe: Probe
    base: Sequence[Sequence[Tensor]]
    tolerance: float

    @staticmethod
    def at_points(probe: Probe, tolerance: float) -> _Check:
        """The outputs; the network's own are left out where they are not finite."""
        base = list(screened(probe, tolerance)[1])
        with suppress(NotGeneric):
            base.append([a.detach() for a in probe.out(_own(probe))])
        return _Check(probe, base, tolerance)

    def change(self, sites: Sequence[Site], transform: Change, points: int | None = None) -> float:
        """Largest relative change of the output over the first points (all); infinite where it is not finite."""
        largest = 0.0
        for index in range(len(self.base[:points])) if sites else ():
            theta = self.probe.point(index) if index < 2 else _own(self.probe)
            generator = P.seeded(self.probe.seed * 8 + index, torch.device("cpu"))
            for site in sites:
                theta |= transform(site, theta, generator)
            try:
                largest = max(largest, output_change(self.base[index], self.probe.out(theta)))
            except NotGeneric:
                return math.inf
            if largest > self.tolerance:
                break
        return largest

    def holding(self, sites: Sequence[Site], transform: Change) -> tuple[list[Site], float]:
        """The sites that keep the function, and the change when all of these are transformed at once."""
        kept, residual = list(sites), self.change(sites, transform)
        while residual > self.tolerance:
            wrong = self._wrong(kept, transform, failed=True)
            kept = [s for s in kept if s not in wrong]
            residual = self.change(kept, transform)
        return kept, residual

    def _wrong(self, sites: Sequence[Site], transform: Change, failed: bool = False) -> list[Site]:
        if not failed and self.change(sites, transform) <= self.tolerance:
            return []
        if len(sites) == 1:
            return list(sites)
        left, right = sites[: len(sites) // 2], sites[len(sites) // 2 :]
        wrong = self._wrong(left, transform)
        return wrong + self._wrong(right, transform, failed=not wrong)

    def groups(self, groups: ScaleGroups) -> float:
        """The change when all scale groups are rescaled; :class:`InputError` where it is one of the function."""
        members: Sequence[Group] = groups.groups
        change = 0.0
        for index, reference in enumerate(self.base[:2]):
            moved = self.probe.out(self.probe.transformed(index, members)) if members else reference
            change = output_change(reference, moved)
            if change > self.tolerance:
                raise InputError(
                    f"rescaling the scale groups given changes the output by {change:.1e}; expected scale-invariant "
                    "groups: use bnsharp.scale_groups(module, x)"
                )
        return change


def _rescaled(site: Site, theta: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return site.rescaled(theta, log_uniform(site.channels, generator, 0.5, 2.0))


def _permuted(site: Site, theta: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return site.permuted(theta, _random_order(site, generator))


def _repaired(check: _Check, sites: Sequence[Site]) -> list[Site]:
    """Sites whose permutation holds, those that fail replaced by the first variant that holds, if one does."""
    holding, _ = check.holding(sites, _permuted)
    left, made = REPAIRS, []
    for site in sites:
        if site in holding:
            made.append(site)
            continue
        for variant in _variants(check.probe, site):
            if left <= 0:
                break
            left -= 1
            if check.change([variant], _permuted, points=1) <= check.tolerance:
                made.append(variant)
                break
    return made


def _variants(probe: Probe, site: Site) -> Iterator[Site]:
    """With what is registered before the rows and has as many (a normalizer over channels hides it); then in blocks.

    Rows without a weight among them cannot be all that writes the channels.
    """
    names = list(probe.values)
    extended = list(site.rows)
    for name in reversed(names[: probe.order[site.rows[0]]]):
        value = probe.values[name]
        if not value.ndim or value.shape[0] != site.channels:
            break
        extended.insert(0, name)
        if value.ndim > 1:
            break
    for rows in dict.fromkeys((tuple(extended), site.rows)):
        if any(probe.values[k].ndim > 1 for k in rows):
            blocks = [b for b in range(1, site.channels // 2 + 1) if site.channels % b == 0]
            for b in blocks if rows != site.rows else blocks[1:]:
                yield replace(site, rows=rows, blocks=b)


# ---------------------------------------------------------------- helpers


def _each(
    params: Params, sites: Sequence[Site], values: Sequence[Tensor],
    change: Callable[[Site, Mapping[str, Tensor], Tensor], dict[str, Tensor]],
) -> Params:
    """The sites' changes one after the other, on one point of the right network."""
    theta = dict(params.items())
    if len(values) != len(sites):
        raise InputError(f"got values for {len(values)} sites; expected one tensor for each of the {len(sites)} sites")
    for site, value in zip(sites, values, strict=True):
        _check_site(site, theta, value)
        theta |= change(site, theta, value)
    return P.make({k: theta[k] if theta[k] is not v else v.clone() for k, v in params.items()})


def _check_site(site: Site, theta: Mapping[str, Tensor], value: Tensor) -> None:
    for name in site.members:
        if name not in theta:
            raise InputError(
                f"a site names the parameter {name!r}, which is not among the {len(theta)} given: find the "
                "transformations of the same module"
            )
    n = site.channels
    fits = all(theta[k].ndim and len(theta[k]) == n for k in site.rows) and all(
        theta[c.name].ndim > 1 and theta[c.name].shape[1] % (n * c.outer) == 0 for c in site.columns
    )
    if not fits:
        raise InputError(
            f"{', '.join(site.members)} do not share {n} channels; expected one point of the module that the "
            "transformations were found on"
        )
    if value.shape != (n,):
        raise InputError(f"got a tensor of shape {list(value.shape)} for a site of {n} channels; expected [{n}]")


def _random_order(site: Site, generator: torch.Generator) -> Tensor:
    """A permutation inside each block, never the identity."""
    size = site.channels // site.blocks
    device = generator.device
    inside = torch.rand(site.blocks, size, generator=generator, device=device, dtype=torch.float64).argsort(1)
    same = torch.arange(size, device=device)
    unchanged = (inside == same).all(1, keepdim=True)
    inside = torch.where(unchanged, same.roll(1), inside)
    return (inside + size * torch.arange(site.blocks, device=device).unsqueeze(1)).reshape(-1)


def _without_zero_degrees(site: Site) -> Site:
    kept = [(k, d) for k, d in zip(site.rows, site.degrees, strict=True) if d]
    return replace(site, rows=tuple(k for k, _ in kept), degrees=tuple(d for _, d in kept))
