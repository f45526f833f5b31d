"""Implements `WeightAccess` for a network in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reflux.models import lora
from reflux.models.dtensors import divided_like, gathered


class NetAccess:
    """Reads and writes the weights of a network. `written` holds the names of the untrained parameters that
    `write` has written. If several processes share the network, all of them call each method together.
    """

    def __init__(self, net: nn.Module, trained: Iterable[Tensor]):
        self._net = net
        self._trained = {id(parameter) for parameter in trained}
        self.written: set[str] = set()

    @property
    def names(self) -> Sequence[str]:
        return list(lora.base_parameters(self._net))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        base_parameters, names = lora.base_parameters(self._net), list(names)
        for name in names:
            lora.refuse_narrow(name, base_parameters[name])
        return {name: _copy(value) for name, value in lora.merged(self._net, frozenset(names)).items()}

    def base(self, names: Iterable[str]) -> dict[str, Tensor]:
        base_parameters = lora.base_parameters(self._net)
        return {name: _copy(lora.refuse_narrow(name, base_parameters[name])) for name in names}

    @torch.no_grad()
    def write(self, base: Mapping[str, Tensor]) -> None:
        base_parameters = lora.base_parameters(self._net)
        for name, value in base.items():
            base_parameter = lora.refuse_narrow(name, base_parameters[name])
            base_parameter.copy_(divided_like(base_parameter, value))
            if id(base_parameter) not in self._trained:
                self.written.add(name)


def _copy(value: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory with `value`."""
    return gathered(value.detach()).to("cpu", copy=True)
