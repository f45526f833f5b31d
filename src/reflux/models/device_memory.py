"""The memory of a device, as token budgets ask for it."""

from __future__ import annotations

from typing import Protocol

import torch


class DeviceMemory(Protocol):
    def free_bytes(self) -> int:
        """Bytes that torch can still take."""
        ...

    def begin(self) -> None:
        """Begin to measure `taken_bytes`."""
        ...

    def taken_bytes(self) -> int:
        """The most bytes that were in use at the same time since `begin`, above those in use then."""
        ...


class CudaMemory:
    """The memory of one GPU. What torch holds and does not use counts as free."""

    def __init__(self, device: torch.device):
        self.device, self._before = device, 0

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + held

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def taken_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self._before


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of the device; None where it is not measured."""
    return CudaMemory(device) if device.type == "cuda" else None
