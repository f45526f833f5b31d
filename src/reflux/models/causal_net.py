"""Loads the weights of a causal language model with transformers. Weights of another model are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reflux.errors import ModelError
from reflux.models.gguf_header import GgufHeader, is_gguf, source
from reflux.models.gguf_kind import refuse_other_files
from reflux.models.gguf_net import plain_net
from reflux.models.loaded_weights import refuse_other_weights
from reflux.models.locations import local_folder
from reflux.models.text import not_loaded
from reflux.models.text_kind import FITS, refuse_other_kinds
from reflux.models.weight_files import check_files, narrowest, read_json


def load_causal_net(
    where: str,
    name: str,
    path: str,
    *,
    dtype: str,
    attention: str | None,
    trust_remote_code: bool,
    device_map: str | None,
) -> tuple[Any, torch.dtype | None]:
    """The net, and the dtype that its config.json names, or else the narrowest one of its weight files.

    where: the folder or hub id with the weights. name: the model as the recipe names it, for errors; path:
    the path of its key. The other arguments are those of `load_model`. ModelError as described there.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(where).is_dir():
        refuse_other_kinds(read_json(Path(where) / "config.json", path), name, path)
        if (generation := Path(where) / "generation_config.json").exists():
            # transformers leaves out a file that it cannot read, and its end tokens with it.
            read_json(generation, path)
        check_files(Path(where), path)
    header = refuse_other_files(where, path) if is_gguf(where) else None
    try:
        config = AutoConfig.from_pretrained(**source(where), trust_remote_code=trust_remote_code)
        _refuse_kind(config, name, path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source(where),
            # To read it from a GGUF file once more would take seconds.
            config=config if header is not None else None,
            dtype=_wanted(dtype, header),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
            # A tensor of another shape is refused below, with its name.
            ignore_mismatched_sizes=True,
        )
    except ModelError:
        raise
    except ImportError as error:
        chosen = "" if attention is None else f' (attention = "{attention}")'
        why = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: {name} needs a package that is not here{chosen}: {why}") from error
    except Exception as error:
        # A config.json with other content than its class expects may fail with any exception.
        if isinstance(error, SafetensorError) and (cached := local_folder(where, path)) is not None:
            check_files(cached, path)
        raise ModelError(not_loaded(path, "model", name, error)) from error
    net, info = loaded
    refuse_other_weights(net, info, name, path, partial=type(net.config) is not type(config))
    if header is not None:
        return plain_net(net, header, name, path), getattr(torch, header.dtype)
    return net, config.dtype if isinstance(config.dtype, torch.dtype) else _stored(where, path)


def _wanted(dtype: str, header: GgufHeader | None) -> Any:
    """The argument of `from_pretrained` for a dtype of a recipe. header: of a GGUF file."""
    if dtype == "auto":
        return "auto" if header is None else getattr(torch, header.dtype)
    return getattr(torch, dtype)


def _stored(where: str, path: str) -> torch.dtype | None:
    """The narrowest dtype of the weight files; None where there is none."""
    folder = local_folder(where, path)
    kind = None if folder is None else narrowest(folder, path)
    return None if kind is None else getattr(torch, kind)


def _refuse_kind(config: Any, name: str, path: str) -> None:
    """ModelError where transformers has no causal language model for this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not loaded as a language model"
        raise ModelError(f"{path}: {name} ({config.model_type}) is {kind} by transformers. {FITS}")


def correct_tie(net: Any) -> None:
    """Correct the config of a net whose head is a matrix of its own, though its config.json says that it is
    the embedding. transformers keeps the two apart and warns. Other libraries would read an exported model by
    its config and lose the head.
    """
    config, head = net.config.get_text_config(), net.get_output_embeddings()
    # Some text configs leave the key out, because they never tie.
    if getattr(config, "tie_word_embeddings", False) and head is not None:
        tied = head.weight is net.get_input_embeddings().weight
        config.tie_word_embeddings = net.config.tie_word_embeddings = tied
