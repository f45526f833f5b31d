"""The folders of models that parts name: they are there, and hold what these parts load. Nothing is loaded,
and the hub is not asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reflux.errors import ModelError
from reflux.models.text import locate

# how weights are loaded
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_MODEL_INDEX, _CONFIG = "model_index.json", "config.json"


def look_for_text(model: str, where: str) -> None:
    """ModelError where there is no such folder, or a model of images in it."""
    folder = Path(locate(model, where))
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        raise ModelError(
            f"{where}: {model} is no model of texts: its folder has a {_MODEL_INDEX} and no {_CONFIG}. Give "
            "a folder in Hugging Face "
            f'format, or, to draw images, kind = "flow".'
        )


def look_for_flow(model: str, where: str, otherwise: str) -> None:
    """ModelError where there is no such folder, or no flow in it. otherwise: the kind of part that loads a
    model of texts.
    """
    folder = Path(locate(model, where))
    if folder.is_dir() and not (folder / _MODEL_INDEX).is_file():
        raise ModelError(
            f"{where}: {model} is no flow model: its folder has no {_MODEL_INDEX}. Give a folder in "
            "diffusers' format, a run directory of "
            f'a flow, or, for a model of texts, kind = "{otherwise}".'
        )
