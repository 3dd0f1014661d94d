"""The PAC-Bayes bound: its divergences, what it pays for, that it covers, and that equal networks have equal bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_line
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from strategies import Problem, problem
from torch import Tensor, nn

from bnsharp import Estimate, Objective, ScaleGroups, exact_norms, scale_groups
from bnsharp import params as P
from bnsharp.divergence import FORMS, bernoulli_kl, gaussian_kl, kl_inverse, mean_bound
from bnsharp.errors import InputError
from bnsharp.measures import Sampling
from bnsharp.pacbayes import SIGMAS, WIDTHS, PacBayes, PacBayesBound, _Laws, pac_bayes, pac_bayes_bound, zero_one
from bnsharp.types import Params

QUICK: dict[str, Any] = {"draws": 20, "pilot": 2, "sigmas": (0.05, 0.2, 0.5)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def judged(p: Problem) -> Objective:
    return p.objective().with_criterion(zero_one)


def measured(p: Problem, params: Params | None = None, groups: ScaleGroups | None = None, seed: int = 0,
             **options: Any) -> PacBayes:
    params = p.params if params is None else params
    return pac_bayes_bound(judged(p), params, groups or p.groups, generator=seeded(seed), **{**QUICK, **options})


# ---------------------------------------------------------------- divergences


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_the_divergence_of_gaussians_is_torchs(seed: int, size: int) -> None:
    g = seeded(seed)
    mean, other = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(2))
    std, width = (torch.rand(2, generator=g, dtype=torch.float64) * 3 + 1e-3).unbind()
    q, p = (torch.distributions.Normal(m, s.expand(size)) for m, s in ((mean, std), (other, width)))
    expected = torch.distributions.kl_divergence(q, p).sum()
    ours = gaussian_kl((mean - other).square().sum(), std, width, size)
    assert float(ours) == pytest.approx(float(expected), rel=1e-12)
    assert float(gaussian_kl(torch.zeros(()), std, std, size)) == 0


@pytest.mark.parametrize(("mean", "std", "width"), [(0.3, 0.1, 0.2), (-1.0, 2.0, 0.7), (0.0, 1e-3, 1.0)])
def test_the_divergence_of_gaussians_is_its_integral(mean: float, std: float, width: float) -> None:
    q, p = stats.norm(mean, std), stats.norm(0, width)
    integral, _ = integrate.quad(
        lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), mean - 12 * std, mean + 12 * std, epsabs=1e-13, epsrel=1e-11
    )
    ours = gaussian_kl(torch.tensor(mean**2, dtype=torch.float64), torch.tensor(std, dtype=torch.float64),
                       torch.tensor(width, dtype=torch.float64))
    assert float(ours) == pytest.approx(integral, rel=1e-9)


@given(st.floats(0, 0.999), st.floats(1e-9, 20))
def test_the_inverse_of_kl_is_the_root(q: float, c: float) -> None:
    p = kl_inverse(q, c)
    assert q <= p <= 1
    if bernoulli_kl(q, 1 - 1e-15) <= c:
        assert p == pytest.approx(1, abs=1e-14)
    else:
        root = optimize.brentq(lambda x: bernoulli_kl(q, x) - c, q, 1 - 1e-15, xtol=1e-15)
        assert p == pytest.approx(root, abs=1e-12, rel=1e-10)
        assert bernoulli_kl(q, p) >= c * (1 - 1e-6)  # from above


def test_the_inverse_of_kl_at_the_ends() -> None:
    for c in (1e-3, 0.5, 3.0):
        assert kl_inverse(0.0, c) == pytest.approx(-math.expm1(-c), rel=1e-13)  # ln 1/(1−p) = c
        assert kl_inverse(1.0, c) == 1.0
    for q in (0.0, 0.3, 1.0):
        assert kl_inverse(q, 0.0) == q and kl_inverse(q, math.inf) == 1.0
    assert bernoulli_kl(0.2, 0.0) == bernoulli_kl(0.2, 1.0) == math.inf and bernoulli_kl(0.0, 0.0) == 0
    for bad in ((-0.1, 1.0), (1.1, 1.0), (0.5, -1.0), (math.nan, 1.0)):
        with pytest.raises(InputError) as caught:
            kl_inverse(*bad)
        one_line(caught.value)


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("law", ["bernoulli", "beta"])
def test_the_monte_carlo_limit_covers(truth: float, law: str) -> None:
    """It falls below the mean with frequency at most η = 0.1: in 2000 trials, up to a chance of 1e-6."""
    rng, trials, draws, eta = np.random.default_rng(0), 2000, 25, 0.1
    sample = (rng.random((trials, draws)) < truth).astype(float) if law == "bernoulli" else rng.beta(
        truth, 1 - truth, (trials, draws))
    failures = sum(mean_bound(float(mean), draws, eta) < truth for mean in sample.mean(1))
    assert failures <= stats.binom(trials, eta).ppf(1 - 1e-6)
    # and it is a limit, not just 1
    assert mean_bound(truth, 10_000, eta) < truth + 0.02


@given(st.floats(0, 0.99), st.floats(0, 500), st.integers(8, 10_000), st.floats(0.001, 0.2))
def test_the_kl_form_is_never_the_larger_one(risk: float, kl: float, n: int, eta: float) -> None:
    """By Pinsker's inequality."""
    plain, tight = (FORMS[name].bound(risk, FORMS[name].complexity(kl, n, eta)) for name in ("mcallester", "kl"))
    assert risk <= tight <= min(1.0, plain) + 1e-12


