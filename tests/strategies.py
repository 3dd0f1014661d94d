"""Hypothesis strategies: small batch-normalized networks on a batch, scale factors, exponents, segment lengths.

``problem(...)`` builds one by hand; ``problems()`` draws its arguments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import oracles
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsharp import Objective, ScaleGroups
from bnsharp import params as P
from bnsharp.modes import NEGLIGIBLE_EPS
from bnsharp.types import Params

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus, "relu": nn.ReLU}
SMOOTH = ("tanh", "softplus")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((output - target) ** 2).sum(1).mean()


@dataclass(frozen=True)
class Problem:
    """A module with a batch and a criterion, and its scale groups as known from how it was built."""

    module: nn.Module
    x: Tensor
    y: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor]
    rows: tuple[str, ...]
    inert: tuple[str, ...]

    @property
    def params(self) -> Params:
        return P.parameters(self.module)

    @property
    def groups(self) -> ScaleGroups:
        return ScaleGroups({**dict.fromkeys(self.rows, "row"), **dict.fromkeys(self.inert, "inert")})

    @property
    def index(self) -> oracles.Index:
        return oracles.index_sets(self.params, self.rows, self.inert)

    def objective(self, engine: Any = "loop") -> Objective:
        return Objective(self.module, self.criterion, (self.x, self.y), engine=engine)

    def loss(self, values: Mapping[str, Tensor]) -> Tensor:
        """The same loss without the package: normalizers without running statistics, in train mode."""
        output = torch.func.functional_call(_without_statistics(self.module), dict(values), (self.x,))
        return self.criterion(output, self.y)


_bare: dict[int, tuple[nn.Module, nn.Module]] = {}


def _without_statistics(module: nn.Module) -> nn.Module:
    if id(module) not in _bare or _bare[id(module)][0] is not module:
        bare = copy.deepcopy(module).train()
        for m in bare.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean = m.running_var = m.num_batches_tracked = None
                m.track_running_stats, m.eps = False, NEGLIGIBLE_EPS
        _bare[id(module)] = module, bare
    return _bare[id(module)][1]


def perceptron(activation: str, bias: bool, width: int = 4) -> nn.Sequential:
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Linear(3, width, bias=bias), nn.BatchNorm1d(width), act(),
        nn.Linear(width, width, bias=bias), nn.BatchNorm1d(width), act(),
        nn.Linear(width, 3),
    )


def convolutional(activation: str, bias: bool) -> nn.Sequential:
    act = ACTIVATIONS[activation]
    pool = nn.AvgPool2d if activation in SMOOTH else nn.MaxPool2d
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3), act(), pool(2),
        nn.Conv2d(3, 4, 2, bias=bias), nn.BatchNorm2d(4), act(), nn.Flatten(),
        nn.Linear(16, 3),
    )


def problem(
    kind: str = "mlp",
    activation: str = "tanh",
    bias: bool = False,
    loss: str = "cross-entropy",
    seed: int = 0,
    eps: float = NEGLIGIBLE_EPS,
    examples: int = 12,
) -> Problem:
    """A network at a generic point (every parameter random, none zero) with a batch; float64."""
    generator = torch.Generator().manual_seed(seed)
    module = (perceptron if kind == "mlp" else convolutional)(activation, bias).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan = math.prod(p.shape[1:])
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise / fan**0.5 if p.ndim > 1 else (1.0 if name.endswith("weight") else 0.0) + 0.3 * noise)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eps = eps
    shape = (examples, 3) if kind == "mlp" else (examples, 1, 6, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if loss == "cross-entropy":
        y: Tensor = torch.randint(0, 3, (examples,), generator=generator)
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    else:
        y, criterion = torch.randn((examples, 3), generator=generator, dtype=torch.float64), squared_error
    layers = ("0", "3") if kind == "mlp" else ("0", "4")
    rows = tuple(f"{k}.weight" for k in layers)
    return Problem(module, x, y, criterion, rows, tuple(f"{k}.bias" for k in layers) if bias else ())


def at_own_output(p: Problem) -> Problem:
    """The same network with squared error to its own output: loss 0, gradient 0, Hessian = Gauss–Newton."""
    with torch.no_grad():
        output = torch.func.functional_call(_without_statistics(p.module), dict(p.params.items()), (p.x,))
    return Problem(p.module, p.x, output, squared_error, p.rows, p.inert)


def trained(p: Problem, steps: int = 300, rate: float = 0.02) -> Problem:
    """The same problem near a minimum: full-batch Adam from where it stands."""
    values = {k: v.clone().requires_grad_() for k, v in p.params.items()}
    optimizer = torch.optim.Adam(list(values.values()), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        p.loss(values).backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in p.module.named_parameters():
            parameter.copy_(values[name])
    return p


def problems(activations: tuple[str, ...] = SMOOTH, **fixed: Any) -> st.SearchStrategy[Problem]:
    """Networks of both kinds, with or without an (inert) bias in front of the normalizer."""
    arguments = {
        "kind": st.sampled_from(["mlp", "conv"]),
        "activation": st.sampled_from(activations),
        "bias": st.booleans(),
        "loss": st.sampled_from(["cross-entropy", "squared"]),
        "seed": st.integers(0, 10_000),
    }
    return st.builds(problem, **{**arguments, **{k: st.just(v) for k, v in fixed.items()}})


@st.composite
def factors(draw: st.DrawFn, p: Problem, low: float = 0.05, high: float = 20.0) -> dict[str, Tensor]:
    """Scale factors, one per row of every invariant parameter, log-uniform in [low, high]."""
    logs = st.floats(math.log(low), math.log(high), allow_nan=False)
    params = p.params
    return {
        name: torch.tensor(
            [math.exp(x) for x in draw(st.lists(logs, min_size=len(params[name]), max_size=len(params[name])))],
            dtype=torch.float64,
        )
        for name in p.rows
    }


@st.composite
def scaled_problems(draw: st.DrawFn, **options: Any) -> tuple[Problem, dict[str, Tensor]]:
    """A network and scale factors for its rows."""
    p = draw(problems(**options))
    return p, draw(factors(p))


def exponents() -> st.SearchStrategy[float]:
    return st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 8.0])


def deltas(low: float = 1e-3, high: float = 0.3) -> st.SearchStrategy[float]:
    """Segment lengths, log-uniform."""
    return st.floats(math.log(low), math.log(high), allow_nan=False).map(math.exp)
