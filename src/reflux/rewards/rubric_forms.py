"""Rubrics and verdicts in the forms of ROPD's released code (arXiv 2605.07396), and the score they give."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from reflux.models.chat.surrogates import whole_characters
from reflux.rewards.json_object import json_object

RUBRIC_FORM = "ropd.rubric.v1"
VERDICTS_FORM = "ropd.batch_verifier.v2"
FEWEST, MOST = 4, 12
MOST_POINTS = 5
ID = re.compile(r"c[0-9]+")


class RubricError(ValueError):
    """A rubric that does not have the form it must have. The text is a sentence for the model."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One question about an answer, to be answered by yes or no."""

    id: str
    category: str
    text: str
    # 1 to 5
    points: int


@dataclass(frozen=True)
class Rubric:
    """The criteria by which all answers to one question are judged."""

    criteria: tuple[Criterion, ...]

    @property
    def points(self) -> list[int]:
        return [criterion.points for criterion in self.criteria]

    @property
    def maximum(self) -> int:
        """The points of an answer that meets every criterion."""
        return sum(self.points)

    @cached_property
    def hash(self) -> str:
        """12 hex digits, the same for the same criteria in the same order."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def text(self) -> str:
        """The rubric as JSON, in the form in which it was released."""
        rows = [
            {"criterion_id": c.id, "category": c.category, "criterion": c.text, "points": c.points}
            for c in self.criteria
        ]
        whole = {"schema_version": RUBRIC_FORM, "maximum_score": self.maximum, "rubrics": rows}
        return whole_characters(json.dumps(whole, indent=1, ensure_ascii=False))


class _Form(BaseModel):
    # Extra fields are ignored.
    model_config = ConfigDict(extra="ignore", strict=True)


class _Criterion(_Form):
    criterion_id: StrictStr
    category: StrictStr = ""
    criterion: StrictStr
    points: Annotated[StrictInt, Field(ge=1, le=MOST_POINTS)]


class _Rubric(_Form):
    schema_version: Literal["ropd.rubric.v1"] = RUBRIC_FORM
    rubrics: Annotated[list[_Criterion], Field(min_length=FEWEST, max_length=MOST)]


class _Answer(_Form):
    answer_index: StrictInt
    judgement: list[StrictBool]
    # What the model itself added up. It is never used as a score.
    final_score: Any = None


class _Verdicts(_Form):
    schema_version: Literal["ropd.batch_verifier.v2"] = VERDICTS_FORM
    answers: list[_Answer]


def parse_rubric(text: str) -> Rubric:
    """The rubric in the text of a model. A wrong `maximum_score` is corrected: it is the sum of the points.

    RubricError, a ValueError, for a text that is not one JSON object (`json_object`), another schema version
    (a missing one is accepted), fewer than 4 or more than 12 criteria, ids that are not c<digits> or are
    repeated, an empty criterion, and points that are not a whole number from 1 to 5.
    """
    try:
        found = _Rubric.model_validate(json_object(text))
    except ValidationError as error:
        raise RubricError(first_fault(error)) from error
    except ValueError as error:
        raise RubricError(str(error)) from error
    ids = [row.criterion_id for row in found.rubrics]
    if bad := [id_ for id_ in ids if not ID.fullmatch(id_)]:
        raise RubricError(f"the criterion_id {bad[0]!r} is not a c with digits, such as c1.")
    if len(set(ids)) < len(ids):
        raise RubricError("a criterion_id is repeated.")
    if empty := [row.criterion_id for row in found.rubrics if not row.criterion.strip()]:
        raise RubricError(f"the criterion {empty[0]} is empty.")
    return Rubric(
        tuple(Criterion(r.criterion_id, r.category, r.criterion.strip(), r.points) for r in found.rubrics)
    )


def parse_verdicts(text: str, n_answers: int, n_criteria: int) -> list[list[bool]]:
    """The verdicts in the text of a model: for each answer, in the order of `answer_index`, one boolean for
    each criterion. `final_score` is not read.

    ValueError for a text that is not one JSON object, another schema version, indexes that are not 1 to
    n_answers exactly once, another number of verdicts, and anything but true and false; the sentence names
    the answer.
    """
    return [answer.judgement for answer in _verdicts(text, n_answers, n_criteria)]


def final_scores(text: str, n_answers: int, n_criteria: int) -> list[Any]:
    """`final_score` of each answer, as the model wrote it, to count where it disagrees with its verdicts."""
    return [answer.final_score for answer in _verdicts(text, n_answers, n_criteria)]


def _verdicts(text: str, n_answers: int, n_criteria: int) -> list[_Answer]:
    try:
        found = _Verdicts.model_validate(json_object(text))
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error
    by_index = {answer.answer_index: answer for answer in found.answers}
    if len(by_index) < len(found.answers):
        raise ValueError("an answer_index is repeated.")
    if by_index.keys() != set(range(1, n_answers + 1)):
        missing = sorted(set(range(1, n_answers + 1)) ^ by_index.keys())
        raise ValueError(
            f"answer_index must be 1 to {n_answers}, each exactly once; {missing[0]} is missing or too much."
        )
    for index, answer in by_index.items():
        if len(answer.judgement) != n_criteria:
            raise ValueError(
                f"answer {index} has {len(answer.judgement)} verdicts, and there are {n_criteria} criteria."
            )
    return [by_index[index] for index in sorted(by_index)]


def first_fault(error: ValidationError) -> str:
    """A sentence about the first field that is wrong."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(key) for key in fault["loc"])
    return f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}."


def weighted_score(points: Sequence[int], verdicts: Sequence[bool]) -> float:
    """sum_k points_k verdict_k / sum_k points_k, in [0, 1]; exactly 1 if all verdicts are true, and 0 if none
    is. ValueError for unequal lengths, no criteria, and points below 1.
    """
    if len(points) != len(verdicts) or not points:
        raise ValueError(f"{len(points)} points and {len(verdicts)} verdicts give no score")
    if min(points) < 1:
        raise ValueError(f"points must be at least 1, got {min(points)}")
    return sum(p for p, met in zip(points, verdicts, strict=True) if met) / sum(points)


RUBRIC_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema_version", "maximum_score", "rubrics"],
    "properties": {
        "schema_version": {"type": "string", "enum": [RUBRIC_FORM]},
        "maximum_score": {"type": "integer"},
        "rubrics": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["criterion_id", "category", "criterion", "points"],
                "properties": {
                    "criterion_id": {"type": "string"},
                    "category": {"type": "string"},
                    "criterion": {"type": "string"},
                    "points": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
                },
            },
        },
    },
}
VERDICTS_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema_version", "answers"],
    "properties": {
        "schema_version": {"type": "string", "enum": [VERDICTS_FORM]},
        "answers": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["answer_index", "judgement", "final_score"],
                "properties": {
                    "answer_index": {"type": "integer"},
                    "judgement": {"type": "array", "items": {"type": "boolean"}},
                    "final_score": {"type": "integer"},
                },
            },
        },
    },
}
