"""The model of `teachers.flow`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reflux.errors import ModelError
from reflux.models.flow.shared_base import SharedBase, Voice
from reflux.samplers.flow import prompt_text
from reflux.teachers.base import TeacherRequest, alias_of
from reflux.teachers.flow_fit import refuse_misfit
from reflux.teachers.flow_scorer import FlowRows, FlowScorer
from reflux.types import FlowRollout, TeacherAnswer, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.flow import Flow


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


def _voice(cfg: Flow, name: str, services: Services) -> Voice:
    base = SharedBase.of(
        cfg.model, f"teachers.{name}.model", dtype=cfg.dtype, device=cfg.device, shared_cache=services.shared
    )
    return base.voice(cfg.adapter, f"teachers.{name}.adapter")
