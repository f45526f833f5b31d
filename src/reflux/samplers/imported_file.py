"""A file of attempts: checked once from the first line to the last, and then read line by line. In memory are
only the places of the lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reflux.config.json_rows import NOTHING, object_of
from reflux.errors import DataError
from reflux.samplers.imported_lines import Stored, passed_over, stored
from reflux.types import Message


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of one attempt in the file, and what the checks need of it."""

    # number of the line, from 1
    number: int
    # byte in the file
    offset: int
    # positions, and those that were sampled
    length: int
    chosen: int
    # the largest token id of prompt and response
    largest: int
    # hash of the prompt's token ids; None if the line has none
    prompt_hash: bytes | None
    rewarded: bool


@dataclass(slots=True)
class StoredPrompt:
    """The attempts at one prompt of the file. The first five fields are those of its first line."""

    name: str | None
    messages: tuple[Message, ...] | None
    question: str | None
    answer: str | None
    route: str | None
    entries: list[Entry] = field(default_factory=list)

    @property
    def number(self) -> int:
        """The first line."""
        return self.entries[0].number


class AttemptFile:
    """The places of all attempts, by prompt in the order of the file. Prompts with an id are the same where
    the id is, the others where their messages are.

    DataError, with the file and the line, for a file that cannot be read and for a line that cannot be used.
    """

    def __init__(self, path: str):
        self.where = f"sampler.path: {path}"
        self._path = Path(path).expanduser()
        asked: dict[str, StoredPrompt] = {}
        for number, offset, row in self._rows():
            fields = object_of(row, self.line(number))
            if not passed_over(fields):
                self._add(asked, number, offset, self._stored(number, fields))
        self.asked = list(asked.values())
        if not self.asked:
            raise DataError(f"{self.where} has no attempt; {NOTHING}.")

    def line(self, number: int) -> str:
        """The file and the line, for errors."""
        return f"{self.where} line {number}"

    def read(self, entry: Entry) -> Stored:
        """The attempt at this place. DataError if the file was changed meanwhile."""
        with self._path.open("rb") as file:
            file.seek(entry.offset)
            row = file.readline()
        found = self._stored(entry.number, object_of(row, self.line(entry.number)))
        if (len(found.tokens_T), int(found.mask_T.sum())) != (entry.length, entry.chosen):
            raise DataError(f"{self.line(entry.number)} has changed since the run began. Restore the file.")
        return found

    def _rows(self) -> Iterator[tuple[int, int, bytes]]:
        """The number of each line that is not blank, its first byte, and its content."""
        offset = 0
        try:
            with self._path.open("rb") as file:
                for number, row in enumerate(file, start=1):
                    if row.strip():
                        yield number, offset, row
                    offset += len(row)
        except OSError as error:
            raise DataError(f"{self.where} cannot be read: {error.strerror or error}; {NOTHING}.") from error

    def _stored(self, number: int, fields: Mapping[str, Any]) -> Stored:
        try:
            return stored(fields)
        except ValueError as error:
            raise DataError(f"{self.line(number)} {error}; {NOTHING}.") from error

    def _add(self, asked: dict[str, StoredPrompt], number: int, offset: int, found: Stored) -> None:
        own = same_text(found.messages) if found.name is None else f"id {found.name}"
        known = asked.setdefault(
            own, StoredPrompt(found.name, found.messages, found.question, found.answer, found.route)
        )
        if (known.messages, known.question) != (found.messages, found.question):
            raise DataError(
                f"{self.line(number)} has the prompt id '{found.name}' of line {known.number} with other "
                f"messages; {NOTHING}. An id stands for one prompt."
            )
        ids = found.prompt_tokens
        known.entries.append(
            Entry(
                number,
                offset,
                len(found.tokens_T),
                int(found.mask_T.sum()),
                int(max(found.tokens_T.max(), -1 if ids is None else ids.max())),
                None if ids is None else hash_of(ids),
                found.reward is not None,
            )
        )


def hash_of(ids: np.ndarray) -> bytes:
    """A hash of token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()


def same_text(messages: Any) -> str:
    """The same text for equal messages, whatever the order of their keys is."""
    return json.dumps(messages, sort_keys=True)
