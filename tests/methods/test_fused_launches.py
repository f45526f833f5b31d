"""What the loss launches on a GPU for a block and for a chunk of rows, and that Python never waits for the
device: counted on a CPU, with Triton's interpreter.
"""

from __future__ import annotations

import gc
import weakref
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from counted import Counted
from device import DEVICE
from interpreted import interpreted
from reflux.kernels import budget, fused_pass, products
from reflux.kernels.head import Head
from reflux.loss import gradients
from reflux.loss.linear_divergence import linear_divergence
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.sampled_kl import SampledKL

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
V = 400
ONE = {"row_statistics": 1, "row_gradient": 1}
# (objective, launches for a block, most calls of torch for a block)
OBJECTIVES = [
    *((Divergence(divergence=kind), ONE, 30) for kind in ("reverse", "jsd", "tv")),
    (Divergence(ratio="truncated"), ONE, 45),
    (NLL(), ONE, 40),
    *((SampledKL(baseline=baseline), ONE, 55) for baseline in ("none", "kl", "minimum_variance")),
    (SampledKL(baseline="topk_kl"), ONE | {"row_candidates": 1}, 65),
    # the tails of the list are a launch of their own
    (Divergence(support="student"), ONE | {"row_candidates": 1, "row_statistics": 2}, 110),
]


def counted(n: int, objective: Any) -> Counted:
    """Forward and backward of n rows, in chunks of two blocks of two rows; some coefficients are 0."""
    h_NH, w_VH, t_NH, u_VH = (torch.randn(rows, 4, device=DEVICE) for rows in (n, V, n, V))
    ids_N, coef_N = torch.randint(V, (n,), device=DEVICE), torch.arange(n, device=DEVICE) % 3.0
    with interpreted(512), Counted() as counts:
        answer = linear_divergence(
            h_NH.requires_grad_(),
            Head.of(w_VH.requires_grad_()),
            t_NH,
            Head.of(u_VH),
            ids_N,
            coef_N,
            objective,
        )
        answer.loss.backward()
    return counts


@pytest.mark.parametrize(("objective", "launches", "calls"), OBJECTIVES, ids=str)
def test_each_block_is_read_and_written_by_few_launches_and_nothing_waits(
    objective: Any, launches: dict[str, int], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_pass, "fused_rows", lambda *_: (4, 2))
    monkeypatch.setattr(gradients, "_may_look", lambda tensor: False)
    few, more = counted(4, objective), counted(8, objective)
    # of the one chunk by which the two differ: two blocks
    assert more.launches - few.launches == {name: 2 * count for name, count in launches.items()}
    # both heads for each block, and the gradients of head and hidden states
    assert more.products - few.products == 2 * 2 + 2
    assert few.waits == more.waits == 0
    # small calls by which objectives and records combine numbers of a row
    assert more.kernels - few.kernels <= 2 * calls


def test_no_table_outlives_its_block_even_without_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_pass, "fused_rows", lambda *_: (4, 2))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    wide = products.wide_scores

    def watched(*factors: torch.Tensor) -> torch.Tensor:
        nonlocal most
        made = wide(*factors)
        alive.append(weakref.ref(made))
        most = max(most, sum(table() is not None for table in alive))
        return made

    monkeypatch.setattr(products, "wide_scores", watched)
    gc.disable()
    try:
        for objective in (Divergence(), SampledKL(baseline="kl"), Divergence(support="student", k=20)):
            counted(8, objective)
    finally:
        gc.enable()
    # student and teacher of one block
    assert (len(alive), most) == (3 * 8, 2)


def test_rows_are_shared_out_evenly_within_the_budget() -> None:
    """The benchmark's largest shape has two chunks of eight blocks, and its peak is under 3.2 GB: the head's
    gradient in float32, one chunk's gradient in bfloat16, one block's logits, the gradient of the rows.
    """
    rows, vocabulary, hidden = 8192, 151_936, 2048
    chunk, block = budget.fused_rows(rows, vocabulary, 2, 2)
    assert (chunk, block) == (4096, 512)
    peak = 4 * vocabulary * hidden + 2 * chunk * vocabulary + 2 * 4 * block * vocabulary + 2 * rows * hidden
    assert peak < 3.2e9
    for rows in (0, 1, 127, 129, 1000, 5000, 32_768):
        for vocabulary in (100, 32_000, 151_669, 600_000):
            chunk, block = budget.fused_rows(rows, vocabulary, 3, 4)
            assert chunk % 128 == block % 128 == 0
            assert 128 <= block <= chunk < rows + 256
            assert chunk == 128 or 4 * chunk * vocabulary <= 1.35e9
            assert block == 128 or 3 * 4 * block * vocabulary <= 0.68e9
