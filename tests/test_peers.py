"""The same quantities by other libraries and by dense matrices, in float64, on networks with batch normalization.

Each peer sees the function that ours measures. PyHessian puts the network in eval mode whatever it is given, so it is
compared at running statistics. curvlinops differentiates by a forward pass over a ``vmap`` of backward passes, which is
wrong through torch's batch normalization at batch statistics (docs/traps.md): there it is given the same function
written in elementary operations. hessian-eigenthings takes the network as it is at both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import generic
from oracles import dense_hessian
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import bnsharp
from bnsharp import params as P
from bnsharp.directions import Given
from bnsharp.geometry import Elementwise, Euclidean, Geometry, GroupBall, GroupNorms, Groupwise, JointBall
from bnsharp.measures import Measure, hessian_top, hessian_trace
from bnsharp.modes import measuring
from bnsharp.profiles import Curvature
from bnsharp.reduce import Mean
from bnsharp.types import Params

DRAWS = 40
SIGMAS = 4.0
"""Two independent estimates differ by more than this many standard errors once in 16000 times."""


class Case(NamedTuple):
    net: nn.Module
    x: Tensor
    y: Tensor


class Elementary(nn.Module):
    """Batch normalization of images by sums and products alone, at the statistics of the batch."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        variance = (centred * centred).mean((0, 2, 3), keepdim=True)
        return self.weight[:, None, None] * centred / (variance + self.eps).sqrt() + self.bias[:, None, None]


