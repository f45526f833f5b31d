"""Which problems an evaluation asks: those of a split, the same in every run, whatever its seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reflux.errors import DataError
from reflux.tasks.base import Split, Task
from reflux.types import Prompt

# Of validation problems (and of training problems, where an evaluation asks for those). Whoever tunes a
# recipe looks at these.
HELD_OUT_SEED = 0
# Of test problems, and of nothing else: no recipe, default or model was ever chosen by a problem that was
# drawn with this seed.
TEST_SEED = 7_302_811


def problems(task: Task, split: Split) -> Iterator[Prompt]:
    """The problems of a split from its first one on. A split of stored lines is the same for every seed."""
    return task.prompts(split, TEST_SEED if split == "test" else HELD_OUT_SEED)


def seen(task: Task, asked: Sequence[Prompt]) -> int:
    """How many of these test problems are validation problems as well, by their ids. A task without
    validation problems has none.
    """
    try:
        looked_at = {prompt.id for prompt in problems(task, "validation")}
    except DataError:
        return 0
    return sum(prompt.id in looked_at for prompt in asked)


def told(count: int) -> str:
    """Such a count as a sentence with the remedy."""
    return (
        f"{count} of the test problems are validation problems too, so what is reported was looked at on the "
        "way. Give the task test "
        f"problems of its own, such as task.test = a file of lines that are in no other."
    )
