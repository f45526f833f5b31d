"""Gradients and runs of the learner `fsdp` on 1, 2 and 3 ranks: `python rank_jobs.py RANK FOLDER STUDENT
TEACHER` is one of three ranks, which do all of it one after the other. Everything is imported once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import tiny
from laws.test_ranks import CASES, NORMALISE, worlds
from reflux.config.recipe import RunConfig, load_recipe
from reflux.engines.process import free_port
from reflux.learners.fsdp_engine import FSDPLearner
from reflux.learners.group_shares import shares
from reflux.learners.hf_engine import HFLearner
from reflux.learners.rank_group import RankGroup
from reflux.learners.ranks import Ranks
from reflux.learners.shards import Shards
from reflux.loop import train
from reflux.loss.batch import plan
from reflux.models.dtensors import divided_like, gathered
from reflux.models.settings import Lora
from reflux.training import Options

RANKS = 3
# the numbers of ranks on which gradients alone are computed
GRADIENTS_OF = (2, 3)
CHAT = {"kind": "outside:Chat"}
QUICK: dict[str, Any] = {
    "prompts_per_step": 32,
    "threads": 1,
    "evals": "none",
    "learner.model": "reflux:student",
    "learner.lr": 1e-3,
    "learner.betas": [0.9, 0.95],
}
# Baselines and advantages of whole groups, credit from the current student's outputs, adapters, recomputed
# activations, and micro-batches of different numbers on the ranks.
GROUPS: dict[str, Any] = {
    "steps": 2,
    "prompts_per_step": 5,
    "group_size": 4,
    "task": CHAT,
    "rewards": {"verifier": {}},
    "credit": {"margin": {"student": "now"}, "group_advantage": {}},
    "objectives": [
        {"kind": "sampled_kl", "baseline": "leave_one_out"},
        {"kind": "divergence", "divergence": "jsd", "coef": 0.5},
        {"kind": "policy_gradient"},
    ],
    "learner.lora": {"rank": 3, "alpha": 6},
    "learner.gradient_checkpointing": True,
    "learner.micro_batch_tokens": 60,
    "skip_checks": [],
}
# credit from the current student's outputs, which the ranks compute for attempts that are stale
NOW: dict[str, Any] = {"group_size": 2, "rewards": {"verifier": {}}, "credit": {"margin": {"student": "now"}}}
# A teacher that follows the student, jumps along the student's path, and spectra of its weights.
FOLLOWING: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 3,
    "group_size": 4,
    "task": CHAT,
    "teachers.main.ema": 0.5,
    "extrapolation": {"kind": "extrapolate", "tries": 1, "accept": "not_worse", "prompts": 2},
    "eval_every": 1,
    "evals.foresight": {},
}


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
    # True if two teachers share the prompts
    routed: bool = False
    # the number of updates after which rank 1 is killed; 0: never
    dies: int = 0
    # True if the run must end with an error
    fails: bool = False

    def config(self, kind: str, student: str, teacher: str) -> RunConfig:
        if self.shipped:
            return load_recipe(self.recipe, {"learner.kind": kind, **QUICK, **self.changes})
        changes = {"learner.kind": kind, "learner.betas": [0.9, 0.95], **self.changes}
        if self.routed:
            local = {"kind": "local", "alias": "main"}
            changes["teachers"] = {
                "main": "none",
                "good": {**local, "model": teacher, "routes": ["even"]},
                "home": {**local, "model": student, "routes": ["odd"]},
            }
        return tiny.config(self.recipe, student, teacher, **changes)


def jobs() -> list[Job]:
    """The quickstart on every number of ranks, a step first and then the others; on changing numbers of
    ranks; and tiny runs.
    """
    quick = [
        Job(
            f"quick-{ranks}", ranks, "quickstart", {"steps": steps}, steps > 1, f"quick-{steps}", shipped=True
        )
        for ranks in (1, 2, 3)
        for steps in (1, 10)
    ]
    moved = [
        Job("moved", ranks, "quickstart", {"steps": steps}, steps > 1, plain, shipped=True)
        for ranks, steps, plain in ((3, 1, ""), (2, 2, ""), (1, 4, "quick-4"))
    ]
    groups = [Job(f"groups-{ranks}", ranks, "opd", GROUPS, plain="groups", routed=True) for ranks in (2, 3)]
    following = [
        Job(f"following-{ranks}", ranks, "everything", FOLLOWING, plain="following") for ranks in (2, 3)
    ]
    small = {"steps": 2, "task": CHAT}
    fade = {"position": {"weight": {"kind": "steps", "values": [0.0, 1.0], "boundaries": [1]}}}
    return [
        *quick,
        *moved,
        *groups,
        *following,
        # two ranks without a group
        Job("few", 3, "opd", {**small, "prompts_per_step": 1}, plain="few"),
        Job("few", 3, "opd", {**small, "prompts_per_step": 1}, resume=True),
        # The loop samples in one thread while the ranks learn in another.
        Job("late", 2, "opd", {**small, "steps": 4, "max_staleness": 1, **NOW}),
        # no rank has anything to learn in the first step
        Job("fading", 2, "opd", {**small, "credit": fade, "log_variance": False}, plain="fading"),
        Job("hot", 2, "opd", {**small, "steps": 6, "learner.lr": 1e30}, fails=True),
        Job("dying", 2, "opd", {**small, "steps": 5, "save_every": 1}, plain="dying", dies=2),
    ]


def main(rank: int, folder: Path, student: str, teacher: str) -> None:
    for ranks in GRADIENTS_OF:
        if rank < ranks:
            take_rank(rank, ranks, folder / f"gradients-{ranks}.port")
            gradients(folder / f"gradients-{ranks}.pt")
    for number, job in enumerate(jobs()):
        if rank >= job.ranks:
            continue
        take_rank(rank, job.ranks, folder / f"{number}.port")
        if job.dies and rank == 1:
            die_after(job.dies)
        try:
            cfg = job.config("fsdp", student, teacher)
            asyncio.run(train(cfg, Options(folder / job.name, job.resume)))
        except Exception:
            (folder / f"{job.name}.{rank}.error").write_text(traceback.format_exc())
            if not job.fails:
                raise


def take_rank(rank: int, ranks: int, file: Path) -> None:
    """Describe the group in the environment, as torchrun does. Rank 0 writes the group's port to the file."""
    if rank == 0:
        part = file.with_suffix(".part")
        part.write_text(str(free_port()))
        part.rename(file)
    while not file.exists():
        time.sleep(0.01)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": file.read_text()}


