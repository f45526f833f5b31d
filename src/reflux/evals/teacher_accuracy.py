"""The share of problems that the teacher solves, measured once: an upper bound for the student."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.evals.accuracy import Accuracy, Graded
from reflux.evals.base import Asked, EvalPart
from reflux.tasks.base import Split
from reflux.teachers.names import measured, objective_teachers

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.evals.base import Source
    from reflux.evals.evaluation import Evaluation
    from reflux.samplers.base import OpenSampler


@dataclass(frozen=True, config=STRICT)
class TeacherAccuracy(EvalPart):
    """`accuracy` of the teacher's own model, before the first step.

    teacher: the NAME of one table `[teachers.NAME]`, or an alias that several of these tables share. With an
    alias, each problem goes to the teacher whose `routes` contain the route of the problem, and problems of
    other routes are left out. With a NAME, this teacher gets every problem, whatever its routes. Only for
    teachers that have a model: a sampler of the kind used in the run samples from it, with the random numbers
    of the greedy answers of `accuracy`. Null for a `self` teacher, because that is the student, which is
    measured anyway, and for a teacher in a server, which gives scores only. `problems`, `max_tokens`, `split`
    and `examples` are those of `accuracy`.
    """

    asked: ClassVar[Asked] = "start"
    verifies: ClassVar[bool] = True
    samples_from_teacher: ClassVar[bool] = True

    teacher: str = "main"
    problems: int = 500
    max_tokens: int | None = None
    split: Split = "validation"
    examples: int = 8

    def __post_init__(self) -> None:
        self._accuracy()

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if cfg.teachers and not measured(cfg, self.teacher):
            known = ", ".join(sorted({*cfg.teachers, *objective_teachers(cfg)}))
            yield (
                f"{where}.teacher must be NAME of a table [teachers.NAME], or an alias, and there is no "
                f"'{self.teacher}'. Known: {known}."
            )

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        """Raises ValueError if the recipe has no such teacher, or if the teacher has no model of its own."""
        asked, tables = self._accuracy(), measured(evaluation.context, self.teacher)
        tables_by_name = evaluation.context.teachers
        if not tables:
            raise _without_model(self.teacher)
        served = [table for table in tables if not tables_by_name[table].in_process]
        if served:
            evaluation.services.tell(
                [
                    f"teachers.{', '.join(served)}: it is in a server, which gives scores only, so its own "
                    "accuracy is not measured"
                ]
            )
        if served or any(tables_by_name[table].is_student for table in tables):
            return {"accuracy": None, "low": None, "high": None, "problems": 0, "split": self.split}
        # by the index of the problem
        found: dict[int, Graded] = {}
        prompts = asked.prompts(evaluation)
        for table in tables:
            # One table at a time, because a model may be loaded for it, and there may be memory for one only.
            own = [
                place
                for place, prompt in enumerate(prompts)
                if len(tables) == 1 or prompt.route in tables_by_name[table].routes
            ]
            if own:
                async with _acting(evaluation, table) as acting:
                    found |= zip(
                        own,
                        await asked.greedy(evaluation, [prompts[place] for place in own], acting),
                        strict=True,
                    )
        return asked.table(evaluation, [found[place] for place in sorted(found)])

    def _accuracy(self) -> Accuracy:
        return Accuracy(
            problems=self.problems, max_tokens=self.max_tokens, split=self.split, examples=self.examples
        )


@asynccontextmanager
async def _acting(evaluation: Evaluation, table: str) -> AsyncIterator[OpenSampler]:
    # An evaluation that needs teachers is refused earlier if there are none.
    assert evaluation.teachers is not None
    teacher, opened = evaluation.teachers.opened[table]
    model = teacher.acts_with(opened)
    if model is None:
        raise _without_model(table)
    async with evaluation.part.open_with(model, evaluation.context, evaluation.services) as acting:
        yield acting


def _without_model(table: str) -> ValueError:
    return ValueError(
        f"evals: the teacher '{table}' has no model of its own to sample from. Remove this evaluation"
    )
