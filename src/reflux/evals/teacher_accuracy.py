"""How many problems does the teacher solve? The student's ceiling, asked once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.evals.accuracy import Accuracy, Graded
from reflux.evals.base import Asked, EvalPart
from reflux.parts import STRICT
from reflux.tasks.base import Split
from reflux.teachers.names import heard, measured
from reflux.types import Prompt

if TYPE_CHECKING:
    from reflux.config import RunConfig
    from reflux.learners.base import OpenLearner
    from reflux.rundir import Run
    from reflux.samplers.base import OpenSampler
    from reflux.teachers.collection import Teachers


@dataclass(frozen=True, config=STRICT)
class TeacherAccuracy(EvalPart):
    """`accuracy` of the teacher's own model, before the first step.

    teacher: a name that several tables answer as: each problem goes to the table of its route, and together they are the routed ceiling
    (a problem of a route that none serves is left out); or one table, which is then asked every problem, whatever its routes. Only for
    teachers that have a model: a sampler of the run's own kind acts with it, from the same dice as the greedy answers of `accuracy`. Null
    for an `own` teacher: it is the student, measured anyway. `max_tokens`, `split` and `examples` as in `accuracy`.
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
            known = ", ".join(sorted({*cfg.teachers, *heard(cfg)}))
            yield f"{where}.teacher names one table, or what several answer as, and there is no '{self.teacher}'. Known: {known}."

    async def __call__(self, run: Run, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers) -> dict[str, Any]:
        """ValueError where there is no such teacher, or its table names no model."""
        asked, tables = self._accuracy(), measured(run.cfg, self.teacher)
        if not tables:
            raise _without_model(self.teacher)
        if any(run.cfg.teachers[table].is_student for table in tables):
            return {"accuracy": None, "low": None, "high": None, "problems": 0, "split": self.split}
        found: dict[int, Graded] = {}  # by the place of the problem
        prompts = asked.prompts(run)
        for table in tables:  # one at a time: where a model is loaded for this, there is room for one
            own = [place for place, prompt in enumerate(prompts) if len(tables) == 1 or _serves(run.cfg, table, prompt)]
            if own:
                async with _acting(run, table, teachers) as acting:
                    found |= zip(own, await asked.greedy(run, acting, [prompts[place] for place in own]), strict=True)
        return asked.table(run, [found[place] for place in sorted(found)])

    def _accuracy(self) -> Accuracy:
        return Accuracy(problems=self.problems, max_tokens=self.max_tokens, split=self.split, examples=self.examples)


def _serves(cfg: RunConfig, table: str, prompt: Prompt) -> bool:
    return prompt.route in cfg.teachers[table].routes


@asynccontextmanager
async def _acting(run: Run, table: str, teachers: Teachers) -> AsyncIterator[OpenSampler]:
    teacher, opened = teachers.opened[table]
    model = teacher.acts_with(opened)
    if model is None:
        raise _without_model(table)
    async with run.cfg.sampler.open_with(model, run.context("sampler"), run.services) as acting:
        yield acting


def _without_model(table: str) -> ValueError:
    return ValueError(f"evals: the teacher '{table}' has no model of its own to sample from; remove this evaluation")
