"""Several processes that hold parts of every batch: who this one is, and what it exchanges with the others.

A sum over ranks and its transpose, a copy to all ranks, are each other's derivative, to any order: a loss averaged by
them is one and the same function of θ on every rank, and whatever is derived from it (gradients, Hessian products,
directions) is the same number on every rank without another exchange. All ranks issue the same exchanges in the same
order, which they do as long as they decide on such numbers alone: an all-reduce gives the same bits to all.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bnsharp import params as P
from bnsharp import randomness
from bnsharp.checks import whole
from bnsharp.errors import InputError, RankLostError
from bnsharp.exchange import Spread, Sum
from bnsharp.stopping import lost_worker
from bnsharp.types import Params, Step, Term

T = TypeVar("T")
SMALLEST_SHARE = 2
"""Examples that a rank needs at least: batch statistics of one example do not exist."""
_MASKS = 101
"""Names the streams of random layers among a run's streams of random numbers."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train or measure together; the default is the only one, and does nothing.

    Attributes:
        index: of this process, from 0.
        count: how many there are.
        group: ``torch.distributed``'s group; None is the default one.
        device: where tensors of unknown place are exchanged.

    Raises:
        InputError: an index that is not below the count, or more than one without a process group.
    """

    index: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False, compare=False)
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    def __post_init__(self) -> None:
        if whole("index", self.index, 0) >= whole("count", self.count):
            raise InputError(f"rank {self.index} of {self.count}; expected an index from 0 to {self.count - 1}")
        if self.count > 1 and not (dist.is_available() and dist.is_initialized()):
            raise InputError(f"{self.count} ranks without a process group: start the command by torchrun, or enter "
                             "bnsharp.distributed.joined()")

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.index == 0

    # ------------------------------------------------------------ sums over ranks

    def sum(self, x: Tensor) -> Tensor:
        """``Σ_r x_r``, the same bits on every rank; differentiable, its derivative is :meth:`spread`."""
        return x if self.count == 1 else Sum.apply(self, x)[0]  # type: ignore[no-untyped-call]

    def pool(self, x: Tensor) -> Tensor:
        """``Σ_r x_r`` for this rank's part of a computation that goes on: its derivative is the sum over ranks, too."""
        return x if self.count == 1 else Spread.apply(self, self.sum(x))[0]  # type: ignore[no-untyped-call]

    def spread(self, params: Params) -> Params:
        """θ as each rank's own; its derivative is the sum of the ranks' gradients, in one exchange."""
        if self.count == 1:
            return params
        keys = list(params.keys())
        own = Spread.apply(self, *(params[k] for k in keys))  # type: ignore[no-untyped-call]
        return P.make(dict(zip(keys, own, strict=True)), params.batch_size)

    def mean(self, values: T, weight: float = 1.0) -> T:
        """``Σ_r w_r x_r / Σ_r w_r`` of every floating-point tensor in a structure; others stay as they are.

        One exchange for each precision in it. Detached.
        """
        if self.count == 1:
            return values
        leaves, spec = tree_flatten(values)
        averaged = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.is_floating_point()]
        with torch.no_grad():
            sums = self.reduce([*(weight * leaves[i].detach() for i in averaged),
                                 *(leaves[i].new_tensor(weight) for i in averaged)])
            for k, i in enumerate(averaged):
                leaves[i] = (sums[k] / sums[len(averaged) + k]).to(leaves[i].dtype)
        return tree_unflatten(leaves, spec)

    def gather(self, value: float) -> list[float]:
        """Every rank's number, in order."""
        if self.count == 1:
            return [value]
        row = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        row[self.index] = value
        return self.reduce([row])[0].tolist()

    def any(self, condition: bool) -> bool:
        """Whether it holds on any rank: a decision that all take together."""
        return condition if self.count == 1 else any(self.gather(float(condition)))

    def unify_(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors that differ between ranks by their mean, in place."""
        floating = [t for t in tensors if t.is_floating_point() and t.numel()]
        if self.count == 1 or not floating:
            return
        with torch.no_grad():
            both = self.reduce([b for t in floating for b in (t, -t)], dist.ReduceOp.MAX if dist.is_available() else 0)
            means = self.reduce(floating)
            for i, t in enumerate(floating):
                equal = both[2 * i] == -both[2 * i + 1]
                t.copy_(torch.where(equal, t, means[i] / self.count))

    def check_equal(self, params: Params, where: str) -> None:
        """Raise :class:`RankLostError` unless parameters are the same numbers, to the last bit, on every rank."""
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for value in params.values():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if len(set(self.gather(float(int.from_bytes(digest.digest()[:6], "big"))))) > 1:
            raise RankLostError(
                f"ranks hold different parameters {where}; expected the same bits: use equal machines, versions and "
                "numbers of threads, and no randomness outside the trainer's generators"
            )

    def reduce(self, tensors: Sequence[Tensor], op: Any = None) -> list[Tensor]:
        """Sums (or another operation) over ranks: one exchange for each precision and device, of all its tensors."""
        result: list[Tensor] = list(tensors)
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, t in enumerate(tensors):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        for indices in kinds.values():
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
            with _telling():
                dist.all_reduce(flat, dist.ReduceOp.SUM if op is None else op, group=self.group)
            parts = flat.split([tensors[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                result[i] = part.reshape(tensors[i].shape)
        return result

    # ------------------------------------------------------------ parts of batches, random numbers

    def share(self, batch: T) -> T:
        """This rank's consecutive part of a batch ``(x, y)``: parts differ by one example at most.

        Every tensor in it with as many rows as its first is cut along dimension 0.

        Raises:
            InputError: fewer than two examples for a rank.
        """
        if self.count == 1:
            return batch
        leaves = [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.ndim]
        n = len(leaves[0]) if leaves else 0
        if n < SMALLEST_SHARE * self.count:
            raise InputError(
                f"a batch of {n} examples for {self.count} ranks; expected at least {SMALLEST_SHARE * self.count}: use "
                "a larger batch or fewer processes"
            )
        size, more = divmod(n, self.count)
        start = self.index * size + min(self.index, more)
        stop = start + size + (self.index < more)
        return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) and t.ndim and len(t) == n else t, batch)

    def whole(self, part: T) -> T:
        """The batch of which every rank gives a part, in the order of ranks: what :meth:`share` undoes.

        For loops whose ranks load different examples. Tensors with as many rows as the first are put together.
        """
        leaves = [t for t in tree_flatten(part)[0] if isinstance(t, Tensor) and t.ndim]
        if self.count == 1 or not leaves:
            return part
        own = len(leaves[0])
        sizes = [int(n) for n in self.gather(own)]
        start, n = sum(sizes[: self.index]), sum(sizes)

        def joined(t: Any) -> Any:
            if not (isinstance(t, Tensor) and t.ndim and len(t) == own):
                return t
            rows = t.new_zeros(n, *t.shape[1:], dtype=torch.uint8 if t.dtype == torch.bool else t.dtype)
            rows[start : start + own] = t.detach()
            return self.reduce([rows])[0].to(t.dtype)

        return tree_map(joined, part)

    def own(self, generator: torch.Generator) -> torch.Generator:
        """A generator of this rank's own, seeded from one that is the same, and stays the same, on all ranks."""
        if self.count == 1:
            return generator
        common = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        return P.seeded(randomness.stream(common, self.index), generator.device)

    @contextmanager
    def masks(self, seed: int, step: int, device: torch.device) -> Iterator[None]:
        """Within it random layers draw from a global state that is this rank's and this step's own.

        It depends on nothing else, so that a resumed run draws what an uninterrupted one does; afterwards the global
        state is as before, the same on all ranks. One process is left alone.
        """
        if self.count == 1:
            yield
            return
        with randomness.undisturbed(device):
            torch.manual_seed(randomness.stream(seed, _MASKS, step, self.index))
            yield

    # ------------------------------------------------------------ what one rank does for all

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0 (plain values and tensors), on every rank; nothing is unpickled.

        Raises:
            InputError: on every rank where ``make`` raised one, or an OSError, on rank 0.
            RankLostError: on the others where it raised anything else.
        """
        if self.count == 1:
            return make()
        answer: dict[str, Any] = {}
        raised: BaseException | None = None
        if self.is_first:
            try:
                answer = {"value": make()}
            except BaseException as error:
                raised = error
                answer = {"error": str(error), "is_input": isinstance(error, InputError | OSError)}
        answer = self._broadcast(answer)
        if raised is not None:
            raise raised
        if "error" in answer:
            raise InputError(answer["error"]) if answer["is_input"] else RankLostError(f"rank 0: {answer['error']}")
        return answer["value"]

    def first_then_all(self, make: Callable[[], T]) -> T:
        """``make()`` on every rank, on rank 0 before the others: what it leaves on disk is there for them."""
        if self.count == 1:
            return make()
        made: list[T] = []

        def first() -> None:
            made.append(make())

        self.from_first(first)
        return made[0] if made else make()

    def _broadcast(self, answer: dict[str, Any]) -> dict[str, Any]:
        buffer = io.BytesIO()
        if self.is_first:
            torch.save(answer, buffer)
        data = torch.frombuffer(bytearray(buffer.getvalue() or b"\0"), dtype=torch.uint8).to(self.device)
        with _telling():
            size = torch.tensor([len(data)], device=self.device)
            dist.broadcast(size, 0, group=self.group)
            if not self.is_first:
                data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            dist.broadcast(data, 0, group=self.group)
        if self.is_first:
            return answer
        return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


SINGLE = Ranks()
"""The only process."""


def over_ranks(term: Term, ranks: Ranks, total: float) -> Term:
    """One rank's part of a batch as the whole batch's loss ``Σ_r (w_r/w) L_r(θ)``, w the sum of the parts' weights.

    Its value and every derivative are the same on all ranks: this is the one place where ranks are averaged.
    """
    share = term.weight / total

    def loss(params: Params) -> Tensor:
        return ranks.sum(share * term.loss(ranks.spread(params)))

    def output(params: Params) -> Any:
        assert term.output is not None
        return term.output(ranks.spread(params))

    return Term(
        total, loss, None if term.output is None else output, term.criterion, lambda value: ranks.sum(share * value)
    )


def average(step: Step, ranks: Ranks, weight: float) -> Step:
    """A step that each rank took on its own part of the batch, averaged: gradient, loss, penalty, ratio, state.

    State tensors of floating-point numbers are averaged too, so that ranks do not drift apart.
    """
    plain = None if step.plain is None else dict(step.plain.items())
    values = (step.loss, step.penalty, step.ratio, dict(step.gradient.items()), step.state, plain)
    loss, penalty, ratio, gradient, state, plain = ranks.mean(values, weight)
    return replace(step, loss=loss, penalty=penalty, ratio=ratio, gradient=P.make(gradient), state=state,
                   plain=None if plain is None else P.make(plain))


def launched() -> tuple[int, int, int]:
    """``(rank, ranks, rank on this machine)`` as ``torchrun`` says in the environment; ``(0, 1, 0)`` without it.

    Raises:
        InputError: an environment that holds something else.
    """
    if not {"RANK", "WORLD_SIZE"} <= set(os.environ):
        return 0, 1, 0
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return rank, count, int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise InputError(f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r}; expected whole "
                         "numbers: start the command by torchrun") from error


def own_device(device: str) -> torch.device:
    """``"cuda"`` as this rank's own GPU of its machine where several processes were started; else the device named.

    Raises:
        InputError: one numbered GPU for several ranks, or fewer GPUs than ranks on this machine.
    """
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={device!r} cannot be used here; expected 'cpu' or a device that exists") from error
    _, count, local = launched()
    if count == 1 or named.type == "cpu":
        return named
    if named.index is not None:
        raise InputError(f"device={device!r} for {count} ranks; expected {named.type!r}: each rank takes its own")
    if named.type == "cuda" and local >= torch.cuda.device_count():
        raise InputError(f"device={device!r} for local rank {local}; there are {torch.cuda.device_count()} GPUs: start "
                         "fewer processes on this machine")
    return torch.device(named.type, local)


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """The ranks of a job started by ``torchrun``: gloo for the CPU, NCCL for CUDA; one process where there is no job.

    A process group that exists already is used and left as it is; one made here is destroyed at the end.

    Raises:
        InputError: a group that cannot be made; see :func:`own_device`.
    """
    place = own_device(device)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), None, place)
        return
    rank, count, _ = launched()
    if count == 1:
        yield SINGLE
        return
    try:
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group("gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{count} processes cannot find each other ({_first_line(error)}); expected the environment "
                         "that torchrun sets") from error
    try:
        yield Ranks(rank, count, None, place)
    finally:
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    """The first sentence, without the source file that backends put before it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).split(". ")[0][:120]


@contextmanager
def _telling() -> Iterator[None]:
    """An exchange that fails as one line: the other side is gone."""
    try:
        yield
    except RuntimeError as error:
        if lost_worker(error):  # told by a signal, wherever the process was at that moment
            raise
        raise RankLostError(f"a rank has died, or lost its connection ({_first_line(error)})") from error
