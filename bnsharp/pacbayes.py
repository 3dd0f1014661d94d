"""A PAC-Bayes bound of the error rate of a network under noise relative to its groups' norms.

Posterior ``Q = N(θ, diag s²)`` with ``s_j = σ‖θ_i‖/√d_i`` for every coordinate j of group i; prior
``P = N(θ⁰, diag w²)``, centred at the initialisation or at 0, each parameter tensor with a width w of its own. σ and
the widths are chosen after seeing the data, from grids fixed before; the logarithm of the number of choices pays for
that (σ's part is to spare, as the theorem holds for every Q at once). With probability ≥ 1 − η over n independent
examples (McAllester 2003; Langford & Caruana 2001)

    E_Q L_D ≤ E_Q L_S + √((KL(Q‖P) + ln choices + ln(2n/η₁)) / (2(n − 1)))

and ``E_Q L_S`` is bounded from the mean p̂ of m draws by ``sup {p : kl(p̂‖p) ≤ ln(2/η₂)/m}``, η = η₁ + η₂.

**Invariance.** Every scale group is first rescaled to unit norm, the prior's centre too: an equal network (up to the ε
inside its normalizers), so that ``T_a θ`` has the bound of θ.

**What has to hold.** The examples are independent, the loss of each is a function of θ and of that example alone, and
nothing in P depends on them: the architecture, the grids and the initialisation are chosen before. Batch statistics
break the second condition, since the loss of an example depends on its batch. Then the bound is a theorem with whole
batches as the examples (``unit="batch"``): n independent batches of one size, each evaluated with its own statistics,
L_D being the expected error rate on such a batch. With ``unit="example"`` it is a theorem for networks without batch
statistics, and for running statistics if they come from other data than the n examples (they are a part of every
network that P can draw). Otherwise it treats the statistics as if they did not depend on the examples: such a number
compares networks and certifies none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnsharp import params as P
from bnsharp.checks import flag, one_of, positive, whole
from bnsharp.composites import zero_one
from bnsharp.divergence import FORMS, gaussian_kl, mean_bound
from bnsharp.errors import InputError
from bnsharp.estimation import DEFAULT_SEED, ONCE, ROUND, Sampling, check
from bnsharp.evaluation import AbstractObjective, LossFunction, as_objective
from bnsharp.geometry import JointBall
from bnsharp.groups import ScaleGroups
from bnsharp.laws import Gaussian
from bnsharp.objective import Objective
from bnsharp.types import Estimate, Params

SIGMAS = tuple(float(s) for s in np.geomspace(1e-3, 1, 25))
"""The grid of σ, up to noise as large as each group itself."""
WIDTHS = tuple(float(w) for w in np.geomspace(1e-4, 10, 101))
"""The grid of the prior's standard deviation per coordinate."""


# ---------------------------------------------------------------- the bound


@dataclass(frozen=True)
class PacBayes:
    """A bound of the expected error rate of a network drawn from Q, and what it is made of.

    Attributes:
        bound: of ``E_Q L_D``, with probability at least ``confidence``; McAllester's form is not cut off at 1.
        risk: upper confidence limit of ``E_Q L_S``.
        mean_risk: its estimate, the mean over the draws.
        centre_risk: ``L_S(θ)``, of the network itself.
        kl: ``KL(Q‖P)``, in nats.
        complexity: c of :data:`FORMS`, all logarithms included.
        log_choices: logarithm of the number of combinations of σ and widths, paid for in ``complexity``.
        sigma: the noise chosen, relative to each group's norm.
        widths: the prior's standard deviation per coordinate, by parameter (joint groups: ``"a+b"``).
        draws: Monte-Carlo draws of ``risk``.
        n: independent examples (batches).
        confidence: ``1 − η``; half of η is for the draws.
        form: which theorem.
    """

    bound: float
    risk: float
    mean_risk: float
    centre_risk: float
    kl: float
    complexity: float
    log_choices: float
    sigma: float
    widths: dict[str, float]
    draws: int
    n: int
    confidence: float
    form: str

    @property
    def is_vacuous(self) -> bool:
        """Whether the bound says nothing: no error rate is above 1."""
        return self.bound >= 1


