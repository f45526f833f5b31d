"""Uni-OPD's online balance: who stays, from the page's words; random numbers of its own; silence."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.step_context import StepContext
from reflux.credit.balance import Balance, keep
from reflux.credit.base import share_credit
from reflux.models.text import as_model
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, Finish, Group, Prompt, Reward, Rollout
from tiny import gradients, rollout, same

NOW = StepContext(0, 0)
INF = math.inf
classes = st.lists(st.booleans(), max_size=16)
# exact in binary, so that a floor has one meaning
ratios = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 4.0])


def counts(kept: list[bool], correct: list[bool]) -> tuple[int, int]:
    return tuple(
        sum(k and c is wanted for k, c in zip(kept, correct, strict=True)) for wanted in (True, False)
    )  # type: ignore[return-value]


def attempt(reward: float | None, finish: Finish = "stop", prompt: str = "p", length: int = 2) -> Attempt:
    mask_T = np.ones(length, dtype=bool)
    return Attempt(
        Rollout(
            prompt=Prompt(prompt, ()), sample=0, version=0, finish=finish, mask_T=mask_T, logp_T=mask_T - 2.0
        ),
        Reward(reward),
    )


def factors(rule: Balance, group: Group, step_context: StepContext = NOW) -> list[Any]:
    return [share.weight_T for share in rule(group, step_context)]


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "staying"),
    [
        (3, 1, 1.0, (1, 1)),
        (1, 3, 1.0, (1, 1)),
        (4, 0, 1.0, (4, 0)),
        (0, 4, 1.0, (0, 4)),
        # d_c = 6 >= 5, d_w = floor(2.5) = 2 < 3
        (5, 3, 2.0, (5, 2)),
        (7, 3, 2.0, (6, 3)),
        (2, 6, 0.5, (2, 4)),
        (4, 2, 0.5, (1, 2)),
        # d_c rounds to 0: masks nothing
        (1, 1, 0.5, (1, 1)),
        # d_w rounds to 0: masks nothing
        (1, 5, 8.0, (1, 5)),
        (3, 3, 1.0, (3, 3)),
        (2, 3, 0, (0, 3)),
        # even if that empties the group
        (3, 0, 0, (0, 0)),
        (2, 3, INF, (2, 0)),
        (0, 3, INF, (0, 0)),
        (2, 3, 1e-320, (2, 3)),
        (0, 0, 1.0, (0, 0)),
    ],
)
def test_who_stays_by_hand(right: int, wrong: int, ratio: float, staying: tuple[int, int]) -> None:
    correct = [True] * right + [False] * wrong
    assert counts(keep(correct, ratio, random.Random(0)), correct) == staying


@given(correct=classes, ratio=ratios, seed=st.integers(0, 99))
def test_the_counts_are_those_of_the_page(correct: list[bool], ratio: float, seed: int) -> None:
    good, bad = sum(correct), len(correct) - sum(correct)
    few_good, few_bad = math.floor(bad * Fraction(ratio)), math.floor(good / Fraction(ratio))
    expected = (good, bad)
    if good and bad:
        expected = (
            (few_good, bad) if good > few_good >= 1 else (good, few_bad) if bad > few_bad >= 1 else expected
        )
    kept = keep(correct, ratio, random.Random(seed))
    assert len(kept) == len(correct)
    assert counts(kept, correct) == expected
    assert kept == keep(correct, ratio, random.Random(seed))
    if ratio == 1:
        # the minority is untouched
        assert sum(kept[i] for i, c in enumerate(correct) if c is (good <= bad)) == min(good, bad)


def test_every_member_of_the_larger_class_is_as_likely_to_stay() -> None:
    rng = random.Random(1)
    kept = Counter(
        i for _ in range(3000) for i, k in enumerate(keep([True] * 5 + [False] * 2, 1.0, rng)) if k and i < 5
    )
    assert chisquare([kept[i] for i in range(5)]).pvalue > 1e-3
    assert sum(kept.values()) == 6000


@pytest.mark.parametrize("ratio", [-1.0, -INF, math.nan])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio is correct : wrong"):
        keep([True], ratio, random.Random(0))
    with pytest.raises(ValueError, match="ratio is correct : wrong"):
        Balance(ratio)


def test_a_threshold_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="threshold must be a finite reward"):
        Balance(threshold=math.nan)


# --- the rule


def test_factors_are_0_or_1_and_nothing_is_shifted() -> None:
    group = [attempt(1.0), attempt(1.0), attempt(1.0), attempt(0.0)]
    shares = Balance()(group, NOW)
    assert sorted(share.weight_T for share in shares[:3]) == [0.0, 0.0, 1.0]
    assert shares[3].weight_T == 1.0
    assert all(
        share.advantage_offset_T == 0.0 and share.notes == {"kept": share.weight_T} for share in shares
    )
    assert not Balance().gives_offsets


def test_who_was_not_judged_is_not_counted_and_keeps_its_weight() -> None:
    judged = [attempt(1.0), attempt(1.0), attempt(0.0)]
    unjudged = [attempt(None), attempt(math.nan), attempt(1.0, finish="error")]
    for ratio in (0, 0.5, 1.0, INF):
        alone = factors(Balance(ratio), judged)
        assert factors(Balance(ratio), [*unjudged, *judged]) == [1.0, 1.0, 1.0, *alone]
    assert factors(Balance(0), unjudged) == [1.0, 1.0, 1.0]
    assert all(not share.notes for share in Balance()(unjudged, NOW))


def test_empty_answers_with_a_verdict_are_counted() -> None:
    assert factors(Balance(), [attempt(1.0), attempt(0.0, length=0)]) == [1.0, 1.0]
    assert factors(Balance(0), [attempt(1.0, length=0), attempt(0.0)]) == [0.0, 1.0]


def test_classes_by_threshold() -> None:
    group = [attempt(0.7), attempt(0.3), attempt(0.5)]
    assert factors(Balance(0), group) == [0.0, 1.0, 0.0]
    assert factors(Balance(0, threshold=0.6), group) == [0.0, 1.0, 1.0]


def test_none_is_the_identity() -> None:
    group = [attempt(1.0), attempt(1.0), attempt(0.0)]
    assert Balance(ratio=None) == Balance(ratio="none")  # type: ignore[arg-type]
    assert all(share.weight_T == 1.0 and not share.notes for share in Balance(ratio="none")(group, NOW))


def test_its_dice_are_those_of_run_step_and_prompt() -> None:
    def drawn(seed: int, step: int, prompt: str) -> tuple[float, ...]:
        return tuple(
            factors(
                Balance(),
                [attempt(1.0, prompt=prompt) for _ in range(9)] + [attempt(0.0, prompt=prompt)],
                StepContext(step, seed),
            )
        )

    places = [(0, 0, "p"), (1, 0, "p"), (0, 1, "p"), (0, 0, "q"), (0, 2, "p"), (0, 0, "r"), (2, 0, "p")]
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]
    assert len({drawn(*place) for place in places}) > 3


def test_left_out_attempts_give_exactly_no_gradient_and_stay_in_the_denominator() -> None:
    """seq-mean-token-mean counts them: leaving out half of a group does not raise what the others weigh."""
    teacher = as_model(tiny.net(2), character_tokenizer())

    def group() -> Group:
        made = [tiny.attempt(rollout(4, seed=1, sample=i), teacher) for i in range(4)]
        for one, value in zip(made, (1.0, 1.0, 1.0, 0.0), strict=True):
            one.reward = Reward(value)
        return made

    learner = tiny.learner(tiny.net(1))
    balanced = group()
    share_credit([balanced], {"balance": Balance()}, NOW)
    out = [i for i, one in enumerate(balanced) if not one.weight_T.any()]
    assert len(out) == 2
    muted, whole = group(), group()
    for i in out:
        # they say nothing, and are counted
        muted[i].answers.clear()
    found = gradients(learner, [balanced], [SampledKL()], "seq-mean-token-mean")
    assert same(found, gradients(learner, [muted], [SampledKL()], "seq-mean-token-mean"))
    assert not same(found, gradients(learner, [whole], [SampledKL()], "seq-mean-token-mean"))


def test_a_run_balances_and_says_so(tiny_run: Callable[..., Any]) -> None:
    settings = {
        "task": {"kind": "outside:Chat"},
        "rewards": {"verifier": {}},
        "group_size": 6,
        "loss_aggregation": "seq-mean-token-mean",
    }
    done = tiny_run("opd", steps=2, **settings, credit={"balance": {}})
    assert all(row["credit"]["balance"]["kept"] < 1 for row in done.rows("metrics"))
    verdicts: dict[Any, list[float]] = {}
    acted = {
        (row["step"], row["prompt"], row["sample"]): row["reward"]
        for row in done.rows("attempts")
        if row["kind"] == "attempt"
    }
    for row in (row for row in done.rows("attempts") if row["kind"] == "learned"):
        if row["notes"]["balance.kept"]:
            verdicts.setdefault((row["step"], row["prompt"]), []).append(
                acted[row["step"], row["prompt"], row["sample"]]
            )
    mixed = [found for found in verdicts.values() if len(set(found)) == 2]
    assert mixed
    assert all(sum(found) == len(found) / 2 for found in mixed)


def test_verdicts_of_numpy_are_verdicts() -> None:
    assert keep([np.True_, np.True_, np.False_], 1.0, random.Random(0)).count(True) == 2  # pyright: ignore[reportArgumentType]
    group = [
        Attempt(rollout(2, sample=s), reward=Reward(np.float32(right)))
        for s, right in enumerate((1, 1, 1, 0))
    ]  # pyright: ignore[reportArgumentType]
    assert sum(float(share.weight_T) for share in Balance()(group, StepContext(0, 0))) == 2