# ---------------------------------------------------------------- the laws


def dense_kl(p: Problem, params: Params, prior: Params, sigma: float, widths: dict[str, float]) -> float:
    """KL by torch.distributions, one coordinate at a time, from how the network was built."""
    total = 0.0
    for name, value in params.items():
        if name in p.inert:
            continue
        rows = value.reshape(len(value), -1) if name in p.rows else value.reshape(1, -1)
        std = sigma * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
        q = torch.distributions.Normal(rows, std.expand_as(rows))
        reference = torch.distributions.Normal(prior[name].reshape(rows.shape), widths[name])
        total += float(torch.distributions.kl_divergence(q, reference).sum())
    return total


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_divergence_is_that_of_every_coordinate(kind: str, with_prior: bool, shared: bool) -> None:
    p = problem(kind, bias=True, seed=3)
    prior = P.pmap(lambda v: 0.7 * v + 0.1, p.params) if with_prior else None
    result = measured(p, prior=prior, shared=shared, normalize=False)
    centre = P.zeros_like(p.params) if prior is None else prior
    assert result.kl == pytest.approx(dense_kl(p, p.params, centre, result.sigma, result.widths), rel=1e-11)
    assert set(result.widths) == set(p.params.keys()) - set(p.inert) and set(result.widths.values()) <= set(WIDTHS)
    assert (len(set(result.widths.values())) == 1) == shared
    # no other width of the grid is better, one tensor at a time or all together
    for name in result.widths:
        for width in WIDTHS[::9]:
            other = dict.fromkeys(result.widths, width) if shared else {**result.widths, name: width}
            assert dense_kl(p, p.params, centre, result.sigma, other) >= result.kl - 1e-9
    assert len(WIDTHS) == len(set(WIDTHS)) == 101 and len(set(SIGMAS)) == 25


def test_draws_have_the_posteriors_covariance() -> None:
    """Mean θ and ``E‖v_i‖² = σ²‖θ_i‖²`` per group, within five standard errors of 2000 draws; inert ones stay."""
    p = problem("mlp", bias=True, seed=1)
    laws = _Laws(PacBayesBound(p.groups, normalize=False), p.params)
    drawn = P.stack(list(laws.draws(0.3, range(2000))))
    noise = P.pmap(lambda d, c: d - c, drawn, p.params)
    norms, sizes = laws.partition.norms(p.params), laws.partition.sizes(p.params)
    square = laws.partition.norms(noise).square().mean(0) / (0.3 * norms).square()
    assert bool(((square - 1).abs() <= 5 * (2 / sizes / 2000).sqrt()).all())
    for name, value in noise.items():
        if name in p.inert:
            assert not bool(value.any())
        else:
            assert bool((value.mean(0).abs() <= 5 * value.std(0) / 2000**0.5).all())


# ---------------------------------------------------------------- the bound


