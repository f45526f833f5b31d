"""The score that extrapolation compares weights by, and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from reflux.config.step_context import seed_of
from reflux.errors import DataError
from reflux.evals.agreement import gap_T
from reflux.extrapolation.base import NAME, Extrapolation, Scoring
from reflux.metrics.flops import Spent, Work
from reflux.storage import files
from reflux.types import Prompt

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.evals.evaluation import Evaluation
    from reflux.learners.base import OpenLearner
    from reflux.runtime.services import Services


class Scorer:
    """`await scorer(evaluation)` is the score of the weights in the evaluation's sampler.

    The prompts are drawn once, from a stream of their own (run seed, "score"), and listed in
    score_prompts.jsonl of the extrapolation's folder. If there are fewer different prompts than asked for,
    all are used, and a note says so. DataError if the prompts are to be judged and have no answers.
    """

    def __init__(self, scoring: Scoring, context: PartContext, services: Services):
        self.scoring = scoring
        self.spent = Spent()
        stream = context.task.prompts("train", seed_of(context.seed, "score"), 0)
        self.prompts = different(stream, scoring.prompts)
        if scoring.by == "accuracy":
            _refuse_unanswered(self.prompts)
        if len(self.prompts) < scoring.prompts:
            services.listener.noted(
                f"extrapolation scores on all {len(self.prompts)} training prompts, because fewer than the "
                f"{scoring.prompts} that were asked for exist"
            )
        lines = [orjson.dumps(_line(prompt)).decode() + "\n" for prompt in self.prompts]
        context.folder.mkdir(parents=True, exist_ok=True)
        files.write_text(context.folder / "score_prompts.jsonl", "".join(lines))

    async def __call__(self, asked: Evaluation, rng: int = 0) -> float:
        """The score; NaN if no answer was judged. asked: the evaluation whose sampler has the weights. Random
        numbers depend only on (run seed, "score", step, prompt, sample, `rng`), so all candidates share them.
        """
        draw = asked.draw("score", limit=self.scoring.max_tokens, rng=rng)
        groups = await asked.groups(self.prompts, self.scoring.samples, draw)
        attempts = [attempt for group in groups for attempt in group]
        if self.scoring.by == "accuracy":
            self.spent.work += Work.of(attempts)
            rewards = await asked.judged(attempts)
            self.spent.ungraded += sum(reward.value is None for reward in rewards)
            return _accuracy([reward.value for reward in rewards])
        # `Extrapolate.refusals` has refused recipes without this teacher.
        assert asked.teachers is not None
        await asked.teachers.score(groups, asked.step_context)
        self.spent.work += Work.of(attempts)
        gaps = [gap_T(attempt, self.scoring.teacher, asked.services.heads) for attempt in attempts]
        return -_mean([value for gap in gaps if gap is not None for value in gap[~np.isnan(gap)]])

    def take(self) -> Spent:
        """The cost of scoring since the last call of `take`."""
        taken, self.spent = self.spent, Spent()
        return taken


@dataclass(frozen=True)
class CurrentScore:
    """`await score(rng)` is the score of the learner's current weights. The weights are first given to the
    sampler (`Services.lend`).
    """

    # None without extrapolation; the score is then never requested.
    scorer: Scorer | None
    learner: OpenLearner
    # Gives the evaluation at the current step.
    evaluation: Callable[[], Evaluation]

    async def __call__(self, rng: int = 0) -> float:
        assert self.scorer is not None
        asked = self.evaluation()
        await asked.sampler.publish(asked.services.lend(self.learner.publish()), asked.step)
        return await self.scorer(asked, rng)

    @property
    def spent(self) -> Spent:
        return self.scorer.spent if self.scorer else Spent()

    def take(self) -> Spent | None:
        """The cost of scoring since the last call of `take`; None without extrapolation."""
        return self.scorer.take() if self.scorer else None


def different(stream: Iterable[Prompt], count: int) -> list[Prompt]:
    """The first `count` prompts with different messages. Copies of one question (`a`, `a#2`) count once.

    Fewer prompts are returned if `count` draws in a row brought no new id, because training prompts recur.
    """
    found: dict[str, Prompt] = {}
    ids: set[str] = set()
    idle = 0
    for prompt in stream:
        idle = idle + 1 if prompt.id in ids else 0
        ids.add(prompt.id)
        found.setdefault(repr(prompt.messages), prompt)
        if len(found) == count or idle == count:
            break
    return list(found.values())


def _refuse_unanswered(prompts: list[Prompt]) -> None:
    without = [prompt.id for prompt in prompts if prompt.answer is None]
    if without:
        raise DataError(
            f'extrapolation.score = "accuracy" judges answers, but {len(without)} of its {len(prompts)} '
            "training prompts have no reference answer "
            f'(the first is {without[0]}). Give them answers, or use score = "minus_kl", which needs a '
            "teacher and no labels."
        )


def _line(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "messages": prompt.messages, "answer": prompt.answer, "route": prompt.route}


def _accuracy(values: list[float | None]) -> float:
    """An answer that was not judged counts as wrong. NaN if none was judged, because the verifier is then at
    fault.
    """
    return math.nan if all(value is None for value in values) else _mean([value or 0.0 for value in values])


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def scorer(
    extrapolation: Extrapolation | None, context: Callable[[str], PartContext], services: Services
) -> Scorer | None:
    """The scorer of extrapolation; None without extrapolation."""
    return Scorer(extrapolation.scoring, context(NAME), services) if extrapolation is not None else None
