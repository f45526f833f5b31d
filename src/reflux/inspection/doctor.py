"""Checks before a run: small measurements that detect frequent errors. Each result is a sentence.

The check called parity is law 11: sampler and learner must give the same log-probs to the sampled tokens or
denoising steps, within a stated bound.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from reflux import checks
from reflux.config.recipe import RunConfig, part_context
from reflux.config.step_context import SamplingParams
from reflux.evals import flow_findings, memory_findings, text_findings, tokenizer_findings
from reflux.evals.evaluation import Evaluation
from reflux.evals.finding import Finding
from reflux.evals.preflight import Preflight
from reflux.loop import open_parts
from reflux.runtime.services import Services
from reflux.teachers.collection import Teachers
from reflux.types import FlowRollout, Group

# the most positions of a sampled answer
_MOST = 32
# by which share of their size weights are moved, to see whether a sampler follows them
_MOVED = 0.05


async def examine(cfg: RunConfig, prompts: int = 8) -> AsyncIterator[Finding]:
    """Yield the findings as they are made, on `prompts` prompts. A check that cannot run raises an error."""
    requirements = checks.join(cfg)
    yield Finding("ok", "recipe", "all parts fit together")
    for text in checks.warnings(cfg):
        yield Finding("warning", "recipe", text)
    flow = cfg.learner.rollouts is FlowRollout
    for finding in flow_findings.before(cfg) if flow else tokenizer_findings.before(cfg):
        yield finding
    group = max((teacher.context.min_group for teacher in cfg.teachers.values()), default=1)
    if cfg.cluster is not None:
        yield Finding(
            "ok", "cluster", "not used here: parts are opened in this process. A run's preflight uses it"
        )
    cfg = replace(cfg, prompts_per_step=prompts, group_size=group, max_staleness=0, ahead=None)
    checks.inputs(cfg)
    student, overlap = cfg.learner.student, cfg.sampler.overlaps
    with tempfile.TemporaryDirectory() as scratch, closing(Services(student, overlap=overlap)) as services:
        context = partial(part_context, cfg, requirements, run_folder=Path(scratch))
        parts = open_parts(replace(cfg, rewards={}, extrapolation=None, cluster=None), context, services)
        async with parts as (learner, sampler, _, teachers, _):
            await sampler.publish(learner.publish(), 0)
            asked = Evaluation(context("sampler"), services, cfg.sampler, sampler, teachers)
            preflight = Preflight(replace(cfg, skip_checks=()), asked, learner, teachers, Path())
            async for finding in preflight.findings(prompts, group):
                yield finding
            if not flow:
                if cfg.learner.trains_all:
                    yield await _after_update(preflight, prompts)
                for finding in (
                    *text_findings.sampling(cfg.sampler, sampler),
                    *_on_memory(learner, teachers),
                ):
                    yield finding
            groups = await _attempts(asked, prompts)
            await _judge(asked, groups)
            await teachers.score(groups, asked.step_context)
            for name in sorted(set(teachers.tables.values())):
                yield (flow_findings if flow else text_findings).alive(name, learner, groups)


async def _after_update(preflight: Preflight, prompts: int) -> Finding:
    """Parity after all weights have changed, as an optimiser step changes them. A sampler that takes new
    weights over only in part agrees with the learner at the start. The weights are put back.
    """
    import torch

    learner, sampler = preflight.learner, preflight.asked.sampler
    access = learner.access
    if access is None:
        return Finding("warning", "update", "the learner's weights cannot be changed, so no update was tried")
    own = access.base(access.names)
    rng = torch.Generator().manual_seed(0)
    moved = {
        name: value + _MOVED * value.abs().mean() * torch.randn(value.shape, generator=rng)
        for name, value in own.items()
    }
    try:
        access.write(moved)
        await sampler.publish(preflight.asked.services.lend(learner.publish()), 0)
        found = [finding async for finding in preflight.parity(prompts, 1) if finding.check == "parity"]
    finally:
        access.write(own)
        await sampler.publish(learner.publish(), 0)
    if not found:
        return Finding("warning", "update", "no answer has a token, so nothing was compared")
    return replace(found[0], check="update", text=f"after an update of all weights: {found[0].text}")


def _on_memory(learner: Any, teachers: Teachers) -> Iterator[Finding]:
    """Findings about the memory of a text learner of this package, and of the teachers in this process."""
    from reflux.learners.hf_engine import HFLearner
    from reflux.models.device_memory import memory_of
    from reflux.teachers.in_process_teacher import InProcessTeacher

    if isinstance(learner, HFLearner):
        opened = {f"teacher '{table}'": pair[1] for table, pair in teachers.opened.items()}
        reading = {name: each for name, each in opened.items() if isinstance(each, InProcessTeacher)}
        yield memory_findings.rows({"the learner": learner, **reading})
        yield from memory_findings.memory(learner, memory_of(learner.model.device))


async def _attempts(asked: Evaluation, prompts: int) -> list[Group]:
    """Attempts of the student for the teachers, which may sort them by reward. A sampler that takes its
    training attempts from elsewhere samples from the student for the purpose "score".
    """
    chosen = list(islice(asked.task.prompts("train", asked.seed, 0), prompts))
    sizes = asked.context.numbers
    purpose = "train" if asked.part.on_policy else "score"
    draw = SamplingParams(0, purpose, min(_MOST, sizes.training_positions))
    return await asked.groups(chosen, sizes.group_size, draw)


async def _judge(asked: Evaluation, groups: Sequence[Group]) -> None:
    """Judge the attempts by the task's own verifier, because a context may sort attempts by their
    rewards. The recipe's rewards are not needed for that.
    """
    attempts = [attempt for group in groups for attempt in group]
    if asked.context.requirements.reward:
        for attempt, reward in zip(attempts, await asked.judged(attempts), strict=True):
            attempt.reward = reward
