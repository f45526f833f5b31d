"""How many problems does the teacher solve? The student's ceiling, asked once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.evals.accuracy import Accuracy
from reflux.parts import STRICT
from reflux.tasks.base import Split
from reflux.teachers.own import Own

if TYPE_CHECKING:
    from reflux.learners.base import OpenLearner
    from reflux.rundir import Run
    from reflux.samplers.base import OpenSampler
    from reflux.teachers.base import Teachers


@dataclass(frozen=True, config=STRICT)
class TeacherAccuracy:
    """`accuracy` of the teacher's own model, before the first step.

    Only for teachers that have a model: a sampler is opened on it. Null for an `own` teacher: it is the student, measured anyway.
    """

    once: ClassVar[bool] = True

    teacher: str = "main"
    problems: int = 500
    max_tokens: int | None = None
    split: Split = "test"

    def __post_init__(self) -> None:
        Accuracy(problems=self.problems, max_tokens=self.max_tokens, split=self.split)

    async def __call__(self, run: Run, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers) -> dict[str, Any]:
        """ValueError where the teacher's table names no model."""
        from reflux.samplers.hf import HF
        from reflux.samplers.hf_engine import HFSampler

        table = run.cfg.teachers.get(self.teacher)
        if isinstance(table, Own):
            return {"accuracy": None, "low": None, "high": None, "problems": 0}
        model = getattr(table, "model", None)
        if model is None:
            raise ValueError(f"evals: the teacher '{self.teacher}' has no model of its own to sample from; remove this evaluation")
        own = run.cfg.sampler if isinstance(run.cfg.sampler, HF) else HF()
        asked = Accuracy(problems=self.problems, max_tokens=self.max_tokens, split=self.split, examples=0)
        async with HFSampler.opened(own, run, model) as acting:
            return await asked.measure(run, acting)
