"""Task `verifiers`: the mapping of messages without the package, and whole runs where it is installed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import Done
from reflux import checks
from reflux.config.importable import importable
from reflux.errors import ConfigError, DataError
from reflux.rollouts.environment import ToolError
from reflux.tasks import verifiers_data, verifiers_episode
from reflux.tasks.verifiers import Verifiers
from reflux.tasks.verifiers_data import missing
from reflux.tasks.verifiers_texts import as_reply, continued, first_messages, shown_tools, with_tools
from reflux.types import Prompt, Reward

TASKSETS = Path(__file__).parents[1] / "verifiers_tasks"
installed = pytest.mark.skipif(
    not importable("verifiers.v1"),
    reason="the package verifiers is not installed (pip install 'reflux[env]')",
)

# --- texts and messages, without the package

USER = {"role": "user", "content": "1+1?"}
NUMBER = {"type": "function", "function": {"name": "number_of", "description": "", "parameters": {}}}


def test_the_first_messages_are_the_system_prompt_and_the_prompt() -> None:
    assert first_messages(None, "1+1?") == (USER,)
    assert first_messages("Be brief.", "1+1?") == ({"role": "system", "content": "Be brief."}, USER)
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    assert first_messages(None, [{"role": "user", "content": parts}]) == (
        {"role": "user", "content": "1+\n1?"},
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "has no prompt: a user opens its conversation"),
        ([], "has a prompt that does not end before a turn of the student"),
        ([USER, {"role": "assistant", "content": "2"}], "does not end before a turn of the student"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "shows an image"),
    ],
)
def test_prompts_that_a_student_cannot_answer(prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        first_messages(None, prompt)


def test_tools_are_described_in_the_system_message() -> None:
    text = shown_tools([NUMBER])
    assert json.dumps(NUMBER["function"]) in text
    assert '{"name": "...", "arguments": {...}}' in text
    assert with_tools((USER,), text) == ({"role": "system", "content": text}, USER)
    spoken = with_tools(first_messages("Be brief.", "1+1?"), text)
    assert [message["role"] for message in spoken] == ["system", "user"]
    assert spoken[0]["content"] == f"Be brief.\n\n{text}"


def called(text: str, turn: int = 0) -> list[Any]:
    calls = as_reply(text, turn).get("tool_calls", [])
    return [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls
    ]


def test_calls_are_read_from_the_text() -> None:
    assert as_reply("just 2", 0) == {"role": "assistant", "content": "just 2"}
    one = '<tool_call>\n{"name": "number_of", "arguments": {"name": "a"}}\n</tool_call>'
    assert called(f"I look. {one}", 3) == [("call_3_0", "number_of", {"name": "a"})]
    assert as_reply(f"I look. {one}", 3)["content"] == "I look."
    other = '<tool_call>{"name": "f"}</tool_call>'
    assert called(one + other) == [("call_0_0", "number_of", {"name": "a"}), ("call_0_1", "f", {})]
    assert called('<tool_call>{"name": "f", "arguments": "{\\"k\\": 1}"}</tool_call>') == [
        ("call_0_0", "f", {"k": 1})
    ]


@pytest.mark.parametrize("inside", ["", "2", "[]", '{"arguments": {}}', '{"name": 3}', "{", "[" * 100_000])
def test_a_call_that_cannot_be_read_stays_text(inside: str) -> None:
    text = f"<tool_call>{inside}</tool_call>"
    assert as_reply(text, 0) == {"role": "assistant", "content": text}


def test_what_follows_the_known_messages_is_new() -> None:
    reply = as_reply('<tool_call>{"name": "f"}</tool_call>', 0)
    result = {"role": "tool", "tool_call_id": "call_0_0", "name": "f", "content": "7"}
    # As it comes back over the wire, without an empty content.
    echoed = {**reply, "content": None}
    assert continued([USER, reply], [USER, echoed, result]) == (result,)
    assert continued([], [USER]) == (USER,)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([{"role": "user", "content": "2+2?"}, USER], "asks with other messages than those before"),
        ([USER], "asks again without a message that follows"),
        ([USER, {"role": "assistant", "content": "2"}, USER], "asks again without a message that follows"),
        ([], "asks with other messages"),
        ([USER, {"role": "user", "content": [{"type": "image_url"}]}], "shows an image"),
    ],
)
def test_requests_that_do_not_go_on(asked: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        continued([USER], asked)


def test_another_call_is_another_message() -> None:
    one, other = (as_reply(f'<tool_call>{{"name": "{name}"}}</tool_call>', 0) for name in "fg")
    with pytest.raises(ValueError, match="other messages"):
        continued([USER, one], [USER, other, USER])


# --- what is refused without the package


def without(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(verifiers_data, "version", version)


def test_a_missing_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, None)
    words = "task: the package verifiers is not installed. Install it with: pip install 'verifiers>=0.4,<0.5'"
    with pytest.raises(ConfigError) as refused:
        checks.join(tiny.load_recipe("opd", {"task": {"kind": "verifiers", "taskset": "adding"}}))
    assert words in str(refused.value)
    with pytest.raises(DataError, match="task verifiers: the package verifiers is not installed"):
        next(Verifiers("adding").prompts("train", 0))


def test_another_version_and_a_missing_taskset_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "0.5.1")
    assert missing("json").startswith("verifiers 0.5.1 is installed, and only version 0.4 is")
    without(monkeypatch, "0.4.3")
    assert missing("json") == missing("owner/JSON@1.2") == ""
    assert missing("no-such-tasks").startswith(
        "there is no module 'no_such_tasks' of the taskset 'no-such-tasks'. Install its package, or add"
    )


def test_verdicts_on_texts_are_refused_where_an_environment_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "0.4.0")
    task = {"kind": "verifiers", "taskset": "json", "turns": True}
    with pytest.raises(ConfigError) as refused:
        checks.join(tiny.load_recipe("rl", {"task": task}))
    said = str(refused.value)
    assert "rewards.verifier: the verifier takes the verdicts of the task on texts, and only the" in said
    assert 'environment of this task judges. Use kind = "environment".' in said
    assert "grader" not in said
    assert "evals.accuracy judges texts, and with task.turns = true only the environment judges," in said
    assert "Remove it with evals.accuracy=none." in said
    assert Verifiers("json", turns=True).multi_turn
    assert not Verifiers("json", turns=True).judges
    assert Verifiers("json").judges
    assert Verifiers("json").open_env(Prompt("a", ()), 0) is None
    with pytest.raises(ValueError, match="only the environment judges"):
        Verifiers("json", turns=True).verify(Prompt("a", ()), "2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"id": "x"}, "settings.id is given by `env`. Remove it"),
        ({"taskset": {"id": "x"}}, "settings.taskset.id is given by `taskset`. Remove it"),
        ({"x": {1}}, "settings holds a value that is no plain one"),
    ],
)
def test_settings_are_plain_and_name_nothing_twice(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Verifiers("json", settings=settings)


# --- with the package


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the processes of graders and tool servers."""
    import os

    monkeypatch.syspath_prepend(str(TASKSETS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TASKSETS), os.environ.get("PYTHONPATH", "")]))
    verifiers_data.loaded.cache_clear()


