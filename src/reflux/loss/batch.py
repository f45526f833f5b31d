"""Attempts -> items with every row coefficient known, -> micro-batches of packed tensors.

Only here and in `loss.py` do weights, coefficients and denominators meet, and the counts are those of the
whole batch: however it is cut into micro-batches, the gradient is the same (law 4). A row is one position
with a weight that is not 0; other rows are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reflux.credit.log_ratio import log_ratio_T
from reflux.loss.group_values import group_values
from reflux.loss.term import LossTerm
from reflux.types import Attempt, Group, Rollout

# "token-mean-weighted" | "token-mean" | "seq-mean-token-mean"
LossAggregation = str
OverRanks = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Item:
    """One attempt with N kept positions. coef_KN[k] is None where objective k has no word on this attempt;
    value_K[k] is the value its group baseline subtracts (nats), 0 without one."""

    attempt: Attempt
    rollout: Rollout
    # kept positions, rising
    rows_N: np.ndarray
    advantage_offset_N: np.ndarray
    coef_KN: tuple[np.ndarray | None, ...]
    value_K: tuple[float, ...]

    @property
    def trained(self) -> int:
        """Positions the learner runs forward and backward."""
        return self.rollout.computed(self.rows_N)

    @property
    def positions(self) -> int:
        """`trained`, and the prompt's: what one pass is billed for."""
        return self.rollout.prompt_length + self.trained

    @property
    def input_tokens(self) -> int:
        return self.rollout.prompt_length + self.trained - 1


def present(attempt: Attempt, objective: LossTerm) -> bool:
    """Has this objective a word on this attempt: its teacher's target, or, where it lives on shifts alone, a
    shift that is not 0?
    """
    if objective.coef == 0:
        # 0 times an infinite cost is no number
        return False
    if objective.teacher is None:
        return not objective.takes_advantage_offset or bool(attempt.advantage_offset_T.any())
    return attempt.target(objective.teacher) is not None


def one_rank(counts_C: np.ndarray) -> np.ndarray:
    """The counts of all ranks where there is one."""
    return counts_C


def plan(
    groups: Iterable[Group],
    objectives: Sequence[LossTerm],
    loss_aggregation: LossAggregation,
    over_ranks: OverRanks = one_rank,
) -> list[Item]:
    """Items of all attempts with something to learn from, their coefficients coef * w_n * c_n and group
    values filled in.

    Where several ranks share a batch, whole groups each, `over_ranks` adds up an array of counts over them
    (an all-reduce; every rank calls it once, also one that holds nothing); the ranks' gradients then add up
    to that of the whole batch.
    """
    groups = list(groups)
    values = [_values(groups, objective) for objective in objectives]
    attempts = [attempt for group in groups for attempt in group if attempt.rollout.finish != "error"]
    weights = [attempt.weight_T for attempt in attempts]
    counts_C = over_ranks(
        np.array(
            [_count(attempts, weights, objective, loss_aggregation) for objective in objectives],
            dtype=np.int64,
        )
    )
    scales = [_scales(attempts, int(count), loss_aggregation) for count in counts_C]
    items = []
    for i, (attempt, weight_T) in enumerate(zip(attempts, weights, strict=True)):
        rows_N = np.flatnonzero(weight_T)
        coef_KN = tuple(
            (objective.coef * scale[i] * weight_T[rows_N]).astype(np.float32)
            if present(attempt, objective)
            else None
            for objective, scale in zip(objectives, scales, strict=True)
        )
        if len(rows_N) and any(coef_N is not None for coef_N in coef_KN):
            value_K = tuple(found.get(id(attempt), 0.0) for found in values)
            items.append(
                Item(attempt, attempt.rollout, rows_N, attempt.advantage_offset_T[rows_N], coef_KN, value_K)
            )
    return items


def _values(groups: list[Group], objective: LossTerm) -> dict[int, float]:
    """What a group baseline subtracts, by the attempt's id(): from whole groups, hence the same however the
    batch is cut afterwards.
    """
    if objective.group_baseline is None or objective.teacher is None or objective.coef == 0:
        return {}
    others_only = objective.group_baseline == "others"
    found = {}
    for group in groups:
        values = group_values([_rewards(attempt, objective.teacher) for attempt in group], others_only)
        found |= {id(attempt): value for attempt, value in zip(group, values, strict=True)}
    return found


def _rewards(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """log q(a) - log p(a) at the chosen positions, nats, p the student as it acted; None where the attempt
    has no say.

    At temperature 1, whatever was sampled from: a value estimates the reward, which is about the policy
    itself. Where the ratio is not bounded, a value from siblings leaves the expected gradient as it is all
    the same.
    """
    ratio_T = log_ratio_T(attempt, teacher)
    return None if ratio_T is None else ratio_T[attempt.rollout.mask_T]


def _count(
    attempts: list[Attempt], weights: list[np.ndarray], objective: LossTerm, loss_aggregation: LossAggregation
) -> int:
    """What the denominator counts: positions kept or chosen; under seq-mean-token-mean, attempts with a
    chosen position.
    """
    chosen = [int(attempt.rollout.mask_T.sum()) for attempt in attempts]
    if loss_aggregation == "seq-mean-token-mean":
        return sum(count > 0 for count in chosen)
    if loss_aggregation == "token-mean":
        return sum(chosen)
    return sum(
        int(np.count_nonzero(w))
        for attempt, w in zip(attempts, weights, strict=True)
        if present(attempt, objective)
    )


def _scales(attempts: list[Attempt], count: int, loss_aggregation: LossAggregation) -> list[float]:
    """c per attempt: 1 / N, N = positions kept or chosen in the whole batch; or 1 / (R * T_i) under
    seq-mean-token-mean.
    """
    if loss_aggregation != "seq-mean-token-mean":
        return [1.0 / count if count else 0.0] * len(attempts)
    chosen = [int(attempt.rollout.mask_T.sum()) for attempt in attempts]
    return [1.0 / (count * own) if own else 0.0 for own in chosen]


def signature(item: Item) -> tuple[object, ...]:
    """Items of one micro-batch have targets of one kind from one head, so a row needs no case distinction."""
    targets = ((name, item.attempt.target(name)) for name in sorted((*item.attempt.answers, "behaviour")))
    kinds = ((name, None if target is None else target.signature) for name, target in targets)
    return (*kinds, *(coef_N is None for coef_N in item.coef_KN))


def micro_batches(items: Sequence[Item], budget_tokens: int) -> Iterator[list[Item]]:
    """Items of one signature, long ones first, cut so that padded tokens stay within the budget (one item at
    least).
    """
    by_signature: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        by_signature.setdefault(signature(item), []).append(item)
    for alike in by_signature.values():
        alike.sort(key=lambda item: -item.input_tokens)
        start = 0
        while start < len(alike):
            count = max(1, budget_tokens // max(1, alike[start].input_tokens))
            yield alike[start : start + count]
            start += count
