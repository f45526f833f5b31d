"""Answers of a served teacher on disk, so that the same text is not scored twice.

An answer is found by the model, the label of its weights, what was asked, and the token ids, which include
the context that the teacher saw. Each file carries a checksum. A file with a wrong checksum is not used, and
is written again.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from reflux.clients.probe import TOLERANCE_NATS
from reflux.errors import ModelError

# Part of every key: other arrays in the files get another number.
FORMAT = 1
DIGEST = 32

Arrays = Mapping[str, np.ndarray]


class AnswerCache:
    """asked: all settings that decide what an answer contains, besides the tokens."""

    def __init__(self, folder: Path, asked: Sequence[str]):
        self.folder, self._asked = folder, repr((FORMAT, *asked)).encode()
        folder.mkdir(parents=True, exist_ok=True)

    def check_weights(self, name: str, logp_T: np.ndarray) -> None:
        """Compare the log-probs of fixed tokens with those of the first run that used this folder. ModelError
        where they differ: a label does not name weights, so they may have been replaced under it.
        """
        key = self.key([], 0, None)
        before = self.get(key)
        if before is None:
            self.put(key, {"logp_T": logp_T})
        elif not np.abs(before["logp_T"] - logp_T).max() <= TOLERANCE_NATS:
            raise ModelError(
                f"teachers.{name}: the answers in {self.folder} come from other weights of the same name. "
                "Use another folder for `cache`, or remove this one."
            )

    def key(self, ids: Sequence[int], first: int, asked_TK: np.ndarray | None) -> str:
        """The name of the answer about ids[first:]. asked_TK: the ids at which log-probs are given."""
        digest = hashlib.blake2b(self._asked, digest_size=20)
        digest.update(np.asarray([first, len(ids), *ids], dtype=np.int64).tobytes())
        if asked_TK is not None:
            digest.update(repr(asked_TK.shape).encode() + np.asarray(asked_TK, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> Arrays | None:
        """The arrays of an answer; None if it is not there or damaged."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        if _digest(key, data[DIGEST:]) != data[:DIGEST]:
            return None
        with suppress(ValueError, OSError, zipfile.BadZipFile), np.load(io.BytesIO(data[DIGEST:])) as arrays:
            return {name: arrays[name] for name in arrays.files}
        return None

    def put(self, key: str, arrays: Arrays) -> None:
        """Write an answer. It is not synced: a file that is lost or cut by a crash fails its checksum."""
        held = io.BytesIO()
        np.savez(held, allow_pickle=False, **arrays)
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        # Two runs may write the same answer at once.
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        scratch.write_bytes(_digest(key, held.getvalue()) + held.getvalue())
        scratch.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.answer"


def _digest(key: str, data: bytes) -> bytes:
    """The key is part of it, so that a file under another name is not used."""
    return hashlib.blake2b(key.encode() + data, digest_size=DIGEST).digest()