def test_every_term_is_counted() -> None:
    p = problem("mlp", bias=True, seed=2)
    tensors = len(list(p.params.keys())) - len(p.inert)
    for shared, widths in ((False, tensors), (True, 1)):
        for form in FORMS:
            r = measured(p, n=1000, form=form, shared=shared, confidence=0.9, widths=(0.1, 0.3, 1.0, 3.0))
            assert r.log_choices == pytest.approx(math.log(3) + widths * math.log(4))
            eta = 0.05  # half of 0.1 each
            assert r.risk == pytest.approx(kl_inverse(r.mean_risk, math.log(2 / eta) / 20), abs=1e-12)
            if form == "kl":
                c = (r.kl + r.log_choices + math.log(2 * math.sqrt(1000) / eta)) / 1000
                assert r.bound == pytest.approx(kl_inverse(r.risk, c), abs=1e-12)
            else:
                c = (r.kl + r.log_choices + math.log(2 * 1000 / eta)) / (2 * 999)
                assert r.bound == pytest.approx(r.risk + math.sqrt(c), abs=1e-12)
            assert r.complexity == pytest.approx(c) and r.form == form and r.n == 1000 and r.draws == 20
            assert r.bound >= r.risk >= r.mean_risk and r.is_vacuous == (r.bound >= 1)


def test_the_risk_is_the_mean_over_fresh_draws() -> None:
    """By evaluating every draw: the pilot's draws choose σ and are not used again."""
    p = problem("mlp", seed=5)
    result = measured(p, normalize=False, seed=9)
    seeds = P.random_seeds(seeded(9), 22)
    laws = _Laws(PacBayesBound(p.groups, normalize=False), p.params)

    def errors(sigma: float, some: list[int]) -> list[float]:
        return [float(judged(p)(point)) for point in laws.draws(sigma, some)]

    assert result.mean_risk == pytest.approx(np.mean(errors(result.sigma, seeds[2:])), abs=1e-12)
    assert result.centre_risk == pytest.approx(float(judged(p)(p.params)))
    form = FORMS["mcallester"]
    trials = {
        s: form.bound(float(np.mean(errors(s, seeds[:2]))),
                      form.complexity(laws.kl(s)[0] + result.log_choices, result.n, 0.025))
        for s in QUICK["sigmas"]
    }
    assert result.sigma == min(trials, key=lambda s: trials[s])


@given(st.integers(0, 300), st.sampled_from(["mlp", "conv"]), st.booleans())
def test_equal_networks_have_equal_bounds(seed: int, kind: str, with_prior: bool) -> None:
    """Under ``T_a`` of network and prior, with the same seed."""
    p = problem(kind, bias=True, seed=seed)
    prior = problem(kind, bias=True, seed=seed + 1).params if with_prior else None
    factors = [p.groups.random_factors(p.params, seeded(seed + k), 0.01, 100.0) for k in range(2)]
    for options in ({}, {"form": "kl", "shared": True}):
        one = measured(p, prior=prior, **options)
        other = measured(p, p.groups.rescale(p.params, factors[0]),
                         prior=None if prior is None else p.groups.rescale(prior, factors[1]), **options)
        assert other.sigma == one.sigma and other.widths == one.widths
        for name in ("bound", "risk", "kl", "complexity", "centre_risk"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-10), name
    assert one.centre_risk == pytest.approx(float(judged(p)(p.params)), abs=1e-12)  # an equal network
    plain = [measured(p, q, normalize=False).kl for q in (p.params, p.groups.rescale(p.params, factors[0]))]
    assert abs(plain[1] / plain[0] - 1) > 1e-6


def test_groups_found_by_behaviour_make_it_invariant() -> None:
    """Joint groups too: a normalizer's weight and bias in front of ReLU and another normalizer."""
    torch.manual_seed(0)
    hidden = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    net = nn.Sequential(*hidden, nn.Linear(8, 3)).double()
    with torch.no_grad():
        net[1].bias.normal_()
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
    groups = scale_groups(net, x)
    assert "joint" in groups.invariant.values() and "inert" in groups.invariant.values()
    objective = Objective(net, zero_one, (x, y))
    theta = P.parameters(net)
    with exact_norms(net):
        bounds = [
            PacBayesBound(groups, **QUICK).bound(objective, q, seeded())
            for q in (theta, groups.rescale(theta, groups.random_factors(theta, seeded(4))))
        ]
    assert bounds[1].bound == pytest.approx(bounds[0].bound, rel=1e-10)
    assert "1.weight+1.bias" in bounds[0].widths and "0.bias" not in bounds[0].widths


def test_more_examples_and_less_confidence_make_it_smaller() -> None:
    p = problem("mlp", seed=0)
    for form in FORMS:
        by_n = [measured(p, n=n, form=form, sigmas=(0.2,)).bound for n in (8, 30, 100, 1000, 10**5, 10**8)]
        assert by_n == sorted(by_n, reverse=True) and by_n[-1] < by_n[0]
        assert by_n[-1] - measured(p, n=10**8, form=form, sigmas=(0.2,)).risk < 1e-3
        confident = [measured(p, n=500, form=form, sigmas=(0.2,), confidence=c).bound for c in (0.5, 0.9, 0.99, 0.999)]
        assert confident == sorted(confident)


