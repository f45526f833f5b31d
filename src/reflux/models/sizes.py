"""The size of a model, from its config.json and its safetensors headers, or from the header of its GGUF file.
No weights are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from reflux.models.adapter_source import base_of, is_adapter
from reflux.models.context_window import context_tokens
from reflux.models.gguf_header import is_gguf, read_gguf
from reflux.models.gguf_shape import shape_in
from reflux.models.locations import local_folder, locate
from reflux.models.text_shape import TextShape, shape_of
from reflux.models.weight_files import check_files, read_header, read_json, weight_files

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
    # bytes of these parameters as stored, and of a quantised GGUF file as dequantised
    stored_bytes: int | None = None
    # largest number of tokens that the model can read at once
    context_tokens: int | None = None
    # multiply-accumulates of one position, without guidance
    macs: int | None = None
    # number of patches of a flow model's image
    patches: int | None = None
    # what a text model needs per token; None for flow models and where the config has other keys
    shape: TextShape | None = None
    # bytes of the text encoders and the decoder of a flow model, of which a run holds one copy
    beside_bytes: int = 0


def size_of(model: str, path: str, pixels: int = 0, base: str | None = None) -> Size:
    """The size from the headers of the files. For a hub model that is not in the cache the
    numbers are None.

    path: the path of the key in the recipe, for errors. pixels: the side of a flow model's images; 0 is the
    size that the model was made for. base: the base model of an adapter, as in `base_of`. ModelError for
    files on this machine that are not whole.
    """
    if is_gguf(model):
        return _gguf_size(model, path)
    folder = local_folder(model, path)
    if folder is None:
        return Size(model, "on the hub, not read yet")
    if is_adapter(folder):
        # It is merged into its base model, so a run holds as many weights as that model has.
        return replace(size_of(base_of(folder, path, base), path), name=model)
    flow = (folder / "model_index.json").is_file()
    if Path(locate(model, path)).is_dir():
        check_files(folder / "transformer" if flow else folder, path)
    if flow:
        return _flow_size(model, folder, pixels, path)
    config = read_json(folder / "config.json", path)
    counted = _headers(folder, path)
    architecture = (config.get("architectures") or [config.get("model_type", "?")])[0]
    window = context_tokens(config) or context_tokens(config.get("text_config", {}))
    shape = shape_of(config.get("text_config", config), _names(folder, path))
    found = Size(model, architecture, context_tokens=window, shape=shape)
    return (
        found
        if counted is None
        else replace(found, parameters=counted[0], stored_bytes=counted[1], macs=counted[0])
    )


def _gguf_size(model: str, path: str) -> Size:
    header = read_gguf(locate(model, path), path)
    parameters = sum(header.counts.values())
    return Size(
        model,
        f"{header.architecture} (GGUF)",
        parameters=parameters,
        stored_bytes=parameters * (4 if header.dtype == "float32" else 2),
        context_tokens=header.settings.get("context_length"),
        macs=parameters,
        shape=shape_in(header),
    )


def _flow_size(model: str, folder: Path, pixels: int, path: str) -> Size:
    """The size of a model in a diffusers folder. One position is one velocity, for which the transformer
    reads every patch and every prompt token.
    """
    transformer = _headers(folder / "transformer", path)
    if not (folder / "transformer" / "config.json").is_file() or transformer is None:
        return Size(model, "only partly here, not read yet")
    config = read_json(folder / "transformer" / "config.json", path)
    source, table = _source(folder, path), folder / "prompts"
    prompt_tokens = (
        read_json(table / "prompts.json", path)["length"] if table.is_dir() else _SD3_PROMPT_TOKENS
    )
    learned = _headers(table, path) or (0, 0)
    factor = 1 if table.is_dir() else _decoder_factor(source, path)
    side = config["sample_size"] if not pixels else None if factor is None else pixels // factor
    patches = None if side is None else (side // config["patch_size"]) ** 2
    return Size(
        model,
        config["_class_name"],
        parameters=transformer[0] + learned[0],
        stored_bytes=transformer[1] + learned[1],
        macs=None if patches is None else transformer[0] * (patches + prompt_tokens),
        patches=patches,
        beside_bytes=sum(found[1] for name in _BESIDE if source and (found := _headers(source / name, path))),
    )


def _source(folder: Path, path: str) -> Path | None:
    """The folder of a model's text encoders and decoder: the model's folder, or the folder of the model
    that an earlier run started from. None where that one is not in the local cache.
    """
    named = read_json(folder / "model_index.json", path).get("_encoders")
    return local_folder(named, "model_index.json") if named else folder


def _decoder_factor(source: Path | None, path: str) -> int | None:
    """Pixels per side of one latent value; None where the decoder's config is not on this machine."""
    file = source and source / "vae" / "config.json"
    return 2 ** (len(read_json(file, path)["block_out_channels"]) - 1) if file and file.is_file() else None


def _names(folder: Path, path: str) -> list[str]:
    """The names of all tensors in the weight files that are here."""
    files = (file for file in weight_files(folder, path) if file.exists())
    return [name for file in files for name in read_header(file, path)]


def _headers(folder: Path, path: str) -> tuple[int, int] | None:
    """(parameters, bytes) over the files that hold the weights of a folder; a copy in another precision or
    format is not counted. None where a file is not here, or there are no parameters.
    """
    files = weight_files(folder, path)
    if not all(file.exists() for file in files):
        return None
    parameters = size = 0
    for file in files:
        for name, entry in read_header(file, path).items():
            parameters += math.prod(entry["shape"]) if name != _PLACES else 0
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return (parameters, size) if parameters else None
