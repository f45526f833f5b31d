"""Each alarm from its definition: silent before its threshold, raised once at it, the same after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from reflux.config.recipe import RunConfig, config_hash, load_recipe
from reflux.config.thresholds import AlarmName, Health
from reflux.errors import ConfigError
from reflux.metrics.health import ALARMS, Period, periods
from reflux.metrics.monitor import Monitor

GB = 10**9
FREE = 100 * GB
SIZE = 2 * GB
WINDOW = 2


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl in which nothing is wrong."""
    return {
        "step": step,
        "response_tokens_mean": 40.0,
        "truncated": 0.1,
        "entropy_nats": 1.0,
        "kl_nats": 0.3,
        "ratio_outside_share": 0.01,
        "finishes": {"stop": 8, "length": 1, "error": 11},
        "errors": 11,
        "without_target": {"main": 1},
        "asked": {"main": 8},
        "teacher_nats_by_table": {"main": {"mean": 1.5, "std": 3.0}},
        "credit": {"freshness": {"effective": 0.9, "weight_mean": 1.0}},
        "seconds": {"sample": 2.0, "total": 5.0},
    } | changes


# by alarm: what changes in a row at the threshold, and just on the healthy side of it
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "length_inflation": ({"response_tokens_mean": 80.0}, {"response_tokens_mean": 79.9}),
    "length_limited": ({"truncated": 0.5}, {"truncated": 0.499}),
    "entropy_collapse": ({"entropy_nats": 0.1}, {"entropy_nats": 0.101}),
    "uniform_teacher": (
        {"teacher_nats_by_table": {"main": {"mean": 8.0, "std": 2.0}}},
        {"teacher_nats_by_table": {"main": {"mean": 8.0, "std": 2.01}}},
    ),
    # of 20 attempts 11 have an error, so 9 could have a target
    "starved_teacher": (
        {"without_target": {"main": 9}, "asked": {"main": 1}},
        {"without_target": {"main": 8}, "asked": {"main": 1}},
    ),
    "stalled_sampler": (
        {"seconds": {"sample": 60.0, "total": 65.0}},
        {"seconds": {"sample": 59.9, "total": 65.0}},
    ),
    "small_effective_sample": (
        {"credit": {"freshness": {"effective": 0.25}}},
        {"credit": {"freshness": {"effective": 0.251}}},
    ),
    "ratio_outside": ({"ratio_outside_share": 0.2}, {"ratio_outside_share": 0.199}),
    "no_checkpoint": ({"seconds": {"total": 3600.0}}, {"seconds": {"total": 3570.0}}),
}


def config(**changes: Any) -> RunConfig:
    health = {f"health.{name}": value for name, value in ({"window": WINDOW} | changes).items()}
    return load_recipe("opd", health)


class Driven:
    """A monitor and all that it raised."""

    def __init__(self, cfg: RunConfig | None = None, free: Mapping[int, int] | None = None):
        self.step, self.free = 0, free or {}
        self.monitor = Monitor(cfg or config(), lambda: self.free.get(self.step, FREE))
        self.monitor.saved(SIZE)
        self.notes: list[str] = []
        self.held: dict[int, list[str]] = {}

    def steps(self, rows: list[dict[str, Any]]) -> Driven:
        for each in rows:
            self.step = each["step"]
            self.notes += self.monitor.stepped(each)
            self.held[self.step] = each["health"] = [*self.monitor.held]
        return self

    def evaluated(self, each: dict[str, Any]) -> Driven:
        self.step = each["step"]
        self.notes += self.monitor.evaluated(each)
        each["health"] = [*self.monitor.held]
        return self


