"""Loads a flow model by its name. Only safetensors files are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from reflux.errors import ModelError
from reflux.models.cpu.linear import speed_up
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_folder import (
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
from reflux.models.flow.frozen import NOT_LOADED, bare_transformer, load_decoder, load_encoders, load_part
from reflux.models.flow.net import FlowNet, PromptTable
from reflux.models.placement import pick_device
from reflux.models.shared_cache import SharedCache
from reflux.models.text import first_line
from reflux.models.weight_files import check_files


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
        stored_dtype(folder / "transformer", path),
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
        net = FlowNet(bare_transformer(folder), _table(folder, path))
    except ModelError:
        raise
    except (*NOT_LOADED, KeyError) as error:
        raise ModelError(f"{path}: the flow model {name} cannot be loaded: {first_line(error)}") from error
    encode = _no_encoders if net.prompts is None else net.prompts
    return FlowModel(net, scheduler, encode, None, source_of(name, path, folder, index), torch.float32)


def _no_encoders(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("a model without its weights cannot encode prompts")


def _net(folder: Path, name: str, path: str, dtype: torch.dtype, device: str) -> FlowNet:
    try:
        transformer = load_part(library().SD3Transformer2DModel, folder, "transformer", name, path, dtype)
        net = FlowNet(transformer, _table(folder, path))
    except ModelError:
        raise
    except (*NOT_LOADED, KeyError) as error:
        raise ModelError(f"{path}: the flow model {name} cannot be loaded: {first_line(error)}") from error
    net.to(torch.device(device), net.dtype)
    speed_up(net)
    return net


def _table(folder: Path, path: str) -> PromptTable | None:
    if not (folder / TABLE).is_dir():
        return None
    check_files(folder / TABLE, path)
    return PromptTable.load(folder / TABLE)


def _frozen(source: str, path: str, device: str, shared_cache: SharedCache) -> tuple[Encoder, Decoder]:
    """The text encoders and the decoder of a Stable Diffusion 3 model."""
    encoders = shared_cache(("text encoders", source, device), lambda: load_encoders(source, path, device))
    decoder = shared_cache(("decoder", source, device), lambda: load_decoder(source, path, device))
    return encoders, decoder
