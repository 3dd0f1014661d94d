"""Optimizers and schedules of several runs as one, on stacked parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bnsharp.errors import InputError

ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop",
)
"""Optimizers of ``torch.optim`` that treat every coordinate alone: on stacked parameters they do what n of them do."""

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Those whose step PyTorch has in one pass over memory on a CPU too, where n networks no longer fit its cache."""


def check_elementwise(optimizer: Optimizer) -> None:
    """Raise :class:`InputError` unless an optimizer is of :data:`ELEMENTWISE`."""
    kind = type(optimizer)
    if kind.__name__ not in ELEMENTWISE or kind is not getattr(torch.optim, kind.__name__, None):
        raise InputError(f"optimizer {kind.__name__} on stacked parameters; expected one that treats coordinates "
                         f"alone ({', '.join(ELEMENTWISE)}): train the seeds one after the other")


class StackedOptimizer:
    """The first run's optimizer and schedule act for all, on stacked parameters; :meth:`scatter` gives all their own.

    Args:
        optimizers, schedules: of the runs, with the same settings and as many steps taken.
        names: of each run's parameters, by their identities.
        stacked: parameters ``[n, …]`` by name.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedules: Sequence[LRScheduler],
                 names: Sequence[Mapping[int, str]], stacked: Mapping[str, nn.Parameter]):
        self._optimizers, self._schedules = list(optimizers), list(schedules)
        self._names, self._stacked = names[0], stacked
        self._gathered = False
        self.gather()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizers[0].param_groups[0]["lr"])

    def step(self) -> None:
        """One step of all runs, and of the schedule."""
        self._optimizers[0].step()
        self._schedules[0].step()

    def gather(self) -> None:
        """Stack what the runs' optimizers hold."""
        lead = self._optimizers[0]
        self._own = [list(group["params"]) for group in lead.param_groups]
        self._fused = [group.get("fused") for group in lead.param_groups]
        state: dict[Tensor, dict[str, Any]] = {}
        for g, group in enumerate(lead.param_groups):
            rows = list(zip(*[o.param_groups[g]["params"] for o in self._optimizers], strict=True))
            group["params"] = [self._stacked[self._names[id(row[0])]] for row in rows]
            for whole, row in zip(group["params"], rows, strict=True):
                parts = [o.state.get(p, {}) for o, p in zip(self._optimizers, row, strict=True)]
                if parts[0]:
                    state[whole] = {k: _whole([part[k] for part in parts], row[0]) for k in parts[0]}
            if type(lead) in FUSED and group["fused"] is None and not group["foreach"]:
                group["fused"] = True
        lead.state = defaultdict(dict, state)
        self._gathered = True

    def scatter(self) -> None:
        """Every run's optimizer and schedule hold its own part, as if it had run alone."""
        if not self._gathered:
            return
        self._gathered = False
        lead = self._optimizers[0]
        stacked, state = [group["params"] for group in lead.param_groups], lead.state
        for group, own, fused in zip(lead.param_groups, self._own, self._fused, strict=True):
            group["params"] = own
            if "fused" in group:
                group["fused"] = fused
        settings = [{k: v for k, v in group.items() if k != "params"} for group in lead.param_groups]
        for i, optimizer in enumerate(self._optimizers):
            own_state: dict[Tensor, dict[str, Any]] = {}
            for g, group in enumerate(optimizer.param_groups):
                group.update(settings[g])
                for p, whole in zip(group["params"], stacked[g], strict=True):
                    if whole in state:
                        own_state[p] = {k: _part(v, i, p) for k, v in state[whole].items()}
            optimizer.state = defaultdict(dict, own_state)
        for schedule in self._schedules[1:]:
            schedule.load_state_dict(dict(self._schedules[0].state_dict()))


def _whole(parts: Sequence[Any], parameter: Tensor) -> Any:
    """Entries of the runs as one ``[n, …]``; counters, which are equal, from the first."""
    first = parts[0]
    if not isinstance(first, Tensor):
        return first
    return torch.stack(list(parts)) if first.ndim and first.shape == parameter.shape else first.clone()


def _part(value: Any, place: int, parameter: Tensor) -> Any:
    """A run's entry of what :func:`_whole` gave."""
    if not isinstance(value, Tensor):
        return value
    own = value.ndim > parameter.ndim and value.shape[1:] == parameter.shape
    return value[place].clone() if own else value.clone()
