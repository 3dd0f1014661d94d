"""Hidden channels of a network: which parameters write them and which read them, found by how it behaves.

A parameter whose rows write n channels, and all weights whose columns read them, are found by masking: where columns r
of every reader are zero, the output does not depend on row r of a writer. In a pass, half of the columns of every
weight are zero; a writer whose masked rows have no gradient is *closed*. Its readers are those whose columns, opened
again, let the gradient through. Layers' classes, parameters' names and the order of execution play no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.probing import NotGeneric, Probe, _rms

FLOOR = 1e-11
"""Gradients below this, relative to the largest tensor's ‖θ‖‖g‖, are rounding."""
DEGREE_TOLERANCE = 1e-7
"""Largest relative error of the homogeneity identity that counts as rounding."""
FEW_CHANNELS = 32
"""With fewer channels than this, three random masks instead of one: units can be dead at a point."""


@dataclass(frozen=True)
class Columns:
    """The columns (dimension 1) of a parameter that read n channels, viewed as ``[rows, outer, n, inner]``.

    ``outer = inner = 1`` but behind a flattening: ``inner`` positions per channel where channels come first,
    ``outer`` positions where they come last.
    """

    name: str
    outer: int = 1

    def view(self, value: Tensor, channels: int) -> Tensor:
        """``[rows, outer, channels, inner]``, inner including the dimensions of a kernel."""
        return value.reshape(value.shape[0], self.outer, channels, -1)


@dataclass(frozen=True)
class Site:
    """Hidden channels of one place in a network.

    Attributes:
        channels: n, how many channels there are.
        rows: parameters whose row r (dimension 0, length n) writes channel r.
        columns: parameters whose columns read channel r.
        degrees: per entry of ``rows``, its exponent k: the function stays when row r is multiplied by ``α_r^k`` and
            column r divided by ``α_r`` (1 behind ReLU; 1/2 behind its square); empty where nothing is rescaled.
        blocks: channels can be permuted inside each of this many equal blocks (1: freely; the groups of a GroupNorm,
            the heads of attention).
    """

    channels: int
    rows: tuple[str, ...]
    columns: tuple[Columns, ...]
    degrees: tuple[float, ...] = ()
    blocks: int = 1

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all parameters that a transformation of this site changes."""
        return tuple(dict.fromkeys((*self.rows, *(c.name for c in self.columns))))

    def rescaled(self, theta: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """Row r times ``α_r^k``, column r over ``α_r``; ``factors`` is ``α``, ``[n]``. Only the members."""
        made = {name: theta[name] for name in self.members}
        for name, degree in zip(self.rows, self.degrees, strict=True):
            value = made[name]
            made[name] = value * factors.to(value).pow(degree).reshape(-1, *[1] * (value.ndim - 1))
        for columns in self.columns:
            value = made[columns.name]
            scaled = columns.view(value, self.channels) / factors.to(value).reshape(-1, 1)
            made[columns.name] = scaled.reshape(value.shape)
        return made

    def permuted(self, theta: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """Channel r becomes what channel ``order[r]`` was; ``order`` is a permutation, ``[n]``. Only the members."""
        made = {name: theta[name] for name in self.members}
        for name in self.rows:
            made[name] = made[name][order.to(made[name].device)]
        for columns in self.columns:
            value = made[columns.name]
            taken = columns.view(value, self.channels)[:, :, order.to(value.device)]
            made[columns.name] = taken.reshape(value.shape)
        return made


# ---------------------------------------------------------------- the search


@dataclass(frozen=True)
class _Class:
    """Weights whose columns could read n channels in the same way."""

    channels: int
    readers: tuple[Columns, ...]


@dataclass(frozen=True)
class _Sums:
    """Of one parameter at one point: ``⟨θ_r, g_r⟩`` by row and by column, and ``‖θ_r‖‖g_r‖`` by row and in all."""

    rows: Tensor
    columns: Tensor | None
    sizes: Tensor
    size: float


def find_sites(probe: Probe) -> list[Site]:
    """All sites that masking shows, with the degrees of those that can be rescaled; none of them verified yet."""
    base = [_sums(probe, probe.point(index)) for index in range(2)]
    exact = _classes(probe, None)
    links = _links(probe, exact, base)
    read = {c.name for readers in links.values() for c in readers}
    # one reader at a time where a network as narrow as half its channels everywhere had nothing to say
    alone = [_Class(c.channels, (reader,)) for c in exact for reader in c.readers if reader.name not in read]
    for cls in (*alone, *_classes(probe, (set(links), read))):
        free = tuple(c for c in cls.readers if c.name not in read)
        if free:
            more = _links(probe, [replace(cls, readers=free)], base, taken=set(links))
            links |= more
            read |= {c.name for readers in more.values() for c in readers}
    return [replace(site, degrees=_degrees(site, base)) for site in _components(probe, links) if _alive(probe, site)]


def _alive(probe: Probe, site: Site) -> bool:
    """Whether no vector is a writer while its own layer's weight is none: there, no signal reaches the weight."""
    layers = [layer for layer in probe.layers if any(k in site.rows and probe.values[k].ndim == 1 for k in layer)]
    weights = [k for layer in layers for k in layer if probe.values[k].ndim > 1]
    return all(k in site.rows for k in weights if probe.values[k].shape[0] == site.channels)


