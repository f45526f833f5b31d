"""Tasks with tools: the rules of each from its definition, faults of the student, limits, and tables that
change.
"""

from __future__ import annotations

import asyncio
import re
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest

from played import TOKENIZER, played, replies
from reflux.config.registry import part
from reflux.tasks.calculator import Calculator, computed
from reflux.tasks.ledger import Ledger
from reflux.tasks.mix import Mix
from reflux.tasks.shopping import ITEMS, Shopping
from reflux.tasks.tools import the_call
from reflux.types import Prompt

TASKS: dict[str, Any] = {
    "shopping": Shopping(drift_every=3, held_out=40),
    "calculator": Calculator(held_out=40),
    "ledger": Ledger(held_out=40),
}
kinds = pytest.mark.parametrize("kind", TASKS)


def prompts(task: Any, number: int = 30, split: Any = "train") -> list[Prompt]:
    return list(islice(task.prompts(split, 0), number))


def question(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def answered(task: Any, prompt: Prompt, texts: list[str], step: int = 0) -> float:
    rollout = played(task, prompt, texts, step)
    return task.verify(prompt, task.evidence(rollout))


# --- a right attempt, and what is wrong


@kinds
@pytest.mark.parametrize("step", [0, 7])
def test_a_worked_attempt_is_right_and_another_number_is_wrong(kind: str, step: int) -> None:
    task = TASKS[kind]
    for prompt in prompts(task):
        texts = task.worked(prompt, step)
        assert answered(task, prompt, texts, step) == 1.0
        rollout = played(task, prompt, texts, step)
        assert rollout.finish == "stop"
        assert rollout.text.split("\n") == texts
        head, _, number = texts[-1].rpartition(" ")
        assert answered(task, prompt, [*texts[:-1], f"{head} {int(number) + 1}"], step) == 0.0
        assert answered(task, prompt, [*texts[:-1], "Answer: soon"], step) == 0.0


def test_what_is_asked_by_hand() -> None:
    """The examples of the documentation."""
    shopping, prices = Shopping(), {"figs": 12, "ham": 7, "milk": 5}
    prompt = Prompt("p", ({"role": "user", "content": "?"},), "figs+ham+milk")
    said = [
        {"role": "assistant", "content": "price(figs)"},
        {"role": "user", "content": "12"},
        {"role": "assistant", "content": "12. price(ham)"},
        {"role": "user", "content": "7"},
        {"role": "assistant", "content": "12+7=19. price(milk)"},
        {"role": "user", "content": "5"},
    ]

    def verdict(last: str, *middle: dict[str, str]) -> float:
        whole = (*prompt.messages, *(middle or said), {"role": "assistant", "content": last})
        return shopping.verify(prompt, whole)

    assert verdict(f"Answer: {sum(prices.values())}") == 1.0
    assert verdict("19+5=24. Answer: 24") == 1.0
    assert verdict("Answer: 23") == 0.0
    # the milk was never asked for
    assert verdict("Answer: 24", *said[:4]) == 0.0
    assert verdict("Answer: 24", {"role": "assistant", "content": "price(figs)"}) == 0.0
    # a reply that is no price
    assert verdict("Answer: 24", *said[:5], {"role": "user", "content": "Error: no milk here"}) == 0.0
    assert shopping.verify(prompt, prompt.messages) == shopping.verify(prompt, "Answer: 24") == 0.0
    with pytest.raises(ValueError, match="no answer"):
        shopping.verify(Prompt("p", ()), ())


def test_the_questions_and_answers_of_each_task() -> None:
    for prompt in prompts(TASKS["shopping"], 60):
        names = re.findall("[a-z]+", question(prompt).partition(".")[0].removeprefix("Buy"))
        assert 2 <= len(set(names)) == len(names) <= 4
        assert set(names) <= set(ITEMS)
        assert prompt.answer == "+".join(names)
    for prompt in prompts(TASKS["calculator"], 60):
        value, *steps = question(prompt).removeprefix("Work out ").partition(" from")[0].split()
        assert 2 <= len(steps) <= 3
        total = int(value)
        for step in steps:
            number = int(step[1:])
            total = {"+": total + number, "-": total - number, "*": total * number}[step[0]]
            assert 0 <= total <= 99
        assert prompt.answer == str(total)


def test_a_ledger_has_8_to_12_turns_and_a_balance() -> None:
    task, turns = TASKS["ledger"], set()
    for prompt in prompts(task, 120):
        rollout = played(task, prompt, task.worked(prompt, 0))
        first, entry = re.findall(r"[-+]?\d+", question(prompt))
        balance, entries = int(first), [entry, *replies(rollout)[:-1]]
        for text in entries:
            balance += int(text)
            assert 0 <= balance <= 40
            assert 1 <= abs(int(text)) <= 9
        assert prompt.answer == str(balance)
        assert replies(rollout)[-1] == "Answer?"
        turns.add(rollout.text.count("\n") + 1)
        # the entries do not depend on what the student writes
        silent = played(task, prompt, lambda number: "well")
        assert replies(silent) == replies(rollout)
        assert task.verify(prompt, task.evidence(silent)) == 0.0
    assert turns == set(range(8, 13))


def test_an_answer_before_it_is_asked_for_ends_a_ledger() -> None:
    task = TASKS["ledger"]
    (prompt,) = prompts(task, 1)
    rollout = played(task, prompt, ["well", "Answer: 3"])
    assert len(replies(rollout)) == 1


# --- faults of the student, and limits


@pytest.mark.parametrize(
    ("kind", "text", "reply"),
    [
        ("shopping", "price figs", "Error: write one price(NAME)"),
        ("shopping", "price(figs) price(ham)", "Error: write one price(NAME)"),
        ("shopping", "cost(figs)", "Error: write one price(NAME)"),
        ("shopping", "", "Error: write one price(NAME)"),
        ("shopping", "price(price(figs))", None),
        ("shopping", "price(gold)", "Error: no gold here"),
        ("shopping", "price()", "Error: no  here"),
        ("calculator", "calc(2 + 3)", "5"),
        ("calculator", "calc(2-3)", "-1"),
        ("calculator", "calc(23*47)", "1081"),
        ("calculator", "calc(2+)", "Error: give A+B, A-B or A*B"),
        ("calculator", "calc(2**9)", "Error: give A+B, A-B or A*B"),
        ("calculator", "calc(9999999*9)", "Error: give A+B, A-B or A*B"),
        ("calculator", "calc(__import__)", "Error: give A+B, A-B or A*B"),
        ("calculator", "price(2+3)", "Error: write one calc(A+B)"),
    ],
)
def test_a_call_that_cannot_be_read_is_answered_and_goes_on(kind: str, text: str, reply: str | None) -> None:
    task = TASKS[kind]
    (prompt,) = prompts(task, 1)
    worked = task.worked(prompt, 0)
    rollout = played(task, prompt, [text, *worked])
    first = replies(rollout)[0]
    assert first == (str(task.price("figs", 0)) if reply is None else reply)
    # the fault costs a turn and nothing else
    assert task.verify(prompt, task.evidence(rollout)) == 1.0
    assert rollout.finish == "stop"


def test_only_six_calls_get_a_price_and_an_attempt_has_ten_turns() -> None:
    task = TASKS["shopping"]
    (prompt,) = prompts(task, 1)
    rollout = played(task, prompt, lambda number: "price(figs)")
    price = str(task.price("figs", 0))
    assert replies(rollout) == [price] * 6 + ["Error: no calls left"] * 3
    assert rollout.text.count("price(figs)") == 10
    assert rollout.finish == "stop"
    assert task.verify(prompt, task.evidence(rollout)) == 0.0
    # turns without a call take no call, but a turn
    rollout = played(task, prompt, lambda number: "hm")
    assert replies(rollout) == ["Error: write one price(NAME)"] * 9


@pytest.mark.parametrize("text", ["f(x)", "a f(x) b", "f(x) ", "1f(x)"])
def test_a_call_stands_anywhere_in_a_turn(text: str) -> None:
    assert the_call(text) == ("f", "x")


def test_the_calculator_agrees_with_python() -> None:
    rng = np.random.default_rng(0)
    for one, other in rng.integers(0, 999, (50, 2)).tolist():
        for sign in "+-*":
            assert computed(f"{one}{sign}{other}") == str(eval(f"{one}{sign}{other}"))


@kinds
def test_the_limits_of_the_sampler_hold(kind: str) -> None:
    task = TASKS[kind]
    (prompt,) = prompts(task, 1)
    texts = task.worked(prompt, 0)
    by_turns = played(task, prompt, texts, max_turns=2)
    assert (by_turns.finish, by_turns.text.count("\n")) == ("max_turns", 1)
    by_tokens = played(task, prompt, texts, tokens=len(texts[0]) + 4)
    assert (by_tokens.finish, int(by_tokens.mask_T.sum())) == ("length", len(texts[0]) + 4)
    slow = part("tasks", kind)(delay_s=60.0)
    late = played(slow, prompt, texts, environment_timeout_s=0.05)
    assert (late.finish, late.text) == ("timeout", texts[0])


def test_a_tool_takes_the_seconds_that_it_is_told_to() -> None:
    """It waits without holding the event loop. The only thing asserted of the time is that it passes."""
    (prompt,) = prompts(TASKS["ledger"], 1)

    async def beside() -> float:
        environments = [Ledger(delay_s=0.05).open_env(prompt, 0) for _ in range(20)]
        started = time.monotonic()
        await asyncio.gather(*(one.step({"role": "assistant", "content": "hm"}) for one in environments))
        return time.monotonic() - started

    assert asyncio.run(beside()) >= 0.05


# --- tables that change


def test_a_version_of_the_prices_lasts_drift_every_steps() -> None:
    task = Shopping(drift_every=3)
    table = [tuple(task.price(name, step) for name in ITEMS) for step in range(12)]
    assert all(table[step] == table[3 * (step // 3)] for step in range(12))
    assert len(set(table)) == 4
    assert all(1 <= price <= 20 for prices in table for price in prices)
    fixed = Shopping(drift_every=0)
    assert {tuple(fixed.price(name, step) for name in ITEMS) for step in (0, 5, 10**6)} == {table[0]}
    assert {Shopping(largest_price=3, drift_every=1).price("figs", step) for step in range(60)} == {1, 2, 3}


def test_an_attempt_keeps_the_table_with_which_it_began_and_the_verdict_is_by_what_it_saw() -> None:
    task = Shopping(drift_every=1)
    for prompt in prompts(task, 20):
        before, after = (task.worked(prompt, step) for step in (4, 5))
        if before == after:
            continue
        rollout = played(task, prompt, before, 4)
        assert replies(rollout) == [str(task.price(name, 4)) for name in (prompt.answer or "").split("+")]
        assert task.verify(prompt, task.evidence(rollout)) == 1.0
        # the right sum of another table
        if before[-1] != after[-1]:
            assert answered(task, prompt, [*before[:-1], after[-1]], 4) == 0.0


def test_the_other_tasks_do_not_change() -> None:
    for kind in ("calculator", "ledger"):
        for prompt in prompts(TASKS[kind], 5):
            assert TASKS[kind].worked(prompt, 0) == TASKS[kind].worked(prompt, 99)


@kinds
@pytest.mark.parametrize("fault", [False, True])
def test_a_replay_gives_what_an_environment_of_that_step_would(kind: str, fault: bool) -> None:
    task = TASKS[kind]
    assert task.replays
    for prompt in prompts(task, 10):
        texts = [*(["hm(", "price(gold)"] if fault else []), *task.worked(prompt, 2)]
        turns = [{"role": "assistant", "content": text} for text in texts[:-1]]
        for step in (2, 3):
            found = task.replay(prompt, turns, step)
            assert [message["content"] for reply in found for message in reply] == replies(
                played(task, prompt, texts, step)
            )
            assert len(found) == len(turns)


# --- prompts


def test_a_problem_is_found_again_from_the_id_of_its_prompt_alone() -> None:
    for task in TASKS.values():
        for prompt in prompts(task, 10, "validation"):
            assert task.ask(task.problem(prompt)) == (question(prompt), prompt.answer)
        with pytest.raises(ValueError, match="prompt p7 is not one of the task"):
            task.open_env(Prompt("p7", ()), 0)


def test_no_held_out_problem_is_trained_on_with_another_seed_either() -> None:
    for kind, task in TASKS.items():
        trained = {
            question(prompt) for seed in (0, 1) for prompt in islice(task.prompts("train", seed), 1500)
        }
        held_out = {question(prompt) for prompt in task.prompts("test", 5)}
        # the later entries of a ledger are not in its question
        assert kind == "ledger" or trained.isdisjoint(held_out)
        problems = {repr(task.problem(prompt)) for prompt in islice(task.prompts("train", 0), 1500)}
        assert problems.isdisjoint(repr(task.problem(prompt)) for prompt in task.prompts("test", 5))


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("shopping", {"min_items": 5}, "Raise max_items"),
        ("calculator", {"min_steps": 4}, "Raise max_steps"),
        ("ledger", {"min_entries": 12}, "Raise max_entries"),
        ("shopping", {"drift_every": -1}, "greater than or equal to 0"),
        ("shopping", {"delay_s": -1.0}, "greater than or equal to 0"),
        ("ledger", {"held_out": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part("tasks", kind)(**fields)


def test_a_mix_passes_on_the_step_the_replies_and_the_conversation() -> None:
    mix = Mix({**TASKS, "plain": part("tasks", "word_problems")()})
    assert mix.replays
    for prompt in prompts(mix, 60):
        name = mix.part_of(prompt)
        if name == "plain":
            assert mix.open_env(prompt, 4) is None
            continue
        inner = Prompt(prompt.id.partition("/")[2], prompt.messages, prompt.answer)
        texts = TASKS[name].worked(inner, 4)
        rollout = played(mix, prompt, texts, 4)
        assert mix.verify(prompt, mix.evidence(rollout)) == 1.0
        turns = [{"role": "assistant", "content": text} for text in texts[:-1]]
        assert mix.replay(prompt, turns, 7) == TASKS[name].replay(inner, turns, 7)
    assert not Mix({"plain": part("tasks", "word_problems")()}).replays


def test_what_is_learnt_from_are_the_students_tokens_alone() -> None:
    task = TASKS["calculator"]
    (prompt,) = prompts(task, 1)
    texts = task.worked(prompt, 0)
    rollout = played(task, prompt, texts)
    assert TOKENIZER.decode(rollout.tokens_T[rollout.mask_T]) == "".join(f"{text}<end>" for text in texts)