@installed
@pytest.mark.usefixtures("on_path")
def test_prompts_are_those_of_the_taskset() -> None:
    task = Verifiers("adding", validation=0.0)
    prompts = {prompt.id: prompt for _, prompt in zip(range(6), task.prompts("train", 0), strict=False)}
    assert sorted(prompts) == [f"q{k}" for k in range(6)]
    assert prompts["q2"] == Prompt("q2", ({"role": "user", "content": "2+1?"},), answer="3")
    assert prompts["q3"].messages[0] == {"role": "system", "content": "Be brief."}
    split = Verifiers("adding", validation=0.5)
    held = {prompt.id for prompt in split.prompts("validation", 0)}
    trained = {prompt.id for _, prompt in zip(range(6), split.prompts("train", 0), strict=False)}
    assert held
    assert not held & trained
    with pytest.raises(
        DataError, match=r"none of the 6 tasks of 'adding' is left for the split 'validation'"
    ):
        next(task.prompts("validation", 0))


@installed
@pytest.mark.usefixtures("on_path")
def test_a_verdict_is_the_weighted_sum_of_the_rewards() -> None:
    task = Verifiers("adding", validation=0.0)
    prompt = Prompt("q2", ())
    assert task.verify(prompt, "3") == Reward(1.25, {"right": 1.0, "short": 0.5, "length": 1.0})
    assert task.verify(prompt, "333").value == 0.125
    with pytest.raises(ValueError, match="prompt zz is not one of the taskset 'adding'"):
        task.verify(Prompt("zz", ()), "3")


