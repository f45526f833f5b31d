"""Counts what a GPU would have to do and to wait for, on a CPU: launches of fused kernels, calls of torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from reflux.kernels import triton_rows

# Calls whose result Python must know before it goes on, and so waits for the device
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")
# Calls that only look at a tensor in another way, or reserve memory
FREE = (
    *("aten.view", "aten.slice", "aten.select", "aten.detach", "aten.t.", "aten.transpose", "aten.expand"),
    *("aten.unsqueeze", "aten.squeeze", "aten.alias", "aten.empty", "aten.new_empty", "aten.as_strided"),
    *("aten.split", "aten._unsafe_view", "aten.unbind", "prim.device", "aten.lift_fresh"),
)


class Counted(TorchDispatchMode):
    """`calls` by the name of the operator, `launches` by the name of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Counted:
        run = triton_rows.launch

        def launch(kernel: Any, *arguments: Any) -> None:
            self.launches[kernel.fn.__name__] += 1
            # What the interpreter does is no work of a GPU.
            with _disable_current_modes():
                run(kernel, *arguments)

        self.patch.setattr(triton_rows, "launch", launch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def named(self, *starts: str) -> int:
        return sum(count for name, count in self.calls.items() if name.startswith(starts))

    @property
    def waits(self) -> int:
        return self.named(*WAITS)

    @property
    def products(self) -> int:
        return self.named("aten.mm", "aten.addmm")

    @property
    def kernels(self) -> int:
        """All that is launched: fused kernels, products, and every other call of torch that computes."""
        return sum(self.launches.values()) + self.calls.total() - self.named(*FREE)
