"""Computes the loss of one micro-batch from costs, coefficients and advantage offsets.

    loss = sum_k coef_k * sum_n w_n * cost_k,n * c_n

`Item.coef_KN` already holds coef_k * w_n * c_n (see `batch.py`). This module calls every objective and adds
up the costs. It is the same for text and for flows; `token_loss.py` and `flow_loss.py` compute the rows
from a model.
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
    """The loss of one micro-batch, and detached by-products by row in item order. Records and metrics use
    the by-products, so no second pass is needed.
    """

    loss: Tensor
    # log-probs of the sampled tokens, by model: "student" (at this step), and each teacher by its name
    logp: dict[str, Tensor]
    # reverse KL to teacher "main": exact where both distributions are known in full, else the sampled
    # estimate -(log q - log p)
    kl_N: Tensor | None
    # for each objective whose importance ratio has a bound: True at the rows where the bound binds
    outside: list[Tensor]
    # closed-form variance of the sampled gradient, (with the baseline, without it); None unless requested
    variance: tuple[Tensor, Tensor] | None


def no_rows(loss: Tensor) -> Result:
    """The result of a micro-batch without rows. loss: 0."""
    return Result(loss, {}, None, [], None)


def shift_taker(objectives: Sequence[LossTerm]) -> int | None:
    """Index of the one objective that receives the advantage offsets: the first objective without a teacher
    that takes offsets, else the first objective that takes offsets. None if no objective takes offsets.
    """
    takers = [k for k, objective in enumerate(objectives) if objective.takes_advantage_offset]
    without_teacher = [k for k in takers if objectives[k].teacher is None]
    return next(iter(without_teacher + takers), None)


class MicroBatch:
    """Items of one micro-batch on the device, with every constant that their rows need, for text and for
    flows.
    """

    # False where the choices have no density, as with the steps of an ODE
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
        """One array per item, given by `of(item)`, concatenated, on the device."""
        return torch.from_numpy(np.concatenate([of(item) for item in self.items])).to(self.device)

    def target_rows(self, name: str) -> tuple[Any, dict[str, Tensor]]:
        """The first item's target from teacher `name`, and the target columns of all items at their rows,
        concatenated, on the device.
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
        """Names of the teachers whose targets are used: those of the objectives that contribute to the loss
        here, and "main", whose log-probs go into the records.
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
        """Some rows as the input of objective k. student, teachers: the outputs of the models at these rows.
        Only the objective `taker` gets advantage offsets; the others get zeros.
        """
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
        """The loss of some rows, summed over all objectives. student, teachers: the outputs of the models at
        these rows. By-products are written into `columns`. log_variance: True if the variance of the sampled
        gradient is one of them.
        """
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
    """Write the closed-form variance of the sampled logit gradient at these rows into the columns, with the
    objective's baseline and without it.
    """
    for which, variance_N in zip(("with", "without"), objective.variance(view) or (), strict=False):
        columns.put(f"variance {which} {name}", rows, variance_N)


@torch.no_grad()
def _outside(columns: Columns, rows: slice, name: str, objective: LossTerm, view: Rows[Any]) -> None:
    """Write into the columns at which rows the bound of the importance ratio binds."""
    outside_N = objective.outside(view)
    if outside_N is not None:
        columns.put(f"outside {name}", rows, outside_N)


def result_of(loss: Tensor, columns: Columns) -> Result:
    """The result of a whole micro-batch, from its loss and its by-products."""
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
