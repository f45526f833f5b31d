"""Two runs on models and prompts from outside this project. Their numbers are in NOTEBOOK.md.

    python studies/real_input.py stories --shared ../shared/data --out runs/stories [--steps 300]
    python studies/real_input.py gsm8k   --shared ../shared/data --out runs/gsm8k   [--steps 10]

stories: the 260K-parameter story model of the llama2.c project is the teacher of an untrained, smaller Llama
with the same tokenizer, on story openings. The report is the held-out reverse KL by position before and
after. gsm8k: the questions of GSM8K through the `gsm8k` task, with the story model as teacher of the same
untrained student. Right answers are not expected; the run tests prompts, grading and evaluation on real data.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from pathlib import Path
from typing import Any

from reflux.config.recipe import from_table
from reflux.loop import train
from reflux.training import Options

NAMES = ("Lily", "Tom", "Mia", "Ben", "Sara", "Max", "Anna", "Tim", "Lucy", "Sam", "Jack", "Emma")
WHO = (
    "little girl",
    "little boy",
    "small dog",
    "happy cat",
    "big bear",
    "kind bird",
    "tiny mouse",
    "brave rabbit",
)
THEN = (
    "{name} liked to play in the park",
    "{name} had a red ball",
    "One day, {name} went for a walk",
    "{name} was very sad",
    "{name} wanted to find a friend",
    "One day, {name} saw a big tree",
    "{name} loved to sing",
    "It was a sunny day and {name} was happy",
)


def openings(path: Path) -> None:
    """Write every opening once, in a seeded order, as {"id", "prompt"} lines."""
    rows = [
        f"Once upon a time, there was a {who} named {name}. {then.format(name=name)}"
        for name in NAMES
        for who in WHO
        for then in THEN
    ]
    random.Random(0).shuffle(rows)
    path.write_text(
        "".join(json.dumps({"id": f"opening-{i}", "prompt": text}) + "\n" for i, text in enumerate(rows))
    )


def fresh_student(teacher: Path, folder: Path) -> None:
    """An untrained Llama of half the teacher's size with the teacher's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(teacher)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 3, 48, 128
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 6, 3, 8
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def stories(shared: Path, work: Path, steps: int) -> dict[str, Any]:
    openings(work / "openings.jsonl")
    fresh_student(shared / "stories260k", work / "fresh")
    return {
        "recipe": "stories",
        "steps": steps,
        "prompts_per_step": 32,
        "task": {"kind": "jsonl", "path": str(work / "openings.jsonl"), "validation": 0.2},
        "sampler": {"kind": "hf", "max_tokens": 96},
        "learner": {
            "kind": "hf",
            "model": str(work / "fresh"),
            "lr": {"kind": "cosine", "peak": 4e-3, "warmup": 10},
        },
        "teachers": {"main": {"kind": "local", "model": str(shared / "stories260k")}},
        "objectives": [{"kind": "divergence", "divergence": "forward"}],
        "evals": {"agreement": {"prompts": 128, "split": "validation", "bins": 12}},
        "save_every": 1000,
        "eval_every": 100,
    }


def gsm8k(shared: Path, work: Path, steps: int) -> dict[str, Any]:
    fresh_student(shared / "stories260k", work / "fresh")
    return {
        "recipe": "gsm8k_through",
        "steps": steps,
        "prompts_per_step": 16,
        "task": {"kind": "gsm8k", "path": str(shared / "gsm8k")},
        "sampler": {"kind": "hf", "max_tokens": 48, "long_prompts": "skip"},
        "learner": {"kind": "hf", "model": str(work / "fresh"), "lr": 1e-3},
        "teachers": {"main": {"kind": "local", "model": str(shared / "stories260k")}},
        "rewards": {"verifier": {}},
        "objectives": [{"kind": "divergence", "divergence": "jsd"}],
        "evals": {"accuracy": {"problems": 200, "max_tokens": 48}, "agreement": {"prompts": 64}},
        "save_every": 1000,
        "eval_every": 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("stories", "gsm8k"))
    parser.add_argument(
        "--shared", type=Path, required=True, help="the folder that holds stories260k and gsm8k"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    work = asked.out.with_name(f"{asked.out.name}-inputs")
    work.mkdir(parents=True, exist_ok=True)
    table = (
        stories(asked.shared, work, asked.steps or 300)
        if asked.which == "stories"
        else gsm8k(asked.shared, work, asked.steps or 10)
    )
    summary = asyncio.run(
        train(from_table({**table, "threads": asked.threads, "seed": asked.seed}), Options(asked.out))
    )
    rows = [json.loads(line) for line in (asked.out / "evals.jsonl").read_text().splitlines()]
    for name, row in (("before", rows[0]), ("after", rows[-1])):
        agreement = row["agreement"]
        print(
            f"{name}: held-out KL {agreement['kl_nats']:.3f} nats a token ({agreement['low']:.3f} to "
            f"{agreement['high']:.3f})"
        )
        print(
            "  by position: "
            + "  ".join(f"{b['position']}:{b['kl_nats']:.2f}" for b in agreement["by_position"])
        )
        if "accuracy" in row:
            print(
                f"  accuracy {row['accuracy']['accuracy']} of {row['accuracy']['problems']}, ungraded "
                f"{row['accuracy']['ungraded']}"
            )
    print(
        {key: summary[key] for key in ("steps", "seconds", "tokens_sampled", "commit", "config_hash", "seed")}
    )


if __name__ == "__main__":
    main()
