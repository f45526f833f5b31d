"""Fused Triton passes over tables, that is matrices of raw logits [N, V]: the log-probs, divergences and
records that the objectives need, and their gradients.

Heads are matrix products and use the vendor's library. Everything after them is limited by memory traffic.
Each function here reads its tables once or twice and keeps nothing [N, V] wide except the gradient. Logits
may have any float dtype and are read into float32. Results are float32, and gradients have the logits'
dtype. Rows may be slices of a wider, padded table. Meaning, defaults and special cases are those of
`reflux.loss.divergences`, which is the reference. ValueError for shapes that do not fit, an unknown kind,
and a weight outside [0, 1].

The functions work on CUDA tensors, or on CPU tensors with Triton's interpreter (TRITON_INTERPRET=1, for
tests). Triton is imported at the first call.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from reflux.kernels.triton_launch import (
    check,
    known_lse,
    launch,
    launch_logsumexp,
    launch_sums,
    rows_of,
    table,
)

_DEFAULTS = {
    "reverse": None,
    "forward": None,
    "jsd": 0.5,
    "skew_reverse": 0.1,
    "skew_forward": 0.1,
    "alpha": 0.5,
    "tv": None,
}
_INSTALLED = find_spec("triton") is not None


def usable(logits: Tensor) -> bool:
    """True if these kernels can run on this table: Triton is installed, and the table is on a GPU or
    Triton's interpreter is on.
    """
    return _INSTALLED and (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@torch.no_grad()
def logsumexp(logits_NV: Tensor) -> Tensor:
    """log sum_v exp(logit), float32 [N], detached: the constant that turns logits into log-probs. It reads
    the table once.
    """
    check(logits_NV)
    return launch_logsumexp(rows_of(logits_NV))


def token_logp(logits_NV: Tensor, ids_N: Tensor, lse_N: Tensor | None = None) -> Tensor:
    """Log-prob of one id per row, nats, float32 [N]; differentiable in the logits. A given `lse_N` saves
    the pass that computes it.
    """
    return gather_logp(logits_NV, ids_N[:, None], lse_N)[:, 0]


def gather_logp(logits_NV: Tensor, ids_NK: Tensor, lse_N: Tensor | None = None) -> Tensor:
    """Log-probs at K ids per row, nats, float32 [N, K], differentiable. The ids of a row must differ, as
    those of a top-k do; this is not checked.
    """
    return _listed(logits_NV, ids_NK, lse_N, False)


def with_tail(logits_NV: Tensor, ids_NK: Tensor, lse_N: Tensor | None = None) -> Tensor:
    """The log-probs of `gather_logp` and, last, of ONE bucket with all mass that is not listed, [N, K + 1].
    The bucket is the logsumexp of the other logits; where no mass is left it is -inf without a gradient.

    The gradient of all K + 1 values is computed in one pass. The forward pass needs one byte per logit
    while it runs.
    """
    return _listed(logits_NV, ids_NK, lse_N, True)


def divergence(
    student_NV: Tensor,
    teacher_NV: Tensor,
    kind: str,
    weight: float | None = None,
    student_lse_N: Tensor | None = None,
    teacher_lse_N: Tensor | None = None,
) -> Tensor:
    """divergence(student, teacher) of each row, nats (`tv`: in [0, 1]), float32 [N]. `kind` and `weight` are
    those of `divergences.DIVERGENCES`. A given student_lse_N or teacher_lse_N (`logsumexp` of the logits)
    saves the pass that computes it.

    D = sum_v F(log p_v, log q_v). Differentiable in the student; the teacher is a constant. The gradient in
    logits is coef (F' - p sum F') with F' = dF / dlog p, written in one pass from both tables and sum F'.
    Two tables with identical bits give exactly 0 and a gradient of exactly 0. A row whose coefficient is 0
    has a gradient of exactly 0, also where its cost is infinite.
    """
    check(student_NV, teacher_NV)
    kind, share = _plan(kind, weight)
    if kind == "itself":
        kind, teacher_NV, teacher_lse_N = "reverse", student_NV, student_lse_N
    student_lse_N, teacher_lse_N = known_lse(student_NV, student_lse_N), known_lse(teacher_NV, teacher_lse_N)
    return _Divergence.apply(student_NV, teacher_NV.detach(), student_lse_N, teacher_lse_N, kind, share)


@torch.no_grad()
def summary(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    student_lse_N: Tensor | None = None,
    teacher_lse_N: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(KL(student || teacher), entropy of the student), nats, float32 [N], detached, in one pass. The KL is
    None without a teacher.

    The KL is never negative. -KL is the baseline of vOPD.
    """
    check(student_NV, student_NV if teacher_NV is None else teacher_NV)
    student_lse_N = known_lse(student_NV, student_lse_N)
    if teacher_NV is None:
        return None, launch_sums(student_NV, student_NV, student_lse_N, student_lse_N, "records", 0.0)[1]
    return launch_sums(
        student_NV, teacher_NV, student_lse_N, known_lse(teacher_NV, teacher_lse_N), "records", 0.0
    )


