"""All teachers of a run. They build the contexts, request missing answers from all `[teachers.NAME]` tables
at once, and store the answers on the attempts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reflux.config.requirements import Requirements
from reflux.config.step_context import Replay, StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.errors import DataError
from reflux.runtime.cohorts import Gather
from reflux.runtime.together import together
from reflux.teachers.base import OpenTeacher, Teacher, TeacherRequest, TeacherScorer, alias_of
from reflux.types import Attempt, Group, Prompt, Target, TeacherAnswer, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights

Tables = Mapping[str, tuple[Teacher, OpenTeacher]]


class Teachers:
    """All open teachers, by the NAME of their table. Scoring is idempotent: an attempt is scored again only
    if its target is missing or its context has changed since.

    objective_teachers: the teacher names that objectives use. DataError for a prompt whose route none of
    these teachers serves, because the prompt would have no target for any objective. (`checks` finds this
    beforehand if the task knows its routes.) replay: `Task.replay` of the run's task, for contexts.
    """

    def __init__(
        self,
        opened: Tables,
        requirements: Requirements,
        services: Services,
        objective_teachers: Collection[str] = (),
        replay: Replay | None = None,
    ):
        self.opened, self.requirements, self.services = opened, requirements, services
        self._replay = replay
        self._served_routes = _routes(
            [
                teacher
                for table, (teacher, _) in opened.items()
                if alias_of(table, teacher) in objective_teachers
            ]
        )
        self._batched = {table: pair for table, pair in opened.items() if pair[0].in_process}
        self._served = {table: pair for table, pair in opened.items() if not pair[0].in_process}
        self._gather: Gather[tuple[Group, StepContext], None] = Gather(self._score_cohort)

    async def score(self, groups: Sequence[Group], step_context: StepContext, cohort: int = 0) -> None:
        """Request from every teacher the answers that are missing or belong to another context, from all
        teacher tables at once.

        cohort: the number of groups of `step_context.step` that are scored together; this call holds one of
        them. Models in this process wait for the other groups and score all of them in one call. Servers do
        not wait.
        """
        for prompt in (group[0].rollout.prompt for group in groups if group):
            _refuse_unserved(prompt, self._served_routes)
        step_context = replace(step_context, replay=self._replay)
        here = (
            self._score_in_cohort(groups, step_context, cohort)
            if cohort > 1
            else self._score(self._batched, groups, step_context)
        )
        await together([self._score(self._served, groups, step_context), here])

    async def score_again(self, groups: Sequence[Group], step_context: StepContext) -> None:
        """The same for groups that were scored when they were sampled. The context of each group gets the
        step that the group was asked for, and so the same random numbers as before.
        """
        asked: dict[int, list[Group]] = {}
        for group in groups:
            asked.setdefault(group[0].asked_step, []).append(group)
        await together(self.score(some, replace(step_context, step=step)) for step, some in asked.items())

    async def _score_in_cohort(self, groups: Sequence[Group], step_context: StepContext, cohort: int) -> None:
        (group,) = groups
        await self._gather.ask(step_context.step, cohort, group[0].rollout.prompt.key, (group, step_context))

    async def _score_cohort(self, items: list[tuple[Group, StepContext]]) -> list[None]:
        await self._score(self._batched, [group for group, _ in items], items[0][1])
        return [None] * len(items)

    async def _score(self, tables: Tables, groups: Sequence[Group], step_context: StepContext) -> None:
        """One request for each scorer, all at once."""
        asked: dict[TeacherScorer, dict[str, list[tuple[Attempt, TeacherPrompt]]]] = {}
        for table, (teacher, opened) in tables.items():
            name = alias_of(table, teacher)
            missing = [pair for group in groups for pair in _missing(name, teacher, group, step_context)]
            if missing:
                asked.setdefault(teacher.scorer(opened) or _Alone(), {})[table] = missing
        await together(self._ask(scorer, missing) for scorer, missing in asked.items())

    async def _ask(
        self, scorer: TeacherScorer, missing: Mapping[str, Sequence[tuple[Attempt, TeacherPrompt]]]
    ) -> None:
        """missing: for each table the attempts that it has to score, with the prompts that it sees."""
        requests = [
            (self.opened[table][1], [TeacherRequest(a.rollout, view, self.requirements) for a, view in asked])
            for table, asked in missing.items()
        ]
        with self.services.clock.span("teachers", " + ".join(missing)):
            answers = await scorer.score(requests)
        for (table, asked), of_table in zip(missing.items(), answers, strict=True):
            self._store(table, asked, of_table)

    def _store(
        self, table: str, asked: Sequence[tuple[Attempt, TeacherPrompt]], answers: Sequence[TeacherAnswer]
    ) -> None:
        name = alias_of(table, self.opened[table][0])
        self.services.clock.add("teach", sum(answer.seconds for answer in answers))
        for (attempt, view), answer in zip(asked, answers, strict=True):
            asked_in = {
                "table": table,
                "context_hash": _hash(view),
                "context_notes": view.notes,
                "previous": _previous(attempt, name),
            }
            asked_in["positions_read"] = answer.positions_read + (
                attempt.answers[name].positions_read if name in attempt.answers else 0
            )
            attempt.answers = dict(sorted({**attempt.answers, name: replace(answer, **asked_in)}.items()))

    async def follow_up(self, groups: Sequence[Group]) -> None:
        """If required, add to every answer its teacher's log-probs at the current student's most likely
        tokens (`Attempt.now`), and its KL to the previous answer.
        """
        attempts = [attempt for group in groups for attempt in group]
        if self.requirements.supervision_drift and any(_asked_again(attempt) for attempt in attempts):
            await self.services.run_model(self._compare, attempts)
        if self.requirements.now_candidates:
            await self.services.run_model(self._follow_up, attempts)

    def _compare(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            for name, target, previous in _asked_again(attempt):
                drift_T = target.drift_T(previous, attempt.rollout, self.services.heads)
                attempt.answers[name] = replace(attempt.answers[name], drift_T=drift_T)

    def _follow_up(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            rollout, now = attempt.rollout, attempt.now
            if not (isinstance(rollout, TokenRollout) and isinstance(now, TopKTarget)):
                continue
            asked_TK = np.concatenate(
                [rollout.tokens_T[:, None], now.ids_TK[:, : self.requirements.now_candidates]], axis=1
            )
            for name, answer in attempt.answers.items():
                if answer.target is not None and self.opened[answer.table][0].at_ids:
                    logp_TK = answer.target.logp_at(asked_TK, self.services.heads)
                    listed = TopKTarget(
                        teacher=name, ids_TK=asked_TK[:, 1:], logp_TK=logp_TK[:, 1:], logp_T=logp_TK[:, 0]
                    )
                    attempt.answers[name] = replace(answer, now_candidates=listed)

    async def publish(self, weights: Weights, step: int) -> None:
        for _, opened in self.opened.values():
            await opened.publish(weights, step)

    @property
    def tables(self) -> dict[str, str]:
        """The name that each teacher table answers under."""
        return {table: alias_of(table, teacher) for table, (teacher, _) in self.opened.items()}

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates per position by table, for FLOP accounting."""
        return {table: opened.macs for table, (_, opened) in self.opened.items()}

    def save(self, folder: Path) -> None:
        """Write the state of each teacher into its own folder inside `folder`, named after its table."""
        for table, (_, opened) in self.opened.items():
            (folder / table).mkdir()
            opened.save(folder / table)

    def load(self, folder: Path) -> None:
        for table, (_, opened) in self.opened.items():
            opened.load(folder / table)


