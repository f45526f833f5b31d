"""`linear_divergence` refuses in a sentence what cannot be meant; a silent broadcast would be a loss N times
too large.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reflux.kernels.head import Head
from reflux.loss.linear_divergence import linear_divergence
from reflux.objectives.sampled_kl import SampledKL

N, V = 6, 11
GOOD: dict[str, Any] = {
    "student_NH": torch.randn(N, 4),
    "student_head": Head.of(torch.randn(V, 4)),
    "teacher_NG": torch.randn(N, 5),
    "teacher_head": Head.of(torch.randn(V, 5)),
    "ids_N": torch.arange(N),
    "coef_N": torch.ones(N),
}


def test_the_good_call_is_good() -> None:
    assert linear_divergence(**GOOD).loss.isfinite()
    assert linear_divergence(**GOOD, advantage_offset_N=torch.ones(N), objective=SampledKL()).loss.isfinite()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"coef_N": torch.ones(N, 1)}, r"coef_N must be a tensor \[N\]"),
        ({"coef_N": torch.ones(N, requires_grad=True)}, r"Pass coef_N\.detach\(\)"),
        ({"coef_N": 1 / N}, "coef_N must be a tensor .* got float"),
        ({"advantage_offset_N": torch.ones(N, 1)}, "advantage_offset_N must be"),
        ({"behaviour_logp_N": torch.ones(1, N)}, "behaviour_logp_N must be"),
        ({"advantage_offset_N": torch.ones(N + 1)}, "one row per position, but"),
        ({"student_NH": torch.randn(2, 3, 4)}, r"Flatten them: h\[mask\]"),
        ({"teacher_NG": torch.randn(N - 1, 5)}, "one row per position, but"),
        (
            {"student_NH": torch.randn(N, 3)},
            "the student's hidden states have size 3, but its head takes size 4",
        ),
        ({"teacher_NG": torch.randn(N, 3)}, "the teacher's hidden states"),
        ({"student_head": torch.randn(V, 4)}, "student_head must be Head.of_net"),
        ({"teacher_head": torch.nn.Linear(5, V)}, "teacher_head must be Head.of_net"),
        ({"teacher_head": Head.of(torch.randn(V + 1, 5))}, "11 tokens and the teacher's has 12"),
        ({"ids_N": torch.full((N,), -100)}, "labels of -100"),
        ({"ids_N": torch.full((N,), V)}, r"in 0\.\.10"),
        ({"ids_N": torch.zeros(N)}, "int64"),
        ({"objective": "forward"}, r"Divergence\(divergence='forward'\)"),
        ({"top_k": -1}, "top_k must be 0 or more"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**GOOD, **changed})
