"""The reported result of a run: the accuracy of the student on test problems before and after training, and
the accuracy of the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.evals.accuracy import Accuracy
from reflux.evals.base import Asked, EvalPart
from reflux.evals.problems import seen, told
from reflux.evals.teacher_accuracy import TeacherAccuracy
from reflux.tasks.base import Split
from reflux.teachers.names import measured

if TYPE_CHECKING:
    from reflux.evals.base import Source
    from reflux.evals.evaluation import Evaluation


@dataclass(frozen=True, config=STRICT)
class ReportedAccuracy(EvalPart):
    """`accuracy` on test problems, before the first step and after the last step: the reported result.

    Test problems are used at no other time, so no choice can depend on them. For choices use `accuracy` on
    validation problems. The test problems are drawn with a seed that is used for nothing else
    (`reflux.evals.problems.TEST_SEED`). They are the same in every run.

    The fields are those of `accuracy`. `teacher`: before the first step this teacher solves the same
    problems, as in `teacher_accuracy`, and the result is stored under "teacher". This result is missing if
    teacher is "", and if the teacher has no model to sample from or is the student itself. Some tasks use
    validation problems as test problems, such as `jsonl` without a file `test`. These problems are evaluated
    too, and the run prints a note. The result counts the test problems that are also validation problems
    under "seen".
    """

    asked: ClassVar[Asked] = "ends"
    verifies: ClassVar[bool] = True
    samples_from_teacher: ClassVar[bool] = True
    problems: Annotated[int, Field(ge=1)] = 500
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    teacher: str = "main"
    examples: Annotated[int, Field(ge=0)] = 0

    @property
    def split(self) -> Split:
        return "test"

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        exam = Accuracy(
            problems=self.problems, max_tokens=self.max_tokens, split=self.split, examples=self.examples
        )
        table = {**await exam.measure(evaluation), "seen": seen(evaluation.task, exam.prompts(evaluation))}
        if evaluation.step:
            return table
        if table["seen"]:
            evaluation.services.listener.noted(told(table["seen"]))
        if not _acts(evaluation, self.teacher):
            return table
        ceiling = TeacherAccuracy(self.teacher, self.problems, self.max_tokens, self.split, self.examples)
        return {**table, "teacher": await ceiling(evaluation, source)}


def _acts(evaluation: Evaluation, teacher: str) -> bool:
    """True if every table of this teacher has a model of its own to sample from, and there is a table."""
    # An evaluation that needs teachers is refused earlier if there are none.
    assert evaluation.teachers is not None
    tables = [evaluation.teachers.opened[table] for table in measured(evaluation.context, teacher)]
    return bool(tables) and all(
        part.acts_with(opened) is not None and not part.is_student for part, opened in tables
    )
