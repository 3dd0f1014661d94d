"""An objective at one θ: what several parts of a measurement need there is evaluated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnsharp.evaluation import AbstractObjective
from bnsharp.types import Params


class Anchor:
    """An objective at one θ: the loss, gradient and Hessian there, each evaluated at most once."""

    def __init__(self, objective: AbstractObjective, params: Params, loss: Tensor | None = None,
                 gradient: Params | None = None):
        self.objective, self.params = objective, params
        self._loss, self._gradient = loss, gradient
        self._hessian: Any = None
        self._by_batch: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        if self._loss is None:
            with torch.no_grad():
                self._loss = self.objective(self.params)
        return self._loss

    @property
    def by_batch(self) -> Tensor:
        """``L_b(θ) [B]``."""
        if self._by_batch is None and self._loss is not None and self.objective.batches_seen == 1:
            self._by_batch = self._loss.detach().reshape(1)
        if self._by_batch is None:
            with torch.no_grad():
                weights, losses = self.objective.many_by_batch([self.params])
            self._by_batch = losses[:, 0]
            self._loss = batch_mean(weights, self._by_batch)
        return self._by_batch

    @property
    def gradient(self) -> Params:
        if self._gradient is None:
            self._loss, self._gradient = self.objective.value_and_grad(self.params)
        return self._gradient

    def hessian(self, v: Params) -> Params:
        """``H v``."""
        return self._products()(v)  # type: ignore[no-any-return]

    def _products(self) -> Any:
        if self._hessian is None:
            self._hessian = self.objective.hessian(self.params)
            if self._gradient is None:  # on a single batch it was needed for the products
                self._gradient = getattr(self._hessian, "gradient", None)
        return self._hessian

    def has_graph(self) -> bool:
        """Whether products share one graph of the gradient: on a single batch."""
        return getattr(self._products(), "gradient", None) is not None


def batch_mean(weights: Tensor, x: Tensor) -> Tensor:
    """Weighted mean over dimension 0; a single batch is returned unchanged."""
    return x[0] if len(x) == 1 else torch.tensordot(weights / weights.sum(), x, dims=1)
