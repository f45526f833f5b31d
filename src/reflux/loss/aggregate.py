"""The only place where weights, shifts, coefficients and denominators meet.

    loss = sum_k coef_k * sum_n w_n * cost_k,n * c_n

`Item.coef_KN` already holds coef_k * w_n * c_n; here the costs of one micro-batch are asked for and added up,
whatever its rows are. How its rows come out of a model is in `token_loss.py` and `flow_loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.loss.batch import Item
from reflux.loss.columns import Columns
from reflux.loss.term import LossTerm, Rows


@dataclass
class Result:
    """One micro-batch: its loss, and by-products by row in item order, detached: what records and metrics
    need, at no second pass.
    """

    loss: Tensor
    # of the sampled tokens, by who gave them: "student" (of now), and each teacher by name
    logp: dict[str, Tensor]
    # reverse KL to "main": exact where both are full, else -(log q - log p) sampled
    kl_N: Tensor | None
    # for each objective whose importance ratio has a bound: True at the rows where the bound binds
    outside: list[Tensor]
    # closed form of the sampled gradient's, with the baseline and without, where asked for
    variance: tuple[Tensor, Tensor] | None


def shift_taker(objectives: Sequence[LossTerm]) -> int | None:
    """The one objective that receives the shifts: an outcome-like one (no teacher) if there is one, else the
    first that takes them.
    """
    takers = [k for k, objective in enumerate(objectives) if objective.takes_advantage_offset]
    without_teacher = [k for k in takers if objectives[k].teacher is None]
    return next(iter(without_teacher + takers), None)


class MicroBatch:
    """Items of one micro-batch on the device: every constant that their rows need, whatever the rows are."""

    # False where what was chosen has no density, as the steps of an ODE
    has_logp = True

    def __init__(self, items: list[Item], objectives: Sequence[LossTerm], device: torch.device):
        self.items, self.objectives, self.device = items, objectives, device
        self.behaviour_logp_N = self.column(lambda item: item.rollout.logp_T[item.rows_N])
        self.advantage_offset_N = self.column(lambda item: item.advantage_offset_N)
        self.coef_KN = [
            None if coef_N is None else self.column(lambda item, k=k: item.coef_KN[k])
            for k, coef_N in enumerate(items[0].coef_KN)
        ]
        self.taker = shift_taker(objectives)
        self.value_KN = [
            self.column(lambda item, k=k: np.full(len(item.rows_N), item.value_K[k], dtype=np.float32))
            for k in range(len(objectives))
        ]

    def column(self, of: Callable[[Item], Any]) -> Tensor:
        """One array per item, joined, on the device."""
        return torch.from_numpy(np.concatenate([of(item) for item in self.items])).to(self.device)

    def target_rows(self, name: str) -> tuple[Any, dict[str, Tensor]]:
        """Of the first item the target by this name, and what all of them know at their rows, joined, on the
        device.
        """
        targets = [item.attempt.target(name) for item in self.items]
        rows = [
            target.rows(item.rows_N)
            for target, item in zip(targets, self.items, strict=True)
            if target is not None
        ]
        return targets[0], {
            column: torch.cat([row[column] for row in rows]).to(self.device) for column in rows[0]
        }

    def objective_teachers(self) -> set[str]:
        """Whose targets are looked at: an objective's that has a word here, and those of "main", for the
        records.
        """
        item = self.items[0]
        known = {
            name for name in (*item.attempt.answers, "behaviour") if item.attempt.target(name) is not None
        }
        asked = {
            objective.teacher
            for objective, coef_N in zip(self.objectives, item.coef_KN, strict=True)
            if coef_N is not None
        }
        return known & (asked | {"main"}) if self.objectives else set()

    def view(self, k: int, rows: slice, student: Any, teachers: dict[str, Any]) -> Rows[Any]:
        """Some rows as objective k sees them: only the taker of shifts gets any."""
        advantage_offset_N = (
            self.advantage_offset_N[rows]
            if k == self.taker
            else torch.zeros_like(self.advantage_offset_N[rows])
        )
        return Rows(
            student, teachers, self.behaviour_logp_N[rows], advantage_offset_N, self.value_KN[k][rows]
        )

    def costs(
        self,
        rows: slice,
        student: Any,
        teachers: dict[str, Any],
        columns: Columns,
        log_variance: bool = False,
    ) -> Tensor:
        """The loss of some rows, with every objective's word; by-products go into the columns."""
        loss = self.advantage_offset_N.new_zeros((), dtype=torch.float32)
        for k, objective in enumerate(self.objectives):
            coef_N = self.coef_KN[k]
            if coef_N is not None:
                view = self.view(k, rows, student, teachers)
                loss = loss + (coef_N[rows] * objective(view)).sum()
                _outside(columns, rows, f"{k}", objective, view)
                if log_variance:
                    _variance(columns, rows, f"{k}", objective, view)
        models = {
            "student": student,
            **{name: outputs for name, outputs in teachers.items() if name != "behaviour"},
        }
        for name, outputs in models.items() if self.has_logp else ():
            columns.put(f"logp {name}", rows, outputs.logp_N)
        return loss


@torch.no_grad()
def _variance(columns: Columns, rows: slice, name: str, objective: LossTerm, view: Rows[Any]) -> None:
    """Closed-form variance of the sampled logit gradient at these rows, with the objective's baseline and
    without.
    """
    for which, variance_N in zip(("with", "without"), objective.variance(view) or (), strict=False):
        columns.put(f"variance {which} {name}", rows, variance_N)


@torch.no_grad()
def _outside(columns: Columns, rows: slice, name: str, objective: LossTerm, view: Rows[Any]) -> None:
    """Where the bound of an importance ratio binds."""
    outside_N = objective.outside(view)
    if outside_N is not None:
        columns.put(f"outside {name}", rows, outside_N)


def result_of(loss: Tensor, columns: Columns) -> Result:
    """The by-products of a whole micro-batch."""
    logp = {
        name.removeprefix("logp "): column_N for name, column_N in columns.items() if name.startswith("logp ")
    }
    sums = {
        which: [
            column_N.double().sum()
            for name, column_N in columns.items()
            if name.startswith(f"variance {which} ")
        ]
        for which in ("with", "without")
    }
    variance = (torch.stack(sums["with"]).sum(), torch.stack(sums["without"]).sum()) if sums["with"] else None
    outsiders = [column_N for name, column_N in columns.items() if name.startswith("outside ")]
    return Result(loss, logp, columns.get("kl"), outsiders, variance)
