"""Which positions count, for how much, and how they are cut into micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from reflux.batch import Item, micro_batches, plan
from reflux.loss import shift_taker
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.outcome import Outcome
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import SampledTarget
from tiny import attempt, rollout


def heard(n: int, seed: int = 0, **fields: Any) -> Any:
    made = attempt(rollout(n, seed=seed, **{k: fields.pop(k) for k in ("mask", "finish") if k in fields}), **fields)
    made.targets["main"] = SampledTarget(teacher="main", logp_T=np.zeros(n, dtype=np.float32))
    return made


def coefficients(groups: Any, objective: Any, normalise: str) -> list[list[float]]:
    return [item.coef_KN[0].tolist() for item in plan(groups, [objective], normalise)]  # type: ignore[union-attr]


def test_the_three_denominators_by_hand() -> None:
    """4 chosen of which 2 kept, and 3 chosen, all kept, one of weight 2: kept = 5, chosen = 7, R = 2."""
    groups = [[heard(5, mask=[1, 1, 0, 1, 1], weight=[1, 0, 1, 0.5, 0])], [heard(3, seed=1, weight=[2, 1, 1])]]
    kl = SampledKL(coef=3.0)
    for normalise, wanted in {
        "kept": [[3 / 5, 1.5 / 5], [6 / 5, 3 / 5, 3 / 5]],
        "chosen": [[3 / 7, 1.5 / 7], [6 / 7, 3 / 7, 3 / 7]],
        "rollout_means": [[3 / 8, 1.5 / 8], [6 / 6, 3 / 6, 3 / 6]],
    }.items():
        for found, expected in zip(coefficients(groups, kl, normalise), wanted, strict=True):
            assert found == pytest.approx(expected)


def test_positions_kept_are_counted_per_objective() -> None:
    silent = attempt(rollout(4, seed=2))
    pushed = heard(3, seed=1, shift=[0.0, 1.0, 0.0])
    items = plan([[heard(5)], [silent], [pushed]], [SampledKL(), NLL(), Outcome()], "kept")
    found = {item.rollout.length: [None if c is None else float(c[0]) for c in item.coef_KN] for item in items}
    eighth, twelfth, third = (pytest.approx(1 / n) for n in (8, 12, 3))
    assert found == {5: [eighth, twelfth, None], 4: [None, twelfth, None], 3: [eighth, twelfth, third]}


def test_what_follows_the_last_kept_position_is_never_run() -> None:
    (item,) = plan([[heard(9, weight=[0, 1, 1, 0, 1, 0, 0, 0, 0])]], [SampledKL()], "kept")
    assert (item.rows_N.tolist(), item.trained, item.input_tokens) == ([1, 2, 4], 5, 5 + 4)


def test_an_objective_of_coefficient_zero_says_nothing() -> None:
    assert plan([[heard(3)]], [SampledKL(coef=0.0)], "kept") == []


def test_shifts_go_to_exactly_one_objective() -> None:
    for objectives, taker in (
        ([Divergence(), SampledKL(), Outcome()], 2),
        ([SampledKL(), SampledKL()], 0),
        ([Divergence(), SampledKL()], 1),
        ([Divergence(), NLL()], None),
    ):
        assert shift_taker(objectives) == taker


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = [[heard(n, seed=i) if i % 3 else attempt(rollout(n, seed=i))] for i, n in enumerate(lengths)]
    items = plan(groups, [SampledKL(), NLL()], "kept")
    parts = list(micro_batches(items, budget))
    assert sorted(id(item) for part in parts for item in part) == sorted(map(id, items))
    for part in parts:
        assert len(part) * max(item.input_tokens for item in part) <= budget or len(part) == 1
        assert len({tuple(coef is None for coef in item.coef_KN) for item in part}) == 1


def test_rows_of_one_micro_batch_share_head_and_width() -> None:
    from reflux.assets.tokenizer import character_tokenizer
    from reflux.models import as_model

    one, other = (as_model(tiny.net(seed), character_tokenizer()) for seed in (2, 3))
    items: list[Item] = plan([[attempt(rollout(3, seed=1), one)], [attempt(rollout(3, seed=2), other)]], [Divergence()], "kept")
    assert [len(part) for part in micro_batches(items, 10_000)] == [1, 1]
