"""AUC and accuracy of pairs against enumeration, and intervals that resample prompts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu

from reflux.metrics import ranking as module
from reflux.metrics.ranking import auc, pairs_within, ranking


def shares(values: Any, right: Any) -> list[float]:
    """What each pair of a right and a wrong attempt counts, by enumeration."""
    return [
        1.0 if a > b else 0.5 if a == b else 0.0
        for (a, good), (b, bad) in itertools.product(zip(values, right, strict=True), repeat=2)
        if good and not bad
    ]


def arrays(*columns: Any) -> list[np.ndarray]:
    values, right, *prompt = columns
    return [np.asarray(values, float), np.asarray(right, bool), *(np.asarray(one, int) for one in prompt)]


attempts = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 4)), min_size=1, max_size=30)


@given(attempts)
def test_auc_is_the_mean_over_all_pairs(rows: list[tuple[int, bool, int]]) -> None:
    values, right, _ = arrays(*zip(*rows, strict=True))
    pairs = shares(values, right)
    expected = pytest.approx(np.mean(pairs), abs=1e-12) if pairs else None
    assert auc(values, right) == expected


def test_auc_equals_scipy_without_and_with_ties() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=200), rng.integers(5, size=200)):
        right = rng.random(200) < 0.3
        u = mannwhitneyu(values[right], values[~right]).statistic
        assert auc(values.astype(float), right) == pytest.approx(
            u / (right.sum() * (~right).sum()), abs=1e-12
        )


@pytest.mark.parametrize(
    ("values", "right", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([7, 7, 7, 7], [0, 1, 0, 1], 0.5),
        # right 2 and 2, wrong 1 and 2: two pairs are won and two are equal
        ([2, 2, 1, 2], [1, 1, 0, 0], 0.75),
        ([1, 2, 3], [0, 1, 0], 0.5),
        ([1, 2], [1, 1], None),
        ([1, 2], [0, 0], None),
        ([], [], None),
    ],
)
def test_auc_by_hand(values: list[float], right: list[int], expected: float | None) -> None:
    assert auc(*arrays(values, right)) == expected


@given(attempts)
def test_pairs_within_prompts_are_those_of_enumeration(rows: list[tuple[int, bool, int]]) -> None:
    values, right, prompt = arrays(*zip(*rows, strict=True))
    won_P, pairs_P = pairs_within(values, right, prompt, 6)
    for index in range(6):
        pairs = shares(values[prompt == index], right[prompt == index])
        assert (won_P[index], pairs_P[index]) == (sum(pairs), len(pairs))


def test_pairs_count_alike_and_prompts_by_their_pairs() -> None:
    """Prompt 0 has four pairs, all ranked right; prompt 1 has one, ranked wrong; prompt 2 has none."""
    found = ranking(*arrays([3, 4, 1, 2, 1, 2, 9], [1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1, 2]), seed=0)
    assert (found.pairwise, found.pairs, found.prompts) == (0.8, 5, 2)
    assert (found.attempts, found.missing) == (7, 0.0)


def test_a_signal_that_only_knows_the_prompt_ranks_no_pair() -> None:
    """It is high at easy prompts, so AUC is above one half, and within a prompt it is constant."""
    found = ranking(*arrays([2, 2, 2, 1, 1, 1], [1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]), seed=0)
    assert found.auc == pytest.approx(6 / 9)
    assert found.pairwise == 0.5


@given(attempts)
def test_monotone_maps_change_nothing_and_a_minus_mirrors(rows: list[tuple[int, bool, int]]) -> None:
    values, right, prompt = arrays(*zip(*rows, strict=True))
    found = ranking(values, right, prompt, 3, resamples=50)
    assert ranking(np.exp(values) * 5 - 2, right, prompt, 3, resamples=50) == found
    other = ranking(-values, right, prompt, 3, resamples=50)
    swapped = ranking(values, ~right, prompt, 3, resamples=50)
    for name in ("auc", "pairwise"):
        known = getattr(found, name)
        mirrored = None if known is None else pytest.approx(1 - known, abs=1e-12)
        assert getattr(other, name) == getattr(swapped, name) == mirrored


def test_missing_values_are_left_out_and_counted() -> None:
    values, right, prompt = arrays([1, 2, 3, 4], [0, 1, 0, 1], [0, 0, 1, 1])
    holes = np.asarray([np.nan, np.inf, 9.0, -np.inf])
    found = ranking(
        np.concatenate([values, holes]),
        np.concatenate([right, [True, False, True, True]]),
        np.concatenate([prompt, [0, 0, 1, 1]]),
        seed=0,
    )
    assert found.missing == 3 / 8
    assert found.attempts == 8
    assert found.auc == auc(np.append(values, 9.0), np.append(right, True))
    assert (found.pairs, found.prompts) == (3, 2)
    nothing = ranking(np.full(4, np.nan), right, prompt, seed=0)
    assert (nothing.auc, nothing.auc_low, nothing.pairwise, nothing.pairwise_high) == (None,) * 4
    assert (nothing.missing, nothing.pairs, nothing.prompts) == (1.0, 0, 0)


@pytest.mark.parametrize("verdict", [True, False])
def test_verdicts_that_all_agree_define_nothing(verdict: bool) -> None:
    found = ranking(np.arange(4.0), np.full(4, verdict), np.asarray([0, 0, 1, 1]), seed=0)
    assert (found.auc, found.auc_low, found.auc_high) == (None, None, None)
    assert (found.pairwise, found.pairwise_low, found.pairwise_high) == (None, None, None)
    assert (found.pairs, found.missing) == (0, 0.0)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        ranking(np.zeros(2), np.ones(1, bool), np.zeros(2, int), seed=0)
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        ranking(*arrays([], [], []), seed=0)


# --- intervals


def test_prompts_are_resampled_and_not_attempts() -> None:
    """Every prompt has the same attempts, so every resample of prompts is the same; of attempts it is not."""
    one = arrays([1, 4, 2, 3], [0, 1, 1, 0], [0, 0, 0, 0])
    values, right = (np.tile(column, 12) for column in one[:2])
    found = ranking(values, right, np.repeat(np.arange(12), 4), seed=0)
    assert found.auc_low == found.auc == found.auc_high == 0.75
    assert found.pairwise_low == found.pairwise == found.pairwise_high == 0.75
    assert found.auc_low is not None
    alone = ranking(values, right, np.arange(48), seed=0)
    assert alone.auc_low is not None
    assert alone.auc_high is not None
    assert alone.auc_low < 0.75 < alone.auc_high


def test_intervals_equal_the_enumerated_resamples() -> None:
    """Three prompts: 27 resamples, weighed by how often `ranking` must draw them."""
    values, right, prompt = arrays([1, 3, 2, 2, 5, 1, 4], [1, 0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 2, 2, 2])
    of_auc, of_pairs = [], []
    for drawn in itertools.product(range(3), repeat=3):
        rows = np.concatenate([np.flatnonzero(prompt == index) for index in drawn])
        of_auc.append(np.mean(shares(values[rows], right[rows])))
        of_pairs.append(
            np.mean([s for index in drawn for s in shares(values[prompt == index], right[prompt == index])])
        )
    found = ranking(values, right, prompt, seed=0, resamples=40_000, confidence=0.7)
    ends = [0.15, 0.85]
    assert (found.auc_low, found.auc_high) == pytest.approx(
        np.quantile(of_auc, ends, method="inverted_cdf"), abs=1e-9
    )
    assert (found.pairwise_low, found.pairwise_high) == pytest.approx(
        np.quantile(of_pairs, ends, method="inverted_cdf"), abs=1e-9
    )


def test_the_seed_decides_and_the_size_of_blocks_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    given_ = rng.normal(size=60), rng.random(60) < 0.5, np.repeat(np.arange(15), 4)
    found = ranking(*given_, seed=4, resamples=200)
    assert ranking(*given_, seed=4, resamples=200) == found
    assert ranking(*given_, seed=5, resamples=200) != found
    monkeypatch.setattr(module, "_AT_ONCE", 7 * 60)
    assert ranking(*given_, seed=4, resamples=200) == found


def test_one_prompt_has_no_interval() -> None:
    found = ranking(*arrays([1, 2], [0, 1], [0, 0]), seed=0)
    assert (found.auc, found.auc_low, found.auc_high) == (1.0, None, None)
    assert (found.pairwise, found.pairwise_low, found.pairwise_high) == (1.0, None, None)


def test_intervals_cover_about_as_often_as_they_say() -> None:
    """Normal values, shifted by 1 where the attempt is right, and by the same noise at all attempts of a
    prompt. Within a prompt that noise cancels: P(right above wrong) = Phi(1 / sqrt 2). Over all pairs, nearly
    all of two prompts, it is Phi(1 / sqrt(2 + 2)). Resampled attempts would cover far less often.
    """
    from scipy.stats import norm

    rng, prompts, size, draws = np.random.default_rng(0), 40, 6, 200
    prompt = np.repeat(np.arange(prompts), size)
    hits = {"auc": 0, "pairwise": 0}
    for seed in range(draws):
        right = np.tile(np.arange(size) % 2 == 0, prompts)
        values = rng.normal(size=prompts * size) + right + rng.normal(size=prompts)[prompt]
        found = ranking(values, right, prompt, seed, resamples=200, confidence=0.9)
        share = 1 / prompts
        truth = {"pairwise": norm.cdf(1 / np.sqrt(2))}
        truth["auc"] = share * truth["pairwise"] + (1 - share) * norm.cdf(1 / 2)
        for name in hits:
            low, high = getattr(found, f"{name}_low"), getattr(found, f"{name}_high")
            hits[name] += bool(low <= truth[name] <= high)
    assert all(binomtest(count, draws, 0.9).pvalue > 1e-3 for count in hits.values()), hits
