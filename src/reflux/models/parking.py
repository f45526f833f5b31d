"""Keeps the weights of a frozen model on the CPU while it is not used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Parked:
    """A frozen net whose weights are on the device only within `here`.

    stay: parameters that are always on the device, such as those of the output head, which the loss reads
    later. move: copies a weight to the device.

    The weights on the CPU are kept, in pinned memory where the device is a GPU. So leaving `here` copies
    nothing; it only frees the device's copies.
    """

    def __init__(self, net: nn.Module, stay: Collection[Tensor], move: Callable[[Tensor], Tensor]):
        fixed = {id(tensor) for tensor in stay}
        self._move = move
        self._parameters = [
            parameter for parameter in dict.fromkeys(net.parameters()) if id(parameter) not in fixed
        ]
        self._kept = [_on_cpu(parameter) for parameter in self._parameters]
        self._park()

    @contextmanager
    def here(self) -> Iterator[None]:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.data = self._move(kept)
        try:
            yield
        finally:
            self._park()

    def _park(self) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.data = kept


def _on_cpu(parameter: Tensor) -> Tensor:
    kept = parameter.detach().to("cpu")
    return kept.pin_memory() if parameter.device.type == "cuda" else kept


def to_device(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Copies to that device. From pinned memory the copies need not wait for one another."""
    return lambda kept: kept.to(device, non_blocking=True)
