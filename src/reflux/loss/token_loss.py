"""The loss of text attempts, from the hidden states that predict the tokens with a non-zero weight, and its
backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from reflux.kernels.head import Head
from reflux.kernels.raw_table import RawTable
from reflux.kernels.row_pass import Constant, row_pass
from reflux.loss.aggregate import MicroBatch, Result, result_of
from reflux.loss.batch import Item
from reflux.loss.columns import Columns
from reflux.loss.fused_gradient import write
from reflux.loss.fused_outputs import FusedStudent
from reflux.loss.outputs import FullLogits, Outputs
from reflux.loss.term import LossTerm
from reflux.models.heads import Heads
from reflux.models.text_rows import packed, padded
from reflux.types import TokenRollout


def text_of(item: Item) -> TokenRollout:
    """The rollout of an item as a TokenRollout. All items of this module have one."""
    assert isinstance(item.rollout, TokenRollout)
    return item.rollout


def _read(item: Item) -> np.ndarray:
    """The token ids that the model reads: up to the last one before the last position with a weight."""
    rollout = text_of(item)
    return np.concatenate([rollout.prompt_tokens, rollout.tokens_T[: item.trained - 1]])


class TokenMicroBatch(MicroBatch):
    """Items on the device: the inputs of the model without its output head (the matrix that maps hidden
    states to logits), and every constant that a row needs.
    """

    def __init__(
        self,
        items: list[Item],
        objectives: Sequence[LossTerm],
        device: torch.device,
        heads: Heads,
        pack: bool = False,
        pad_id: int = 0,
    ):
        """pack: the texts are packed into one row; otherwise they are padded with `pad_id`."""
        super().__init__(items, objectives, device)
        self.heads = heads
        texts = [_read(item) for item in items]
        self.texts = packed(texts, device) if pack else padded(texts, device, pad_id)
        self.rows_N = self._rows()
        self.tokens_N = self.column(lambda item: text_of(item).tokens_T[item.rows_N])
        self.teachers = {name: self.target_rows(name) for name in sorted(self.objective_teachers())}

    def _rows(self) -> Tensor:
        """The index, among all positions of the texts, of the state that predicts each position with a
        non-zero weight.
        """
        firsts = zip(self.items, self.texts.starts, strict=True)
        rows = [start + text_of(item).prompt_length - 1 + item.rows_N for item, start in firsts]
        return torch.from_numpy(np.concatenate(rows)).to(self.device)

    def constants(self) -> dict[str, Constant]:
        """The hidden states and output heads of the teachers that gave hidden states, by teacher name."""
        found = {name: (target.head_key, columns) for name, (target, columns) in self.teachers.items()}
        return {
            name: (columns["h_NH"], self.heads[key])
            for name, (key, columns) in found.items()
            if key is not None
        }

    def listed(self, name: str, rows: slice) -> Outputs:
        """The outputs of teacher `name`, which gave log-probs and no hidden states, at some rows."""
        target, columns = self.teachers[name]
        return target.outputs({column: values[rows] for column, values in columns.items()})


def backward(batch: TokenMicroBatch, h_NH: Tensor, head: Head, log_variance: bool = False) -> Result:
    """Add up the costs of every objective at the rows h_NH, times their coefficients, and run the backward
    pass. head: the student's output head. log_variance: True if the variance of the sampled gradient is
    computed too.
    """
    constants = batch.constants()
    columns = Columns(len(h_NH))

    def costs(rows: slice, student: FullLogits, full: Mapping[str, FullLogits]) -> Tensor:
        teachers = {name: full[name] if name in full else batch.listed(name, rows) for name in batch.teachers}
        loss = batch.costs(rows, student, teachers, columns, log_variance)
        _record_kl(columns, rows, student, teachers.get("main"))
        return loss

    def row_loss(rows: slice, logits_NV: Tensor, tables: list[Tensor]) -> Tensor:
        tokens_N = batch.tokens_N[rows]
        full = {name: FullLogits(table, tokens_N) for name, table in zip(constants, tables, strict=True)}
        return costs(rows, FullLogits(logits_NV, tokens_N), full)

    def fused_loss(rows: slice, logits: RawTable, tables: list[RawTable], d_NV: Tensor | None) -> Tensor:
        named = dict(zip(constants, tables, strict=True))
        student = FusedStudent(logits, named, batch.tokens_N[rows], trained=d_NV is not None)
        loss = costs(rows, student, student.teachers)
        if d_NV is not None:
            write(student, loss, d_NV)
        return loss.detach()

    loss = row_pass(h_NH, head, list(constants.values()), row_loss, fused_loss)
    loss.backward()
    return result_of(loss.detach(), columns)


@torch.no_grad()
def _record_kl(columns: Columns, rows: slice, student: FullLogits, main: Outputs | None) -> None:
    """Write the KL to teacher "main" into the columns: exact where both distributions are known, else the
    log-ratio of the sampled token.
    """
    if main is not None:
        columns.put(
            "kl", rows, student.kl(main) if isinstance(main, FullLogits) else student.logp_N - main.logp_N
        )
