"""Weights that depend on the position, for example weights that fall gradually to 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.schedules import PositionNumber, at, first_below, needs_horizon, number
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.types import Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


@dataclass(frozen=True, config=STRICT)
class Position(CreditPart):
    """Weight `weight(i)` at the i-th chosen position, i = 0, 1, 2, ...

    Positions where the student did not choose keep weight 1. `weight` is a number, or a schedule over
    positions instead of optimiser steps. A schedule needs its `horizon`, in positions: `{ kind = "linear",
    start = 1, stop = 0, horizon = 64 }` lets the weight fall to 0 over the first 64 positions. A value below
    0 raises ValueError. Neutral: 1. With loss_aggregation "token-mean-weighted", positions of weight 0 are
    not counted in the denominator. Note `weight`: the mean over chosen positions.
    """

    weight: PositionNumber

    gives_offsets = False
    min_group = 1

    def __post_init__(self) -> None:
        number(self.weight, "weight")
        if isinstance(self.weight, (int, float)) and self.weight < 0:
            raise ValueError(f"weight must be >= 0, got {self.weight}")
        if needs_horizon(self.weight):
            raise ValueError(
                "weight is a schedule over positions: set its number of positions, for example horizon = 64"
            )

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if (position := first_below(self.weight, 0, cfg.training_positions)) is not None:
            yield (
                f"{where}.weight is {at(self.weight, position):g} at position {position}; a weight must be "
                ">= 0. Set stop = 0."
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        masks = [attempt.rollout.mask_T for attempt in group]
        longest = max((int(mask_T.sum()) for mask_T in masks), default=0)
        weight_L = np.array([at(self.weight, position) for position in range(longest)], dtype=np.float32)
        if (wrong := np.flatnonzero(~(weight_L >= 0))).size:
            raise ValueError(
                f"weight is {weight_L[wrong[0]]} at position {wrong[0]}; a weight must be >= 0. End the "
                "schedule at 0 or more"
            )
        return [_credit(mask_T, weight_L) for mask_T in masks]


def _credit(mask_T: np.ndarray, weight_L: np.ndarray) -> Credit:
    chosen = int(mask_T.sum())
    if not chosen:
        return Credit()
    weight_T = np.ones(len(mask_T), dtype=np.float32)
    weight_T[mask_T] = weight_L[:chosen]
    return Credit(weight_T=weight_T, notes={"weight": float(weight_L[:chosen].mean())})
