"""A flow model's folder in diffusers' format, here or from the hub, and what it says beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from reflux.errors import ModelError
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_model import TABLE
from reflux.models.text import first_line, locate

# all that is no weight of a transformer
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
# second copies of weights in another precision, which have other names
COPIES = "*fp16*"
DTYPES = ("float32", "bfloat16", "float16")
# of a scheduler: times that depend on more than steps and shift
NOT_A_GRID = ("use_dynamic_shifting", "invert_sigmas", "shift_terminal")


def fetch(name: str, path: str, wanted: tuple[str, ...]) -> Path:
    """The folder of a model, absolute; of a hub id the cached one, after the hub has given the files that are
    wanted and not here yet.

    ModelError for a name that neither this machine nor the hub knows, or that the hub does not give (gated,
    private, no network).
    """
    where = Path(locate(name, path))
    if where.is_dir():
        return where.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=[COPIES]))
    except Exception as error:
        # the network's own exceptions have no base of their own, and their library changes
        raise ModelError(
            f"{path}: no flow model for {name}: there is no such folder here, and the hub does not give it "
            f"({first_line(error).rstrip('.')}). Check the name and the network; if the model is gated, "
            "accept its terms on its page and "
            f"log in (hf auth login, which older versions call huggingface-cli login)."
        ) from error


def source_of(name: str, path: str, folder: Path, index: dict[str, Any]) -> str:
    """Where text encoders and decoder are: what a saved student names, the folder itself (absolute), or the
    hub id.
    """
    return index.get("_encoders") or (str(folder) if Path(locate(name, path)).is_dir() else name)


def read_index(folder: Path, name: str, path: str) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        raise ModelError(
            f"{path}: {name} is no flow model: its folder has no model_index.json. Give a folder in "
            "diffusers' format."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def read_scheduler(folder: Path, name: str, path: str) -> dict[str, Any]:
    """Its config. ModelError for another kind, and for settings under which a grid is not 1 to 0 by steps and
    shift alone.
    """
    try:
        scheduler = dict(library().FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no scheduler for {name}: {first_line(error)}") from error
    kind = scheduler.get("_class_name")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(
            f"{path}: {name} was made for the scheduler {kind}; only flow matching with Euler steps is known "
            "here."
        )
    odd = [f"{field} = {json.dumps(scheduler[field])}" for field in NOT_A_GRID if scheduler.get(field)]
    if odd:
        raise ModelError(
            f"{path}: the scheduler of {name} sets {' and '.join(odd)}, which is not supported here: use a "
            "model whose times go from 1 "
            f"to 0 and follow from the number of steps and a fixed shift."
        )
    return scheduler


def stored_dtype(weights: Path) -> torch.dtype | None:
    """The type of the weights in a folder, where they are here; exports go back to it."""
    from safetensors import safe_open

    for file in sorted(file for file in weights.glob("*.safetensors") if not file.match(COPIES)):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return tensors.get_tensor(key).dtype
    return None


def known_dtype(dtype: str, path: str) -> str:
    """`dtype`, where it is "auto" or one of DTYPES; else ModelError."""
    if dtype not in ("auto", *DTYPES):
        raise ModelError(
            f"{path}: a flow model is not loaded in dtype = '{dtype}'. Choose auto, {', '.join(DTYPES)}."
        )
    return dtype


def chosen_dtype(dtype: str, device: str, stored: torch.dtype | None) -> torch.dtype:
    """ "auto": as stored on a GPU (float16 where that is not known), float32 on a CPU, which is slow in 16
    bits.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    return stored or torch.float16 if device.startswith("cuda") else torch.float32
