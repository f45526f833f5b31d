"""A teacher: how should the student have acted, position by position?

`open(run)` gives an object that fills `attempt.targets[name]`. Scoring is idempotent: an attempt is asked about again only where its
target is missing or its context has changed since. Several tables may share one name by `as` and `routes`; each prompt then asks exactly
one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from reflux.contexts.base import Context, View
from reflux.errors import DataError
from reflux.gather import Gather
from reflux.types import Attempt, Group, Moment, Prompt, Rollout, Target

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.rundir import Run


class OpenTeacher(Protocol):
    macs: int  # multiply-accumulates per position, for FLOP accounting

    async def score(self, asked: Sequence[tuple[Attempt, View]], moment: Moment) -> None:
        """Fill targets (and candidates, as `run.wants` asks) of these attempts, each in its view."""
        ...

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """A no-op unless this teacher follows the student."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class Teacher(Protocol):
    rollouts: ClassVar[type[Rollout]]  # what it can be asked about
    offers: ClassVar[tuple[type[Target], ...]]
    in_process: ClassVar[bool]  # True where batched calls are the fast ones
    at_ids: ClassVar[bool]  # True where it can give its log-probs at any ids the student lists

    @property
    def follows(self) -> bool:
        """True where it moves with the student."""
        ...

    @property
    def context(self) -> Context: ...

    @property
    def routes(self) -> tuple[str, ...]: ...

    @property
    def as_(self) -> str | None:
        """The name it answers under; None: its table's."""
        ...

    def open(self, run: Run, name: str) -> AbstractAsyncContextManager[OpenTeacher]: ...


def spoken_name(table: str, teacher: Teacher) -> str:
    """The name objectives and credit rules know this table by."""
    return teacher.as_ or table


class Teachers:
    """All open teachers: builds contexts, asks what is missing, leaves drift in the notes.

    heard: the names that objectives listen to. DataError for a prompt of a route that none of them serves: no objective has a word on it.
    (`checks` finds it beforehand where a task knows its routes.)
    """

    def __init__(self, opened: Mapping[str, tuple[Teacher, OpenTeacher]], heard: Collection[str] = ()):
        self.opened = opened
        self._served_routes = _routes([teacher for table, (teacher, _) in opened.items() if spoken_name(table, teacher) in heard])
        self._batched = {table: pair for table, pair in opened.items() if pair[0].in_process}
        self._served = {table: pair for table, pair in opened.items() if not pair[0].in_process}
        self._gather: Gather[tuple[Group, Moment], None] = Gather(self._score_cohort)

    async def score(self, groups: Sequence[Group], moment: Moment, cohort: int = 0) -> None:
        """Ask every teacher about what it has not answered yet, or was asked in another context.

        cohort: this call holds one of so many groups of `moment.step`; models in this process wait for the others, servers do not.
        """
        for prompt in (group[0].rollout.prompt for group in groups if group):
            _refuse_unserved(prompt, self._served_routes)
        await self._score(self._served, groups, moment)
        if cohort > 1:
            (group,) = groups
            await self._gather.ask(moment.step, cohort, group[0].rollout.prompt.id, (group, moment))
        else:
            await self._score(self._batched, groups, moment)

    async def _score_cohort(self, items: list[tuple[Group, Moment]]) -> list[None]:
        await self._score(self._batched, [group for group, _ in items], items[0][1])
        return [None] * len(items)

    async def _score(self, tables: Mapping[str, tuple[Teacher, OpenTeacher]], groups: Sequence[Group], moment: Moment) -> None:
        for table, (teacher, answers) in tables.items():
            asked = [pair for group in groups for pair in self._missing(table, teacher, group, moment)]
            if not asked:
                continue
            name = spoken_name(table, teacher)
            before = [attempt.targets.get(name) for attempt, _ in asked]
            await answers.score(asked, moment)
            for (attempt, view), old in zip(asked, before, strict=True):
                attempt.notes.setdefault("context", {})[name] = _hash(view)
                attempt.notes.setdefault("asked", {})[name] = table
                attempt.notes.setdefault("shown", {})[name] = view.notes
                if old is not None:
                    attempt.notes.setdefault("redone", {})[name] = old  # what it said before; freshness compares the two

    def _missing(self, table: str, teacher: Teacher, group: Group, moment: Moment) -> list[tuple[Attempt, View]]:
        if not group or (teacher.routes and group[0].rollout.prompt.route not in teacher.routes):
            return []
        name = spoken_name(table, teacher)
        asked = []
        for attempt, view in zip(group, teacher.context(group, moment), strict=True):
            if view is None or attempt.rollout.finish == "error" or not attempt.rollout.length:
                continue
            if name not in attempt.targets or attempt.notes.get("context", {}).get(name) != _hash(view):
                asked.append((attempt, view))
        return asked

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        for _, answers in self.opened.values():
            await answers.publish(weights, version)

    def spoken(self, table: str) -> str:
        """The name a table answers under."""
        return spoken_name(table, self.opened[table][0])

    @property
    def names(self) -> list[str]:
        """The names teachers answer under, each once."""
        return sorted({self.spoken(table) for table in self.opened})

    @property
    def macs(self) -> int:
        """Multiply-accumulates a position costs all teachers together, for FLOP accounting: routed tables count by their mean."""
        names: dict[str, list[int]] = {}
        for table, (teacher, answers) in self.opened.items():
            names.setdefault(spoken_name(table, teacher), []).append(answers.macs)
        return sum(sum(counts) // len(counts) for counts in names.values())

    def state(self) -> dict[str, Any]:
        return {f"{table}/{key}": value for table, (_, answers) in self.opened.items() for key, value in answers.state().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for table, (_, answers) in self.opened.items():
            prefix = f"{table}/"
            answers.load({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})


def _routes(teachers: Sequence[Teacher]) -> frozenset[str] | None:
    """What these serve together; None: every prompt (also where there are none: others than teachers teach then)."""
    if not teachers or any(not teacher.routes for teacher in teachers):
        return None
    return frozenset(route for teacher in teachers for route in teacher.routes)


def _refuse_unserved(prompt: Prompt, served: frozenset[str] | None) -> None:
    if served is not None and prompt.route not in served:
        raise DataError(
            f"prompt {prompt.id} has {f'the route {prompt.route!r}' if prompt.route else 'no route'}, but the teachers that objectives "
            f"listen to serve only {', '.join(sorted(served))}. Add that route to a table, or take `routes` away from one: it then answers "
            f"every prompt."
        )


def _hash(view: View) -> str:
    return hashlib.blake2b(repr((view.messages, sorted(view.spans.items()))).encode(), digest_size=8).hexdigest()
