"""Runs with freshness and [refresh]: without staleness they are the synchronous run; stale attempts, changed
contexts and stale supplies are treated as the specification says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest

from reflux.config.refresh import Refresh
from reflux.runtime.refreshes import COUNT, LAST, Refreshes
from reflux.types import Attempt, Credit
from tiny import rollout, same

CHAT = {"kind": "outside:Chat"}
STALE = {"steps": 7, "prompts_per_step": 2, "max_staleness": 2, "task": CHAT}
PLAIN: dict[str, Any] = {"kind": "divergence", "divergence": "reverse", "support": "full"}


def slow(student: str) -> dict[str, Any]:
    """A learner that lets the sampler run ahead."""
    return {"kind": "outside:SlowLearner", "model": student, "lr": 1e-2}


def freshness(done: Any) -> list[dict[str, Any]]:
    return [row["credit"]["freshness"] for row in done.rows("metrics")]


def test_without_staleness_and_floor_the_run_is_the_one_without_the_rule(
    tiny_run: Callable[..., Any],
) -> None:
    settings = {"steps": 3, "task": CHAT, "loss_aggregation": "token-mean"}
    rule = {"freshness": {"floor": 0.0}}
    assert same(tiny_run("full", **settings).state, tiny_run("full", **settings, credit=rule).state)


def test_attempts_of_the_current_student_cost_no_further_pass(
    tiny_run: Callable[..., Any], student: str
) -> None:
    plain = tiny_run("full", steps=2, task=CHAT, loss_aggregation="token-mean")
    ruled = tiny_run("full", steps=2, task=CHAT, loss_aggregation="token-mean", credit={"freshness": {}})
    costs = [[row["flops"]["learn"] for row in done.rows("metrics")] for done in (plain, ruled)]
    assert costs[0] == costs[1]
    stale = tiny_run("fresh", **STALE, learner=slow(student), refresh="none")
    lag_only = {"freshness": {"alpha": 0.0, "beta": 0.0}}
    blind = tiny_run("fresh", **STALE, learner=slow(student), refresh="none", credit=lag_only)
    spent = [[row["flops"]["learn"] for row in done.rows("metrics")] for done in (stale, blind)]
    assert [one > other for one, other in zip(*spent, strict=True)] == [False, *[True] * 6]


def test_stale_attempts_weigh_less_and_their_lag_is_measured(
    tiny_run: Callable[..., Any], student: str
) -> None:
    done = tiny_run("fresh", **STALE, learner=slow(student), refresh="none")
    found = freshness(done)
    assert [row["lag"] for row in found] == [0, 1, 2, 2, 2, 2, 2]
    assert [row["lag"] for row in found] == [row["staleness_mean"] for row in done.rows("metrics")]
    assert found[0]["rollout_drift"] == 0
    assert found[0]["weight_mean"] == pytest.approx(0.95)
    for row in found[1:]:
        assert row["rollout_drift"] > 0
        assert 0 < row["freshness"] < 1 / (row["lag"] + 1)
        assert row["aligned"] == 1
    details = [row["detail"]["freshness"] for row in done.rows("attempts") if row["kind"] == "learned"]
    assert [detail["lag"] for detail in details][::2] == [0, 1, 2, 2, 2, 2, 2]
    assert "refreshes" not in done.summary


def test_a_rule_about_the_tokens_that_are_likely_now_sees_these(
    tiny_run: Callable[..., Any], student: str
) -> None:
    """Freshness compares lists that differ then, and the margins are those of the run without it."""
    release = {"candidates": "now", "segments": 1, "min_segments": 2, "min_side": 1, "min_gain": -9.0}
    neutral = {"alpha": 0.01, "beta": 0.0, "lag_power": 0.0, "floor": 0.0, "k": 1}
    settings = {**STALE, "steps": 4, "learner": {**slow(student), "lr": 1e-6}, "refresh": "none"}
    alone, both = (
        tiny_run("fresh", **settings, credit={"release": release, "freshness": rule})
        for rule in ("none", neutral)
    )
    margins = [
        [row["detail"]["release"]["margins"] for row in done.rows("attempts") if row["kind"] == "learned"]
        for done in (alone, both)
    ]
    for one, other in zip(*margins, strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    assert freshness(both)[2]["aligned"] == 1
    assert freshness(both)[2]["rollout_drift"] > 0


def test_without_drift_coefficients_only_the_lag_counts(tiny_run: Callable[..., Any], student: str) -> None:
    rule = {"freshness": {"alpha": 0.0, "beta": 0.0, "floor": 0.0}}
    done = tiny_run("fresh", **STALE, learner=slow(student), refresh="none", credit=rule)
    lags = [row["lag"] for row in freshness(done)]
    assert [row["weight_mean"] for row in freshness(done)] == pytest.approx([1 / (lag + 1) for lag in lags])


def test_an_all_zero_batch_makes_no_step(tiny_run: Callable[..., Any], student: str) -> None:
    rule = {"freshness": {"floor": 0.32, "alpha": 50.0}}
    done = tiny_run("fresh", **STALE, learner=slow(student), refresh="none", credit=rule)
    rows = done.rows("metrics")
    assert [row["updates"] for row in rows[:2]] == [1, 0]
    assert rows[1]["tokens_trained"] == 0
    assert freshness(done)[1]["zero"] == 1
    assert freshness(done)[1]["effective"] == 0


@pytest.mark.parametrize("every", [2, 3])
def test_a_stale_supply_is_sampled_again_at_most_every_so_often(
    tiny_run: Callable[..., Any], student: str, every: int
) -> None:
    refresh = {"below": 1.0, "every": every}
    done = tiny_run("fresh", **STALE, learner=slow(student), refresh=refresh)
    # The batch of step 0 is at most as fresh as 1, so a refresh follows it, and then every `every` steps.
    after = {step for step in range(7) if step % every == 0}
    lags = [row["lag"] for row in freshness(done)]
    assert [lag == 0 for lag in lags] == [step == 0 or step - 1 in after for step in range(7)]
    assert max(lags) <= 2
    summary = done.summary
    assert summary["refreshes"] == len(after) == ceil(7 / every)
    # The same prompts come back in order, none lost and none trained twice.
    learned = [row["prompt"] for row in done.rows("attempts") if row["kind"] == "learned"]
    assert learned == [f"train-{i}" for i in range(14)]
    asked = Counter(row["prompt"] for row in done.rows("attempts") if row["kind"] == "attempt")
    written = sum(asked.values())
    assert written > 14
    discarded = sum(row.get("tokens_discarded", 0) for row in done.rows("metrics"))
    assert discarded == summary["tokens_discarded"] > 0


def test_without_staleness_nothing_is_refreshed_or_counted(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("fresh", steps=3, max_staleness=0, task=CHAT, refresh={"below": 1.0, "every": 1})
    assert "refreshes" not in done.summary
    assert not any("tokens_discarded" in row for row in done.rows("metrics"))


def test_fresh_batches_are_not_refreshed(tiny_run: Callable[..., Any], student: str) -> None:
    done = tiny_run("fresh", **STALE, learner=slow(student), refresh={"below": 0.0, "every": 1})
    assert done.summary["refreshes"] == 0
    assert not any("tokens_discarded" in row for row in done.rows("metrics"))


def test_a_changed_context_is_asked_again_and_the_loss_uses_the_new_answer(
    tiny_run: Callable[..., Any], student: str, teacher: str
) -> None:
    """At staleness 0 an attempt is scored and trained in one step, so nothing changes in between."""
    dated = {"kind": "local", "model": teacher, "context": {"kind": "outside:Dated", "every": 2}}
    settings = {**STALE, "learner": slow(student), "refresh": "none", "teachers": {"main": dated}}
    rule = {"freshness": {"floor": 0.0}}
    done = tiny_run("fresh", **settings, credit=rule)
    rows = done.rows("metrics")
    # the versions that sampled, and scored at first, the batch of each step
    sampled = [0, 0, 0, 1, 2, 3, 4]
    changed = [version // 2 != then // 2 for version, then in enumerate(sampled)]
    drifts = [row["supervision_drift"] for row in freshness(done)]
    assert [drift > 0 for drift in drifts] == changed
    assert any(changed)
    # Two readings where the context changed, one otherwise.
    always = {"main": {"kind": "local", "model": teacher}}
    still = tiny_run("fresh", **{**settings, "teachers": always}, credit=rule)
    assert [row["supervision_drift"] for row in freshness(still)] == [0] * 7
    for row, other, again in zip(rows, still.rows("metrics"), changed, strict=True):
        assert (row["flops"]["teach"] > 1.5 * other["flops"]["teach"]) == again
    # The weight counts it: with beta = 0 the same batch weighs more.
    ignoring = tiny_run("fresh", **settings, credit={"freshness": {"floor": 0.0, "beta": 0.0}})
    first = changed.index(True)
    assert freshness(done)[first]["weight_mean"] < freshness(ignoring)[first]["weight_mean"]


# --- the decision alone


def batch(fresh: float, aligned: float) -> list[list[Attempt]]:
    made = Attempt(rollout(3))
    made.credits["f"] = Credit(notes={"freshness": fresh, "aligned": aligned})
    silent = Attempt(rollout(0))
    silent.credits["f"] = Credit()
    return [[made, silent]]


@pytest.mark.parametrize(
    ("fresh", "aligned", "due"), [(0.3, 1.0, True), (0.31, 1.0, False), (0.9, 0.4, True), (0.9, 0.5, False)]
)
def test_both_bounds_ask_for_a_refresh(fresh: float, aligned: float, due: bool) -> None:
    refreshes = Refreshes(Refresh(below=0.3, min_aligned=0.5), {}, ["f"])
    assert refreshes.due(batch(fresh, aligned), 4) == due


def test_the_last_refresh_is_kept_with_the_totals_of_the_run() -> None:
    totals: dict[str, float] = {}
    first = Refreshes(Refresh(every=5), totals, [])
    assert [first.due([], step) for step in range(7)] == [True, False, False, False, False, True, False]
    assert totals == {COUNT: 2, LAST: 5}
    again = Refreshes(Refresh(every=5), totals, [])
    assert [again.due([], step) for step in range(7, 12)] == [False, False, False, True, False]
    assert not Refreshes(None, {}, []).due(batch(0.0, 0.0), 3)
    assert not Refreshes(Refresh(below=0.5), {}, ["f"]).due([[]], 0)
