"""The student as its own teacher, to compare the passes of a teacher with those of the learner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from reflux.learners.observe import logp
from reflux.teachers.base import plain_requests
from reflux.teachers.local import Local
from reflux.teachers.local_engine import LocalTeacher
from reflux.types import Group, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.hf_engine import HFLearner


def identity_gaps(learner: HFLearner, context: PartContext, groups: Sequence[Group]) -> list[np.ndarray]:
    """For each attempt with a token, the absolute differences in nats between the log-probs that a teacher
    with the student's weights gives to its tokens, and those of the learner. context: that of the teacher,
    with a name that no table of the recipe has.
    """
    rollouts = [attempt.rollout for group in groups for attempt in group]
    texts = [rollout for rollout in rollouts if isinstance(rollout, TokenRollout) and rollout.length]
    services, local = learner.services, Local(context.student.model)
    learner.ranks.gather()
    with closing(LocalTeacher(local, context, services, learner.model, frozen=False)) as teacher:
        answers = teacher.answer(plain_requests(texts))
        pairs = zip(texts, answers, logp(learner, groups), strict=True)
        return [
            np.abs(answer.target.sampled_logp_T(rollout, services.heads) - now_T)
            for rollout, answer, now_T in pairs
            if answer.target is not None
        ]
