"""The peers study's own parts: how a score is judged, and the two controls."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# scripts import their neighbours
sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import peer_signal
from random_peers import RandomPeers

from methods.test_peers import NOW, group_of, shown, told
from reflux.config.step_context import StepContext
from reflux.contexts.peers import Peers


@given(st.lists(st.tuples(st.integers(0, 4) | st.none(), st.booleans()), min_size=1, max_size=8))
def test_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int | None, bool]]) -> None:
    score_G = np.array([np.nan if value is None else float(value) for value, _ in pairs])
    right_G = np.array([right for _, right in pairs])
    known = [(value, right) for value, right in pairs if value is not None]
    above = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for (one, right), (other, wrong) in itertools.product(known, known)
        if right and not wrong
    ]
    found = peer_signal.auc(score_G, right_G)
    assert found == pytest.approx(sum(above) / len(above)) if above else math.isnan(found)


def test_measures_by_hand() -> None:
    score_G, right_G = np.array([-1.0, -0.5, -2.0, -0.5]), np.array([True, True, False, False])
    found = peer_signal.measure(score_G, right_G, np.array([0.0, 1.0, 0.0, 0.0]))
    assert found["auc"] == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    # of the right ones the first alone: above one wrong, below the other
    assert found["auc_no_twin"] == pytest.approx(0.5)
    assert found["top"] == 0.5
    assert found["twins"] == 0.25
    assert peer_signal.measure(np.full(4, -1.0), right_G, np.zeros(4))["rank"] == 0.0


@given(correct=st.lists(st.booleans(), min_size=2, max_size=8), seed=st.integers(0, 5))
def test_random_peers_fill_the_same_slots_without_a_look_at_who_is_right(
    correct: list[bool], seed: int
) -> None:
    group = group_of(correct)
    plain, dealt = (
        context(group, StepContext(0, seed)) for context in (Peers(feedback="never"), RandomPeers())
    )
    for i, (one, other) in enumerate(zip(plain, dealt, strict=True)):
        assert (one is None) == (other is None)
        assert i not in shown(other)
        assert len(set(shown(other))) == len(shown(other))
        if one is not None and other is not None:
            assert told(one).count("solution:\n") == told(other).count("solution:\n")
            assert len(shown(one)) == len(shown(other))
    assert RandomPeers()(group, StepContext(4, seed)) == dealt
    # the verdicts themselves stay
    assert [attempt.verdict for attempt in group] == [float(right) for right in correct]


def test_random_peers_show_each_as_often() -> None:
    group, counts = group_of([True, True, False, False, False]), np.zeros(5)
    for seed in range(600):
        counts[shown(RandomPeers(1, 0)(group, StepContext(0, seed))[2])] += 1
    assert counts[2] == 0
    assert abs(counts[[0, 1, 3, 4]] - 150).max() < 5 * math.sqrt(600 * 0.25 * 0.75)


def test_foreign_successes_are_of_the_next_problem() -> None:
    groups = [group_of([True, True, False]), group_of([False, True, True])]
    views = peer_signal.foreign(groups)
    assert [shown(view) for view in views[0]] == [[1, 2]] * 3
    assert [shown(view) for view in views[1]] == [[0, 1]] * 3
    assert told(views[0][0]).startswith("What is 2+3?\n\n")
    assert peer_signal.mixed(group_of([True, True, False, False]))
    assert not peer_signal.mixed(group_of([True, False, False, False]))
    assert not peer_signal.mixed(group_of([True, True, True, False]))
    assert Peers()(groups[0], NOW)
