"""Several networks of one architecture as one network: weights stacked ``[n, …]``, their batches one after the other.

Network i sees examples ``i·B … (i+1)·B − 1`` of a batch of ``n·B``. Layers without parameters or buffers treat
examples one by one and stay as they are; each layer that has some is replaced by one that knows whose examples are
whose: products of matrices become batched ones, normalizers take the statistics of each network's own examples.

Dense layers that follow each other in a ``Sequential`` hand on *columns* ``[n, C, B]``, an example's features across:
that is what a batched product of weights and examples gives, and what batch normalization reads without a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnsharp.errors import InputError


@dataclass
class Layout:
    """Which networks' examples a batch holds.

    Attributes:
        count: n.
        rows: which ones, where it is not all of them.
        updating: whether running statistics move.
    """

    count: int
    rows: Tensor | None = None
    updating: bool = True


class StackedLayer(nn.Module):
    """A layer of n networks: parameters and buffers ``[n, …]`` by the same names (abstract)."""

    weight: Any
    bias: Any

    def __init__(self, layer: nn.Module, tensors: Mapping[str, Tensor], layout: Layout):
        super().__init__()
        self.layout, self.training = layout, layer.training
        for name, p in layer._parameters.items():
            stacked = None if p is None else nn.Parameter(tensors[name], requires_grad=p.requires_grad)
            self.register_parameter(name, stacked)
        for name, b in layer._buffers.items():
            self.register_buffer(name, None if b is None else tensors[name])

    def _apart(self, x: Tensor) -> Tensor:
        """``[n·B, …]`` as ``[n, B, …]``."""
        return x.reshape(self.layout.count, -1, *x.shape[1:])

    def _channels(self, x: Tensor) -> Tensor:
        """``[n·B, C, …]`` as ``[B, n·C, …]``: networks side by side as channels."""
        apart = self._apart(x).transpose(0, 1)
        return apart.reshape(apart.shape[0], -1, *x.shape[2:])

    def _examples(self, x: Tensor) -> Tensor:
        """``[B, n·C, …]`` as ``[n·B, C, …]``."""
        apart = x.reshape(x.shape[0], self.layout.count, -1, *x.shape[2:]).transpose(0, 1)
        return apart.reshape(-1, *apart.shape[2:])


class StackedLinear(StackedLayer):
    """``x_i W_iᵀ + b_i``."""

    def forward(self, x: Tensor) -> Tensor:
        transposed = self.weight.transpose(1, 2)  # [n, in, out]
        rows = x.reshape(len(transposed), -1, x.shape[-1])  # [n, B·…, in]
        if self.bias is None:
            out = torch.bmm(rows, transposed)
        else:
            out = torch.baddbmm(self.bias.unsqueeze(1), rows, transposed)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def columns(self, h: Tensor) -> Tensor:
        """``W_i h_i + b_i``, columns ``[n, in, B]`` to ``[n, out, B]``."""
        if self.bias is None:
            return torch.bmm(self.weight, h)
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, h)


class StackedConv2d(StackedLayer):
    """A convolution with n times as many groups."""

    def __init__(self, layer: nn.Conv2d, tensors: Mapping[str, Tensor], layout: Layout):
        super().__init__(layer, tensors, layout)
        if layer.padding_mode != "zeros":
            raise InputError(f"padding_mode={layer.padding_mode!r} of a convolution; expected 'zeros'")
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.reshape(-1)
        groups = self.groups * self.layout.count
        weight = self.weight.reshape(-1, *self.weight.shape[2:])
        out = F.conv2d(self._channels(x), weight, bias, self.stride, self.padding, self.dilation, groups)
        return self._examples(out)


class StackedBatchNorm(StackedLayer):
    """Batch normalization with the statistics of each network's own examples, which move once where they are to."""

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, tensors: Mapping[str, Tensor],
                 layout: Layout):
        super().__init__(layer, tensors, layout)
        self.eps, self.momentum = layer.eps, layer.momentum

    def forward(self, x: Tensor) -> Tensor:
        return self._examples(self._normalized(self._channels(x)))

    def columns(self, h: Tensor) -> Tensor:
        """On columns ``[n, C, B]``."""
        return self._normalized(h.reshape(1, -1, h.shape[-1])).view(h.shape)

    def _normalized(self, h: Tensor) -> Tensor:
        """On channels ``n·C`` along dimension 1."""
        of_batch = self.training or self.running_mean is None
        moving = of_batch and self.layout.updating and self.running_mean is not None
        mean: Any
        var: Any
        mean, var, factor = self._statistics(moving) if moving or not of_batch else (None, None, 0.0)
        weight, bias = (None if p is None else p.reshape(-1) for p in (self.weight, self.bias))
        out = F.batch_norm(h, mean, var, weight, bias, of_batch, factor, self.eps)
        if moving and self.layout.rows is not None:
            self.running_mean[self.layout.rows] = mean.view(self.layout.count, -1)
            self.running_var[self.layout.rows] = var.view(self.layout.count, -1)
        return out

    def _statistics(self, moving: bool) -> tuple[Tensor, Tensor, float]:
        """Running mean and variance ``[n·C]``, and how far they move."""
        rows, seen = self.layout.rows, self.num_batches_tracked
        if moving and seen is not None:
            if rows is None:
                seen.add_(1)
            else:
                seen[rows] += 1
        first = 0 if rows is None else int(rows[0])
        factor = self.momentum if self.momentum is not None else 1.0 / float(seen[first])
        mean, var = (b if rows is None else b[rows] for b in (self.running_mean, self.running_var))
        return mean.reshape(-1), var.reshape(-1), factor


