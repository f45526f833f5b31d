"""Intervals and estimators against their definitions: scipy, enumeration, simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from reflux.statistics import bootstrap_mean, pass_at_k, wilson


@pytest.mark.parametrize("n", [1, 7, 500])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_equals_scipy(n: int, confidence: float) -> None:
    for successes in {0, 1, n // 3, n}:
        expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_knows_nothing_of_no_problems() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_stays_within_0_and_1_at_the_ends() -> None:
    for n in range(1, 200):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0
        assert wilson(0, n)[1] > 0.0
        assert wilson(n, n)[0] < 1.0


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (1, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(successes, n)


def test_pass_at_k_equals_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-12)


def test_pass_at_k_is_unbiased_for_k_fresh_attempts() -> None:
    n, k, p = 6, 3, 0.3
    chances = [np.prod([p if right else 1 - p for right in drawn]) for drawn in itertools.product([True, False], repeat=n)]
    estimates = [pass_at_k(n, sum(drawn), k) for drawn in itertools.product([True, False], repeat=n)]
    assert np.dot(chances, estimates) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, c, k)


def test_bootstrap_equals_the_enumerated_distribution_of_resampled_means() -> None:
    values = [0.0, 0.5, 3.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    expected = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert bootstrap_mean(values, seed=0, resamples=20_000, confidence=0.8) == pytest.approx(expected, abs=1e-9)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    dice = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_mean(dice.beta(2, 3, size=60), seed, resamples=300, confidence=0.9)
        hits += low <= 0.4 <= high
    assert binomtest(hits, 300, 0.9).pvalue > 1e-3


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.linspace(0, 1, 20)
    assert bootstrap_mean(values, 3) == bootstrap_mean(list(values), 3)
    assert bootstrap_mean(values, 3) != bootstrap_mean(values, 4)


def test_bootstrap_refuses_no_problems_and_a_table() -> None:
    for values in ([], np.ones((2, 2))):
        with pytest.raises(ValueError, match="one number per problem"):
            bootstrap_mean(values, 0)