def elementary(net: nn.Module) -> nn.Module:
    """The same parameters and, at batch statistics, the same function."""
    made = copy.deepcopy(net)
    for owner in list(made.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(owner, name, Elementary(child))
    return made


def residual_network() -> Case:
    """Two of torchvision's residual blocks, 8 and 12 channels wide, after forty steps of gradient descent."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 8),
        BasicBlock(8, 12, stride=2, downsample=down), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).double()
    x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x + 0.5 * torch.randn_like(x)), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Case(net, x, y)


def small_network() -> Case:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4, bias=False),
        nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3),
    )
    net = generic(net).double()
    return Case(net, torch.randn(12, 1, 4, 4, dtype=torch.float64), torch.arange(12) % 3)


@pytest.fixture(scope="module")
def case() -> Case:
    return residual_network()


def ours(case: Case, statistics: str) -> tuple[bnsharp.Objective, Params]:
    objective = bnsharp.Objective(case.net, F.cross_entropy, (case.x, case.y), statistics=statistics)
    return objective, bnsharp.parameters(case.net)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For peers that draw from the global random state in the default precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def standard_error(values: Any) -> tuple[float, float]:
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


# ---------------------------------------------------------------- λ_max and trace by each peer: value, standard error


class Peer(NamedTuple):
    """What it computes, the statistics it can be compared at, and how far its λ_max may be from its limit."""

    top: Callable[[Case], float]
    trace: Callable[[Case], tuple[float, float]]
    modes: tuple[str, ...]
    tolerance: float


def pyhessian(case: Case) -> Any:
    module = pytest.importorskip("pyhessian")
    return module.hessian(case.net, nn.CrossEntropyLoss(), data=(case.x, case.y), cuda=False)


def pyhessian_top(case: Case) -> float:
    """Its power iteration finds the largest ``|λ|``, which is λ_max here."""
    with seeded(0):
        return pyhessian(case).eigenvalues(maxIter=2000, tol=1e-12)[0][0]


def pyhessian_trace(case: Case) -> tuple[float, float]:
    """All probes: with a positive tolerance it stops as soon as its running mean moves little."""
    with seeded(0):
        probes = pyhessian(case).trace(maxIter=DRAWS, tol=0.0)
    assert len(probes) == DRAWS
    return standard_error(probes)


def curvlinops_hessian(case: Case) -> Any:
    module = pytest.importorskip("curvlinops")
    net = elementary(case.net) if case.net[1].training else case.net
    return module.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(case.x, case.y)])


def curvlinops_top(case: Case) -> float:
    operator = curvlinops_hessian(case).to_scipy()
    return float(eigsh(operator, k=1, which="LA", tol=1e-10, return_eigenvectors=False)[0])


def curvlinops_trace(case: Case) -> tuple[float, float]:
    """Ten independent estimates of its own, for the standard error that it does not give."""
    module, operator = pytest.importorskip("curvlinops"), curvlinops_hessian(case)
    with seeded(0):
        return standard_error([float(module.hutchinson_trace(operator, DRAWS // 10)) for _ in range(10)])


def eigenthings_operator(case: Case) -> Any:
    module = pytest.importorskip("hessian_eigenthings")
    loss = module.supervised_loss(nn.CrossEntropyLoss())
    return module.HessianOperator(case.net, [(case.x, case.y)], loss)


def eigenthings_top(case: Case) -> float:
    module = pytest.importorskip("hessian_eigenthings")
    found = module.lanczos(
        eigenthings_operator(case), k=1, max_iter=80, which="LA", tol=1e-8, seed=0, reorthogonalize=True
    )
    assert bool(found.converged.all())
    return float(found.eigenvalues[0])


def eigenthings_trace(case: Case) -> tuple[float, float]:
    module = pytest.importorskip("hessian_eigenthings")
    found = module.hutchinson(eigenthings_operator(case), num_samples=DRAWS, seed=0)
    return found.estimate, found.stderr


PEERS = {
    "pyhessian": Peer(pyhessian_top, pyhessian_trace, ("running",), 1e-4),
    "curvlinops": Peer(curvlinops_top, curvlinops_trace, ("running", "batch"), 1e-6),
    "hessian-eigenthings": Peer(eigenthings_top, eigenthings_trace, ("running", "batch"), 1e-6),
}
COMPARED = [(name, mode) for name, peer in PEERS.items() for mode in peer.modes]


@pytest.mark.parametrize(("name", "statistics"), COMPARED)
def test_largest_eigenvalue(case: Case, name: str, statistics: str) -> None:
    with measuring(case.net, statistics):
        theirs = PEERS[name].top(case)
    found = hessian_top(iterations=100, tolerance=1e-8)(*ours(case, statistics))
    assert found.statistics == statistics
    assert found.error <= 1e-8 * found.value
    assert found.value == pytest.approx(theirs, rel=PEERS[name].tolerance)


@pytest.mark.parametrize(("name", "statistics"), COMPARED)
def test_trace(case: Case, name: str, statistics: str) -> None:
    with measuring(case.net, statistics):
        theirs, their_error = PEERS[name].trace(case)
    found = hessian_trace(draws=DRAWS)(*ours(case, statistics), torch.Generator().manual_seed(1))
    assert 0 < found.stderr < 0.5 * abs(found.value) and 0 < their_error < 0.5 * abs(theirs)
    assert abs(found.value - theirs) <= SIGMAS * math.hypot(found.stderr, their_error)


def test_statistics_change_the_function(case: Case) -> None:
    """Why the mode has to be said: the two Hessians have little to do with one another."""
    running, batch = [hessian_top(tolerance=1e-6)(*ours(case, mode)).value for mode in ("running", "batch")]
    assert abs(running / batch - 1) > 0.1


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_quadratic_forms(case: Case, statistics: str) -> None:
    """``vᵀHv`` for the same v, to rounding: nothing is estimated."""
    objective, theta = ours(case, statistics)
    generator = torch.Generator().manual_seed(3)
    v = P.stack([P.pmap(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), theta) for _ in range(4)])
    values = Curvature()(objective, theta, v).detach()
    with measuring(case.net, statistics):
        operator, other = curvlinops_hessian(case), eigenthings_operator(case)
        for i in range(4):
            direction = P.flatten(P.pick(v, i))
            assert float(values[i]) == pytest.approx(float(direction @ (operator @ direction).detach()), rel=1e-10)
            assert float(values[i]) == pytest.approx(float(direction @ other.matvec(direction)), rel=1e-10)


# ---------------------------------------------------------------- a dense Hessian


class Dense(NamedTuple):
    """A network's objective, θ, its scale groups and its Hessian ``[d, d]``."""

    objective: bnsharp.Objective
    theta: Params
    groups: bnsharp.ScaleGroups
    hessian: Tensor


@pytest.fixture(scope="module")
def dense() -> Dense:
    case = small_network()
    objective, theta = ours(case, "batch")
    return Dense(objective, theta, bnsharp.scale_groups(case.net, case.x), dense_hessian(objective, theta))


def group_norms_by_hand(dense: Dense) -> tuple[Tensor, Tensor]:
    """``‖θ_i‖`` and ``d_i`` of the group that each coordinate is in: rows of the normalized layers, else tensors."""
    norms, sizes = [], []
    for name, value in dense.theta.items():
        parts = list(value.flatten(1)) if dense.groups.invariant.get(name) == "row" else [value.reshape(-1)]
        for part in parts:
            norms.append(torch.full((part.numel(),), float(part.norm()), dtype=torch.float64))
            sizes.append(torch.full((part.numel(),), float(part.numel()), dtype=torch.float64))
    return torch.cat(norms), torch.cat(sizes)


def scales(dense: Dense) -> dict[str, tuple[Geometry, Tensor]]:
    """Geometries with a joint ball, and the scale ``s(θ)`` of each coordinate as it should be."""
    norms, _ = group_norms_by_hand(dense)
    return {
        "one": (Euclidean(1.0), torch.ones_like(norms)),
        "constant": (Euclidean(0.3), 0.3 * torch.ones_like(norms)),
        "group norms": (Geometry(GroupNorms(GroupBall(dense.groups)), ball=JointBall()), norms),
        "magnitude": (Elementwise(1.0, 0.1), P.flatten(dense.theta).abs() + 0.1),
    }


def test_the_small_network_has_groups(dense: Dense) -> None:
    assert dense.groups.invariant == {"0.weight": "row", "4.weight": "row"}
    assert P.numel(dense.theta) == len(dense.hessian) < 150
    assert torch.allclose(dense.hessian, dense.hessian.T, atol=1e-12)


@pytest.mark.parametrize("name", ["one", "constant", "group norms", "magnitude"])
def test_largest_eigenvalue_is_that_of_the_dense_matrix(dense: Dense, name: str) -> None:
    """``max vᵀHv`` over ``v = s ⊙ u``, ``‖u‖ ≤ 1``, is λ_max of ``diag(s) H diag(s)``."""
    geometry, scale = scales(dense)[name]
    expected = float(torch.linalg.eigvalsh(scale[:, None] * dense.hessian * scale)[-1])
    found = hessian_top(geometry=geometry, iterations=120, tolerance=1e-10)(dense.objective, dense.theta)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert abs(found.value - expected) <= found.error + 1e-12 * expected
    assert found.direction is not None
    v = P.flatten(found.direction)
    assert float(v @ dense.hessian @ v) == pytest.approx(expected, rel=1e-8)
    assert float((v / scale).norm()) == pytest.approx(1.0, rel=1e-12)


def average(dense: Dense, geometry: Geometry, u: Params) -> float:
    return Measure(geometry, Given(u), Curvature(), Mean())(dense.objective, dense.theta).value


def basis(theta: Params) -> Params:
    """All unit vectors, a batch ``[d]``."""
    rows = torch.eye(P.numel(theta), dtype=torch.float64)
    return P.stack([P.unflatten(row, theta) for row in rows])


@pytest.mark.parametrize("name", ["one", "constant", "group norms", "magnitude"])
def test_trace_over_the_unit_vectors_is_exact(dense: Dense, name: str) -> None:
    """``Σ_j s_j² H_jj = d · mean_j (s ⊙ e_j)ᵀ H (s ⊙ e_j)``."""
    geometry, scale = scales(dense)[name]
    expected = float((scale**2 * dense.hessian.diag()).sum())
    found = len(scale) * average(dense, geometry, basis(dense.theta))
    assert found == pytest.approx(expected, rel=1e-8)


def test_relative_trace_over_the_unit_vectors_is_exact(dense: Dense) -> None:
    """``Σ_i ‖θ_i‖²/d_i tr H_ii``: the unit vectors of group i with weight ``1/d_i``."""
    norms, sizes = group_norms_by_hand(dense)
    expected = float((norms**2 / sizes * dense.hessian.diag()).sum())
    frame, units = Groupwise(dense.groups).at(dense.theta), basis(dense.theta)
    v = P.Lazy(len(sizes), lambda i: frame.place(P.pick(units, i)))
    each = Curvature()(dense.objective, dense.theta, v).detach()
    assert float((each / sizes).sum()) == pytest.approx(expected, rel=1e-8)


def test_trace_over_all_signs_is_exact() -> None:
    """The Rademacher law of a network of ten parameters has 1024 equally likely draws: their mean is the trace."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    x, y = torch.randn(8, 2, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    objective, theta = bnsharp.Objective(net, F.mse_loss, (x, y)), bnsharp.parameters(net)
    groups = bnsharp.scale_groups(net, x)
    hessian = dense_hessian(objective, theta)
    small = Dense(objective, theta, groups, hessian)
    norms, sizes = group_norms_by_hand(small)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(sizes))), dtype=torch.float64)
    plain = P.stack([P.unflatten(row, theta) for row in signs])
    scaled = P.stack([P.unflatten(row / sizes.sqrt(), theta) for row in signs])
    assert len(signs) == 1024 and groups.invariant == {"0.weight": "row"}
    assert average(small, Euclidean(1.0), plain) == pytest.approx(float(hessian.trace()), rel=1e-8)
    relative = float((norms**2 / sizes * hessian.diag()).sum())
    assert average(small, Groupwise(groups), scaled) == pytest.approx(relative, rel=1e-8)
    drawn = hessian_trace(geometry=Groupwise(groups), draws=200)(objective, theta, torch.Generator().manual_seed(4))
    assert abs(drawn.value - relative) <= SIGMAS * drawn.stderr
