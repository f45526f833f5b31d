"""Makes prompts from lines of data: errors that name the line, splits by a hash, and an order for each
epoch.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reflux.config.json_rows import NOTHING, Line
from reflux.config.line_fields import names_in, value_of
from reflux.config.registry import did_you_mean
from reflux.config.step_context import seed_of
from reflux.errors import DataError
from reflux.types import Prompt

# the endings that `reflux difficulty` appends to the ids of copies
COPY = re.compile(r"(#[0-9]+)+$")


def hub_lines(dataset: str, config: str | None, split: str, task: str) -> list[Line]:
    """The rows of a dataset of the Hugging Face hub, numbered from 1. task: the kind of the task, for errors.
    DataError if the dataset cannot be loaded or is empty, with a remedy for working offline.
    """
    # Imported here because the import takes seconds.
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        # The cause says what is wrong with the data.
        said = [str(one).strip() for one in (error, error.__cause__) if one is not None]
        reason = ": ".join(text.splitlines()[0] for text in said if text) or type(error).__name__
        raise DataError(
            f"task {task}: cannot load split '{split}' of the hub dataset '{dataset}' ({reason}); {NOTHING}. "
            "Without a connection, set `path` to a local copy, or load the dataset once on a machine with a "
            "connection and copy its cache (HF_HOME)."
        ) from error
    if not len(rows):
        raise DataError(f"task {task}: split '{split}' of the hub dataset '{dataset}' is empty; {NOTHING}.")
    return [(number, dict(row)) for number, row in enumerate(rows, start=1)]


def check_columns(lines: Collection[Line], columns: Mapping[str, str], where: str) -> None:
    """DataError if no line has a value in one of the columns. columns: the name of the column by its key in
    the field `keys` of the task. where: the task and the file, for errors.
    """
    for key, column in columns.items():
        if all(value_of(fields, column) is None for _, fields in lines):
            names = names_in(fields for _, fields in lines)
            raise DataError(
                f"{where}: task.keys.{key} names the column '{column}', in which no line has a value"
                f"{did_you_mean(column, names)}; {NOTHING}. Columns with values: {', '.join(names)}."
            )


def make_prompts(
    lines: Iterable[Line], where: str, make: Callable[[int, dict[str, Any]], Prompt]
) -> list[Prompt]:
    """Calls `make(number, fields)` for each line. where: the task and the file, for errors. A ValueError of
    `make` becomes a DataError that names the line. An id that occurs twice raises DataError.
    """
    prompts: list[Prompt] = []
    first: dict[str, int] = {}
    for number, fields in lines:
        try:
            prompt = make(number, fields)
        except ValueError as error:
            raise DataError(f"{where} line {number} {error}; {NOTHING}.") from error
        if prompt.id in first:
            raise DataError(
                f"{where} line {number} has the id '{prompt.id}' of line {first[prompt.id]}; {NOTHING}. "
                f"Ids seed the sampling and identify the attempts, so each id must be unique."
            )
        first[prompt.id] = number
        prompts.append(prompt)
    return prompts


def held_out(prompt: Prompt, share: float) -> bool:
    """True if a prompt belongs to the validation set. share: the expected share of this set. The result
    depends on the id of the prompt alone, not on the order or on other lines.

    A copy `id#2` goes with its original, so that no question is in both splits.
    """
    return seed_of("validation", COPY.sub("", prompt.id)) < share * 2**63


def endless(prompts: Sequence[Prompt], seed: int, start: int) -> Iterator[Prompt]:
    """An endless stream of all prompts, in a new order in each epoch, from position `start` on. To reach
    `start`, only the order of one epoch is computed.
    """
    epoch, skip = divmod(start, len(prompts))
    for number in itertools.count(epoch):
        order = list(range(len(prompts)))
        random.Random(seed_of("order", seed, number)).shuffle(order)
        for index in order[skip:]:
            yield prompts[index]
        skip = 0
