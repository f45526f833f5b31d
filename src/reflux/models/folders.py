"""Checks that the model folders and GGUF files of a recipe exist and hold a model of the right kind.

No model is loaded, and the hub is not contacted.
"""

from __future__ import annotations

from pathlib import Path

from reflux.errors import ModelError
from reflux.models.adapter_source import base_of, is_adapter
from reflux.models.gguf_header import is_gguf
from reflux.models.gguf_kind import refuse_other_files
from reflux.models.locations import local_folder, locate
from reflux.models.text_kind import refuse_other_kinds, refuse_quantised
from reflux.models.weight_files import read_json

_MODEL_INDEX, _CONFIG = "model_index.json", "config.json"


def look_for_text(model: str, where: str, base: str | None = None, trained: bool = False) -> None:
    """Raise ModelError where the folder does not exist or holds an image model, or where its config.json
    shows that it holds no causal language model. A hub model that is not in the local cache is not checked.

    where: the path of the key in the recipe, for errors. base: as in `base_of`. trained: True for the
    student, whose weights must not be quantised.
    """
    folder = Path(locate(model, where))
    if is_gguf(model):
        refuse_other_files(str(folder), where)
    if is_adapter(folder):
        look_for_text(base_of(folder, where, base), where, trained=trained)
        return
    if base is not None and folder.exists():
        raise ModelError(
            f"{where}: {model} is no adapter, so it has no other base model. Leave base_model out."
        )
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        raise ModelError(
            f"{where}: {model} is not a text model: its folder has a {_MODEL_INDEX} and no {_CONFIG}. Give "
            "a folder in Hugging Face "
            f'format, or, to generate images, kind = "flow".'
        )
    here = local_folder(model, where)
    if here is not None and (here / _CONFIG).is_file():
        config = read_json(here / _CONFIG, where)
        refuse_other_kinds(config, model, where)
        if trained:
            refuse_quantised(config, model, where)


def look_for_flow(model: str, where: str, otherwise: str) -> None:
    """Raise ModelError where the folder does not exist or holds no flow model. where: the path of the key in
    the recipe, for errors. otherwise: the kind of part that loads a text model, for the error.
    """
    folder = Path(locate(model, where))
    if folder.exists() and not (folder / _MODEL_INDEX).is_file():
        why = f"its folder has no {_MODEL_INDEX}" if folder.is_dir() else "it is a file"
        raise ModelError(
            f"{where}: {model} is not a flow model: {why}. Give a folder in "
            "diffusers' format, a run directory of "
            f'a flow, or, for a text model, kind = "{otherwise}".'
        )
