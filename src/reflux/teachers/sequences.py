"""The tokens at which a text teacher gives log-probs, and its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reflux.teachers.base import TeacherRequest
from reflux.types import HiddenTarget, TeacherAnswer, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from torch import Tensor


def listed_by_student(request: TeacherRequest) -> np.ndarray | None:
    """The student's top-k ids at sampling time, [T, K]; None if the teacher is not required to score them, or
    none were recorded.
    """
    behaviour = request.rollout.behaviour
    return behaviour.ids_TK if request.requirements.candidates and isinstance(behaviour, TopKTarget) else None


def asked_ids(request: TeacherRequest) -> np.ndarray:
    """The sampled tokens, followed by the student's top-k ids if they are required and known; [T, 1 or 1 +
    K].
    """
    assert isinstance(request.rollout, TokenRollout)
    tokens_T1, ids_TK = request.rollout.tokens_T[:, None], listed_by_student(request)
    return tokens_T1 if ids_TK is None else np.concatenate([tokens_T1, ids_TK], axis=1)


def hidden_answer(
    name: str, head: str, request: TeacherRequest, h_TH: Tensor, logp_TK: np.ndarray | None
) -> TeacherAnswer:
    """The full distribution as hidden states on the CPU. name: the teacher's. head: the key of its output
    head. logp_TK: the log-probs at `asked_ids`; None if none are required.
    """
    logp_T = None if logp_TK is None else logp_TK[:, 0]
    target = HiddenTarget(teacher=name, h_TH=h_TH, head=head, logp_T=logp_T)
    ids_TK = listed_by_student(request)
    if ids_TK is None or logp_TK is None or logp_T is None:
        return TeacherAnswer(target=target)
    candidates = TopKTarget(teacher=name, ids_TK=ids_TK, logp_TK=logp_TK[:, 1:], logp_T=logp_T)
    return TeacherAnswer(target=target, candidates=candidates)
