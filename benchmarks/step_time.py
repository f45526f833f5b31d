"""Seconds per step of Reflux and of TRL's DistillationTrainer in turns, on the same models, prompts, batch
and lengths.

    python benchmarks/step_time.py [--rounds 5] [--steps 8] [--threads 2] [--trl-python PATH]
    python benchmarks/step_time.py --lengths 64,256,1024 --batches 16,64
    python benchmarks/step_time.py --models STUDENT TEACHER --prompts FILE --batches 8 --lengths 48

The second command measures every pair of length and batch in one table. The third one takes two models of
your own, with their chat template and as they are, and a jsonl file with a column prompt, messages or
question. Answers of this student must not end early; those of the recipe `smollm` do not. Else it stops and
says so. The loss is the exact reverse KL on
the student's answers, with 64 prompts per step and 80 new tokens each, on the CPU in float32. Answers cannot
end early: the models are copied with an end token that is almost never sampled, so both sides process the
same number of tokens, and with a context window that holds the longest answer. Each side runs in a separate
process. One round is one process of each side, in alternating order. Printed: the median seconds per step of
each round, the ratio with its spread over rounds, and peak resident memory. TRL (1.16) may be in another
environment: pass its interpreter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from trl_steps import in_process, trl_seconds

# no prompt is longer than this
PROMPT_TOKENS = 256
# a token that the models never sample; it replaces the end token
NEVER = "<system>"


@dataclass(frozen=True)
class Shape:
    """The shape of a step: `batch` prompts with an answer of `length` tokens each. `steps` steps are counted,
    on `threads` threads, after `warm` steps that are not.
    """

    batch: int
    length: int
    steps: int
    threads: int
    warm: int


@dataclass
class Found:
    """By side: the median seconds per step of each round, and the highest resident memory."""

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]

    @property
    def ratios(self) -> list[float]:
        return [
            ours / theirs for ours, theirs in zip(self.seconds["reflux"], self.seconds["trl"], strict=True)
        ]


def never_ending(source: Path, target: Path, tokens: int) -> None:
    """Write a copy of a shipped model that cannot end an answer, has no chat template, and has a context
    window of at least `tokens`.
    """
    shutil.copytree(source, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    vocabulary = json.loads((target / "tokenizer.json").read_text())["model"]["vocab"]
    for name in ("config.json", "generation_config.json"):
        table = json.loads((target / name).read_text())
        if name == "config.json":
            table["max_position_embeddings"] = max(table["max_position_embeddings"], tokens)
        (target / name).write_text(json.dumps({**table, "eos_token_id": vocabulary[NEVER]}))
    table = json.loads((target / "tokenizer_config.json").read_text())
    table.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps({**table, "eos_token": NEVER}))


def prepare(folder: Path, batch: int, length: int) -> None:
    """Write the models and prompts that both sides read."""
    from reflux.models.locations import ASSETS
    from reflux.tasks.word_problems import WordProblems

    for name in ("student", "teacher"):
        never_ending(ASSETS / name, folder / name, PROMPT_TOKENS + length)
    prompts = islice(WordProblems().prompts("train", 0), batch * 64)
    rows = [{"id": prompt.id, "prompt": prompt.messages[-1]["content"]} for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def link(folder: Path, models: list[str], prompts: Path, rows: int) -> None:
    """Link the user's models into the folder, and write `rows` prompts of a file, from its start again where
    it has fewer, as chats.
    """
    for name, model in zip(("student", "teacher"), models, strict=True):
        (folder / name).symlink_to(Path(model).resolve(), target_is_directory=True)
    given = [json.loads(line) for line in prompts.read_text().splitlines()]
    with (folder / "prompts.jsonl").open("w") as file:
        for number, row in enumerate(islice(cycle(given), rows)):
            asked = next(row[key] for key in ("prompt", "messages", "question") if key in row)
            chat = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            file.write(json.dumps({"id": str(number), "prompt": chat}) + "\n")


def side_reflux(folder: Path, shape: Shape) -> None:
    import asyncio

    from reflux.config.recipe import from_table
    from reflux.loop import train
    from reflux.training import Options

    table = {
        "recipe": "step_time",
        "steps": shape.steps + shape.warm,
        "prompts_per_step": shape.batch,
        "threads": shape.threads,
        # On a real model they take as long as several steps.
        "skip_checks": ["all"],
        "task": {"kind": "jsonl", "path": str(folder / "prompts.jsonl"), "validation": 0.0},
        "sampler": {"kind": "hf", "max_tokens": shape.length},
        "learner": {"kind": "hf", "model": str(folder / "student"), "lr": 1e-6},
        "teachers": {"main": {"kind": "local", "model": str(folder / "teacher")}},
        "objectives": [{"kind": "divergence", "divergence": "reverse"}],
        "save_every": 10_000,
    }
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    asyncio.run(train(from_table(table), Options(out)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    share = sum(row["tokens_sampled"] for row in rows) / (len(rows) * shape.batch * shape.length)
    assert share > 0.98, (
        f"{1 - share:.1%} of the tokens are missing because answers ended early: the comparison is not fair"
    )
    _report([row["seconds"]["total"] for row in rows][shape.warm :])


def side_trl(folder: Path, shape: Shape) -> None:
    import torch

    torch.set_num_threads(shape.threads)
    seconds = trl_seconds(
        folder,
        micro=shape.batch,
        accumulated=1,
        steps=shape.steps + shape.warm,
        new=shape.length,
        gpu=False,
        teacher_dtype="float32",
    )
    _report(seconds[shape.warm :])


def _report(seconds: list[float]) -> None:
    import resource

    print(
        "RESULT "
        + json.dumps(
            {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        )
    )


def measure(side: str, python: str, folder: Path, shape: Shape) -> tuple[float, int]:
    """(median seconds per step, peak bytes) of one process."""
    sizes = {
        "--batches": shape.batch,
        "--lengths": shape.length,
        "--steps": shape.steps,
        "--threads": shape.threads,
        "--warm": shape.warm,
    }
    result = in_process(python, __file__, side, folder, sizes, OMP_NUM_THREADS=str(shape.threads))
    return statistics.median(result["seconds"]), result["peak_bytes"]


def compare(pythons: dict[str, str], folder: Path, shape: Shape, rounds: int) -> Found:
    """Measure both sides in turns."""
    found = Found({"reflux": [], "trl": []}, {"reflux": 0, "trl": 0})
    for number in range(rounds):
        for side in ("reflux", "trl") if number % 2 == 0 else ("trl", "reflux"):
            seconds, peak = measure(side, pythons[side], folder, shape)
            found.seconds[side].append(seconds)
            found.peak_bytes[side] = max(found.peak_bytes[side], peak)
        ours, theirs = (found.seconds[side][-1] for side in ("reflux", "trl"))
        print(
            f"{shape.batch} x {shape.length}, round {number + 1}: reflux {ours:.3f} s, trl {theirs:.3f} s a "
            "step",
            flush=True,
        )
    return found


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=8, help="measured steps per process, after the warm-up steps"
    )
    parser.add_argument("--warm", type=int, default=3, help="warm-up steps, which are not counted (3)")
    parser.add_argument(
        "--models", nargs=2, metavar=("STUDENT", "TEACHER"), help="folders of two models of your own"
    )
    parser.add_argument("--prompts", type=Path, help="jsonl file with prompts for them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--lengths", type=numbers, default=[80], help="new tokens per prompt, as in 64,256,1024"
    )
    parser.add_argument("--batches", type=numbers, default=[64], help="prompts per step, as in 16,64")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="the interpreter of an environment with trl 1.16"
    )
    parser.add_argument("--side", choices=("reflux", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if bool(asked.models) != bool(asked.prompts):
        parser.error("--models and --prompts belong together")
    shapes = [
        Shape(batch, length, asked.steps, asked.threads, asked.warm)
        for batch in asked.batches
        for length in asked.lengths
    ]
    if asked.side:
        {"reflux": side_reflux, "trl": side_trl}[asked.side](asked.folder, shapes[0])
        return
    pythons = {"reflux": sys.executable, "trl": asked.trl_python}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if asked.models:
            link(folder, asked.models, asked.prompts, max(asked.batches) * (asked.steps + asked.warm))
        else:
            prepare(folder, max(asked.batches), max(asked.lengths))
        print_table({shape: compare(pythons, folder, shape, asked.rounds) for shape in shapes})
    print(
        f"medians over {asked.rounds} rounds of the median of {asked.steps} steps (lowest to highest round), "
        f"{asked.threads} threads"
    )


def print_table(table: dict[Shape, Found]) -> None:
    print(
        f"\n{'batch':>5} {'length':>6}   {'reflux s/step':24} {'trl s/step':24} {'reflux / trl':20} "
        f"{'peak MB':>14}"
    )
    for shape, found in table.items():
        ours, theirs = (_spread(found.seconds[side], 3) for side in ("reflux", "trl"))
        peaks = " / ".join(f"{found.peak_bytes[side] / 1e6:,.0f}" for side in ("reflux", "trl"))
        print(
            f"{shape.batch:5} {shape.length:6}   {ours:24} {theirs:24} {_spread(found.ratios, 2):20} "
            f"{peaks:>14}"
        )


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
