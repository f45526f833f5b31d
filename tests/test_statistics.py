"""Intervals and estimators against their definitions: scipy, enumeration, simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import beta, binomtest, t

from reflux.metrics.intervals import bootstrap_mean, clustered_mean, mean_interval, pass_at_k, wilson


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
            assert pass_at_k(n, c, k) == pytest.approx(
                np.mean([any(subset) for subset in subsets]), abs=1e-12
            )


def test_pass_at_k_is_unbiased_for_k_fresh_attempts() -> None:
    n, k, p = 6, 3, 0.3
    chances = [
        np.prod([p if right else 1 - p for right in drawn])
        for drawn in itertools.product([True, False], repeat=n)
    ]
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
    assert bootstrap_mean(values, seed=0, resamples=20_000, confidence=0.8) == pytest.approx(
        expected, abs=1e-9
    )


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_mean(rng.beta(2, 3, size=60), seed, resamples=300, confidence=0.9)
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


# --- the mean of one number per problem, where all may be equal


def test_numbers_that_differ_have_the_bootstrap_interval() -> None:
    for share in (False, True):
        assert mean_interval([0.0, 0.25, 1.0, 0.5], 3, share=share) == bootstrap_mean(
            [0.0, 0.25, 1.0, 0.5], 3
        )
    assert mean_interval([-3.0, 8.0], 3, share=True) == bootstrap_mean([-3.0, 8.0], 3)


@pytest.mark.parametrize("n", [1, 30, 500])
def test_problems_that_are_all_equal_have_the_interval_of_no_or_only_successes(n: int) -> None:
    assert mean_interval([0.0] * n, 0, share=True) == wilson(0, n)
    assert mean_interval([1.0] * n, 0, share=True) == wilson(n, n)
    low, high = mean_interval([0.0] * n, 0, share=True)
    assert low == 0.0
    assert high is not None
    # Clopper-Pearson's one-sided bound: 0 of 30 may well be 9 %
    assert high > 0.8 * beta.ppf(0.95, 1, n)


def test_equal_shares_within_have_an_interval_that_is_wide_enough() -> None:
    """A share of mean 1/2 varies most where it is 0 or 1."""
    assert mean_interval([0.5] * 8, 0, share=True) == wilson(4, 8)


def test_equal_numbers_of_no_known_range_and_no_numbers_have_no_interval() -> None:
    for values, share in (([0.9] * 5, False), ([0.0] * 5, False), ([2.5] * 5, True), ([], True), ([], False)):
        assert mean_interval(values, 0, share=share) == (None, None)


# --- the mean over clusters


def test_the_interval_over_clusters_is_that_of_a_ratio_estimate() -> None:
    clusters = [np.array([1.0, 2.0]), np.array([4.0]), np.array([]), np.array([0.0, 0.0, 5.0])]
    mean, m, size = 2.0, 3, 6
    # sum of a cluster minus what the mean says
    residuals = [3 - mean * 2, 4 - mean, 5 - mean * 3]
    variance = m / (m - 1) * sum(r**2 for r in residuals) / size**2
    for confidence in (0.8, 0.95):
        half = t.ppf(0.5 + confidence / 2, m - 1) * variance**0.5
        assert clustered_mean(clusters, confidence) == pytest.approx(
            (mean, mean - half, mean + half), abs=1e-12
        )


def test_clusters_of_one_number_are_a_sample_like_any_other() -> None:
    values = np.random.default_rng(0).normal(3, 1, 9)
    mean, low, high = clustered_mean([np.array([value]) for value in values])
    expected = t.interval(0.95, 8, loc=values.mean(), scale=values.std(ddof=1) / 3)
    assert (mean, low, high) == pytest.approx((values.mean(), *expected), abs=1e-12)


def test_one_cluster_has_a_mean_and_no_interval_and_none_has_neither() -> None:
    assert clustered_mean([np.array([1.0, 2.0]), np.array([])]) == (1.5, None, None)
    assert clustered_mean([np.array([])]) == clustered_mean([]) == (None, None, None)
    assert clustered_mean([np.zeros(3), np.zeros(5)]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("m", [2, 5, 20])
def test_the_interval_over_clusters_covers_the_mean_as_often_as_it_says(m: int) -> None:
    """Clusters of 4 to 12 numbers, whose common part has half the spread of the rest. A normal quantile gives
    69 % at two clusters.
    """
    rng, draws, hits = np.random.default_rng(m), 2000, 0
    for _ in range(draws):
        clusters = [3 + rng.normal(0, 0.5) + rng.normal(0, 1, rng.integers(4, 13)) for _ in range(m)]
        _, low, high = clustered_mean(clusters)
        assert low is not None
        assert high is not None
        hits += low <= 3 <= high
    assert 0.93 < hits / draws < 0.97