@installed
@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("taskset", "words"),
    [
        ("looking", r"has tools \(number_of\)\. Set task\.turns = true\."),
        ("guessing", r"has an environment of its own\. Set task\.turns = true\."),
        ("odd_tasks", r"taskset 'odd_tasks' cannot be loaded \(RuntimeError: no data here\)\."),
        ("endless_tasks", r"taskset 'endless_tasks' has no end\. Set task\.limit"),
        ("twice_tasks", r"has two tasks with the id 'a'"),
        ("silent_tasks", r"task a has no prompt: a user opens its conversation"),
        ("sandboxed_tasks", r"has the reward 'ran', which needs a sandbox\. Set task\.turns = true\."),
    ],
)
def test_tasksets_that_cannot_be_used_are_refused(taskset: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        next(Verifiers(taskset).prompts("train", 0))


@installed
@pytest.mark.usefixtures("on_path")
def test_a_run_trains_on_the_rewards_of_the_package(tiny_run: Callable[..., Done]) -> None:
    done = tiny_run(
        "rl",
        task={"kind": "verifiers", "taskset": "adding", "validation": 0.5},
        rewards__verifier={"timeout_s": 100.0},
        steps=2,
        group_size=2,
        prompts_per_step=2,
        evals__accuracy={"problems": 2, "split": "train"},
    )
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    assert len(rows) == 8
    assert all(
        row["reward"] is not None and set(row["parts"]) == {"right", "short", "length"} for row in rows
    )
    for row in rows:
        assert row["parts"]["length"] == len(row["text"].strip())


def episode(task: Verifiers, prompt: Prompt, turns: list[str]) -> list[Any]:
    """What the environment answers to these turns, and at last what the episode gives."""

    async def play() -> list[Any]:
        environment, found = task.open_env(prompt, 0), []
        assert environment is not None
        try:
            for text in turns:
                found.append(await environment.step({"role": "assistant", "content": text}))
        finally:
            await environment.close()
        return found

    return asyncio.run(play())


def first(task: Verifiers) -> Prompt:
    return next(task.prompts("train", 0))


@installed
@pytest.mark.usefixtures("on_path")
def test_an_environment_answers_turn_by_turn_and_gives_its_reward() -> None:
    task = Verifiers("guessing", turns=True, validation=0.0)
    again = {"role": "user", "content": "No. Again."}
    *before, last = episode(task, first(task), ["1", "2", "3"])
    assert [(one.messages, one.done, one.reward) for one in before] == [((again,), False, None)] * 2
    assert last.done
    assert last.reward == pytest.approx(1.0 - 0.3)


@installed
@pytest.mark.usefixtures("on_path")
def test_a_task_of_one_turn_ends_with_its_reward() -> None:
    task = Verifiers("adding", turns=True, validation=0.0)
    (only,) = episode(task, Prompt("q3", ()), ["4"])
    assert (only.messages, only.done, only.reward) == ((), True, 1.25)


@installed
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("on_path")
def test_tools_are_shown_called_and_answered() -> None:
    task = Verifiers("looking", turns=True, validation=0.0)
    prompt = first(task)
    assert '"name": "number_of", "description": "The number of a name."' in prompt.messages[0]["content"]
    call = '<tool_call>{"name": "number_of", "arguments": {"name": "a"}}</tool_call>'
    other = '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
    looked, missed, last = episode(task, prompt, [f"Well. {call}", other, "7"])
    assert looked.messages == (
        {"role": "tool", "content": "7", "tool_call_id": "call_0_0", "name": "number_of"},
    )
    assert missed.messages[0]["content"] == "error: unknown tool 'nothing'"
    assert (last.done, last.reward) == (True, 1.0)


@installed
@pytest.mark.usefixtures("on_path")
def test_an_episode_that_is_left_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests are answered, so nothing waits for them: with an endless patience it ends too."""
    monkeypatch.setattr(verifiers_episode, "_SHUTDOWN_S", 1e6)
    task = Verifiers("guessing", turns=True, validation=0.0)
    assert not episode(task, first(task), ["1"])[0].done
    assert episode(task, first(task), []) == []


@installed
@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("opening", "asks with other messages than its task has"),
        ("rewriting", "asks with other messages than those before"),
        ("repeating", r"played the seat 'agent' 2 times in one episode|asks with other messages"),
    ],
)
def test_environments_that_are_no_single_conversation_end_the_run(env: str, words: str) -> None:
    task = Verifiers("adding", env=env, turns=True, validation=0.0)
    with pytest.raises(DataError, match=words):
        episode(task, Prompt("q0", ()), ["1", "1", "1"])


@installed
@pytest.mark.usefixtures("on_path")
def test_a_failure_of_the_environment_is_a_tool_error() -> None:
    task = Verifiers("adding", env="failing", turns=True, validation=0.0)
    with pytest.raises(ToolError, match="the world ended"):
        episode(task, Prompt("q0", ()), ["1"])


@installed
@pytest.mark.usefixtures("on_path")
def test_another_seat_needs_a_model_of_its_own() -> None:
    task = Verifiers("adding", env="two_seats", turns=True, validation=0.0, agent="solver")
    with pytest.raises(ToolError, match="only the seat 'solver' is played by the student"):
        episode(task, Prompt("q0", ()), ["1"])


@installed
@pytest.mark.usefixtures("on_path")
def test_a_run_with_turns_masks_what_the_environment_says(tiny_run: Callable[..., Done]) -> None:
    done = tiny_run(
        "rl",
        task={"kind": "verifiers", "taskset": "guessing", "turns": True, "validation": 0.0},
        rewards__verifier="none",
        rewards__environment={"kind": "environment"},
        steps=1,
        group_size=4,
        prompts_per_step=1,
        sampler__max_turns=3,
        sampler__max_tokens=30,
    )
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    turned = [row for row in rows if 0 in row["mask"]]
    assert turned
    from reflux.assets.characters import character_tokenizer

    for row in turned:
        unseen = [token for token, chosen in zip(row["tokens"], row["mask"], strict=True) if not chosen]
        assert "No. Again." in character_tokenizer().decode(unseen)
        assert "No. Again." not in row["text"]


def test_the_task_is_a_value() -> None:
    import pickle

    task = Verifiers("elsewhere", settings={"taskset": {"split": "train"}})
    assert pickle.loads(pickle.dumps(task)) == task
    assert replace(task, limit=3) != task
    everything = Verifiers("a", "b", {"c": 1}, True, "d", 0.25, 7, "e", 2.0)
    assert pickle.loads(pickle.dumps(everything)) == everything


@installed
@pytest.mark.usefixtures("on_path")
def test_a_process_that_judges_has_loaded_the_taskset_before_the_first_verdict() -> None:
    import pickle

    packed = pickle.dumps(Verifiers("adding"))
    verifiers_data.loaded.cache_clear()
    pickle.loads(packed)
    assert verifiers_data.loaded.cache_info().currsize == 1
