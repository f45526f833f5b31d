"""Measurements on text models: tokenizers, the output head, log-probs of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reflux.config.context import PartContext
from reflux.evals.finding import Finding
from reflux.evals.gaps import Gaps
from reflux.evals.parity import parity, sampled_texts
from reflux.evals.template_findings import on_templates
from reflux.models.chat.continuation import bare_ids
from reflux.models.chat.template_checks import closing_end
from reflux.models.placement import autocasts
from reflux.runtime.services import Services
from reflux.samplers.base import Sampler
from reflux.teachers.base import Teacher, plain_requests
from reflux.teachers.collection import Teachers
from reflux.types import Group, HiddenTarget, TokenRollout

# entropy, as a share of its maximum, above which a teacher's distribution counts as uniform
UNIFORM = 0.98


def acted(learner: Any, groups: Sequence[Group], dtype: str) -> Iterator[Finding]:
    """Findings on how prompts and answers end, and on parity. dtype: of the sampler."""
    rollouts = sampled_texts(groups)
    if not rollouts:
        text = "no answer has a token, because the prompts are too long. Only the disk was checked"
        yield Finding("warning", "answers", text)
        return
    yield from _ends(learner, rollouts)
    yield parity(learner, groups, dtype)


def _ends(learner: Any, rollouts: Sequence[TokenRollout]) -> Iterator[Finding]:
    """A prompt does not end with an end token, and an end token is the last token of its turn."""
    model = learner.model
    found = ((r, closing_end(model.tokenizer, r.prompt_tokens.tolist(), model.end_ids)) for r in rollouts)
    closed = [(r, end) for r, end in found if end is not None and not _opens_a_turn(learner, r, end)]
    if closed:
        rollout, end = closed[0]
        token = model.tokenizer.convert_ids_to_tokens(end)
        text = (
            f"prompt {rollout.prompt.id} ends with the end token {token!r}, so the student would begin "
            "after the end of a text. Check the chat template and the tokenizer's settings"
        )
        yield Finding("failed", "prompts", text)
    passed = [rollout for rollout in rollouts if _passes_an_end(rollout, model.end_ids)]
    if passed:
        text = f"an answer to prompt {passed[0].prompt.id} goes on after an end token"
        yield Finding("failed", "ends", text)
    cut = np.mean([rollout.finish == "length" for rollout in rollouts])
    longest = max(int(rollout.mask_T.sum()) for rollout in rollouts)
    text = (
        f"{len(rollouts)} short answers sampled, {cut:.0%} were cut at the limit; the longest has {longest} "
        "tokens"
    )
    yield Finding("ok", "answers", text)


def _opens_a_turn(learner: Any, rollout: TokenRollout, end: int) -> bool:
    """True if the token `end` is part of the text with which the template opens the student's turn. Some
    models declare such a token, as <|assistant|> of Phi-3, as one that ends an answer too.
    """
    student, messages = learner.context.student, rollout.prompt.messages
    renderer = learner.model.renderer(student.system, student.template, student.prompt_suffix)
    closed, whole = (renderer.text(messages, begin_turn) for begin_turn in (False, True))
    opening = whole.removeprefix(closed) if whole.startswith(closed) else ""
    return end in bare_ids(renderer.tokenizer, opening)


def _passes_an_end(rollout: TokenRollout, ends: Sequence[int]) -> bool:
    """True if the student chose a token right after an end token that it chose."""
    ended_T = np.isin(rollout.tokens_T, list(ends)) & rollout.mask_T
    return bool((ended_T[:-1] & rollout.mask_T[1:]).any())


def sampling(part: Sampler, opened: Any) -> Iterator[Finding]:
    """How an open sampler decodes: a warning where a GPU decodes one token at a time."""
    told = part.decoding(opened)
    if told is not None:
        slow, text = told
        yield Finding("warning" if slow else "ok", "sampling", text)


def early_stop(groups: Sequence[Group]) -> str | None:
    """A text at which one of the answers, sampled again, would end in its first half while another one goes
    on. None if the answers have no such text.
    """
    texts = [attempt.rollout.made for group in groups for attempt in group]
    longest = max(texts, key=len, default="")
    for size in (1, 2, 4):
        for place in range(len(longest) // 4, len(longest) // 2):
            piece = longest[place : place + size]
            if piece.strip() and not all(piece in text for text in texts):
                return piece
    return None


def gradient(learner: Any, groups: Sequence[Group]) -> Iterator[Finding]:
    """The gradient of the shortest answer: it exists, and it is finite."""
    from reflux.learners.own_pass import gradient_norm

    attempts = [a for group in groups for a in group if a.rollout.length]
    if not attempts:
        return
    shortest = min(attempts, key=lambda attempt: attempt.rollout.length)
    norm = learner.everywhere(gradient_norm, shortest)
    right = np.isfinite(norm) and norm > 0
    text = f"the gradient of a short answer's log-probs has the norm {norm:.2g}"
    yield Finding("ok" if right else "failed", "gradient", text)


def templates(
    learner: Any, context: PartContext, teachers: Teachers, groups: Sequence[Group]
) -> Iterator[Finding]:
    """Warnings about the chat templates of the student and of the teachers in this process."""
    opened: dict[str, Any] = {table: pair[1] for table, pair in teachers.opened.items() if _reads(pair[0])}
    others = {table: teacher.renderer for table, teacher in opened.items()}
    yield from on_templates(learner, context.student, others, groups[0][0].rollout.prompt)


def _reads(teacher: Teacher) -> bool:
    """True if the teacher renders prompts in this process with a template of its own."""
    return teacher.in_process and not teacher.is_student


async def alone_and_together(table: str, opened: Any, groups: Sequence[Group], heads: Any) -> Finding:
    """Check that a teacher gives an attempt the same log-probs alone and in a batch of unequal lengths."""
    rollouts = sampled_texts(groups)
    requests = plain_requests(rollouts)
    together = await opened.score(requests)
    alone = [(await opened.score([request]))[0] for request in requests]
    # Under autocast a teacher computes in 16 bits and may give its last states in 32.
    gaps, narrow = [], autocasts(opened.autocast, heads[opened.head].device)
    for rollout, one, other in zip(rollouts, together, alone, strict=True):
        if one.target is None or other.target is None:
            continue
        narrow |= isinstance(one.target, HiddenTarget) and one.target.h_TH.element_size() < 4
        logp_T, alone_T = (answer.target.sampled_logp_T(rollout, heads) for answer in (one, other))
        gaps.append(np.abs(logp_T - alone_T))
    found = Gaps(f"teacher '{table}' in a batch and alone", gaps or [np.zeros(1)], narrow)
    share = _uniformity([answer.target for answer in together], heads)
    if share > UNIFORM:
        return Finding("failed", "teacher", _uniform(table, share))
    return Finding(found.verdict, "teacher", str(found))


def _uniformity(targets: Sequence[Any], heads: Any) -> float:
    """The mean entropy of the targets as a share of its maximum; 0 where it is not known."""
    known = (target.uniformity(heads) for target in targets if target is not None)
    return float(np.mean([share for share in known if share is not None] or [0.0]))


def _uniform(name: str, share: float) -> str:
    return (
        f"the distribution of '{name}' is uniform (entropy {share:.0%} of the maximum). Check that its "
        "weights are loaded"
    )


def alive(name: str, learner: Any, groups: Sequence[Group]) -> Finding:
    """A finding about the teacher `name`: a warning if some attempts have no target, a failure if the
    teacher's distribution is uniform.
    """
    targets = [attempt.target(name) for group in groups for attempt in group]
    silent = targets.count(None)
    if silent:
        return Finding(
            "warning",
            "teacher",
            f"'{name}' gave no target for {silent} of {len(targets)} attempts (because of its routes, or its "
            "context gave None)",
        )
    share = _uniformity(targets, learner.services.heads)
    if share > UNIFORM:
        return Finding("failed", "teacher", _uniform(name, share))
    return Finding("ok", "teacher", f"'{name}' answers, entropy {share:.0%} of the maximum")


async def at_identity(
    context: PartContext, services: Services, learner: Any, groups: Sequence[Group]
) -> Finding:
    """Check that a teacher with the student's weights gives the same log-probs as the student. groups:
    attempts of the student.
    """
    from reflux.learners.as_teacher import identity_gaps

    gaps = learner.everywhere(identity_gaps, context, groups)
    # This teacher has the learner's float32 weights and no autocast.
    narrow = autocasts(learner.cfg.autocast, learner.model.device)
    gap = Gaps("the student and itself as teacher", gaps, narrow)
    return Finding(gap.verdict, "identity", str(gap))
