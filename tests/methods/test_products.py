"""The three products of an output head against float64 matrix products, on whichever path they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflux.kernels import products

SIZES = st.integers(1, 40)
LAYOUTS = st.sampled_from(["dense", "transposed", "sliced"])
# relative to the sum of absolute terms
TYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}


class Path:
    """Sets the threshold to one side, the block's size, and counts the calls of the fast operator."""

    def __init__(self, patch: pytest.MonkeyPatch, fast: bool, block: int):
        self.calls, operator = 0, products._by_onednn
        patch.setattr(products, "_WORTH_FLOPS", 0 if fast else 1 << 60)
        patch.setattr(products, "_BLOCK", block)
        patch.setattr(products, "_DEEP", 0)

        def counted(*factors: Tensor) -> Tensor:
            self.calls += 1
            return operator(*factors)

        patch.setattr(products, "_by_onednn", counted)


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Random numbers, next to each other in memory, by columns, or in the middle of a larger table."""
    table = torch.randn(rows + 3, columns + 5, generator=rng, dtype=torch.float64).to(dtype)
    if layout == "sliced":
        return table[2 : 2 + rows, 3 : 3 + columns]
    dense = table[:rows, :columns].contiguous()
    return dense.t().contiguous().t() if layout == "transposed" else dense


def check(made: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, start: Tensor | float = 0.0) -> None:
    """made = start + a @ b up to rounding."""
    exact, size = (
        start + a.double() @ b.double(),
        abs(torch.as_tensor(start)) + a.double().abs() @ b.double().abs(),
    )
    assert made.shape == exact.shape
    assert ((made.double() - exact).abs() <= TYPES[dtype] * size).all()


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    dtype=st.sampled_from(list(TYPES)),
    fast=st.booleans(),
    block=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_each_product_is_the_float64_one(
    sizes: Any, layouts: Any, dtype: torch.dtype, fast: bool, block: int, seed: int
) -> None:
    (n, v, h), rng = sizes, torch.Generator().manual_seed(seed)
    weight, states, d = (
        matrix(*shape, layouts[i], dtype, rng) for i, shape in ((0, (v, h)), (1, (n, h)), (1, (n, v)))
    )
    before = [tensor.clone() for tensor in (weight, states, d)]
    with pytest.MonkeyPatch.context() as patch:
        path = Path(patch, fast, block)
        check(products.scores(states, weight), states, weight.t(), dtype)
        check(products.pull_back(d, weight), d, weight, dtype)
        check(products.outer(d, states), d.t(), states, dtype)
        for wide in {dtype, torch.promote_types(dtype, torch.float32), torch.float64}:
            start = torch.randn(v + 2, h, generator=rng, dtype=torch.float64).to(wide)
            total = start.clone()
            products.add_outer(total[:v], d, states)
            check(total[:v], d.t(), states, dtype, start[:v].double())
            assert torch.equal(total[v:], start[v:])
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, states, d), strict=True))
    assert bool(path.calls) == (fast and dtype == torch.float32)


def test_large_matrices_take_the_fast_path_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(monkeypatch, fast=True, block=4096)
    monkeypatch.setattr(products, "_WORTH_FLOPS", 1 << 25)
    rng = torch.Generator().manual_seed(0)
    for v, blocks in ((8191, 0), (8192, 2), (9000, 3)):
        # 2 * 64 * 32 * 8192 is the threshold
        weight, states, d = (
            matrix(*shape, "dense", torch.float32, rng) for shape in ((v, 32), (64, 32), (64, v))
        )
        total, before = torch.zeros(v, 32), path.calls
        check(products.scores(states, weight), states, weight.t(), torch.float32)
        check(products.pull_back(d, weight), d, weight, torch.float32)
        products.add_outer(total, d, states)
        check(total, d.t(), states, torch.float32)
        assert path.calls - before == 3 * blocks


def test_a_wide_sum_keeps_what_a_narrow_one_loses() -> None:
    """4,096 ones onto 4,096: bfloat16 counts to 256 and stops."""
    ones_NV, ones_NH = torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    narrow, wide = torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(3, 2)
    for _ in range(4096):
        products.add_outer(narrow, ones_NV, ones_NH)
        products.add_outer(wide, ones_NV, ones_NH)
    assert (wide == 4096).all()
    assert (narrow == 256).all()


class OnGpu(Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]  # pyright: ignore


@pytest.mark.parametrize("dtype", TYPES)
def test_wide_scores_of_any_precision_where_a_gpu_widens_only_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mm(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        assert out_dtype is None or (a.element_size() == 2 and out_dtype == torch.float32)
        assert a.dtype == (torch.float32 if out_dtype is None else dtype)
        return out.copy_(a.double() @ b.double())

    monkeypatch.setattr(torch, "mm", mm)
    h_NH, weight_VH = (torch.randn(rows, 6, dtype=torch.float64).to(dtype) for rows in (3, 70))
    made = products.wide_scores(h_NH.as_subclass(OnGpu), weight_VH).as_subclass(Tensor)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), h_NH.double() @ weight_VH.double().t(), rtol=0, atol=1e-5)
