"""Trace and largest eigenvalue of the Hessian to the same achieved error: ours against PyHessian, curvlinops and
hessian-eigenthings.

For every method the smallest budget of Hessian-vector products is looked for at which the median error over ``SEEDS``
seeds is at most the case's; the methods are then timed at their budgets, interleaved. All measure the same function:
the network with running statistics, which PyHessian cannot leave. Budgets are looked for with the peers' own algorithms
on our products, which are the same numbers and take less time; that they are the same is checked first. The name of an
alternative holds the products that it spends.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

import bnsharp
from benchmarks.paired import Case, Missing, Run, needing
from bnsharp import params as P
from bnsharp.data import load
from bnsharp.models import build

SEEDS = 10
GRID = (6, 9, 12, 18, 24, 36, 48, 72, 96, 144, 192, 288, 384, 576)
"""Budgets of a trace; each is divided by three (Hutch++) and by two (XTrace)."""
STEPS = tuple(range(1, 13)) + tuple(range(14, 61, 2))
"""Budgets of an eigenvalue."""
PILOT = 200
"""Draws from which the spread of independent ones is taken."""
KEPT = bnsharp.Sampling(promote=False, rounding="modelled")
"""Stay in float32 without a check against float64, as the peers do."""
cross_entropy = nn.functional.cross_entropy


class Products:
    """Our Hessian as the peers' algorithms take an operator: on vectors ``[d]`` or columns ``[d, n]``, counted."""

    def __init__(self, objective: bnsharp.Objective, theta: P.Params):
        self.theta, self.hessian, self.spent = theta, objective.hessian(theta), 0
        self.size, self.dtype, self.device = P.numel(theta), P.first(theta).dtype, P.first(theta).device
        self.shape = (self.size, self.size)

    def matvec(self, v: Tensor) -> Tensor:
        self.spent += 1
        return P.flatten(self.hessian(P.unflatten(v, self.theta)))

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.matvec(x) if x.ndim == 1 else torch.stack([self.matvec(column) for column in x.T], 1)


@dataclass(frozen=True)
class Problem:
    """A trained network on one batch, its Hessian's trace and largest eigenvalue (references by many products)."""

    module: nn.Module
    batch: tuple[Tensor, Tensor]
    trace: float
    top: float

    def objective(self) -> bnsharp.Objective:
        return bnsharp.Objective(self.module, cross_entropy, self.batch, statistics="running")


Estimator = Callable[[Products, int, int], float]
"""``(operator, budget, seed) -> value``."""


@dataclass(frozen=True)
class Method:
    """One way to the number.

    Attributes:
        package: the import name that it needs.
        estimate: on our products, to look for its budget; None for the mean of independent draws.
        own: ``(problem) -> (budget, seed) -> value``: as its users would call it.
    """

    package: str
    estimate: Estimator | None
    own: Callable[[Problem], Callable[[int, int], float]]


# ---------------------------------------------------------------- ours


