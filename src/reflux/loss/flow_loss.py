"""The loss of flow attempts, from the velocities at the kept states, and its backward pass."""

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
    """The rollout of an item as a FlowRollout. All items of this module have one."""
    assert isinstance(item.rollout, FlowRollout)
    return item.rollout


class FlowMicroBatch(MicroBatch):
    """N denoising steps on the device, with every constant they need. All have the same guidance. Either
    all were sampled with noise or none was.
    """

    def __init__(self, items: list[Item], objectives: Sequence[LossTerm], device: torch.device):
        super().__init__(items, objectives, device)
        self.texts = [prompt_text(item.rollout.prompt) for item in items for _ in item.rows_N]
        self.guidance = flow_of(items[0]).guidance
        self.has_logp = flow_of(items[0]).noise_level > 0
        self.x_ND = self.column(lambda item: flow_of(item).x_SD[item.rows_N])
        self.next_ND = self.column(lambda item: flow_of(item).x_SD[item.rows_N + 1])
        self.t_N = self.column(lambda item: flow_of(item).t_S[item.rows_N])
        self.dt_N = self.column(lambda item: np.diff(flow_of(item).t_S)[item.rows_N])
        self.noise_level_N = self.column(
            lambda item: np.full(len(item.rows_N), flow_of(item).noise_level, dtype=np.float32)
        )
        names = sorted(self.objective_teachers())
        self.teachers = {name: self.outputs(self.target_rows(name)[1]["v_ND"]) for name in names}

    def outputs(self, v_ND: Tensor) -> VelocityOutputs:
        return VelocityOutputs(v_ND, self.x_ND, self.next_ND, self.t_N, self.dt_N, self.noise_level_N)


def backward(batch: FlowMicroBatch, v_ND: Tensor) -> Result:
    """Add up the costs of every objective times their coefficients, for the student's velocities v_ND, and
    run the backward pass.
    """
    columns = Columns(len(v_ND))
    student = batch.outputs(v_ND)
    loss = batch.costs(slice(None), student, batch.teachers, columns)
    if "main" in batch.teachers and batch.has_logp:
        columns.put("kl", slice(None), student.kl(batch.teachers["main"]))
    loss.backward()
    return result_of(loss.detach(), columns)


def pieces(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Split the rows of these items, in order, into pieces of at most `size` rows. A row is one denoising
    step of one image. The rows of one item may be split over several pieces.
    """
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
