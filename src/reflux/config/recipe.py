"""Read a recipe (TOML) into one tree of frozen, validated values.

A recipe sets some keys. The others come from its `base`: another recipe, a shipped base, or a file. A new
kind in a table drops the old kind's keys of that table. In such a table a key whose value is "base" gets the
old table as its value. Keys that a shipped recipe needs on one scale only are in that scale's file, under
`[methods.RECIPE]`. `key.path=value` overrides are merged last; the value is TOML, or else plain text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.cluster.base import Cluster
from reflux.config import registry
from reflux.config.bases import read_recipe, resolve
from reflux.config.context import Numbers, PartContext, Placement
from reflux.config.overrides import merge, nest, split_override, unpack
from reflux.config.refresh import Refresh
from reflux.config.registry import STRICT, PartOf
from reflux.config.requirements import Requirements
from reflux.config.shares import without_shares
from reflux.config.step_context import SamplingParams
from reflux.config.thresholds import Health
from reflux.credit.base import CreditRule
from reflux.errors import ConfigError, RunError
from reflux.evals.base import Eval
from reflux.extrapolation.base import Extrapolation
from reflux.learners.base import Learner
from reflux.objectives.base import Objective
from reflux.rewards.base import RewardFn
from reflux.samplers.base import Sampler
from reflux.tasks.base import Task
from reflux.teachers.base import Teacher

Count = Annotated[int, Field(ge=1)]
# the checks of the preflight that can fail
Check = Literal["all", "disk", "ends", "gradient", "identity", "parity", "prompts", "teacher"]
# keys that do not change what a run computes
UNCOUNTED = ("track", "skip_checks", "health", "trace")


@dataclass(frozen=True, config=STRICT)
class Track:
    """The tracker that also gets the run's metrics. Nothing is sent unless this table names a tracker."""

    kind: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    project: str = "reflux"
    name: str | None = None


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The whole configuration of one run. The class defaults are recommended values."""

    task: Annotated[Task, PartOf("tasks")]
    sampler: Annotated[Sampler, PartOf("samplers", default="hf")]
    learner: Annotated[Learner, PartOf("learners", default="hf")]
    objectives: Annotated[tuple[Objective, ...], PartOf("objectives", many="list")]
    teachers: Annotated[dict[str, Teacher], PartOf("teachers", many="table", default="local")] = Field(
        default_factory=dict
    )
    credit: Annotated[dict[str, CreditRule], PartOf("credit", many="table")] = Field(default_factory=dict)
    rewards: Annotated[dict[str, RewardFn], PartOf("rewards", many="table")] = Field(default_factory=dict)
    refresh: Refresh | None = None
    extrapolation: Annotated[Extrapolation | None, PartOf("extrapolation")] = None
    evals: Annotated[dict[str, Eval], PartOf("evals", many="table")] = Field(default_factory=dict)
    # the processes of samplers, teachers and learner ranks; not set: all parts are in one process
    cluster: Annotated[Cluster | None, PartOf("cluster", default="ray")] = None
    track: Track = Track()
    health: Health = Health()
    recipe: str = "unnamed"
    steps: Annotated[int, Field(ge=0)] = 200
    prompts_per_step: Count = 64
    group_size: Count = 1
    # at most so many optimiser steps lie between the oldest token of an attempt and its training
    max_staleness: Annotated[int, Field(ge=0)] = 0
    # the steps whose attempts are asked for in advance, at most max_staleness; not set: max_staleness. The
    # difference is the window: a slow attempt may be that many steps late before training waits for it
    ahead: Annotated[int | None, Field(ge=0)] = None
    # "ready": a step takes the oldest groups that are complete, and the weights change between two tokens.
    # "strict": steps take groups in the order of prompts, and the weights change between steps' groups only
    order: Literal["ready", "strict"] = "ready"
    seed: int = 0
    loss_aggregation: Literal["token-mean-weighted", "token-mean", "seq-mean-token-mean"] = (
        "token-mean-weighted"
    )
    save_every: Count = 50
    eval_every: Count = 50
    keep_checkpoints: Count = 2
    log_variance: bool = False
    # CPU threads of torch; 0: torch's own choice
    threads: Annotated[int, Field(ge=0)] = 0
    # checks of the preflight that are left out; "all" leaves out every check
    skip_checks: tuple[Check, ...] = ()
    # use only deterministic algorithms of torch, so that a run on one GPU repeats bit for bit
    deterministic: bool = False
    # write trace.json, which shows in any trace viewer when each part worked and which one waited
    trace: bool = False

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError(
                "objectives: at least one [[objectives]] table is needed, because without an objective there "
                "is no loss"
            )
        if taken := sorted({*self.evals} & {"step", "health"}):
            raise ValueError(f"evals.{taken[0]}: evals.jsonl has this key already. Choose another name.")

    @property
    def training_positions(self) -> int:
        """The most positions that an attempt may have, over all optimiser steps."""
        return max(self.sampler.draw(step).max_positions for step in range(max(1, self.steps)))

    @property
    def evaluation_positions(self) -> int:
        """The most positions that an attempt of an evaluation, or of extrapolation's score, may have. Length
        schedules of training do not change it.
        """
        return self.sampler.evaluation_positions

    @property
    def steps_ahead(self) -> int:
        """The number of later steps whose attempts are in progress or finished while a step is trained."""
        return self.max_staleness if self.ahead is None else self.ahead

    def draw(self, step: int, cohort: int | None = None) -> SamplingParams:
        """The sampling parameters of the attempts for optimiser step `step` (from 0). cohort: the number of
        groups that are requested together; None: those of a step.
        """
        return dataclasses.replace(self.sampler.draw(step), cohort=cohort or self.prompts_per_step)


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> RunConfig:
    """The validated config of a shipped recipe (by name) or a file, with overrides.

    Raises ConfigError if a key or value is invalid; the text of the error names the path of the key.
    """
    changes = overrides.items() if isinstance(overrides, Mapping) else map(split_override, overrides)
    values = {path: unpack(value) for path, value in changes}
    table = resolve(read_recipe(name), values.pop("base", None), name)
    for path, value in sorted(values.items(), key=lambda change: not change[0].endswith("kind")):
        # Kinds are set first, because a new kind drops the old kind's keys.
        table = merge(table, nest(path.split("."), value, table))
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> RunConfig:
    """The validated config of a recipe's table after its `base` and all overrides were merged in. Raises
    ConfigError if a key is missing, unknown or has an invalid value.
    """
    if "reward" in table:
        raise ConfigError(
            "reward: there is no key `reward`. Rewards are named tables: write [rewards.verifier] for the "
            'reward of kind "verifier".'
        )
    for key in ("task", "sampler", "learner", "objectives"):
        if key not in table:
            raise ConfigError(
                f'{key}: this table is missing. Set base = "toy" or base = "hub", or write a [{key}] table.'
            )
    steps = table.get("steps", 200)
    table = without_shares(table)
    return registry.make(RunConfig, table, "", steps=steps if isinstance(steps, int) else 0)


def saved_table(folder: Path) -> dict[str, Any]:
    """The complete table in the config.toml of the run directory `folder`. Raises RunError if the file is
    damaged.
    """
    path = folder / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it, or start a new run.") from error
    if missing := [name for name in ("task", "sampler", "learner", "steps") if name not in table]:
        raise RunError(
            f"{path} is damaged: it has no {' and no '.join(missing)}. Restore it, or start a new run."
        )
    return table


def to_table(cfg: RunConfig) -> dict[str, Any]:
    """The table from which `from_table` makes the same config (law 10), with all defaults included."""
    return registry.fields_of(cfg)


def to_toml(cfg: RunConfig) -> str:
    return tomli_w.dumps(to_table(cfg))


def config_hash(cfg: RunConfig) -> str:
    """A hash of the config without UNCOUNTED, 12 hex digits. Two runs with the same hash
    do the same work.
    """
    table = {key: value for key, value in to_table(cfg).items() if key not in UNCOUNTED}
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=6).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """One line for each key whose value differs between the tables `old` and `new`. path: a prefix of the
    keys.
    """
    lines = []
    for key in sorted({*old, *new}):
        where, before, after = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{where}.")
        elif before != after:
            lines.append(f"{where}: was {before!r}, is {after!r}")
    return lines


def part_context(cfg: RunConfig, requirements: Requirements, name: str, run_folder: Path) -> PartContext:
    """The context of one part of a run in `run_folder`. requirements: those of all parts, from `checks.join`.
    name: the key of the part in the recipe, such as "learner".
    """
    return PartContext(
        name=name,
        seed=cfg.seed,
        requirements=requirements,
        student=cfg.learner.student,
        task=cfg.task,
        generation=cfg.sampler.generation,
        numbers=Numbers(
            cfg.steps,
            cfg.prompts_per_step,
            cfg.group_size,
            cfg.max_staleness,
            cfg.order,
            cfg.training_positions,
            cfg.evaluation_positions,
        ),
        folder=run_folder / "parts" / name,
        teachers=cfg.teachers,
        placement=Placement(cfg.threads, cfg.deterministic),
    )
