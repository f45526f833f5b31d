"""Several rewards of a recipe are one: values add up by weights, and what each of them says is kept under its
name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

import tiny
import tiny_flow
from reflux import checks
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError
from reflux.rewards.environment_reward import EnvironmentReward, given
from reflux.rewards.opened_rewards import open_rewards
from reflux.rewards.verifier import Verifier
from reflux.rewards.weighted import combined
from reflux.types import Attempt, Group, Reward

CHAT = {"kind": "outside:Chat"}
BRIEF = {"kind": "outside:Brief"}


class Fixed:
    """Returns what it was given."""

    learns = False

    def __init__(self, weight: float, *rewards: Reward):
        self.weight, self.rewards, self.asked = weight, list(rewards), 0

    @asynccontextmanager
    async def open(self, *known: Any) -> AsyncIterator[Any]:
        yield self

    async def score(self, group: Group) -> list[Reward]:
        self.asked += 1
        return self.rewards


def asked(size: int, **rewards: Fixed) -> list[Reward] | None:
    group = [Attempt(tiny.rollout(2, sample=sample)) for sample in range(size)]

    async def ask() -> list[Reward] | None:
        async with open_rewards(rewards, lambda name: None, None) as opened:  # type: ignore[arg-type, return-value]
            return None if opened.judging is None else await opened.judging.score(group)

    found = asyncio.run(ask())
    # asking changes nothing
    assert [attempt.reward for attempt in group] == [None] * size
    return found


def test_no_reward_is_none() -> None:
    assert asked(1) is None


def test_one_reward_of_weight_1_is_unchanged() -> None:
    told = [Reward(0.3, {"style": 0.5}, "words"), Reward(None, {}, None, "no time left")]
    found = asked(2, mine=Fixed(1.0, *told))
    assert found is not None
    assert all(one is other for one, other in zip(found, told, strict=True))


def test_one_reward_of_another_weight_is_a_sum_of_one() -> None:
    assert asked(1, mine=Fixed(-2.0, Reward(0.25, {"style": 0.5}))) == [
        Reward(-0.5, {"mine": 0.25, "mine.style": 0.5})
    ]


def test_values_add_up_by_weight_and_everything_is_kept_under_its_name() -> None:
    right, brief = (
        Fixed(1.0, Reward(1.0, {"steps": 3.0}), Reward(0.0, feedback="Wrong.")),
        Fixed(0.25, Reward(-2.0, feedback="Two."), Reward(4.0, {"odd": 1.0}, "Four.")),
    )
    assert asked(2, right=right, brief=brief) == [
        Reward(1.0 + 0.25 * -2.0, {"right": 1.0, "brief": -2.0, "right.steps": 3.0}, "Two."),
        Reward(0.25 * 4.0, {"right": 0.0, "brief": 4.0, "brief.odd": 1.0}, "Wrong.\nFour."),
    ]
    assert (right.asked, brief.asked) == (1, 1)


def test_a_missing_value_makes_the_sum_missing_and_the_first_says_why() -> None:
    rewards = {
        "a": Reward(1.0),
        "b": Reward(None, {"x": 2.0}, "words", "no time left"),
        "c": Reward(None, error="no idea"),
        "d": Reward(3.0),
    }
    found = combined(rewards, dict.fromkeys(rewards, 1.0))
    assert found == Reward(None, {"a": 1.0, "d": 3.0, "b.x": 2.0}, "words", "rewards.b: no time left")
    assert combined({"a": Reward(None)}, {"a": 2.0}).error == "rewards.a: no verdict was given"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_no_number_is_missing(value: float) -> None:
    found = combined({"a": Reward(value), "b": Reward(1.0)}, {"a": 1.0, "b": 1.0})
    assert found.value is None
    assert "not finite" in (found.error or "")


def test_a_reward_that_forgets_an_attempt_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        asked(2, one=Fixed(1.0, Reward(1.0), Reward(1.0)), other=Fixed(1.0, Reward(1.0)))


# --- in a recipe


def test_the_kind_of_a_reward_is_its_name_where_none_is_written() -> None:
    assert load_recipe("rl").rewards == {"verifier": Verifier()}
    cfg = load_recipe("rl", {"rewards.right": {"kind": "verifier", "weight": 2}, "rewards.verifier": "none"})
    assert cfg.rewards == {"right": Verifier(weight=2.0)}


@pytest.mark.parametrize(
    "old", [{"reward.kind": "verifier"}, {"reward": {"kind": "verifier"}}, {"reward": "none"}]
)
def test_the_key_reward_is_refused_with_the_form_to_write(old: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^reward: there is no key `reward`.*write \[rewards.verifier\]"):
        load_recipe("opd", old)


@pytest.mark.parametrize("weight", ["nan", "inf", "much"])
def test_a_weight_is_a_finite_number(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.verifier\.weight"):
        load_recipe("rl", {"rewards.verifier.weight": weight})


def test_a_weight_of_0_is_said() -> None:
    behaviour = [
        text
        for text in checks.warnings(load_recipe("rl", {"rewards.other": {"kind": "verifier", "weight": 0}}))
        if "rewards" in text
    ]
    assert len(behaviour) == 1
    assert behaviour[0].startswith(
        "rewards.other.weight = 0: this reward is computed and recorded, but its value does not count."
    )


def test_a_run_with_two_rewards_records_both_and_learns_from_their_sum(tiny_run: Callable[..., Any]) -> None:
    two = {"verifier": {}, "brief": {**BRIEF, "weight": 0.5, "silent": "train-1"}}
    done = tiny_run("rl", steps=1, task=CHAT, group_size=3, rewards=two)
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    missing = [row for row in rows if row["prompt"] == "train-1"]
    assert [(row["reward"], row["error"]) for row in missing] == [
        (None, "rewards.brief: this prompt is not judged")
    ] * 3
    others = [row for row in rows if row["prompt"] != "train-1"]
    assert others
    for row in others:
        length = len(row["tokens"])
        assert row["reward"] == row["parts"]["verifier"] - 0.5 * length
        assert (row["parts"]["brief"], row["parts"]["brief.odd"]) == (-length, length % 2)
        assert row["feedback"] == f"{length} positions"
    assert done.rows("metrics")[0]["ungraded"] == 3


def test_the_name_of_one_reward_changes_no_bit(tiny_run: Callable[..., Any]) -> None:
    plain, named = (
        tiny_run("rl", steps=2, task=CHAT, group_size=3, rewards=rewards)
        for rewards in ({"verifier": {}}, {"verifier": "none", "right": {"kind": "verifier"}})
    )
    assert tiny.same(plain.weights, named.weights)
    assert plain.rows("attempts") == named.rows("attempts")


# --- the reward of an environment


def acted(finish: Any, reward: float | None) -> Attempt:
    return Attempt(replace(tiny.rollout(3, finish=finish), environment_reward=reward))


def test_the_reward_of_an_environment_is_its_sum_or_why_there_is_none() -> None:
    unjudged = {"tool_error": "a tool of the environment failed", "timeout": "the environment took too long"}
    attempts = [
        acted("stop", 0.5),
        acted("length", -1.0),
        acted("max_turns", 0.0),
        acted("length", None),
        acted("stop", float("nan")),
    ]
    attempts += [acted(finish, 1.0) for finish in ("error", *unjudged)]

    async def score() -> list[Reward]:
        async with EnvironmentReward().open(tiny.context(), tiny.services()) as opened:
            return await opened.score(attempts)

    found = asyncio.run(score())
    assert [reward.value for reward in found] == [0.5, -1.0, 0.0] + [None] * 5
    assert [reward.error for reward in found[:3]] == [None] * 3
    assert [reward.error for reward in found[3:]] == [
        'the environment gave no reward (the attempt ended with "length")',
        "the environment's reward is nan, which is not finite",
        "sampling ended in an error",
        *unjudged.values(),
    ]
    assert all(attempt.reward is None for attempt in attempts)


def test_an_environment_judges_texts_alone() -> None:
    with pytest.raises(TypeError, match="needs a text"):
        given(tiny_flow.rollout(2))


def test_it_stands_beside_others_in_a_run(tiny_run: Callable[..., Any]) -> None:
    """`Unruly` gives a turn its length, so the record's sum is that of what the student wrote, where nothing
    failed.
    """
    rewards = {
        "rewards__told": {"kind": "environment", "weight": 0.5},
        "rewards__verifier": {"kind": "verifier"},
    }
    limits = {"sampler__max_tokens": 60, "sampler__max_turns": 2, "sampler__environment_timeout_s": 0.05}
    done = tiny_run("opd", steps=1, group_size=2, task={"kind": "outside:Unruly"}, **rewards, **limits)
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    assert {row["finish"] for row in rows} >= {"stop", "max_turns", "tool_error", "timeout"}
    for row in rows:
        if row["finish"] in ("stop", "max_turns"):
            # two turns stand a line apart
            written = len(row["text"]) - (not all(row["mask"]))
            assert row["parts"]["told"] == written
            assert row["reward"] == 0.5 * written + row["parts"]["verifier"]
        elif row["finish"] != "length":
            assert (row["reward"], row["error"].split(":")[0]) == (None, "rewards.told")


def test_it_needs_a_task_with_turns(student: str, teacher: str) -> None:
    single = tiny.config("opd", student, teacher, task=CHAT, rewards__told={"kind": "environment"})
    with pytest.raises(
        ConfigError, match=r"rewards.told: the task 'outside:Chat' opens no environment, so no attempt"
    ):
        checks.join(single)
    several = {**CHAT, "replies": 1}
    assert checks.join(
        tiny.config("opd", student, teacher, task=several, rewards__told={"kind": "environment"})
    ).reward
    mixed = {"kind": "mix", "parts": {"a": CHAT, "b": several}}
    checks.join(tiny.config("opd", student, teacher, task=mixed, rewards__told={"kind": "environment"}))
    given = tiny.config("sft", student, teacher, task=several, rewards__told={"kind": "environment"})
    assert any("No environment receives a given answer" in advice for advice in checks.warnings(given))
