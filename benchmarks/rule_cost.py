"""The time that each rule adds to a step: the same run with and without the rule in turns, on the
quickstart's models, prompts and lengths.

    python benchmarks/rule_cost.py [--rounds 5] [--steps 20] [--threads 2] [--arms margin,release]

A step has 8 prompts x 8 attempts, sampled reverse KL and graded answers. The learning rate is so small that
every arm samples the same answers. One process is one arm. A round is one process of each arm, in rotating
order. Printed: the median seconds per step of each round and the ratio to the plain run of the round, with
its spread. Also printed is the share of a step that is spent in work that the rules add: the rules
themselves, the pass through the teacher's head that they require, contexts, character spans of tokens. This
share is measured inside each process, so it does not depend on the machine's load.

`peers` is compared with the same self teacher with the plain prompt. Its teacher reads three more attempts
per answer, so it measures the cost of the method. `peers_words` builds the same contexts but uses the plain
prompt, so it measures the cost of the rule.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# the number of warm-up steps of each process, which are not counted
WARM = 3
COMMON: dict[str, Any] = {
    "base": "toy",
    "prompts_per_step": 8,
    "group_size": 8,
    "loss_aggregation": "seq-mean-token-mean",
    "save_every": 10_000,
    "eval_every": 10_000,
    "learner.lr": 1e-7,
    "rewards": {"verifier": {}},
    "evals": "none",
}
OWN = {"kind": "self", "ema": 0.05}
# By arm: the arm that it is compared with, and its changes.
ARMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "release": ("plain", {"credit.release": {"segments": 4, "min_segments": 4, "min_side": 1}}),
    "release_sentences": (
        "plain",
        {"credit.release": {"segments": "sentences", "min_segments": 4, "min_side": 1}},
    ),
    "margin": ("plain", {"credit.margin": {}}),
    "balance": ("plain", {"credit.balance": {}}),
    "extrapolate": ("plain", {"extrapolation": {"kind": "extrapolate", "tries": 0}}),
    "self": (None, {"teachers.main": OWN}),
    "peers_words": ("self", {"teachers.main": {**OWN, "context": {"kind": "rule_cost:Unsaid"}}}),
    "peers": ("self", {"teachers.main": {**OWN, "context": {"kind": "peers"}}}),
}


def __getattr__(name: str) -> Any:
    """`rule_cost:Unsaid`, created on first use, so that the rest of this script starts without the
    library.
    """
    if name != "Unsaid":
        raise AttributeError(name)
    from reflux.contexts.base import TeacherPrompt
    from reflux.contexts.peers import Peers

    class Unsaid(Peers):
        """Builds the contexts of `peers` and then uses the plain prompt."""

        def __call__(self, group: Any, step_context: Any) -> list[TeacherPrompt | None]:
            super().__call__(group, step_context)
            return [TeacherPrompt(attempt.rollout.prompt.messages) for attempt in group]

    return Unsaid


def run_arm(arm: str, steps: int, threads: int, out: Path) -> None:
    import asyncio

    from reflux.config.recipe import load_recipe
    from reflux.loop import train
    from reflux.training import Options

    changes = {**COMMON, **ARMS[arm][1], "steps": steps + WARM, "threads": threads}
    changes.pop("base")
    spent = watch_added_work()
    asyncio.run(train(load_recipe("opd", changes), Options(out)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(row["tokens_sampled"] for row in rows)
    seconds = [row["seconds"]["total"] for row in rows][WARM:]
    share = sum(added for done, added in spent if done > WARM) / steps / statistics.median(seconds)
    print("RESULT " + json.dumps({"seconds": seconds, "tokens": tokens, "share": share}))


def watch_added_work() -> list[tuple[int, float]]:
    """(step, seconds) of every later call of the functions that rules add to a step. A step begins when its
    attempts are sampled.
    """
    from reflux import loop
    from reflux.models.spans import CharacterSpans
    from reflux.teachers import collection
    from reflux.teachers.in_process_teacher import InProcess

    spent: list[tuple[int, float]] = []
    shared = [0]

    def timed(work: Any) -> Any:
        def timing(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*given)
            finally:
                spent.append((shared[0] + 1, time.perf_counter() - started))
                shared[0] += work is share

        return timing

    share = loop.share_credit
    loop.share_credit = timed(share)
    for owner, name in ((InProcess, "_logp"), (collection, "_missing"), (CharacterSpans, "of_turns")):
        setattr(owner, name, timed(getattr(owner, name)))
    return spent


def measure(arm: str, steps: int, threads: int, folder: Path) -> tuple[float, float]:
    """(median seconds per step, share of a step in work that the rules add) of one process."""
    here = Path(__file__).parent
    paths = os.pathsep.join(
        filter(None, [str(here.parent / "src"), str(here), os.environ.get("PYTHONPATH", "")])
    )
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [
        sys.executable,
        __file__,
        "--one",
        arm,
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{arm} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads(lines[0].removeprefix("RESULT "))
    return statistics.median(result["seconds"]), result["share"]


def compare(arms: list[str], rounds: int, steps: int, threads: int) -> dict[str, list[tuple[float, float]]]:
    """(median seconds per step, share) of every round, by arm."""
    rows: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            turn = arms[number % len(arms) :] + arms[: number % len(arms)]
            for arm in turn:
                rows[arm].append(measure(arm, steps, threads, Path(scratch)))
                print(
                    f"round {number + 1}: {arm} {rows[arm][-1][0]:.4f} s a step, {rows[arm][-1][1]:.2%} "
                    "added",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=20, help="measured steps per process, after three warm-up steps"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--arms",
        default=",".join(ARMS),
        help="rules, separated by commas; the arms they are compared with are added",
    )
    parser.add_argument("--one", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        run_arm(asked.one, asked.steps, asked.threads, asked.out)
        return
    wanted = asked.arms.split(",")
    arms = [arm for arm in ARMS if arm in wanted or any(ARMS[name][0] == arm for name in wanted)]
    print_table(compare(arms, asked.rounds, asked.steps, asked.threads))
    print(
        f"medians over {asked.rounds} rounds of the median of {asked.steps} steps (lowest to highest round), "
        f"{asked.threads} threads"
    )


def print_table(rows: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{'arm':18} {'s/step':26} {'to':8} {'ratio':24} share of a step in added work")
    for arm, own in rows.items():
        plain = ARMS[arm][0]
        ratios = [a / b for (a, _), (b, _) in zip(own, rows[plain], strict=True)] if plain else []
        share = _spread([100 * added for _, added in own], 2)
        print(
            f"{arm:18} {_spread([s for s, _ in own], 4):26} {plain or '':8} "
            f"{_spread(ratios, 3) if ratios else '':24} {share} %"
        )


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
