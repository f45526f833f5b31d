"""The index file: a teacher's answers to prompts, one JSON object per line.

    {"prompt_id": "...", "prompt_sha256": "...", "answers": ["...", ...], "teacher": {...}}

`prompt_sha256` is over the prompt's messages as JSON with sorted keys. `teacher` is the fingerprint of model
and settings, the same on every line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.engines.endpoints.teacher_answers import TeacherSampling
from reflux.errors import DataError
from reflux.types import Prompt

if TYPE_CHECKING:
    from reflux.tasks.base import Task

# Part of every fingerprint: another way to ask gets another number.
VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """Where answers are stored, and who gives them."""

    path: Path
    # the task without the answers
    task: Task
    # an `Endpoint`, which knows the types of a run and is therefore not named here
    teacher: Any
    sampling: TeacherSampling

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {**self.teacher.fingerprint, **self.sampling.fingerprint, "version": VERSION}

    def line(self, prompt: Prompt, answers: list[str]) -> dict[str, Any]:
        return {
            "prompt_id": prompt.id,
            "prompt_sha256": digest(prompt),
            "answers": answers,
            "teacher": self.fingerprint,
        }

    def read(self) -> dict[str, Mapping[str, Any]]:
        """The lines by prompt id. DataError, with the number of the line, for one that is damaged, has
        another fingerprint, fewer answers than are needed or an empty one, and for a repeated id.
        """
        found: dict[str, Mapping[str, Any]] = {}
        with self.path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                row = self._checked(text, number)
                if row["prompt_id"] in found:
                    raise self._wrong(number, f"repeats the prompt {row['prompt_id']}")
                found[row["prompt_id"]] = row
        return found

    def _checked(self, text: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(text)
            id_, answers, teacher = row["prompt_id"], row["answers"], row["teacher"]
            whole = isinstance(id_, str) and isinstance(row["prompt_sha256"], str)
        except (ValueError, KeyError, TypeError) as error:
            raise self._wrong(number, f"is no line of an index ({error!r})") from error
        if not whole or not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
            raise self._wrong(number, "is no line of an index")
        if teacher != self.fingerprint:
            raise self._wrong(
                number, f"has answers of another teacher ({_differences(teacher, self.fingerprint)})"
            )
        if not all(answer.strip() for answer in answers):
            raise self._wrong(number, "has an empty answer")
        if len(answers) < self.sampling.count:
            raise self._wrong(number, f"has {len(answers)} answers, and {self.sampling.count} are needed")
        return row

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(
            f"{self.path} line {number} {what}. Name another file in task.path and fill it with `reflux "
            "answers`, or restore the recipe and the file."
        )


def digest(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt.messages, sort_keys=True).encode()).hexdigest()


def _differences(found: Any, expected: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "no fingerprint"
    keys = sorted({*found, *expected})
    changed = [key for key in keys if found.get(key) != expected.get(key)]
    return ", ".join(f"{key}: {found.get(key)!r} instead of {expected.get(key)!r}" for key in changed)
