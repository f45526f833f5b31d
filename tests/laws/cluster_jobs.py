"""Runs on a cluster of Ray: `python cluster_jobs.py FOLDER STUDENT TEACHER` makes all of them in one process,
on one cluster of this machine, and ends as the last of them ends it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent))

import ray

import tiny
from reflux.cluster import placing
from reflux.cluster.actors import RankActor
from reflux.cluster.base import Bundle
from reflux.cluster.pool import Call, Pool
from reflux.cluster.sent_weights import SentWeights
from reflux.loop import train
from reflux.training import Options

STEPS = 3
# Of two processes that share the student, the second one is killed after this step.
DIES_AFTER = 2
# Two attempts a prompt and log-probs when they arrive, so that a lost share is more than a row.
RUN: dict[str, Any] = {
    "steps": STEPS,
    "prompts_per_step": 5,
    "group_size": 2,
    "sampler.dtype": "float32",
    "loss_aggregation": "token-mean",
    "credit.release": {"segments": 4, "min_segments": 4, "min_side": 1},
}
PLACED = {
    "kind": "ray",
    "samplers": 2,
    "teachers": {"main": 2},
    "cpus_per_sampler": 0.5,
    "cpus_per_teacher": 0.5,
    "cpus_per_rank": 0.5,
}
DIVIDED = {"kind": "ray", "learner_ranks": 2, "cpus_per_rank": 0.5}


def pid(actor: Any) -> int:
    """The process of an actor."""
    return os.getpid()


class Seen(tiny.Heard):
    """Writes its notes, and how many versions of the weights are held after each step."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def stepped(self, metrics: dict[str, Any]) -> None:
        gc.collect()
        held = sum(type(each) is SentWeights for each in gc.get_objects())
        with (self.folder / "held.jsonl").open("a") as file:
            file.write(f"{held}\n")
        if self.folder.name == "divided" and metrics["step"] == DIES_AFTER:
            os.kill(Remembering.ranks[0], signal.SIGKILL)

    def noted(self, text: str) -> None:
        super().noted(text)
        with (self.folder / "notes.jsonl").open("a") as file:
            file.write(json.dumps(text) + "\n")


class Killing(Pool):
    """Kills the actor that gets the fifth share of its pool, while it works on it. The preflight is left out,
    so these are shares of the third step.
    """

    given = 0

    async def least(self, size: int, call: Call) -> Any:
        self.given += 1
        if self.given != 5:
            return await super().least(size, call)
        pids = {member.actor: await member.actor.__ray_call__.remote(pid) for member in self.members}

        def killing(actor: Any) -> Any:
            result = call(actor)
            if (pid := pids.pop(actor, None)) is not None:
                os.kill(pid, signal.SIGKILL)
            return result

        return await super().least(size, killing)


class Remembering(placing.RayCluster):
    """Knows the processes of the ranks that it has started."""

    ranks: ClassVar[list[int]] = []

    def place(self, actor: type, bundle: Bundle, *arguments: Any) -> Any:
        made = super().place(actor, bundle, *arguments)
        if actor is RankActor:
            self.ranks.append(ray.get(made.__ray_call__.remote(pid)))
        return made


def start() -> None:
    """One cluster for all runs. Ray gives its own processes 30 s to start. A busy machine may take longer."""
    for again in (True, True, False):
        try:
            ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=120 * 2**20)
        except Exception as error:
            if not again or "timed out during startup" not in str(error):
                raise
        else:
            return


def main(folder: Path, student: str, teacher: str) -> None:
    def run(name: str, **changes: Any) -> None:
        (folder / name).mkdir()
        watch = Seen(folder / name)
        cfg = tiny.config("full", student, teacher, **{**RUN, **changes})
        asyncio.run(train(cfg, Options(folder / name, watch=watch)))

    run("plain")
    start()
    run("placed", cluster=PLACED)
    placing.Pool = Killing  # type: ignore[misc]
    run("killed", cluster=PLACED)
    placing.Pool = Pool  # type: ignore[misc]
    learner = {"learner.kind": "fsdp", "learner.model": student, "learner.lr": 1e-3}
    placing.RayCluster = Remembering  # type: ignore[misc]
    run("divided", cluster=DIVIDED, **learner)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
