"""How many problems does the teacher solve? The student's ceiling, asked once."""

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

    teacher: a name that several tables answer as: each problem goes to the table of its route, and together
    they are the routed ceiling (a problem of a route that none serves is left out); or one table, which is
    then asked every problem, whatever its routes. Only for teachers that have a model: a sampler of the run's
    own kind acts with it, from the same random numbers as the greedy answers of `accuracy`. Null for an
    `self` teacher: it is the student, measured anyway. `max_tokens`, `split` and `examples` as in `accuracy`.
    """

    asked: ClassVar[Asked] = "start"

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
            yield f"{where}.teacher names one table, or what several answer as, and there is no '{self.teacher}'. Known: {known}."

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        """ValueError where there is no such teacher, or its table names no model."""
        asked, tables = self._accuracy(), measured(evaluation.context, self.teacher)
        tables_by_name = evaluation.context.teachers
        if not tables:
            raise _without_model(self.teacher)
        if any(tables_by_name[table].is_student for table in tables):
            return {"accuracy": None, "low": None, "high": None, "problems": 0, "split": self.split}
        # by the place of the problem
        found: dict[int, Graded] = {}
        prompts = asked.prompts(evaluation)
        for table in tables:
            # one at a time: where a model is loaded for this, there is room for one
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
    # refused beforehand
    assert evaluation.teachers is not None
    teacher, opened = evaluation.teachers.opened[table]
    model = teacher.acts_with(opened)
    if model is None:
        raise _without_model(table)
    async with evaluation.part.open_with(model, evaluation.context, evaluation.services) as acting:
        yield acting


def _without_model(table: str) -> ValueError:
    return ValueError(
        f"evals: the teacher '{table}' has no model of its own to sample from; remove this evaluation"
    )
