"""The search behind :func:`bnsharp.groups.scale_groups`: a network probed at two generic points.

On an invariant group Euler's identity ``⟨θ_i, ∂out/∂θ_i⟩ = 0`` holds at every θ; it screens candidates with one
backward pass per point, and rescaling all that pass at once verifies them, bisecting where that fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnsharp import params as P
from bnsharp.errors import InputError
from bnsharp.partition import Group

_EXAMPLES = (4, 16)
"""Fewest and most examples: BN maps 2 examples to ±1 and 3 to a circle, whatever the weights before it."""
_SPREADS = (0.5, 0.1, 0.02)
"""Relative noise of the generic points; the smaller ones only where the output is not finite or a layer is dead."""


# ---------------------------------------------------------------- the network as a function of its parameters


class NotGeneric(Exception):
    """At this point the output or its gradient is not finite, or a dead layer hides the network behind it."""


class Probe:
    """``θ ↦ out(θ)`` in float64, its generic points, and the row sums that Euler's identity needs."""

    def __init__(self, module: nn.Module, x: Any, seed: int):
        named = list(module.named_parameters())
        self.module, self.seed, self.forwards, self.spread = module, seed, 0, _SPREADS[0]
        self.args, self.kwargs = _prepared(x)
        trained = {k: p for k, p in named if p.requires_grad and p.is_floating_point() and p.numel()}
        self.values = {k: p.detach() for k, p in trained.items()}
        norms = {k: float(torch.linalg.vector_norm(v, dtype=torch.float64)) for k, v in self.values.items()}
        self.sizes = {k: norms[k] / math.sqrt(v.numel()) for k, v in self.values.items()}
        self.order = {k: i for i, k in enumerate(self.values)}
        self.constants = {k: _double(p.detach()) for k, p in named if k not in trained}
        own = {id(p): k for k, p in trained.items()}
        self.layers = [
            [own[id(p)] for p in m._parameters.values() if p is not None and id(p) in own] for m in module.modules()
        ]

    def out(self, theta: Mapping[str, Tensor]) -> list[Tensor]:
        """Floating leaves of the output, without infinities (masked positions; such a leaf is flat)."""
        self.forwards += 1
        buffers = {k: _double(b.detach()).clone() for k, b in self.module.named_buffers()}
        try:
            out = torch.func.functional_call(
                self.module, {**self.constants, **buffers, **theta}, self.args, self.kwargs
            )
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{type(self.module).__name__} fails in float64 on these inputs ({reason}); expected a module that "
                "runs in float64: check x, or give the groups by hand with ScaleGroups({...})"
            ) from error
        leaves = [a.double() for a in tree_leaves(out) if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
        if not leaves:
            raise InputError(
                f"{type(self.module).__name__} returns {type(out).__name__} without a floating tensor; expected a "
                "tensor, or tuples, lists or dicts of tensors"
            )
        leaves = [a[~a.detach().isinf()] if bool(a.detach().isinf().any()) else a for a in leaves]
        if not any(a.numel() for a in leaves) or any(bool(a.detach().isnan().any()) for a in leaves):
            raise NotGeneric
        return leaves

    def draw(self, name: str, stream: int) -> Tensor:
        """A generic value: the parameter mixed with noise of its own size, or of a layer's usual size if larger."""
        value, size = self.values[name], self.sizes[name]
        usual = math.prod(value.shape[1:]) ** -0.5 if value.ndim > 1 else 0.3
        noise = torch.randn(value.shape, generator=self.generator(stream, name), dtype=value.dtype).to(value.device)
        mixed = noise.mul_(self.spread * max(size, usual)).add_(value)
        return (mixed.div_(math.hypot(1.0, self.spread)) if size >= usual else mixed).double()

    def generator(self, stream: int, name: str) -> torch.Generator:
        number = (self.seed * 8 + stream) * 1_000_003 + self.order[name]
        return P.seeded(number % 2**63, torch.device("cpu"))

    def point(self, index: int, replaced: Iterable[str] = ()) -> dict[str, Tensor]:
        """Generic point 0 or 1; ``replaced`` parameters have another value altogether, see :meth:`other`."""
        new = set(replaced)
        return {k: self.other(k, index) if k in new else self.draw(k, index) for k in self.values}

    def other(self, name: str, index: int) -> Tensor:
        """Another value of other signs, all of them at point 0 and random ones at point 1.

        A number before a normalizer does not matter as long as it keeps its sign: it is a group of its own, not inert.
        """
        value = self.draw(name, index + 2)
        signs = -self.draw(name, 0) if index == 0 else torch.randn(value.shape, generator=self.generator(6, name))
        return value.copysign_(signs.to(value))

    def transformed(self, index: int, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Point ``index`` with every group rescaled by factors in [0.5, 2] and inert parameters replaced."""
        theta = self.point(index, [g.members[0] for g in groups if g.kind == "inert"])
        for group in groups:
            if group.kind != "inert":
                factors = log_uniform(group.blocks, self.generator(4 + index, group.members[0]), 0.5, 2.0)
                for name in group.members:
                    parts = theta[name].view(group.blocks, -1)
                    parts.mul_(factors.to(parts).unsqueeze(1))
        return theta

    def screen(self, theta: Mapping[str, Tensor], stream: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """``out(θ)``, and per parameter ``[3, rows]``: ``⟨θ_r, g_r⟩``, ``‖θ_r‖²``, ``‖g_r‖²`` for a random probe."""
        leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
        out = self.out(leaves)
        generator = P.seeded(self.seed * 8 + stream, torch.device("cpu"))
        terms = [
            (torch.randn(a.shape, generator=generator, dtype=a.dtype).to(a.device) * a).sum() / _rms(a) for a in out
        ]
        probed = torch.stack([t.to(terms[0].device) for t in terms]).sum()
        if not probed.requires_grad:
            raise _unrelated(self.module)
        grads = torch.autograd.grad(probed, list(leaves.values()), allow_unused=True)
        sums = {}
        for (name, value), grad in zip(leaves.items(), grads, strict=True):
            t = value.detach().reshape(_rows(value.shape), -1)
            g = torch.zeros_like(t) if grad is None else grad.reshape(t.shape)
            sums[name] = torch.stack([_row_dots(a, b) for a, b in ((t, g), (t, t), (g, g))]).cpu()
        if not all(bool(s.isfinite().all()) for s in sums.values()):
            raise NotGeneric
        return [a.detach() for a in out], sums


# ---------------------------------------------------------------- the search


class _Screen:
    """Euler's identity on the row sums of several points."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.points: list[tuple[dict[str, Tensor], float]] = []
        self.revived: set[str] = set()

    def add(self, sums: dict[str, Tensor]) -> bool:
        """Add a point; False if the output depends on no parameter there."""
        largest = max(float((s[1].sum() * s[2].sum()).sqrt()) for s in sums.values())
        self.points.append((sums, 1e-3 * self.tolerance * largest))
        return largest > 0

    def passes(self, group: Group) -> bool:
        """``|⟨θ_i, g_i⟩| ≤ tolerance·‖θ_i‖‖g_i‖`` in every block, up to a floor relative to the largest tensor.

        Where the gradient vanishes the identity says nothing, so some block must have one. A parameter that was
        replaced with an effect is excused: there the vanishing gradient *is* the identity (groups of one number).
        """
        alive = bool(self.revived.intersection(group.members))
        for sums, floor in self.points:
            parts = torch.stack([sums[k].reshape(3, group.blocks, -1).sum(-1) for k in group.members]).sum(0)
            size = (parts[1] * parts[2]).sqrt()  # [blocks]
            if group.kind == "inert":
                if float(size) > floor:
                    return False
                alive = True
            elif bool((parts[0].abs() > self.tolerance * size + floor).any()):
                return False
            alive = alive or bool((size > 100 * floor).any())
        return alive

    def candidates(self, layers: Sequence[Sequence[str]], rejected: set[Group]) -> list[Group]:
        """For each parameter its first group that passes and is not rejected, then pairs of what is left."""
        found: list[Group] = []
        free: set[str] = set()
        rows = {k: s.shape[1] for k, s in self.points[0][0].items()}
        for name in rows:
            group = next((g for g in self._alone(name, rows[name]) if g not in rejected and self.passes(g)), None)
            if group is None:
                free.add(name)
            else:
                found.append(group)
        for layer in layers:
            for pair in itertools.combinations(layer, 2):
                if free.issuperset(pair) and pair[0] != pair[1]:
                    blocks = _divisors(rows[pair[0]]) if rows[pair[0]] == rows[pair[1]] else [1]
                    joint = (Group("joint", pair, b) for b in blocks)
                    group = next((g for g in joint if g not in rejected and self.passes(g)), None)
                    if group is not None:
                        found.append(group)
                        free.difference_update(pair)
        return found

    def _alone(self, name: str, rows: int) -> Iterator[Group]:
        yield Group("inert", (name,), 1)
        slack = [(sums[name].sum(1).tolist(), rows * floor) for sums, floor in self.points]
        if all(abs(e) <= self.tolerance * math.sqrt(t * g) + f for (e, t, g), f in slack):  # finer groups imply it
            for blocks in _divisors(rows):
                yield Group("row" if blocks == rows else "tensor" if blocks == 1 else "block", (name,), blocks)


def find_groups(probe: Probe, tolerance: float) -> tuple[list[Group], float]:
    """The scale groups, and the largest relative change of the output when all were rescaled at once."""
    screen, base = screened(probe, tolerance)
    residual = 0.0

    def holds(groups: Sequence[Group]) -> bool:
        nonlocal residual
        residual = 0.0
        for index, reference in enumerate(base):
            try:
                change = output_change(reference, probe.out(probe.transformed(index, groups))) if groups else 0.0
            except NotGeneric:
                return False
            if change > tolerance:
                return False
            residual = max(residual, change)
        return True

    def false(groups: Sequence[Group], failed: bool = False) -> list[Group]:
        if not failed and holds(groups):
            return []
        if len(groups) == 1:
            return list(groups)
        left, right = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        wrong = false(left)
        return wrong + false(right, failed=not wrong)

    rejected: set[Group] = set()
    while True:
        groups = screen.candidates(probe.layers, rejected)
        # replaced together, two numbers that are multiplied would hide each other's change of sign
        numbers = [g for g in groups if g.kind == "inert" and probe.values[g.members[0]].numel() == 1]
        wrong = [g for g in numbers if not holds([g])] or false(groups)
        if not wrong:
            return groups, residual
        rejected.update(wrong)
        revived = {g.members[0] for g in wrong if g.kind == "inert"}
        if revived:
            screen.revived |= revived
            for index in range(2):
                with suppress(NotGeneric):
                    screen.add(probe.screen(probe.point(index, revived), 6)[1])


def screened(probe: Probe, tolerance: float) -> tuple[_Screen, list[list[Tensor]]]:
    """Both generic points: the screen and the outputs, with less noise if one is not generic."""
    for spread in _SPREADS:
        probe.spread = spread
        try:
            screen, base = _Screen(tolerance), []
            for index in range(2):
                state, theta = _random_states(probe), probe.point(index)
                out, sums = probe.screen(theta, 6 + index)
                if not all(map(torch.equal, state, _random_states(probe))):
                    raise _random(probe.module, "it draws from the global random state")
                if index == 0 and (change := output_change(out, probe.out(theta))) > tolerance:
                    raise _random(probe.module, f"two evaluations at one point differ by {change:.1e}")
                if spread != _SPREADS[-1] and _same_for_all_examples(out):
                    raise NotGeneric
                if not screen.add(sums):
                    raise _unrelated(probe.module)
                base.append(out)
            return screen, base
        except NotGeneric:
            continue
    raise InputError(
        f"{type(probe.module).__name__} gives outputs or gradients that are not finite near its parameters; expected "
        "finite ones: check the parameters and x"
    )


def output_change(reference: Sequence[Tensor], out: Sequence[Tensor]) -> float:
    """Largest change of an output relative to the root mean square of its tensor."""
    if [a.shape for a in reference] != [b.shape for b in out]:
        return math.inf
    return max(float((b.detach() - a).abs().max()) / _rms(a) for a, b in zip(reference, out, strict=True) if a.numel())


# ---------------------------------------------------------------- helpers


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """``⟨a_r, b_r⟩`` of every row, without a product as large as a: half the time of a large network went there."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).reshape(-1)


def log_uniform(n: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.exp(math.log(low) + u * (math.log(high) - math.log(low)))


def _divisors(n: int) -> list[int]:
    """Divisors of n, largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def _double(x: Any) -> Any:
    """A tensor in double precision if it is floating or complex; anything else as it is."""
    if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
        return x.to(torch.complex128 if x.is_complex() else torch.float64)
    return x


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt()) or 1.0 if x.numel() else 1.0


def _prepared(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """At most 16 examples of x in float64, as positional and keyword arguments."""
    x = dict(x) if isinstance(x, Mapping) else x
    tensors = [a for a in tree_leaves(x) if isinstance(a, Tensor) and a.ndim]
    n, (fewest, most) = len(tensors[0]) if tensors else 0, _EXAMPLES
    if n < fewest:
        raise InputError(
            f"x holds {n} examples along dimension 0; expected at least {fewest} (up to {most} are used): with 2, "
            "batch statistics give the same output for any weight"
        )

    def cut(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return _double(a.detach()[:most] if a.ndim and len(a) == n else a.detach()).clone()

    made = tree_map(cut, x)
    batched = [a for a in tree_leaves(made) if isinstance(a, Tensor) and a.ndim and len(a) == min(n, most)]
    if all(bool((a == a[:1]).all()) for a in batched):
        raise InputError(
            f"the {len(batched[0])} examples used of x are all equal; expected different ones, so that batch "
            "statistics mean something: pass real or random inputs"
        )
    if isinstance(made, dict):
        return (), made
    return (tuple(made), {}) if isinstance(made, tuple | list) else ((made,), {})


def _same_for_all_examples(out: Sequence[Tensor]) -> bool:
    return all(a.ndim > 1 and len(a) > 1 and bool((a == a[:1]).all()) for a in out)


def _random_states(probe: Probe) -> list[Tensor]:
    devices = {v.device for v in probe.values.values() if v.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in sorted(devices, key=str))]


def _random(module: nn.Module, why: str) -> InputError:
    return InputError(
        f"{type(module).__name__} is random when measured: {why}; expected a module that is deterministic in eval "
        "mode: use nn.Dropout or F.dropout(..., training=self.training)"
    )


def _unrelated(module: nn.Module) -> InputError:
    return InputError(
        f"the output of {type(module).__name__} does not depend on any trainable parameter for this x; expected a "
        "differentiable output that does: check x, requires_grad and detach()"
    )
