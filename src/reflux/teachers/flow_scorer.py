"""Scores for all flow teachers on one base model: their states go through the base together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.teachers.base import TeacherRequest
from reflux.types import FlowRollout, TeacherAnswer

if TYPE_CHECKING:
    from reflux.models.flow.shared_base import SharedBase
    from reflux.runtime.services import Services
    from reflux.teachers.flow_engine import FlowTeacher


@dataclass(frozen=True)
class FlowRows:
    """The counted states of one attempt, the text of its image, and the teacher that is asked."""

    teacher: FlowTeacher
    rollout: FlowRollout
    text: str
    # The counted positions, rising.
    rows_N: np.ndarray


@dataclass(frozen=True)
class FlowScorer:
    """Teachers on one base have equal scorers."""

    base: SharedBase
    services: Services

    async def score(
        self, asked: Sequence[tuple[FlowTeacher, Sequence[TeacherRequest]]]
    ) -> list[list[TeacherAnswer]]:
        """For each teacher its answers, one per request, in order. A call of the base has at most the
        smallest `batch_positions` of the teachers as states.
        """
        return await self.services.run_model(self._score, asked)

    def _score(
        self, asked: Sequence[tuple[FlowTeacher, Sequence[TeacherRequest]]]
    ) -> list[list[TeacherAnswer]]:
        started = time.perf_counter()
        rows = [teacher.rows(request) for teacher, requests in asked for request in requests]
        size = min(teacher.cfg.batch_positions for teacher, _ in asked)
        answers: dict[int, TeacherAnswer] = {}
        for places in _alike(rows):
            alike = [rows[place] for place in places]
            found = (one.teacher.answer(one, v_RD) for one, v_RD in self._velocities(alike, size))
            answers |= dict(zip(places, found, strict=True))
        seconds = (time.perf_counter() - started) / max(1, len(rows))
        ordered = [replace(answers[place], seconds=seconds) for place in range(len(rows))]
        ends = accumulate((len(requests) for _, requests in asked), initial=0)
        return [ordered[start:end] for start, end in pairwise(ends)]

    @torch.inference_mode()
    def _velocities(self, alike: list[FlowRows], size: int) -> Iterator[tuple[FlowRows, np.ndarray]]:
        """Each of the attempts with its velocities v_RD, float32, in calls of `size` states. All have one
        guidance and one size of image. The student's states are read and not stored.
        """
        x_ND = np.concatenate([rows.rollout.x_SD[rows.rows_N] for rows in alike])
        t_N = np.concatenate([rows.rollout.t_S[rows.rows_N] for rows in alike])
        texts = [text for rows in alike for text in [rows.text] * len(rows.rows_N)]
        adapters = [name for rows in alike for name in [rows.teacher.model.adapter] * len(rows.rows_N)]
        device, guidance = self.base.model.device, alike[0].rollout.guidance
        v_ND = np.empty_like(x_ND)
        for start in range(0, len(x_ND), size):
            some = slice(start, start + size)
            x_BD, t_B = torch.from_numpy(x_ND[some]).to(device), torch.from_numpy(t_N[some]).to(device)
            v_ND[some] = self.base.velocity(x_BD, t_B, texts[some], guidance, adapters[some]).cpu().numpy()
        ends = np.cumsum([len(rows.rows_N) for rows in alike])
        return zip(alike, np.split(v_ND, ends[:-1]), strict=True)


def _alike(asked: Sequence[FlowRows]) -> Iterator[list[int]]:
    """The places of attempts whose states may share a call."""
    found: dict[tuple[float, int], list[int]] = {}
    for place, rows in enumerate(asked):
        found.setdefault((rows.rollout.guidance, rows.rollout.x_SD.shape[1]), []).append(place)
    yield from found.values()