class StackedLayerNorm(StackedLayer):
    """Layer normalization; scale and shift of each network on its own examples."""

    def __init__(self, layer: nn.LayerNorm, tensors: Mapping[str, Tensor], layout: Layout):
        super().__init__(layer, tensors, layout)
        self.shape, self.eps = layer.normalized_shape, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        out = F.layer_norm(x, self.shape, None, None, self.eps)
        for parameter, join in ((self.weight, torch.mul), (self.bias, torch.add)):
            if parameter is not None:
                out = join(out.reshape(self.layout.count, -1, *self.shape), parameter.unsqueeze(1)).reshape(x.shape)
        return out


LAYERS: dict[type[nn.Module], Callable[[Any, Mapping[str, Tensor], Layout], StackedLayer]] = {
    nn.Linear: StackedLinear,
    nn.Conv2d: StackedConv2d,
    nn.BatchNorm1d: StackedBatchNorm,
    nn.BatchNorm2d: StackedBatchNorm,
    nn.BatchNorm3d: StackedBatchNorm,
    nn.LayerNorm: StackedLayerNorm,
}
"""Layers with parameters or buffers that can be stacked."""

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Identity,
)
"""Layers that treat every number alone, so that columns pass through them as they are."""


class StackedSequential(nn.Sequential):
    """Layers one after the other; dense ones with what lies between them on columns."""

    layout: Layout

    def forward(self, x: Any) -> Any:
        columns = False
        for layer in self:
            if isinstance(layer, StackedLinear | StackedBatchNorm) and (columns or self._enters(layer, x)):
                x = layer.columns(x if columns else x.reshape(self.layout.count, -1, x.shape[1]).transpose(1, 2))
                columns = True
            else:
                if columns and type(layer) not in ELEMENTWISE:
                    x, columns = self._rows(x), False
                x = layer(x)
        return self._rows(x) if columns else x

    def _enters(self, layer: nn.Module, x: Any) -> bool:
        return type(layer) is StackedLinear and isinstance(x, Tensor) and x.ndim == 2

    def _rows(self, h: Tensor) -> Tensor:
        """Columns ``[n, C, B]`` as ``[n·B, C]``."""
        return h.transpose(1, 2).reshape(-1, h.shape[1])


DENSE: tuple[type[nn.Module], ...] = (nn.Linear, nn.BatchNorm1d, nn.LayerNorm)
"""Those that are faster stacked on a CPU: grouped convolutions are not."""


def owning(module: nn.Module) -> dict[str, nn.Module]:
    """Submodules that have parameters or buffers of their own, by name."""
    return {k: m for k, m in module.named_modules() if m._parameters or m._buffers}


def dense(module: nn.Module) -> bool:
    """Whether all layers with parameters are products of matrices or normalizers of vectors."""
    return all(type(m) in DENSE for m in owning(module).values())


