"""The loss of flow attempts: the velocities at the kept states, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.loss.aggregate import MicroBatch, Result, result_of
from reflux.loss.batch import Item
from reflux.loss.columns import Columns
from reflux.loss.flow_outputs import VelocityOutputs
from reflux.loss.term import LossTerm
from reflux.samplers.flow import prompt_text
from reflux.types import FlowRollout


def flow_of(item: Item) -> FlowRollout:
    """The attempt of an item that is a flow's, as all of this module are."""
    assert isinstance(item.rollout, FlowRollout)
    return item.rollout


class FlowMicroBatch(MicroBatch):
    """N denoising steps on the device, with every constant they need. All have the same guidance; all were
    drawn, or none.
    """

    def __init__(self, items: list[Item], objectives: Sequence[LossTerm], device: torch.device):
        super().__init__(items, objectives, device)
        self.texts = [
            text for item in items for text in [prompt_text(item.rollout.prompt)] * len(item.rows_N)
        ]
        self.guidance = flow_of(items[0]).guidance
        self.has_logp = flow_of(items[0]).noise_level > 0
        self.x_ND = self.column(lambda item: flow_of(item).x_SD[item.rows_N])
        self.next_ND = self.column(lambda item: flow_of(item).x_SD[item.rows_N + 1])
        self.t_N = self.column(lambda item: flow_of(item).t_S[item.rows_N])
        self.dt_N = self.column(lambda item: np.diff(flow_of(item).t_S)[item.rows_N])
        self.noise_level_N = self.column(
            lambda item: np.full(len(item.rows_N), flow_of(item).noise_level, dtype=np.float32)
        )
        self.teachers = {
            name: self.outputs(self.target_rows(name)[1]["v_ND"])
            for name in sorted(self.objective_teachers())
        }

    def outputs(self, v_ND: Tensor) -> VelocityOutputs:
        return VelocityOutputs(v_ND, self.x_ND, self.next_ND, self.t_N, self.dt_N, self.noise_level_N)


def backward(batch: FlowMicroBatch, v_ND: Tensor) -> Result:
    """Costs of every objective where the student says v_ND, times their coefficients, driven backward."""
    columns = Columns(len(v_ND))
    student = batch.outputs(v_ND)
    loss = batch.costs(slice(None), student, batch.teachers, columns)
    if "main" in batch.teachers and batch.has_logp:
        columns.put("kl", slice(None), student.kl(batch.teachers["main"]))
    loss.backward()
    return result_of(loss.detach(), columns)


def pieces(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The rows of these items in order, at most `size` at a time; an item's rows may fall into two pieces."""
    piece: list[Item] = []
    room = size
    for item in items:
        start = 0
        while start < len(item.rows_N):
            stop = min(start + room, len(item.rows_N))
            piece.append(_cut(item, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def _cut(item: Item, rows: slice) -> Item:
    coef_KN: tuple[Any, ...] = tuple(None if coef_N is None else coef_N[rows] for coef_N in item.coef_KN)
    return replace(
        item, rows_N=item.rows_N[rows], advantage_offset_N=item.advantage_offset_N[rows], coef_KN=coef_KN
    )
