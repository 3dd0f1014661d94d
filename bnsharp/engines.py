"""How losses and gradients at n points are evaluated: one after the other, several at once, compiled.

Every engine gives the same numbers up to rounding, and none is fastest everywhere; :mod:`bnsharp.choosing` times them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from bnsharp.checks import one_of, whole
from bnsharp.errors import InputError

KINDS = ("loop", "vmap", "auto")


@dataclass(frozen=True)
class Engine:
    """How n points are evaluated.

    ``Engine("loop")``: one after the other. ``Engine("vmap", chunk)``: ``chunk`` at a time by ``torch.func.vmap``.
    ``compile``: either of them by ``torch.compile`` (seconds to a minute before the first value; on a GPU CUDA graphs
    are replayed). ``Engine("auto")``: whichever is fastest on the first points of a call, compiled ones among them
    with ``compile``; for measuring only, since engines round differently.

    All give the same numbers up to rounding; none is faster everywhere (vmap over the weights of a convolution becomes
    a grouped convolution). Never more than ``chunk`` points are held at once.

    Raises:
        InputError: an unknown name, a chunk below 1.
    """

    name: str = "loop"
    chunk: int = 16
    compile: bool = False

    def __post_init__(self) -> None:
        one_of("engine", self.name, KINDS)
        whole("chunk", self.chunk)

    def __str__(self) -> str:
        return _SPELLED[self.name, self.compile].format(self.chunk)

    @property
    def size(self) -> int:
        """Points at once."""
        return self.chunk if self.name == "vmap" else 1

    @staticmethod
    def parse(text: str) -> Engine:
        """An engine as it is written: ``loop``, ``vmap``, ``vmap:8``, ``compiled``, ``compiled:8``, ``auto``,
        ``auto:compiled``; also as an estimate records it, ``vmap(8)``.

        Raises:
            InputError: anything else.
        """
        found = re.fullmatch(r"(loop|vmap|compiled|auto)(?:[:(](\d+|compiled)\)?)?", text)
        word, rest = found.groups() if found else ("", None)
        if (word, rest) in _WORDS:
            return _WORDS[word, rest]
        if word in ("vmap", "compiled") and rest is not None and rest.isdigit():
            return Engine("vmap", int(rest), word == "compiled")
        raise InputError(f"engine={text!r}; expected loop, vmap, vmap:CHUNK, compiled, compiled:CHUNK, auto or "
                         "auto:compiled")


_SPELLED = {
    ("loop", False): "loop", ("loop", True): "compiled", ("vmap", False): "vmap({})", ("vmap", True): "compiled({})",
    ("auto", False): "auto", ("auto", True): "auto:compiled",
}
_WORDS: dict[tuple[str, str | None], Engine] = {
    ("loop", None): Engine(), ("vmap", None): Engine("vmap"), ("compiled", None): Engine(compile=True),
    ("auto", None): Engine("auto"), ("auto", "compiled"): Engine("auto", compile=True),
}
LOOP = Engine()


def as_engine(engine: Engine | str) -> Engine:
    """An engine, or one as it is written (:meth:`Engine.parse`)."""
    return Engine.parse(engine) if isinstance(engine, str) else engine


# ---------------------------------------------------------------- compiled


@dataclass(frozen=True)
class Taken:
    """A loss at some points, taken apart for a compiler: ``program(points, rest, data)``.

    Attributes:
        program: ``({name: tensor}, {name: tensor}, data) -> scalar``.
        rest: tensors that all points share.
        data: what the loss is taken on.
    """

    program: Callable[[dict[str, Tensor], dict[str, Tensor], Any], Tensor]
    rest: dict[str, Tensor]
    data: Any


Compiled = Callable[[dict[str, Tensor], dict[str, Tensor], Any], Tensor]

_numbers = itertools.count()


def compiled(program: Compiled, engine: Engine, device: torch.device) -> Compiled:
    """The program at one point, or at ``engine.chunk`` stacked ones, as one compiled graph.

    Raises:
        InputError: when called, for what ``torch.compile`` does not take as one graph.
    """

    def one(points: dict[str, Tensor], rest: dict[str, Tensor], data: Any) -> Tensor:
        return program(points, rest, data)

    def many(points: dict[str, Tensor], rest: dict[str, Tensor], data: Any) -> Tensor:
        return torch.func.vmap(one, in_dims=(0, None, None), randomness="same")(points, rest, data)

    function = many if engine.name == "vmap" else one
    # graphs are kept by code object, and one of its own keeps other programs from using up its number of graphs
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    replayed = device.type == "cuda"
    made = torch.compile(own, fullgraph=True, dynamic=False, mode="reduce-overhead" if replayed else None)

    def call(points: dict[str, Tensor], rest: dict[str, Tensor], data: Any) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException

        if replayed:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with torch._C.DisableTorchFunction():  # what function modes do around a pass would be traced, or refused
                value = made(points, rest, data)
        except TorchDynamoException as error:
            raise InputError(
                f"torch.compile does not take this loss as one graph ({first_line(error)}); expected a network "
                "without data-dependent Python code: use engine='loop' or 'vmap'"
            ) from error
        return value.clone() if replayed else value

    return call


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:150]


def used(engine: Engine, taken: Iterable[str]) -> str:
    """How an estimate says what evaluated it: the engine given, or those chosen."""
    return str(engine) if engine.name != "auto" else " + ".join(sorted(taken)) + " (chosen)" if taken else "auto"