def check_stackable(modules: Sequence[nn.Module]) -> None:
    """Raise :class:`InputError` unless the modules have one architecture whose layers :data:`LAYERS` has."""
    first = modules[0]
    for name, layer in owning(first).items():
        what = f"{type(first).__name__} with layer {name!r}, a {type(layer).__name__}"
        if type(layer) not in LAYERS:
            raise InputError(f"{what}; expected layers with parameters to be among "
                             f"{', '.join(kind.__name__ for kind in LAYERS)}: train its seeds one after the other")
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise InputError(f"{what} that has forward hooks; expected none: train its seeds one after the other")
    shared = sum(1 for _ in first.named_parameters(remove_duplicate=False)) - sum(1 for _ in first.named_parameters())
    if shared:
        raise InputError(f"{type(first).__name__} uses {shared} parameter(s) in several places; expected each in one: "
                         "train its seeds one after the other")
    expected = _signature(first)
    for i, module in enumerate(modules):
        if _signature(module) != expected:
            raise InputError(f"network {i} of {len(modules)} has another structure than the first; expected layers, "
                             "shapes and precisions to be the same")


def _signature(module: nn.Module) -> tuple[Any, ...]:
    layers = tuple((k, type(m)) for k, m in module.named_modules())
    tensors = tuple((k, v.shape, v.dtype, v.device) for k, v in module.state_dict().items())
    return layers, tensors, tuple(p.requires_grad for p in module.parameters())


class Stack:
    """Networks whose parameters and buffers are views of one network's, until :meth:`release`.

    Attributes:
        modules: the n networks; whatever changes one of them in place changes the stack, and the other way round.
        network: all of them as one, parameters ``[n, …]`` by the same names.
        layout: whose examples its batches hold.
        parameters: those of ``network`` that require grad, by name.

    Raises:
        InputError: networks that :func:`check_stackable` refuses.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        check_stackable(modules)
        self.modules, self.layout = list(modules), Layout(len(modules))
        self.network = self._joined()
        self.parameters = {k: p for k, p in self.network.named_parameters() if p.requires_grad}
        self._places = {
            name: (store, key) for prefix, m in self.network.named_modules() for store in (m._parameters,)
            for key in store if (name := f"{prefix}.{key}".lstrip(".")) in self.parameters
        }
        self._share()

    def _joined(self) -> nn.Module:
        network = copy.deepcopy(self.modules[0])
        layers = [owning(m) for m in self.modules]
        for name, own in owning(network).items():
            rows = [dict([*m[name]._parameters.items(), *m[name]._buffers.items()]) for m in layers]
            tensors = {
                k: torch.stack([r[k].detach() for r in rows])  # type: ignore[union-attr]
                for k, t in rows[0].items() if t is not None
            }
            layer = LAYERS[type(own)](own, tensors, self.layout)
            if not name:
                return layer
            parent, _, key = name.rpartition(".")
            network.get_submodule(parent)._modules[key] = layer
        for module in network.modules():
            if type(module) is nn.Sequential:
                module.__class__ = StackedSequential
                module.layout = self.layout  # type: ignore[assignment]
        return network

    def _share(self) -> None:
        stacked = dict(self.network.named_modules())
        for i, module in enumerate(self.modules):
            for name, own in owning(module).items():
                for key, p in own._parameters.items():
                    if p is not None:
                        p.data = stacked[name]._parameters[key].data[i]  # type: ignore[union-attr]
                for key, b in own._buffers.items():
                    if b is not None:
                        own._buffers[key] = stacked[name]._buffers[key][i]  # type: ignore[index]

    def release(self) -> None:
        """Every network gets tensors of its own again."""
        for module in self.modules:
            for own in owning(module).values():
                for p in own._parameters.values():
                    if p is not None:
                        p.data = p.data.clone()
                own._buffers.update({k: None if b is None else b.clone() for k, b in own._buffers.items()})

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Put tensors in the places of parameters; what was there, to put back."""
        before = {name: self._places[name][0][self._places[name][1]] for name in tensors}
        for name, tensor in tensors.items():
            store, key = self._places[name]
            store[key] = tensor  # type: ignore[assignment]
        return before
