"""Which positions count, for how much, and how they are cut into micro-batches."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from reflux.loss.aggregate import shift_taker
from reflux.loss.batch import Item, micro_batches, plan
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, Credit, Group, HiddenTarget, SampledTarget, TeacherAnswer, TopKTarget
from tiny import attempt, rollout


def objective_teachers(n: int, seed: int = 0, **fields: Any) -> Any:
    made = attempt(
        rollout(n, seed=seed, **{k: fields.pop(k) for k in ("mask", "finish") if k in fields}), **fields
    )
    made.answers["main"] = TeacherAnswer(
        target=SampledTarget(teacher="main", logp_T=np.zeros(n, dtype=np.float32))
    )
    return made


def coefficients(groups: Any, objective: Any, loss_aggregation: str) -> list[list[float]]:
    return [item.coef_KN[0].tolist() for item in plan(groups, [objective], loss_aggregation)]  # type: ignore[union-attr]


def test_the_three_denominators_by_hand() -> None:
    """4 chosen of which 2 kept, and 3 chosen, all kept, one of weight 2: kept = 5, chosen = 7, R = 2."""
    groups = [
        [objective_teachers(5, mask=[1, 1, 0, 1, 1], weight=[1, 0, 1, 0.5, 0])],
        [objective_teachers(3, seed=1, weight=[2, 1, 1])],
    ]
    kl = SampledKL(coef=3.0)
    for loss_aggregation, wanted in {
        "token-mean-weighted": [[3 / 5, 1.5 / 5], [6 / 5, 3 / 5, 3 / 5]],
        "token-mean": [[3 / 7, 1.5 / 7], [6 / 7, 3 / 7, 3 / 7]],
        "seq-mean-token-mean": [[3 / 8, 1.5 / 8], [6 / 6, 3 / 6, 3 / 6]],
    }.items():
        for found, expected in zip(coefficients(groups, kl, loss_aggregation), wanted, strict=True):
            assert found == pytest.approx(expected)


def test_dead_groups_are_left_out_of_the_denominator_of_the_objective_that_says_so() -> None:
    """A group of which one attempt has an offset (3 and 2 chosen of it), and a dead group (4 chosen)."""
    groups = [
        [
            objective_teachers(3, seed=1, shift=1.0),
            objective_teachers(2, seed=1),
            objective_teachers(6, finish="error"),
        ],
        [objective_teachers(4, seed=2)],
    ]
    objectives = [SampledKL(), PolicyGradient(count_dead_groups=False), PolicyGradient(coef=2.0)]
    for loss_aggregation, (kl, alive, all_of_them) in {
        "token-mean": (1 / 9, 1 / 5, 2 / 9),
        "seq-mean-token-mean": (1 / 9, 1 / 6, 2 / 9),
        "token-mean-weighted": (1 / 9, 1 / 3, 2 / 3),
    }.items():
        first, *others = plan(groups, objectives, loss_aggregation)
        assert [float(coef_N[0]) for coef_N in first.coef_KN] == pytest.approx([kl, alive, all_of_them])
        assert [[coef_N is None for coef_N in item.coef_KN] for item in others] == [[False, True, True]] * 2
    dead = [groups[1]]
    assert plan(dead, [PolicyGradient(count_dead_groups=False)], "token-mean") == []


def test_a_batch_without_its_dead_groups_is_the_batch_that_does_not_count_them() -> None:
    alive = [[objective_teachers(3, seed=i, shift=1.0), objective_teachers(i + 1, seed=i)] for i in range(3)]
    dead = [[objective_teachers(5, seed=9)]]
    skips = PolicyGradient(count_dead_groups=False)
    for loss_aggregation in ("token-mean", "seq-mean-token-mean", "token-mean-weighted"):
        wanted = coefficients(alive, PolicyGradient(), loss_aggregation)
        assert coefficients([*dead, *alive, *dead], skips, loss_aggregation) == wanted
        # two ranks: each adds its own counts up with those of the other
        counts = [
            counted(part, skips, loss_aggregation) for part in ([*dead, *alive[:1]], [*alive[1:], *dead])
        ]
        assert sum(counts) == counted(alive, PolicyGradient(), loss_aggregation)


def counted(groups: Any, objective: Any, loss_aggregation: str) -> int:
    seen: list[int] = []
    plan(groups, [objective], loss_aggregation, lambda counts_C: seen.append(int(counts_C[0])) or counts_C)
    return seen[0]


def test_positions_kept_are_counted_per_objective() -> None:
    silent = attempt(rollout(4, seed=2))
    pushed = objective_teachers(3, seed=1, shift=[0.0, 1.0, 0.0])
    items = plan(
        [[objective_teachers(5)], [silent], [pushed]],
        [SampledKL(), NLL(), PolicyGradient()],
        "token-mean-weighted",
    )
    found = {
        item.rollout.length: [None if c is None else float(c[0]) for c in item.coef_KN] for item in items
    }
    eighth, twelfth, third = (pytest.approx(1 / n) for n in (8, 12, 3))
    assert found == {5: [eighth, twelfth, None], 4: [None, twelfth, None], 3: [eighth, twelfth, third]}


def test_what_follows_the_last_kept_position_is_never_run() -> None:
    (item,) = plan(
        [[objective_teachers(9, weight=[0, 1, 1, 0, 1, 0, 0, 0, 0])]], [SampledKL()], "token-mean-weighted"
    )
    assert (item.rows_N.tolist(), item.trained, item.input_tokens) == ([1, 2, 4], 5, 5 + 4)


def test_an_objective_of_coefficient_zero_says_nothing() -> None:
    assert plan([[objective_teachers(3)]], [SampledKL(coef=0.0)], "token-mean-weighted") == []


def test_shifts_go_to_exactly_one_objective() -> None:
    for objectives, taker in (
        ([Divergence(), SampledKL(), PolicyGradient()], 2),
        ([SampledKL(), SampledKL()], 0),
        ([Divergence(), SampledKL()], 1),
        ([Divergence(), NLL()], None),
    ):
        assert shift_taker(objectives) == taker


# --------------------------------------------------------------------------------------------------
# values of siblings


def rewarded(reward_T: list[float], seed: int = 0, sample: int = 0, **fields: Any) -> Attempt:
    """An attempt whose teacher gives each token `reward` nats more than the sampler did."""
    spoken = rollout(len(reward_T), seed=seed, sample=sample, **fields)
    made = attempt(spoken)
    made.answers["main"] = TeacherAnswer(
        target=SampledTarget(teacher="main", logp_T=(spoken.logp_T + np.array(reward_T)).astype(np.float32))
    )
    return made


def values(groups: list[Group], *objectives: Any) -> dict[int, tuple[float, ...]]:
    """By attempt, in order of asking."""
    items = {id(item.attempt): item.value_K for item in plan(groups, objectives, "token-mean-weighted")}
    return {
        i: items[id(entry)]
        for i, entry in enumerate(entry for group in groups for entry in group)
        if id(entry) in items
    }


def near(*numbers: float) -> Any:
    return tuple(pytest.approx(number, abs=1e-6) for number in numbers)


def test_group_values_are_means_over_whole_groups_one_per_objective() -> None:
    groups = [
        [rewarded([1.0, 3.0]), rewarded([5.0], sample=1), rewarded([0.0, 0.0, 3.0], sample=2)],
        [rewarded([7.0], seed=1), rewarded([-1.0], seed=1, sample=1)],
    ]
    objectives = [
        SampledKL(baseline="leave_one_out"),
        SampledKL(),
        SampledKL(baseline="group_mean", coef=0.5),
        Divergence(),
    ]
    assert values(groups, *objectives) == {
        0: near(2.0, 0, 2.0, 0), 1: near(7 / 5, 0, 2.0, 0), 2: near(3.0, 0, 2.0, 0), 3: near(-1.0, 0, 3.0, 0),
        4: near(7.0, 0, 3.0, 0)
    }  # fmt: skip


def test_who_has_no_say_in_the_mean_of_the_group() -> None:
    """Failed, not scored, nothing chosen, not finite; and what the student did not choose."""
    objective_teachers = rewarded([4.0, 100.0, 2.0], sample=1, mask=[1, 0, 1])
    group = [
        rewarded([1.0]), objective_teachers, rewarded([50.0], sample=3, finish="error"),
        attempt(rollout(3, sample=4)),
        rewarded([70.0], sample=5, mask=[0]), rewarded([-np.inf, np.nan, 6.0], sample=6),
    ]  # fmt: skip
    assert values([group], SampledKL(baseline="leave_one_out")) == {
        0: near(4.0),
        1: near(3.5),
        5: near(7 / 3),
    }
    assert values([[rewarded([1.0]), group[2], group[3]]], SampledKL(baseline="leave_one_out")) == {
        0: near(0.0)
    }


def test_weights_do_not_enter_the_value() -> None:
    group = [rewarded([1.0, 5.0]), rewarded([2.0], sample=1)]
    group[0].credits["weigh"] = Credit(weight_T=np.array([0.0, 2.0], dtype=np.float32))
    assert values([group], SampledKL(baseline="leave_one_out")) == {0: near(2.0), 1: near(3.0)}


@pytest.mark.parametrize("kind", ["sampled", "listed", "hidden"])
def test_every_target_that_knows_the_sampled_tokens_gives_a_value(kind: str) -> None:
    group = [rewarded([1.0, 2.0]), rewarded([5.0], sample=1)]
    for entry in group:
        logp_T = entry.target("main").logp_T  # type: ignore[union-attr]
        ids_TK = np.zeros((len(logp_T), 1), dtype=np.int64)
        target: Any = {
            "sampled": entry.target("main"),
            "listed": TopKTarget(teacher="main", ids_TK=ids_TK, logp_TK=logp_T[:, None], logp_T=logp_T),
            "hidden": HiddenTarget(
                teacher="main", h_TH=torch.zeros(len(logp_T), 2), head="main", logp_T=logp_T
            ),
        }[kind]
        entry.answers["main"] = TeacherAnswer(target=target)
    assert values([group], SampledKL(baseline="leave_one_out")) == {0: near(5.0), 1: near(1.5)}


def test_rewards_are_against_the_students_own_distribution_where_another_was_sampled_from() -> None:
    group = [rewarded([1.0]), rewarded([2.0], sample=1)]
    spoken = group[1].rollout
    group[1].rollout = dataclasses.replace(spoken, logp_raw_T=spoken.logp_T - 1)
    assert values([group], SampledKL(baseline="leave_one_out")) == {0: near(3.0), 1: near(1.0)}


def test_a_target_without_the_sampled_log_probs_is_refused_for_groups_only() -> None:
    entry = attempt(rollout(2))
    entry.answers["main"] = TeacherAnswer(
        target=HiddenTarget(teacher="main", h_TH=torch.zeros(2, 3), head="main")
    )
    assert values([[entry]], SampledKL(), SampledKL(baseline="leave_one_out", coef=0.0)) == {0: (0.0, 0.0)}
    with pytest.raises(ValueError, match=r"has no logp_T. Add `Requirements"):
        plan([[entry]], [SampledKL(baseline="leave_one_out")], "token-mean-weighted")


def test_values_are_those_of_the_batch_whatever_the_micro_batch() -> None:
    groups = [
        [rewarded([float(i), 2.0], seed=i), rewarded([1.0] * (i + 1), seed=i, sample=1)] for i in range(4)
    ]
    items = plan((group for group in groups), [SampledKL(baseline="leave_one_out")], "token-mean-weighted")
    assert len(items) == 8
    for budget in (1, 30, 1 << 20):
        parts = micro_batches(items, partial(int, budget))
        assert {id(item): item.value_K for part in parts for item in part} == {
            id(item): item.value_K for item in items
        }


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = [
        [objective_teachers(n, seed=i) if i % 3 else attempt(rollout(n, seed=i))]
        for i, n in enumerate(lengths)
    ]
    items = plan(groups, [SampledKL(), NLL()], "token-mean-weighted")
    parts = list(micro_batches(items, lambda: budget))
    assert sorted(id(item) for part in parts for item in part) == sorted(map(id, items))
    for part in parts:
        assert len(part) * max(item.input_tokens for item in part) <= budget or len(part) == 1
        assert len({tuple(coef is None for coef in item.coef_KN) for item in part}) == 1


def test_rows_of_one_micro_batch_share_head_and_width() -> None:
    from reflux.assets.characters import character_tokenizer
    from reflux.models.text import as_model

    one, other = (as_model(tiny.net(seed), character_tokenizer()) for seed in (2, 3))
    items: list[Item] = plan(
        [[attempt(rollout(3, seed=1), one)], [attempt(rollout(3, seed=2), other)]],
        [Divergence()],
        "token-mean-weighted",
    )
    assert [len(part) for part in micro_batches(items, lambda: 10_000)] == [1, 1]