def story(change: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Four rows, two with the change, four rows."""
    return [row(step, **(change if step in (5, 6) else {})) for step in range(1, 11)]


def test_each_alarm_has_a_rule_and_a_sentence() -> None:
    assert list(ALARMS) == list(get_args(AlarmName))
    assert {*CASES} | {"disk_nearly_full", "falling_evaluation"} == {*ALARMS}
    for alarm in ALARMS.values():
        assert alarm.look_at.endswith(".")
        assert alarm.look_at[0].isupper()


@pytest.mark.parametrize("name", CASES)
def test_it_is_silent_before_its_threshold_and_raised_once_at_it(name: str) -> None:
    at, before = CASES[name]
    assert Driven().steps(story(before)).notes == []
    found = Driven().steps(story(at))
    (note,) = found.notes
    assert note.startswith(f"step {5 if name == 'stalled_sampler' else 6}: alarm {name}. ")
    assert note.endswith(ALARMS[name].look_at)  # type: ignore[index]
    holds = {step for step, held in found.held.items() if held}
    first = 5 if name == "stalled_sampler" else 6
    # without a checkpoint the time since the last one only grows
    assert holds == ({*range(6, 11)} if name == "no_checkpoint" else {*range(first, 7)})
    assert all(held == [name] for held in found.held.values() if held)


@pytest.mark.parametrize("name", CASES)
def test_a_later_beginning_is_raised_again(name: str) -> None:
    twice = Driven()
    for start in (0, 10):
        rows = story(CASES[name][0])
        # more healthy rows in between, so that the median of the sampling times stays
        twice.steps([each | {"step": start + each["step"]} for each in rows])
        twice.monitor.saved(SIZE)
    assert len(twice.notes) == 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", range(11))
def test_a_resumed_run_has_the_same_alarms(name: str, cut: int) -> None:
    """A run is resumed from a checkpoint, so both have one at the cut."""
    rows = story(CASES[name][0])
    whole = Driven().steps(rows[:cut])
    whole.monitor.saved(SIZE)
    before = len(whole.notes)
    whole.steps(rows[cut:])
    resumed = Driven()
    written = [json.loads(json.dumps(each)) for each in rows[:cut]]
    resumed.monitor.replay(written, [])
    resumed.monitor.saved(SIZE)
    resumed.steps([{**each} for each in rows[cut:]])
    assert resumed.notes == whole.notes[before:]
    assert resumed.held == {step: held for step, held in whole.held.items() if step > cut}


def test_numbers_that_are_not_finite_count_as_missing_before_and_after_a_resume() -> None:
    rows = [
        row(step, truncated=math.nan if step in (3, 6) else 0.6 if step > 4 else 0.1) for step in range(1, 8)
    ]
    held = Driven().steps(rows).held
    assert [step for step, names in held.items() if names] == [6, 7]


def test_a_row_that_lacks_the_numbers_raises_nothing() -> None:
    bare = {"finishes": {}, "errors": 0, "without_target": {}, "asked": {}, "credit": {}}
    rows = [{"step": step, **bare, "seconds": {"total": 1.0}} for step in range(1, 9)]
    assert Driven().steps(rows).notes == []


def test_the_first_steps_are_compared_with_later_ones_alone() -> None:
    rows = [row(step, response_tokens_mean=40.0 if step < 3 else 400.0) for step in range(1, 6)]
    held = Driven().steps(rows).held
    assert held == {1: [], 2: [], 3: [], 4: ["length_inflation"], 5: ["length_inflation"]}


@pytest.mark.parametrize("window", [1, 3])
def test_the_means_are_over_the_window(window: int) -> None:
    rows = [row(step, truncated=0.5 if step > 4 else 0.0) for step in range(1, 10)]
    held = Driven(config(window=window)).steps(rows).held
    assert next(step for step, names in held.items() if names) == 4 + window


def test_answers_that_grow_with_a_growing_limit_are_no_alarm() -> None:
    """A limit on purpose, as the recipe prefix has: it grows until step 4 and cuts every answer."""
    limits = {"kind": "linear", "start": 8, "increment": 14, "stop": 64}
    cfg = load_recipe("opd", {"health.window": 2, "sampler.train_max_tokens": limits})
    cut = [cfg.draw(step - 1).max_positions for step in range(1, 10)]
    assert cut == [8, 22, 36, 50, 64, 64, 64, 64, 64]
    rows = [
        row(step, response_tokens_mean=float(limit), truncated=float(limit < 64))
        for step, limit in enumerate(cut, 1)
    ]
    assert Driven(cfg).steps(rows).notes == []
    # from step 5 on answers are compared with each other again
    rows = [each | {"response_tokens_mean": 20.0 if each["step"] < 8 else 60.0} for each in rows]
    assert Driven(cfg).steps(rows).held[9] == ["length_inflation"]


def test_a_limit_below_that_of_evaluations_cuts_on_purpose() -> None:
    cfg = load_recipe("opd", {"health.window": 2, "sampler.train_max_tokens": 8})
    assert Driven(cfg).steps([row(step, truncated=1.0) for step in range(1, 9)]).notes == []


@pytest.mark.parametrize(("kl", "collapsed"), [(None, True), (0.05, True), (0.049, False)])
def test_a_student_as_certain_as_its_teacher_has_not_collapsed(kl: float | None, collapsed: bool) -> None:
    rows = [row(step, kl_nats=kl, entropy_nats=1.0 if step < 5 else 0.05) for step in range(1, 7)]
    assert Driven().steps(rows).held[6] == (["entropy_collapse"] if collapsed else [])


def test_a_teacher_that_agrees_everywhere_is_not_uniform() -> None:
    """All log-probs near 0 are alike, too."""
    sure = {"main": {"mean": 0.99, "std": 0.0}, "other": None}
    assert Driven().steps([row(step, teacher_nats_by_table=sure) for step in range(1, 5)]).notes == []
    sure["main"]["mean"] = 1.0  # type: ignore[index]
    (note,) = Driven().steps([row(step, teacher_nats_by_table=sure) for step in range(1, 5)]).notes
    assert "Teacher main" in note


def test_a_table_that_is_never_asked_starves_although_its_name_has_targets() -> None:
    rows = [row(step, asked={"main": 8, "times": int(step == 3)}) for step in range(1, 6)]
    found = Driven().steps(rows)
    assert found.held == {1: [], 2: ["starved_teacher"], 3: [], 4: [], 5: ["starved_teacher"]}
    assert "Teacher times was asked for none" in found.notes[0]


def test_a_stall_is_measured_by_the_median_of_the_steps_before() -> None:
    times = {1: 30.0, 2: 500.0, 3: 30.0, 4: 149.9, 5: 150.0}
    rows = [row(step, seconds={"sample": times[step], "total": 1.0}) for step in times]
    assert Driven().steps(rows).held == {1: [], 2: [], 3: [], 4: [], 5: []}
    times[5] = (30.0 + 149.9) / 2 * 5
    rows = [row(step, seconds={"sample": times[step], "total": 1.0}) for step in times]
    assert Driven().steps(rows).held[5] == ["stalled_sampler"]


def test_the_disk_is_nearly_full_where_three_checkpoints_do_not_fit() -> None:
    found = Driven(free={3: 3 * SIZE - 1, 4: 3 * SIZE - 1, 5: 3 * SIZE, 6: 0})
    found.steps([row(step) for step in range(1, 7)])
    assert [step for step, held in found.held.items() if held == ["disk_nearly_full"]] == [3, 4, 6]
    assert len(found.notes) == 2
    assert "6 GB are free, and a checkpoint with the student takes 2 GB" in found.notes[0]


def test_before_the_first_checkpoint_nothing_is_known_of_its_size() -> None:
    found = Driven(free=dict.fromkeys(range(9), 0))
    found.monitor.history.saved_bytes = None
    assert found.steps([row(step) for step in range(1, 4)]).notes == []


def test_a_checkpoint_ends_the_wait_for_one() -> None:
    found = Driven().steps([row(1, seconds={"total": 7199.0}), row(2, seconds={"total": 1.0})])
    assert found.held == {1: [], 2: ["no_checkpoint"]}
    found.monitor.saved(SIZE)
    assert found.steps([row(3, seconds={"total": 7199.0})]).held[3] == []


def scores(step: int, accuracy: float, half: float = 0.03, name: str = "accuracy") -> dict[str, Any]:
    found = {"accuracy": accuracy, "low": accuracy - half, "high": accuracy + half, "problems": 200}
    return {"step": step, name: found, "agreement": {"kl_nats": 1.0, "low": 0.9, "high": 1.1}}


def test_an_evaluation_falls_where_the_interval_of_the_difference_is_below_zero() -> None:
    """0.5 with the half width 0.03 and p with 0.04: together 0.05."""
    for fallen, raised in ((0.4501, 0), (0.4499, 1)):
        found = Driven(config(fall_evaluations=1))
        for step, (accuracy, half) in enumerate([(0.2, 0.03), (0.5, 0.03), (fallen, 0.04)]):
            found.evaluated(scores(step, accuracy, half))
        assert len(found.notes) == raised
    assert "accuracy is 45.0%; at step 1 it was 50.0%" in found.notes[0]


def test_the_sides_of_both_intervals_that_face_each_other_count() -> None:
    """As Newcombe's method 10 on counts, with Wilson's intervals."""
    from reflux.metrics.intervals import wilson

    def measured(step: int, right: int, n: int) -> dict[str, Any]:
        low, high = wilson(right, n)
        return {"step": step, "accuracy": {"accuracy": right / n, "low": low, "high": high}}

    for right in range(40, 60):
        found = Driven(config(fall_evaluations=1)).evaluated(measured(0, 60, 100))
        found.evaluated(measured(1, right, 100))
        (low, _), (_, high) = wilson(60, 100), wilson(right, 100)
        below = 0.6 - right / 100 - math.sqrt((0.6 - low) ** 2 + (high - right / 100) ** 2) > 0
        assert bool(found.notes) == below
    # far ends that are far away do not count, and near ends do
    for peak, now, raised in (((0.47, 0.9), (0.1, 0.46), 1), ((0.1, 0.53), (0.44, 0.9), 0)):
        found = Driven(config(fall_evaluations=1))
        for step, (accuracy, (low, high)) in enumerate([(0.5, peak), (0.45, now)]):
            found.evaluated({"step": step, "accuracy": {"accuracy": accuracy, "low": low, "high": high}})
        assert len(found.notes) == raised


def test_one_low_evaluation_is_no_fall_and_two_are() -> None:
    found = Driven()
    for step, accuracy in enumerate([0.8, 0.1, 0.8, 0.1, 0.1, 0.1, 0.8, 0.8]):
        found.evaluated(scores(step, accuracy))
        assert found.monitor.held == (["falling_evaluation"] if step in (4, 5) else [])
    assert len(found.notes) == 1


def test_an_evaluation_without_an_interval_or_of_the_teacher_does_not_fall() -> None:
    found = Driven(config(fall_evaluations=1))
    for step, accuracy in enumerate([0.8, 0.1]):
        each = scores(step, accuracy)
        each["accuracy"]["low"] = None
        found.evaluated(each)
    assert found.notes == []


@pytest.mark.parametrize("cut", range(6))
def test_a_falling_evaluation_after_a_resume(cut: int) -> None:
    moments = [scores(step, accuracy) for step, accuracy in enumerate([0.5, 0.8, 0.1, 0.1, 0.1, 0.9])]

    def go(found: Driven, first: int, last: int) -> Driven:
        for step in range(first, last):
            if step:
                found.steps([row(step)])
            found.evaluated(moments[step])
        return found

    whole = go(Driven(), 0, 6)
    steps = [row(step, health=whole.held[step]) for step in range(1, 6)]
    resumed = Driven()
    resumed.monitor.replay(json.loads(json.dumps(steps[: max(cut - 1, 0)])), moments[:cut])
    go(resumed, cut, 6)
    assert whole.held == {1: [], 2: [], 3: [], 4: ["falling_evaluation"], 5: ["falling_evaluation"]}
    assert len(whole.notes) == 1
    assert resumed.notes == (whole.notes if cut < 4 else [])
    assert all(resumed.held[step] == whole.held[step] for step in resumed.held)


def test_a_skipped_alarm_is_never_raised() -> None:
    cfg = config(skip=["length_limited"])
    assert Driven(cfg).steps(story(CASES["length_limited"][0])).notes == []
    assert "length_limited" not in Monitor(cfg, lambda: FREE).numbers


def test_only_an_alarm_of_stop_on_ends_the_run_and_only_when_it_begins() -> None:
    cfg = config(stop_on=["length_limited"])
    assert Driven(cfg).steps(story(CASES["ratio_outside"][0])).monitor.ending is None
    found = Driven(cfg).steps(story(CASES["length_limited"][0]))
    assert found.monitor.ending == found.notes[0]
    held = row(6, health=["length_limited"], truncated=1.0)
    resumed = Driven(cfg)
    resumed.monitor.replay([row(5, truncated=1.0), held], [])
    assert resumed.steps([row(7, truncated=1.0)]).held[7] == ["length_limited"]
    assert resumed.monitor.ending is None
    assert resumed.notes == []


def test_trackers_get_a_number_for_each_alarm() -> None:
    found = Driven().steps([row(step, truncated=0.9) for step in range(1, 4)])
    assert found.monitor.numbers == {name: int(name == "length_limited") for name in ALARMS}


def test_an_unknown_alarm_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"'length_inflation', .*'falling_evaluation', got 'entropy'"):
        config(stop_on=["entropy"])
    with pytest.raises(ConfigError, match="no_checkpoint: an alarm in skip is never raised"):
        config(stop_on=["no_checkpoint"], skip=["no_checkpoint"])


def test_alarms_do_not_change_what_a_run_computes() -> None:
    assert config_hash(config(stop_on=["ratio_outside"])) == config_hash(load_recipe("opd"))
    assert Health() == load_recipe("opd").health


def test_periods_join_steps_and_evaluations() -> None:
    steps = [
        {"step": 1},
        {"step": 2, "health": ["a"]},
        {"step": 3, "health": ["a", "b"]},
        {"step": 4, "health": ["b"]},
        {"step": 5, "health": ["a"]},
    ]
    evals = [{"step": 0}, {"step": 2, "health": ["a", "c"]}, {"step": 5, "health": ["a", "d"]}]
    assert periods(steps, evals) == [
        Period("a", 2, 3),
        Period("c", 2, 2),
        Period("b", 3, 4),
        Period("a", 5, None),
        Period("d", 5, None),
    ]
    assert periods([], []) == []


def test_the_summary_counts_the_periods_of_an_alarm() -> None:
    from reflux.storage.summary import _alarms

    steps = [{"step": step, "health": ["a"] if step in (2, 3, 6) else []} for step in range(1, 8)]
    evals = [{"step": 7, "health": ["b"]}]
    assert _alarms(steps, evals) == {
        "a": {"times": 2, "first_step": 2, "last_step": 6},
        "b": {"times": 1, "first_step": 7, "last_step": None},
    }
