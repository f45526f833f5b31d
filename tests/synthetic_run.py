"""A made-up run directory in the format of the library, small, seeded, for tests of what reads one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CHARS = ["<end>", "\n", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;+-*/=?'\"<>()"]
ROLES = {"sample": 0.17, "reward": 0.01, "teach": 0.04, "learn": 0.21}


def write_run(folder: Path, *, steps: int = 60, per_step: int = 4, planned: int | None = None) -> Path:
    """A finished run of `steps` steps, or an unfinished one where more were planned."""
    (folder / "student").mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(steps=planned or steps))
    character_tokenizer().save(str(folder / "student" / "tokenizer.json"))
    write_lines(folder / "metrics.jsonl", [metrics_row(step, steps) for step in range(1, steps + 1)])
    write_lines(
        folder / "evals.jsonl",
        [evals_row(step, steps) for step in sorted({round(part * steps / 6) for part in range(7)})],
    )
    attempts = [
        attempt_rows(step, sample, steps) for step in range(1, steps + 1) for sample in range(per_step)
    ]
    write_lines(folder / "attempts.jsonl", [row for pair in attempts for row in pair])
    if planned is None:
        (folder / "summary.json").write_text(json.dumps(summary(steps)))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def character_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({char: index for index, char in enumerate(CHARS)}, unk_token="<end>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def metrics_row(step: int, steps: int) -> dict[str, Any]:
    rng = random.Random(step)
    seconds = {role: size * rng.uniform(0.85, 1.15) for role, size in ROLES.items()}
    return {
        "step": step,
        "loss": 0.5,
        "kl_nats": 0.9 * math.exp(-3.2 * step / steps) * rng.uniform(0.85, 1.15) + 0.03,
        "kl_nats_trained": 0.8 * math.exp(-3.2 * step / steps) + 0.03,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "staleness_mean": 0.0,
        "staleness_max": 0,
        "tokens_sampled": 3000 + int(500 * rng.random()),
        "tokens_trained": 2900 + int(400 * rng.random()),
        "seconds": seconds | {"total": sum(seconds.values()) + 0.03},
        "flops": {"sample": 2.1e9, "teach": 1.1e9, "learn": 5.2e9},
        "peak_memory_bytes": 8.1e8,
    }


def evals_row(step: int, steps: int) -> dict[str, Any]:
    by_position = [
        {"position": at, "width": 8, "kl_nats": kl, "low": 0.8 * kl, "high": 1.2 * kl, "tokens": 900 - 9 * at}
        for at in range(0, 80, 8)
        for kl in [(0.3 + at / 60) * math.exp(-2.5 * step / steps)]
    ]
    examples = [
        {
            "prompt": f"held-{index}",
            "question": f"Tom has {12 + index} apples. Buys 7. Gives away {3 + index}. How many?",
            "answer": "16",
            "text": "Start: 12. 12+7=19. 19-3=16. Answer: 16"
            if step and index != 1
            else "Start: 12. 12+7=18.\nAnswer: 11",
            "right": None if index == 2 and not step else float(bool(step) and index != 1),
        }
        for index in range(4)
    ]
    return {
        "step": step,
        "accuracy": score(step, steps) | {"examples": examples},
        "agreement": {
            "kl_nats": 0.8 * math.exp(-2.5 * step / steps),
            "split": "test",
            "by_position": by_position,
            "top1": 0.8,
        },
    }


def score(step: int, steps: int) -> dict[str, Any]:
    accuracy = 0.19 + 0.66 * (1 - math.exp(-3 * step / steps))
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.034,
        "high": accuracy + 0.033,
        "problems": 500,
        "split": "test",
    }


def attempt_rows(step: int, sample: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = random.Random(f"{step}-{sample}")
    text = (
        f"Start: {12 + sample}. {12 + sample}+7={19 + sample}. {19 + sample}-3={16 + sample}.\n"
        f"Answer: {16 + sample}"
    )
    tokens = [CHARS.index(char) for char in text] + [0]
    spread = 2.2 * math.exp(-2.2 * step / steps)
    logp = [-abs(rng.gauss(0, 0.6)) for _ in tokens]
    teacher = [min(-1e-4, value + rng.gauss(0, spread) * (rng.random() < 0.5)) for value in logp]
    key = {"step": step, "prompt": f"train-{step}-{sample}", "sample": sample}
    acted = {
        "kind": "attempt",
        **key,
        "question": f"Tom has {12 + sample} apples. Buys 7. Eats 3. How many?",
        "version": step - 1,
        "finish": "stop",
        "tokens": tokens,
        "mask": [1] * len(tokens),
        "logp": logp,
        "text": text,
        "reward": float(step > 20),
    }
    return acted, {
        "kind": "learned",
        **key,
        "teacher_logp": {"main": teacher},
        "weight": [1.0] * len(tokens),
        "notes": {},
    }


def summary(steps: int) -> dict[str, Any]:
    return {
        "recipe": "quickstart",
        "method": "full reverse KL, on policy",
        "steps": steps,
        "seconds": 87.4,
        "accuracy_before": score(0, steps),
        "accuracy_after": score(steps, steps),
        "teacher_accuracy": {
            "accuracy": 0.986,
            "low": 0.971,
            "high": 0.993,
            "problems": 500,
            "split": "test",
        },
        "tokens_sampled": 614400,
        "flops_total": 1.68e12,
        "commit": "4f1c2ab",
        "config_hash": "9d0e7c",
        "seed": 0,
        "health": {},
    }


CONFIG = """recipe = "quickstart"
steps = {steps}
seed = 0
[task]
kind = "word_problems"
[learner]
kind = "hf"
model = "toy-student"
[teachers.main]
kind = "local"
model = "toy-teacher"
[[objectives]]
kind = "divergence"
divergence = "reverse"
support = "full"
[credit.prefix]
length = 64
"""
