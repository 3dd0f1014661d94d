"""Trace and largest eigenvalue of the Hessian to the same achieved error: ours against PyHessian, curvlinops and
hessian-eigenthings.

For every method the smallest budget of Hessian-vector products is looked for at which the median error over ``SEEDS``
seeds is at most the case's; the methods are then timed at their budgets, interleaved. All measure the same function:
the network with running statistics, which PyHessian cannot leave. Budgets are looked for with each method's own
algorithm on our products, which are the same numbers and take less time (that they are the same is checked first), and
are computed once for all budgets of a seed. The name of an alternative holds the products that it spends.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Any

import torch
from torch import nn

import bnsharp
from benchmarks.hessians import Problem, Products, cross_entropy, lenet, perceptron
from benchmarks.paired import Case, Missing, Run, needing
from bnsharp import params as P

SEEDS = 25
GRID = (6, 9, 12, 18, 24, 36, 48, 72, 96, 144, 192, 288, 384, 576)
"""Budgets of a trace; each is divided by three (Hutch++) and by two (XTrace)."""
STEPS = tuple(range(1, 13)) + tuple(range(14, 61, 2))
"""Budgets of an eigenvalue."""
TOLERANCES = tuple(range(1, 7))
"""Budgets of ARPACK: ``10**-budget``."""
SHARE = 5
"""A reference's standard error is at most this part of the case's: it then raises a median error by 2%."""
KEPT = bnsharp.Sampling(promote=False, rounding="modelled")
"""Stay in float32 without a check against float64, as the peers do."""

Estimator = Callable[[Any, int, int], float]
"""``(operator, budget, seed) -> value``."""
Own = Callable[[int, int], float]
"""``(budget, seed) -> value``."""


@dataclass(frozen=True)
class Method:
    """One way to the number.

    Attributes:
        package: the import name that it needs.
        estimate: ``(problem, products) -> (budget, seed) -> value``, to look for its budget; None for the mean of
            independent draws, whose spread is known.
        own: ``(problem) -> (budget, seed) -> value``: as its users would call it.
        grid: the budgets to look at, rising, and what those between them are multiples of.
    """

    package: str
    estimate: Callable[[Problem, Products], Own] | None
    own: Callable[[Problem], Own]
    grid: tuple[tuple[int, ...], int] = (GRID, 6)


# ---------------------------------------------------------------- ours


class Remembering(bnsharp.Objective):
    """A problem's objective, with products that are remembered."""

    def __init__(self, problem: Problem, products: Products):
        super().__init__(problem.module, cross_entropy, problem.batch, statistics="running")
        self.products = products

    def hessian(self, params: P.Params) -> Any:
        super().hessian(params)  # the batch has then been seen
        return self.products


def our_trace(share: int, objective: bnsharp.Objective) -> Own:
    """One product in ``share`` for the sharpest directions, the others for draws."""
    theta = bnsharp.parameters(objective.module)

    def run(budget: int, seed: int) -> float:
        sampling = bnsharp.Sampling(promote=False, rounding="modelled", deflate=budget // share)
        measure = bnsharp.measures.hessian_trace(draws=budget - budget // share)
        return measure(objective, theta, torch.Generator().manual_seed(seed), sampling).value

    return run


def our_top(objective: bnsharp.Objective) -> Own:
    """Lanczos from the gradient and a random direction, ended after as many products."""
    theta = bnsharp.parameters(objective.module)

    def run(budget: int, seed: int) -> float:
        measure = bnsharp.measures.hessian_top(iterations=budget, tolerance=1e-9, certify=0)
        return measure(objective, theta, torch.Generator().manual_seed(seed), KEPT).value

    return run


def ours(run: Callable[[bnsharp.Objective], Own], grid: tuple[tuple[int, ...], int]) -> Method:
    return Method("bnsharp", lambda problem, products: run(Remembering(problem, products)),
                  lambda problem: run(problem.objective()), grid)


# ---------------------------------------------------------------- the peers' algorithms


def seeded(estimate: Callable[[Any, int], Any], operator: Any, budget: int, seed: int) -> float:
    """For algorithms that draw from the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float(estimate(operator, budget))


def xtrace(operator: Any, budget: int) -> Any:
    from curvlinops.trace.epperly2024xtrace import xtrace

    return xtrace(operator, budget // 2 * 2)


def eigenthings_hutchpp(operator: Any, budget: int, seed: int) -> float:
    from hessian_eigenthings.algorithms.trace import trace

    return trace(operator, num_matvecs=budget, method="hutch++", seed=seed).estimate


def eigenthings_top(operator: Any, budget: int, seed: int) -> float:
    from hessian_eigenthings.algorithms.lanczos import lanczos

    return float(lanczos(operator, k=1, max_iter=budget, which="LA", seed=seed, reorthogonalize=True).eigenvalues[0])


def arpack(operator: Any, tolerance: float, seed: int) -> float:
    """SciPy's eigsh on curvlinops's operator, as its documentation shows."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    d, generator = operator.shape[0], np.random.default_rng(seed)
    linear = LinearOperator((d, d), lambda v: (operator @ torch.from_numpy(v.ravel()).float()).numpy(), dtype="float32")
    start = generator.standard_normal(d).astype("float32")
    return float(eigsh(linear, k=1, which="LA", tol=tolerance, ncv=6, v0=start, return_eigenvectors=False)[0])


def arpack_by_place(operator: Any, budget: int, seed: int) -> float:
    """Budgets are tolerances here, from loose to tight: 1e-1, 1e-2, …"""
    return arpack(operator, 10.0**-budget, seed)


def power(operator: Any, budget: int, seed: int) -> float:
    """PyHessian's power iteration: the last Rayleigh quotient."""
    v, value = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(seed)), math.nan
    for _ in range(budget):
        v = v / v.norm()
        w = operator @ v
        value, v = float(v @ w), w
    return value


# ---------------------------------------------------------------- the peers as their users call them


def curvlinops_own(estimate: Estimator, problem: Problem) -> Own:
    import curvlinops

    module = problem.module
    operator = curvlinops.HessianLinearOperator(
        module, nn.CrossEntropyLoss(), list(module.parameters()), [problem.batch], check_deterministic=False
    )
    return partial(estimate, operator)


def eigenthings_own(estimate: Estimator, problem: Problem) -> Own:
    import hessian_eigenthings

    loss = hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss())
    return partial(estimate, hessian_eigenthings.HessianOperator(problem.module, [problem.batch], loss))


