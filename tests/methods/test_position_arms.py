"""The prefix study's own credit rules."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

# scripts import their neighbours
sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from position_arms import CutReferences, RandomPositions

from reflux import checks
from reflux.config.step_context import StepContext
from reflux.errors import ConfigError
from tiny import attempt, config, rollout


def group_of(lengths: list[int], prompt: int = 0):
    return [attempt(rollout(T, seed=prompt, sample=i)) for i, T in enumerate(lengths)]


def test_as_many_positions_as_asked_and_each_equally_often():
    counts_T, draws = np.zeros(10), 400
    for seed in range(draws):
        (credit,) = RandomPositions(3)(group_of([10]), StepContext(0, seed))
        assert credit.weight_T.sum() == 3
        assert set(credit.weight_T) == {0.0, 1.0}
        counts_T += credit.weight_T
    # 120 expected at each position, with a standard deviation of 9
    assert np.all(np.abs(counts_T - 0.3 * draws) < 37)


def test_the_draw_depends_on_the_attempt_and_not_on_the_step():
    group, rule = group_of([30, 30]), RandomPositions(8)
    one, other = (credit.weight_T for credit in rule(group, StepContext(0, 5)))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, rule(group, StepContext(9, 5))[0].weight_T)
    assert np.array_equal(other, rule(group[1:], StepContext(0, 5))[0].weight_T)
    assert not np.array_equal(one, rule(group, StepContext(0, 6))[0].weight_T)
    assert not np.array_equal(one, rule(group_of([30], 1), StepContext(0, 5))[0].weight_T)


def test_short_attempts_are_kept_whole_and_what_the_student_did_not_choose_is_not_counted():
    group = group_of([4, 0])
    assert RandomPositions(5)(group, StepContext(0, 0))[0].weight_T.tolist() == [1.0] * 4
    group[0].rollout.mask_T[1] = False
    weight_T = RandomPositions(2)(group, StepContext(0, 0))[0].weight_T
    assert weight_T[1] == 1.0
    assert weight_T[[0, 2, 3]].sum() == 2
    with pytest.raises(ValueError, match="at least 1"):
        RandomPositions(0)


def test_only_the_studys_rule_cuts_given_answers(tmp_path):
    given = {"sampler": {"kind": "references"}, "objectives": [{"kind": "divergence"}]}
    cut = {"credit": {"prefix": {"length": 4}}}
    with pytest.raises(ConfigError, match="teaches it never to end"):
        checks.join(config("full", "reflux:student", "reflux:teacher", **given, **cut))
    allowed = {"credit": {"prefix": {"kind": "position_arms:CutReferences", "length": 4}}}
    cfg = config("full", "reflux:student", "reflux:teacher", **given, **allowed)
    checks.join(cfg)
    assert cfg.credit["prefix"] == CutReferences(4)
