"""Seconds per step of Reflux and of TRL's DistillationTrainer in turns, on random models of 0.6 (student) and
1.7 billion weights (teacher).

    python benchmarks/step_gpu.py [--prompts 64] [--new 256] [--micro 16] [--steps 6] [--rounds 3]
                                  [--trl-python PATH] [--tiny]

Both sides sample `new` tokens for each of `prompts` prompts of 60 to 130 tokens, and train on the exact
reverse KL from the teacher. Sampler and teacher compute in bfloat16; the student trains on float32 weights
under autocast. TRL (1.16) reads micro-batches of `micro` texts. Each side runs in a separate process. One
round is one process of each side, in alternating order. Printed: the seconds of the first step, the median of
the others, by role where Reflux records it, the ratio with its spread over rounds, and peak memory of the
device. TRL may be in another environment: pass its interpreter.

`--tiny` runs at toy size, to check this script; its timings say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_models import make_models, write_prompts
from trl_steps import in_process, trl_seconds

SIDES = ("reflux", "trl")


def side_reflux(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    import asyncio

    from reflux.config.recipe import from_table
    from reflux.loop import train
    from reflux.training import Options

    table = {
        "recipe": "step_gpu",
        "steps": asked.steps,
        "prompts_per_step": asked.prompts,
        "task": {"kind": "jsonl", "path": str(folder / "prompts.jsonl"), "validation": 0.0},
        "sampler": {"kind": "hf", "max_tokens": asked.new},
        "learner": {"kind": "hf", "model": str(folder / "student"), "lr": 1e-6},
        "teachers": {"main": {"kind": "local", "model": str(folder / "teacher"), "dtype": "bfloat16"}},
        "objectives": [{"kind": "divergence", "divergence": "reverse"}],
        "save_every": 10_000,
        # two uniform random models are no fault here
        "skip_checks": ["all"],
    }
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    asyncio.run(train(from_table(table), Options(out)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("sample", "teach", "learn")
    roles = {name: statistics.median(row["seconds"].get(name, 0) for row in rows[1:]) for name in names}
    return {"seconds": [row["seconds"]["total"] for row in rows], "roles": roles}


def side_trl(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    seconds = trl_seconds(
        folder,
        micro=asked.micro,
        accumulated=asked.prompts // asked.micro,
        steps=asked.steps,
        new=asked.new,
        gpu=gpu,
        teacher_dtype="bfloat16",
    )
    return {"seconds": seconds, "roles": {}}


def run_side(side: str, folder: Path, asked: argparse.Namespace) -> None:
    import torch

    found = {"reflux": side_reflux, "trl": side_trl}[side](folder, asked)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print("RESULT " + json.dumps({**found, "peak_bytes": peak}))


def compare(folder: Path, asked: argparse.Namespace) -> None:
    pythons, ratios = {"reflux": sys.executable, "trl": asked.trl_python}, []
    sizes = {"--prompts": asked.prompts, "--new": asked.new, "--micro": asked.micro, "--steps": asked.steps}
    for number in range(asked.rounds):
        middle: dict[str, float] = {}
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            found = in_process(pythons[side], __file__, side, folder, sizes)
            first, *others = found["seconds"]
            middle[side] = statistics.median(others)
            roles = ", ".join(f"{role} {spent:.2f}" for role, spent in found["roles"].items())
            print(
                f"round {number + 1}: {side} {middle[side]:.2f} s a step, first {first:.1f} s, peak "
                f"{found['peak_bytes'] / 1e9:.1f} GB {roles}",
                flush=True,
            )
        ratios.append(middle["reflux"] / middle["trl"])
    print(f"reflux / trl {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64, help="prompts per step")
    parser.add_argument("--new", type=int, default=256, help="new tokens per prompt")
    parser.add_argument("--micro", type=int, default=16, help="texts of one micro-batch of TRL")
    parser.add_argument("--steps", type=int, default=6, help="steps per process, the first one included")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--trl-python", default=sys.executable, help="the interpreter of an environment with trl 1.16"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        run_side(asked.side, asked.folder, asked)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_models(Path(scratch), asked.tiny)
        write_prompts(Path(scratch), asked.tiny)
        compare(Path(scratch), asked)


if __name__ == "__main__":
    main()
