"""Reads the header of a GGUF file, the format of llama.cpp: its settings and the table of its tensors.

No weights are read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reflux.errors import ModelError

# tensor types that hold plain numbers, with their names in torch, the narrowest first
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about its model. settings: the scalar settings of the file, those of the model
    without the name of the architecture before them, such as "context_length". counts: the number of
    weights of each tensor. types: the types of its tensors, the most frequent first.
    """

    architecture: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    types: tuple[str, ...]

    @property
    def quantised(self) -> tuple[str, ...]:
        """The quantised types of its tensors, such as Q4_1."""
        return tuple(kind for kind in self.types if kind not in _FLOATS)

    @property
    def dtype(self) -> str:
        """The name in torch of the narrowest type of the weights; quantised weights become float32."""
        return "float32" if self.quantised else next(_FLOATS[kind] for kind in _FLOATS if kind in self.types)


def is_gguf(name: str) -> bool:
    """True if a model's name in a recipe is that of a GGUF file."""
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def source(where: str) -> dict[str, str]:
    """The arguments of `from_pretrained` for a folder, a hub id or a GGUF file."""
    if not is_gguf(where):
        return {"pretrained_model_name_or_path": where}
    return {"pretrained_model_name_or_path": str(Path(where).parent), "gguf_file": Path(where).name}


def read_gguf(where: str, path: str) -> GgufHeader:
    """The header of the file `where`. path: the path of the key in the recipe, for errors. ModelError where
    the file is not a whole GGUF file, or the package gguf is not installed.
    """
    stat = Path(where).stat()
    try:
        return _read(where, stat.st_size, stat.st_mtime_ns)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error.__cause__


# Reading takes seconds, because the vocabulary is read token by token.
@lru_cache(maxsize=16)
def _read(where: str, size: int, changed_ns: int) -> GgufHeader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"to read {where} the package gguf is needed. Install it: pip install gguf"
        ) from error
    with Path(where).open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{where} is not a GGUF file. Download it again.")
    try:
        reader = GGUFReader(where)
        given = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        tensors = {
            tensor.name: (int(tensor.n_elements), tensor.tensor_type.name) for tensor in reader.tensors
        }
        architecture = str(given["general.architecture"])
    except Exception as error:
        # In a damaged file any number may be wrong, so the reader may fail with any exception.
        raise ModelError(f"{where} is not a whole GGUF file ({size} bytes). Download it again.") from error
    kinds = [kind for _, kind in tensors.values()]
    return GgufHeader(
        architecture,
        {name.removeprefix(f"{architecture}."): value for name, value in given.items()},
        {name: count for name, (count, _) in tensors.items()},
        tuple(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))),
    )
