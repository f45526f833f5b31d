"""Runs the evaluations of a recipe that are due at one step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from reflux.evals.base import Eval, Source, is_due
from reflux.evals.evaluation import Evaluation
from reflux.learners.base import OpenLearner


async def results(
    evals: Mapping[str, Eval],
    asked: Evaluation,
    learner: OpenLearner,
    *,
    steps: int,
    seen: Collection[str],
    folder: Callable[[str], Path],
) -> dict[str, Any]:
    """The result of each evaluation that is due, by name. Evaluations of the teacher run only once.

    If the learner keeps averaged weights, the sampler and the learner use them meanwhile. steps: of the run.
    seen: the names of evaluations that have run before. folder(name): of an evaluation's own.
    """
    averaged = False
    try:
        with learner.at_mean() as averaged:
            if averaged:
                await asked.sampler.publish(asked.services.lend(learner.publish()), asked.step)
            return {
                name: await part(asked, Source(learner.access, folder(name)))
                for name, part in evals.items()
                if is_due(part, asked.step, steps, name in seen)
            }
    finally:
        if averaged:
            # The sampler gets the student's own weights back, also if an evaluation raised.
            await asked.sampler.publish(learner.publish(), asked.step)
