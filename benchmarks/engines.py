"""Engines side by side: the sampler and the teacher in this process and in a vLLM server, and the student on
one and on two ranks.

    python benchmarks/engines.py --vllm-python PATH [--rounds 3] [--threads 1]
    python benchmarks/engines.py --vllm-python PATH --models STUDENT TEACHER --prompts 8 --tokens 48
    python benchmarks/engines.py --parts ranks --rounds 3 --steps 8

Without --models it takes the embedded student and teacher. PATH is the interpreter that has vLLM (`make
vllm`). The prompts are those of the task word_problems. In each round every arm is measured once, in rotating
order, and its ratio to the first arm of the round is taken. Printed: the median over rounds with the lowest
and the highest. The server has as many threads as this process, and both share the cores of the machine.

sampler: tokens a second of one attempt for each prompt, where answers end by themselves; the difference
between the log-probs of the sampler and those of transformers in float32 on the same tokens, in nats; seconds
until a sampler has new weights. teacher: scored positions a second, without the prompts. ranks: seconds a
step of the quickstart's models and batch, with the learner `hf`, and with `fsdp` under torchrun.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from engines_parts import compare_samplers, compare_teachers
from engines_ranks import RANK_ARMS, seconds_a_step
from engines_table import Asked, Table, in_turns, machine

PARTS = ("sampler", "teacher", "ranks")


async def compare_ranks(asked: Asked, steps: int) -> None:
    table = Table("seconds a step")

    def arm(name: str) -> Callable[[], Awaitable[float]]:
        return lambda: asyncio.to_thread(seconds_a_step, name, steps, asked.threads, asked.folder)

    await in_turns(table, asked.rounds, {name: arm(name) for name in RANK_ARMS}, warm=False)
    table.print("learner")


async def measure(asked: Asked, parts: Sequence[str], steps: int) -> None:
    if "sampler" in parts:
        await compare_samplers(asked)
    if "teacher" in parts:
        await compare_teachers(asked)
    if "ranks" in parts:
        await compare_ranks(asked, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--url", help="a server that runs, with the model that --models names twice")
    parser.add_argument("--models", nargs=2, metavar=("STUDENT", "TEACHER"), help="folders of other models")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a round (64)")
    parser.add_argument("--tokens", type=int, default=64, help="the longest answer in tokens (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="counted steps of a run on ranks (8)")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts, separated by commas")
    told = parser.parse_args()
    parts = told.parts.split(",")
    if unknown := sorted({*parts} - {*PARTS}):
        parser.error(f"there is no part {unknown[0]!r}. There are {', '.join(PARTS)}")
    if told.url and (not told.models or told.models[0] != told.models[1]):
        parser.error("--url needs --models MODEL MODEL, because one server has one model")
    # Read by servers and ranks when they start.
    os.environ["OMP_NUM_THREADS"] = str(told.threads)
    import torch

    torch.set_num_threads(told.threads)
    student, teacher = told.models or ("reflux:student", "reflux:teacher")
    print(machine(told.threads), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        asked = Asked(
            *(told.vllm_python, student, teacher, told.prompts, told.tokens, told.rounds, told.threads),
            folder=Path(scratch),
            url=told.url,
        )
        asyncio.run(measure(asked, parts, told.steps))
    print(f"\n{told.rounds} rounds; {machine(told.threads)}")


if __name__ == "__main__":
    main()
