"""Values on their way between processes, with the bytes of their tensors and arrays apart.

Ray keeps such bytes in shared memory and copies nothing. It pickles a torch tensor as a whole instead, which
copies it several times.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A pickled value. arrays: the bytes of its tensors and arrays, in the order in which they are read."""

    data: bytes
    arrays: tuple[np.ndarray, ...]

    def value(self) -> Any:
        """The value, in memory of its own: Ray's memory cannot be written to, and is free afterwards."""
        return pickle.loads(self.data, buffers=[bytearray(each.data) for each in self.arrays])


def packed(value: Any) -> Packed:
    """value: anything that pickle takes. Its tensors arrive on the CPU."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    arrays = tuple(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers)
    return Packed(file.getvalue(), arrays)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        # Only the elements that the tensor shows: a view would bring its whole storage.
        bytes_N = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (np.asarray(bytes_N), obj.dtype, tuple(obj.shape))


def _tensor(bytes_N: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(bytes_N).view(dtype).reshape(shape)
