"""The kernels compile for an H100 (sm_90), without a GPU: the interpreter takes things that the compiler
refuses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)

TABLE = {"ptr": "*fp32", "stride": "i32", "filled": "i32", "scale": "fp32", "cap": "fp32"}
TABLES = {f"{one}_{name}": kind for one in "st" for name, kind in TABLE.items()}
NUMBERS = {"ids_ptr": "*i64", "sums_ptr": "*fp32", "width": "i32", "share": "fp32"}
WRITTEN = {"coefs_ptr": "*fp32", "rest_ptr": "*fp32", "d_ptr": "*bf16", "d_stride": "i32", "d_filled": "i32"}
LIST = {"x_ptr": "*fp32", "stride": "i32", "filled": "i32", "found_ptr": "*i64", "counts_ptr": "*i32"}
DRAWN = {"key_ptr": "*i64", "position_ptr": "*i64", "token_ptr": "*i64"}
LSES = {"lse_ptr": "*fp32", "tempered_ptr": "*fp32", "inverse": "fp32"}
# by the names of all kernels' arguments; everything else is a constant
TYPES = {**TABLES, **NUMBERS, **WRITTEN, **LIST, **DRAWN, **LSES, "k": "i32"}
CASES: dict[str, dict[str, Any]] = {
    "triton_kernels.row_statistics": {"KIND": "jsd", "S_CAPPED": True, "T_CAPPED": False},
    "triton_kernels.row_gradient": dict.fromkeys(("S_CAPPED", "T_CAPPED", "TOKEN", "TAIL", "ADD"), True)
    | {"KIND": "alpha"},
    "triton_top.row_candidates": {"ROOM": 128},
    "triton_draw_kernel.draw_row": {},
}


def compile_kernel(name: str, constants: dict[str, Any]) -> str:
    """The PTX of one kernel with the shipped block, where pointers and sizes are multiples of 16."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reflux.kernels.triton_launch import BLOCK, WARPS

    module, _, function = name.partition(".")
    kernel = getattr(import_module(f"reflux.kernels.{module}"), function)
    given = {**constants, "BLOCK": BLOCK}
    types = {argument: TYPES.get(argument, "constexpr") for argument in kernel.arg_names}
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, kind) in enumerate(types.items())
        if kind[0] == "*" or argument.endswith(("stride", "filled"))
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=given, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS}).asm["ptx"]


def test_each_kernel_compiles_and_loads_sixteen_bytes_at_once(tmp_path: Any) -> None:
    # Another process, because the interpreter may have replaced the kernels of this one.
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # The draw reads logits of any precision, and rows that may begin anywhere.
    assert done.stdout.split() == [name for name in CASES if name != "triton_draw_kernel.draw_row"]


if __name__ == "__main__":
    for case, its_constants in CASES.items():
        if "ld.global.v4" in compile_kernel(case, its_constants):
            print(case)