def test_a_prior_at_the_network_itself_costs_next_to_nothing() -> None:
    """KL → the noise's own part as the prior's centre moves to θ."""
    p = problem("mlp", seed=4)
    kls = [
        measured(p, prior=P.pmap(lambda v, f=f: f * v, p.params), normalize=False, sigmas=(0.1,)).kl
        for f in (0.0, 0.5, 0.9, 1.0)
    ]
    assert kls == sorted(kls, reverse=True)


def linear(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w > 0).to(w.dtype)


def test_the_bound_covers() -> None:
    """A linear classifier of Gaussian data with 10% wrong labels, trained on what it is measured on; 60 data sets.

    ``E_Q L_D = 0.1 + 0.8·E angle/π`` by 4000 draws. Each form may fail in 5% of the data sets, up to a chance of 1e-4.
    """
    bounds: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for seed in range(60):
        g = seeded(seed)
        x = torch.randn(400, 4, generator=g, dtype=torch.float64)
        y = (x[:, 0] > 0).double()
        y = torch.where(torch.rand(400, generator=g) < 0.1, 1 - y, y)
        theta = P.make({"w": torch.linalg.lstsq(x, y - 0.5).solution})
        for form in FORMS:
            result = pac_bayes_bound(
                lambda q, x=x, y=y: (linear(q["w"], x) != y).double().mean(), theta, ScaleGroups({"w": "tensor"}),
                n=400, form=form, generator=g, draws=200,
            )
            w = theta["w"] / theta["w"].norm()
            w = w + result.sigma / 2 * torch.randn(4000, 4, generator=g, dtype=torch.float64)
            angle = torch.acos((w[:, 0] / w.norm(dim=1)).clamp(-1, 1))
            bounds[form].append((result.bound, float(0.1 + 0.8 * angle.mean() / math.pi)))
    for pairs in bounds.values():
        assert sum(bound < truth for bound, truth in pairs) <= stats.binom(60, 0.05).ppf(1 - 1e-4)
        assert all(0.1 < bound < 0.6 for bound, _ in pairs)  # neither below the noise nor vacuous


# ---------------------------------------------------------------- inert and zero groups


def test_inert_parameters_have_no_part() -> None:
    p = problem("mlp", bias=True, seed=6)
    inert = P.make({k: v * 1e6 + 5 if k in p.inert else v for k, v in p.params.items()})
    assert measured(p, inert) == measured(p)
    everything = ScaleGroups(dict.fromkeys(p.params.keys(), "inert"))
    result = measured(p, groups=everything)
    assert result.kl == 0 and result.widths == {} and result.mean_risk == result.centre_risk


def test_groups_of_norm_zero_get_the_smallest_width() -> None:
    """A bias and a filter of zeros: KL finite, its draws of that standard deviation, and still invariant."""
    p = problem("mlp", seed=7)
    params = P.make({k: v.clone() for k, v in p.params.items()})
    params["6.bias"].zero_()
    params["0.weight"][1].zero_()
    result = measured(p, params, widths=(0.01, 0.1, 1.0))
    assert math.isfinite(result.kl) and result.widths["6.bias"] == 0.01
    laws = _Laws(PacBayesBound(p.groups, widths=(0.01, 0.1, 1.0)), params)
    drawn = P.stack(list(laws.draws(0.5, range(300))))
    zero = torch.cat([drawn["6.bias"].flatten(), drawn["0.weight"][:, 1].flatten()])
    assert float(zero.std()) == pytest.approx(0.01, rel=0.15)
    other = measured(p, p.groups.rescale(params, p.groups.random_factors(params, seeded(3))), widths=(0.01, 0.1, 1.0))
    assert other.bound == pytest.approx(result.bound, rel=1e-10)


# ---------------------------------------------------------------- as a measure


