"""Worked attempts at tasks with tools, on which the models of the recipe `tools` are trained.

Some attempts have a faulty turn and the error that the tool replies to it. The model is not trained on the
faulty turn, but on the right turn after it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from reflux.config.step_context import seed_of

if TYPE_CHECKING:
    from reflux.tasks.tools import ToolTask
    from reflux.types import Message, Prompt

# The share of the turns before which there is a faulty one.
FAULTY = 0.03
# Prices of the lessons have versions that no run of fewer steps has.
FIRST_STEP = 10_000_000


class Lesson(NamedTuple):
    messages: list[Message]
    # for each turn of the assistant, True if it is trained on
    right: list[bool]


def tool_lessons(tasks: Sequence[ToolTask], seed: int) -> Iterator[Lesson]:
    """Worked attempts without end, at each of the tasks in turn, every one at a step of its own."""
    streams = [task.prompts("train", seed) for task in tasks]
    for number in count():
        task, stream = tasks[number % len(tasks)], streams[number % len(tasks)]
        yield lesson(task, next(stream), FIRST_STEP + number)


def lesson(task: ToolTask, prompt: Prompt, step: int) -> Lesson:
    rng = random.Random(seed_of("lesson", prompt.id, step))
    problem, replies = task.problem(prompt), list[str]()
    game, made = task.game(problem, step), Lesson(list(prompt.messages), [])
    while True:
        text = task.turn(problem, replies)
        right = "(" not in text or rng.random() >= FAULTY
        told = text if right else text.replace(rng.choice("()"), "", 1)
        made.messages.append({"role": "assistant", "content": told})
        made.right.append(right)
        reply = game.reply(told)
        if reply is None:
            return made
        made.messages.append({"role": "user", "content": reply})
        if right:
            replies.append(reply)


def encoded(lesson: Lesson, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of an attempt, and True for those that are trained on: of right turns, with their end
    token.
    """
    ids = tokenizer.apply_chat_template(lesson.messages)["input_ids"]
    begins = tokenizer.convert_tokens_to_ids("<assistant>")
    right, learnt, own = iter(lesson.right), list[bool](), False
    for i in ids:
        learnt.append(own)
        own = next(right) if i == begins else own and i != tokenizer.eos_token_id
    return ids, learnt
