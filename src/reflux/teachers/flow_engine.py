"""The model of `teachers.flow`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.errors import ModelError
from reflux.models.flow.shared_base import SharedBase
from reflux.samplers.flow import prompt_text
from reflux.teachers.base import TeacherRequest, alias_of
from reflux.teachers.flow_fit import refuse_misfit
from reflux.types import FlowRollout, TeacherAnswer, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.models.flow.flow_model import FlowModel
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.flow import Flow


@dataclass(frozen=True)
class FlowRows:
    """The counted states of one attempt, and the text of its image."""

    # Index of its request.
    place: int
    rollout: FlowRollout
    text: str
    # The counted positions, rising.
    rows_N: np.ndarray

    @property
    def x_ND(self) -> np.ndarray:
        return self.rollout.x_SD[self.rows_N]

    @property
    def t_N(self) -> np.ndarray:
        return self.rollout.t_S[self.rows_N]


class FlowTeacher:
    """A frozen flow model without state. `model` is the base model with the adapter of this teacher's table
    applied.
    """

    def __init__(self, cfg: Flow, context: PartContext, services: Services, model: FlowModel):
        self.cfg, self.context, self.services, self.model = cfg, context, services, model
        self.table = context.name
        self.name = alias_of(context.name, cfg)
        self.macs = model.macs(context.generation.guidance, context.generation.pixels)

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Flow, context: PartContext, services: Services) -> AsyncIterator[FlowTeacher]:
        await services.run_model(refuse_misfit, cfg, context, services)
        yield cls(cfg, context, services, await services.run_model(_voice, cfg, context.name, services))

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        return await self.services.run_model(self._score, list(requests))

    def _score(self, requests: list[TeacherRequest]) -> list[TeacherAnswer]:
        started = time.perf_counter()
        answers: dict[int, TeacherAnswer] = {}
        for alike in _alike([self._rows(place, request) for place, request in enumerate(requests)]):
            answers |= self._answers(alike)
        seconds = (time.perf_counter() - started) / max(1, len(requests))
        return [replace(answers[place], seconds=seconds) for place in range(len(requests))]

    def _rows(self, place: int, request: TeacherRequest) -> FlowRows:
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
        return FlowRows(place, rollout, text, np.flatnonzero(rollout.mask_T))

    def _answers(self, alike: list[FlowRows]) -> dict[int, TeacherAnswer]:
        """Velocities at all counted states of attempts with one guidance and one size, in calls of
        `batch_positions`. The answers are returned by request index.
        """
        x_ND, t_N = (np.concatenate([getattr(rows, name) for rows in alike]) for name in ("x_ND", "t_N"))
        texts = [text for rows in alike for text in [rows.text] * len(rows.rows_N)]
        v_ND = self._velocities(x_ND, t_N, texts, alike[0].rollout.guidance)
        ends = np.cumsum([len(rows.rows_N) for rows in alike])
        answers = {}
        for rows, v_RD in zip(alike, np.split(v_ND, ends[:-1]), strict=True):
            self._refuse_nan(rows, v_RD)
            v_TD = np.full((rows.rollout.length, x_ND.shape[1]), np.nan, dtype=np.float32)
            v_TD[rows.rows_N] = v_RD
            target = VelocityTarget(teacher=self.name, v_TD=v_TD)
            answers[rows.place] = TeacherAnswer(target=target, positions_read=len(rows.rows_N))
        return answers

    @torch.inference_mode()
    def _velocities(self, x_ND: np.ndarray, t_N: np.ndarray, texts: list[str], guidance: float) -> np.ndarray:
        """v_ND, float32. The student's states are read and not stored."""
        device, size = self.model.device, self.cfg.batch_positions
        v_ND = np.empty_like(x_ND)
        for start in range(0, len(x_ND), size):
            rows = slice(start, start + size)
            x_BD, t_B = torch.from_numpy(x_ND[rows]).to(device), torch.from_numpy(t_N[rows]).to(device)
            v_ND[rows] = self.model.velocity(x_BD, t_B, texts[rows], guidance).cpu().numpy()
        return v_ND

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


def _alike(asked: Sequence[FlowRows]) -> Iterator[list[FlowRows]]:
    """Groups of attempts whose states may share a call."""
    found: dict[tuple[float, int], list[FlowRows]] = {}
    for rows in asked:
        found.setdefault((rows.rollout.guidance, rows.rollout.x_SD.shape[1]), []).append(rows)
    yield from found.values()


def _voice(cfg: Flow, name: str, services: Services) -> FlowModel:
    base = SharedBase.of(
        cfg.model, f"teachers.{name}.model", dtype=cfg.dtype, device=cfg.device, shared_cache=services.shared
    )
    return base.voice(cfg.adapter, f"teachers.{name}.adapter")