def test_it_is_a_measure() -> None:
    """Under the error rate, whatever the objective's criterion; half width 0, the bound as upper bound."""
    p = problem("mlp", seed=8)
    told: list[Estimate] = []
    measure = pac_bayes(p.groups, draws=70, pilot=1)
    estimate = measure(p.objective(), p.params, seeded(), Sampling(target=0.1, on_estimate=told.append))
    result = measure.bound(judged(p), p.params, seeded())
    assert estimate.value == estimate.upper == result.bound and estimate.half_width == 0
    assert estimate.draws == result.draws == 70 and estimate.converged and estimate.examples == result.n == 12
    assert estimate.evaluations == {"gradients": 0, "losses": measure.cost(), "products": 0}
    assert [e.draws for e in told] == [32, 64, 70] and told[-1] == estimate
    assert measure(p.objective(), p.params).value == measure(p.objective(), p.params, seeded()).value
    assert measure(p.objective("vmap"), p.params).value == pytest.approx(measure(p.objective(), p.params).value)
    assert measure(p.objective(), p.params).converged is None
    single = measure(p.objective(), P.pmap(Tensor.float, p.params))
    assert single.precision == "float32" and single.value == pytest.approx(estimate.value, rel=0.2)


def test_batches_as_examples() -> None:
    p = problem("mlp", seed=8, examples=48)
    batches = [(p.x[i : i + 4], p.y[i : i + 4]) for i in range(0, 48, 4)]
    objective = Objective(p.module, zero_one, batches)
    assert PacBayesBound(p.groups, **QUICK).bound(objective, p.params).n == 48
    by_batch = PacBayesBound(p.groups, unit="batch", **QUICK).bound(objective, p.params)
    assert by_batch.n == 12
    uneven = Objective(p.module, zero_one, [*batches, (p.x[:3], p.y[:3])])
    for data, word in ((uneven, "one size"), (Objective(p.module, zero_one, (p.x, p.y)), "1 batch")):
        with pytest.raises(InputError) as caught:
            PacBayesBound(p.groups, unit="batch", **QUICK).bound(data, p.params)
        assert word in one_line(caught.value)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("options", "word"), [
    ({"sigmas": ()}, "sigmas"), ({"sigmas": (0.1, -1.0)}, "sigmas"), ({"widths": (0.0,)}, "widths"),
    ({"widths": 3.0}, "widths"), ({"sigmas": "0.1"}, "sigmas"), ({"widths": (math.inf,)}, "widths"),
    ({"confidence": 1.0}, "confidence"), ({"confidence": 0.0}, "confidence"), ({"confidence": "high"}, "confidence"),
    ({"draws": 0}, "draws"), ({"pilot": 0}, "pilot"), ({"form": "kll"}, "did you mean 'kl'"),
    ({"unit": "epoch"}, "unit"),
    ({"n": 1}, "n=1"), ({"n": 7, "form": "kl"}, "n=7"), ({"n": 2.5}, "n=2.5"), ({"shared": 1}, "shared"),
    ({"normalize": "no"}, "normalize"),
])
def test_bad_options_are_told_in_one_line(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as caught:
        PacBayesBound(ScaleGroups(), **options)
    assert word in one_line(caught.value)


def test_what_cannot_be_bounded_is_told_in_one_line() -> None:
    p = problem("mlp", seed=0)
    measure = PacBayesBound(p.groups, **QUICK)
    broken = P.pmap(lambda v: torch.full_like(v, math.nan), p.params)
    small = Objective(p.module, zero_one, (p.x[:7], p.y[:7]))
    module = problem("mlp", seed=0).module
    running = Objective(module, zero_one, (p.x, p.y), statistics="running")
    cases: list[tuple[PacBayesBound, Any, Params, str]] = [
        (measure, p.objective(), p.params, "in [0, 1]"),  # cross-entropy
        (measure, lambda q: q["0.weight"].sum() * math.nan, p.params, "in [0, 1]"),
        (measure, lambda q: q["0.weight"].sum() * 0, p.params, "n=None"),
        (measure, judged(p), broken, "'0.weight'"),
        (replace(measure, form="kl"), small, p.params, "at least 8"),
        (measure, running, p.params, "normalize=False"),
        (replace(measure, prior=broken), judged(p), p.params, "prior"),
        (replace(measure, prior=P.make({"0.weight": torch.zeros(1)})), judged(p), p.params, "prior"),
    ]
    for asked, objective, params, word in cases:
        with pytest.raises(InputError) as caught:
            asked.bound(objective, params)
        assert word in one_line(caught.value)
    assert replace(measure, normalize=False).bound(running, p.params).bound > 0
    # running statistics are no obstacle to a network that has none
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    still = Objective(plain, zero_one, (p.x, p.y), statistics="running")
    assert PacBayesBound(scale_groups(plain, p.x), **QUICK).bound(still, P.parameters(plain)).n == 12
