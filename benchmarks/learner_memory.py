"""Learning and scoring with packed rows against padded rows: seconds, and bytes that a micro-batch keeps.

    python benchmarks/learner_memory.py [--shape tiny|135m|0.6b|1.7b] [--texts 64] [--rounds 5]
                                         [--tokens 4096 16384]

Both ways run by turns in one process on the same texts: prompts of 60 to 130 tokens with answers of 40 to
256. On a GPU the weights are float32 under bfloat16 autocast, as in the learner, and the bytes are those that
torch has allocated after the forward pass. On a CPU packed rows are read text by text, and bytes are not
measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from reflux.assets.characters import character_tokenizer
from reflux.models.cut import cut
from reflux.models.packed_attention import attending_packed, trial
from reflux.models.text import as_model
from reflux.models.text_rows import packed, padded
from reflux.models.text_shape import shape_of

SHAPES = {
    "tiny": (64, 192, 2, 4, 2, 16, 512),
    "135m": (576, 1536, 30, 9, 3, 64, 49_152),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
    "1.7b": (2048, 6144, 28, 16, 8, 128, 151_936),
}


def model_of(shape: str, device: torch.device) -> Any:
    width, inner, layers, heads, keys, each, vocabulary = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=each,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="float32",
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with device:
        return as_model(Qwen3ForCausalLM(config).eval(), character_tokenizer())


def texts_of(count: int, vocabulary: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(60, 131, count) + rng.integers(40, 257, count)
    return [rng.integers(0, vocabulary, length) for length in sorted(lengths, reverse=True)]


def read(model: Any, texts: list[np.ndarray], pack: bool, tokens: int, learn: bool) -> tuple[float, int]:
    """Seconds of one pass over all texts, and the bytes that its largest micro-batch keeps. learn: with
    gradients.
    """
    cuda = model.device.type == "cuda"
    narrow = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
    kept = 0
    model.net.zero_grad(set_to_none=True)
    start = _now(cuda)
    for part in cut([len(text) for text in texts], lambda: tokens, pack):
        rows = (packed if pack else padded)(texts[part], model.device)
        before = torch.cuda.memory_allocated() if cuda else 0
        with torch.set_grad_enabled(learn), narrow, attending_packed(model.net) if pack else nullcontext():
            h_NH = rows.states(model.trunk)
            kept = max(kept, torch.cuda.memory_allocated() - before if cuda else 0)
            if learn:
                h_NH.float().square().mean().backward()
    return _now(cuda) - start, kept


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--shape", choices=SHAPES, default="0.6b" if torch.cuda.is_available() else "tiny")
    asked.add_argument("--texts", type=int, default=64)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--tokens", type=int, nargs="+", default=[4096])
    given = asked.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of(given.shape, device)
    narrow = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    print("packed rows:", trial(model, narrow) or "right")
    texts = texts_of(given.texts, model.vocabulary)
    shape = shape_of(model.net.config.to_dict(), model.net.state_dict())
    estimate = shape.activation_bytes(device.type == "cuda", False) if shape else 0
    real, longest = sum(map(len, texts)), max(map(len, texts))
    print(f"{real} tokens, {len(texts) * longest} padded to one width; estimate {estimate} bytes a token")
    for tokens in given.tokens:
        for learn in (True, False):
            report(model, texts, tokens, learn, given.rounds)


def report(model: Any, texts: list[np.ndarray], tokens: int, learn: bool, rounds: int) -> None:
    for pack in (False, True):
        read(model, texts, pack, tokens, learn)
    pairs = [[read(model, texts, pack, tokens, learn) for pack in (False, True)] for _ in range(rounds)]
    seconds = [statistics.median(pair[way][0] for pair in pairs) for way in (0, 1)]
    ratios = sorted(pair[1][0] / pair[0][0] for pair in pairs)
    kept = [max(pair[way][1] for pair in pairs) / 1e9 for way in (0, 1)]
    print(
        f"{'learn' if learn else 'score'}, {tokens} tokens a micro-batch: padded {seconds[0]:.3f} s "
        f"{kept[0]:.2f} GB, packed {seconds[1]:.3f} s {kept[1]:.2f} GB; packed/padded "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
