"""Tells from a config.json whether a folder holds a causal language model. Nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from reflux.errors import ModelError

# Architectures that give something else than the next token are named after it: ForSequenceClassification,
# ForMaskedLM, ForRewardModel. Text models with images or audio are named ForConditionalGeneration.
_ELSE = re.compile(r"For(?!\w*(CausalLM|Generation|LMHead))[A-Z]\w*$")
FITS = (
    "Give a causal language model (an architecture such as Qwen3ForCausalLM or LlamaForCausalLM), which "
    "predicts each token from the tokens before it."
)


def refuse_other_kinds(config: Mapping[str, Any], model: str, where: str) -> None:
    """Raise ModelError where a config.json describes an encoder-decoder, a classifier, a reward model or a
    model of masked tokens. model, where: the model and the path of its key in the recipe, for errors.
    """
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{where}: {model} is an encoder-decoder ({', '.join(names)}). {FITS}")
    if names and all(_ELSE.search(name) for name in names):
        raise ModelError(
            f"{where}: {model} is no language model that continues a text ({', '.join(names)}). {FITS}"
        )


def refuse_quantised(config: Mapping[str, Any], model: str, where: str) -> None:
    """Raise ModelError where a config.json says that the weights are quantised. Arguments: as above."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise ModelError(
            f"{where}: the weights of {model} are quantised ({method}), and quantised weights cannot be "
            "trained. Give the model in float32, bfloat16 or float16."
        )
