"""The Bradley-Terry loss of scores, over all pairs of a teacher's answer and an attempt at one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Pairs(NamedTuple):
    """M pairs, as indices into the scores of all texts of a step."""

    teacher_M: list[int]
    student_M: list[int]

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]]) -> Pairs:
        """All pairs within each prompt. sizes: for each prompt the numbers of its teacher's answers and of
        its attempts. Their texts lie one after the other, the answers of a prompt before its attempts.
        """
        pairs, start = cls([], []), 0
        for answers, attempts in sizes:
            for teacher in range(start, start + answers):
                pairs.teacher_M.extend([teacher] * attempts)
                pairs.student_M.extend(range(start + answers, start + answers + attempts))
            start += answers + attempts
        return pairs


def bradley_terry(scores_N: Tensor, pairs: Pairs) -> Tensor:
    """The mean over pairs of -log sigmoid(teacher's score - attempt's score), nats; differentiable."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(scores_N[pairs.teacher_M] - scores_N[pairs.student_M]).mean()


def slopes(scores_N: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The loss and its derivative by each score [N]."""
    import torch

    leaf_N = scores_N.detach().requires_grad_()
    with torch.enable_grad():
        loss = bradley_terry(leaf_N, pairs)
        (slopes_N,) = torch.autograd.grad(loss, leaf_N)
    return loss.detach(), slopes_N


def pair_accuracy(scores_N: Tensor, pairs: Pairs) -> float:
    """The share of pairs in which the teacher's answer has the higher score. Equal scores count half."""
    gap_M = scores_N[pairs.teacher_M] - scores_N[pairs.student_M]
    return float((gap_M.sign().double().mean() + 1) / 2)
