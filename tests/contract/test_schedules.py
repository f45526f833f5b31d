"""step -> number, from the formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.config.recipe import load_recipe
from reflux.config.schedules import Constant, Cosine, Linear, Steps, at, first_below, number
from reflux.errors import ConfigError


def test_values_by_hand() -> None:
    assert [Linear(16, increment=8, stop=40)(s) for s in range(5)] == [16, 24, 32, 40, 40]
    assert [Linear(10, increment=-4, stop=1)(s) for s in range(4)] == [10, 6, 2, 1]
    assert [Linear(0, stop=8, horizon=4)(s) for s in range(6)] == [0, 2, 4, 6, 8, 8]
    assert [Steps((1, 5, 2), (2, 3))(s) for s in range(5)] == [1, 1, 5, 2, 2]
    assert Constant(0.5)(99) == 0.5
    assert [at(3, 7), at(Constant(2), 7)] == [3.0, 2]


@given(st.integers(0, 20), st.integers(1, 100), st.floats(1e-6, 10), st.floats(0, 1))
def test_cosine(warmup: int, more: int, peak: float, share: float) -> None:
    horizon, floor = warmup + more, peak * share
    schedule = Cosine(peak, floor, warmup, horizon)
    for step in range(warmup):
        assert schedule(step) == pytest.approx(peak * (step + 1) / (warmup + 1))
    assert schedule(warmup) == pytest.approx(peak)
    for step in (horizon, horizon + 50):
        assert schedule(step) == pytest.approx(floor)
    middle = warmup + more / 2
    if middle == int(middle):
        assert schedule(int(middle)) == pytest.approx((peak + floor) / 2)
    step = warmup + more // 3
    assert schedule(step) == pytest.approx(
        floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / more))
    )


def test_the_horizon_is_the_runs_steps_unless_it_is_stated() -> None:
    cfg = load_recipe("opd", {"steps": 33, "learner.lr": {"kind": "cosine", "peak": 1}})
    assert cfg.learner.lr.horizon == 33
    stated = load_recipe("opd", {"steps": 33, "learner.lr": {"kind": "cosine", "peak": 1, "horizon": 5}})
    assert stated.learner.lr.horizon == 5


@pytest.mark.parametrize("bad", ["fast", None, True, float("nan"), [1, 2]])
def test_what_is_neither_number_nor_schedule_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="lr must be a number or a schedule such as"):
        number(bad, "lr")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "linear", "start": 1}, "an increment per step, or a stop"),
        ({"kind": "steps", "values": [1, 2], "boundaries": [3, 4]}, "one value more than boundaries"),
        ({"kind": "steps", "values": [1, 2, 3], "boundaries": [4, 4]}, "ascending boundaries"),
        ({"kind": "lineer", "start": 1}, "did you mean 'linear'"),
        ({"kind": "cosine", "peek": 1}, r"learner\.lr\.peek: unexpected field; did you mean 'peak'"),
    ],
)
def test_bad_schedules_are_refused_with_their_path(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=r"learner\.lr") as refused:
        load_recipe("opd", {"learner.lr": table})
    import re

    assert re.search(words, str(refused.value))


def test_first_below_finds_the_step_at_which_a_schedule_leaves_its_bound() -> None:
    falling = Linear(start=2, increment=-1)
    assert [at(falling, step) for step in range(3)] == [2, 1, 0]
    assert [first_below(falling, bound, 3) for bound in (1, 2, 0)] == [2, 1, None]
    assert first_below(falling, 1, 2) is None
    assert first_below(-1.0, 0, 5) == 0
