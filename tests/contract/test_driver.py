"""The rollout driver, over a generator that follows a script and environments that are small: no model is
loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import ConfigError, DataError
from reflux.models.rng import row_key
from reflux.models.turns import Turn, TurnRequest
from reflux.rollouts.driver import Driver, Limits
from reflux.rollouts.environment import Environment, Observation, ToolError
from reflux.tasks.base import TaskPart
from reflux.types import Attempt, Message, Prompt, TokenRollout

TOKENIZER = character_tokenizer()
END = 1
DRAW = SamplingParams(3, "train", 40)
# far above what any step here takes, so a test that meets it fails by its result
TIMEOUT = 20.0


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def words(tokens: Sequence[int] | np.ndarray) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(list(tokens)))


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},))


def say(text: str, finish: Any = "stop", version: int = 0, k: int = 0) -> Turn:
    """A turn of these characters, with the end token where it ended by itself. Its log-probs tell token by
    token which turn they are of.
    """
    tokens = ids(text) + ([END] if finish == "stop" else [])
    behaviour = (
        (np.tile(np.arange(k), (len(tokens), 1)), np.full((len(tokens), k), -3.0, dtype=np.float32))
        if k
        else None
    )
    logp_T = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Turn(tokens, logp_T, logp_T / 2, behaviour, np.full(len(tokens), version), finish)


@dataclass
class Script:
    """A generator: `write(request, turn)` is the turn number `turn` of the attempt whose text begins as the
    prompt. Remembers its calls.
    """

    write: Callable[[str, int], Turn] = lambda text, number: say("ab")
    calls: list[list[TurnRequest]] = field(default_factory=list)

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        self.calls.append(list(requests))
        await asyncio.sleep(0)
        return [
            self.write(words(request.ids), words(request.ids).count("<assistant>")) for request in requests
        ]

    @property
    def texts(self) -> list[list[str]]:
        """What was read, call by call."""
        return [[words(request.ids) for request in call] for call in self.calls]


@dataclass
class Tool:
    """An environment that answers by a function of the number of the turn; counts what is done to it."""

    answer: Callable[[int, Message], Any]
    steps: int = 0
    closed: int = 0
    cancelled: int = 0
    at_work: bool = False

    async def step(self, message: Message) -> Observation:
        self.steps += 1
        self.at_work = True
        try:
            found = self.answer(self.steps, message)
            return await found if asyncio.iscoroutine(found) else found
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.at_work = False

    async def close(self) -> None:
        assert not self.at_work
        self.closed += 1


class Table(TaskPart):
    """A task whose environments are made by a function of the prompt's id."""

    def __init__(
        self, make: Callable[[str], Environment | None] = lambda name: None, multi_turn: bool = True
    ):
        self.make, self.opened, self._multi_turn = make, [], multi_turn

    @property
    def multi_turn(self) -> bool:
        return self._multi_turn

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        environment = self.make(prompt.id)
        if environment is not None:
            self.opened.append(environment)
        return environment


class Ear:
    def __init__(self) -> None:
        self.objective_teachers: list[str] = []

    def noted(self, text: str) -> None:
        self.objective_teachers.append(text)


def user(text: str, **more: Any) -> Observation:
    return Observation(({"role": "user", "content": text},), **more)


DONE = Observation(done=True)


def driver(
    script: Script,
    table: Table,
    limits: Limits | None = None,
    *,
    requirements: Requirements = Requirements(),
    ear: Ear | None = None,
    **more: Any,
) -> Driver:
    context = tiny.context(requirements, seed=7, task=table)
    return Driver(
        script,
        TOKENIZER,
        [END],
        context,
        limits or Limits(512, environment_timeout_s=TIMEOUT),
        listener=ear,
        **more,
    )


