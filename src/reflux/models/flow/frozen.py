"""Loads the parts of Stable Diffusion 3 that are never trained: its text encoders and its decoder. A run has
one copy of them, so callers do not choose their dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from reflux.errors import ModelError
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.encoders import LatentDecoder, TextEncoders
from reflux.models.flow.flow_folder import BESIDE, chosen_dtype, fetch, read_index, stored_dtype
from reflux.models.loaded_weights import refuse_other_weights
from reflux.models.text import first_line
from reflux.models.weight_files import check_files

# what diffusers, transformers and safetensors raise for files that cannot be loaded
NOT_LOADED = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


def load_part(kind: Any, folder: Path, part: str, name: str, path: str, dtype: torch.dtype) -> Any:
    """The module in the subfolder `part` of a model's folder. kind: its class in diffusers or transformers.
    name: the model, for errors; path: the path of its key in the recipe.

    ModelError for files that are not whole or that hold other weights than the module's. Other errors of the
    libraries are left to the caller.
    """
    if (folder / part).is_dir():
        check_files(folder / part, path)
    module, info = kind.from_pretrained(
        folder,
        subfolder=part,
        torch_dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        # A tensor of another shape is refused below, with its name.
        ignore_mismatched_sizes=True,
    )
    refuse_other_weights(module, info, f"{name} ({part})", path)
    return module


def load_encoders(source: str, path: str, device: str) -> TextEncoders:
    """The text encoders of the model `source`, a folder or a hub id. path: the path of the key in the recipe,
    for errors.
    """
    import transformers

    folder = fetch(source, path, BESIDE)
    index = read_index(folder, source, path)
    named = ("text_encoder", "text_encoder_2", "text_encoder_3")
    # text_encoder_3 is T5, which some models do not have.
    kinds = {part: index[part][1] for part in named if any(index.get(part) or ())}
    absent = {} if "text_encoder_3" in kinds else {"text_encoder_3": None, "tokenizer_3": None}
    largest = "text_encoder_3" if "text_encoder_3" in kinds else "text_encoder"
    dtype = chosen_dtype("auto", device, stored_dtype(folder / largest, path))
    try:
        encoders = {
            part: load_part(getattr(transformers, kind), folder, part, source, path, dtype)
            for part, kind in kinds.items()
        }
        pipeline = library().StableDiffusion3Pipeline.from_pretrained(
            folder, transformer=None, vae=None, **absent, **encoders, torch_dtype=dtype
        )
        pipeline.to(device)
        if absent:
            # In place of T5 diffusers uses zeros, whose width it reads from the transformer's config.
            pipeline.register_modules(transformer=bare_transformer(folder))
    except ModelError:
        raise
    except NOT_LOADED as error:
        raise ModelError(
            f"{path}: the text encoders of {source} cannot be loaded: {first_line(error)}"
        ) from error
    return TextEncoders(pipeline, device)


def load_decoder(source: str, path: str, device: str) -> LatentDecoder:
    """The decoder of the model `source`. The arguments are those of `load_encoders`."""
    folder = fetch(source, path, BESIDE)
    dtype = chosen_dtype("auto", device, stored_dtype(folder / "vae", path))
    try:
        vae = load_part(library().AutoencoderKL, folder, "vae", source, path, dtype)
    except ModelError:
        raise
    except NOT_LOADED as error:
        raise ModelError(
            f"{path}: the decoder (vae) of {source} cannot be loaded: {first_line(error)}"
        ) from error
    return LatentDecoder(vae.to(torch.device(device)))


def bare_transformer(folder: Path) -> Any:
    """The transformer of a model without its weights, on torch's meta device."""
    with torch.device("meta"):
        return library().SD3Transformer2DModel.from_config(
            library().SD3Transformer2DModel.load_config(folder, subfolder="transformer")
        )
