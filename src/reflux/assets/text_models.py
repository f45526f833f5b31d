"""The shape of the small text models, and how they are trained."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reflux.assets import folder
from reflux.assets.specs import ModelSpec

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

# the label of a token that is not trained on
IGNORED = -100


def blank(spec: ModelSpec, tokenizer: Any) -> Qwen3ForCausalLM:
    """An untrained model with the shape of `spec`: Qwen3, float32, with tied embeddings."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.inner,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        head_dim=spec.width // spec.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    torch.manual_seed(spec.seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    return model


def first(spec: ModelSpec, tokenizer: Any) -> Qwen3ForCausalLM:
    """The model from which training starts: the shipped model `spec.start`, or an untrained one."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(folder(spec.start)) if spec.start else blank(spec, tokenizer)


def train(
    model: Qwen3ForCausalLM, spec: ModelSpec, batches: Iterable[tuple[Tensor, Tensor]]
) -> Qwen3ForCausalLM:
    """The model after `spec.steps` steps with AdamW, warm-up and cosine decay, and gradient norm clipped at
    1. batches: (ids_BT, labels_BT); a label is the token itself, or IGNORED.
    """
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun = time.monotonic()
    for step, (ids_BT, labels_BT) in enumerate(islice(batches, spec.steps)):
        along = step / spec.steps
        rate = spec.lr * min(1.0, (step + 1) / spec.warmup) * 0.5 * (1 + math.cos(math.pi * along))
        for group in optimiser.param_groups:
            group["lr"] = rate
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            print(
                f"{spec.name} step {step + 1}/{spec.steps} loss {loss.item():.4f} nats, "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    return model.eval()
