"""Offline balance: how hard is each training prompt for this student, and which ones to repeat. Nothing is
deleted.

Arrives at two files: `difficulty.jsonl`, one line of counts per prompt, and `prompts.jsonl`, the prompts with
copies of the rarer difficulties, readable by the task `jsonl`. Uni-OPD, arXiv 2605.03677.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from reflux.config.step_context import SamplingParams
from reflux.errors import DataError
from reflux.tasks.base import Task
from reflux.tasks.glyphs import Glyphs
from reflux.tasks.word_problems import WordProblems
from reflux.types import Prompt, Reward

if TYPE_CHECKING:
    from reflux.evals.evaluation import Evaluation

# of an endless task, where no number is asked for
FIRST = 512
# so many different prompts of a task of a user's own are read in search of its end
UNKNOWN = 100_000
# the reward from which an answer counts as correct
CORRECT = 0.5


@dataclass(frozen=True)
class Counted:
    """One prompt and its answers: `correct` of `samples`, `ungraded` of which have no verdict."""

    prompt: Prompt
    correct: int
    samples: int
    ungraded: int = 0

    def line(self, copies: int) -> dict[str, Any]:
        return {
            "id": self.prompt.id,
            "correct": self.correct,
            "samples": self.samples,
            "ungraded": self.ungraded,
            "copies": copies,
        }


def multiplicities(counts_correct: Sequence[int], n_samples: int, cap: int = 8) -> list[int]:
    """Copies per prompt that make difficulty roughly flat: for a prompt with c of `n_samples` answers
    correct, 1 where c = 0, else clip(floor(H / h_c + 1/2), 1, cap), with h_c prompts of that count and H the
    largest h of all counts.

    Below the cap every count c >= 1 that occurs ends with 2H/3 to 4H/3 prompts; the fullest stays as it is.
    Prompts that were never solved are neither repeated nor dropped. The paper names the raised counts only
    (1..7 of 8, or 1..8 where most are unsolved); the formula is ours. [] gives []. ValueError for a count
    outside 0..n_samples, for n_samples or cap below 1.
    """
    if n_samples < 1 or cap < 1:
        raise ValueError(f"n_samples and cap must be at least 1, got {n_samples} and {cap}")
    for index, correct in enumerate(counts_correct):
        if not 0 <= correct <= n_samples:
            raise ValueError(
                f"prompt {index} has {correct} correct answers, which is not between 0 and n_samples = "
                f"{n_samples}"
            )
    sizes = Counter(counts_correct)
    fullest = max(sizes.values(), default=0)
    copies = {
        c: 1 if c == 0 else min(max((2 * fullest + size) // (2 * size), 1), cap) for c, size in sizes.items()
    }
    return [copies[correct] for correct in counts_correct]


def copies_of(counted: Sequence[Counted], cap: int = 8) -> list[int]:
    """`multiplicities` over the prompts all of whose answers were judged; the others are kept once, in no
    bin.
    """
    judged = [entry for entry in counted if not entry.ungraded]
    found = iter(
        multiplicities([entry.correct for entry in judged], judged[0].samples, cap) if judged else []
    )
    return [1 if entry.ungraded else next(found) for entry in counted]


def repeated(prompts: Sequence[Prompt], copies: Sequence[int]) -> Iterator[Prompt]:
    """Each prompt, then its copies `id#2`, `id#3`, ... (a number that is taken is passed over): ids seed the
    sampling, so none is alike.
    """
    taken = {prompt.id for prompt in prompts}
    for prompt, times in zip(prompts, copies, strict=True):
        yield prompt
        free = (f"{prompt.id}#{number}" for number in count(2))
        yield from (
            replace(prompt, id=name)
            for name in islice((name for name in free if name not in taken), times - 1)
        )


def training_prompts(task: Task, seed: int, limit: int = 0) -> tuple[list[Prompt], bool]:
    """(the different training prompts in order, was the stream cut short?): the first `limit`, or, at 0, all
    of one pass.

    A training split never ends; a pass over data of any size is over when ids come again. An endless task
    gives its FIRST. DataError where no limit is asked for, and a task of a user's own came to no end in
    UNKNOWN different prompts.
    """
    finite = task.ends
    most = limit or (FIRST if finite is False else 0)
    patience = task.patience
    found: dict[str, Prompt] = {}
    old = 0
    for prompt in task.prompts("train", seed):
        old = old + 1 if prompt.id in found else 0
        found.setdefault(prompt.id, prompt)
        if most and len(found) == most:
            return list(found.values()), True
        if old == patience:
            break
        if not most and finite is None and len(found) > UNKNOWN:
            raise DataError(
                f"the task gave more than {UNKNOWN:,} different training prompts; say how many to take with "
                "--prompts N"
            )
    return list(found.values()), False


def as_word_problem(prompt: Prompt, text: str) -> float:
    """The verdict of the task `word_problems`, which needs the answer alone."""
    return WordProblems().verify(prompt, text)


def as_glyph(prompt: Prompt, made: Any) -> Reward:
    """The verdict of the task `glyphs`, which needs the route and the answer alone."""
    return Glyphs().verify(prompt, made)


async def measured(
    evaluation: Evaluation, prompts: Sequence[Prompt], samples: int, draw: SamplingParams, at_once: int = 64
) -> AsyncIterator[list[Counted]]:
    """Counts of `at_once` prompts at a time, in order. What is drawn depends on prompt and sample alone."""
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        groups = await evaluation.groups(chunk, samples, draw)
        rewards = iter(await evaluation.judged([attempt for group in groups for attempt in group]))
        yield [_counted(prompt, [next(rewards).value for _ in range(samples)]) for prompt in chunk]


def _counted(prompt: Prompt, values: Iterable[float | None]) -> Counted:
    values = list(values)
    known = [value for value in values if value is not None]
    return Counted(prompt, sum(value >= CORRECT for value in known), len(values), len(values) - len(known))


def as_line(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the task `jsonl` reads it."""
    single = len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user"
    asked = {"prompt": prompt.messages[0]["content"]} if single else {"messages": list(prompt.messages)}
    rest = {"answer": prompt.answer, "references": list(prompt.references) or None, "route": prompt.route}
    return {"id": prompt.id, **asked, **{key: value for key, value in rest.items() if value is not None}}
