"""`FullLogits` by fused kernels says what `FullLogits` by tables says, through every objective: values,
gradients, by-products.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from device import DEVICE, ON_GPU
from interpreted import interpreted
from reflux.kernels.head import Head
from reflux.kernels.raw_table import RawTable
from reflux.kernels.triton_launch import usable
from reflux.loss import fused_gradient
from reflux.loss.fused_outputs import FusedStudent
from reflux.loss.linear_divergence import Answer, linear_divergence
from reflux.loss.outputs import FullLogits
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL

if find_spec("triton") is None:
    pytest.skip(
        "Triton is not installed: pip install triton, and these tests run without a GPU",
        allow_module_level=True,
    )

# numpy's word on inf - inf inside the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
OBJECTIVES = [
    Divergence(),
    Divergence(divergence="forward"),
    Divergence(divergence="jsd", beta=0.3),
    Divergence(divergence="tv"),
    Divergence(support="student", k=4),
    Divergence(support="teacher", k=4, divergence="forward"),
    Divergence(support="union", k=4),
    Divergence(support="student", k=4, tail="renormalised"),
    Divergence(ratio="truncated"),
    SampledKL(),
    SampledKL(baseline="kl"),
    SampledKL(baseline="topk_kl", baseline_k=4),
    SampledKL(baseline="minimum_variance", ratio="clip"),
]


def answer(objective: Any, dtype: torch.dtype, cap: float | None) -> tuple[Answer, list[torch.Tensor]]:
    """A loss of 9 rows over 70 tokens, and the gradients of hidden states and head."""
    rng = torch.Generator().manual_seed(0)
    student_NH, teacher_NG = torch.randn(9, 6, generator=rng), torch.randn(9, 10, generator=rng)
    weight_VH, weight_VG = torch.randn(70, 6, generator=rng), torch.randn(70, 10, generator=rng)
    student_NH, weight_VH = (tensor.to(DEVICE, dtype).requires_grad_() for tensor in (student_NH, weight_VH))
    teacher_NG, weight_VG = (tensor.to(DEVICE, dtype) for tensor in (teacher_NG, weight_VG))
    ids_N, coef_N = (
        torch.randint(0, 70, (9,), generator=rng).to(DEVICE),
        torch.rand(9, generator=rng).to(DEVICE),
    )
    coef_N[4] = 0
    behaviour_N = torch.full((9,), -4.0, device=DEVICE)
    heads = Head.of(weight_VH, cap=cap), Head.of(weight_VG, scale=0.5)
    made = linear_divergence(
        student_NH,
        heads[0],
        teacher_NG,
        heads[1],
        ids_N,
        coef_N,
        objective,
        behaviour_logp_N=behaviour_N,
        top_k=3,
    )
    return made, list(torch.autograd.grad(made.loss, [student_NH, weight_VH]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_fused_and_tabled_agree(objective: Any, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reflux.kernels.fused_pass.usable", lambda device: False)
    tabled, table_grads = answer(objective, torch.float32, cap)
    monkeypatch.undo()
    with interpreted():
        fused, fused_grads = answer(objective, torch.float32, cap)
    for name in vars(tabled):
        torch.testing.assert_close(
            getattr(fused, name), getattr(tabled, name), rtol=1e-4, atol=1e-5, msg=name
        )
    for one, other in zip(fused_grads, table_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "objective", [Divergence(divergence=kind) for kind in ("reverse", "jsd", "tv")], ids=str
)
def test_bfloat16_rounds_the_gradient_of_the_logits_and_never_the_logits(objective: Any) -> None:
    """The relative error of the gradients is at most 5e-3 against float64 on the same bfloat16 inputs. Logits
    rounded to bfloat16 miss this bound.
    """
    rng = torch.Generator().manual_seed(0)
    n, v, h = 24, 400, 32
    inputs = [torch.randn(*shape, generator=rng) for shape in ((n, h), (v, h), (n, h), (v, h))]
    inputs = [x if x.shape[0] == n else x * 2.5 / h**0.5 for x in inputs]
    narrow = [x.to(DEVICE, torch.bfloat16) for x in inputs]
    ids_N = torch.randint(v, (n,), generator=rng).to(DEVICE)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        student_NH, weight_VH, teacher_NH, other_VH = (x.to(dtype) for x in narrow)
        leaves = [student_NH.requires_grad_(), weight_VH.requires_grad_()]
        made = linear_divergence(
            student_NH,
            Head.of(weight_VH),
            teacher_NH,
            Head.of(other_VH),
            ids_N,
            torch.ones(n, dtype=dtype, device=DEVICE),
            objective,
        )
        return [gradient.double() for gradient in torch.autograd.grad(made.loss, leaves)]

    exact, rounded = gradients(torch.float64), gradients(torch.bfloat16)
    with interpreted(512):
        fused = gradients(torch.bfloat16)

    def errors(made: list[torch.Tensor]) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(made, exact, strict=True)]

    assert max(errors(fused)) < 5e-3
    assert DEVICE != "cpu" or max(errors(rounded)) > max(errors(fused))


def test_fused_needs_no_table_for_what_the_loop_asks() -> None:
    """Exact divergences, sampled tokens, baselines, tail buckets and records never make log-probs [N, V]."""
    with interpreted():
        logits_NV, others_NV = torch.randn(3, 40, device=DEVICE), torch.randn(3, 40, device=DEVICE)
        ids_N = torch.tensor([0, 7, 39], device=DEVICE)
        student = FusedStudent(raw(logits_NV), {"main": raw(others_NV)}, ids_N, trained=True)
        teacher = student.teachers["main"]
        answers = [
            student.divergence(teacher, "jsd"),
            student.logp_N,
            student.with_tail(ids_N[:, None])[:, 1],
            teacher.with_tail(ids_N[:, None])[:, 1],
            student.kl(teacher),
            student.entropy(),
            student.minimum_variance_value(teacher),
            student.topk_kl_value(teacher, 5),
        ]
        assert all(value.shape == (3,) for value in answers)
        assert not {"logp_NV"} & (vars(student).keys() | vars(teacher).keys())


def raw(logits_NV: torch.Tensor) -> RawTable:
    return RawTable(logits_NV, Head.of(logits_NV))


def test_who_asks_first_without_a_graph_takes_it_from_nobody() -> None:
    logits_NV, ids_N = torch.randn(3, 40, device=DEVICE), torch.tensor([0, 7, 39], device=DEVICE)
    leaf_NV = logits_NV.clone().requires_grad_()
    tabled = FullLogits(leaf_NV, ids_N)
    with interpreted():
        fused = FusedStudent(raw(logits_NV.clone()), {}, ids_N, trained=True)
        for outputs in (tabled, fused):
            with torch.no_grad():
                _ = outputs.logp_N, outputs.logp_NV, outputs.entropy()
        losses = [outputs.logp_N.sum() + outputs.logp_NV.square().sum() for outputs in (tabled, fused)]
        fused_gradient.write(fused, losses[1], made_NV := torch.empty_like(logits_NV))
    wanted_NV = torch.autograd.grad(losses[0], leaf_NV)[0]
    assert wanted_NV.abs().max() > 0
    torch.testing.assert_close(made_NV, wanted_NV, rtol=1e-4, atol=1e-5)


def test_the_interpreter_is_left_as_it_was_found() -> None:
    with interpreted():
        pass
    assert usable(torch.device(DEVICE)) == ON_GPU
