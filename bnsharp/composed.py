"""Layers made of other operations where their own derivatives of higher order are wrong, missing or slow.

- The second derivative of PyTorch's weight normalization and the third of its layer normalization are wrong without a
  word; batch and instance normalization have no third.
- The second backward pass through a convolution computes ``∂/∂w`` as a convolution with the incoming gradient for a
  kernel, for which there is no fast one on CPUs; the one through batch normalization goes over its input many times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, instance_norm, layer_norm
from torch.overrides import TorchFunctionMode

_FULL = (torch.float32, torch.float64)


class Composed(TorchFunctionMode):
    """Within, layers whose derivatives of this order are wrong, missing or slow are made of other operations.

    Values and derivatives are the same up to rounding wherever PyTorch's own are right.
    """

    def __init__(self, order: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = {f: made for f, (least, made) in _COMPOSED.items() if order >= least}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:  # itself such a function; checkpointed layers repeat their forward pass in it
            with self._patched():
                return func(*args, **(kwargs or {}))
        return self.table.get(func, func)(*args, **(kwargs or {}))

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """The same by name, where a mode is not seen."""
        homes: tuple[Any, ...] = (torch, torch.nn.functional)
        names = {f: str(getattr(f, "__name__", "")) for f in self.table}
        places = [(home, name, f) for f, name in names.items() for home in homes if getattr(home, name, None) is f]
        try:
            for home, name, f in places:
                setattr(home, name, self.table[f])
            yield
        finally:
            for home, name, f in places:
                setattr(home, name, f)


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``; the statistics of the batch are over all but dimension 1."""
    if training:
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        if running_mean is not None or running_var is not None:  # moves them
            with torch.no_grad():
                batch_norm(x.detach(), running_mean, running_var, None, None, True, momentum, eps)
        return _normalized(x, None, None, weight, bias, [0, *range(2, x.ndim)], eps)
    return _normalized(x, running_mean, running_var, weight, bias, [], eps)


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``; the statistics of each example and channel."""
    if use_input_stats:
        if running_mean is not None or running_var is not None:
            with torch.no_grad():
                instance_norm(x.detach(), running_mean, running_var, None, None, True, momentum, eps)
        return _normalized(x, None, None, weight, bias, list(range(2, x.ndim)), eps)
    return _normalized(x, running_mean, running_var, weight, bias, [], eps)


def _normalized(
    x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    dims: list[int], eps: float,
) -> Tensor:
    """``(x − mean)·(weight/√(variance + ε)) + bias`` along dimension 1; own statistics over ``dims`` if none given.

    Half precision is computed in float32, as PyTorch's kernels do.
    """
    shape = [1, -1, *[1] * (x.ndim - 2)]
    full = x if x.dtype in _FULL else x.float()
    if mean is None or variance is None:
        variance, mean = torch.var_mean(full, dims, correction=0, keepdim=True)
    else:
        mean, variance = mean.reshape(shape), variance.reshape(shape)
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight.reshape(shape)
    y = (full - mean) * scale
    return (y if bias is None else y + bias.reshape(shape)).to(x.dtype)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:
    """``torch.nn.functional.layer_norm``: over the last dimensions."""
    variance, mean = torch.var_mean(x, list(range(-len(normalized_shape), 0)), correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: ``g v/‖v‖``, norms over all dimensions but one, or (−1) over all."""
    dims = [i for i in range(v.ndim) if i != dim] if dim != -1 else list(range(v.ndim))
    return v * (g * torch.rsqrt((v * v).sum(dims, keepdim=True)))


# ---------------------------------------------------------------- convolutions


_convolve, _slopes = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
"""``(x, w, bias, *layout) -> y`` and ``(∂/∂y, x, w, bias sizes, *layout, mask) -> (∂/∂x, ∂/∂w, ∂/∂bias)``."""


class _Convolution(torch.autograd.Function):
    """``y = w ∗ x + b``; its backward pass is :class:`_ConvolutionSlopes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, layout: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.layout, ctx.biased = layout, bias is not None
        result: Tensor = _convolve(x, w, bias, *layout)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias = ctx.needs_input_grad[:3]
        mask = (of_x, of_w, ctx.biased and of_bias)
        return *_ConvolutionSlopes.apply(g, x, w, ctx.layout, mask), None  # type: ignore[no-untyped-call]


class _ConvolutionSlopes(torch.autograd.Function):
    """``(g, x, w) ↦ (wᵀ∗g, g⋆x, Σg)``: bilinear, so that its derivatives are convolutions of the same kinds again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, layout: tuple[Any, ...], mask: tuple[bool, ...]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.layout = layout
        return _slopes(g, x, w, [w.shape[0]], *layout, mask)

    @staticmethod
    def backward(ctx: Any, hx: Tensor | None, hw: Tensor | None, hb: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        of_g, of_x, of_w = ctx.needs_input_grad[:3]
        d_g = d_x = d_w = None
        if of_g:
            parts = [] if hx is None else [_convolve(hx, w, None, *ctx.layout)]
            parts += [] if hw is None else [_convolve(x, hw, None, *ctx.layout)]
            parts += [] if hb is None else [hb.reshape(-1, *[1] * (g.ndim - 2)).expand_as(g)]
            d_g = sum(parts[1:], parts[0]) if parts else None
        if of_x and hw is not None:
            d_x = _slopes(g, x, hw, None, *ctx.layout, (True, False, False))[0]
        if of_w and hx is not None:
            d_w = _slopes(g, hx, w, None, *ctx.layout, (False, True, False))[1]
        return d_g, d_x, d_w, None, None


def _convolved(original: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    """``torch.conv1d`` to ``conv3d``; what :class:`_Convolution` does not take goes to the original."""

    def each(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dimensions if len(values) == 1 else values

    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:
        tensors = [t for t in (input, weight, bias) if t is not None]
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        plain = not isinstance(padding, str) and input.ndim == dimensions + 2
        plain = plain and all(type(t) in (Tensor, torch.nn.Parameter) and not wrapped(t) for t in tensors)
        if not plain or torch.is_autocast_enabled(input.device.type):
            return original(input, weight, bias, stride, padding, dilation, groups)
        layout = (each(stride), each(padding), each(dilation), False, [0] * dimensions, groups)
        result: Tensor = _Convolution.apply(input, weight, bias, layout)  # type: ignore[no-untyped-call]
        return result

    return convolution


_COMPOSED: dict[Any, tuple[int, Callable[..., Tensor]]] = {
    torch._weight_norm: (2, _weight_norm),
    torch.layer_norm: (3, _layer_norm),
    layer_norm: (3, _layer_norm),
    batch_norm: (2, _batch_norm),
    instance_norm: (3, _instance_norm),
    **{f: (2, _convolved(f, d)) for d, f in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
}
"""Function -> the order of derivative from which it is composed, and of what."""