def play(
    script: Script,
    table: Table,
    names: str = "a",
    n: int = 1,
    draw: SamplingParams = DRAW,
    limits: Limits | None = None,
    **more: Any,
) -> list[Any]:
    """The rollouts of the prompts, each named by one letter."""
    groups = asyncio.run(
        driver(script, table, limits, **more).play([(prompt(name), n, draw) for name in names], 5)
    )
    return [attempt.rollout for group in groups for attempt in group]


def behaviour(rollouts: Sequence[TokenRollout]) -> list[str]:
    return [words(r.tokens_T) for r in rollouts]


# --- requests


def test_requests_keep_the_order_of_prompts_and_samples() -> None:
    script = Script(lambda text, number: say(text[6] * number))
    rollouts = play(script, Table(), "ba", n=2)
    assert script.texts == [["<user>b<assistant>"] * 2 + ["<user>a<assistant>"] * 2]
    assert [(r.prompt.id, r.sample, r.text) for r in rollouts] == [
        ("b", 0, "b"),
        ("b", 1, "b"),
        ("a", 0, "a"),
        ("a", 1, "a"),
    ]
    assert {r.version for r in rollouts} == {0}


@pytest.mark.parametrize("turns", ["together", "ready"])
def test_order_does_not_hang_on_who_answers_first(turns: Any) -> None:
    """The first prompt's environment answers last; its request is the first of the next call all the same."""

    async def script() -> list[list[str]]:
        order = {name: asyncio.Event() for name in "abc"}
        order["c"].set()
        after = {"c": "b", "b": "a"}

        async def answer(name: str, step: int) -> Observation:
            await order[name].wait()
            if name in after:
                order[after[name]].set()
            return user(name) if step == 1 else DONE

        generator = Script()
        table = Table(lambda name: Tool(lambda step, message: answer(name, step)))
        await driver(generator, table, turns=turns).play([(prompt(name), 1, DRAW) for name in "abc"], 0)
        return generator.texts

    first, *later = asyncio.run(script())
    assert [text[6] for text in first] == ["a", "b", "c"]
    assert all([text[6] for text in call] == sorted(text[6] for text in call) for call in later)
    if turns == "together":
        assert [[text[6] for text in call] for call in later] == [["a", "b", "c"]]


def test_each_turn_has_a_key_of_its_own() -> None:
    script = Script()
    play(
        script,
        Table(lambda name: Tool(lambda step, message: user("on") if step < 3 else DONE)),
        "ab",
        n=2,
        draw=SamplingParams(3, "train", 40, rng=2),
    )
    found = [[request.rng_key for request in call] for call in script.calls]
    assert found == [
        [row_key(7, "train", 3, name, sample, turn, 2) for name in "ab" for sample in (0, 1)]
        for turn in range(3)
    ]
    assert len({key for call in found for key in call}) == 12


@pytest.mark.parametrize(("purpose", "expected"), [("train", 4), ("eval", 0)])
def test_the_likeliest_tokens_are_asked_for_in_training(purpose: Any, expected: int) -> None:
    script = Script()
    play(script, Table(), draw=SamplingParams(0, purpose, 9), requirements=Requirements(behaviour=4))
    assert [request.top_k for call in script.calls for request in call] == [expected]


def test_one_cohort_is_sampled_in_one_way() -> None:
    asked = [(prompt("a"), 1, DRAW), (prompt("b"), 1, SamplingParams(3, "train", 40, temperature=0.5))]
    with pytest.raises(ValueError, match="need the same SamplingParams"):
        asyncio.run(driver(Script(), Table()).play(asked, 0))


# --- what becomes of several turns


