"""Preflight: small measurements that catch what usually goes wrong, each as a sentence.

The parity check is law 11: sampler and learner must give the sampled tokens the same log-probs, within a stated bound.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reflux import checks
from reflux.config import RunConfig
from reflux.loop import open_parts
from reflux.models import head_gap, load_tokenizer, parameter_count
from reflux.rundir import Options, Run
from reflux.teachers.base import Teachers
from reflux.teachers.own import Own
from reflux.tokens import check_same_tokens, end_ids
from reflux.types import Draw, Group, HiddenTarget, Reward, TokenRollout

PARITY_NATS = {"cpu": 1e-3, "cuda": 0.1}  # float32 on both sides; bfloat16 autocast on one
_TOKENS = 32  # per answer


@dataclass(frozen=True)
class Finding:
    verdict: Literal["ok", "warning", "failed"]
    check: str
    text: str


async def examine(cfg: RunConfig, prompts: int = 8) -> AsyncIterator[Finding]:
    """Findings as they are made. A check that cannot run raises, with the reason."""
    checks.join(cfg)
    yield Finding("ok", "recipe", "all parts fit together")
    for text in checks.warnings(cfg):
        yield Finding("warning", "recipe", text)
    for finding in _tokenizers(cfg):
        yield finding
    with tempfile.TemporaryDirectory() as scratch:
        group = max((teacher.context.min_group for teacher in cfg.teachers.values()), default=1)
        cfg = replace(cfg, prompts_per_step=prompts, group_size=group, max_lag=0)
        run = Run.open(cfg, checks.join(replace(cfg, credit={})), Options(Path(scratch) / "doctor"))
        async with open_parts(replace(cfg, reward=None, accelerator=None), run) as (learner, sampler, _, teachers, _):
            yield _head(learner)
            await sampler.publish(learner.weights, learner.version)
            groups = await _attempts(run, sampler, prompts)
            yield _parity(learner, groups)
            yield _endings(groups)
            await _judge(run, groups)
            await teachers.score(groups, run.moment())
            for name in teachers.names:
                yield _alive(name, groups)
            yield await _at_home(run, learner, groups)
    yield _disk(cfg, parameter_count(learner.model.net))


def _tokenizers(cfg: RunConfig) -> list[Finding]:
    student = load_tokenizer(cfg.learner.model, "learner.model")
    findings = [
        Finding(
            "ok", "end of text", f"ids {list(end_ids(student))} end an answer ({student.convert_ids_to_tokens(list(end_ids(student)))})"
        )
    ]
    if student.chat_template is None:
        findings.append(
            Finding("warning", "chat template", "the student's tokenizer has none: messages are joined by newlines, as for a base model")
        )
    for name, teacher in cfg.teachers.items():
        if isinstance(teacher, Own):
            continue  # the student's own
        tokenizer = load_tokenizer(teacher.model, f"teachers.{name}.model")
        check_same_tokens(student, tokenizer, name)
        findings.append(Finding("ok", "tokenizers", f"teacher '{name}' and the student share one map of {len(tokenizer)} tokens"))
        ours, theirs = set(end_ids(student)), set(end_ids(tokenizer))
        if ours != theirs:
            findings.append(
                Finding(
                    "warning", "end of text", f"teacher '{name}' ends answers with ids {sorted(theirs)}, the student with {sorted(ours)}"
                )
            )
    return findings


async def _attempts(run: Run, sampler: Any, prompts: int) -> list[Group]:
    chosen = list(islice(run.task.prompts("train", run.seed, 0), prompts))
    draw = Draw(0, "train", min(_TOKENS, run.cfg.longest), cohort=prompts)
    return list(await asyncio.gather(*(sampler.sample(prompt, run.cfg.group_size, draw) for prompt in chosen)))


async def _judge(run: Run, groups: Sequence[Group]) -> None:
    """By the task's own verifier: a context may sort attempts by their verdicts, and which it shows matters little here."""
    attempts = [attempt for group in groups for attempt in group]
    if run.wants.reward:
        for attempt, verdict in zip(attempts, await run.graders.judge_attempts(run.task, attempts), strict=True):
            attempt.reward = Reward(verdict.value)


def _head(learner: Any) -> Finding:
    """The library applies the output head itself; the model's own forward pass must agree, as it did when the model was loaded."""
    gap, bound = head_gap(learner.model)
    if not gap <= bound:
        return Finding("failed", "head", f"hidden states through the output head are {gap:.3g} away from the model's own logits")
    return Finding("ok", "head", f"hidden states through the output head give the model's own logits (largest gap {gap:.1e})")


