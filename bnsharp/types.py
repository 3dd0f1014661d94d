"""Values that pass between the slots: estimates, found directions, training steps."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tensordict import TensorDict
from torch import Generator, Tensor, nn

if TYPE_CHECKING:

    class Params(TensorDict):
        """A flat TensorDict as a type checker should see it: string keys, tensor values."""

        def __getitem__(self, index: Any) -> Tensor: ...  # type: ignore[override]

        def items(self, *args: Any, **kwargs: Any) -> ItemsView[str, Tensor]: ...  # type: ignore[override]

        def keys(self, *args: Any, **kwargs: Any) -> KeysView[str]: ...  # type: ignore[override]

        def values(self, *args: Any, **kwargs: Any) -> ValuesView[Tensor]: ...  # type: ignore[override]

else:
    Params = TensorDict
"""Parameters or directions: flat, keys are ``module.named_parameters()``, batch size ``[]`` or ``[n]``."""

State = dict[str, Tensor]
"""What a regulariser carries from step to step: tensors only, so that it can be checkpointed."""


LossFunction = Callable[[Params], Tensor]


@dataclass(frozen=True)
class Term:
    """One batch of an objective.

    Attributes:
        weight: its share is ``weight / Σ weights`` (its number of examples).
        loss: ``θ ↦ L_b(θ)``, the batch's mean loss.
        output: ``θ ↦ z``, the network's output, where the loss is ``criterion(z)``; None for a plain function.
        criterion: ``z ↦ L_b``.
        total: where several processes hold parts of the batch: what ``criterion`` or a form of it gives on this one's
            part ↦ the batch's; None where one process holds all of it.
    """

    weight: float
    loss: LossFunction
    output: Callable[[Params], Any] | None = None
    criterion: Callable[[Any], Tensor] | None = None
    total: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Evaluated:
    """Values of a profile for ``n`` directions.

    Attributes:
        values: ``[n]``.
        errors: numerical errors ``[n]``.
        left_out: ``[G, n]``, the values with one G-th of the batches left out; None for a single batch.
    """

    values: Tensor
    errors: Tensor
    left_out: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A measured sharpness with its errors, and what it was taken on.

    Attributes:
        value: the measure, in units of the loss (of loss per squared step for curvature measures).
        stderr: standard error over random draws; 0.0 when nothing was drawn, infinite from a single draw.
        error: numerical error of the value: embedded quadrature, rounding, eigenvalue residual, bracket width.
        upper: an upper bound of a searched maximum, or None where none is known.
        direction: ``v`` in parameter space that attains a searched maximum, or None.
        unit: the same direction in the geometry's unit coordinates, ``v = s(θ) ⊙ unit``.
        effective_samples: effective number of draws (importance weights), or of directions tried.
        evaluations: gradients and losses evaluated, ``{"gradients": …, "losses": …, "products": …}``.
        statistics: ``"batch"`` or ``"running"``; None for an objective without normalizers' statistics.
        batch_size: examples in one batch, None for a plain function.
        stderr_data: standard error over the data's batches as a sample of other batches of the same size (jackknife,
            at most 20 groups of batches, directions held); None for a single batch.
        draws: random draws that the value is a mean over, 0 for a search.
        restarts: the best value of each start that a search followed to its end (in its own score), in order.
        examples, batches: what the loss is a mean over; examples is None for a plain function.
        precision: ``"float64"``, ``"float32"``, …: what the value was computed in.
        promoted: whether the precision was raised because rounding errors were too large for the value.
        engine: how losses at several points were evaluated.
        converged: whether a target error was met, or a search for a radius ended inside its bracket; None if neither.
        confidence: level of :attr:`interval`.
    """

    value: float
    stderr: float
    error: float
    upper: float | None = None
    direction: Params | None = None
    unit: Params | None = None
    effective_samples: float = 1.0
    evaluations: dict[str, int] = field(default_factory=dict)
    statistics: str | None = None
    batch_size: int | None = None
    stderr_data: float | None = None
    draws: int = 0
    restarts: tuple[float, ...] = ()
    examples: int | None = None
    batches: int = 1
    precision: str = ""
    promoted: bool = False
    engine: str = ""
    converged: bool | None = None
    confidence: float = 0.95

    @property
    def half_width(self) -> float:
        """``t·stderr + error``, t the Student quantile for ``effective samples − 1`` degrees of freedom."""
        if self.stderr == 0.0:
            return self.error
        return student(self.confidence, self.effective_samples - 1) * self.stderr + self.error

    @property
    def interval(self) -> tuple[float, float]:
        """A confidence interval of the measure on this data: sampling over draws, widened by the numerical error."""
        return self.value - self.half_width, self.value + self.half_width

    @property
    def spread(self) -> float | None:
        """How far the median start of a search stayed below the best, relative to it; None below two starts."""
        if len(self.restarts) < 2 or not max(self.restarts) > 0:
            return None
        ordered = sorted(self.restarts)
        n = len(ordered)
        return 1 - (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 / ordered[-1]


def student(confidence: float, freedom: float) -> float:
    """Two-sided Student quantile; infinite without a degree of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom)) if freedom > 0 else float("inf")


@dataclass(frozen=True)
class Scored:
    """Scores of ``n`` directions.

    Attributes:
        value: ``[n]``.
        gradient: ``∂value/∂u``, a batch ``[n]``, or a function that makes it; None after a search's last step, which
            needs none.
        extra: what the score's owner wants kept of the best direction, nested batches ``[n]``.
    """

    value: Tensor
    gradient: Any
    extra: Any

    @property
    def slope(self) -> Any:
        """:attr:`gradient`, made if need be."""
        return self.gradient() if callable(self.gradient) else self.gradient


@dataclass(frozen=True)
class Found:
    """What a ``Directions`` value returns.

    Attributes:
        u: unit directions, a batch ``[n]`` or a sequence made on demand.
        scored: the scores of those directions where they are known already (searches), else None.
        error: numerical error of the search itself (an eigenvalue residual), 0.0 if it has none.
        restarts: the best score of each start that was followed to its end.
        known: what the profile gives at ``u`` on all data, where the search knows it (a form at an eigenvector).
    """

    u: Any
    scored: Scored | None = None
    error: float = 0.0
    restarts: tuple[float, ...] = ()
    known: Evaluated | None = None


@dataclass(frozen=True)
class Step:
    """One regularised training step.

    Attributes:
        loss: ``L(θ)`` on the loss's batch (for methods that never evaluate it, the loss they do evaluate).
        penalty: the regulariser's own value on its batch; NaN where the method does not compute one.
        gradient: the direction to descend, ``∇L + λ r``.
        evaluations: gradients evaluated in this step, products with second derivatives counted as one each.
        state: the state for the next step.
        ratio: ``‖λ r‖ / ‖∇L‖``, after clipping; NaN where ``∇L(θ)`` is not computed.
        output: the module's output at the first evaluation, for accuracies; None if not recorded.
        plain: ``∇L(θ)`` on the loss's batch, where the step computed it; for wrappers, not handed on by ``backward``.
    """

    loss: Tensor
    penalty: Tensor
    gradient: Params
    evaluations: int
    state: State
    ratio: Tensor
    output: Any = None
    plain: Params | None = None


class Average(Protocol):
    """Weights that follow the trained ones, such as an exponential moving average; explicit state, like a regulariser.

    The state holds tensors only: it is checkpointed.
    """

    def init(self, module: nn.Module) -> State:
        """Before the first step."""

    def update(self, module: nn.Module, state: State, step: int) -> State:
        """After the optimizer's step number ``step`` (from 1)."""

    def applied(self, module: nn.Module, state: State) -> AbstractContextManager[None]:
        """A context in which the module has the averaged weights; afterwards it has its own again."""


@dataclass(frozen=True)
class TrackingContext:
    """What a tracker may want to know.

    Attributes:
        epoch: finished epochs, this one included.
        steps: optimizer steps taken.
        lr: learning rate at the epoch's first step.
        weight: the epoch's λ.
        parameter_norm: ``‖θ‖``, the trained parameters.
        generator: seeded for this epoch alone; nothing that is drawn from it touches training.
        record: the epoch's record so far.
    """

    epoch: int
    steps: int
    lr: float
    weight: float
    parameter_norm: float
    generator: Generator
    record: Mapping[str, Any]


Tracker = Callable[[nn.Module, TrackingContext], dict[str, float]]
"""Numbers to record with an epoch, such as a measured sharpness; the module is left as it was."""
