"""Loads a flow model by its name. Only safetensors files are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reflux.errors import ModelError
from reflux.models.cpu.linear import speed_up
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.encoders import LatentDecoder, TextEncoders
from reflux.models.flow.flow_folder import (
    BESIDE,
    MODEL,
    PLAN,
    chosen_dtype,
    fetch,
    known_dtype,
    read_index,
    read_scheduler,
    source_of,
    stored_dtype,
)
from reflux.models.flow.flow_model import TABLE, Decoder, Encoder, FlowModel
from reflux.models.flow.net import FlowNet, PromptTable
from reflux.models.shared_cache import SharedCache
from reflux.models.text import first_line, pick_device


def load_flow(
    name: str,
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    shared_cache: SharedCache | None = None,
) -> FlowModel:
    """Load a diffusers folder, an earlier run directory, a shipped model or a hub id. path: the path of the
    key in the recipe, for errors. device "auto": the first GPU, else the CPU. dtype "auto" is the stored
    dtype on a GPU and float32 on a CPU.

    The text encoders and the decoder have their stored dtype on a GPU and float32 on a CPU, whatever
    `dtype` is. `shared_cache` holds the objects that several models share. ModelError, with the reason,
    where the model cannot be loaded or is not a flow model of a supported kind.
    """
    known_dtype(dtype, path)
    folder, place = fetch(name, path, MODEL), pick_device(device)
    index, scheduler, stored = (
        read_index(folder, name, path),
        read_scheduler(folder, name, path),
        stored_dtype(folder / "transformer"),
    )
    net = _net(folder, name, path, chosen_dtype(dtype, place, stored), place)
    source = source_of(name, path, folder, index)
    encode, decode = (
        (net.prompts, None)
        if net.prompts is not None
        else _frozen(source, path, place, shared_cache or SharedCache())
    )
    return FlowModel(net, scheduler, encode, decode, source, stored or net.dtype)


def load_net(name: str, path: str, *, dtype: str = "float32", device: str = "cpu") -> FlowNet:
    """Load only the weights, without text encoders and decoder. The arguments are those of `load_flow`."""
    kind = chosen_dtype(known_dtype(dtype, path), device, None)
    return _net(fetch(name, path, MODEL), name, path, kind, device)


def outline_flow(name: str, path: str) -> FlowModel:
    """A model without its weights, on torch's meta device. The result gives the grid of times, the shape of
    the states and the prompts of the model, and no large files are read. The arguments are those of
    `load_flow`.
    """
    folder = fetch(name, path, PLAN)
    index, scheduler = read_index(folder, name, path), read_scheduler(folder, name, path)
    try:
        net = FlowNet(_bare(folder), _table(folder))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the flow model {name} cannot be loaded: {first_line(error)}") from error
    encode = _no_encoders if net.prompts is None else net.prompts
    return FlowModel(net, scheduler, encode, None, source_of(name, path, folder, index), torch.float32)


def _no_encoders(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("a model without its weights cannot encode prompts")


def _bare(folder: Path) -> Any:
    """The transformer without its weights."""
    with torch.device("meta"):
        return library().SD3Transformer2DModel.from_config(
            library().SD3Transformer2DModel.load_config(folder, subfolder="transformer")
        )


def _net(folder: Path, name: str, path: str, dtype: torch.dtype, device: str) -> FlowNet:
    try:
        transformer = library().SD3Transformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the flow model {name} cannot be loaded: {first_line(error)}") from error
    net = FlowNet(transformer, _table(folder))
    net.to(torch.device(device), net.dtype)
    speed_up(net)
    return net


def _table(folder: Path) -> PromptTable | None:
    return PromptTable.load(folder / TABLE) if (folder / TABLE).is_dir() else None


def _frozen(source: str, path: str, device: str, shared_cache: SharedCache) -> tuple[Encoder, Decoder]:
    """The text encoders and the decoder of a Stable Diffusion 3 model. A run has one copy of them, so
    callers do not choose their dtype.
    """
    encoders = shared_cache(("text encoders", source, device), lambda: _encoders(source, path, device))
    decoder = shared_cache(("decoder", source, device), lambda: _decoder(source, path, device))
    return encoders, decoder


def _encoders(source: str, path: str, device: str) -> TextEncoders:
    folder = fetch(source, path, BESIDE)
    index = read_index(folder, source, path)
    # text_encoder_3 is T5, which some models do not have.
    largest = "text_encoder_3" if any(index.get("text_encoder_3") or ()) else "text_encoder"
    absent = {} if largest == "text_encoder_3" else {"text_encoder_3": None, "tokenizer_3": None}
    dtype = chosen_dtype("auto", device, stored_dtype(folder / largest))
    try:
        pipeline = library().StableDiffusion3Pipeline.from_pretrained(
            folder, transformer=None, vae=None, **absent, torch_dtype=dtype, use_safetensors=True
        )
        pipeline.to(device)
        if absent:
            # In place of T5 diffusers uses zeros, whose width it reads from the transformer's config.
            pipeline.register_modules(transformer=_bare(folder))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: the text encoders of {source} cannot be loaded: {first_line(error)}"
        ) from error
    return TextEncoders(pipeline, device)


def _decoder(source: str, path: str, device: str) -> LatentDecoder:
    folder = fetch(source, path, BESIDE)
    dtype = chosen_dtype("auto", device, stored_dtype(folder / "vae"))
    try:
        vae = library().AutoencoderKL.from_pretrained(
            folder, subfolder="vae", torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: the decoder (vae) of {source} cannot be loaded: {first_line(error)}"
        ) from error
    return LatentDecoder(vae.to(torch.device(device)))
