"""Runs of the learner `fsdp` on 1, 2 and 3 ranks: `python rank_jobs.py RANK FOLDER STUDENT TEACHER PORT...` is
one of three ranks, which do all the jobs one after the other. Everything is imported once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from reflux.config.recipe import RunConfig, load_recipe
from reflux.learners.hf_engine import HFLearner
from reflux.loop import train
from reflux.training import Options

RANKS = 3
QUICK: dict[str, Any] = {"prompts_per_step": 32, "threads": 1, "evals": "none", "learner.model": "reflux:student"}
QUICK |= {"learner.lr": 1e-3, "learner.betas": [0.9, 0.95]}
CHAT = {"kind": "outside:Chat"}
ROUTED = {"kind": "outside:Domains"}
TWO = {"one": {"alias": "main", "routes": ["one"]}, "other": {"alias": "main", "routes": ["other"]}}


@dataclass(frozen=True)
class Job:
    """A run, or its continuation. name: of the run directory. plain: as a run of the learner `hf`, which the
    ranks are compared with, in a folder of this name.
    """

    name: str
    ranks: int
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    plain: str = ""
    shipped: bool = False
    # the number of updates after which rank 1 is killed; 0: never
    dies: int = 0

    def config(self, kind: str, student: str, teacher: str) -> RunConfig:
        if self.shipped:
            return load_recipe(self.recipe, {"learner.kind": kind, **QUICK, **self.changes})
        changes = {"learner.kind": kind, "learner.betas": [0.9, 0.95], **self.changes}
        return tiny.config(self.recipe, student, teacher, **changes)


def everything() -> dict[str, Any]:
    """Two routed teachers, whole groups of attempts, credit from the current student's outputs, adapters."""
    return {
        "steps": 2,
        "prompts_per_step": 3,
        "group_size": 4,
        "task": {"kind": "outside:Chat"},
        "credit.margin.student": "now",
        "learner.lora": {"rank": 3, "alpha": 6},
        "learner.gradient_checkpointing": True,
        "learner.micro_batch_tokens": 60,
        "skip_checks": [],
    }


def jobs() -> list[Job]:
    quick = [
        Job(f"quick-{ranks}", ranks, "quickstart", {"steps": steps}, steps > 1, f"quick-{steps}", True)
        for ranks in (1, 2, 3)
        for steps in (1, 10)
    ]
    moved = [
        Job("moved", 3, "quickstart", {"steps": 1}, False, "", True),
        Job("moved", 2, "quickstart", {"steps": 2}, True, "", True),
        Job("moved", 1, "quickstart", {"steps": 4}, True, "quick-4", True),
    ]
    return [*quick, *moved]


def main(rank: int, folder: Path, student: str, teacher: str, ports: list[str]) -> None:
    for job, port in zip(jobs(), ports, strict=True):
        if rank >= job.ranks:
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if job.dies and rank == 1:
            die_after(job.dies)
        try:
            cfg = job.config("fsdp", student, teacher)
            asyncio.run(train(cfg, Options(folder / job.name, job.resume)))
        except Exception:
            (folder / f"{job.name}.{rank}.error").write_text(traceback.format_exc())


def die_after(updates: int) -> None:
    gradients = HFLearner.gradients

    def broken(self: Any, *args: Any) -> Any:
        if self.updates == updates:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradients(self, *args)

    HFLearner.gradients = broken  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
