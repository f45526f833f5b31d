"""Milliseconds per token of sampling, in three ways in turns, on a random model of 0.6 billion weights.

    python benchmarks/decode_gpu.py [--rows 64] [--new 256] [--rounds 5] [--model FOLDER] [--tiny]

Ways:

    graphs   a static key-value cache, one CUDA graph per step (on a CPU the same steps without a graph)
    static   the same cache and the same steps without a graph
    eager    a growing cache of transformers, one token at a time

One round is one batch of each way, in alternating order, after a warm-up batch of each. A ratio is taken
within a round and printed as median (lowest to highest). The first batch of `graphs` captures; its seconds
are printed too. All ways draw with the same random numbers; the share of equal tokens is printed, because
rounding in 16 bits moves some. Prompts have 60 to 130 tokens.

`--tiny` runs at toy size, to check this script; its timings say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_models import make_models

WAYS = ("graphs", "static", "eager")


def decoders(model: Any) -> dict[str, Any]:
    """The decoder of each way."""
    from reflux.models.sampling_way import static_decoder
    from reflux.models.static_decoder import StaticDecoder

    found = {"graphs": static_decoder(model), "static": StaticDecoder(model), "eager": None}
    if isinstance(found["graphs"], str):
        raise SystemExit(f"this model is decoded one token at a time: {found['graphs']}")
    found["static"].graphs.failure = "switched off here"
    return found


def requests(model: Any, rows: int, new: int, step: int) -> list[Any]:
    from reflux.config.step_context import SamplingParams
    from reflux.models.rng import row_key
    from reflux.models.turns import TurnRequest

    dice, draw = random.Random(step), SamplingParams(step, "train", new)
    texts = [
        [dice.randrange(3, model.vocabulary) for _ in range(dice.randrange(60, 131))] for _ in range(rows)
    ]
    return [
        TurnRequest(ids, new, row_key(0, "train", step, f"p{row}", 0), draw)
        for row, ids in enumerate(sorted(texts, key=len, reverse=True))
    ]


def measure(model: Any, decoder: Any, asks: list[Any]) -> tuple[float, list[list[int]]]:
    """(seconds, tokens of each row) of one batch."""
    import torch

    from reflux.models.generate import decode

    wait = torch.cuda.synchronize if model.device.type == "cuda" else int
    wait()
    started = time.perf_counter()
    turns = decode(model, asks, 0, decoder)
    wait()
    return time.perf_counter() - started, [turn.tokens for turn in turns]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=256, help="new tokens per row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face format; default: a random model")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()

    from reflux.models.text import load_model

    with tempfile.TemporaryDirectory() as scratch:
        if asked.model is None:
            make_models(Path(scratch), asked.tiny, ("student",))
        model = load_model(str(asked.model or Path(scratch) / "student"), "--model")
    ways = decoders(model)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(asked.rounds + 1):
        asks = requests(model, asked.rows, asked.new, number)
        made = {}
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            spent, made[way] = measure(model, ways[way], asks)
            seconds[way].append(spent)
        texts = zip(made["graphs"], made["eager"], strict=True)
        equal = [one == other for ours, theirs in texts for one, other in zip(ours, theirs, strict=False)]
        print(
            f"round {number}: " + ", ".join(f"{way} {seconds[way][-1]:.2f} s" for way in WAYS),
            f"(equal tokens {statistics.mean(equal):.1%})",
            flush=True,
        )
    graphs = ways["graphs"].graphs
    print(f"{model.net.dtype}, {model.device}; {graphs.captured} graphs captured in {graphs.seconds:.1f} s")
    report({way: spent[1:] for way, spent in seconds.items()}, asked.new)


def report(seconds: dict[str, list[float]], new: int) -> None:
    for way, spent in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(spent, seconds["eager"], strict=True)]
        middle = statistics.median(spent)
        print(
            f"{way:7} {middle / new * 1e3:8.2f} ms a token, {middle:.2f} s; "
            f"of eager {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
