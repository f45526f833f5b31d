"""Attempts -> items with every row coefficient known, -> micro-batches of packed tensors.

Only here and in `loss.py` do weights, coefficients and denominators meet, and the counts are those of the whole batch: however it is
cut into micro-batches, the gradient is the same (law 4). A row is one position with a weight that is not 0; other rows are never computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reflux.objectives.base import Objective
from reflux.types import Attempt, Group, HiddenTarget, Target, TokenRollout, TopKTarget

Normalise = str  # "kept" | "chosen" | "rollout_means"


@dataclass(frozen=True)
class Item:
    """One attempt with N kept positions. coef_KN[k] is None where objective k has no word on this attempt."""

    attempt: Attempt
    rollout: TokenRollout
    rows_N: np.ndarray  # kept positions, rising
    shift_N: np.ndarray
    coef_KN: tuple[np.ndarray | None, ...]

    @property
    def trained(self) -> int:
        """Positions the learner runs forward and backward: what follows the last kept one is cut off."""
        return int(self.rows_N[-1]) + 1

    @property
    def input_tokens(self) -> int:
        return len(self.rollout.prompt_tokens) + self.trained - 1


def target_of(attempt: Attempt, teacher: str) -> Target | None:
    """What `teacher` said about this attempt; "said" is the student as it acted."""
    return attempt.rollout.said if teacher == "said" else attempt.targets.get(teacher)


def present(attempt: Attempt, objective: Objective) -> bool:
    """Has this objective a word on this attempt: its teacher's target, or, where it lives on shifts alone, a shift that is not 0?"""
    if objective.coef == 0:
        return False  # 0 times an infinite cost is no number
    if objective.teacher is None:
        return not objective.takes_shift or bool(attempt.shift_T.any())
    return target_of(attempt, objective.teacher) is not None


def plan(groups: Iterable[Group], objectives: Sequence[Objective], normalise: Normalise) -> list[Item]:
    """Items of all attempts with something to learn from, their coefficients coef * w_n * c_n filled in."""
    attempts = [attempt for group in groups for attempt in group if attempt.rollout.finish != "error"]
    weights = [attempt.weight_T for attempt in attempts]
    scales = [_scales(attempts, weights, objective, normalise) for objective in objectives]
    items = []
    for i, (attempt, weight_T) in enumerate(zip(attempts, weights, strict=True)):
        rows_N = np.flatnonzero(weight_T)
        coef_KN = tuple(
            (objective.coef * scale[i] * weight_T[rows_N]).astype(np.float32) if present(attempt, objective) else None
            for objective, scale in zip(objectives, scales, strict=True)
        )
        if len(rows_N) and any(coef_N is not None for coef_N in coef_KN):
            assert isinstance(attempt.rollout, TokenRollout)
            items.append(Item(attempt, attempt.rollout, rows_N, attempt.shift_T[rows_N], coef_KN))
    return items


def _scales(attempts: list[Attempt], weights: list[np.ndarray], objective: Objective, normalise: Normalise) -> list[float]:
    """c per attempt: 1 / N, N = positions kept or chosen in the whole batch; or 1 / (R * T_i) under rollout_means."""
    chosen = [int(attempt.rollout.mask_T.sum()) for attempt in attempts]
    if normalise == "rollout_means":
        rollouts = sum(count > 0 for count in chosen)
        return [1.0 / (rollouts * count) if count else 0.0 for count in chosen]
    kept = [int(np.count_nonzero(w)) if present(attempt, objective) else 0 for attempt, w in zip(attempts, weights, strict=True)]
    total = sum(kept if normalise == "kept" else chosen)
    return [1.0 / total if total else 0.0] * len(attempts)


def signature(item: Item) -> tuple[object, ...]:
    """Items of one micro-batch have targets of one kind from one head, so a row needs no case distinction."""
    targets = {**item.attempt.targets, "said": item.rollout.said}
    kinds = []
    for name in sorted(targets):
        target = targets[name]
        detail = id(target.head) if isinstance(target, HiddenTarget) else None
        detail = target.ids_TK.shape[1] if isinstance(target, TopKTarget) else detail
        kinds.append((name, type(target).__name__, detail))
    return (*kinds, *(coef_N is None for coef_N in item.coef_KN))


def micro_batches(items: Sequence[Item], budget_tokens: int) -> Iterator[list[Item]]:
    """Items of one signature, long ones first, cut so that padded tokens stay within the budget (one item at least)."""
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
