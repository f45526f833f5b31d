"""The only place where weights, shifts, coefficients and denominators meet.

    loss = sum_k coef_k * sum_n w_n * cost_k,n * c_n

`Item.coef_KN` already holds coef_k * w_n * c_n; here the costs are made, row by row of one micro-batch, and driven backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.batch import Item
from reflux.kernels.columns import Columns
from reflux.kernels.head import Head
from reflux.kernels.row_pass import Constant, row_pass
from reflux.objectives.base import Objective, Rows
from reflux.objectives.baselines import gradient_variance
from reflux.objectives.divergence import Divergence
from reflux.objectives.outcome import Outcome
from reflux.objectives.ratio import outside
from reflux.objectives.sampled_kl import SampledKL
from reflux.objectives.says import FullSays, ListedSays, SampledSays, Says
from reflux.types import HiddenTarget, SampledTarget, TopKTarget


@dataclass
class Result:
    """One micro-batch: its loss, and by-products by row in item order, detached: what records and metrics need, at no second pass."""

    loss: Tensor
    logp: dict[str, Tensor]  # of the sampled tokens, by who gave them: "student" (of now), and each teacher by name
    kl_N: Tensor | None  # reverse KL to "main": exact where both are full, else -(log q - log p) sampled
    outside: list[Tensor]  # for each shipped objective with a bounded ratio: True at the rows beyond the bound
    variance: tuple[Tensor, Tensor] | None  # closed form of the sampled gradient's, with the baseline and without, where asked for


def shift_taker(objectives: Sequence[Objective]) -> int | None:
    """The one objective that receives the shifts: an outcome-like one (no teacher) if there is one, else the first that takes them."""
    takers = [k for k, objective in enumerate(objectives) if objective.takes_shift]
    without_teacher = [k for k in takers if objectives[k].teacher is None]
    return next(iter(without_teacher + takers), None)


class MicroBatch:
    """Items on the device: the trunk's inputs, and every constant a row needs."""

    def __init__(self, items: list[Item], objectives: Sequence[Objective], device: torch.device, pad_id: int = 0):
        self.items, self.objectives, self.device = items, objectives, device
        self.ids_BL, self.rows_N = self._inputs(pad_id)
        self.tokens_N = self._column(lambda item: item.rollout.tokens_T[item.rows_N])
        self.behaviour_logp_N = self._column(
            lambda item: (item.rollout.logp_T if item.rollout.logp_raw_T is None else item.rollout.logp_raw_T)[item.rows_N]
        )
        self.shift_N = self._column(lambda item: item.shift_N)
        self.coef_KN = [
            None if coef_N is None else self._column(lambda item, k=k: item.coef_KN[k]) for k, coef_N in enumerate(items[0].coef_KN)
        ]
        self.taker = shift_taker(objectives)
        self.value_KN = [
            self._column(lambda item, k=k: np.full(len(item.rows_N), item.value_K[k], dtype=np.float32)) for k in range(len(objectives))
        ]
        self.teachers = {name: self._constants(name) for name in sorted(self._heard())}

    def _heard(self) -> set[str]:
        """Whose targets are looked at: an objective's that has a word here, and those of "main", for the records."""
        item = self.items[0]
        known = {*item.attempt.targets} | ({"said"} if item.rollout.said is not None else set())
        asked = {objective.teacher for objective, coef_N in zip(self.objectives, item.coef_KN, strict=True) if coef_N is not None}
        return known & (asked | {"main"}) if self.objectives else set()

    def _inputs(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """Right-padded ids [B, L] and the flat index of the state that predicts each kept position."""
        width = max(item.input_tokens for item in self.items)
        ids_BL = np.full((len(self.items), width), pad_id, dtype=np.int64)
        rows = []
        for b, item in enumerate(self.items):
            sequence = np.concatenate([item.rollout.prompt_tokens, item.rollout.tokens_T[: item.trained - 1]])
            ids_BL[b, : len(sequence)] = sequence
            rows.append(b * width + len(item.rollout.prompt_tokens) - 1 + item.rows_N)
        return torch.from_numpy(ids_BL).to(self.device), torch.from_numpy(np.concatenate(rows)).to(self.device)

    def _column(self, of: Any) -> Tensor:
        return torch.from_numpy(np.concatenate([of(item) for item in self.items])).to(self.device)

    def _constants(self, name: str) -> tuple[Any, ...]:
        """The stored target's tensors at the kept rows."""
        targets = [item.attempt.target(name) for item in self.items]
        pairs = list(zip(targets, self.items, strict=True))
        first = targets[0]
        if isinstance(first, HiddenTarget):
            h_NH = torch.cat([t.h_TH[torch.from_numpy(item.rows_N)] for t, item in pairs])  # type: ignore[union-attr]
            return (first, h_NH.to(self.device))
        columns = ["logp_T"] + (["ids_TK", "logp_TK"] if isinstance(first, TopKTarget) else [])
        return (
            first,
            *(torch.from_numpy(np.concatenate([getattr(t, c)[item.rows_N] for t, item in pairs])).to(self.device) for c in columns),
        )

    def view(self, k: int, rows: slice, student: FullSays, teachers: dict[str, Says]) -> Rows:
        """Some rows as objective k sees them: only the taker of shifts gets any."""
        shift_N = self.shift_N[rows] if k == self.taker else torch.zeros_like(self.shift_N[rows])
        return Rows(self.tokens_N[rows], student, teachers, self.behaviour_logp_N[rows], shift_N, self.value_KN[k][rows])

    def constants(self) -> dict[str, Constant]:
        """The teachers that are known by hidden states, with their heads."""
        return {name: (tensors[0], first.head) for name, (first, *tensors) in self.teachers.items() if isinstance(first, HiddenTarget)}

    def listed(self, name: str, rows: slice) -> Says:
        """What a teacher said at some rows, where that is all there is."""
        target, *tensors = self.teachers[name]
        if isinstance(target, SampledTarget):
            return SampledSays(tensors[0][rows])
        assert isinstance(target, TopKTarget)
        return ListedSays(ids_NK=tensors[1][rows], logp_NK=tensors[2][rows], logp_N=tensors[0][rows])


def backward(batch: MicroBatch, h_NH: Tensor, head: Head, log_variance: bool = False) -> Result:
    """Costs of every objective at the rows h_NH, times their coefficients, driven backward."""
    constants = batch.constants()
    columns = Columns(len(h_NH))

    def row_loss(rows: slice, logits_NV: Tensor, tables: list[Tensor]) -> Tensor:
        full = dict(zip(constants, tables, strict=True))
        tokens_N = batch.tokens_N[rows]
        teachers = {name: FullSays(full[name], tokens_N) if name in full else batch.listed(name, rows) for name in batch.teachers}
        student = FullSays(logits_NV, tokens_N)
        loss = logits_NV.new_zeros((), dtype=torch.float32)
        for k, objective in enumerate(batch.objectives):
            coef_N = batch.coef_KN[k]
            if coef_N is not None:
                view = batch.view(k, rows, student, teachers)
                loss = loss + (coef_N[rows] * objective(view)).sum()
                _ratio_outside(columns, rows, f"{k}", objective, view)
                if log_variance and isinstance(objective, SampledKL):
                    _variance(columns, rows, f"{k}", objective, view)
        _record(columns, rows, student, teachers)
        return loss

    loss = row_pass(h_NH, head, list(constants.values()), row_loss)
    loss.backward()
    return _result(loss.detach(), columns)


@torch.no_grad()
def _variance(columns: Columns, rows: slice, name: str, objective: SampledKL, view: Rows) -> None:
    """Closed-form variance of the sampled logit gradient at these rows, with the objective's baseline and without."""
    teacher = view.teachers[objective.teacher]
    assert isinstance(teacher, FullSays)  # checks.py refuses log_variance elsewhere
    for which, value in (("with", objective.value(view)), ("without", 0.0)):
        columns.put(f"variance {which} {name}", rows, gradient_variance(view.student.logp_NV, teacher.logp_NV, value))


@torch.no_grad()
def _ratio_outside(columns: Columns, rows: slice, name: str, objective: Objective, view: Rows) -> None:
    """Where an importance ratio is beyond its bound."""
    pair = (view.student.logp_N, view.behaviour_logp_N)
    outside_N = None
    if isinstance(objective, (SampledKL, Outcome)):
        cap = objective.ratio_cap if isinstance(objective, SampledKL) else 1.0
        outside_N = outside(*pair, objective.ratio, objective.clip, cap)
    elif isinstance(objective, Divergence):
        outside_N = outside(*pair, objective.ratio, ratio_cap=objective.ratio_cap)
    if outside_N is not None:
        columns.put(f"outside {name}", rows, outside_N)


@torch.no_grad()
def _record(columns: Columns, rows: slice, student: FullSays, teachers: dict[str, Says]) -> None:
    columns.put("logp student", rows, student.logp_N)
    for name, says in teachers.items():
        if name != "said":
            columns.put(f"logp {name}", rows, says.logp_N)
    main = teachers.get("main")
    if main is not None:
        columns.put("kl", rows, student.kl(main) if isinstance(main, FullSays) else student.logp_N - main.logp_N)


def _result(loss: Tensor, columns: Columns) -> Result:
    logp = {name.removeprefix("logp "): column_N for name, column_N in columns.items() if name.startswith("logp ")}
    sums = {
        which: [column_N.double().sum() for name, column_N in columns.items() if name.startswith(f"variance {which} ")]
        for which in ("with", "without")
    }
    variance = (torch.stack(sums["with"]).sum(), torch.stack(sums["without"]).sum()) if sums["with"] else None
    outsiders = [column_N for name, column_N in columns.items() if name.startswith("outside ")]
    return Result(loss, logp, columns.get("kl"), outsiders, variance)
