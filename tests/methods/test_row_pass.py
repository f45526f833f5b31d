"""The pass under every loss: rows in order, constants, precision of the head's gradient, and memory as a
property of the operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reflux.kernels import budget, products, row_pass
from reflux.kernels.head import Head
from reflux.loss.linear_divergence import linear_divergence
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL

close = torch.testing.assert_close


def random(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=rng, dtype=dtype) for shape in shapes]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_pass, "chunk_rows", lambda vocabulary, device, tables: 5)
    monkeypatch.setattr(row_pass, "block_rows", lambda vocabulary, device: 2)


@pytest.mark.usefixtures("small_slices")
def test_two_constants_and_every_row_once_in_order() -> None:
    h_NH, weight_VH, g_NG, weight_VG, f_NF, weight_VF = random(
        0, (17, 4), (8, 4), (17, 3), (8, 3), (17, 2), (8, 2)
    )
    for tensor in (h_NH, weight_VH, g_NG, weight_VG):
        tensor.requires_grad_()
    counted: list[int] = []

    def cost(rows: slice, student_NV: Tensor, one_NV: Tensor, other_NV: Tensor) -> Tensor:
        row_N = torch.arange(17.0)[rows, None]
        return (row_N * student_NV.softmax(-1) * (one_NV - 3 * other_NV.square())).sum()

    def row_loss(rows: slice, logits_NV: Tensor, tables: list[Tensor]) -> Tensor:
        counted.extend(range(17)[rows])
        assert not any(table.requires_grad for table in tables)
        return cost(rows, logits_NV, *tables)

    capped = Head.of(weight_VF, scale=0.5, cap=1.5)
    loss = row_pass.row_pass(h_NH, Head.of(weight_VH), [(g_NG, Head.of(weight_VG)), (f_NF, capped)], row_loss)
    plain = cost(
        slice(0, 17),
        h_NH @ weight_VH.T,
        (g_NG @ weight_VG.T).detach(),
        1.5 * torch.tanh(0.5 * f_NF @ weight_VF.T / 1.5),
    )
    close(loss, plain)
    close(torch.autograd.grad(loss, (h_NH, weight_VH)), torch.autograd.grad(plain, (h_NH, weight_VH)))
    assert counted == list(range(17))


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("silent", [lambda n: True, lambda n: n < 4])
def test_a_loss_may_be_a_constant_at_some_rows_or_at_all(silent: Callable[[int], bool]) -> None:
    h_NH, weight_VH = (tensor.requires_grad_() for tensor in random(0, (10, 4), (8, 4)))

    def row_loss(rows: slice, logits_NV: Tensor, tables: list[Tensor]) -> Tensor:
        return torch.tensor(3.0 * len(logits_NV)) if silent(rows.start) else logits_NV.square().sum()

    loss = row_pass.row_pass(h_NH, Head.of(weight_VH), [], row_loss)
    loud_N = torch.tensor([not silent(n) for n in range(10)])
    plain = ((h_NH @ weight_VH.T).square().sum(-1) * loud_N).sum()
    close(loss, plain + 3 * (~loud_N).sum())
    close(torch.autograd.grad(loss, (h_NH, weight_VH)), torch.autograd.grad(plain, (h_NH, weight_VH)))


@pytest.mark.usefixtures("small_slices")
def test_constants_carry_no_graph_even_where_nothing_else_does() -> None:
    h_NH, weight_VH, g_NG, weight_VG = random(0, (10, 4), (8, 4), (10, 3), (8, 3))
    weight_VG.requires_grad_()

    def row_loss(rows: slice, logits_NV: Tensor, tables: list[Tensor]) -> Tensor:
        assert not tables[0].requires_grad
        return (logits_NV * tables[0]).sum()

    loss = row_pass.row_pass(h_NH, Head.of(weight_VH), [(g_NG, Head.of(weight_VG))], row_loss)
    close(loss, ((h_NH @ weight_VH.T) * (g_NG @ weight_VG.T)).sum().detach())


def test_no_rows_cost_nothing_and_give_zero_gradients() -> None:
    h_NH, weight_VH = (tensor.requires_grad_() for tensor in random(0, (0, 4), (8, 4)))
    loss = row_pass.row_pass(h_NH, Head.of(weight_VH), [], lambda *_: pytest.fail("there is no row"))
    grads = torch.autograd.grad(loss, (h_NH, weight_VH))
    assert float(loss.detach()) == 0
    assert (grads[0].shape, grads[1].shape) == ((0, 4), (8, 4))
    assert (grads[1] == 0).all()


def test_a_bfloat16_heads_gradient_is_rounded_once_however_many_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positive terms, a chunk each. A term is rounded to bfloat16 and so is the sum: at most 2^-8 relative.
    Adding in bfloat16 stalls.
    """
    monkeypatch.setattr(row_pass, "chunk_rows", lambda vocabulary, device, tables: 1)
    rng = torch.Generator().manual_seed(0)
    h_NH, weight_VH, d_NV, bias_V = (
        torch.rand(*shape, generator=rng).bfloat16() for shape in ((600, 4), (7, 4), (600, 7), (7,))
    )
    leaves = [h_NH.requires_grad_(), weight_VH.requires_grad_(), bias_V.requires_grad_()]
    loss = row_pass.row_pass(
        h_NH, Head.of(weight_VH, bias_V), [], lambda rows, logits_NV, _: (d_NV[rows] * logits_NV).sum()
    )
    made_NH, made_VH, made_V = torch.autograd.grad(loss, leaves)
    exact_VH, narrow_VH = d_NV.double().T @ h_NH.detach().double(), torch.zeros_like(weight_VH)
    with torch.no_grad():
        for d_V, h_H in zip(d_NV, h_NH, strict=True):
            narrow_VH += torch.outer(d_V, h_H)

    def error(made: Tensor, exact: Tensor) -> float:
        return float((made.double() / exact - 1).abs().max())

    assert made_NH.dtype == made_VH.dtype == made_V.dtype == torch.bfloat16
    assert error(made_VH, exact_VH) < 2**-8
    assert error(narrow_VH, exact_VH) > 20 * 2**-8
    assert error(made_V, d_NV.double().sum(0)) < 2**-8
    assert error(made_NH, d_NV.double() @ weight_VH.detach().double()) < 2**-8


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("small_slices")
def test_bfloat16_by_weight_or_by_autocast_rounds_the_products_and_nothing_else(autocast: bool) -> None:
    """Small whole numbers have exact bfloat16 logits: costs and by-products are those of float64, gradients
    within a rounding.
    """
    whole = [
        (2 * tensor).round().clamp(-3, 3) / 2
        for tensor in random(0, (40, 5), (20, 5), (20,), (40, 3), (20, 3))
    ]
    h_NH, weight_VH, bias_V, g_NG, weight_VG = whole
    leaves = [tensor.requires_grad_() for tensor in whole[:3]]
    ids_N, coef_N = torch.arange(40) % 20, torch.linspace(-1, 3, 40, dtype=torch.float64)
    s_NV, t_NV = (h_NH @ weight_VH.T + bias_V).log_softmax(-1), (g_NG @ weight_VG.T).log_softmax(-1)
    kl_N, entropy_N = (s_NV.exp() * (s_NV - t_NV)).sum(-1), -(s_NV.exp() * s_NV).sum(-1)
    expected = torch.autograd.grad((coef_N * kl_N).sum(), leaves)
    narrow = [
        tensor.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for tensor in whole
    ]
    heads = Head.of(narrow[1], narrow[2]), Head.of(narrow[4])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = linear_divergence(narrow[0], heads[0], narrow[3], heads[1], ids_N, coef_N.float())
    for made_N, right_N in ((answer.kl_N, kl_N), (answer.cost_N, kl_N), (answer.entropy_N, entropy_N)):
        assert made_N.dtype == torch.float32
        close(made_N, right_N.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    close(answer.loss.detach(), (coef_N * kl_N).sum().detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    for leaf, made, right in zip(
        narrow, torch.autograd.grad(answer.loss, narrow[:3]), expected, strict=False
    ):
        assert made.dtype == leaf.dtype
        assert (made - right).norm() < 2**-7 * right.norm()


@pytest.mark.parametrize("threshold", [0, 1 << 60])
def test_at_home_nothing_is_left_under_autocast_either(
    threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher are rounded alike, whatever path the products take; so are runs with and without
    gradients.
    """
    monkeypatch.setattr(products, "_WORTH_FLOPS", threshold)
    h_NH, weight_VH, bias_V = (
        tensor.requires_grad_() for tensor in random(0, (20, 5), (30, 5), (30,), dtype=torch.float32)
    )
    inputs = (
        h_NH,
        Head.of(weight_VH, bias_V),
        h_NH,
        Head.of(weight_VH, bias_V),
        torch.arange(20),
        torch.ones(20),
    )
    with torch.autocast("cpu", torch.bfloat16):
        answer = linear_divergence(*inputs)
        with torch.no_grad():
            assert torch.equal(linear_divergence(*inputs).logp_N, answer.logp_N)
    assert (answer.kl_N == 0).all()
    assert all(
        gradient.abs().max() < 1e-5
        for gradient in torch.autograd.grad(answer.loss, (h_NH, weight_VH, bias_V))
    )


# --- memory


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation gives, in numbers, and the most bytes alive at once of all that
    they gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.peak_bytes = 0, 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [
            tensor
            for tensor in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(tensor, Tensor)
        ]
        self.largest = max([self.largest, *(tensor.numel() for tensor in given)])
        tensors = [*given, *(tensor for reference in self.alive if (tensor := reference()) is not None)]
        self.alive = [weakref.ref(tensor) for tensor in tensors]
        stores = [tensor.untyped_storage() for tensor in tensors]
        self.peak_bytes = max(
            self.peak_bytes, sum({store.data_ptr(): store.nbytes() for store in stores}.values())
        )
        return out


V, H, G = 500, 6, 9
# numbers in a table of the fewest rows
CHUNK = 16 * V


def recorded(n: int, objective: Any, plain: bool = False) -> Recorder:
    """Forward and backward of n rows under the recorder."""
    h_NH, weight_VH, g_NG, weight_VG = random(0, (n, H), (V, H), (n, G), (V, G), dtype=torch.float32)
    for leaf in (h_NH, weight_VH):
        leaf.requires_grad_()
    # coefficients of 0 among them
    ids_N, coef_N = torch.arange(n) % V, torch.arange(n) % 3.0
    with Recorder() as recorder:
        if plain:
            s, t = (h_NH @ weight_VH.T).log_softmax(-1), (g_NG @ weight_VG.T).log_softmax(-1)
            loss = (coef_N * (s.exp() * (s - t)).sum(-1)).sum()
        else:
            loss = linear_divergence(
                h_NH, Head.of(weight_VH), g_NG, Head.of(weight_VG), ids_N, coef_N, objective, top_k=3
            ).loss
        loss.backward()
    assert h_NH.grad is not None
    return recorder


@pytest.mark.parametrize(
    "objective",
    [Divergence(), Divergence(divergence="jsd"), Divergence(support="union", k=5), SampledKL(baseline="kl")],
)
def test_no_table_of_all_rows_is_ever_made(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little the budget allows: no tensor beyond one chunk, and nothing of a chunk survives it."""
    monkeypatch.setattr(budget, "_TABLE_BYTES", {"cpu": 1})
    monkeypatch.setattr(budget, "_BLOCK_FLOATS", {"cpu": 1})
    few, many = recorded(40, objective), recorded(160, objective)
    assert max(few.largest, many.largest) == CHUNK
    # hidden states, their gradient, and what the answer says of a row
    row_bytes = 4 * (2 * H + G) + 8 * 16
    assert many.peak_bytes - few.peak_bytes <= 120 * row_bytes
    # bytes
    block = 4 * 4 * V
    assert few.peak_bytes <= 2 * 4 * CHUNK + 2 * 4 * V * H + 12 * block + 40 * row_bytes


def test_the_plain_computation_does_make_them() -> None:
    few, many = recorded(40, None, plain=True), recorded(160, None, plain=True)
    assert (few.largest, many.largest) == (40 * V, 160 * V)
    assert many.peak_bytes - few.peak_bytes > 3 * 4 * 120 * V