def test_replies_are_masked_out_and_have_no_log_prob() -> None:
    texts = ["abc", "d"]
    script = Script(lambda text, number: say(texts[number - 1], version=number))
    (r,) = play(script, Table(lambda name: Tool(lambda step, message: user("hm") if step == 1 else DONE)))
    assert words(r.tokens_T) == "abc<end><user>hm<assistant>d<end>"
    assert script.texts == [["<user>a<assistant>"], ["<user>a<assistant>abc<end><user>hm<assistant>"]]
    assert r.mask_T.tolist() == [True] * 4 + [False] * 4 + [True] * 2
    assert r.logp_T.tolist() == [-1, -2, -3, -4, 0, 0, 0, 0, -1, -2]
    assert r.logp_raw_T is not None
    assert r.logp_raw_T.tolist() == [-0.5, -1, -1.5, -2, 0, 0, 0, 0, -0.5, -1]
    assert {array.dtype for array in (r.logp_T, r.logp_raw_T)} == {np.dtype(np.float32)}
    assert (r.version, r.finish, r.text) == (1, "stop", "abc\nd")
    turns = [("user", "a"), ("assistant", "abc"), ("user", "hm"), ("assistant", "d")]
    assert [(m["role"], m["content"]) for m in r.messages] == turns
    assert r.behaviour is None


def test_each_position_carries_its_version_and_the_attempt_the_oldest() -> None:
    """Where the weights change between turns and within one. What was read again for it is counted."""

    def write(text: str, number: int) -> Turn:
        made = say("abc" if number == 1 else "d", version=number + 4)
        # the second of four tokens is the first one of version 7
        return (
            replace(made, version_T=np.array([5, 7, 7, 7]))
            if number == 1
            else replace(made, version_T=np.array([7, 8]))
        )

    (r,) = play(
        Script(write), Table(lambda name: Tool(lambda step, message: user("hm") if step == 1 else DONE))
    )
    assert r.version == 5
    assert r.version_T is not None
    # a reply carries the version of the turn before it
    assert r.version_T.tolist() == [5, 7, 7, 7, 7, 7, 7, 7, 7, 8]
    assert r.version_T.dtype == np.int64
    prompt_tokens, first, second = 3, 3 + 4, 3 + 8 + 2
    # a turn reads all before it; a change after n of its tokens reads that and the n tokens again
    assert r.positions_acted == first + second + (prompt_tokens + 1) + (prompt_tokens + 8 + 1)
    (plain,) = play(Script(lambda text, number: say("abc", version=9)), Table(lambda name: None))
    assert (plain.version, plain.version_T, plain.positions_acted) == (9, None, 3 + 4)


