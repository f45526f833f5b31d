"""Write files atomically: under a temporary name, synced to disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from reflux.errors import RunError
from reflux.metrics.values import jsonable
from reflux.models.chat.surrogates import whole_characters

_LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` in one step. A file that already has this content is
    not touched. Half of a surrogate pair, which no file can hold, is written as U+FFFD.
    """
    text = whole_characters(text)
    if path.exists() and path.read_bytes() == text.encode():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the content of `path` by rows in one step, one JSON object per line. NaN and infinity are
    written as null.
    """
    write_text(path, "".join(json.dumps(jsonable(row)) + "\n" for row in rows))


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder with `fill(scratch)`, then rename it to `path`. An old folder at
    `path` is removed only when the new one is complete.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        fill(scratch)
    except Exception as error:
        # An incomplete folder has no use, and it may have filled the disk.
        shutil.rmtree(scratch, ignore_errors=True)
        if os.strerror(errno.ENOSPC) in str(error):
            # safetensors reports a full disk with its own exception
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    for file in scratch.rglob("*"):
        if file.is_file():
            # safetensors writes files that other users cannot read. Some file systems have no such rights.
            with suppress(PermissionError, NotImplementedError):
                file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder to disk. Some network file systems cannot do this for a folder, and refuse
    it as an invalid argument.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def size_bytes(folder: Path) -> int:
    """The size of all files in a folder. 0 if there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to the file `path`, one JSON object per line. Numpy arrays are written as lists. NaN and
    infinity are written as null.
    """
    with path.open("ab") as file:
        file.writelines(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=jsonable, option=_LINE)
    except orjson.JSONEncodeError:
        # Half a surrogate pair in a user's text is not valid UTF-8. The standard library escapes it.
        return (json.dumps(jsonable(row)) + "\n").encode()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. An incomplete last line, as a kill leaves it, is skipped.
    Raises RunError for any other line that is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _object(path, number, line)


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises RunError if the line holds something else."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(
            f"{path}, line {number} is damaged: it holds no JSON object. Remove that line, or start a new "
            "run."
        )
    return found


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Remove from a JSON-lines file all objects for which `wanted` is False, in one step and without reading
    the file into memory.
    """
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