@dataclass(frozen=True)
class PacBayesBound:
    """The bound as a measure: ``(objective, θ, generator) -> Estimate``, and :meth:`bound` with its parts.

    A network's objective is measured under the error rate, whatever its criterion; a plain function must lie in [0, 1].
    σ is chosen by ``pilot`` draws for each value of the grid, and the risk estimated by ``draws`` fresh ones. Of the
    estimate, ``value`` and ``upper`` are the bound; its Monte-Carlo error is inside, so that ``stderr`` is 0.

    Groups of norm zero get the smallest width of the grid as standard deviation, since a point has no finite divergence
    to a Gaussian; inert parameters have no part in either law.

    Args:
        groups: scale groups; every other parameter tensor is a group.
        prior: the prior's centre, fixed before seeing the data (the initialisation); None is 0.
        n: independent examples; None counts the objective's, by ``unit``.
        unit: what counts as one: an ``"example"``, or a ``"batch"`` (see the module's text); all batches of one size.
        sigmas, widths: the grids, positive numbers fixed before seeing the data.
        shared: one width for all parameters instead of one for each tensor.
        draws, pilot: as above.
        confidence: ``1 − η``.
        form: a key of :data:`FORMS`.
        normalize: rescale every scale group to unit norm first.

    Raises:
        InputError: empty grids or values that are not finite and > 0, a confidence outside (0, 1), fewer than one draw,
            an n below the form's least, an unknown form or unit.
    """

    groups: ScaleGroups
    prior: Params | None = field(default=None, compare=False)
    n: int | None = field(default=None, kw_only=True)
    unit: str = field(default="example", kw_only=True)
    sigmas: Sequence[float] = field(default=SIGMAS, kw_only=True)
    widths: Sequence[float] = field(default=WIDTHS, kw_only=True)
    shared: bool = field(default=False, kw_only=True)
    draws: int = field(default=100, kw_only=True)
    pilot: int = field(default=4, kw_only=True)
    confidence: float = field(default=0.95, kw_only=True)
    form: str = field(default="mcallester", kw_only=True)
    normalize: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        one_of("form", self.form, FORMS)
        one_of("unit", self.unit, ("example", "batch"))
        for name in ("sigmas", "widths"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
                raise InputError(f"{name}={values!r}; expected at least one number > 0")
            for value in values:
                positive(name, value)
        for name in ("shared", "normalize"):
            flag(name, getattr(self, name))
        whole("draws", self.draws)
        whole("pilot", self.pilot)
        positive("confidence", self.confidence)
        if not self.confidence < 1:
            raise InputError(f"confidence={self.confidence!r}; expected a number between 0 and 1, as 0.95")
        if self.n is not None:
            whole("n", self.n, FORMS[self.form].least)

    def bound(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
        on_draws: Callable[[PacBayes], None] | None = None,
    ) -> PacBayes:
        """The bound for an objective with values in [0, 1].

        Args:
            objective: the mean loss over the n examples.
            params: θ.
            generator: source of every random number; None is a generator seeded with 0.
            on_draws: called with the bound of the draws so far, about every ``ROUND`` of them (each holds by itself).

        Raises:
            InputError: parameters that are not finite, a prior that does not fit, a loss outside [0, 1]; running
                statistics with ``normalize``; too few examples, or batches of several sizes with ``unit="batch"``.
        """
        objective = as_objective(objective)
        params = P.pmap(Tensor.detach, params)
        check(objective, params)
        generator = P.seeded(DEFAULT_SEED, P.first(params).device) if generator is None else generator
        if self.normalize:
            _require_invariance(objective)
        laws = _Laws(self, params)
        centre_risk = _unit_interval(objective, [laws.centre])[0]
        n = self._examples(objective)
        seeds = P.random_seeds(generator, self.pilot + self.draws)
        form, eta = FORMS[self.form], (1 - self.confidence) / 2
        log_choices = math.log(len(self.sigmas)) + math.log(len(self.widths)) * (1 if self.shared else laws.tensors)

        def at(sigma: float, risk: float) -> PacBayes:
            kl, widths = laws.kl(sigma)
            c = form.complexity(kl + log_choices, n, eta)
            return PacBayes(
                form.bound(risk, c), risk, risk, centre_risk, kl, c, log_choices, sigma, widths, self.draws, n,
                self.confidence, self.form,
            )

        trials = [at(s, _mean(_unit_interval(objective, laws.draws(s, seeds[: self.pilot])))) for s in self.sigmas]
        # where the kl form is 1 for every σ, the sum still tells them apart
        sigma = min(trials, key=lambda trial: (trial.bound, trial.risk + trial.complexity)).sigma
        values: list[float] = []
        for start in range(self.pilot, len(seeds), ROUND):
            values += _unit_interval(objective, laws.draws(sigma, seeds[start : start + ROUND]))
            mean, m = _mean(values), len(values)
            result = replace(at(sigma, mean_bound(mean, m, eta)), mean_risk=mean, draws=m)
            if on_draws is not None:
                on_draws(result)
        return result

    def __call__(
        self,
        objective: AbstractObjective | LossFunction,
        params: Params,
        generator: torch.Generator | None = None,
        sampling: Sampling = ONCE,
    ) -> Estimate:
        """As :meth:`bound`. A target error is met at once: the sampling error is a part of the bound."""
        judged: AbstractObjective = (
            objective.with_criterion(zero_one) if isinstance(objective, Objective) else as_objective(objective)
        )
        before = judged.evaluations.copy()

        def estimate(result: PacBayes) -> Estimate:
            spent = judged.evaluations - before
            return Estimate(
                value=result.bound, stderr=0.0, error=0.0, upper=result.bound, effective_samples=result.draws,
                evaluations={k: spent.get(k, 0) for k in ("gradients", "losses", "products")},
                statistics=judged.statistics, batch_size=judged.batch_size, draws=result.draws,
                examples=judged.examples, batches=max(1, judged.batches_seen),
                precision=str(P.first(params).dtype).removeprefix("torch."),
                engine=judged.engine_used,
                converged=None if sampling.target is None else True, confidence=result.confidence,
            )

        tell = sampling.on_estimate
        return estimate(self.bound(judged, params, generator, tell and (lambda result: tell(estimate(result)))))

    def cost(self) -> int:
        """Losses that one bound takes."""
        return 1 + self.pilot * len(self.sigmas) + self.draws

    def _examples(self, objective: AbstractObjective) -> int:
        least = FORMS[self.form].least
        if self.n is not None:
            return self.n
        if objective.examples is None or objective.batch_size is None:
            raise InputError("n=None with a plain function; expected the number of independent examples: pass n=")
        found = objective.examples if self.unit == "example" else objective.batches_seen
        if self.unit == "batch" and objective.examples != found * objective.batch_size:
            raise InputError(
                f"{objective.examples} examples in {found} batches are of several sizes; expected batches of one size "
                f"({objective.batch_size}): drop the last one"
            )
        if found < least:
            raise InputError(f"the bound rests on {found} {self.unit}(es); expected at least {least}: give more data")
        return found


def pac_bayes(
    groups: ScaleGroups, *, draws: int = 100, pilot: int = 4, confidence: float = 0.95, form: str = "mcallester",
    unit: str = "example", shared: bool = False, normalize: bool = True,
) -> PacBayesBound:
    """:class:`PacBayesBound` around 0 with the usual grids: as a measure among others."""
    return PacBayesBound(
        groups, draws=draws, pilot=pilot, confidence=confidence, form=form, unit=unit, shared=shared,
        normalize=normalize,
    )


def pac_bayes_bound(
    objective: AbstractObjective | LossFunction, params: Params, groups: ScaleGroups, *,
    generator: torch.Generator | None = None, prior: Params | None = None, **options: Any,
) -> PacBayes:
    """``PacBayesBound(groups, prior, …).bound(objective, params, generator)``, for an objective in [0, 1].

    ``bnsharp.Objective(module, bnsharp.pacbayes.zero_one, data)`` is one. ``options`` are those of
    :class:`PacBayesBound`.
    """
    return PacBayesBound(groups, prior, **options).bound(objective, params, generator)


# ---------------------------------------------------------------- prior and posterior


class _Laws:
    """Q and P for one θ: draws of Q and ``KL(Q‖P)`` for every σ."""

    def __init__(self, options: PacBayesBound, params: Params):
        self.options, groups = options, options.groups
        prior = P.zeros_like(params) if options.prior is None else _fitting(options.prior, params)
        if options.normalize:
            params, prior = _unit_norms(groups, params), _unit_norms(groups, prior)
        self.centre, self.partition = params, groups.partition_with(params)
        exact = P.pmap(Tensor.double, params)
        self.sizes = self.partition.sizes(exact)  # [K]
        self.norms = self.partition.norms(exact)  # [K]
        self.distance2 = self.partition.sums(P.pmap(lambda a, b: (a - b).square(), exact, P.pmap(Tensor.double, prior)))
        blocks = torch.tensor([group.blocks for group in self.partition], dtype=torch.int64, device=self.norms.device)
        self.owner = torch.arange(len(blocks), device=blocks.device).repeat_interleave(blocks)  # [K], which tensor's

    @property
    def tensors(self) -> int:
        """How many widths P has."""
        return len(self.partition.groups)

    def std(self, sigma: float) -> Tensor:
        """``s_i = σ‖θ_i‖/√d_i``, ``[K]``; for groups of norm zero the smallest width of the grid."""
        floor = self.norms.new_tensor(min(self.options.widths))
        return torch.where(self.norms > 0, sigma * self.norms / self.sizes.sqrt(), floor)

    def draws(self, sigma: float, seeds: Sequence[int]) -> P.Lazy:
        """``θ + s ⊙ z``, z standard normal, each remade from its seed when asked for."""
        like = self.centre
        std = P.pmap(lambda s, p: s.to(p), self.partition.spread(self.std(sigma), like), like)

        def draw(i: int) -> Params:
            z = Gaussian()(JointBall(), like, P.seeded(seeds[i], P.first(like).device))
            return P.pmap(lambda p, s, a: p + s * a, like, std, z)

        return P.Lazy(len(seeds), draw)

    def kl(self, sigma: float) -> tuple[float, dict[str, float]]:
        """``KL(Q‖P)`` with the best widths of the grid, and those widths."""
        grid = self.norms.new_tensor(list(self.options.widths))[:, None]  # [W, 1]
        each = gaussian_kl(self.distance2, self.std(sigma), grid, self.sizes)  # [W, K]
        per_tensor = each.new_zeros(len(grid), self.tensors).index_add_(1, self.owner, each)  # [W, T]
        best = per_tensor.sum(1).argmin().expand(self.tensors) if self.options.shared else per_tensor.argmin(0)
        kl = per_tensor.gather(0, best[None]).sum()
        names = ("+".join(group.members) for group in self.partition)
        return float(kl), dict(zip(names, grid[best, 0].tolist(), strict=True))


def _unit_norms(groups: ScaleGroups, params: Params) -> Params:
    """The equal network whose scale groups have norm 1; groups of norm zero stay."""
    return groups.rescale(params, P.pmap(lambda n: torch.where(n > 0, 1 / n, 1.0), groups.norms(params)))


def _fitting(prior: Params, params: Params) -> Params:
    for name, value in params.items():
        if name not in prior.keys() or prior[name].shape != value.shape or not bool(prior[name].isfinite().all()):
            raise InputError(
                f"the prior's centre has no finite {name!r} of shape {list(value.shape)}; expected the parameters of "
                "the same network: pass bnsharp.parameters(module) of its initialisation"
            )
    return P.make({name: prior[name].detach().to(value) for name, value in params.items()})


def _require_invariance(objective: AbstractObjective) -> None:
    """With running statistics a rescaled network is another function."""
    if not isinstance(objective, Objective) or objective.statistics != "running":
        return
    if any(name.rpartition(".")[2] == "running_mean" for name, _ in objective.module.named_buffers()):
        raise InputError(
            "with running statistics a network changes when it is rescaled to unit norms; expected statistics='batch', "
            "or normalize=False"
        )


def _unit_interval(objective: AbstractObjective, points: Sequence[Params]) -> list[float]:
    """Losses at these points, in [0, 1] up to rounding."""
    with torch.no_grad():
        values = objective.many(points)
    bad = ~((values >= -1e-6) & (values <= 1 + 1e-6))
    if bool(bad.any()):
        raise InputError(
            f"the loss is {float(values[bad][0]):.6g} at a point; expected a loss in [0, 1]: pass "
            "objective.with_criterion(bnsharp.pacbayes.zero_one)"
        )
    return values.double().clamp(0, 1).tolist()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
