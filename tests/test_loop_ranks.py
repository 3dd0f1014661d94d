"""``bnsharp.backward`` in several processes."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cross_entropy, examples
from stepping import BreaksAt, by_row, cosine, flat, grads, plain_loop, seeded, take
from torch import Tensor, nn

import bnsharp
from bnsharp.regularizers import Plain, Smoothing, msam, sam
from bnsharp.types import Step


def shared_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def smoothing() -> Smoothing:
    return Smoothing(bnsharp.measures.gaussian(sigma=0.1, draws=2))


def whole_batch() -> tuple[Tensor, Tensor]:
    return examples(20, dtype=torch.float64)


def part_of(rank: int) -> tuple[Tensor, Tensor]:
    """Parts of unequal size."""
    x, y = whole_batch()
    rows = slice(0, 12) if rank == 0 else slice(12, 20)
    return x[rows], y[rows]


class HalfUsed(nn.Module):
    """A parameter that only one rank's examples reach."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gate if len(x) == 12 else self.layer(x)


def on_rank(rank: int, port: int, folder: str) -> None:
    """Every case of one launch; what each gave is stored for the tests."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    parallel = nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {}

    def case(name: str, net: nn.Module, regularizer: Any, batch: Any, **options: Any) -> Step:
        torch.manual_seed(rank)
        options.setdefault("generator", seeded())
        step = bnsharp.backward(parallel(net), cross_entropy, batch, regularizer, **options)
        found[name] = {"grad": grads(net), "loss": step.loss, "state": step.state, "buffers": dict(net.named_buffers()),
                       "none": [k for k, p in net.named_parameters() if p.grad is None]}
        return step

    part = part_of(rank)
    for directions in ("synchronised", "local"):
        case(f"penalty {directions}", shared_net(), by_row(0.3), part, directions=directions)
        case(f"state {directions}", shared_net(), msam(rho=0.3), part, directions=directions)
        case(f"smoothing {directions}", shared_net(), smoothing(), part, directions=directions, generator=None)
    case("plain local", shared_net(), Plain(), part, directions="local")
    case("compiled", torch.compile(shared_net(), backend="eager"), by_row(0.3), part)  # type: ignore[arg-type]
    torch.manual_seed(0)
    case("unused", HalfUsed().double(), sam(), part, directions="local")
    for directions in ("synchronised", "local"):
        net = BreaksAt(2 if rank == 0 else 100)
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype=torch.float16):
            step = case(f"overflow {directions}", net, sam(), (part[0].float(), part[1]), scaler=scaler,
                        directions=directions, precision="ambient")
        before = net.layer.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        found[f"overflow {directions}"] |= {
            "scale": scaler.get_scale(), "moved": not torch.equal(before, net.layer.weight),
            "finite": flat(step.gradient).isfinite().any(),
        }
    usual = shared_net()
    wrapped = parallel(usual)
    cross_entropy(wrapped(part[0]), part[1]).backward()
    found["usual"] = {"grad": grads(usual)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_every_rank_has_the_same_gradient(ranks: list[dict[str, Any]]) -> None:
    """To the last bit, in every case, and no parameter is left out on one rank alone."""
    for name, found in ranks[0].items():
        torch.testing.assert_close(found["grad"], ranks[1][name]["grad"], rtol=0, atol=0, equal_nan=True)
        assert found.get("none", []) == ranks[1][name].get("none", []) == [], name


@pytest.mark.parametrize("name", ["penalty", "state", "compiled"])
def test_synchronised_is_one_process_on_the_whole_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    net = shared_net()
    step = take(net, msam(rho=0.3) if name == "state" else by_row(0.3), batch=whole_batch())
    key = name if name == "compiled" else f"{name} synchronised"
    for found in ranks:
        torch.testing.assert_close(found[key]["grad"], grads(net))
        torch.testing.assert_close(found[key]["loss"], step.loss)
        torch.testing.assert_close(found[key]["state"], step.state)
        torch.testing.assert_close(
            {k.removeprefix("_orig_mod."): v for k, v in found[key]["buffers"].items()}, dict(net.named_buffers())
        )


@pytest.mark.parametrize("name", ["penalty", "state"])
def test_local_is_the_mean_of_the_parts_steps(name: str, ranks: list[dict[str, Any]]) -> None:
    """Weighted by their examples; each with its own direction and batch statistics; states averaged alike."""
    made: Any = msam(rho=0.3) if name == "state" else by_row(0.3)
    steps = [take(shared_net(), made, batch=part_of(rank)) for rank in range(2)]
    for found in ranks:
        mean = 0.6 * flat(steps[0].gradient) + 0.4 * flat(steps[1].gradient)
        torch.testing.assert_close(found[f"{name} local"]["grad"], mean)
        for key, value in found[f"{name} local"]["state"].items():
            expected = 0.6 * steps[0].state[key] + 0.4 * steps[1].state[key]
            torch.testing.assert_close(value, expected.to(value.dtype))
    assert cosine(mean, ranks[0][f"{name} synchronised"]["grad"]) < 0.9999


def test_local_and_plain_is_what_ddp_does(ranks: list[dict[str, Any]]) -> None:
    """But for the weights of unequal parts: DDP takes the mean of the ranks' means."""
    parts = [plain_loop(shared_net(), part_of(rank))[1] for rank in range(2)]
    torch.testing.assert_close(ranks[0]["usual"]["grad"], 0.5 * parts[0] + 0.5 * parts[1])
    torch.testing.assert_close(ranks[0]["plain local"]["grad"], 0.6 * parts[0] + 0.4 * parts[1])


def test_directions_are_drawn_together_or_apart(ranks: list[dict[str, Any]]) -> None:
    """Without a generator all ranks agree on a seed; local ones draw different noise from it."""
    net = shared_net()
    torch.manual_seed(0)
    bnsharp.backward(net, cross_entropy, whole_batch(), smoothing())
    torch.testing.assert_close(ranks[0]["smoothing synchronised"]["grad"], grads(net))
    assert cosine(ranks[0]["smoothing local"]["grad"], grads(net)) < 0.9999


@pytest.mark.parametrize("directions", ["synchronised", "local"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(directions: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        overflow = found[f"overflow {directions}"]
        assert overflow["scale"] == 32.0 and not overflow["moved"] and not overflow["finite"]
