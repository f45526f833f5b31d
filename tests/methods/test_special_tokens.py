"""Credit rule `prefix` with special_tokens = false: special tokens weigh nothing, the end of the sequence
keeps its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.credit.prefix import Prefix
from reflux.loss.batch import plan
from reflux.models.chat.ends import special_ids
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, FlowRollout, Prompt, TokenRollout
from tiny import END, close, gradients, same

NOW = StepContext(step=0, seed=0)
# ids of the character tokenizer
END_AT, PAD, USER = END, 0, 4


def spoken(tokens: list[int], mask: list[bool] | None = None) -> TokenRollout:
    """An attempt of these tokens, recorded as a sampler does that is asked which are special."""
    special = sorted(special_ids(character_tokenizer(), (END,)))
    made = tiny.rollout(len(tokens), mask=mask)
    return replace(made, tokens_T=np.array(tokens), special_T=np.isin(tokens, special))


def drawn() -> FlowRollout:
    empty_T = np.zeros(1, dtype=np.float32)
    return FlowRollout(
        prompt=Prompt("p", ()),
        sample=0,
        version=0,
        finish="stop",
        mask_T=np.ones(1, dtype=bool),
        logp_T=empty_T,
        x_SD=np.zeros((2, 1), dtype=np.float32),
        t_S=np.array([1.0, 0.0], dtype=np.float32),
        noise_level=0.7,
        guidance=1.0,
        image=np.zeros((1, 1), dtype=np.uint8),
    )


def factors(rule: Prefix, tokens: list[int], mask: list[bool] | None = None) -> list[float]:
    (share,) = rule([Attempt(spoken(tokens, mask))], NOW)
    return share.weight_T.tolist()


def test_special_tokens_weigh_nothing_and_the_end_keeps_its_weight() -> None:
    tokens = [20, USER, 21, PAD, 22, END_AT]
    assert factors(Prefix(100, special_tokens=False), tokens) == [1, 0, 1, 0, 1, 1]
    assert factors(Prefix(100), tokens) == [1] * 6


def test_a_special_token_counts_towards_the_length() -> None:
    """As it counts in a cap of the sampler: a mask is a cut here too."""
    assert factors(Prefix(3, special_tokens=False), [20, USER, 21, 22, END_AT]) == [1, 0, 1, 0, 0]
    assert factors(Prefix(2, start=1, special_tokens=False), [20, USER, 21, 22]) == [0, 0, 1, 0]


@given(
    tokens=st.lists(st.sampled_from([PAD, END_AT, USER, 20, 21]), min_size=1, max_size=12),
    length=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_the_weight_is_the_product_of_prefix_and_not_special(
    tokens: list[int], length: int, seed: int
) -> None:
    """From the definition. It is a factor: the mask stays, so what was chosen is still counted as chosen."""
    mask = (np.random.default_rng(seed).random(len(tokens)) < 0.7).tolist()
    attempt = Attempt(spoken(tokens, mask))
    share_credit([[attempt]], {"prefix": Prefix(length, special_tokens=False)}, NOW)
    expected, count = [], 0
    for token, chosen in zip(tokens, mask, strict=True):
        count += chosen
        expected.append(float(chosen and count <= length and token not in (PAD, USER)))
    assert attempt.weight_T.tolist() == expected
    assert attempt.rollout.mask_T.tolist() == mask
    if any(mask):
        assert attempt.credits["prefix"].notes["kept"] == pytest.approx(sum(expected) / sum(mask))


@pytest.mark.parametrize("objective", [Divergence(), SampledKL(baseline="kl")])
def test_the_gradient_is_that_of_the_other_positions_alone(objective: Any) -> None:
    """By hand: factors written down position by position. Under `chosen` the special tokens stay in the
    denominator.
    """
    teacher = as_model(tiny.net(2).double(), character_tokenizer())
    rollouts = [spoken([20, USER, 30, END_AT]), spoken([PAD, 21, 22, 23, 24])]
    ruled = [[tiny.attempt(rollout, teacher)] for rollout in rollouts]
    share_credit(ruled, {"prefix": Prefix(100, special_tokens=False)}, NOW)
    by_hand = [
        [tiny.attempt(r, teacher, weight=w)]
        for r, w in zip(rollouts, ([1, 0, 1, 1], [0, 1, 1, 1, 1]), strict=True)
    ]
    learner = tiny.learner(tiny.net(1).double())
    for loss_aggregation, rows in (("token-mean-weighted", 7), ("token-mean", 9)):
        assert same(
            *(gradients(learner, groups, [objective], loss_aggregation) for groups in (ruled, by_hand))
        )
        assert [
            float(item.coef_KN[0][0]) for item in plan(ruled, [objective], loss_aggregation)
        ] == pytest.approx([1 / rows] * 2)
    whole = gradients(learner, [[tiny.attempt(rollout, teacher)] for rollout in rollouts], [objective])
    with pytest.raises(AssertionError):
        close(whole, gradients(learner, ruled, [objective]), rtol=1e-3)


def test_it_is_the_identity_where_no_special_token_is_written() -> None:
    """Neutral, bit for bit: the end is none of them."""
    teacher, learner = as_model(tiny.net(2), character_tokenizer()), tiny.learner(tiny.net(1))
    plain = [[tiny.attempt(spoken([20, 21, 30, END_AT]), teacher)], [tiny.attempt(spoken([22, 23]), teacher)]]
    expected = gradients(learner, plain, [Divergence(), SampledKL()])
    share_credit(plain, {"prefix": Prefix(4, special_tokens=False)}, NOW)
    assert same(gradients(learner, plain, [Divergence(), SampledKL()]), expected)


def test_a_special_tokens_own_target_changes_nothing() -> None:
    teacher, other = (as_model(tiny.net(seed), character_tokenizer()) for seed in (2, 3))
    learner, results = tiny.learner(tiny.net(1)), []
    for model in (teacher, other):
        attempt = tiny.attempt(spoken([20, USER, 30, END_AT]), teacher)
        attempt.target("main").h_TH[1] = tiny.hidden(model, attempt.rollout).h_TH[1]
        share_credit([[attempt]], {"prefix": Prefix(100, special_tokens=False)}, NOW)
        results.append(gradients(learner, [[attempt]], [Divergence()]))
    assert same(*results)


def test_only_who_leaves_them_out_wants_to_know_them() -> None:
    assert Prefix(4).requirements == Requirements()
    assert Prefix(4, special_tokens=False).requirements == Requirements(specials=True)
    assert (Requirements(specials=True) | Requirements()).specials
    assert (Requirements() | Requirements(specials=True)).specials


def test_attempts_that_do_not_say_which_are_special_are_refused_in_words() -> None:
    rule = Prefix(4, special_tokens=False)
    with pytest.raises(
        ValueError, match=r"and that of prompt p0 has none recorded. .* `Requirements\(specials=True\)`"
    ):
        rule([Attempt(tiny.rollout(3))], NOW)
    with pytest.raises(ValueError, match="a flow rollout has none"):
        rule([Attempt(drawn())], NOW)
    assert Prefix(4)([Attempt(tiny.rollout(3))], NOW)[0].weight_T.tolist() == [1, 1, 1]


def test_in_a_run_no_special_token_has_weight_and_the_ends_have(tiny_run: Callable[..., Any]) -> None:
    settings = {
        "steps": 1,
        "task": {"kind": "outside:Chat"},
        "sampler__max_tokens": 40,
        "prompts_per_step": 8,
    }
    rows = tiny_run("full", **settings, credit={"prefix": {"length": 40, "special_tokens": False}}).rows(
        "attempts"
    )
    tokens = {(row["prompt"], row["sample"]): row["tokens"] for row in rows if row["kind"] == "attempt"}
    pairs = [
        pair
        for row in rows
        if row["kind"] == "learned"
        for pair in zip(tokens[row["prompt"], row["sample"]], row["weight"], strict=True)
    ]
    assert {token for token, weight in pairs if weight == 0} <= {0, 2, 3, 4, 5}
    assert {token for token, weight in pairs if weight == 1} >= {END_AT}
    assert any(weight == 0 for _, weight in pairs)
    assert not any(token < 6 and token != END_AT for token, weight in pairs if weight)
