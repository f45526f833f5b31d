"""Finds the files of an adapter without torch, so that a missing adapter is refused before anything is
loaded.
"""

from __future__ import annotations

from pathlib import Path

from reflux.errors import ModelError
from reflux.models.locations import INDEXES, SHIPPED
from reflux.models.text import first_line

CONFIG, PEFT, DIFFUSERS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)


def on_hub(name: str) -> bool:
    """True if `name` is looked up on the hub: it is no folder here and has the form of a hub id."""
    return (
        not Path(name).expanduser().exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    )


def adapter_folder(name: str, path: str) -> Path | None:
    """The folder with an adapter's files, fetched from the hub where `name` is no folder on this machine.
    None where the folder has no such files. path: the path of the key in the recipe, for errors.
    """
    if name.startswith(SHIPPED):
        return None
    folder = _fetched(name, path) if on_hub(name) else Path(name).expanduser()
    return folder if _has_adapter(folder) else None


def adapter_file(name: str, path: str) -> Path:
    """The safetensors file of the adapter in a folder, in an earlier run directory or of a hub id.

    ModelError where there is no adapter, or only a part of one. path: the path of the key in the recipe, for
    errors.
    """
    folder, student = adapter_folder(name, path), Path(name).expanduser() / "student"
    folder = student if folder is None and _has_adapter(student) else folder
    if folder is None:
        whole = any((place / index).is_file() for place in (student, student.parent) for index in INDEXES)
        wanted = (
            f"give a folder with {CONFIG} and {PEFT}, or with {DIFFUSERS}, or the directory of a run that "
            "trained an adapter"
        )
        remedy = "it holds a full model, which is given as `model`, without an adapter" if whole else wanted
        raise ModelError(f"{path}: there is no adapter in {name}: {remedy}.")
    file = next((folder / file for file in (PEFT, DIFFUSERS) if (folder / file).is_file()), None)
    if file is None or (file.name == PEFT and not (folder / CONFIG).is_file()):
        raise ModelError(
            f"{path}: {name} has only a part of an adapter: {CONFIG} and {PEFT} are both needed, and only "
            "safetensors files are read."
        )
    return file


def _has_adapter(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (CONFIG, PEFT, DIFFUSERS))


def _fetched(name: str, path: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, PEFT, DIFFUSERS]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: {name} is no folder here, and cannot be fetched from the hub: {first_line(error)}"
        ) from error
