"""The flow recipes at tiny scale: models of 22 thousand weights that know the glyphs' prompts, and configs
that name them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import tiny_flow
from device import exactly
from reflux.config.recipe import RunConfig, load_recipe
from reflux.config.requirements import Requirements
from reflux.tasks.glyphs import Glyphs
from reflux.training import Options, Run
from reflux.types import FlowRollout, Group, Prompt, VelocityTarget

NAMES = ("student", "digits", "counts")
RECIPES = ("flow", "flow_sft", "flow_grpo")
SIZES = {
    "accuracy": {"problems": 4, "examples": 1},
    "agreement": {"prompts": 4},
    "teacher_accuracy": {"problems": 4, "examples": 1},
}
SIZES["test_accuracy"] = {"problems": 4}
NO_EVALS = {f"evals__{name}": "none" for name in SIZES}
STEPS, EVAL_STEPS, TIMES = 4, 3, 5
# of an image
D = 256

Models = dict[str, str]


def models(folder: Path) -> Models:
    """A student and two teachers, by name the folders they are in."""
    texts = ("", *Glyphs().texts())
    return {
        name: tiny_flow.save(folder / name, seed, side=16, texts=texts) for seed, name in enumerate(NAMES)
    }


def config(recipe: str, known: Models, **overrides: Any) -> RunConfig:
    """A shipped recipe on these models. Names carry dots as double underscores."""
    drawn = "sampler.generate" if recipe == "flow_sft" else "sampler"
    changes: dict[str, Any] = {
        "learner.model": known["student"],
        f"{drawn}.steps": STEPS,
        f"{drawn}.eval_steps": EVAL_STEPS,
    }
    changes |= {"steps": 2, "prompts_per_step": 4, "save_every": 1000, "eval_every": 1000, "threads": 1}
    changes["skip_checks"] = ["all"]
    changes |= (
        {"sampler.positions": TIMES}
        if recipe == "flow_sft"
        else {"group_size": 3}
        if recipe == "flow_grpo"
        else {}
    )
    shipped = load_recipe(recipe)
    changes |= {f"teachers.{name}.model": known.get(name, known["student"]) for name in shipped.teachers}
    changes |= {f"evals.{name}": SIZES[name] for name in shipped.evals}
    if shipped.learner.merge:
        changes["learner.merge.models"] = [known["digits"], known["counts"]]
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(recipe, changes | exactly(shipped, named) | named)


def glyphs(number: int) -> list[Prompt]:
    return list(islice(Glyphs().prompts("train", 0), number))


def drawn(cfg: RunConfig, folder: Path, prompts: Sequence[Prompt], n: int = 1, **draw: Any) -> list[Group]:
    """Attempts of a config's sampler, asked for in one cohort."""

    async def act() -> list[Group]:
        run = Run.open(cfg, Requirements(behaviour=1), Options(folder))
        try:
            async with cfg.sampler.open(run.context("sampler"), run.services) as sampler:
                asked = replace(cfg.sampler.draw(0), cohort=len(prompts), **draw)
                return list(await asyncio.gather(*(sampler.sample(prompt, n, asked) for prompt in prompts)))
        finally:
            run.close()

    return asyncio.run(act())


def rollouts(groups: Sequence[Group]) -> list[FlowRollout]:
    found = [attempt.rollout for group in groups for attempt in group]
    assert all(isinstance(rollout, FlowRollout) for rollout in found)
    return found  # type: ignore[return-value]


def behaviour(rollout: FlowRollout) -> np.ndarray:
    assert isinstance(rollout.behaviour, VelocityTarget)
    return rollout.behaviour.v_TD
