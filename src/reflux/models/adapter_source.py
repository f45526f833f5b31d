"""Reads which base model a peft adapter belongs to. No weights are loaded, and the hub is not contacted."""

from __future__ import annotations

from pathlib import Path

from reflux.errors import ModelError
from reflux.models.weight_files import read_header, read_json, weight_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# the only kind of adapter whose merge is tested here
_TYPE = "LORA"


def is_adapter(folder: Path) -> bool:
    """True for a folder with the config of a peft adapter and without a full model. Some trainers put the
    base model's config.json beside the adapter.
    """
    return (folder / CONFIG).is_file() and not weight_files(folder, str(folder))


def base_of(folder: Path, path: str, base: str | None = None) -> str:
    """The name of the base model of the adapter in a folder: `base` where the recipe gives it, else the name
    in the adapter's config.

    path: the path of the adapter's key in the recipe, for errors. ModelError where neither names a base model
    that can be loaded, and for an adapter that is not LoRA or is only partly here.
    """
    config = read_json(folder / CONFIG, path)
    if config.get("peft_type") != _TYPE:
        raise ModelError(
            f"{path}: the adapter in {folder} has the type {config.get('peft_type')}, and only {_TYPE} is "
            "supported. Merge it into its base model with peft, and give the merged model."
        )
    if not (folder / WEIGHTS).exists():
        raise ModelError(
            f"{path}: the adapter in {folder} has no {WEIGHTS}. Adapters are loaded from safetensors only."
        )
    read_header(folder / WEIGHTS, path)
    name = base or config.get("base_model_name_or_path") or ""
    place = Path(name).expanduser()
    if not name or (looks_like_folder(name) and not place.exists()):
        raise ModelError(
            f"{path}: {folder} is an adapter, and its base model "
            + (f"{name} does not exist here. " if name else f"is not named in its {CONFIG}. ")
            + f"Set {path.removesuffix('.model')}.base_model to the folder or hub id of the base model."
        )
    if is_adapter(place):
        raise ModelError(
            f"{path}: the base model {name} of the adapter in {folder} is itself an adapter. Merge that one "
            "with peft first."
        )
    return name


def looks_like_folder(name: str) -> bool:
    """True if a model's name has the form of a folder and not of a hub id, which has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
