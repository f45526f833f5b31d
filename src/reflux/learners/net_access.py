"""`WeightAccess` to a network in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reflux.learners import adapters


class NetAccess:
    """written: names of untrained parameters that were written to."""

    def __init__(self, net: nn.Module, trained: Iterable[Tensor]):
        self._net = net
        self._trained = {id(parameter) for parameter in trained}
        self.written: set[str] = set()

    @property
    def names(self) -> Sequence[str]:
        return list(adapters.homes(self._net))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        homes, names = adapters.homes(self._net), list(names)
        for name in names:
            adapters.refuse_narrow(name, homes[name])
        return {name: _copy(value) for name, value in adapters.merged(self._net, frozenset(names)).items()}

    def base(self, names: Iterable[str]) -> dict[str, Tensor]:
        homes = adapters.homes(self._net)
        return {name: _copy(adapters.refuse_narrow(name, homes[name])) for name in names}

    @torch.no_grad()
    def write(self, base: Mapping[str, Tensor]) -> None:
        homes = adapters.homes(self._net)
        for name, value in base.items():
            home = adapters.refuse_narrow(name, homes[name])
            home.copy_(value)
            if id(home) not in self._trained:
                self.written.add(name)


def _copy(value: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return value.detach().to("cpu", copy=True)