def test_listed_tokens_and_spans_know_which_positions_are_the_students() -> None:
    script = Script(lambda text, number: say("ab" if number == 1 else "c", k=3))
    table = Table(lambda name: Tool(lambda step, message: user("hm") if step == 1 else DONE))
    (r,) = play(script, table, requirements=Requirements(behaviour=3, spans=True))
    assert r.behaviour.ids_TK.shape == (r.length, 3)
    assert set(r.behaviour.logp_TK[r.mask_T].ravel().tolist()) == {-3.0}
    np.testing.assert_allclose(np.exp(r.behaviour.logp_TK[~r.mask_T]).sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(r.behaviour.logp_T, r.logp_raw_T)
    assert [r.text[start:end] for start, end in r.spans_T2] == ["a", "b", "", "", "", "", "", "c", ""]


def test_an_environment_may_speak_in_any_role() -> None:
    """Also as the assistant: what it says is never taken for the student's."""
    script = Script()
    answer = Observation(
        (
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": "on"},
        )
    )
    (r,) = play(script, Table(lambda name: Tool(lambda step, message: answer if step == 1 else DONE)))
    assert r.text == "ab\nab"
    assert words(r.tokens_T[~r.mask_T]) == "<user>4<assistant>fine<end><user>on<assistant>"


def test_what_an_environment_does_to_messages_later_changes_nothing() -> None:
    shared = {"role": "tool", "content": "4", "tool_call_id": "x", "more": [1]}

    def answer(step: int, message: Message) -> Observation:
        message["content"] = "overwritten"
        shared["more"].append(step)
        return Observation((shared,)) if step < 3 else DONE

    (r,) = play(Script(), Table(lambda name: Tool(answer)))
    assert [m["content"] for m in r.messages] == ["a", "ab", "4", "ab", "4", "ab"]
    assert [m["more"] for m in r.messages if m["role"] == "tool"] == [[1, 1], [1, 1, 2]]


def test_a_turn_that_a_stop_text_ended_is_closed_before_the_reply() -> None:
    """The template's end of a turn is read and not learnt from."""

    def write(text: str, number: int) -> Turn:
        turn = say("abc")
        return Turn(turn.tokens[:-1], turn.logp_T[:-1], turn.raw_T[:-1], None, turn.version_T[:-1], "stop")

    (r,) = play(
        Script(write), Table(lambda name: Tool(lambda step, message: user("hm") if step == 1 else DONE))
    )
    assert words(r.tokens_T) == "abc<end><user>hm<assistant>abc"
    assert r.mask_T.tolist() == [True] * 3 + [False] * 5 + [True] * 3


def test_characters_after_a_stop_text_are_sampled_and_not_part_of_the_text() -> None:
    """The last token wrote two characters more than the stop text. Its log-prob is kept."""

    def write(text: str, number: int) -> Turn:
        turn = say("abcd", "length")
        return replace(turn, finish="stop", beyond=2)

    (r,) = play(
        Script(write), Table(lambda name: Tool(lambda step, message: user("hm") if step == 1 else DONE))
    )
    assert r.text == "ab\nab"
    assert [m["content"] for m in r.messages] == ["a", "ab", "hm", "ab"]
    assert words(r.tokens_T[r.mask_T]) == "abcdabcd"
    assert np.array_equal(r.logp_T[:4], [-1, -2, -3, -4])


# --- ends


def endless(name: str) -> Tool:
    return Tool(lambda step, message: user("hm"))


def test_the_limit_counts_the_students_tokens_over_all_turns() -> None:
    """Each turn takes 3 of 8, replies take none; the third has 2 left."""
    script = Script(lambda text, number: say("ab") if number < 3 else say("ab", "length"))
    (r,) = play(script, Table(endless), draw=SamplingParams(0, "train", 8))
    assert [call[0].max_tokens for call in script.calls] == [8, 5, 2]
    assert (r.finish, int(r.mask_T.sum())) == ("length", 8)


def test_a_turn_that_takes_the_last_token_is_still_answered() -> None:
    """The environment sees every turn that ended by itself; then nothing is left to write, and the reply is
    not read.
    """
    table = Table(lambda name: Tool(lambda step, message: user("hm", reward=2.0)))
    (r,) = play(Script(), table, draw=SamplingParams(0, "train", 3))
    assert (r.finish, r.environment_reward, words(r.tokens_T)) == ("length", 2.0, "ab<end>")
    assert len(r.messages) == 2


def test_a_cut_turn_is_not_shown_to_the_environment() -> None:
    table = Table(endless)
    (r,) = play(Script(lambda text, number: say("ab", "length")), table, draw=SamplingParams(0, "train", 2))
    assert (r.finish, table.opened[0].steps, table.opened[0].closed) == ("length", 0, 1)


@pytest.mark.parametrize(
    ("window", "turns", "finish"),
    [(99, 3, "max_turns"), (17, 2, "length"), (11, 2, "length"), (10, 1, "length")],
)
def test_the_window_holds_replies_too(window: int, turns: int, finish: str) -> None:
    """3 of the prompt, 3 a turn, 4 a reply: the second turn begins at position 10, the third at 17."""
    script = Script()
    (r,) = play(script, Table(endless), limits=Limits(window, max_turns=3))
    assert (len(script.calls), r.finish) == (turns, finish)
    room = [min(40 - 3 * turn, window - len(call[0].ids)) for turn, call in enumerate(script.calls)]
    assert [call[0].max_tokens for call in script.calls] == room
    assert min(room) > 0


@pytest.mark.parametrize("most", [1, 2])
def test_max_turns(most: int) -> None:
    """The last turn is answered too, for its reward; the reply is not read."""
    script, table = Script(), Table(lambda name: Tool(lambda step, message: user("hm", reward=1.0)))
    (r,) = play(script, table, limits=Limits(512, max_turns=most))
    assert (len(script.calls), r.finish, r.environment_reward) == (most, "max_turns", float(most))
    assert words(r.tokens_T).count("<user>") == most - 1


def test_an_environment_that_is_done_ends_it_by_itself() -> None:
    script = Script()
    table = Table(
        lambda name: Tool(lambda step, message: user("bye", done=True) if name == "a" else Observation())
    )
    rollouts = play(script, table, "ab", limits=Limits(512, max_turns=1))
    assert [(r.finish, words(r.tokens_T), len(r.messages)) for r in rollouts] == [("stop", "ab<end>", 2)] * 2
    assert len(script.calls) == 1


def test_long_prompts_are_refused_and_what_was_opened_is_closed() -> None:
    table = Table(endless)
    long = Prompt("long", ({"role": "user", "content": "x" * 20},))
    with pytest.raises(DataError, match="prompt long has 22 tokens, more than the 11 that fit"):
        asyncio.run(driver(Script(), table, Limits(12)).play([(prompt("a"), 2, DRAW), (long, 1, DRAW)], 0))
    assert [tool.closed for tool in table.opened] == [1, 1]


def test_or_skipped_without_an_environment() -> None:
    script, table = Script(), Table(lambda name: Tool(lambda step, message: DONE))
    asked = [(Prompt("long", ({"role": "user", "content": "x" * 20},)), 2, DRAW), (prompt("a"), 1, DRAW)]
    long, (short,) = asyncio.run(driver(script, table, Limits(12, long_prompts="skip")).play(asked, 5))
    assert [(one.rollout.finish, one.rollout.length, one.rollout.version) for one in long] == [
        ("error", 0, 5)
    ] * 2
    assert (short.rollout.finish, len(script.calls[0]), len(table.opened)) == ("stop", 1, 1)


def failing(step: int, message: Message) -> Observation:
    if step == 2:
        raise ToolError("the sandbox is \x1b[31mgone\n.")
    return user("hm", reward=0.5)


def test_a_tool_that_fails_ends_its_attempt_alone_and_is_told_once() -> None:
    ear, script = Ear(), Script()
    table = Table(
        lambda name: Tool(failing if name in "ac" else lambda step, message: user("hm") if step < 4 else DONE)
    )
    rollouts = play(script, table, "abc", ear=ear)
    assert [(r.finish, r.environment_reward) for r in rollouts] == [
        ("tool_error", 0.5),
        ("stop", None),
        ("tool_error", 0.5),
    ]
    assert [len(call) for call in script.calls] == [3, 3, 1, 1]
    assert words(rollouts[0].tokens_T) == "ab<end><user>hm<assistant>ab<end>"
    (told,) = ear.objective_teachers
    assert told.startswith(
        "A tool failed at prompt a: the sandbox is  [31mgone. The attempt ends there and gets no verdict"
    )
    assert "tool_error" in told


async def forever(step: int) -> Observation:
    await asyncio.sleep(3600)
    return DONE


@pytest.mark.parametrize("turns", ["together", "ready"])
def test_a_step_that_takes_too_long_is_cancelled(turns: Any) -> None:
    ear = Ear()
    table = Table(lambda name: Tool(lambda step, message: forever(step) if name in "ab" else DONE))
    rollouts = play(
        Script(), table, "abc", limits=Limits(512, environment_timeout_s=0.05), turns=turns, ear=ear
    )
    assert [r.finish for r in rollouts] == ["timeout", "timeout", "stop"]
    assert [tool.cancelled for tool in table.opened] == [1, 1, 0]
    assert [tool.closed for tool in table.opened] == [1, 1, 1]
    (told,) = ear.objective_teachers
    assert "gave no answer within 0.05 s" in told


# --- environments beside each other


@pytest.mark.parametrize("turns", ["together", "ready"])
def test_environments_run_beside_each_other(turns: Any) -> None:
    """Each waits until both are at work."""

    async def script() -> list[str]:
        barrier = asyncio.Barrier(2)

        async def answer() -> Observation:
            await barrier.wait()
            return DONE

        table = Table(lambda name: Tool(lambda step, message: answer()))
        groups = await driver(Script(), table, turns=turns).play(
            [(prompt(name), 1, DRAW) for name in "ab"], 0
        )
        return [attempt.rollout.finish for group in groups for attempt in group]

    assert asyncio.run(script()) == ["stop", "stop"]


def slow_tool(turns: Any) -> list[list[str]]:
    """Who is in each call, where the tool of `a` waits until `b` has had its third turn; "together" it is let
    go instead.
    """

    async def script() -> list[list[str]]:
        third = asyncio.Event()

        def write(text: str, number: int) -> Turn:
            if number == 3:
                third.set()
            return say("ab")

        async def slow(step: int) -> Observation:
            if turns == "ready":
                await third.wait()
            else:
                await asyncio.sleep(0.05)
            return user("hm") if step == 1 else DONE

        generator = Script(write)
        table = Table(
            lambda name: Tool(
                lambda step, message: slow(step) if name == "a" else user("hm") if step < 3 else DONE
            )
        )
        await driver(generator, table, turns=turns).play([(prompt(name), 1, DRAW) for name in "ab"], 0)
        return [[text[6] for text in call] for call in generator.texts]

    return asyncio.run(script())


def test_together_waits_for_the_slowest() -> None:
    assert slow_tool("together") == [["a", "b"], ["a", "b"], ["b"]]


def test_ready_goes_on_without_it() -> None:
    calls = slow_tool("ready")
    assert calls[:3] == [["a", "b"], ["b"], ["b"]]
    assert calls[3:] == [["a"]]


# --- rewards


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None, None], None),
        ([1.0, None], 1.0),
        ([0.25, -1.0], -0.75),
        ([None, 0.0], 0.0),
        ([-0.0, None], 0.0),
    ],
)
def test_rewards_of_the_turns_are_added_up(given: list[float | None], expected: float | None) -> None:
    table = Table(lambda name: Tool(lambda step, message: user("hm", reward=given[step - 1], done=step == 2)))
    (r,) = play(Script(), table)
    assert r.environment_reward == expected


