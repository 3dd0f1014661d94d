"""One walk over a module: its parameters, every place where one of them sits, its normalizers' running statistics.

A training step asks for these in every pass, and walking a module anew each time took longer than a small network's
pass itself.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn

from bnsharp.params import unwrap

Place = tuple[dict[str, Any], str]
"""A module's own dictionary and the key under which it holds a tensor."""


class Structure:
    """A module (inside its wrappers) as it is now: valid until submodules or parameters are added, replaced or removed.

    Attributes:
        module: the module.
        parameters: by the names of ``named_parameters()``, a tied one once, in that order.
        owners: submodules that own a ``running_mean``, in order.
    """

    def __init__(self, module: nn.Module):
        self.module = unwrap(module)
        self.parameters: dict[str, nn.Parameter] = {}
        self.owners: list[nn.Module] = []
        self._places: dict[str, list[Place]] = {}
        self._names: dict[int, str] = {}
        self._seen: set[int] = set()
        self._held: list[tuple[dict[str, Any], list[Any]]] = []
        self._visit(self.module, "")

    def _visit(self, module: nn.Module, prefix: str) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if owns_statistics(module):
            self.owners.append(module)
        store = module._parameters
        self._held += [(d, list(d.values())) for d in (store, module._modules)]
        for key, parameter in store.items():
            if parameter is None:
                continue
            name = self._names.get(id(parameter))
            if name is None:
                name = self._names[id(parameter)] = prefix + key
                self.parameters[name] = parameter
                self._places[name] = []
            self._places[name].append((store, key))
        for key, child in module._modules.items():
            if child is not None:
                self._visit(child, f"{prefix}{key}.")

    def is_of(self, module: nn.Module) -> bool:
        """Whether this is the module's structure still: no parameter or submodule was added, replaced or removed."""
        for now, then in self._held:
            if len(now) != len(then) or (then and not all(map(is_, now.values(), then))):
                return False
        return self.module is unwrap(module)

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that require grad."""
        return [(name, p) for name, p in self.parameters.items() if p.requires_grad]

    def places(self, name: str) -> list[Place]:
        """Where a parameter sits: several places for a tied one, none for a name that is no parameter's."""
        return self._places.get(name, [])


def owns_statistics(module: nn.Module) -> bool:
    """Whether a module has running statistics of its own, switched off or not."""
    return "running_mean" in module._buffers or "running_mean" in module.__dict__
