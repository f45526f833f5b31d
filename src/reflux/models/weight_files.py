"""Finds the safetensors files of a model's weights and checks their headers. No weights are read.

In all functions `path` is the path of the key in the recipe, for errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reflux.errors import ModelError

# names of the weights of a folder by transformers, diffusers and a prompt table: one file, or an index
_STEMS = ("model", "diffusion_pytorch_model", "prompts")
# weights that are not loaded: formats that can run code or need another library, and other names
_OTHER = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
# floating types of safetensors with their names in torch, the narrowest first
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_POINTER = b"version https://git-lfs"


def weight_files(folder: Path, path: str) -> list[Path]:
    """The files that hold the weights, as transformers and diffusers choose them: the one file, else the
    files that the index names, which may not exist yet. Copies in other precisions or formats are left out.
    Empty where there is neither.

    ModelError for an index that cannot be read.
    """
    for stem in _STEMS:
        if (whole := folder / f"{stem}.safetensors").exists():
            return [whole]
        if (index := folder / f"{stem}.safetensors.index.json").exists():
            named = read_json(index, path).get("weight_map")
            if not isinstance(named, dict) or not named:
                raise ModelError(f"{path}: {index}: the index has no weight_map. Download the file again.")
            return [folder / name for name in sorted(set(named.values()))]
    return []


def check_files(folder: Path, path: str) -> None:
    """ModelError, with the file and the remedy, for a folder without safetensors weights, a file that the
    index names and that is missing, and a file that is not whole.
    """
    files = weight_files(folder, path)
    if not files:
        others = sorted(file.name for kind in _OTHER for file in folder.glob(kind))
        remedy = (
            "Download the weights again."
            if not others
            else f"Give the file {others[0]} itself."
            if others[0].endswith(".gguf")
            else f"{others[0]} is of another format or name. Convert it with the library that wrote it: "
            "save_pretrained of transformers writes safetensors."
        )
        raise ModelError(
            f"{path}: {folder} has no weights in model.safetensors or in files of an index. {remedy}"
        )
    if lost := [file.name for file in files if not file.exists()]:
        raise ModelError(
            f"{path}: {folder} lacks {len(lost)} of the {len(files)} weight files that its index names: "
            f"{listed(lost)}. Download them again."
        )
    for file in files:
        read_header(file, path)


def read_header(file: Path, path: str) -> dict[str, Any]:
    """The tensor table of a safetensors file, which starts with 8 bytes for the length of the table, then
    the table as JSON. ModelError for a file that is empty, cut short or of another format.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(max(8, len(_POINTER)))
        length = int.from_bytes(start[:8], "little")
        if start.startswith(_POINTER):
            raise ModelError(
                f"{path}: {file} is a pointer of git-lfs and holds no weights. Fetch the file with git lfs "
                "pull."
            )
        handle.seek(8)
        try:
            table = json.loads(handle.read(length)) if 8 + length <= size else None
        except ValueError:
            table = None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: {file} is not a whole safetensors file ({size} bytes). Download it again.")
    table.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    if end != size:
        raise ModelError(f"{path}: {file} has {size} bytes and should have {end}. Download it again.")
    return table


def narrowest(folder: Path, path: str) -> str | None:
    """The name in torch of the narrowest floating type of the weights in a folder; None where they have
    none of 16 bits or more.
    """
    kinds = {
        entry["dtype"]
        for file in weight_files(folder, path)
        if file.exists()
        for entry in read_header(file, path).values()
    }
    return next((name for kind, name in _FLOATS.items() if kind in kinds), None)


def read_json(file: Path, path: str) -> dict[str, Any]:
    """The object in a JSON file. ModelError for a file that cannot be read, or that holds anything else."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {file} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path}: {file} holds no JSON object. Download it again.")
    return table


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    kept = sorted(names)
    rest = f" and {len(kept) - most} more" if len(kept) > most else ""
    return ", ".join(kept[:most]) + rest
