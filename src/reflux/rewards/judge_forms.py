"""The forms in which a language model scores one answer, or compares two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from reflux.rewards.json_object import json_object
from reflux.rewards.rubric_forms import first_fault

SCORE_FORM = "reflux.score.v1"
PREFERENCE_FORM = "reflux.preference.v1"
MOST_SCORE = 10
Better = Literal["first", "second", "equal"]


class _Score(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    schema_version: Literal["reflux.score.v1"] = SCORE_FORM
    score: Annotated[StrictInt, Field(ge=0, le=MOST_SCORE)]


class _Preference(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    schema_version: Literal["reflux.preference.v1"] = PREFERENCE_FORM
    better: Better


def parse_score(text: str) -> float:
    """The score in the text of a model as a share of the most, in [0, 1]. ValueError for a text that is not
    one JSON object with a whole number from 0 to 10 as `score`.
    """
    try:
        return _Score.model_validate(json_object(text)).score / MOST_SCORE
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


def parse_preference(text: str) -> Better:
    """The preference in the text of a model. ValueError for a text that is not one JSON object with "first",
    "second" or "equal" as `better`.
    """
    try:
        return _Preference.model_validate(json_object(text)).better
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


SCORE_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema_version", "reason", "score"],
    "properties": {
        "schema_version": {"type": "string", "enum": [SCORE_FORM]},
        "reason": {"type": "string"},
        "score": {"type": "integer", "enum": list(range(MOST_SCORE + 1))},
    },
}
PREFERENCE_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema_version", "reason", "better"],
    "properties": {
        "schema_version": {"type": "string", "enum": [PREFERENCE_FORM]},
        "reason": {"type": "string"},
        "better": {"type": "string", "enum": ["first", "second", "equal"]},
    },
}
