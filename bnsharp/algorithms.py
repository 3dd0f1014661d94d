"""Named training algorithms: a regulariser per epoch, a weight per epoch, and the fresh batches that a step takes.

``algorithm("sgds-5", groups, delta=0.05)`` gives a value that the trainer runs without knowing its name. A new
algorithm is one function here, registered by :func:`bnsharp.families.family`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from bnsharp import regularizers as R
from bnsharp.balls import BoxBall, Filters, GroupBall
from bnsharp.checks import flag, one_of, positive, unknown
from bnsharp.directions import Ascend, Draw
from bnsharp.errors import InputError
from bnsharp.families import FAMILIES, Algorithm, Family, algorithm, always, family, find, options_of, own_options
from bnsharp.geometry import Constant, Euclidean, Geometry, GroupNorms, Groups, Groupwise, Magnitude, Matrices
from bnsharp.laws import Box, Gaussian, Uniform
from bnsharp.measures import MEASURES, Measure, build_measure
from bnsharp.profiles import Line, Rise
from bnsharp.reduce import Maximum, Mean
from bnsharp.regularizers import Regularizer, check_weight

__all__ = ["FAMILIES", "Algorithm", "Family", "algorithm", "find", "options_of", "own_options"]

# ---------------------------------------------------------------- the loss, and steps in a ball around θ


@family("sgd", "plain loss", "-")
def sgd(name: str) -> Algorithm:
    return always(name, R.Plain())


@family("sam", "sharpness-aware minimisation, radius rho", "Foret et al. 2021")
def sam(name: str, *, rho: float = 0.05, weight: float = 1.0) -> Algorithm:
    return always(name, R.sam(rho=rho), weight)


@family("asam", "SAM with steps relative to each weight's magnitude", "Kwon et al. 2021")
def asam(name: str, *, rho: float = 0.5, eta: float = 0.01, weight: float = 1.0) -> Algorithm:
    return always(name, R.asam(rho=rho, eta=eta), weight)


@family("m-sam", "SAM on chunks of the batch, each with a step and batch statistics of its own", "Foret et al. 2021")
def m_sam(name: str, *, rho: float = 0.05, chunks: int = 4, weight: float = 1.0) -> Algorithm:
    return always(name, R.m_sam(rho=rho, chunks=chunks), weight)


@family("wsam", "SAM with the sharpness weighted by wsam_gamma/(1 - wsam_gamma)", "Yue et al. 2023")
def wsam(name: str, *, rho: float = 0.05, wsam_gamma: float = 0.9) -> Algorithm:
    return always(name, R.sam(rho=rho), R.wsam_weight(wsam_gamma))


@family("friendly-sam", "SAM along what the gradient has beyond its running average", "Li et al. 2024")
def friendly_sam(name: str, *, rho: float = 0.05, sigma: float = 1.0, decay: float = 0.9) -> Algorithm:
    return always(name, R.friendly_sam(rho=rho, sigma=sigma, decay=decay))


@family("look-sam", "a SAM step every few steps, its correction used again in between", "Liu et al. 2022")
def look_sam(name: str, *, rho: float = 0.05, every: int = 10, alpha: float = 0.7) -> Algorithm:
    return always(name, R.look_sam(rho=rho, every=every, alpha=alpha))


@family("gsam", "SAM less what of the loss's gradient lies across its own", "Zhuang et al. 2022")
def gsam(name: str, *, rho: float = 0.05, alpha: float = 0.4) -> Algorithm:
    return always(name, R.gsam(rho=rho, alpha=alpha))


_ONE_GRADIENT = {
    "clip": "with one gradient per step the penalty's own gradient is never known; expected no clip: clip the whole "
            "gradient by max_norm, or take sgds-0",
    "independent_batch": "one gradient per step is one batch; expected no second one: take sgds-0",
    "steps": "one gradient per step leaves nothing to search with; expected no search steps: take sgds-N",
}


@family("msam", "one gradient per step, beside momentum's next point", "Becker et al. 2024", refuses=_ONE_GRADIENT)
def momentum_sam(name: str, *, rho: float = 0.3, averaging: float = 0.9) -> Algorithm:
    """``averaging`` is the optimizer's momentum in the publication."""
    return always(name, R.msam(rho=rho, momentum=averaging))


# ---------------------------------------------------------------- BN-Sharpness


