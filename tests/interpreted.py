"""Triton kernels without a GPU: its interpreter runs them on CPU tensors, slowly."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from device import ON_GPU
from reflux.kernels import triton_launch


@contextmanager
def interpreted(block: int = 32) -> Iterator[None]:
    """Blocks of few logits, so that small tables have several; without a GPU, kernels and Triton's own
    reductions are interpreted.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "BLOCK", block)
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
            import triton.language
            from triton.runtime.interpreter import InterpretedFunction

            for name in ("sum", "max", "min"):
                # compiled ones, if something imported Triton earlier in this process
                reduction = getattr(triton.language, name)
                if not isinstance(reduction, InterpretedFunction):
                    patch.setattr(triton.language, name, InterpretedFunction(reduction.fn))
            from reflux.kernels import triton_kernels, triton_terms, triton_top

            for module in (triton_terms, triton_kernels, triton_top):
                importlib.reload(module)
        yield