def _parity(learner: Any, groups: Sequence[Group]) -> Finding:
    from reflux.learners.observe import logp

    gaps = []
    attempts = [attempt for group in groups for attempt in group if attempt.rollout.length]
    for attempt, now_T in zip(attempts, logp(learner, groups), strict=True):
        rollout = attempt.rollout
        acted_T = rollout.logp_T if rollout.logp_raw_T is None else rollout.logp_raw_T
        gaps.append(np.abs(now_T - acted_T)[rollout.mask_T])
    bound = PARITY_NATS.get(learner.model.device.type, 0.1)
    worst, median = max(float(gap.max()) for gap in gaps), float(np.median(np.concatenate(gaps)))
    place = max(range(len(gaps)), key=lambda i: gaps[i].max())
    position = int(gaps[place].argmax())
    text = f"sampler and learner disagree by {worst:.2g} nats at position {position} (median {median:.2g}; bound {bound:g})"
    if worst > bound:
        return Finding(
            "failed", "parity", text + ". First position off usually means a chat-template mismatch, all of them another precision."
        )
    return Finding("ok", "parity", text)


def _endings(groups: Sequence[Group]) -> Finding:
    cut = [attempt.rollout.finish == "length" for group in groups for attempt in group]
    return Finding("ok", "answers", f"{len(cut)} short answers sampled, {np.mean(cut):.0%} of them longer than {_TOKENS} tokens")


def _alive(name: str, groups: Sequence[Group]) -> Finding:
    """A teacher that answers the same everywhere, or nothing at all, teaches nothing."""
    spread, silent = [], 0
    attempts = [attempt for group in groups for attempt in group]
    for attempt in attempts:
        target = attempt.targets.get(name)
        silent += target is None
        if isinstance(target, HiddenTarget):
            logp_NV = target.head.logits(target.h_TH).float().log_softmax(-1)
            spread.append(float(-(logp_NV.exp() * logp_NV).sum(-1).mean()) / math.log(logp_NV.shape[-1]))
    if silent:
        return Finding(
            "warning", "teacher", f"'{name}' said nothing about {silent} of {len(attempts)} attempts (routes, or a context that is None)"
        )
    share = float(np.mean(spread)) if spread else 0.0
    if share > 0.98:
        return Finding(
            "failed", "teacher", f"'{name}' is uniform (entropy {share:.0%} of the largest possible): are its weights really loaded?"
        )
    return Finding("ok", "teacher", f"'{name}' answers, entropy {share:.0%} of the largest possible")


async def _at_home(run: Run, learner: Any, groups: Sequence[Group]) -> Finding:
    """A teacher that is the student must be at distance zero from it."""
    import torch

    from reflux.learners.observe import logp
    from reflux.teachers.local import Local

    local = Local(run.cfg.learner.model, dtype="float32")
    worst = 0.0
    async with local.open(run, "home") as answers:
        await Teachers({"home": (local, answers)}).score(groups, run.moment())
        attempts = [attempt for group in groups for attempt in group if attempt.rollout.length]
        for attempt, now_T in zip(attempts, logp(learner, groups), strict=True):
            target, rollout = attempt.targets.pop("home"), attempt.rollout
            assert isinstance(target, HiddenTarget)
            assert isinstance(rollout, TokenRollout)
            device = answers.model.device
            home_T = target.head.logp_of(target.h_TH.to(device), torch.from_numpy(rollout.tokens_T).to(device))
            worst = max(worst, float(np.abs(home_T.cpu().numpy() - now_T).max()))
    bound = PARITY_NATS.get(learner.model.device.type, 0.1)
    verdict = "ok" if worst <= bound else "failed"
    return Finding(verdict, "zero at home", f"the student as its own teacher is {worst:.1e} nats away from itself (bound {bound:g})")


def _disk(cfg: RunConfig, parameters: int) -> Finding:
    need = parameters * (12 * (cfg.keep_checkpoints + 1) + 8)
    free = shutil.disk_usage(".").free
    text = f"{free / 1e9:.1f} GB free here, about {need / 1e9:.2g} GB needed for {cfg.keep_checkpoints + 1} checkpoints and the student"
    return Finding("ok" if free > 1.2 * need else "failed", "disk", text)