@family(
    "sgds-N", "BN-Sharpness, N search steps, c = λ(p+1)^(-1/p) = 1, no clip, the loss's own batch ('effective')",
    "Yi et al. 2019, algorithm 1", pattern=r"sgds-(\d+)(?:-effective)?",
)
def sgds(
    name: str,
    groups: Groups,
    steps: str,
    *,
    delta: float = 0.08,
    delta_growth: float = 1.0,
    p: float = 2.0,
    weight: float | None = None,
    weight_growth: float = 1.0,
    gradient: str = "two-point",
    clip: float | None = None,
    rest: str = "tensor",
    rule: str = "alternate",
    coordinates: str = "unit",
    nodes: int = 8,
    independent_batch: bool = False,
    warm: bool = False,
    reuse_direction: int = 1,
) -> Algorithm:
    """SGD with BN-Sharpness; ``weight=None`` is ``λ = (p+1)^{1/p}``, at which c = λκ = 1."""
    positive("delta", delta)
    flag("independent_batch", independent_batch)
    flag("warm", warm)
    for label, growth in (("delta_growth", delta_growth), ("weight_growth", weight_growth)):
        positive(label, growth)

    def regularizer(epoch: int) -> Regularizer:
        measure = Measure(
            Groupwise(groups, rest=rest), Ascend(int(steps), rule=rule, coordinates=coordinates),
            Line(Uniform(delta * delta_growth**epoch), p, nodes), Maximum(),
        )
        return R.Penalty(measure, gradient, clip, R.Warm() if warm else R.Steepest(), reuse_direction)

    regularizer(0)  # bad options are told before training starts
    base = (p + 1) ** (1 / p) if weight is None else weight
    check_weight(base)
    return Algorithm(name, regularizer, lambda epoch: base * weight_growth**epoch, int(independent_batch))


_PAPER: dict[str, Any] = {
    "clip": 0.1, "rest": "joint", "independent_batch": True, "rule": "riemannian",
}


def _preset(**defaults: Any) -> Callable[..., Algorithm]:
    """:func:`sgds` with other defaults, still open to options."""

    def build(name: str, groups: Groups, steps: str, **options: Any) -> Algorithm:
        return sgds(name, groups, steps, **{**defaults, **options})

    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(default=defaults.get(k, p.default)) for k, p in inspect.signature(sgds).parameters.items()]
    )
    return build


family(
    "sgds-N-paper-lambda", "the paper's settings read as λ = 1e-4·1.02^epoch, δ = 1e-3, clip 0.1, independent batch "
    "(VGG on CIFAR-10: weight=5e-4, on CIFAR-100: 1e-3)", "Yi et al. 2019, section 5",
    pattern=r"sgds-(\d+)-paper-lambda",
)(_preset(delta=1e-3, weight=1e-4, weight_growth=1.02, **_PAPER))
family(
    "sgds-N-paper-delta", "the paper's settings read as δ = 1e-4·1.02^epoch, λ = 1, clip 0.1, independent batch "
    "(VGG on CIFAR-10: delta=5e-4, on CIFAR-100: 1e-3)", "Yi et al. 2019, section 5", pattern=r"sgds-(\d+)-paper-delta",
)(_preset(delta=1e-4, delta_growth=1.02, weight=1.0, **_PAPER))


@family(
    "sgds-averaged", "BN-Sharpness along the average of past gradients, c = 1: one gradient per step",
    "Yi et al. 2019, with momentum-SAM's economy", refuses=_ONE_GRADIENT,
)
def sgds_averaged(
    name: str, groups: Groups, *, delta: float = 0.08, averaging: float = 0.5, p: float = 2.0, rest: str = "tensor",
    descent: bool = False,
) -> Algorithm:
    positive("delta", delta)
    measure = Measure(Groupwise(groups, rest=rest), Ascend(0), Line(Uniform(delta), p), Maximum())
    return always(name, R.Averaged(measure, averaging, descent), (p + 1) ** (1 / p))


# ---------------------------------------------------------------- smoothings, which replace the loss


def _held(scale: Any, vectors: bool) -> Any:
    """A scale that leaves vectors (biases, normalizers' parameters) out unless they are asked for."""
    return scale if vectors else Matrices(scale)


BOXES: dict[str, Callable[[float, bool], Geometry]] = {
    "constant": lambda a, vectors: Geometry(_held(Constant(a), vectors), BoxBall()),
    "magnitude": lambda a, vectors: Geometry(_held(Magnitude(a), vectors), BoxBall()),
    "filters": lambda a, vectors: Geometry(_held(GroupNorms(GroupBall(Filters()), a), False), GroupBall(Filters())),
}
"""What SmoothOut's uniform noise is relative to: nothing, each weight, or the norm of each output filter."""


