"""The protocol of evaluations. An evaluation measures the current student and writes to evals.jsonl.

An evaluation is a frozen value. It is called with an `Evaluation`, whose sampler has the current weights, and
with the `Source` of these weights. Evaluations have their own random numbers (purpose "eval") and their own
length limit. So a training run is bit-identical with and without an evaluation (law 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from reflux.config.part import Part
from reflux.tasks.base import Split

if TYPE_CHECKING:
    from reflux.evals.evaluation import Evaluation
    from reflux.learners.access import WeightAccess


@dataclass(frozen=True)
class Source:
    """Access to the weights and a folder, for evaluations that read the weights."""

    # reads the current weights; None if the learner has no weight access
    access: WeightAccess | None
    # a folder of this evaluation in the run directory
    folder: Path


# always: before the first step, every `eval_every` steps and after the last step. start: only before the
# first step, for evaluations of the teacher. ends: before the first step and after the last step.
Asked = Literal["always", "start", "ends"]


class EvalPart(Part, Protocol):
    """The base class of evaluations."""

    # True if it samples from the model of a teacher, which is loaded for that.
    samples_from_teacher: ClassVar[bool] = False


class Eval(EvalPart, Protocol):
    # the steps of a run at which it is called
    asked: ClassVar[Asked]

    @property
    def split(self) -> Split | None:
        """The split of the prompts of this evaluation. None if it uses no prompts. A split without prompts is
        refused before the run begins.
        """
        ...

    @property
    def max_tokens(self) -> int | None:
        """The length limit of the answers. None: the `evaluation_positions` of the run, or no answers are
        sampled.
        """
        ...

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        """The result: JSON values by key, without nesting, e.g. {"accuracy": 0.42, "low": 0.38, "high": 0.46,
        "problems": 500, "split": "test"}.
        """
        ...


def is_due(evaluation: Eval, step: int, steps: int, seen: bool) -> bool:
    """True if `evaluation` is due at `step` of a run of `steps` steps. seen: True if it has already run."""
    if evaluation.asked == "ends":
        return step == 0 or step >= steps
    return not (evaluation.asked == "start" and seen)
