"""A model as its files describe it: config.json and the safetensors headers, no weight read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflux.models import local_folder


@dataclass(frozen=True)
class Size:
    """A model as its files describe it. parameters is None where they cannot be read (a hub model that is not here yet)."""

    name: str
    architecture: str
    parameters: int | None
    stored_bytes: int | None
    context_tokens: int | None


def size_of(model: str, path: str) -> Size:
    """From config.json and the safetensors headers. A hub model that is not in the cache has no sizes yet."""
    folder = local_folder(model, path)
    if folder is None:
        return Size(model, "on the hub, not read yet", None, None, None)
    config = json.loads((folder / "config.json").read_text())
    counted = _headers(folder)
    architecture = (config.get("architectures") or [config.get("model_type", "?")])[0]
    window = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return Size(model, architecture, counted[0] if counted else None, counted[1] if counted else None, window)


def _headers(folder: Path) -> tuple[int, int] | None:
    """(parameters, bytes) over all safetensors files of a folder."""
    parameters = size = 0
    for file in sorted(folder.glob("*.safetensors")):
        for entry in read_header(file).values():
            parameters += math.prod(entry["shape"])
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return (parameters, size) if parameters else None


def read_header(file: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file: 8 bytes of length, then JSON."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        table = json.loads(handle.read(length))
    table.pop("__metadata__", None)
    return table
