"""Offline balance: measures the difficulty of each training prompt for the student and repeats some prompts.

No prompt is deleted. The result is two files: `difficulty.jsonl`, one line of counts per prompt, and
`prompts.jsonl`, the prompts with copies of those of rarer difficulties, in the format of the task `jsonl`.
Uni-OPD, arXiv 2605.03677.
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

# the number of prompts of an endless task, if no number is given
FIRST = 512
# the largest number of different prompts that are read to find the end of a user's task
UNKNOWN = 100_000
# an answer with at least this reward counts as correct
CORRECT = 0.5


@dataclass(frozen=True)
class Counted:
    """One prompt and the counts of its answers: `correct` of `samples` are right, and `ungraded` of them have
    no verdict.
    """

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
    """The number of copies of each prompt that makes all difficulties about equally frequent. counts_correct:
    the number of correct answers to each prompt.

    A prompt with c of `n_samples` answers correct gets 1 copy if c = 0, else clip(floor(H / h_c + 1/2), 1,
    cap). h_c is the number of prompts with that count, and H the largest h of all counts. Below the cap,
    every count c >= 1 that occurs then has 2H/3 to 4H/3 prompts. The most frequent count is not changed.
    Prompts that were never solved are neither repeated nor dropped. The paper gives only the counts that are
    repeated (1..7 of 8, or 1..8 if most are unsolved); the formula is ours. [] gives []. ValueError for a
    count outside 0..n_samples, and for n_samples or cap below 1.
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
    """The number of copies of each prompt: `multiplicities` of the prompts whose answers were all judged. The
    other prompts get one copy and are not counted. cap: the most copies of a prompt.
    """
    judged = [entry for entry in counted if not entry.ungraded]
    found = iter(
        multiplicities([entry.correct for entry in judged], judged[0].samples, cap) if judged else []
    )
    return [1 if entry.ungraded else next(found) for entry in counted]


def repeated(prompts: Sequence[Prompt], copies: Sequence[int]) -> Iterator[Prompt]:
    """Each prompt, followed by its copies with ids `id#2`, `id#3`, ... An id that exists already is skipped.
    Each copy has its own id, because ids seed the sampling.
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
    """(different training prompts in order, True if the list was cut). limit: the number of prompts; 0: no
    limit.

    The stream of training prompts never ends. One pass over the data is read: it ends when prompt ids repeat.
    A task that always gives new prompts (`task.ends` is False) has no such pass, and without a limit its
    first 512 prompts (FIRST) are returned. If a task does not state whether prompts repeat (`task.ends` is
    None) and there is no limit, more than 100,000 different prompts (UNKNOWN) raise DataError.
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
                f"the task gave more than {UNKNOWN:,} different training prompts. Set their number with "
                "--prompts N"
            )
    return list(found.values()), False


def as_word_problem(prompt: Prompt, text: str) -> float:
    """The verdict of the task `word_problems`, which needs only the answer of the prompt."""
    return WordProblems().verify(prompt, text)


def as_glyph(prompt: Prompt, made: Any) -> Reward:
    """The verdict of the task `glyphs`, which needs only the route and the answer of the prompt."""
    return Glyphs().verify(prompt, made)


async def measured(
    evaluation: Evaluation, prompts: Sequence[Prompt], samples: int, draw: SamplingParams, at_once: int = 64
) -> AsyncIterator[list[Counted]]:
    """The counts of each prompt, in lists of `at_once` prompts that are sampled together. samples: answers
    per prompt. draw: the sampling parameters. The answers depend on prompt and sample index alone.
    """
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
    """A prompt as a line in the format of the task `jsonl`."""
    single = len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user"
    asked = {"prompt": prompt.messages[0]["content"]} if single else {"messages": list(prompt.messages)}
    rest = {"answer": prompt.answer, "references": list(prompt.references) or None, "route": prompt.route}
    return {"id": prompt.id, **asked, **{key: value for key, value in rest.items() if value is not None}}
