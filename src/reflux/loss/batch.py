"""Turns attempts into items, in which the coefficient of every row is known, and items into micro-batches.

Weights, coefficients and denominators are combined only here and in `aggregate.py`. The counts are those of
the whole batch, so the gradient does not depend on how the batch is cut into micro-batches (law 4). A row
is one position whose weight is not 0; other positions are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reflux.credit.log_ratio import log_ratio_T
from reflux.loss.group_values import group_values
from reflux.loss.term import LossTerm
from reflux.models.cut import cut
from reflux.types import Attempt, Group, Rollout

# "token-mean-weighted" | "token-mean" | "seq-mean-token-mean"
LossAggregation = str
OverRanks = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Item:
    """One attempt with N rows, the positions with a non-zero weight. coef_KN[k] is None where objective k
    does not contribute to the loss of this attempt. value_K[k] is the value that the group baseline of
    objective k subtracts (nats), 0 without a group baseline.
    """

    attempt: Attempt
    rollout: Rollout
    # the positions with a non-zero weight, in rising order
    rows_N: np.ndarray
    advantage_offset_N: np.ndarray
    coef_KN: tuple[np.ndarray | None, ...]
    value_K: tuple[float, ...]

    @property
    def trained(self) -> int:
        """Number of positions that the learner runs forward and backward."""
        return self.rollout.computed(self.rows_N)

    @property
    def positions(self) -> int:
        """`trained` plus the positions of the prompt: the cost of one pass."""
        return self.rollout.prompt_length + self.trained

    @property
    def input_tokens(self) -> int:
        return self.rollout.prompt_length + self.trained - 1


def present(attempt: Attempt, objective: LossTerm) -> bool:
    """True if this objective contributes to the loss of this attempt: the objective's teacher has a target
    for the attempt, or, for objectives that use only advantage offsets, some offset is non-zero. False where
    the objective's coefficient is 0.
    """
    if objective.coef == 0:
        # 0 times an infinite cost would be NaN.
        return False
    if objective.teacher is None:
        return not objective.takes_advantage_offset or bool(attempt.advantage_offset_T.any())
    return attempt.target(objective.teacher) is not None


def one_rank(counts_C: np.ndarray) -> np.ndarray:
    """The counts over all ranks when there is only one rank."""
    return counts_C


def plan(
    groups: Iterable[Group],
    objectives: Sequence[LossTerm],
    loss_aggregation: LossAggregation,
    over_ranks: OverRanks = one_rank,
) -> list[Item]:
    """Items of all attempts to which some objective contributes, with their coefficients coef * w_n * c_n and
    the values of their group baselines. loss_aggregation: what the loss is divided by.

    Several ranks may share a batch, each with whole groups. Then `over_ranks` adds up an array of counts
    over the ranks (an all-reduce). Every rank calls it once, including a rank without attempts. The sum of
    the ranks' gradients is then the gradient of the whole batch.
    """
    groups = list(groups)
    values = [_values(groups, objective) for objective in objectives]
    attempts = [attempt for group in groups for attempt in group if attempt.rollout.finish != "error"]
    weights = [attempt.weight_T for attempt in attempts]
    dead = [_dead(groups, objective) for objective in objectives]
    counts_C = over_ranks(
        np.array(
            [
                _count(attempts, weights, objective, loss_aggregation, without)
                for objective, without in zip(objectives, dead, strict=True)
            ],
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
    """The value that a group baseline subtracts, by the attempt's id(). It is computed from whole groups,
    so it does not depend on how the batch is cut afterwards.
    """
    if objective.group_baseline is None or objective.teacher is None or objective.coef == 0:
        return {}
    others_only = objective.group_baseline == "others"
    found = {}
    for group in groups:
        values = group_values([_rewards(attempt, objective.teacher) for attempt in group], others_only)
        found |= {id(attempt): value for attempt, value in zip(group, values, strict=True)}
    return found


def _dead(groups: list[Group], objective: LossTerm) -> set[int]:
    """The id() of the attempts of groups in which the objective contributes to the loss of no attempt. Empty
    unless the objective leaves such groups out of its denominator.
    """
    if not objective.skips_dead_groups:
        return set()
    dead = (group for group in groups if not any(present(attempt, objective) for attempt in group))
    return {id(attempt) for group in dead for attempt in group}


def _rewards(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """log q(a) - log p(a) at the chosen positions, nats, where p is the policy that sampled. None where the
    attempt has no such log-ratio.

    The log-probs are those at temperature 1, whatever temperature the tokens were sampled at, because a
    value estimates the reward, which is about the policy itself. Where the ratio is not bounded, a value
    from sibling attempts still leaves the expected gradient unchanged.
    """
    ratio_T = log_ratio_T(attempt, teacher)
    return None if ratio_T is None else ratio_T[attempt.rollout.mask_T]


def _count(
    attempts: list[Attempt],
    weights: list[np.ndarray],
    objective: LossTerm,
    loss_aggregation: LossAggregation,
    without: set[int],
) -> int:
    """The count in the denominator: the positions with a non-zero weight, under token-mean the chosen
    positions, and under seq-mean-token-mean the attempts with a chosen position. without: the id() of
    attempts that are not counted.
    """
    chosen = [int(attempt.rollout.mask_T.sum()) for attempt in attempts if id(attempt) not in without]
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
    """c per attempt. It is 1 / N, with N the count, in the whole batch, of positions with a non-zero weight
    or of chosen positions. Under seq-mean-token-mean it is 1 / (R * T_i), with R the count of attempts and
    T_i the chosen positions of attempt i.
    """
    if loss_aggregation != "seq-mean-token-mean":
        return [1.0 / count if count else 0.0] * len(attempts)
    chosen = [int(attempt.rollout.mask_T.sum()) for attempt in attempts]
    return [1.0 / (count * own) if own else 0.0 for own in chosen]


def signature(item: Item) -> tuple[object, ...]:
    """Items with the same signature may share a micro-batch. Their targets have the same kinds and the same
    output heads, so all rows are handled alike.
    """
    targets = ((name, item.attempt.target(name)) for name in sorted((*item.attempt.answers, "behaviour")))
    kinds = ((name, None if target is None else target.signature) for name, target in targets)
    return (*kinds, *(coef_N is None for coef_N in item.coef_KN))


def micro_batches(
    items: Sequence[Item], budget: Callable[[], int], pack: bool = False
) -> Iterator[list[Item]]:
    """Lists of items with one signature each, the longest items first. A list has at most as many tokens as
    `budget` says when the list is made, but at least one item. Padding counts too, unless the texts are
    packed (`pack`).
    """
    by_signature: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        by_signature.setdefault(signature(item), []).append(item)
    for alike in by_signature.values():
        alike.sort(key=lambda item: -item.input_tokens)
        for part in cut([item.input_tokens for item in alike], budget, pack):
            yield alike[part]
