"""The prompts of a file of attempts, and which of its attempts each optimiser step gets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, Protocol

from reflux.config.json_rows import NOTHING
from reflux.config.step_context import seed_of
from reflux.errors import DataError
from reflux.runtime.occurrences import numbered
from reflux.samplers.imported_file import AttemptFile, Entry, StoredPrompt, same_text
from reflux.types import Prompt

# The most prompts of a task that are searched for those of the file.
_SEARCHED = 100_000


class Asks(Protocol):
    """The members of a task that give its training prompts."""

    @property
    def routes(self) -> frozenset[str | None] | None: ...

    @property
    def patience(self) -> int: ...

    def prompts(self, split: Literal["train"], seed: int, start: int = 0) -> Iterator[Prompt]: ...


@dataclass(frozen=True, slots=True)
class Tried:
    """A prompt and its attempts in the file, in the order of the file."""

    prompt: Prompt
    entries: tuple[Entry, ...]


def tried(file: AttemptFile, task: Asks, seed: int) -> list[Tried]:
    """The prompts of the file. A prompt is the training prompt of the task with its id, else that with its
    messages, else a prompt of its own, made of the messages in the file.

    DataError, with the file and the line, for a prompt that is none of the task's and has no messages, for an
    id whose prompt in the task is another one, and for a route that the task does not have.
    """
    by_id, by_text = _of_task(file, task, seed)
    found: dict[str, Tried] = {}
    for asked in file.asked:
        known = _named(asked, by_id)
        if known is None and asked.messages is not None:
            known = by_text.get(same_text(asked.messages))
        prompt = _own(file, asked, task) if known is None else _same(file, asked, known)
        before = found.get(prompt.id)
        if before is not None and before.prompt != prompt:
            raise DataError(
                f"{file.line(asked.number)} has the prompt id '{prompt.id}', which is also that of line "
                f"{before.entries[0].number} with another prompt; {NOTHING}. Give each prompt its own id."
            )
        entries = (*before.entries, *asked.entries) if before else tuple(asked.entries)
        found[prompt.id] = Tried(prompt, tuple(sorted(entries, key=lambda entry: entry.number)))
    return list(found.values())


def _of_task(file: AttemptFile, task: Asks, seed: int) -> tuple[dict[str, Prompt], dict[str, Prompt]]:
    """The task's training prompts that the file names, by id, and those whose messages it has, by text. Reads
    one pass over the task's prompts, or until all are found.
    """
    # the prompts of the file that are not found yet, by the ids and texts that would be theirs
    waiting: dict[tuple[str, str], list[StoredPrompt]] = {}
    for asked in file.asked:
        for name in _names(asked):
            waiting.setdefault(("id", name), []).append(asked)
        if asked.messages is not None:
            waiting.setdefault(("text", same_text(asked.messages)), []).append(asked)
    missing = {id(asked) for asked in file.asked}
    texts = any(kind == "text" for kind, _ in waiting)
    by_id: dict[str, Prompt] = {}
    by_text: dict[str, Prompt] = {}
    seen: set[str] = set()
    old = 0
    for prompt in task.prompts("train", seed):
        old = old + 1 if prompt.id in seen else 0
        seen.add(prompt.id)
        if ("id", prompt.id) in waiting:
            by_id.setdefault(prompt.id, prompt)
            # `a#2` may still be the id of a prompt where `a` is one.
            missing -= {id(asked) for asked in waiting["id", prompt.id] if asked.name == prompt.id}
        if texts and ("text", text := same_text(prompt.messages)) in waiting:
            by_text.setdefault(text, prompt)
            missing -= {id(asked) for asked in waiting["text", text]}
        if not missing or old == task.patience or len(seen) >= _SEARCHED:
            break
    return by_id, by_text


def _names(asked: StoredPrompt) -> Iterator[str]:
    """The ids that the name of a prompt may stand for. In lines of a run, `a#2` is the second occurrence of
    the prompt `a` in one step, unless a prompt has that id.
    """
    if asked.name is not None:
        yield asked.name
        first, mark, number = asked.name.rpartition("#")
        if asked.question is not None and mark and number.isdecimal():
            yield first


def _named(asked: StoredPrompt, by_id: dict[str, Prompt]) -> Prompt | None:
    return next((by_id[name] for name in _names(asked) if name in by_id), None)


def _same(file: AttemptFile, asked: StoredPrompt, prompt: Prompt) -> Prompt:
    """The prompt of the task. DataError if the file has other messages for it."""
    contents = {message["content"] for message in prompt.messages}
    other = asked.messages is not None and same_text(asked.messages) != same_text(prompt.messages)
    if other or (asked.question is not None and asked.question not in contents):
        raise DataError(
            f"{file.line(asked.number)} has other messages than the task's prompt {prompt.id}; {NOTHING}. "
            "Use the task, with its settings and the seed, for which the attempts were sampled. Prompts of "
            "another task need ids that this one does not have."
        )
    return prompt


def _own(file: AttemptFile, asked: StoredPrompt, task: Asks) -> Prompt:
    """A prompt that the task does not have, from the messages in the file."""
    if asked.messages is None:
        raise DataError(
            f"{file.line(asked.number)} has the prompt id '{asked.name}', and no training prompt of the task "
            f"has this id; {NOTHING}. Use the task and the seed for which the attempts were sampled, or give "
            "the prompt in the field 'messages'."
        )
    routes = task.routes
    if routes is not None and asked.route not in routes:
        known = ", ".join(sorted(route if route else "(none)" for route in routes))
        raise DataError(
            f"{file.line(asked.number)} has a prompt that is none of the task's, with the route "
            f"{asked.route or '(none)'}; {NOTHING}. The routes of the task are {known}. Give one of them in "
            "the field 'route'."
        )
    return Prompt(
        id=asked.name or f"imported/{asked.number}",
        messages=asked.messages,
        answer=asked.answer,
        route=asked.route,
    )


class Groups:
    """The whole groups of a file: `size` attempts of one prompt that follow one another. Each epoch has every
    group once, in a new order. Attempts that are left over at the end of a prompt are not used.
    """

    def __init__(self, prompts: Sequence[Tried], size: int, seed: int):
        self._prompts, self._size, self._seed = prompts, size, seed
        self._groups = [
            (place, start)
            for place, one in enumerate(prompts)
            for start in range(0, len(one.entries) - size + 1, size)
        ]
        # the epoch whose order was computed last
        self._epoch, self._order = -1, list[int]()

    @property
    def left_over(self) -> int:
        return sum(len(one.entries) % self._size for one in self._prompts)

    def stream(self, start: int) -> Iterator[Prompt]:
        """The prompts of the groups from position `start` on, without end."""
        return (self._prompts[self._at(position)[0]].prompt for position in count(start))

    def of_step(self, step: int, per_step: int) -> dict[str, tuple[Entry, ...]]:
        """The attempts of the groups of one step (from 0), by the key of their prompt. per_step: the number
        of groups in a step.
        """
        groups = [self._at(position) for position in range(step * per_step, (step + 1) * per_step)]
        keys = numbered(self._prompts[place].prompt for place, _ in groups)
        return {
            prompt.key: self._prompts[place].entries[start : start + self._size]
            for prompt, (place, start) in zip(keys, groups, strict=True)
        }

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self._groups))
        if epoch != self._epoch:
            order = list(range(len(self._groups)))
            random.Random(seed_of("imported", self._seed, epoch)).shuffle(order)
            self._epoch, self._order = epoch, order
        return self._groups[self._order[place]]
