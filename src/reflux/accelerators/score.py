"""The number an accelerator compares weights by."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from reflux.types import Draw, seed_of

if TYPE_CHECKING:
    from reflux.rundir import Run
    from reflux.samplers.base import OpenSampler


async def fixed_prompts_score(run: Run, sampler: OpenSampler) -> float:
    """Mean verdict of sampled answers to fixed prompts, drawn once from the training prompts; attempts without a verdict do not count.

    The draws' dice depend on (run seed, "score", step, prompt, sample): every candidate of one search meets the same ones.
    """
    count, samples = run.cfg.accelerator.prompts, run.cfg.accelerator.samples
    prompts = list(islice(run.task.prompts("train", seed_of(run.seed, "score"), 0), count))
    draw = Draw(run.step, "score", run.cfg.longest, cohort=len(prompts))
    groups = await asyncio.gather(*(sampler.sample(prompt, samples, draw) for prompt in prompts))
    verdicts = await run.graders.judge_attempts(run.task, [attempt for group in groups for attempt in group])
    return float(np.mean([verdict.value for verdict in verdicts if verdict.value is not None] or [0.0]))