def _sums(probe: Probe, theta: Mapping[str, Tensor]) -> dict[str, _Sums]:
    """Sums of ``θ ⊙ g`` for a random probe of the output; empty where it has no finite gradient at θ."""
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    try:
        out = probe.out(leaves)
    except NotGeneric:
        return {}
    generator = P.seeded(probe.seed * 8 + 6, torch.device("cpu"))
    terms = [(torch.randn(a.shape, generator=generator, dtype=a.dtype).to(a.device) * a).sum() / _rms(a) for a in out]
    total = torch.stack([t.to(terms[0].device) for t in terms]).sum()
    if not total.requires_grad:
        return {}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    made = {}
    for (name, value), grad in zip(leaves.items(), grads, strict=True):
        t, product = value.detach(), value.detach() * grad
        norms = [a.reshape(len(a) if a.ndim else 1, -1).square().sum(1) for a in (t, grad)]
        by_column = product.sum([d for d in range(t.ndim) if d != 1]).cpu() if t.ndim > 1 else None
        made[name] = _Sums(
            product.reshape(len(norms[0]), -1).sum(1).cpu(), by_column, (norms[0] * norms[1]).sqrt().cpu(),
            float((norms[0].sum() * norms[1].sum()).sqrt()),
        )
    return made if all(bool(s.sizes.isfinite().all()) for s in made.values()) else {}