def pyhessian_own(kind: str, problem: Problem) -> Own:
    """``trace`` or ``eigenvalues``; the graph of the gradient is built in every run, as in ours."""
    import pyhessian

    module = copy.deepcopy(problem.module)

    def run(budget: int, seed: int) -> float:
        module.zero_grad(set_to_none=True)
        made = pyhessian.hessian(module, nn.CrossEntropyLoss(), data=problem.batch, cuda=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "trace":
                return statistics.fmean(made.trace(maxIter=budget, tol=0.0))
            return float(made.eigenvalues(maxIter=budget, tol=0.0)[0][0])

    return run


def peer(package: str, estimate: Estimator, own: Callable[[Problem], Own], *grid: Any) -> Method:
    """A method whose algorithm takes any operator."""
    return Method(package, lambda problem, products: partial(estimate, products), own, *grid)


XTRACE, EIGSH = partial(seeded, xtrace), arpack_by_place
PEERS: dict[str, Method] = {
    "PyHessian, Hutchinson": Method("pyhessian", None, partial(pyhessian_own, "trace")),
    "curvlinops, XTrace": peer("curvlinops", XTRACE, partial(curvlinops_own, XTRACE)),
    "hessian-eigenthings, Hutch++": peer(
        "hessian_eigenthings", eigenthings_hutchpp, partial(eigenthings_own, eigenthings_hutchpp)
    ),
}
TOPS: dict[str, Method] = {
    "ours": ours(our_top, (STEPS, 1)),
    "hessian-eigenthings, Lanczos": peer(
        "hessian_eigenthings", eigenthings_top, partial(eigenthings_own, eigenthings_top), (STEPS, 1)
    ),
    "PyHessian, power iteration": peer("pyhessian", power, partial(pyhessian_own, "eigenvalues"), (STEPS, 1)),
    "curvlinops, eigsh": peer("curvlinops", EIGSH, partial(curvlinops_own, EIGSH), (TOLERANCES, 1)),
}


# ---------------------------------------------------------------- budgets


def smallest(passes: Callable[[int], bool], grid: tuple[int, ...], step: int) -> int | None:
    """The smallest budget that passes: on the grid, then halfway down to the one before it, twice.

    From below, since larger budgets extend smaller ones: nothing is computed beyond the budget that is found.
    """
    low = 0
    for high in grid:
        if passes(high):
            for _ in range(2):
                middle = (low + high) // 2 // step * step
                if middle <= max(low, step):
                    break
                low, high = (low, middle) if passes(middle) else (middle, high)
            return high
        low = high
    return None


class Trials:
    """A method's values by budget and seed; what a seed has computed serves all budgets and all cases."""

    def __init__(self, method: Method, problem: Problem):
        assert method.estimate is not None
        make, self.grid = problem.products(), method.grid
        self.products = [make() for _ in range(SEEDS)]
        self.runs = [method.estimate(problem, products) for products in self.products]

    def passes(self, budget: int, exact: float, error: float) -> bool:
        """Whether the median relative error over seeds is at most ``error``."""
        errors: list[float] = []
        for seed, run in enumerate(self.runs):
            errors.append(abs(run(budget, seed) / exact - 1))
            good = sum(e <= error for e in errors)
            if max(good, len(errors) - good) > SEEDS // 2:  # the median's side is known
                return good > SEEDS // 2
        return statistics.median(errors) <= error

    def smallest(self, exact: float, error: float) -> int | None:
        """The smallest budget that passes; None where the grid has none."""
        return smallest(lambda budget: self.passes(budget, exact, error), *self.grid)

    def spent(self, budget: int) -> int:
        """Products at a budget, which may be a tolerance or no multiple of what the method needs."""
        before = self.products[0].asked
        self.runs[0](budget, 0)
        return self.products[0].asked - before


@lru_cache(maxsize=len(PEERS) + 1)
def trials(method: Method, problem: Problem) -> Trials:
    """Kept for the cases of one problem that follow each other, not for all."""
    return Trials(method, problem)


def independent_draws(problem: Problem, error: float) -> int:
    """How many draws have a median error of ``error``: ``(0.6745 σ/error)²``."""
    return max(1, math.ceil((0.6745 * problem.spread / error) ** 2))


def check_same(name: str, own: Own, problem: Problem) -> None:
    """Raise unless the method's own operator gives our products."""
    if not isinstance(own, partial):
        return
    products, theirs = problem.products()(), own.args[-1]
    v = torch.randn(products.size, generator=torch.Generator().manual_seed(0))
    found = theirs.matvec(v) if hasattr(theirs, "matvec") else theirs @ v
    expected = products.matvec(v)
    if float((expected - found).norm()) > 1e-3 * float(expected.norm()):
        raise AssertionError(f"{name} measures another function: its products differ from ours")


def alternatives(
    methods: Mapping[str, Method], make: Callable[[], Problem], what: str, error: float
) -> Mapping[str, Run | Missing]:
    """Every method at its budget; each run takes another seed.

    Raises:
        ArithmeticError: a reference that is too coarse for the case.
    """
    problem = make()
    if what == "trace" and problem.error > error / SHARE * problem.trace:
        raise ArithmeticError(f"the reference trace has a standard error of {problem.error / problem.trace:.2%}; "
                              f"expected at most a {SHARE}th of {error:.0%}: take more draws for it")
    made: dict[str, Run | Missing] = {}
    for name, method in methods.items():
        found = needing(method.package, lambda: lambda: None)
        if isinstance(found, Missing):
            made[name] = found
            continue
        run, seeds, budget = method.own(problem), count(), None
        check_same(name, run, problem)
        if method.estimate is None:
            budget = spent = independent_draws(problem, error)
        else:
            tried = trials(method, problem)
            budget = tried.smallest(getattr(problem, what), error)
            if budget is None:  # out of the grid: no contender
                continue
            spent = tried.spent(budget)
        made[f"{name}: {spent} products"] = lambda run=run, budget=budget, seeds=seeds: run(budget, next(seeds))
    return made


def traces(share: int) -> dict[str, Method]:
    """The methods for a trace, ours with one product in ``share`` for directions."""
    return {"ours": ours(partial(our_trace, share), (GRID, 3)), **PEERS}


def trace_case(name: str, make: Callable[[], Problem], share: int, error: float) -> Case:
    """The more accurate, the more directions pay."""
    return case(name, traces(share), make, "trace", error)


def case(name: str, methods: Mapping[str, Method], make: Callable[[], Problem], what: str, error: float) -> Case:
    return Case(
        f"{name}, to an error of {error:g}, against the fastest", partial(alternatives, methods, make, what, error),
        0.7, 21, best=True, memory=False, note="fewer and, with convolutions, cheaper products",
    )


CASES = (
    trace_case("trace, BN perceptron", perceptron, 2, 0.01),
    trace_case("trace, BN perceptron", perceptron, 4, 0.05),
    case("largest eigenvalue, BN perceptron", TOPS, perceptron, "top", 1e-3),
    case("largest eigenvalue, BN perceptron", TOPS, perceptron, "top", 1e-6),
    trace_case("trace, LeNet-BN, batch 128", lenet, 4, 0.05),
    case("largest eigenvalue, LeNet-BN, batch 128", TOPS, lenet, "top", 1e-3),
    case("largest eigenvalue, LeNet-BN, batch 128", TOPS, lenet, "top", 1e-6),
)
