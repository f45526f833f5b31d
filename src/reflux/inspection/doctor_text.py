"""Measurements on text models: tokenizers, the output head, log-probs of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig
from reflux.config.requirements import Requirements
from reflux.contexts.base import TeacherPrompt
from reflux.inspection.finding import Finding
from reflux.models.text import head_gap, load_tokenizer
from reflux.models.tokenizer import check_same_tokens, end_ids
from reflux.runtime.services import Services
from reflux.teachers.base import TeacherRequest
from reflux.types import Group

# bounds on differences of log-probs. CPU: float32 on both sides; GPU: bfloat16 autocast on one side
PARITY_NATS = {"cpu": 1e-3, "cuda": 0.1}


def before(cfg: RunConfig) -> Iterator[Finding]:
    """Findings before models are loaded, on tokenizers and end tokens."""
    student = load_tokenizer(cfg.learner.model, "learner.model")
    ends = list(end_ids(student))
    yield Finding("ok", "end of text", f"ids {ends} end an answer ({student.convert_ids_to_tokens(ends)})")
    if student.chat_template is None:
        yield Finding(
            "warning",
            "chat template",
            "the student's tokenizer has none: messages are joined by newlines, as for a base model",
        )
    for name, teacher in cfg.teachers.items():
        reader = None if teacher.is_student else teacher.reader(cfg.learner.student)
        if reader is None:
            # the teacher is the student, or its tokenizer is not in this process
            continue
        tokenizer = load_tokenizer(reader.model, f"teachers.{name}.model", reader.trust_remote_code)
        check_same_tokens(student, tokenizer, name)
        yield Finding(
            "ok",
            "tokenizers",
            f"teacher '{name}' and the student share a vocabulary of {len(tokenizer)} tokens",
        )
        ours, theirs = set(ends), set(end_ids(tokenizer))
        if ours != theirs:
            text = f"teacher '{name}' ends answers with ids {sorted(theirs)}, the student with {sorted(ours)}"
            yield Finding("warning", "end of text", text)


def acted(learner: Any, groups: Sequence[Group]) -> Iterator[Finding]:
    """Findings on the output head, on parity (see `doctor`), and on how answers end."""
    yield _head(learner)
    yield _parity(learner, groups)
    yield _endings(groups)


def _head(learner: Any) -> Finding:
    """The library applies the output head itself. The result must agree with the model's own
    forward pass, as it did when the model was loaded.
    """
    gap, bound = head_gap(learner.model)
    if not gap <= bound:
        return Finding(
            "failed",
            "head",
            f"hidden states times the output head differ from the model's own logits by {gap:.3g}",
        )
    return Finding(
        "ok",
        "head",
        f"hidden states times the output head give the model's own logits (largest difference {gap:.1e})",
    )


def _parity(learner: Any, groups: Sequence[Group]) -> Finding:
    from reflux.learners.observe import logp

    gaps = []
    attempts = [attempt for group in groups for attempt in group if attempt.rollout.length]
    for attempt, now_T in zip(attempts, logp(learner, groups), strict=True):
        rollout = attempt.rollout
        acted_T = rollout.policy_logp_T
        gaps.append(np.abs(now_T - acted_T)[rollout.mask_T])
    bound = PARITY_NATS.get(learner.model.device.type, 0.1)
    worst, median = max(float(gap.max()) for gap in gaps), float(np.median(np.concatenate(gaps)))
    place = max(range(len(gaps)), key=lambda i: gaps[i].max())
    position = int(gaps[place].argmax())
    text = (
        f"the log-probs of sampler and learner differ by at most {worst:.2g} nats, at position {position} "
        f"(median {median:.2g}; bound {bound:g})"
    )
    if worst > bound:
        return Finding(
            "failed",
            "parity",
            text
            + ". If the first position differs, the usual cause is another chat template. If all differ, it "
            "is another precision.",
        )
    return Finding("ok", "parity", text)


def _endings(groups: Sequence[Group]) -> Finding:
    rollouts = [attempt.rollout for group in groups for attempt in group]
    cut = np.mean([rollout.finish == "length" for rollout in rollouts])
    longest = max(int(rollout.mask_T.sum()) for rollout in rollouts)
    return Finding(
        "ok",
        "answers",
        f"{len(rollouts)} short answers sampled, {cut:.0%} were cut at the limit; the longest has {longest} "
        "tokens",
    )


def alive(name: str, learner: Any, groups: Sequence[Group]) -> Finding:
    """A finding about the teacher `name`: a warning if some attempts have no target, a failure if the
    teacher's distribution is uniform.
    """
    targets = [attempt.target(name) for group in groups for attempt in group]
    silent = targets.count(None)
    known = (target.uniformity(learner.services.heads) for target in targets if target is not None)
    spread = [share for share in known if share is not None]
    if silent:
        return Finding(
            "warning",
            "teacher",
            f"'{name}' gave no target for {silent} of {len(targets)} attempts (because of its routes, or its "
            "context gave None)",
        )
    share = float(np.mean(spread)) if spread else 0.0
    if share > 0.98:
        return Finding(
            "failed",
            "teacher",
            f"the distribution of '{name}' is uniform (entropy {share:.0%} of the maximum). Check that its "
            "weights are loaded",
        )
    return Finding("ok", "teacher", f"'{name}' answers, entropy {share:.0%} of the maximum")


async def at_identity(
    context: PartContext, services: Services, learner: Any, groups: Sequence[Group]
) -> Finding:
    """Check that a teacher with the student's weights gives the same log-probs as the student. groups:
    attempts of the student.
    """
    from reflux.learners.observe import logp
    from reflux.teachers.local import Local

    local = Local(context.student.model, dtype="float32")
    worst = 0.0
    async with local.open(context, services) as answers:
        rollouts = [attempt.rollout for group in groups for attempt in group if attempt.rollout.length]
        found = await answers.score(
            [
                TeacherRequest(rollout, TeacherPrompt(rollout.prompt.messages), Requirements())
                for rollout in rollouts
            ]
        )
        for rollout, answer, now_T in zip(rollouts, found, logp(learner, groups), strict=True):
            home_T = answer.target.sampled_logp_T(rollout, services.heads)
            worst = max(worst, float(np.abs(home_T - now_T).max()))
    bound = PARITY_NATS.get(learner.model.device.type, 0.1)
    verdict = "ok" if worst <= bound else "failed"
    return Finding(
        verdict,
        "zero at identity",
        f"the log-probs of the student as its own teacher differ by {worst:.1e} nats (bound {bound:g})",
    )
