"""Checks that the model folders of a recipe exist and hold a model of the right kind.

No model is loaded, and the hub is not contacted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reflux.errors import ModelError
from reflux.models.text import locate

# the dtype that weights are loaded in
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_MODEL_INDEX, _CONFIG = "model_index.json", "config.json"


def look_for_text(model: str, where: str) -> None:
    """Raise ModelError where the folder does not exist or holds an image model."""
    folder = Path(locate(model, where))
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        raise ModelError(
            f"{where}: {model} is not a text model: its folder has a {_MODEL_INDEX} and no {_CONFIG}. Give "
            "a folder in Hugging Face "
            f'format, or, to generate images, kind = "flow".'
        )


def look_for_flow(model: str, where: str, otherwise: str) -> None:
    """Raise ModelError where the folder does not exist or holds no flow model. where: the path of the key in
    the recipe, for errors. otherwise: the kind of part that loads a text model, for the error.
    """
    folder = Path(locate(model, where))
    if folder.is_dir() and not (folder / _MODEL_INDEX).is_file():
        raise ModelError(
            f"{where}: {model} is not a flow model: its folder has no {_MODEL_INDEX}. Give a folder in "
            "diffusers' format, a run directory of "
            f'a flow, or, for a text model, kind = "{otherwise}".'
        )
