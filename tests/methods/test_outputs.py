"""`FullLogits` by fused kernels says what `FullLogits` by tables says, through every objective: values,
gradients, by-products.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from device import DEVICE, ON_GPU
from interpreted import interpreted
from reflux.kernels.head import Head
from reflux.loss.baselines import kl_value
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
    monkeypatch.setattr("reflux.kernels.triton_divergence.usable", lambda logits: False)
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


def test_fused_needs_no_table_for_what_the_loop_asks() -> None:
    """Exact divergences, sampled tokens, vOPD's baseline, tail buckets and records never make log-probs [N,
    V].
    """
    with interpreted():
        logits_NV, others_NV = (
            torch.randn(3, 40, device=DEVICE).requires_grad_(),
            torch.randn(3, 40, device=DEVICE),
        )
        ids_N = torch.tensor([0, 7, 39], device=DEVICE)
        student, teacher = FullLogits(logits_NV, ids_N), FullLogits(others_NV, ids_N)
        behaviour = [
            student.divergence(teacher, "jsd"),
            student.logp_N,
            student.with_tail(ids_N[:, None])[:, 1],
            student.kl(teacher),
            student.entropy(),
        ]
        assert all(value.shape == (3,) for value in behaviour)
        assert not {"logp_NV"} & (vars(student).keys() | vars(teacher).keys())
        torch.testing.assert_close(
            student.kl(teacher),
            -kl_value(logits_NV.log_softmax(-1), others_NV.log_softmax(-1)),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("kernels", [nullcontext, interpreted])
def test_who_asks_first_without_a_graph_takes_it_from_nobody(kernels: Any) -> None:
    with kernels():
        logits_NV = torch.randn(3, 40, device=DEVICE).requires_grad_()
        student = FullLogits(logits_NV, torch.tensor([0, 7, 39], device=DEVICE))
        with torch.no_grad():
            student.logp_N, student.logp_NV, student.entropy()
        gradients = [
            torch.autograd.grad(value.sum(), logits_NV)[0]
            for value in (student.logp_N, student.logp_NV.square())
        ]
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_interpreter_is_left_as_it_was_found() -> None:
    with interpreted():
        pass
    logits_NV, ids_N = torch.zeros(1, 2, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    assert FullLogits(logits_NV, ids_N).fused == ON_GPU