# --- every opened environment is closed once


def closed(table: Table) -> list[int]:
    return [tool.closed for tool in table.opened]


@pytest.mark.parametrize("turns", ["together", "ready"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("mine"), TimeoutError("mine"), ValueError("mine")],
    ids=lambda error: type(error).__name__,
)
def test_another_exception_ends_the_play_at_once(turns: Any, error: Exception) -> None:
    """Also a TimeoutError of the environment's own, and also while another tool is at work, which is
    cancelled.
    """

    async def raising() -> Observation:
        await asyncio.sleep(0)
        raise error

    table = Table(lambda name: Tool(lambda step, message: raising() if name == "b" else forever(step)))
    ear = Ear()
    with pytest.raises(type(error), match="mine"):
        play(Script(), table, "abc", turns=turns, ear=ear, limits=Limits(512, environment_timeout_s=3600))
    assert closed(table) == [1, 1, 1]
    assert [tool.cancelled for tool in table.opened] == [1, 0, 1]
    assert ear.objective_teachers == []


def test_a_call_of_the_generator_that_fails() -> None:
    def write(text: str, number: int) -> Turn:
        if number == 2:
            raise RuntimeError("no memory")
        return say("ab")

    table = Table(endless)
    with pytest.raises(RuntimeError, match="no memory"):
        play(Script(write), table, "ab", n=2)
    assert closed(table) == [1] * 4


