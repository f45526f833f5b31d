"""Read the rows of a data file: JSON lines, a JSON array, CSV or Parquet, also compressed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reflux.config.json_rows import NOTHING, Line, of_array, of_lines
from reflux.errors import DataError

# the endings of compressed files, and their names in pyarrow
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
# endings of other formats
_UNREAD = (".arrow", ".feather", ".orc", ".xlsx", ".xls", ".ods", ".zip", ".tar", ".7z", ".xz", ".pkl", ".pt")


def read_file(path: str | Path, task: str) -> list[Line]:
    """The rows of the file `path`, each with its number from 1. task: the kind of the task, for errors.

    The ending of the name gives the format. `.parquet`, `.csv` and `.tsv` are tables with one row per prompt;
    an empty cell is no value. `.json` is one array of objects. All other files have one JSON object per line,
    and blank lines are skipped. A further ending `.gz`, `.bz2`, `.zst` or `.lz4` is decompressed. DataError,
    with the file and where possible the line, for a file that is missing, empty or of another format.
    """
    where = f"task {task}: {path}"
    name = Path(path).expanduser()
    packed = _PACKED.get(name.suffix.lower())
    kind = (name.with_suffix("") if packed else name).suffix.lower()
    if kind in _UNREAD:
        raise DataError(
            f"{where} ends in {kind}, which is not read; {NOTHING}. Write it as JSON lines (.jsonl), as a "
            "JSON array (.json), as .csv or as .parquet."
        )
    try:
        content = name.read_bytes() if packed is None else _unpacked(name, packed)
    except OSError as error:
        raise DataError(f"task {task}: cannot read {path}: {error.strerror or error}; {NOTHING}.") from error
    if kind == ".parquet":
        rows = _parquet(content, where)
    elif kind in (".csv", ".tsv"):
        rows = list(_csv(content, "\t" if kind == ".tsv" else ",", where))
    elif kind == ".json" and content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = of_array(content, where)
    else:
        rows = of_lines(content, where)
    if not rows:
        raise DataError(f"{where} is empty; {NOTHING}.")
    return rows


def _unpacked(name: Path, packed: str) -> bytes:
    # Imported here because the import takes time. pyarrow comes with datasets, and reads all these formats.
    import pyarrow

    with pyarrow.input_stream(str(name), compression=packed) as stream:
        return stream.read()


def _parquet(content: bytes, where: str) -> list[Line]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
    except pyarrow.ArrowException as error:
        raise DataError(f"{where} is no whole Parquet file ({error}); {NOTHING}.") from error
    return list(enumerate(table.to_pylist(), start=1))


def _csv(content: bytes, separator: str, where: str) -> Iterator[Line]:
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        # strict: a quote that is not closed would swallow the rows after it.
        reader = csv.DictReader(text, delimiter=separator, strict=True)
        names = reader.fieldnames or ()
        if twice := [name for name in names if names.count(name) > 1 and name]:
            raise DataError(f"{where} has the column '{twice[0]}' twice; {NOTHING}. Rename one of them.")
        for number, row in enumerate(reader, start=1):
            fields: dict[Any, Any] = {name: cell for name, cell in row.items() if cell not in ("", None)}
            if None in fields:
                raise DataError(f"{where} row {number} has more cells than the first line; {NOTHING}.")
            yield number, fields
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}); {NOTHING}.") from error
    except csv.Error as error:
        raise DataError(
            f"{where} is not CSV ({error}); {NOTHING}. Close every quote, or write "
            "JSON lines, which have no such limit."
        ) from error
