"""Whether sampler, learner and the model's own forward pass agree on log-probs, for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from reflux.config.step_context import SamplingParams
from reflux.models.cpu.decoder import cpu_decoder
from reflux.models.generate import decode
from reflux.models.rng import row_key
from reflux.models.text import Model, load_model
from reflux.models.turns import TurnRequest

# prompt lengths and budgets in tokens, so that rows begin and end at different places
ROWS = ((3, 24), (14, 20), (9, 24), (1, 12))
# largest difference of two log-probs, nats
TOLERANCE = 1e-3
# what the first token must change at this position, nats: a smaller number would hide faults
EARLY, ALIVE = 6, 0.01


@torch.no_grad()
def gaps(folder: Path) -> dict[str, float]:
    """The largest differences of log-probs in nats, by name: of sampler and learner from the model itself, on
    one text at a time and without a cache; and of the model itself between texts of different lengths.
    """
    model = load_model(str(folder), "learner.model", dtype="float32")
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts, recorded = sampled(model)
    alone = [own_logp(own, text, model.vocabulary) for text in texts]
    drawn = [
        logp[start - 1 : -1].gather(-1, torch.tensor(text[start:])[:, None])[:, 0]
        for logp, text, (start, _) in zip(alone, texts, ROWS, strict=True)
    ]
    halves = [own_logp(own, text[: len(text) // 2], model.vocabulary) for text in texts]
    start = texts[1][:EARLY]
    headless = own_logp(own, start[1:], model.vocabulary)
    return {
        "learner's batch": worst_of(batched(model, texts), alone),
        "sampler": worst_of(recorded, drawn),
        "shorter text": worst_of(
            [logp[: len(half)] for logp, half in zip(alone, halves, strict=True)], halves
        ),
        "first token": worst_of([headless[-1]], [own_logp(own, start, model.vocabulary)[-1]]),
    }


def sampled(model: Model) -> tuple[list[list[int]], list[Tensor]]:
    """Texts with prompts of unequal lengths, and the log-probs of their answers that the sampler recorded."""
    dice = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, model.vocabulary, (length,), generator=dice).tolist() for length, _ in ROWS]
    asks = [
        TurnRequest(
            ids, min(budget, model.context_tokens - len(ids)), row_key(0, "train", 0, f"p{i}", 0), draw()
        )
        for i, (ids, (_, budget)) in enumerate(zip(prompts, ROWS, strict=True))
    ]
    turns = decode(model, asks, lambda: 0, cpu_decoder(model))
    texts = [ids + turn.tokens for ids, turn in zip(prompts, turns, strict=True)]
    return texts, [torch.as_tensor(turn.raw_T) for turn in turns]


def draw() -> SamplingParams:
    return SamplingParams(0, "train", max_positions=24)


def own_logp(own: Any, text: list[int], vocabulary: int) -> Tensor:
    """logp [T, V] of a text under the model of transformers."""
    logits = own(input_ids=torch.tensor([text]), use_cache=False).logits[0, :, :vocabulary]
    return logits.float().log_softmax(-1)


def batched(model: Model, texts: list[list[int]]) -> list[Tensor]:
    """logp [T, V] of each text, from one batch with padding on the right, as the learner computes them."""
    ids_BL = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(ids_BL, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    states_BLH = model.trunk(input_ids=ids_BL, use_cache=False).last_hidden_state
    logp_BLV = model.head.logits(states_BLH).float().log_softmax(-1)
    return [logp_LV[: len(text)] for logp_LV, text in zip(logp_BLV, texts, strict=True)]


def worst_of(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((mine - other).abs().max()) for mine, other in zip(ours, theirs, strict=True))
