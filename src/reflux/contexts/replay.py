"""The teacher sees the student's attempt with the replies that the tools would give now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import ContextPart, TeacherPrompt
from reflux.rollouts.replies import replies_of
from reflux.types import Group, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

F_OPD = Paper("f_opd", "f-OPD: Freshness-Aware Asynchronous On-Policy Distillation", "2605.17862", 2026)


@dataclass(frozen=True, config=STRICT)
class Replay(ContextPart):
    """The student's own prompt and tokens, with every tool call replayed: a reply of the environment is
    replaced by the one that it would give after the optimiser steps that are completed now (`Task.replay`).

    The student's tokens are the same on both sides, so all chosen positions are aligned. Replies are not
    chosen positions. When an attempt is scored first, the replies are those that the student got, and the
    teacher sees the attempt itself. It is asked again when the attempt is trained on and a reply has changed
    since. So with `max_staleness` 0 the context is `same`, and with the credit rule `freshness` the
    supervision drift is above 0 only for attempts whose replies changed while they were in flight.

    Note: `replayed`, the share of attempts with a changed reply. ValueError where the task replays another
    number of replies than the attempt has. arXiv 2605.17862 (a context that goes stale); the replay of tools
    is this library's own.
    """

    when: ClassVar[str] = (
        "What the tools of a task reply changes during a run, and sampling runs ahead of training "
        "(`max_staleness` above 0)."
    )
    min_group: ClassVar[int] = 1
    adds_words: ClassVar[bool] = False

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (F_OPD,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.task.replays:
            yield (
                f"{where}: the task '{kind_of('tasks', cfg.task)}' has no tools whose replies can be "
                'replayed. Use context = { kind = "same" }, or a task with `replays` and `replay` '
                "(docs/extending.md)."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.max_staleness:
            yield (
                f"{where}: with max_staleness = 0 no reply changes before its attempt is trained on, so this "
                'context is the same as kind = "same".'
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]:
        return [self._view(attempt.rollout, step_context) for attempt in group]

    def _view(self, rollout: Rollout, step_context: StepContext) -> TeacherPrompt | None:
        assert isinstance(rollout, TokenRollout)
        replies = replies_of(rollout)
        spans = {}
        if replies:
            assert step_context.replay is not None
            turns = [reply.turn for reply in replies]
            replayed = step_context.replay(rollout.prompt, turns, step_context.completed)
            if len(replayed) != len(replies) or not all(replayed):
                raise ValueError(
                    f"prompt {rollout.prompt.id}: the task replayed {sum(map(bool, replayed))} of "
                    f"{len(replies)} replies. `replay` of a task must give one for each turn."
                )
            spans = {
                reply.start: messages
                for reply, messages in zip(replies, replayed, strict=True)
                if messages != reply.messages
            }
        return TeacherPrompt(rollout.prompt.messages, spans, {"replayed": float(bool(spans))})
