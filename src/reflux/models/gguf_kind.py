"""Checks by the header of a GGUF file that it holds a language model which transformers loads correctly."""

from __future__ import annotations

from typing import Any

from reflux.errors import ModelError
from reflux.models.context_window import rope_tables
from reflux.models.gguf_header import GgufHeader, read_gguf

# what a file is that is not a whole model, by its `general.type`
_ELSE = {
    "adapter": "a LoRA adapter. Merge it into its base model where it was made, and give the merged model",
    "mmproj": "the part of a model that reads images. Give the file of its language model",
    "vocab": "a vocabulary without weights. Give the file with the weights",
    "imatrix": "a table for quantising. Give the file of the model",
}
# tensors and settings with which llama.cpp stretches the rotary embedding; transformers leaves them out
_STRETCH = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# settings that change the model's output, and that transformers does not read for every architecture
_READ = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_OTHER = "Give the model in safetensors."


def refuse_other_files(where: str, path: str) -> GgufHeader:
    """The header of a GGUF file. path: the path of the key in the recipe, for errors. ModelError where the
    file does not hold a whole language model, or its rotary embedding is stretched.
    """
    header = read_gguf(where, path)
    settings = header.settings
    kind = "mmproj" if header.architecture == "clip" else settings.get("general.type", "model")
    kind = kind if header.counts else "vocab"
    if kind != "model":
        raise ModelError(f"{path}: {where} is {_ELSE.get(kind, f'of the type {kind}, and no model')}.")
    parts = settings.get("split.count", 1)
    if parts > 1:
        raise ModelError(
            f"{path}: {where} is one of {parts} parts. Join them with llama-gguf-split --merge, and give the "
            "joined file."
        )
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1))
    scaled = settings.get("rope.scaling.type", "none") != "none" or factor not in (0, 1)
    if scaled or any(name in header.counts for name in _STRETCH):
        raise ModelError(
            f"{path}: {where} stretches its rotary embedding to read longer texts, and transformers leaves "
            f"that out of a GGUF file, so the model would compute something else. {_OTHER}"
        )
    return header


def refuse_unread(header: GgufHeader, config: Any, parameters: int, name: str, path: str) -> None:
    """ModelError where transformers has left out settings or weights of a GGUF file. config: what it made of
    the settings. parameters: the number of weights of the model that it made. name: the model, for errors.
    """
    text = config.get_text_config()
    left = [key for key in _READ if key in header.settings and header.settings[key] != _value(text, key)]
    theta = header.settings.get("rope.freq_base")
    made = [table["rope_theta"] for table in rope_tables(text.to_dict()) if table.get("rope_theta")]
    if theta is not None and made and theta not in made:
        left.append("rope.freq_base")
    if left:
        raise ModelError(
            f"{path}: transformers does not read {', '.join(left)} of {name} ({header.architecture}), so the "
            f"model would compute something else. {_OTHER}"
        )
    stored = sum(count for tensor, count in header.counts.items() if not _is_tied_head(tensor, text))
    if stored != parameters:
        raise ModelError(
            f"{path}: {name} holds {stored} weights, and the {type(text).__name__.removesuffix('Config')} "
            f"model that transformers makes of it has {parameters}. {_OTHER}"
        )


def _is_tied_head(tensor: str, config: Any) -> bool:
    """True for a second copy of the embedding."""
    return tensor == "output.weight" and bool(config.tie_word_embeddings)


def _value(config: Any, key: str) -> Any:
    return getattr(config, key.removeprefix("attention."), None)
