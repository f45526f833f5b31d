"""One run that is killed with SIGKILL at random moments and resumed each time: `python kill_often.py STUDENT
TEACHER FOLDER KILLS SEED`. Prints what the parent saw, as JSON.

Everything is imported once. Each life of the run is a fork that has not computed anything yet.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401  resolved before the forks

import tiny
from processes import alive, wait_for
from reflux.loop import train
from reflux.runtime.watch import Silent
from reflux.training import Options

SETTINGS: dict[str, Any] = {
    "steps": 50, "save_every": 2, "group_size": 2, "prompts_per_step": 2, "max_staleness": 3, "ahead": 2,
    "sampler__turns": "ready", "rewards": {"verifier": {}}, "evals": {}, "keep_checkpoints": 2,
}  # fmt: skip
# a life that does not come to its next step in this time has hung
HANGS_S = 120


class Notes(Silent):
    def __init__(self, path: Path):
        self.path = path

    def noted(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{text}\n")


def live(cfg: Any, folder: Path) -> int:
    """Start or go on with the run in a fork, and give its process id."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        code = 1
        try:
            resume = (folder / "config.toml").exists()
            asyncio.run(train(cfg, Options(folder, resume, Notes(folder.with_suffix(".notes")))))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return child


def descendants(pid: int) -> Iterator[int]:
    """The processes that this one has started, and those that they have started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            child = int(path.parent.name)
            yield child
            yield from descendants(child)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(student: str, teacher: str, folder: Path, kills: int, seed: int) -> None:
    cfg = tiny.config("rl_opd", student, teacher, task={"kind": "outside:Once", "replies": 2}, **SETTINGS)
    rng, orphans, killed = random.Random(seed), 0, 0
    for _ in range(kills):
        child, before, until = live(cfg, folder), steps_done(folder), time.monotonic() + HANGS_S
        # It is killed while it starts, or some time after a step.
        late = rng.random() > 0.1
        ended = 0
        while not ended and late and steps_done(folder) <= max(0, before - 2) and time.monotonic() < until:
            time.sleep(0.01)
            ended = os.waitpid(child, os.WNOHANG)[0]
        time.sleep(rng.uniform(0, 0.4))
        if not ended:
            young = [*descendants(child)]
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
            wait_for(lambda started=tuple(young): not any(map(alive, started)))
            orphans += sum(map(alive, young))
    last = os.waitstatus_to_exitcode(os.waitpid(live(cfg, folder), 0)[1])
    print(json.dumps({"killed": killed, "orphans": orphans, "last": last}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
