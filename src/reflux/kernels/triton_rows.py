"""What the loss needs of matrices of raw logits on a GPU, in two launches per block of rows: `statistics` and
`write_gradient`.

Heads are matrix products and use the vendor's library. Everything after them is limited by memory traffic, so
nothing [N, V] wide is made except the gradient. Meaning, defaults and special cases of the divergences are
those of `reflux.loss.divergences`, which is the reference.

The functions work on CUDA tensors, or on CPU tensors with Triton's interpreter (TRITON_INTERPRET=1, for
tests). Triton is imported at the first call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reflux.kernels import triton_launch
from reflux.kernels.raw_table import RawTable
from reflux.kernels.triton_launch import launch, of_memory, of_table

_DEFAULTS = {
    "reverse": None,
    "forward": None,
    "jsd": 0.5,
    "skew_reverse": 0.1,
    "skew_forward": 0.1,
    "alpha": 0.5,
    "tv": None,
}
# The rows of `Sums.of_SN`. `cost` and `slopes` are the divergence and the sum of its derivatives by log p,
# or, for the kind "moments", E_p[1 - p] and E_p[(1 - p) (log q - log p)].
SUMS = ("student_lse", "teacher_lse", "student_logp", "teacher_logp", "cost", "slopes", "kl", "entropy")


@dataclass(frozen=True)
class Sums:
    """The statistics of N rows of two tables, float32, nats, detached. Kind "none" has only the first four.

    kind, share: what `cost` and `slopes` belong to, see `plan`.
    """

    of_SN: Tensor
    kind: str
    share: float

    def __getitem__(self, name: str) -> Tensor:
        return self.of_SN[SUMS.index(name)]


def statistics(student: RawTable, teacher: RawTable, ids_N: Tensor, kind: str, share: float = 0.0) -> Sums:
    """The sums of each row of two tables, by one launch. kind, share: from `plan`, or "moments", or "none",
    which reads the tables once instead of twice. ids_N: the tokens whose log-probs are among the sums.
    """
    from reflux.kernels.triton_kernels import row_statistics

    sums_SN = torch.empty(len(SUMS), len(ids_N), dtype=torch.float32, device=ids_N.device)
    capped = student.head.cap is not None, teacher.head.cap is not None
    tables = *of_table(student), *of_table(teacher)
    width = student.raw_NV.shape[1]
    launch(row_statistics, student.raw_NV, *tables, ids_N, sums_SN, width, share, kind, *capped)
    return Sums(sums_SN, kind, share)


def top_ids(table_NV: Tensor, k: int, ordered: bool) -> Tensor:
    """The k most likely tokens of each row, [N, k]; most likely first if `ordered`. Of equal tokens the first
    ones are taken where the kernel runs.
    """
    from reflux.kernels.triton_top import row_candidates

    rows, width = table_NV.shape
    if not k or not rows or width < 32 or k > triton_launch.BLOCK // 4 or k > width:
        return table_NV.topk(k, dim=-1, sorted=ordered).indices
    room = 1 << (2 * k + 63).bit_length()
    lowest = torch.iinfo(torch.int64).min
    found_NR = torch.full((rows, room), lowest, dtype=torch.int64, device=table_NV.device)
    counts_N = torch.zeros(rows, dtype=torch.int32, device=table_NV.device)
    launch(row_candidates, table_NV, *of_memory(table_NV), found_NR, counts_N, width, k, room)
    last = (1 << 32) - 1
    # Sorted in any case: an order that differed from run to run would change the sums over the list.
    return last - (found_NR.topk(k, dim=-1).values & last)


@torch.no_grad()
def rest(table: RawTable, other: RawTable, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp of all logits that are not at `ids_NK`, for two tables, float32 [N]; -inf where no mass
    is left. While the launch runs, the tables have no probability at the listed tokens.
    """
    tables = {id(one.raw_NV): one for one in (table, other)}.values()
    kept = [one.raw_NV.gather(-1, ids_NK) for one in tables]
    for one in tables:
        # A cap would make -inf finite. The kernels leave out the lowest number.
        none = -torch.inf if one.head.cap is None else torch.finfo(torch.float32).min
        one.raw_NV.scatter_(-1, ids_NK, none)
    sums = statistics(table, other, ids_NK.new_zeros(len(ids_NK)), "none")
    for one, raw_NK in zip(tables, kept, strict=True):
        one.raw_NV.scatter_(-1, ids_NK, raw_NK)
    return sums["student_lse"], sums["teacher_lse"]


@dataclass(frozen=True)
class Coefs:
    """The derivatives of the loss by statistics of the rows, float32 [N].

    of_cost: by the divergence. of_token: by the log-prob of the token in `ids_N`. of_logps: by all log-probs
    of single tokens and of the tail together. of_tail: by the tail's log-prob. None: 0.
    """

    of_cost: Tensor | None = None
    of_token: Tensor | None = None
    of_logps: Tensor | None = None
    of_tail: Tensor | None = None


def write_gradient(
    d_NV: Tensor,
    student: RawTable,
    teacher: RawTable,
    ids_N: Tensor,
    sums: Sums,
    coefs: Coefs,
    rest_N: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write the gradient of the student's raw logits into d_NV, or add it, by one launch. A gap of less than
    64 numbers behind a row of d_NV may be overwritten. With log p by logits, the gradient is

        of_cost (slope - p sum of slopes) + of_token e - of_logps p + of_tail p / p_tail

    times the derivative of scale and cap. e is 1 at the token. The last term is right at the tokens of the
    tail, and wrong at the listed ones. rest_N: the logsumexp of the tail.
    """
    from reflux.kernels.triton_kernels import row_gradient

    given = (coefs.of_cost, coefs.of_token, coefs.of_logps, coefs.of_tail)
    none_N = torch.zeros_like(sums.of_SN[0])
    coefs_CN = torch.stack([none_N if coef_N is None else coef_N.float() for coef_N in given])
    launch(
        row_gradient,
        d_NV,
        *of_table(student),
        *of_table(teacher),
        ids_N,
        sums.of_SN,
        coefs_CN,
        none_N if rest_N is None else rest_N,
        *of_memory(d_NV),
        d_NV.shape[1],
        sums.share,
        "none" if coefs.of_cost is None else sums.kind,
        coefs.of_token is not None,
        coefs.of_tail is not None,
        add,
        student.head.cap is not None,
        teacher.head.cap is not None,
    )


def plan(kind: str, weight: float | None) -> tuple[str, float]:
    """The kernel's kind and the teacher's share of its mixture. The kind "itself" means that the student is
    compared with itself. ValueError for an unknown kind and for a weight outside [0, 1].
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
