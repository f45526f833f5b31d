"""From a name to a flow model. Only safetensors are loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reflux.errors import ModelError
from reflux.flows.encoders import LatentDecoder, TextEncoders
from reflux.flows.library import library
from reflux.flows.model import TABLE, Decoder, Encoder, FlowModel
from reflux.flows.net import FlowNet, PromptTable
from reflux.kernels.cpu_linear import speed_up
from reflux.models import first_line, locate, pick_device
from reflux.once import Once


def load_flow(name: str, path: str, *, dtype: str = "auto", device: str = "auto", once: Once | None = None) -> FlowModel:
    """A diffusers folder, an earlier run directory, a shipped model or a hub id. dtype "auto": as stored on a GPU, float32 on a CPU.

    `once` holds what several models share. ModelError with the reason for what cannot be loaded or is no flow model of a known kind.
    """
    where, place = locate(name, path), pick_device(device)
    index = _index(where, name, path)
    stored = _stored(Path(where))
    scheduler = _scheduler(where, name, path)
    net = _net(where, name, path, _chosen(dtype, place, stored), place)
    source = index.get("_encoders", where)
    encode, decode = (net.prompts, None) if net.prompts is not None else _frozen(source, path, net.dtype, place, once or Once())
    return FlowModel(net, scheduler, encode, decode, source, stored or net.dtype)


def load_net(name: str, path: str, *, dtype: str = "float32", device: str = "cpu") -> FlowNet:
    """The weights alone, without text encoders and decoder."""
    where = locate(name, path)
    return _net(where, name, path, getattr(torch, dtype), device)


def outline_flow(name: str, path: str) -> FlowModel:
    """A model without its weights, on torch's meta device: it tells its grid, its states and its prompts, and nothing heavy is read."""
    where = locate(name, path)
    _index(where, name, path)
    scheduler = _scheduler(where, name, path)
    with torch.device("meta"):
        bare = library().SD3Transformer2DModel.from_config(library().SD3Transformer2DModel.load_config(where, subfolder="transformer"))
    net = FlowNet(bare, _table(where))
    encode = _no_encoders if net.prompts is None else net.prompts
    return FlowModel(net, scheduler, encode, None, where, torch.float32)


def _no_encoders(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("the outline of a model encodes no prompts")


def _net(where: str, name: str, path: str, dtype: torch.dtype, device: str) -> FlowNet:
    try:
        transformer = library().SD3Transformer2DModel.from_pretrained(
            where, subfolder="transformer", torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no flow model for {name}: {first_line(error)}") from error
    net = FlowNet(transformer, _table(where))
    net.to(torch.device(device), net.dtype)
    speed_up(net)
    return net


def _table(where: str) -> PromptTable | None:
    return PromptTable.load(Path(where) / TABLE) if (Path(where) / TABLE).is_dir() else None


def _chosen(dtype: str, device: str, stored: torch.dtype | None) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return stored or torch.float16 if device.startswith("cuda") else torch.float32


def _index(where: str, name: str, path: str) -> dict[str, Any]:
    file = Path(where) / "model_index.json"
    if not file.is_file():
        if Path(where).is_dir():
            raise ModelError(f"{path}: {name} is no flow model: its folder has no model_index.json. Give a folder in diffusers' format.")
        return dict(library().DiffusionPipeline.load_config(where))
    return json.loads(file.read_text(encoding="utf-8"))


def _scheduler(where: str, name: str, path: str) -> dict[str, Any]:
    try:
        scheduler = library().FlowMatchEulerDiscreteScheduler.load_config(where, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no scheduler for {name}: {first_line(error)}") from error
    kind = scheduler["_class_name"]
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"{path}: {name} was made for the scheduler {kind}; only flow matching with Euler steps is known here.")
    return dict(scheduler)


def _stored(where: Path) -> torch.dtype | None:
    """The type of the weights on disk, where they are here; exports go back to it."""
    from safetensors import safe_open

    for file in sorted((where / "transformer").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return tensors.get_tensor(key).dtype
    return None


def _frozen(source: str, path: str, dtype: torch.dtype, device: str, once: Once) -> tuple[Encoder, Decoder]:
    """Text encoders and decoder of a Stable Diffusion 3 model: one copy a run."""
    encoders = once(("text encoders", source, device), lambda: _encoders(source, path, dtype, device))
    decoder = once(("decoder", source, device), lambda: _decoder(source, path, dtype, device))
    return encoders, decoder


def _encoders(source: str, path: str, dtype: torch.dtype, device: str) -> TextEncoders:
    try:
        pipeline = library().StableDiffusion3Pipeline.from_pretrained(
            source, transformer=None, vae=None, torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no text encoders in {source}: {first_line(error)}") from error
    return TextEncoders(pipeline.to(device), device)


def _decoder(source: str, path: str, dtype: torch.dtype, device: str) -> LatentDecoder:
    try:
        vae = library().AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no decoder (vae) in {source}: {first_line(error)}") from error
    return LatentDecoder(vae.to(torch.device(device)))