def adapted(ranks: Ranks | None = None) -> HFLearner:
    """The learner of `worlds` with adapters of random numbers, in which no two matrices are equal."""
    plain, _ = worlds()
    cfg = replace(plain.cfg, lora=Lora(rank=3, alpha=6))
    learner = HFLearner(cfg, plain.context, plain.services, plain.model, ranks)
    with torch.no_grad():
        for seed, parameter in enumerate(learner.trained.values()):
            torch.manual_seed(seed)
            whole = torch.randn(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(divided_like(parameter, whole))
    return learner


def gradients(file: Path) -> None:
    """The gradients of every case of `test_ranks.py` in float64, in several micro-batches. Rank 0 saves them,
    whole, and the adapter that it publishes.
    """
    group = RankGroup.join("cpu")
    plain, groups = worlds()
    cfg = replace(plain.cfg, micro_batch_tokens=30)
    learner = HFLearner(cfg, plain.context, plain.services, plain.model, Shards(group))
    mine = [groups[index] for index in shares(groups, group.size)[group.rank]]
    found = {}
    for name, objectives in CASES.items():
        # The aggregations differ in their counts alone, which one number of ranks shows.
        for loss_aggregation in NORMALISE if group.size == 2 else NORMALISE[:1]:
            learner.optimiser.zero_grad()
            learner.gradients(plan(mine, objectives, loss_aggregation, learner.ranks.counts), objectives)
            for key, parameter in learner.trained.items():
                assert parameter.grad is not None
                found[f"{name}/{loss_aggregation}/{key}"] = gathered(parameter.grad)
    local = adapted(Shards(group))
    if group.leads:
        adapter = FSDPLearner(local, group).publish().adapter
        assert adapter is not None
        torch.save(found, file)
        torch.save([adapter.config, dict(adapter.read())], file.with_name(f"adapter-{group.size}.pt"))
    else:
        # until rank 0 says that it leaves
        while (order := group.receive()) is not None:
            work, arguments = order
            work(local, *arguments)
    group.leave()


def die_after(updates: int) -> None:
    whole = HFLearner.gradients

    def broken(self: Any, *args: Any) -> Any:
        if self.updates == updates:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *args)

    HFLearner.gradients = broken  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