def _classes(probe: Probe, linked: tuple[set[str], set[str]] | None) -> list[_Class]:
    """Weights by the number of channels their columns could read: as many as columns, or, for what is not linked
    yet, a divisor of that, behind a flattening with channels first or last."""
    sizes = {v.shape[0] for k, v in probe.values.items() if v.ndim and (linked is None or k not in linked[0])}
    found: dict[tuple[int, int, int], list[Columns]] = defaultdict(list)
    for name, value in probe.values.items():
        if value.ndim < 2 or (linked is not None and name in linked[1]):
            continue
        width = value.shape[1]
        for n in sorted(s for s in sizes if s > 1 and width % s == 0 and (width == s) == (linked is None)):
            for outer in dict.fromkeys((1, width // n)):
                found[n, outer, width].append(Columns(name, outer))
    return [_Class(n, tuple(readers)) for (n, _, _), readers in found.items()]


def _links(
    probe: Probe, classes: Sequence[_Class], base: Sequence[Mapping[str, _Sums]], taken: Collection[str] = ()
) -> dict[str, set[Columns]]:
    """Writers of channels, and the readers of each: see the module's docstring. One class per number of channels."""
    if not any(s.rows.numel() == c.channels and k not in taken for k, s in base[0].items() for c in classes):
        return {}
    by_size = {c.channels: c for c in classes}
    writers = {k: len(s.rows) for k, s in base[0].items() if len(s.rows) in by_size and k not in taken}
    closed: dict[str, bool] = {}
    links: dict[str, set[Columns]] = defaultdict(set)
    few = bool(classes) and min(by_size) < FEW_CHANNELS
    generator = P.seeded(probe.seed * 8 + 7, torch.device("cpu"))
    for index in (0, 1, 0) if few else (0,):
        masks = {n: torch.randperm(n, generator=generator) < (n + 1) // 2 for n in by_size}
        theta = probe.point(index)
        masked = _through(probe, theta, [(c, masks[c.channels], None) for c in classes])
        for name, n in writers.items():
            state = _is_closed(name, masks[n], masked, base[index])
            if state is not None:
                closed[name] = closed.get(name, True) and state
        wanted = {k: by_size[n].readers for k, n in writers.items() if closed.get(k)}
        for name, readers in wanted.items():
            if len(readers) == 1:
                links[name].update(readers)
        for i in range(max((len(r) for r in wanted.values() if len(r) > 1), default=0)):
            opened = [(c, masks[c.channels], c.readers[i] if i < len(c.readers) else None) for c in classes]
            passed = _through(probe, theta, opened)
            for name, readers in wanted.items():
                if i < len(readers) and bool((passed[name] & masks[writers[name]]).any() if passed else False):
                    links[name].add(readers[i])
    return {name: readers for name, readers in links.items() if closed[name] and readers}


def _through(
    probe: Probe, theta: Mapping[str, Tensor], masks: Iterable[tuple[_Class, Tensor, Columns | None]]
) -> dict[str, Tensor]:
    """Per parameter, which rows have a gradient once the masked columns of all readers but the opened one are zero."""
    made = dict(theta)
    for cls, mask, opened in masks:
        for columns in cls.readers:
            if columns != opened:
                kept = (~mask).to(made[columns.name]).reshape(-1, 1)
                value = made[columns.name]
                made[columns.name] = (columns.view(value, cls.channels) * kept).reshape(value.shape)
    sums = _sums(probe, made)
    floor = FLOOR * max((s.size for s in sums.values()), default=0.0)
    return {name: s.sizes > floor for name, s in sums.items()}


def _is_closed(name: str, mask: Tensor, passed: Mapping[str, Tensor], base: Mapping[str, _Sums]) -> bool | None:
    """Whether masked rows have no gradient; None where that would say nothing (dead rows, or all of them cut off)."""
    if not passed or not base:
        return None
    alive = base[name].sizes > 100 * FLOOR * max(s.size for s in base.values())
    if bool((passed[name] & mask).any()):
        return False
    return True if bool((alive & mask).any()) and bool((passed[name] & ~mask).any()) else None


def _components(probe: Probe, links: Mapping[str, set[Columns]]) -> Iterator[Site]:
    """Writers and readers that share channels, directly or through others (a residual stream is one site)."""
    groups: list[tuple[set[str], set[Columns]]] = []
    for name, readers in links.items():
        joined = [g for g in groups if g[1] & readers]
        groups = [g for g in groups if not g[1] & readers]
        groups.append(({name}.union(*(g[0] for g in joined)), set(readers).union(*(g[1] for g in joined))))
    for writers, readers in sorted(groups, key=lambda g: min(probe.order[k] for k in g[0])):
        rows = tuple(sorted(writers, key=probe.order.__getitem__))
        columns = tuple(sorted(readers, key=lambda c: probe.order[c.name]))
        yield Site(probe.values[rows[0]].shape[0], rows, columns)


def _degrees(site: Site, base: Sequence[Mapping[str, _Sums]]) -> tuple[float, ...]:
    """Exponents k with ``Σ_a k_a ⟨a_r, g_{a_r}⟩ = Σ_b ⟨b_{:r}, g_{b_{:r}}⟩`` for every channel r, at both points.

    Empty where there are none. Writers next to the readers are preferred where several solutions exist.
    """
    points = [sums for sums in base if sums]
    target = torch.cat([sum((_by_channel(c, site, sums) for c in site.columns), torch.zeros(())) for sums in points])
    scale = float(target.norm())
    size = sum(sums[c.name].size for sums in points for c in site.columns)
    if scale <= DEGREE_TOLERANCE * size:
        return ()
    vectors = {k: torch.cat([sums[k].rows for sums in points]) / scale for k in site.rows}
    basis: list[Tensor] = []
    chosen: list[str] = []
    for name in reversed(site.rows):
        rest = vectors[name]
        for _ in range(2):
            for b in basis:
                rest = rest - (rest @ b) * b
        if float(rest.norm()) > DEGREE_TOLERANCE * (1 + float(vectors[name].norm())):
            basis.append(rest / rest.norm())
            chosen.append(name)
    if not chosen:
        return ()
    matrix = torch.stack([vectors[k] for k in chosen], 1)
    solved = torch.linalg.lstsq(matrix, (target / scale).unsqueeze(1), driver="gelsd").solution
    if float((matrix @ solved - (target / scale).unsqueeze(1)).norm()) > DEGREE_TOLERANCE:
        return ()
    found = dict(zip(chosen, (_snapped(float(k)) for k in solved), strict=True))
    return tuple(found.get(k, 0.0) for k in site.rows)


def _by_channel(columns: Columns, site: Site, sums: Mapping[str, _Sums]) -> Tensor:
    values = sums[columns.name].columns
    assert values is not None
    return values.reshape(columns.outer, site.channels, -1).sum((0, 2))


def _snapped(value: float) -> float:
    """The nearest multiple of 1/12 if it is within rounding."""
    near = round(12 * value) / 12
    return near if abs(value - near) < 1e-5 else value
