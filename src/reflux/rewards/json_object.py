"""Read the one JSON object that a language model was asked for. What a model wrote is data."""

from __future__ import annotations

import json
import re
from typing import Any

from reflux.grading.thinking import after_thinking

FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text, bare or in one code fence, after thinking is removed.

    ValueError, with a sentence for the model, for anything else around it, a repeated key, NaN or Infinity,
    and another value than an object.
    """
    shown = after_thinking(text).strip()
    fenced = FENCE.fullmatch(shown)
    try:
        found = json.loads(
            fenced[1] if fenced else shown, parse_constant=_constant, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not one JSON object and nothing else ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object.")
    return found


def _constant(word: str) -> None:
    raise ValueError(f"it has the value {word}, which is no number in JSON.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has an object in which a key is repeated.")
    return found