@family(
    "smoothout", "uniform noise of half width a on every weight, the gradient taken there", "Wen et al. 2018",
    refuses={"independent_batch": "the smoothed loss replaces the loss; expected no second batch"},
)
def smoothout(
    name: str, *, a: float = 0.01, draws: int = 1, relative_to: str = "constant", vectors: bool = False, chunks: int = 1
) -> Algorithm:
    one_of("relative_to", relative_to, BOXES)
    flag("vectors", vectors)
    if vectors and relative_to == "filters":
        raise InputError("vectors=True with relative_to='filters': a vector has no filters; expected vectors=False, or "
                         "noise relative to 'constant' or 'magnitude'")
    if a == 0:
        return always(name, R.Plain())
    positive("a", a)
    measure = Measure(BOXES[relative_to](a, vectors), Draw(Box(), draws), Rise(), Mean())
    return always(name, _ghost(R.Smoothing(measure), chunks))


def _ghost(regularizer: Regularizer, chunks: int) -> Regularizer:
    """Ghost batches: each chunk with noise of its own."""
    return regularizer if chunks == 1 else R.Chunked(regularizer, chunks)


@family(
    "gaussian-smoothing", "Gaussian noise of standard deviation sigma, relative to scale groups where asked",
    "Wang et al. 2018", needs_groups=False,
    refuses={"independent_batch": "the smoothed loss replaces the loss; expected no second batch"},
)
def gaussian_smoothing(
    name: str, groups: Groups | None, *, sigma: float = 0.01, draws: int = 1, relative_to: str = "constant",
    moving: bool = False, chunks: int = 1,
) -> Algorithm:
    def groupwise() -> Geometry:
        if groups is None:
            raise InputError("relative_to='groups' needs the network's scale groups: pass "
                             "bnsharp.scale_groups(module, x)")
        return Groupwise(groups, radius=sigma)

    scales: dict[str, Callable[[], Geometry]] = {
        "constant": lambda: Euclidean(sigma),
        "magnitude": lambda: Geometry(Magnitude(sigma), Euclidean(1.0).ball),
        "groups": groupwise,
    }
    one_of("relative_to", relative_to, scales)
    positive("sigma", sigma)
    measure = Measure(scales[relative_to](), Draw(Gaussian(), draws), Rise(), Mean())
    return always(name, _ghost(R.Smoothing(measure, moving), chunks))


@family(
    "entropy-sgd", "gradient of local entropy by an inner loop of SGLD, inner_steps gradients per step",
    "Chaudhari et al. 2017",
    refuses={"independent_batch": "every inner step takes a fresh batch already; expected fresh_batches=true or false"},
)
def entropy_sgd(
    name: str,
    *,
    inner_steps: int = 20,
    entropy_gamma: float = 1e-4,
    scoping: float = 1e-3,
    noise: float = 1e-4,
    inner_lr: float = 0.1,
    averaging: float = 0.75,
    inner_momentum: float = 0.9,
    nesterov: bool = True,
    inner_decay: float = 0.0,
    fresh_batches: bool = True,
) -> Algorithm:
    flag("fresh_batches", fresh_batches)
    entropy = R.LocalEntropy(
        inner_steps, entropy_gamma, scoping, noise, inner_lr, averaging, inner_momentum, nesterov, inner_decay
    )
    return always(name, entropy, other_batches=max(inner_steps - 1, 0) if fresh_batches else 0)


# ---------------------------------------------------------------- any measure as a penalty


CHEAP: dict[str, Any] = {"steps": 0, "restarts": 0, "draws": 1, "certify": 0}
"""Measures' options in training, unless others are given: no long search, one draw, no bound."""


def _penalised(measure: str | None = None) -> dict[str, Any]:
    """A measure's options with their defaults in training."""
    if measure is None:
        return {k: v for spec in MEASURES.values() for k, v in spec.options().items()}
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    return {k: CHEAP.get(k, v) for k, v in MEASURES[measure].options().items()}


@family(
    "penalty-MEASURE", "any measure as a penalty: loss + weight · measure, with the measure's own options",
    "Keskar et al. 2017; Yi et al. 2019", pattern="penalty-([a-z_]+)", needs_groups=False, further=_penalised,
)
def penalty(
    name: str, groups: Groups | None, measure: str, *, weight: float = 0.1, weight_growth: float = 1.0,
    gradient: str = "exact", clip: float | None = None, independent_batch: bool = False, **options: Any,
) -> Algorithm:
    check_weight(weight)
    positive("weight_growth", weight_growth)
    flag("independent_batch", independent_batch)
    built = build_measure(measure, groups, **{**_penalised(measure), **options})
    if not isinstance(built, Measure):
        able = [k for k in MEASURES if k != measure]
        raise InputError(f"measure {measure!r} is a function over measures without a gradient of its own; expected one "
                         f"of {', '.join(able[:6])}, …")
    regularizer = R.Penalty(built, gradient, clip)
    return Algorithm(
        name, lambda epoch: regularizer, lambda epoch: weight * weight_growth**epoch, int(independent_batch)
    )
