"""Parse the JSON objects of a data file, with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reflux.errors import DataError

# the number of the line or row, from 1, and its fields
Line = tuple[int, dict[str, Any]]
NOTHING = "nothing was written"
_LAYOUT = "The file must hold one object per line."


def of_lines(content: bytes, where: str) -> list[Line]:
    """The objects of JSON lines. Blank lines are skipped. where: the task and the file, for errors."""
    # Bytes are split at line feeds and carriage returns only. Text would be split inside a string that holds
    # a line separator (U+2028).
    rows = content.splitlines()
    cut = (
        "" if content.endswith((b"\n", b"\r")) else " It is the last line, and the file may be cut off there."
    )
    return [
        (number, object_of(row, f"{where} line {number}", cut if number == len(rows) else ""))
        for number, row in enumerate(rows, start=1)
        if row.strip()
    ]


def of_array(content: bytes, where: str) -> list[Line]:
    """The objects of one JSON array, numbered from 1. where: the task and the file, for errors."""
    rows = _parsed(content, where, " The file may be cut off.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{where} entry {number} is not an object; {NOTHING}.")
    return list(enumerate(rows, start=1))


def object_of(row: bytes, where: str, cut: str = "") -> dict[str, Any]:
    """The JSON object in one line of a file. where: the file and the line, for errors. cut: a sentence that
    is added to the error of a line that is not JSON.
    """
    fields = _parsed(row, where, f" {_LAYOUT}{cut}")
    if not isinstance(fields, dict):
        raise DataError(f"{where} is JSON but not an object; {NOTHING}. {_LAYOUT}")
    return fields


def _parsed(content: bytes, where: str, remedy: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}); {NOTHING}.") from error
    except _Twice as error:
        raise DataError(f"{where} has the key '{error}' twice in one object; {NOTHING}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); {NOTHING}.{remedy}") from error


class _Twice(ValueError):
    """A key that occurs twice in one object. JSON libraries disagree on which value counts."""


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found
