"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from reflux.errors import RunError
from reflux.metrics.values import jsonable

_LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; a file that says so already is left alone."""
    if path.exists() and path.read_bytes() == text.encode():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder by `fill(scratch)`, then give it its name; an older folder of that name goes only once
    the new one is complete.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        fill(scratch)
    except Exception as error:
        # half a folder helps nobody, and may be what filled the disk
        shutil.rmtree(scratch, ignore_errors=True)
        if os.strerror(errno.ENOSPC) in str(error):
            # safetensors reports it as an error of its own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    for file in scratch.rglob("*"):
        if file.is_file():
            # safetensors writes files that nobody else may read
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, numpy arrays as lists. NaN and infinity become null."""
    with path.open("ab") as file:
        file.writelines(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=jsonable, option=_LINE)
    except orjson.JSONEncodeError:
        # half a surrogate pair in a user's text is no UTF-8; the standard library escapes it
        return (json.dumps(jsonable(row)) + "\n").encode()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line cut short by a kill is passed over. RunError for another
    that is none.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _object(path, number, line)


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """RunError where the line holds something else."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(
            f"{path}, line {number} is damaged: it holds no JSON object. Remove that line, or begin a new "
            "run."
        )
    return found


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Cut a JSON-lines file back to the wanted objects, in one step, without holding it in memory."""
    if not path.exists():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as file, path.open("rb") as old:
        for number, line in enumerate(old, 1):
            if line.endswith(b"\n") and wanted(_object(path, number, line)):
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if scratch.stat().st_size < path.stat().st_size:
        scratch.replace(path)
    else:
        scratch.unlink()