def our_trace(problem: Problem) -> Callable[[int, int], float]:
    """Half of the products for the sharpest directions, half for draws."""
    objective, theta = problem.objective(), bnsharp.parameters(problem.module)

    def run(budget: int, seed: int) -> float:
        sampling = bnsharp.Sampling(promote=False, rounding="modelled", deflate=budget // 2)
        measure = bnsharp.measures.hessian_trace(draws=budget - budget // 2)
        return measure(objective, theta, torch.Generator().manual_seed(seed), sampling).value

    return run


def our_top(problem: Problem) -> Callable[[int, int], float]:
    """Lanczos from the gradient and a random direction, ended after as many products."""
    objective, theta = problem.objective(), bnsharp.parameters(problem.module)

    def run(budget: int, seed: int) -> float:
        measure = bnsharp.measures.hessian_top(iterations=budget, tolerance=1e-9, certify=0)
        return measure(objective, theta, torch.Generator().manual_seed(seed), KEPT).value

    return run


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


def curvlinops_own(estimate: Callable[[Any, int, int], float], problem: Problem) -> Callable[[int, int], float]:
    import curvlinops

    module = problem.module
    operator = curvlinops.HessianLinearOperator(
        module, nn.CrossEntropyLoss(), list(module.parameters()), [problem.batch], check_deterministic=False
    )
    return partial(estimate, operator)


def eigenthings_own(estimate: Callable[[Any, int, int], float], problem: Problem) -> Callable[[int, int], float]:
    import hessian_eigenthings

    loss = hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss())
    return partial(estimate, hessian_eigenthings.HessianOperator(problem.module, [problem.batch], loss))


def pyhessian_own(kind: str, problem: Problem) -> Callable[[int, int], float]:
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


def exact(made: Callable[[Any, int], Any]) -> Estimator:
    return partial(seeded, made)


TRACES: dict[str, Method] = {
    "ours": Method("bnsharp", None, our_trace),
    "PyHessian, Hutchinson": Method("pyhessian", None, partial(pyhessian_own, "trace")),
    "curvlinops, XTrace": Method("curvlinops", exact(xtrace), partial(curvlinops_own, exact(xtrace))),
    "hessian-eigenthings, Hutch++": Method(
        "hessian_eigenthings", eigenthings_hutchpp, partial(eigenthings_own, eigenthings_hutchpp)
    ),
}
TOPS: dict[str, Method] = {
    "ours": Method("bnsharp", None, our_top),
    "hessian-eigenthings, Lanczos": Method(
        "hessian_eigenthings", eigenthings_top, partial(eigenthings_own, eigenthings_top)
    ),
    "PyHessian, power iteration": Method("pyhessian", power, partial(pyhessian_own, "eigenvalues")),
    "curvlinops, eigsh": Method("curvlinops", arpack_by_place, partial(curvlinops_own, arpack_by_place)),
}


# ---------------------------------------------------------------- problems


def trained(module: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Plain SGD on batches of 64, in eval mode afterwards."""
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randperm(len(y), generator=generator)[:64]
        optimizer.zero_grad()
        cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return module.eval()


def with_references(module: nn.Module, batch: tuple[Tensor, Tensor], rank: int, draws: int) -> Problem:
    """The trace by ``rank + draws`` products, λ_max by Lanczos until its residual is 1e-5 of it."""
    bare = Problem(module, batch, math.nan, math.nan)
    objective, theta = bare.objective(), bnsharp.parameters(module)
    sampling = bnsharp.Sampling(promote=False, rounding="modelled", deflate=rank)
    generator = torch.Generator().manual_seed(12345)
    trace = bnsharp.measures.hessian_trace(draws=draws)(objective, theta, generator, sampling).value
    top = bnsharp.measures.hessian_top(iterations=100, tolerance=1e-5, certify=0)(objective, theta, generator, KEPT)
    return Problem(module, batch, trace, top.value)


@cache
def perceptron() -> Problem:
    """The BN perceptron on the digits' 800 training images, after 260 steps."""
    data = load("digits", seed=0)
    x, y = data.train_set()
    module = trained(build("bn-mlp", data.input_shape, len(data.classes), seed=0), x, y, 260)
    return with_references(module, (x, y), 200, 800)


@cache
def lenet() -> Problem:
    """LeNet-BN on 512 noisy images of ten patterns, after 60 steps."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (512,), generator=generator)
    patterns = 3 * nn.functional.avg_pool2d(torch.randn(10, 3, 32, 32, generator=generator), 5, 1, 2)
    x = patterns[y] + torch.randn(512, 3, 32, 32, generator=generator)
    return with_references(trained(build("lenet-bn", (3, 32, 32), 10, seed=0), x, y, 60), (x, y), 60, 250)


# ---------------------------------------------------------------- budgets


def smallest(passes: Callable[[int], bool], grid: tuple[int, ...], step: int) -> int | None:
    """The smallest budget that passes: on the grid, then halfway down to the one before it, twice."""
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


def budget_of(method: Method, problem: Problem, exact_value: float, error: float, grid: tuple[int, ...]) -> int | None:
    """The smallest budget with a median relative error of at most ``error``; None where the grid has none."""
    run: Callable[[int, int], float]
    if method.estimate is None:
        run = method.own(problem)
    else:
        run = partial(method.estimate, Products(problem.objective(), bnsharp.parameters(problem.module)))

    def passes(budget: int) -> bool:
        errors: list[float] = []
        for seed in range(SEEDS):
            errors.append(abs(run(budget, seed) / exact_value - 1))
            good = sum(e <= error for e in errors)
            if max(good, len(errors) - good) > SEEDS // 2:  # the median's side is known
                return good > SEEDS // 2
        return statistics.median(errors) <= error

    return smallest(passes, grid, 1 if grid is STEPS else 6)


def independent_draws(problem: Problem, error: float) -> int:
    """How many draws have a median error of ``error``: ``(0.6745 σ/error)²``, σ from ``PILOT`` draws."""
    measure = bnsharp.measures.hessian_trace(draws=PILOT)
    objective, theta = problem.objective(), bnsharp.parameters(problem.module)
    found = measure(objective, theta, torch.Generator().manual_seed(1), KEPT)
    sigma = found.stderr * math.sqrt(PILOT) / abs(problem.trace)
    return max(1, math.ceil((0.6745 * sigma / error) ** 2))


def check_same(name: str, method: Method, problem: Problem) -> None:
    """Raise unless the method's own operator gives our products."""
    operator = method.own(problem)
    if not isinstance(operator, partial):
        return
    v = torch.randn(P.numel(bnsharp.parameters(problem.module)), generator=torch.Generator().manual_seed(0))
    theirs = operator.args[-1]
    theirs = theirs.matvec(v) if hasattr(theirs, "matvec") else theirs @ v
    ours = Products(problem.objective(), bnsharp.parameters(problem.module)).matvec(v)
    if float((ours - theirs).norm()) > 1e-3 * float(ours.norm()):
        raise AssertionError(f"{name} measures another function: its products differ from ours")


def spent_by(method: Method, problem: Problem, budget: int) -> int:
    """Products at a budget: the budget itself unless it is a tolerance."""
    if method.estimate is not arpack_by_place:
        return budget
    products = Products(problem.objective(), bnsharp.parameters(problem.module))
    arpack_by_place(products, budget, 0)
    return products.spent


def alternatives(
    methods: Mapping[str, Method], make: Callable[[], Problem], what: str, error: float
) -> Mapping[str, Run | Missing]:
    """Every method at its budget; each run takes another seed."""
    problem = make()
    exact_value = getattr(problem, what)
    made: dict[str, Run | Missing] = {}
    for name, method in methods.items():
        found = needing(method.package, lambda: lambda: None)
        if isinstance(found, Missing):
            made[name] = found
            continue
        check_same(name, method, problem)
        if name.endswith("Hutchinson"):
            budget: int | None = independent_draws(problem, error)
        else:
            grid = tuple(range(1, 7)) if method.estimate is arpack_by_place else STEPS if what == "top" else GRID
            budget = budget_of(method, problem, exact_value, error, grid)
        if budget is None:  # out of the grid: no contender
            continue
        run, seeds = method.own(problem), count()
        spent = spent_by(method, problem, budget)
        made[f"{name}: {spent} products"] = lambda run=run, budget=budget, seeds=seeds: run(budget, next(seeds))
    return made


def case(name: str, methods: Mapping[str, Method], make: Callable[[], Problem], what: str, error: float) -> Case:
    return Case(
        f"{name}, to an error of {error:g}, against the fastest", partial(alternatives, methods, make, what, error),
        0.7, 5, best=True, memory=False, note="fewer and, with convolutions, cheaper products",
    )


CASES = (
    case("trace, BN perceptron", TRACES, perceptron, "trace", 0.01),
    case("trace, BN perceptron", TRACES, perceptron, "trace", 0.05),
    case("trace, LeNet-BN, batch 512", TRACES, lenet, "trace", 0.05),
    case("largest eigenvalue, BN perceptron", TOPS, perceptron, "top", 1e-3),
    case("largest eigenvalue, BN perceptron", TOPS, perceptron, "top", 1e-6),
    case("largest eigenvalue, LeNet-BN, batch 512", TOPS, lenet, "top", 1e-3),
    case("largest eigenvalue, LeNet-BN, batch 512", TOPS, lenet, "top", 1e-6),
)
