"""A small, seeded, synthetic run directory of images in the library's format, for tests of its readers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from reflux.models.images import to_text
from reflux.tasks.glyph_drawing import draw
from reflux.tasks.glyphs import Glyphs
from reflux.types import Prompt
from synthetic_run import metrics_row, write_lines

PROMPTS = list(Glyphs().prompts("test", 0))[:8]
# denoising steps
STEPS = 10
ROUTES = ("digits", "counts")


def write_picture_run(folder: Path, *, steps: int = 60, per_step: int = 2) -> Path:
    """A finished run: student, two routed teachers, and an anchor."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(steps=steps))
    rows = [
        metrics_row(step, steps)
        | {"tokens_sampled": 288, "tokens_trained": 288}
        | {
            "asked": {"digits": 16, "counts": 16, "anchor": 32},
            "kl_nats_trained_by_table": {"digits": 0.4, "counts": 0.3, "anchor": 0.1},
        }
        for step in range(1, steps + 1)
    ]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(
        folder / "evals.jsonl",
        [evals_row(step, steps) for step in sorted({round(part * steps / 4) for part in range(5)})],
    )
    attempts = [
        attempt_rows(step, sample, steps) for step in range(1, steps + 1) for sample in range(per_step)
    ]
    write_lines(folder / "attempts.jsonl", [row for pair in attempts for row in pair])
    scores = {
        name: {key: table[key] for key in ("accuracy", "low", "high", "problems", "split")}
        for name, table in [
            ("accuracy_before", table_of(0.1, 0.9, 0)),
            ("accuracy_after", table_of(0.9, 0.3, 1)),
            ("teacher_accuracy", table_of(0.95, 0.2, 2)),
        ]
    }
    table = {"recipe": "flow", "method": "velocity_kl", "steps": steps, "seconds": 240.0, **scores}
    (folder / "summary.json").write_text(json.dumps(table))
    return folder


def evals_row(step: int, steps: int) -> dict[str, Any]:
    done = 1 - math.exp(-3 * step / steps)
    kl = [
        {"position": at, "width": 1, "kl_nats": (1 - 0.8 * done) * (3 + at) / 3, "steps": 64}
        for at in range(STEPS - 1)
    ]
    kl = [{**entry, "low": 0.9 * entry["kl_nats"], "high": 1.1 * entry["kl_nats"]} for entry in kl]
    row = {
        "step": step,
        "accuracy": table_of(0.55 + 0.35 * done, 0.9 - 0.7 * done, int(step > 0)),
        "agreement": {"kl_nats": 0.8 * math.exp(-2.5 * step / steps), "split": "test", "by_position": kl},
    }
    return row if step else {**row, "teacher_accuracy": table_of(0.95, 0.2, 2)}


def table_of(accuracy: float, noise: float, who: int) -> dict[str, Any]:
    """What evals.accuracy gives of someone who is right this often, and whose images are this noisy."""
    quality = 1 - noise / 2
    table: dict[str, Any] = {
        "problems": 320,
        "split": "test",
        "accuracy": accuracy,
        "low": accuracy - 0.04,
        "high": accuracy + 0.04,
    }
    table |= {"parts": ["quality"]}
    table |= {
        "quality": quality,
        "quality.low": quality - 0.02,
        "quality.high": quality + 0.02,
        "ungraded": 0,
        "mean_steps": 20,
    }
    for sign, route in zip((1, -1), ROUTES, strict=True):
        own = accuracy + 0.03 * sign
        table |= {
            f"accuracy.{route}": own,
            f"accuracy.{route}.low": own - 0.05,
            f"accuracy.{route}.high": own + 0.05,
        }
        table |= {f"accuracy.{route}.problems": 160, f"quality.{route}": quality + 0.01 * sign}
        table |= {f"quality.{route}.low": quality - 0.03, f"quality.{route}.high": quality + 0.03}
    return {**table, "examples": [example(prompt, noise, who) for prompt in PROMPTS]}


def example(prompt: Prompt, noise: float, who: int) -> dict[str, Any]:
    right = None if prompt == PROMPTS[5] and not who else float(who > 0 and prompt != PROMPTS[3])
    return {
        "id": prompt.id,
        "prompt": prompt.messages[-1]["content"],
        "answer": prompt.answer,
        "image": to_text(noisy(prompt, noise, who)),
        "verdict": right,
        "parts": {"quality": 1 - noise / 2},
        "finish": "stop",
    }


def noisy(prompt: Prompt, noise: float, seed: int) -> np.ndarray:
    image = draw(prompt, random.Random(prompt.id)).astype(np.float64)
    rng = np.random.default_rng((seed, len(prompt.id)))
    return (image * (1 - noise) + noise * rng.uniform(0, 255, image.shape)).clip(0, 255).astype(np.uint8)


def attempt_rows(step: int, sample: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = random.Random(f"{step}-{sample}")
    prompt = PROMPTS[(step + sample) % len(PROMPTS)]
    spread = 2.5 * math.exp(-2.2 * step / steps)
    logp = [round(rng.gauss(-80, 4), 5) for _ in range(STEPS)]
    kl = [0.1 * spread * (1 + at) for at in range(STEPS)]
    teacher = [p - k + math.sqrt(2 * k) * rng.gauss(0, 1) for p, k in zip(logp, kl, strict=True)]
    key = {"step": step, "prompt": f"train-{prompt.id}", "sample": sample}
    acted = {
        "kind": "attempt",
        **key,
        "question": prompt.messages[-1]["content"],
        "version": step - 1,
        "finish": "stop",
        "mask": [1] * (STEPS - 1) + [0],
        "logp": [*logp[:-1], 0.0],
        "t": [round(1 - at / STEPS, 4) for at in range(STEPS + 1)],
        "noise_level": 0.7,
        "guidance": 1.0,
        "image": to_text(noisy(prompt, max(0.1, 0.8 - step / steps), step)),
        "reward": float(step > steps / 3),
        "parts": {"quality": 0.8},
    }
    learned = {
        "kind": "learned",
        **key,
        "teacher_logp": {"anchor": [*logp[:-1], None], "main": [*teacher[:-1], None]},
        "student_logp": [*logp[:-1], None],
        "kl": [*kl[:-1], None],
        "weight": [1.0] * (STEPS - 1) + [0.0],
        "notes": {},
    }
    return acted, learned


CONFIG = """recipe = "flow"
steps = {steps}
seed = 0
[task]
kind = "glyphs"
[sampler]
kind = "flow"
[learner]
kind = "flow"
model = "reflux:glyph_base"
[teachers.digits]
kind = "flow"
model = "reflux:glyph_digits"
as = "main"
routes = ["digits"]
[teachers.counts]
kind = "flow"
model = "reflux:glyph_counts"
as = "main"
routes = ["counts"]
[teachers.anchor]
kind = "flow"
model = "reflux:glyph_base"
[[objectives]]
kind = "velocity_kl"
"""
