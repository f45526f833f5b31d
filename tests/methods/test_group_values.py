"""The mean reward of siblings' tokens, against plain loops written from the definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.loss.group_values import group_values

odd = st.sampled_from([math.inf, -math.inf, math.nan])
attempts = st.none() | st.lists(st.floats(-50, 50) | odd, max_size=6).map(
    lambda own: np.array(own, dtype=np.float64)
)


@given(st.lists(attempts, max_size=5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_values_are_token_means_over_the_others_or_over_all(rewards, leave_one_out):
    values = group_values(rewards, leave_one_out)
    assert len(values) == len(rewards)
    for i, value in enumerate(values):
        others = [
            r for j, own in enumerate(rewards) if j != i and own is not None for r in own if math.isfinite(r)
        ]
        mine = [] if rewards[i] is None else [r for r in rewards[i] if math.isfinite(r)]
        counted = others if leave_one_out else others + mine
        expected = sum(counted) / len(counted) if others and rewards[i] is not None else 0.0
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_tokens_count_alike_so_a_long_attempt_weighs_more():
    rewards = [np.array([1.0]), np.array([2.0, 4.0, 6.0]), np.array([8.0])]
    assert group_values(rewards, leave_one_out=True) == [5.0, 4.5, 3.25]
    assert group_values(rewards, leave_one_out=False) == [4.2] * 3


def test_nothing_of_oneself_is_in_the_value_of_the_others_not_even_a_rounding():
    rng = np.random.default_rng(0)
    siblings = [rng.standard_normal(5), rng.standard_normal(9)]
    values = {
        group_values([rng.standard_normal(7) * 10.0**size, *siblings], True)[0] for size in range(-12, 12)
    }
    assert len(values) == 1
    assert len({group_values([rng.standard_normal(7), *siblings], False)[0] for _ in range(3)}) == 3


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_without_anybody_to_compare_with_there_is_no_value(leave_one_out):
    own = np.array([3.0, -1.0])
    assert group_values([], leave_one_out) == []
    for siblings in ([], [None], [np.zeros(0)], [np.array([math.nan, -math.inf]), None]):
        assert group_values([own, *siblings], leave_one_out)[0] == 0.0
    assert group_values([own, None, np.array([5.0])], leave_one_out)[1] == 0.0


def test_float32_rewards_are_summed_in_float64():
    many = np.full(10_000, 0.1, dtype=np.float32)
    assert group_values([np.zeros(1), many], True)[0] == pytest.approx(float(np.float32(0.1)), rel=1e-14)
