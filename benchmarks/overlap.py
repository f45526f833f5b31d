"""Steps per second where sampling goes on while the learner steps, over those of the synchronous loop, with a
slow tool and without one.

    python benchmarks/overlap.py [--rounds 5] [--steps 30] [--delays 0.05,0] [--staleness 2]

Each side is a process of its own, and a round is one process of each side in alternating order. The
synchronous side is measured with one thread and with two; the other side computes on one thread for the
sampler and one for learner and teacher. Models, prompts and lengths are the same: the embedded student and
teacher, 16 prompts a step, attempts of four turns and at most 120 tokens, and between two turns a reply that
takes so many seconds. Printed: the median seconds per step of each round, and the ratio of medians with its
spread over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# sides: max_staleness above 0 or not, and the threads of torch
SIDES = {"sync, 1 thread": (False, 1), "sync, 2 threads": (False, 2), "async, 1 + 1": (True, 2)}
WARM = 5


def seconds_per_step(delay_s: float, staleness: int, threads: int, steps: int) -> tuple[float, float]:
    """The median wall-clock time of a step without the first ones, and the mean staleness."""
    import reflux
    from reflux.storage.files import read_lines

    settings = {
        "task": {"kind": "overlap_task:SlowUser", "delay_s": delay_s},
        "steps": steps + WARM, "eval_every": 10**6, "save_every": 10**6, "evals": "none",
        "prompts_per_step": 16, "group_size": 1, "max_staleness": staleness, "threads": threads,
        "sampler.max_tokens": 120, "sampler.turns": "ready" if staleness else "together",
        "skip_checks": ["all"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        reflux.run("full", settings, out=Path(scratch) / "run")
        rows = list(read_lines(Path(scratch) / "run" / "metrics.jsonl"))[WARM:]
    return (
        statistics.median(row["seconds"]["total"] for row in rows),
        statistics.mean(row["staleness_mean"] for row in rows),
    )


def measured(delay_s: float, staleness: int, threads: int, steps: int) -> tuple[float, float]:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--one", str(delay_s), str(staleness), str(threads), str(steps)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds, lag = json.loads(done.stdout.splitlines()[-1])
    return seconds, lag


def compare(delay_s: float, staleness: int, rounds: int, steps: int) -> None:
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in list(SIDES)[:: 1 if number % 2 else -1]:
            overlaps, threads = SIDES[side]
            seconds, lag = measured(delay_s, staleness if overlaps else 0, threads, steps)
            found[side].append(seconds)
            print(f"  round {number + 1}: {side}: {seconds:.3f} s a step, staleness {lag:.2f}", flush=True)
    ours = found["async, 1 + 1"]
    for side, theirs in found.items():
        if theirs is not ours:
            ratios = [other / own for other, own in zip(theirs, ours, strict=True)]
            print(
                f"delay {delay_s:g} s: async makes {statistics.median(ratios):.2f} times the steps of {side} "
                f"({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--delays", default="0.05,0")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        delay_s, staleness, threads, steps = asked.one
        print(json.dumps(seconds_per_step(float(delay_s), int(staleness), int(threads), int(steps))))
        return
    for delay_s in map(float, asked.delays.split(",")):
        compare(delay_s, asked.staleness, asked.rounds, asked.steps)


if __name__ == "__main__":
    main()