@pytest.mark.parametrize("turns", ["together", "ready"])
@pytest.mark.parametrize("where", ["the environment", "the generator"])
def test_a_cancellation(turns: Any, where: str) -> None:
    table = Table(
        lambda name: Tool(lambda step, message: forever(step) if where == "the environment" else user("hm"))
    )

    class Stuck(Script):
        async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]:
            turns = await super().generate(requests)
            if where == "the generator" and len(self.calls) == 2:
                await asyncio.sleep(3600)
            return turns

    async def script() -> set[Any]:
        playing = asyncio.create_task(
            driver(Stuck(), table, turns=turns).play([(prompt(name), 2, DRAW) for name in "ab"], 0)
        )
        await asyncio.sleep(0.05)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(script()) == set()
    assert closed(table) == [1] * 4
    assert [tool.cancelled for tool in table.opened] == [int(where == "the environment")] * 4


def test_a_second_cancellation_leaves_no_environment_open() -> None:
    """It comes while they are being closed."""

    class Slow(Tool):
        async def close(self) -> None:
            await asyncio.sleep(0.05)
            await super().close()

    table = Table(lambda name: Slow(lambda step, message: forever(step)))

    async def script() -> None:
        playing = asyncio.create_task(
            driver(Script(), table).play([(prompt(name), 1, DRAW) for name in "ab"], 0)
        )
        for wait in (0.02, 0.02, 0.0):
            await asyncio.sleep(wait)
            playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing

    asyncio.run(script())
    assert closed(table) == [1, 1]


