"""Steps of published optimizers: 20 steps of one batch-normalized network, ours against theirs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from strategies import Problem, problem

import bnsharp
from bnsharp import regularizers as R

theirs = pytest.importorskip("pytorch_optimizer", reason="the extra 'peers' is not installed")

CASES: dict[str, tuple[Any, float, str, dict[str, Any]]] = {
    "SAM": (R.sam(rho=0.1), 1.0, "SAM", {"rho": 0.1}),
    "ASAM": (R.asam(rho=0.5, eta=0.0), 1.0, "SAM", {"rho": 0.5, "adaptive": True}),
    "WSAM": (R.sam(rho=0.1), R.wsam_weight(0.8), "WSAM", {"rho": 0.1, "gamma": 0.8, "decouple": False}),
    "FriendlySAM": (
        R.friendly_sam(rho=0.1, sigma=0.8, decay=0.9), 1.0, "FriendlySAM", {"rho": 0.1, "sigma": 0.8, "lmbda": 0.9}
    ),
}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def loss(p: Problem, module: torch.nn.Module) -> torch.Tensor:
    return p.criterion(module(p.x), p.y)


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_twenty_steps(case: str, kind: str) -> None:
    regularizer, weight, name, options = CASES[case]
    p = problem(kind, "relu", eps=1e-5, seed=1)
    ours, other = copy.deepcopy(p.module), copy.deepcopy(p.module)
    sgd, state = torch.optim.SGD(ours.parameters(), **SGD), None
    build = getattr(theirs, name)
    first = (other,) if "model" in inspect.signature(build).parameters else ()
    peer = build(*first, other.parameters(), torch.optim.SGD, **options, **SGD)
    for _ in range(20):
        sgd.zero_grad()
        state = bnsharp.backward(ours, p.criterion, (p.x, p.y), regularizer, weight, state=state).state
        sgd.step()
        peer.zero_grad()
        loss(p, other).backward()
        peer.first_step(zero_grad=True)
        loss(p, other).backward()
        peer.second_step(zero_grad=True)
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert max(float((a - b).abs().max()) for a, b in zip(ours.parameters(), p.module.parameters(), strict=True)) > 0.1
