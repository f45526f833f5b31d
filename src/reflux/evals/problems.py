"""The problems of an evaluation: those of a split. They are the same in every run, for every seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reflux.errors import DataError
from reflux.tasks.base import Split, Task
from reflux.types import Prompt

# The seed of validation problems, and of training problems in an evaluation. Recipes are tuned on validation
# problems.
HELD_OUT_SEED = 0
# The seed of test problems, and of nothing else. No recipe, default or model was ever chosen by problems
# drawn with this seed.
TEST_SEED = 7_302_811


def problems(task: Task, split: Split) -> Iterator[Prompt]:
    """The problems of a split, from the first one on. They are the same in every run: generated problems are
    drawn with a fixed seed, and stored lines do not depend on the seed.
    """
    return task.prompts(split, TEST_SEED if split == "test" else HELD_OUT_SEED)


def seen(task: Task, asked: Sequence[Prompt]) -> int:
    """The number of the test problems `asked` whose ids are also those of validation problems. 0 for a task
    without validation problems.
    """
    try:
        looked_at = {prompt.id for prompt in problems(task, "validation")}
    except DataError:
        return 0
    return sum(prompt.id in looked_at for prompt in asked)


def told(count: int) -> str:
    """A note that `count` test problems are also validation problems, with the remedy."""
    return (
        f"{count} of the test problems are also validation problems, so the reported result is not "
        "independent of the choices made during the work. Give the task separate test problems, such as "
        f"task.test = a file of lines that are in no other file."
    )
