"""The model of `teachers.flow`, and the common calls of all tables on one base model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.errors import ModelError
from reflux.models.flow.shared_base import SharedBase, Voice
from reflux.samplers.flow import prompt_text
from reflux.teachers.base import TeacherRequest, alias_of
from reflux.teachers.flow_fit import refuse_misfit
from reflux.types import FlowRollout, TeacherAnswer, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.flow import Flow


@dataclass(frozen=True)
class FlowRows:
    """The counted states of one attempt, the text of its image, and the teacher that is asked."""

    teacher: FlowTeacher
    rollout: FlowRollout
    text: str
    # The counted positions, rising.
    rows_N: np.ndarray


class FlowTeacher:
    """A frozen flow model without state. `model` is the base model with the adapter of this teacher's
    table.
    """

    def __init__(self, cfg: Flow, context: PartContext, services: Services, model: Voice):
        self.cfg, self.context, self.services, self.model = cfg, context, services, model
        self.table = context.name
        self.name = alias_of(context.name, cfg)
        self.scorer = FlowScorer(model.base, services)
        self.macs = model.macs(context.generation.guidance, context.generation.pixels)

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Flow, context: PartContext, services: Services) -> AsyncIterator[FlowTeacher]:
        await services.run_model(refuse_misfit, cfg, context, services)
        yield cls(cfg, context, services, await services.run_model(_voice, cfg, context.name, services))

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        (answers,) = await self.scorer.score([(self, requests)])
        return answers

    def rows(self, request: TeacherRequest) -> FlowRows:
        """The states that the teacher is asked about. ModelError for a request that it cannot answer."""
        rollout, view = request.rollout, request.view
        assert isinstance(rollout, FlowRollout)
        if view.spans:
            raise ModelError(
                f"teachers.{self.table}: this context replaces text inside a response, and an image "
                "has no text"
            )
        if self.cfg.guidance is not None and rollout.guidance != self.cfg.guidance:
            raise ModelError(
                f"teachers.{self.table}.guidance is {self.cfg.guidance:g}, but prompt {rollout.prompt.id} "
                "was sampled with guidance "
                f"{rollout.guidance:g}: student and teachers must use the same guidance. Leave it out, or "
                "set both to the same value."
            )
        text = prompt_text(replace(rollout.prompt, messages=view.messages))
        return FlowRows(self, rollout, text, np.flatnonzero(rollout.mask_T))

    def answer(self, rows: FlowRows, v_RD: np.ndarray) -> TeacherAnswer:
        """v_RD: the velocities at the counted states. ModelError where one of them is not finite."""
        self._refuse_nan(rows, v_RD)
        v_TD = np.full((rows.rollout.length, v_RD.shape[1]), np.nan, dtype=np.float32)
        v_TD[rows.rows_N] = v_RD
        target = VelocityTarget(teacher=self.name, v_TD=v_TD)
        return TeacherAnswer(target=target, positions_read=len(rows.rows_N))

    def _refuse_nan(self, rows: FlowRows, v_RD: np.ndarray) -> None:
        bad_N = ~np.isfinite(v_RD).all(1)
        if bad_N.any():
            rollout, i = rows.rollout, int(rows.rows_N[bad_N.argmax()])
            raise ModelError(
                f"teachers.{self.table}: its velocity for prompt {rollout.prompt.id}, sample "
                f"{rollout.sample}, at denoising step {i} (from "
                f"0, of {rollout.length}; t = {rollout.t_S[i]:.4g}) is not finite. With 16 bits this may be "
                "an overflow: try dtype = 'bfloat16' or 'float32'. Otherwise its weights are broken."
            )

    async def publish(self, weights: Weights, step: int) -> None:
        """Does nothing: the teacher is frozen."""

    def save(self, folder: Path) -> None:
        """Writes nothing: the teacher is frozen and is loaded from its model again."""

    def load(self, folder: Path) -> None:
        """Reads nothing: `save` wrote nothing."""


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


def _voice(cfg: Flow, name: str, services: Services) -> Voice:
    base = SharedBase.of(
        cfg.model, f"teachers.{name}.model", dtype=cfg.dtype, device=cfg.device, shared_cache=services.shared
    )
    return base.voice(cfg.adapter, f"teachers.{name}.adapter")