class _Alone:
    """The scorer of one teacher that shares its model with no other. It is equal to no other scorer."""

    async def score(
        self, asked: Sequence[tuple[OpenTeacher, Sequence[TeacherRequest]]]
    ) -> list[list[TeacherAnswer]]:
        return [await teacher.score(requests) for teacher, requests in asked]


def _missing(
    name: str, teacher: Teacher, group: Group, step_context: StepContext
) -> list[tuple[Attempt, TeacherPrompt]]:
    """The attempts of a group that a teacher has to score, each with the prompt that the teacher sees."""
    if not group or (teacher.routes and group[0].rollout.prompt.route not in teacher.routes):
        return []
    asked = []
    for attempt, view in zip(group, teacher.context(group, step_context), strict=True):
        if view is None or attempt.rollout.finish == "error" or not attempt.rollout.length:
            continue
        if attempt.target(name) is None or attempt.answers[name].context_hash != _hash(view):
            asked.append((attempt, view))
    return asked


def _asked_again(attempt: Attempt) -> list[tuple[str, Target, Target]]:
    """(teacher name, target, previous target) of each teacher that answered more than once."""
    return [
        (name, answer.target, answer.previous)
        for name, answer in attempt.answers.items()
        if answer.target is not None and answer.previous is not None
    ]


def _previous(attempt: Attempt, name: str) -> Any:
    """The last target given under this name. A later answer without a target does not remove it."""
    old = attempt.answers.get(name)
    return None if old is None else old.target or old.previous


def _routes(teachers: Sequence[Teacher]) -> frozenset[str] | None:
    """The routes that these teachers serve together; None: every prompt. Without any teacher it is also None,
    because objectives without a teacher then train on every prompt.
    """
    if not teachers or any(not teacher.routes for teacher in teachers):
        return None
    return frozenset(route for teacher in teachers for route in teacher.routes)


def _refuse_unserved(prompt: Prompt, served: frozenset[str] | None) -> None:
    if served is not None and prompt.route not in served:
        raise DataError(
            f"prompt {prompt.id} has {f'the route {prompt.route!r}' if prompt.route else 'no route'}, but "
            "the teachers of the objectives "
            f"serve only {', '.join(sorted(served))}. Add that route to a teacher table, or remove `routes` "
            "from one teacher table, which then answers every prompt."
        )


def _hash(view: TeacherPrompt) -> str:
    return hashlib.blake2b(
        repr((view.messages, sorted(view.spans.items()))).encode(), digest_size=8
    ).hexdigest()
