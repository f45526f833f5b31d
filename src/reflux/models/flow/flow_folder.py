"""Finds a flow model's folder in diffusers' format, on this machine or on the hub, and reads its config
files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from reflux.errors import ModelError
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_model import TABLE
from reflux.models.locations import locate
from reflux.models.text import first_line
from reflux.models.weight_files import read_header, read_json, weight_files

# files of a model without the weights of its transformer
PLAN = ("model_index.json", "scheduler/*.json", "transformer/*.json", f"{TABLE}/*")
MODEL = (*PLAN, "transformer/*.safetensors")
ENCODERS = tuple(
    f"text_encoder{number}/*.{kind}" for number in ("", "_2", "_3") for kind in ("json", "safetensors")
)
BESIDE = (
    "model_index.json",
    "transformer/config.json",
    "tokenizer*/*",
    *ENCODERS,
    "vae/*.json",
    "vae/*.safetensors",
)
# second copies of the weights in another precision
COPIES = "*fp16*"
DTYPES = ("float32", "bfloat16", "float16")
# scheduler settings under which the times depend on more than steps and shift
NOT_A_GRID = ("use_dynamic_shifting", "invert_sigmas", "shift_terminal")


def fetch(name: str, path: str, wanted: tuple[str, ...]) -> Path:
    """The absolute folder of a model. For a hub id it is the cached folder, after the missing files among
    `wanted` have been downloaded.

    path: the path of the key in the recipe, for errors. ModelError for a name that exists neither on this
    machine nor on the hub, or that the hub does not give (gated, private, no network).
    """
    where = Path(locate(name, path))
    if where.is_dir():
        return where.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=[COPIES]))
    except Exception as error:
        # The exceptions of the network have no common base class, and the library that raises them changes.
        raise ModelError(
            f"{path}: the flow model {name} cannot be loaded: there is no such folder here, and it cannot be "
            f"fetched from the hub ({first_line(error).rstrip('.')}). Check the name and the network. If the "
            "model is gated, accept its terms on its page and "
            f"log in (hf auth login, in older versions huggingface-cli login)."
        ) from error


def source_of(name: str, path: str, folder: Path, index: dict[str, Any]) -> str:
    """Where the text encoders and the decoder are: the source that a saved student names (`index`, the
    content of its model_index.json), else the folder itself (absolute) or the hub id.
    """
    return index.get("_encoders") or (str(folder) if Path(locate(name, path)).is_dir() else name)


def read_index(folder: Path, name: str, path: str) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        raise ModelError(
            f"{path}: {name} is not a flow model: its folder has no model_index.json. Give a folder in "
            "diffusers' format."
        )
    return read_json(file, path)


def read_scheduler(folder: Path, name: str, path: str) -> dict[str, Any]:
    """The config of the scheduler of model `name`. path: the path of the key in the recipe, for errors.
    ModelError for another kind of scheduler, and for settings under which the times do not go from 1 to 0 or
    depend on more than steps and shift.
    """
    try:
        scheduler = dict(library().FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the scheduler of {name} cannot be loaded: {first_line(error)}") from error
    kind = scheduler.get("_class_name")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(
            f"{path}: {name} was made for the scheduler {kind}; only flow matching with Euler steps is "
            "supported."
        )
    odd = [f"{field} = {json.dumps(scheduler[field])}" for field in NOT_A_GRID if scheduler.get(field)]
    if odd:
        raise ModelError(
            f"{path}: the scheduler of {name} sets {' and '.join(odd)}, which is not supported. Use a "
            "model whose times go from 1 "
            f"to 0 and depend only on the number of steps and a fixed shift."
        )
    return scheduler


def stored_dtype(weights: Path, path: str) -> torch.dtype | None:
    """The dtype of the weights in a folder, None where it has no weights. Exports use this dtype. path: the
    path of the key in the recipe. ModelError for a file that is not whole.
    """
    from safetensors import safe_open

    for file in weight_files(weights, path):
        if file.exists() and (names := list(read_header(file, path))):
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(names[0]).dtype
    return None


def known_dtype(dtype: str, path: str) -> str:
    """Return `dtype`. ModelError unless it is "auto" or one of DTYPES. path: the path of its key in the
    recipe.
    """
    if dtype not in ("auto", *DTYPES):
        raise ModelError(
            f"{path}: a flow model cannot be loaded in dtype = '{dtype}'. Choose auto, {', '.join(DTYPES)}."
        )
    return dtype


def chosen_dtype(dtype: str, device: str, stored: torch.dtype | None) -> torch.dtype:
    """The torch dtype for the recipe's `dtype`. "auto" is the dtype `stored` on a GPU (float16 where it is
    not known), and float32 on a CPU, which is slow in 16 bits.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    return stored or torch.float16 if device.startswith("cuda") else torch.float32
