"""The precision in which a CPU computes a model whose dtype is "auto"."""

from __future__ import annotations

import platform
from typing import Any

import torch

_NARROW = (torch.bfloat16, torch.float16)


def multiplies_natively(dtype: torch.dtype) -> bool:
    """True if this CPU multiplies matrices of this dtype faster than those of float32: bfloat16 with the
    tiles of AMX, or on ARM with its bfloat16 instructions.

    The instructions of AVX-512 for bfloat16 do not count: with them a product takes 1.4 to 2.1 times the time
    of one in float32 (measured at 128 and 512 rows). The answer is read from the CPU and not timed, so that
    a resumed run computes in the same precision.
    """
    if dtype not in _NARROW:
        return True
    if platform.machine().lower() in ("aarch64", "arm64"):
        # A torch without oneDNN, as on Apple's processors, does not have the question either.
        known = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def widen(net: Any, name: str) -> tuple[str, ...]:
    """Convert the weights of a net on the CPU to float32 in place where the CPU does not multiply their dtype
    natively. Returns the sentence that says so, or (). name: the model as the recipe names it.
    """
    stored = net.dtype
    if multiplies_natively(stored):
        return ()
    net.float()
    word = str(stored).removeprefix("torch.")
    return (f"{name} is stored in {word} and computed in float32, because this CPU is slower in {word}.",)
