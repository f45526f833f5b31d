"""Results that are written as they come, so that a call that was killed can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflux.errors import RunError
from reflux.storage.files import append_lines, keep_lines, read_lines


def taken_up(path: Path, settings: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """The rows that an earlier call wrote to the file `path`. A new file begins with `settings`, which decide
    the results.

    Raises RunError if the earlier call had other settings. what: the results in the plural, for the text.
    """
    # An incomplete last line is removed. Otherwise the next line would be appended to it.
    keep_lines(path, lambda row: True)
    rows = list(read_lines(path))
    if not rows:
        append_lines(path, [dict(settings)])
        return []
    if rows[0] != settings:
        changed = ", ".join(key for key in settings if rows[0].get(key) != settings[key])
        raise RunError(
            f"{path} holds {what} made with other settings ({changed}). Choose another folder with --out."
        )
    return rows[1:]