@dataclass
class Sticky(Tool):
    """Its close fails."""

    error: BaseException = field(default_factory=lambda: RuntimeError("stuck"))
    hangs: bool = False

    async def close(self) -> None:
        await super().close()
        if self.hangs:
            await asyncio.sleep(3600)
        raise self.error


def test_a_close_that_fails_keeps_no_other_open_and_hides_no_error() -> None:
    table = Table(
        lambda name: Sticky(lambda step, message: DONE) if name == "a" else Tool(lambda step, message: DONE)
    )
    with pytest.raises(RuntimeError, match="stuck"):
        play(Script(), table, "ab")
    assert closed(table) == [1, 1]

    def broken(step: int, message: Message) -> Observation:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        play(Script(), Table(lambda name: Sticky(broken)), "ab")


@pytest.mark.parametrize(
    ("hangs", "words"), [(False, "did not close: gone"), (True, "did not close within 0.05 s")]
)
def test_a_tool_that_does_not_close_is_told_and_costs_nothing(hangs: bool, words: str) -> None:
    ear = Ear()
    table = Table(lambda name: Sticky(lambda step, message: DONE, error=ToolError("gone"), hangs=hangs))
    rollouts = play(Script(), table, "ab", ear=ear, limits=Limits(512, environment_timeout_s=0.05))
    assert [r.finish for r in rollouts] == ["stop", "stop"]
    (told,) = ear.objective_teachers
    assert words in told


def test_a_task_that_opens_what_it_denies_is_refused() -> None:
    table = Table(endless, multi_turn=False)
    with pytest.raises(
        ConfigError, match="opened an environment for prompt a, but its property multi_turn is False"
    ):
        play(Script(), table)
    assert closed(table) == [1]
    play(Script(), Table(multi_turn=False))


def test_an_attempt_that_ended_in_a_tool_has_weight_and_no_verdict() -> None:
    from reflux.grading.graders import WHY_UNJUDGED
    from reflux.types import UNJUDGED, Reward

    assert set(UNJUDGED) == set(WHY_UNJUDGED) == {"error", "tool_error", "timeout"}
    for finish in UNJUDGED:
        attempt = Attempt(tiny.rollout(3, finish=finish), reward=Reward(1.0))
        assert attempt.verdict is None
        assert attempt.weight_T.tolist() == [float(finish != "error")] * 3
    assert Attempt(tiny.rollout(3, finish="max_turns"), reward=Reward(1.0)).verdict == 1.0
