"""Computes a distillation loss from hidden states in one function, without a matrix [all tokens, vocabulary]
in memory.

This function is for use outside the training loop. The loop itself uses `row_pass`, with any number of
objectives and teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reflux.config.registry import part
from reflux.kernels.head import Head
from reflux.kernels.raw_table import RawTable
from reflux.kernels.row_pass import row_pass
from reflux.loss.call import check_call
from reflux.loss.columns import Columns
from reflux.loss.fused_gradient import write
from reflux.loss.fused_outputs import FusedStudent
from reflux.loss.outputs import FullLogits
from reflux.loss.term import LossTerm, Rows

# (objective, rows, coef_N) -> cost_N, 0 where the coefficient is 0
Nonzero = Callable[[LossTerm, Rows[FullLogits], Tensor], Tensor]


@dataclass
class Answer:
    """`loss` has gradients. Everything else is a detached by-product of the same pass, one value per row."""

    # sum_n coef_n cost_n, a scalar
    loss: Tensor
    # the cost without its coefficient, nats; 0 where the coefficient is 0
    cost_N: Tensor
    # the student's log-prob of the given token, nats
    logp_N: Tensor
    # the teacher's log-prob of the given token, nats
    teacher_logp_N: Tensor
    # exact KL(student || teacher), nats
    kl_N: Tensor
    # the student's entropy, nats
    entropy_N: Tensor
    # the student's K most likely tokens, most likely first; K = 0 unless `top_k` is given
    top_ids_NK: Tensor
    # the log-probs of these tokens, nats
    top_logp_NK: Tensor


def linear_divergence(
    student_NH: Tensor,
    student_head: Head,
    teacher_NG: Tensor,
    teacher_head: Head,
    ids_N: Tensor,
    coef_N: Tensor,
    objective: LossTerm | None = None,
    *,
    behaviour_logp_N: Tensor | None = None,
    advantage_offset_N: Tensor | None = None,
    top_k: int = 0,
) -> Answer:
    """sum_n coef_n cost_n of an objective (default: the exact reverse KL) over N positions, with
    by-products of the same pass.

    student_NH [N, H] and teacher_NG [N, G]: the last hidden states that predict a token, one row per position
    (`h[mask]`, prompts and padding left out). The sizes H and G may differ. ids_N: the token sampled NEXT at
    each row, in 0..V-1, for sampled objectives and by-products. student_head, teacher_head: the output heads,
    which map hidden states to logits: `Head.of_net(model, len(tokenizer))` for a transformers model (its
    scaling and soft cap included), or `Head.of(weight_VH)` for a matrix; both must have the same V tokens.
    coef_N: the weights, including 1 / N. behaviour_logp_N (default: the student's log-probs in this pass) and
    advantage_offset_N (default 0) are for objectives that use them. top_k: how many of the student's most
    likely tokens the result lists.

    Gradients go to student_NH and to the student's head, in the dtypes of both. They are computed in the
    same pass as the loss, so backward works once, and a factor on `loss` is applied too. A row with
    coefficient 0 gives exactly zero gradient. Group baselines need whole groups; pass advantage_offset_N =
    -value with baseline "none" instead. The memory used besides inputs and gradients is bounded by
    `kernels.budget`, whatever N and V. ValueError where shapes, ids or vocabularies do not match.
    """
    by_row = {
        "ids_N": ids_N,
        "coef_N": coef_N,
        "behaviour_logp_N": behaviour_logp_N,
        "advantage_offset_N": advantage_offset_N,
    }
    check_call(student_NH, student_head, teacher_NG, teacher_head, by_row, objective, top_k)
    term: LossTerm = part("objectives", "divergence")() if objective is None else objective
    columns, top_k = Columns(len(ids_N)), min(top_k, student_head.vocabulary)
    pushed_N = torch.zeros_like(coef_N) if advantage_offset_N is None else advantage_offset_N
    work = _Pass(term, ids_N, coef_N, behaviour_logp_N, pushed_N, columns, top_k)
    teacher = (teacher_NG.detach(), teacher_head)
    loss = row_pass(student_NH, student_head, [teacher], work.row_loss, work.fused_loss)
    if not len(ids_N):
        none_N, none_NK = loss.new_zeros(0), loss.new_zeros(0, top_k)
        return Answer(loss, none_N, none_N, none_N, none_N, none_N, none_NK.long(), none_NK)
    return Answer(loss, **columns)


@dataclass
class _Pass:
    """The costs of the rows of one call, in both ways that `row_pass` has."""

    term: LossTerm
    ids_N: Tensor
    coef_N: Tensor
    behaviour_logp_N: Tensor | None
    advantage_offset_N: Tensor
    columns: Columns
    top_k: int

    def row_loss(self, rows: slice, logits_NV: Tensor, constants: list[Tensor]) -> Tensor:
        student, teacher = (FullLogits(table, self.ids_N[rows]) for table in (logits_NV, constants[0]))
        return self._costs(rows, student, teacher, _left_out)

    def fused_loss(
        self, rows: slice, logits: RawTable, constants: list[RawTable], d_NV: Tensor | None
    ) -> Tensor:
        student = FusedStudent(logits, {"main": constants[0]}, self.ids_N[rows], trained=d_NV is not None)
        loss = self._costs(rows, student, student.teachers["main"], _masked)
        if d_NV is not None:
            write(student, loss, d_NV, silent_N=self.coef_N[rows] == 0)
        return loss.detach()

    def _costs(self, rows: slice, student: FullLogits, teacher: FullLogits, nonzero: Nonzero) -> Tensor:
        teachers, pushed_N = {self.term.teacher or "main": teacher}, self.advantage_offset_N[rows]
        if self.behaviour_logp_N is None:
            view = _OwnBehaviour(student, teachers, pushed_N)
        else:
            view = Rows(student, teachers, self.behaviour_logp_N[rows], pushed_N)
        cost_N = nonzero(self.term, view, self.coef_N[rows])
        _note(self.columns, rows, cost_N, student, teacher, self.top_k)
        return (self.coef_N[rows] * cost_N).sum()


class _OwnBehaviour(Rows[FullLogits]):
    """Rows whose tokens the student itself drew. Its log-probs are computed only if an objective needs
    them, because the first quantity that is requested of a `FusedStudent` decides what its launch computes.
    """

    def __init__(self, student: FullLogits, teachers: dict[str, Any], advantage_offset_N: Tensor):
        self.student, self.teachers, self.advantage_offset_N = student, teachers, advantage_offset_N

    @property
    def behaviour_logp_N(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.student.logp_N.detach()


def _masked(objective: LossTerm, rows: Rows[FullLogits], coef_N: Tensor) -> Tensor:
    """cost_N, exactly 0 where the coefficient is 0, without waiting for the device. `fused_gradient.write`
    gives these rows no gradient.
    """
    return objective(rows).masked_fill(coef_N == 0, 0)


def _left_out(objective: LossTerm, rows: Rows[FullLogits], coef_N: Tensor) -> Tensor:
    """cost_N, exactly 0 without a gradient where the coefficient is 0. Such rows are left out, because 0
    times an infinite cost would be NaN.
    """
    if bool((coef_N != 0).all()):
        return objective(rows)
    nonzero_M = coef_N.nonzero()[:, 0]
    ids_M = rows.student.ids_N[nonzero_M]
    teachers = {
        name: FullLogits(outputs.logits_NV[nonzero_M], ids_M)
        for name, outputs in rows.teachers.items()
        if isinstance(outputs, FullLogits)
    }
    student = FullLogits(rows.student.logits_NV[nonzero_M], ids_M)
    view = Rows(student, {**teachers}, rows.behaviour_logp_N[nonzero_M], rows.advantage_offset_N[nonzero_M])
    cost_M = objective(view)
    return torch.zeros_like(coef_N, dtype=cost_M.dtype).index_put((nonzero_M,), cost_M)


@torch.no_grad()
def _note(
    columns: Columns, rows: slice, cost_N: Tensor, student: FullLogits, teacher: FullLogits, top_k: int
) -> None:
    ids_NK = student.top_ids(top_k, ordered=True)
    by_products = {
        "cost_N": cost_N,
        "logp_N": student.logp_N,
        "teacher_logp_N": teacher.logp_N,
        "kl_N": student.kl(teacher),
    }
    by_products |= {"entropy_N": student.entropy(), "top_ids_NK": ids_NK, "top_logp_NK": student.at(ids_NK)}
    for name, column in by_products.items():
        columns.put(name, rows, column)
