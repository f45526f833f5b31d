"""Seconds a step of the quickstart with the learner `hf`, and with `fsdp` on one and two ranks. Each run has
processes of its own. Used by engines.py.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# steps of each run that are not counted
WARM = 3
# By arm: what starts it, and the kind of the learner.
RANK_ARMS = {
    "hf": ([], "hf"),
    "fsdp, 1 rank": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"], "fsdp"),
    "fsdp, 2 ranks": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "fsdp"),
}


def seconds_a_step(arm: str, steps: int, threads: int, folder: Path) -> float:
    """The median of `steps` steps of one run. threads: of each rank."""
    launcher, kind = RANK_ARMS[arm]
    left_out = ("accuracy", "agreement", "teacher_accuracy", "test_accuracy")
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    changes = {
        "learner.kind": kind,
        "learner.model": "reflux:student",
        "learner.lr": 1e-6,
        "steps": steps + WARM,
        "threads": threads,
        "save_every": 10_000,
        "eval_every": 10_000,
        "skip_checks": '["all"]',
        **{f"evals.{name}": "none" for name in left_out},
    }
    command = [sys.executable, *launcher, "-m", "reflux.cli.main", "run", "quickstart", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in changes.items())],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"]["total"] for row in rows[WARM:])
