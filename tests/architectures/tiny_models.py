"""Tiny random models of every architecture that transformers has for causal language models.

A configuration starts from the defaults of its class. Fields with known names get small values, and lists
with an entry per layer are cut to the layers that differ. What this does not cover stands in `OVERRIDES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures.overrides import ALWAYS, HEADS, LAYERS, OVERRIDES, SIZES, VARIANTS

# names of fields with the number of layers
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
# standard deviation of the noise on parameters that are all equal at first, such as norms and biases
NOISE = 0.1
# every so many ids is one that ends a turn
ENDS_EVERY = 16
# output rows beyond the tokens; some tokenizer classes of transformers add tokens of their own
PADDED = 16


def names() -> list[str]:
    """All model types, and after each its variants, such as "falcon (alibi)"."""
    extra = sorted(VARIANTS)
    return [
        name
        for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        for name in (kind, *(variant for variant in extra if model_type(variant) == kind))
    ]


def model_type(name: str) -> str:
    return name.split(" ")[0]


def tiny_config(name: str, vocabulary: int, eos: int) -> PretrainedConfig:
    """The configuration of a type or a variant. vocabulary: output rows. eos: id of the end token."""
    kind = model_type(name)
    cls = CONFIG_MAPPING[kind]
    given = {**OVERRIDES.get(kind, {}), **VARIANTS.get(name, {})}
    ids = {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary, "eos_token_id": eos}
    # some classes have no defaults for their parts
    parts = {key: deepcopy(value) for key, value in given.items() if cls.has_no_defaults_at_init}
    return cls(**shrunk(cls(**parts), ids, given))


def shrunk(default: PretrainedConfig, ids: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make a configuration of the class of `default` small."""
    fields = default.to_dict()
    changes: dict[str, Any] = {}
    for key, value in vars(default).items():
        inner = given[key] if isinstance(given.get(key), Mapping) else {}
        if value is None and "model_type" in inner:
            value = CONFIG_MAPPING[inner["model_type"]]()
        if isinstance(value, PretrainedConfig):
            changes[key] = shrunk(value, ids, inner)
        elif key in ids:
            changes[key] = ids[key]
        elif key in SIZES and (value is not None or key in ALWAYS):
            changes[key] = SIZES[key]
    changes |= {key: 0 for key in ("bos_token_id", "pad_token_id") if fields.get(key) is not None}
    if "kv_lora_rank" in fields:
        # latent attention has keys and values of its own in each head
        changes["num_key_value_heads"] = HEADS
    changes |= cut_layers(fields)
    # the parts have taken what is given for them
    return changes | {key: value for key, value in given.items() if not isinstance(changes.get(key), dict)}


def cut_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and the lists with an entry per layer, cut to layers that differ in some list.
    Lists of layer numbers keep the numbers that are left.
    """
    depth = next((fields[name] for name in DEPTHS if isinstance(fields.get(name), int)), 0)
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and value}
    numbers = {key: value for key, value in lists.items() if are_layers(value, depth)}
    each = {key: value for key, value in lists.items() if len(value) == depth and key not in numbers}
    rows = [tuple(repr(value[i]) for value in each.values()) for i in range(depth)]
    firsts = [i for i, row in enumerate(rows) if row not in rows[:i]] if each else []
    count = max(LAYERS, len(firsts))
    kept = sorted({*firsts, *[i for i in range(depth) if i not in firsts][: count - len(firsts)]})
    return {
        **{name: count for name in DEPTHS if fields.get(name)},
        **{key: [value[i] for i in kept] for key, value in each.items()},
        **{key: [number for number in value if number < count] for key, value in numbers.items()},
    }


def are_layers(value: list[Any], depth: int) -> bool:
    """True for numbers of layers in rising order."""
    return all(type(number) is int and number < depth for number in value) and value == sorted(set(value))


def build(name: str, folder: Path, tokenizer: Any, seed: int = 0) -> Path:
    """A random model of that type and the tokenizer, in Hugging Face format."""
    torch.manual_seed(seed)
    config = tiny_config(name, len(tokenizer) + PADDED, tokenizer.eos_token_id)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    vary(net)
    # many ids end a turn, so that answers have unequal lengths
    net.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, len(tokenizer), ENDS_EVERY)]
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def vary(net: torch.nn.Module) -> None:
    """Noise on what initialisation leaves constant, so that no fault hides in a factor of one or in zeros."""
    for parameter in net.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter) * NOISE)
    for module in net.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_(0, NOISE)
