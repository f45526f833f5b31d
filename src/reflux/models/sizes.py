"""The size of a model, from its config.json and its safetensors headers. No weights are read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reflux.models.text import local_folder

# folders of a Stable Diffusion 3 model that are never trained
_BESIDE = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
# the table of sines of a diffusers transformer: it is stored and loaded, but is not a parameter
_PLACES = "pos_embed.pos_embed"
# prompt tokens of the two CLIP encoders of Stable Diffusion 3, and of T5
_SD3_PROMPT_TOKENS = 77 + 256


@dataclass(frozen=True)
class Size:
    """The numbers of parameters, bytes, context tokens and operations of a model, read from its files.
    `parameters` is None if the files cannot be read (a hub model that is not in the local cache).
    """

    name: str
    architecture: str
    # number of trainable parameters
    parameters: int | None = None
    # bytes of these parameters on disk
    stored_bytes: int | None = None
    # largest number of tokens that the model can read at once
    context_tokens: int | None = None
    # multiply-accumulates of one position, without guidance
    macs: int | None = None
    # number of patches of a flow model's image
    patches: int | None = None
    # bytes of the text encoders and the decoder of a flow model, of which a run holds one copy
    beside_bytes: int = 0


def size_of(model: str, path: str, pixels: int = 0) -> Size:
    """The size from config.json and the safetensors headers. For a hub model that is not in the cache the
    numbers are None.

    path: the path of the key in the recipe, for errors. pixels: the side of a flow model's images; 0 is the
    size that the model was made for.
    """
    folder = local_folder(model, path)
    if folder is None:
        return Size(model, "on the hub, not read yet")
    if (folder / "model_index.json").is_file():
        return _flow_size(model, folder, pixels)
    config = json.loads((folder / "config.json").read_text())
    counted = _headers(folder)
    architecture = (config.get("architectures") or [config.get("model_type", "?")])[0]
    window = config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )
    found = Size(model, architecture, context_tokens=window)
    return (
        found
        if counted is None
        else replace(found, parameters=counted[0], stored_bytes=counted[1], macs=counted[0])
    )


def _flow_size(model: str, folder: Path, pixels: int) -> Size:
    """The size of a model in a diffusers folder. One position is one velocity, for which the transformer
    reads every patch and every prompt token.
    """
    transformer = _headers(folder / "transformer")
    if not (folder / "transformer" / "config.json").is_file() or transformer is None:
        return Size(model, "only partly here, not read yet")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    source, table = _source(folder), folder / "prompts"
    prompt_tokens = (
        json.loads((table / "prompts.json").read_text())["length"] if table.is_dir() else _SD3_PROMPT_TOKENS
    )
    learned = _headers(table) or (0, 0)
    factor = 1 if table.is_dir() else _decoder_factor(source)
    side = config["sample_size"] if not pixels else None if factor is None else pixels // factor
    patches = None if side is None else (side // config["patch_size"]) ** 2
    return Size(
        model,
        config["_class_name"],
        parameters=transformer[0] + learned[0],
        stored_bytes=transformer[1] + learned[1],
        macs=None if patches is None else transformer[0] * (patches + prompt_tokens),
        patches=patches,
        beside_bytes=sum(found[1] for name in _BESIDE if source and (found := _headers(source / name))),
    )


def _source(folder: Path) -> Path | None:
    """The folder of a model's text encoders and decoder: the model's folder, or the folder of the model
    that an earlier run started from. None where that one is not in the local cache.
    """
    named = json.loads((folder / "model_index.json").read_text()).get("_encoders")
    return local_folder(named, "model_index.json") if named else folder


def _decoder_factor(source: Path | None) -> int | None:
    """Pixels per side of one latent value; None where the decoder's config is not on this machine."""
    file = source and source / "vae" / "config.json"
    return (
        2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)
        if file and file.is_file()
        else None
    )


def _headers(folder: Path) -> tuple[int, int] | None:
    """(parameters, bytes) over the safetensors files of a folder, without a second copy in another
    precision (*.fp16*). None where there are no parameters.
    """
    parameters = size = 0
    for file in sorted(folder.glob("*.safetensors")):
        if ".fp16" in file.name:
            continue
        for name, entry in read_header(file).items():
            parameters += math.prod(entry["shape"]) if name != _PLACES else 0
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return (parameters, size) if parameters else None


def read_header(file: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file, which starts with 8 bytes for the length of the table, then
    the table as JSON.
    """
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        table = json.loads(handle.read(length))
    table.pop("__metadata__", None)
    return table
