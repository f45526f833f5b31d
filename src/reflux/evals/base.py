"""An evaluation: numbers about the student of now, written to evals.jsonl.

A frozen value called with an `Evaluation`, whose sampler holds the weights of now, and their `Source`. It has
its own random numbers (purpose "eval") and its own length limit, so switching it on or off leaves the
training run bit-identical (law 8).
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
    """Where the weights come from: for an evaluation that reads them, their access (None: the learner has
    none) and a folder of its own.
    """

    access: WeightAccess | None
    folder: Path


# always: before the first step, every `eval_every` steps and after the last. start: before the first step
# alone, for what speaks of the teacher. ends: before the first step and after the last.
Asked = Literal["always", "start", "ends"]


class EvalPart(Part, Protocol):
    """What an evaluation inherits."""


class Eval(EvalPart, Protocol):
    # at which moments of a run
    asked: ClassVar[Asked]

    @property
    def split(self) -> Split | None:
        """Where the prompts come from that it asks, None where it asks none; an empty split is refused before
        the run begins.
        """
        ...

    @property
    def max_tokens(self) -> int | None:
        """The length limit of the answers it asks for; None: the run's `evaluation_positions`, or it asks for
        none.
        """
        ...

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        """A flat table of JSON values, e.g. {"accuracy": 0.42, "low": 0.38, "high": 0.46, "problems": 500,
        "split": "test"}.
        """
        ...


def is_due(evaluation: Eval, step: int, steps: int, seen: bool) -> bool:
    """True if `evaluation` is asked at `step` of a run of so many steps. seen: it was asked before."""
    if evaluation.asked == "ends":
        return step == 0 or step >= steps
    return not (evaluation.asked == "start" and seen)
