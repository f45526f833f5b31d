"""Reads the files of a run directory. A missing or damaged file gives a note and never an exception.

A run may be unfinished, or killed in the middle of a line. Files of lines are streamed and not kept in
memory.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """The objects of a JSON-lines file, one by one. NaN and infinities are returned as None.

    A missing file gives no rows. An incomplete last line (the run was killed while writing it) is left out,
    as is any line that is not an object. `notes` gets a sentence for each kind of damage when the file has
    been read to its end.
    """
    if not path.is_file():
        return
    strange: list[str] = []
    bad: list[int] = []
    cut = False
    with path.open("rb") as file:
        for number_of_line, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parse(line, strange)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                bad.append(number_of_line)
            else:
                cut = True
    if cut:
        notes.append(f"{path.name}: the last line is cut off (its writing was interrupted) and is left out.")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad)} line(s) are not JSON objects and are left out (line {shown}).")
    if strange:
        notes.append(f"{path.name}: {len(strange):,} number(s) are not finite and are left out.")


def _parse(line: bytes, strange: list[str]) -> Row | None:
    try:
        # append returns None, which becomes the value of the non-finite number
        row = json.loads(line, parse_constant=strange.append)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def whole(value: object) -> int | None:
    """The value if it is a whole number, else None."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def table(value: object) -> Row:
    """The value if it is a table, else an empty table."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """The value if it is a list, else an empty list."""
    return value if isinstance(value, list) else []


def texts(value: object) -> list[str]:
    """The texts of a list; none if the value is no list."""
    return [entry for entry in items(value) if isinstance(entry, str)]


def toml_table(path: Path, notes: list[str]) -> Row:
    """The table of a TOML file. Empty, with a note, if the file is missing or damaged."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing, so the configuration of the run is not known.")
    except ValueError as error:
        notes.append(f"{path.name} cannot be read: {error}.")
    return {}


def json_table(path: Path, notes: list[str]) -> Row | None:
    """The object of a JSON file. None if the file is missing; None and a note if it is damaged."""
    strange: list[str] = []
    if not path.is_file():
        return None
    row = _parse(path.read_bytes(), strange)
    if row is None:
        notes.append(f"{path.name} is damaged and is left out.")
    return row