def _plan(kind: str, weight: float | None) -> tuple[str, float]:
    """The kernel's kind and the teacher's share of its mixture. The kind "itself" means that the student is
    compared with itself.
    """
    if kind not in _DEFAULTS:
        raise ValueError(f"kind must be one of {', '.join(_DEFAULTS)}, got '{kind}'")
    default = _DEFAULTS[kind]
    if default is None:
        if weight is not None:
            raise ValueError(f"the divergence '{kind}' has no mixture weight. Leave `weight` out")
        return kind, 0.0
    weight = default if weight is None else weight
    if not 0 <= weight <= 1 or math.isnan(weight):
        raise ValueError(f"the weight of '{kind}' must lie in [0, 1], got {weight}")
    if weight in (0.0, 1.0):
        ends = {"skew_reverse": ("reverse", "itself"), "skew_forward": ("forward", "itself")}
        return ends.get(kind, ("forward", "reverse"))[int(weight)], 0.0
    return kind, 1 - weight if kind == "skew_reverse" else weight


class _Divergence(Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        student_lse_N: Tensor,
        teacher_lse_N: Tensor,
        kind: str,
        share: float,
    ) -> Tensor:
        cost_N, slope_N = launch_sums(student_NV, teacher_NV, student_lse_N, teacher_lse_N, kind, share)
        ctx.save_for_backward(student_NV, teacher_NV, student_lse_N, teacher_lse_N, slope_N)
        ctx.kind, ctx.share = kind, share
        return cost_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from reflux.kernels.triton_kernels import row_gradient

        student_NV, teacher_NV, student_lse_N, teacher_lse_N, slope_N = ctx.saved_tensors
        student_NV, teacher_NV = rows_of(student_NV), rows_of(teacher_NV)
        grad_NV = torch.empty(student_NV.shape, dtype=student_NV.dtype, device=student_NV.device)
        tables = (*table(student_NV, student_lse_N), *table(teacher_NV, teacher_lse_N))
        launch(
            row_gradient,
            grad_NV,
            *tables,
            slope_N,
            grad_N.float().contiguous(),
            grad_NV,
            student_NV.shape[1],
            ctx.share,
            ctx.kind,
        )
        return grad_NV, None, None, None, None, None


class _Listed(Function):
    """Log-probs at ids, and of all other ids together where `rest_N` (the logsumexp of their logits) is
    given.

    The gradient, with coefficients c and their sum C, is c_k - C p_k at a listed id and c_tail p / p_tail -
    C p at the others.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor, lse_N: Tensor, rest_N: Tensor | None) -> Tensor:
        logp_NK = logits_NV.gather(-1, ids_NK).float() - lse_N[:, None]
        ctx.save_for_backward(logits_NV, ids_NK, lse_N, rest_N, logp_NK)
        return logp_NK if rest_N is None else torch.cat([logp_NK, (rest_N - lse_N)[:, None]], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from reflux.kernels.triton_kernels import row_softmax_gradient

        logits_NV, ids_NK, lse_N, rest_N, logp_NK = ctx.saved_tensors
        logits_NV, k = rows_of(logits_NV), ids_NK.shape[1]
        coef_NK, tail_N = grad_NK[:, :k].float(), torch.zeros_like(lse_N)
        if rest_N is not None:
            # An empty tail is -inf for all logits, so it has no gradient.
            tail_N = grad_NK[:, k].float().masked_fill(rest_N == -torch.inf, 0).contiguous()
        total_N = coef_NK.sum(-1) + tail_N
        grad_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
        vectors = (lse_N, lse_N if rest_N is None else rest_N, total_N, tail_N)
        launch(
            row_softmax_gradient,
            grad_NV,
            logits_NV,
            logits_NV.stride(0),
            *vectors,
            grad_NV,
            logits_NV.shape[1],
            rest_N is not None,
        )
        others_NK = total_N[:, None] - coef_NK
        # This is computed in float32, because 1 - p must not be rounded to bfloat16 first.
        listed_NK = -coef_NK * logp_NK.expm1() - others_NK * logp_NK.exp()
        listed_NK = listed_NK.masked_fill(((coef_NK == 0).all(-1) & (tail_N == 0))[:, None], 0)
        return grad_NV.scatter_(-1, ids_NK, listed_NK.to(grad_NV.dtype)), None, None, None


def _listed(logits_NV: Tensor, ids_NK: Tensor, lse_N: Tensor | None, tail: bool) -> Tensor:
    check(logits_NV)
    if ids_NK.ndim != 2 or len(ids_NK) != len(logits_NV):
        raise ValueError(f"ids must be [N, K] for logits {list(logits_NV.shape)}, got {list(ids_NK.shape)}")
    rest_N = None
    if tail:
        skip_NV = torch.zeros(logits_NV.shape, dtype=torch.uint8, device=logits_NV.device).scatter_(
            -1, ids_NK, 1
        )
        rest_N = launch_logsumexp(rows_of(logits_NV.detach()), skip_NV)
    return _Listed.apply(logits_NV, ids_NK, known_lse(logits_NV, lse_N), rest_N)
