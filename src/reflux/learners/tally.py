"""Collects the results of the micro-batches of one step, and of the ranks that share it: values for the
metrics, and a record for each attempt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from reflux.loss.aggregate import Result
from reflux.loss.batch import Item
from reflux.metrics.values import Mean, Stats, Sum, merge
from reflux.types import Attempt, StepRecord

# Key of kl_T in the columns of an attempt. Log-prob columns have non-empty names.
_KL = ""


class Tally:
    """One tally per optimiser step. An attempt's rows may be spread over several micro-batches."""

    def __init__(self) -> None:
        self._loss, self._kl, self._outside, self._variance = Sum(0.0), Mean(), Mean(), Mean()
        # Columns by the `id()` of the attempt.
        self._columns: dict[int, dict[str, np.ndarray]] = {}

    def add(self, items: Sequence[Item], result: Result) -> None:
        """Add one micro-batch. items: its attempts. result: its loss and by-products, in item order."""
        self._loss = self._loss + Sum(float(result.loss))
        self._outside = sum(
            (Mean.of(rows_N.double().cpu().numpy()) for rows_N in result.outside), self._outside
        )
        if result.variance:
            self._variance = self._variance + Mean(*(float(part) for part in result.variance))
        if result.kl_N is not None:
            self._kl = self._kl + Mean.of(result.kl_N.double().cpu().numpy())
            self._put(items, _KL, result.kl_N)
        for name, logp_N in result.logp.items():
            self._put(items, name, logp_N)

    def _put(self, items: Sequence[Item], name: str, column_N: Tensor) -> None:
        for item, values in zip(items, _split(items, column_N), strict=True):
            columns = self._columns.setdefault(id(item.attempt), {})
            values_T = columns.setdefault(name, np.full(item.rollout.length, np.nan, dtype=np.float32))
            values_T[item.rows_N] = values

    def stats(self) -> Stats:
        stats: Stats = {"loss": self._loss, "kl_nats_trained": self._kl}
        if self._outside.count:
            stats["ratio_outside_share"] = self._outside
        if self._variance.count:
            stats["gradient_variance_ratio"] = self._variance
        return stats

    def records(self, attempts: Sequence[Attempt]) -> list[StepRecord | None]:
        """One record per attempt, in order; None if none of its positions was in a micro-batch."""
        return [_record(self._columns.get(id(attempt))) for attempt in attempts]


@dataclass(frozen=True)
class Learned:
    """The result of one rank's share of a step: its stats, the record of each of its attempts by the index of
    the attempt in the whole batch, and the positions of its forward and backward passes.
    """

    stats: Stats
    records: Mapping[int, StepRecord | None]
    forward: int
    backward: int


def learned(
    shares: Sequence[Learned], attempts: int, log_variance: bool
) -> tuple[Stats, list[StepRecord | None]]:
    """The stats and records of a whole step, from those of all ranks. attempts: their number. log_variance:
    True if the variance of the sampled gradient was requested; it is 1 where nothing was sampled.
    """
    stats = merge(share.stats for share in shares)
    if log_variance and "loss" in stats:
        stats.setdefault("gradient_variance_ratio", Mean(1.0, 1.0))
    found = {place: record for share in shares for place, record in share.records.items()}
    return stats, [found.get(place) for place in range(attempts)]


def _record(columns: dict[str, np.ndarray] | None) -> StepRecord | None:
    if columns is None:
        return None
    return StepRecord(
        logp={name: values_T for name, values_T in columns.items() if name != _KL}, kl_T=columns.get(_KL)
    )


def unpacked(items: Sequence[Item], column_N: Tensor) -> Iterator[tuple[Item, np.ndarray]]:
    """Split column_N, one value per row of all items, into one array per item, with one entry per position,
    float32. Positions without a row are NaN.
    """
    for item, values in zip(items, _split(items, column_N), strict=True):
        values_T = np.full((item.rollout.length, *values.shape[1:]), np.nan, dtype=np.float32)
        values_T[item.rows_N] = values
        yield item, values_T


def _split(items: Sequence[Item], column_N: Tensor) -> list[np.ndarray]:
    """The values of each item's rows, float32."""
    ends = np.cumsum([len(item.rows_N) for item in items])[:-1]
    return np.split(column_N.float().cpu().numpy(), ends)
