"""Answers of chat servers on disk, so that the same request is not paid for twice.

An answer is found by a digest of everything that determines it. Each answer is one file that is complete from
the moment it has its name. If several processes store an answer to the same request, the first one stays, and
all of them use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Part of every key: other fields in the files get another number.
FORMAT = 1


class ChatCache:
    """folder: made on the first write. identity: what determines an answer besides the request itself, such
    as the URL of the server.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder, self._identity = folder, identity

    def key(self, request: Mapping[str, Any]) -> str:
        """The digest of a request, 64 hex digits. request: JSON values."""
        text = json.dumps([FORMAT, self._identity, request], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer. None if there is none, or if its file was damaged."""
        try:
            found = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def put(self, key: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Store an answer, and return the one that is stored now: an earlier one is not replaced, because
        another process may already have used it. A damaged file is replaced.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        scratch = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                # Escapes keep halves of surrogate pairs, which UTF-8 does not have.
                json.dump({"key": key, **answer}, file)
                file.flush()
                os.fsync(file.fileno())
            with suppress(OSError):
                # A link, unlike a rename, fails where the name exists. Some file systems have no links.
                os.link(scratch, path)
            found = self.get(key)
            if found is None:
                scratch.replace(path)
                found = {"key": key, **answer}
        finally:
            scratch.unlink(missing_ok=True)
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"
