"""How many problems does the student solve?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.errors import DataError
from reflux.parts import STRICT
from reflux.schedules import at
from reflux.statistics import bootstrap_mean, pass_at_k, wilson
from reflux.tasks.base import Split
from reflux.types import Attempt, Draw, Prompt, TokenRollout

if TYPE_CHECKING:
    from reflux.learners.base import OpenLearner
    from reflux.rundir import Run
    from reflux.samplers.base import OpenSampler
    from reflux.tasks.grading import Verdict
    from reflux.teachers.base import Teachers

HELD_OUT_SEED = 0  # the same problems in every run, whatever its seed
Graded = list[tuple[Attempt, "Verdict"]]  # the attempts at one problem


@dataclass(frozen=True, config=STRICT)
class Accuracy:
    """The first `problems` of a held-out split: one greedy answer each, and `samples` more at `temperature` where that is above 0.

    Greedy: accuracy (the mean verdict of what could be judged) with the Wilson interval `low`, `high`; `accuracy.<part or route>` with
    the same where there are several. Samples: avg@n, the mean over problems of the mean verdict, and pass@k, unbiased, with 95% intervals
    by bootstrap over problems; a verdict of 1 passes. `ungraded` counts answers without a verdict, which are in no mean. `truncated` is
    the share that hit the length limit.

    max_tokens: the length limit; without it the longest that training reaches. k: of pass@k (default: samples). examples: so many problems
    are listed with the greedy answer, always the same ones, so that before and after can be set side by side.
    """

    once: ClassVar[bool] = False

    problems: int = 500
    samples: int = 0
    k: int | None = None
    temperature: float = 1.0
    max_tokens: int | None = None
    split: Split = "test"
    examples: int = 8

    def __post_init__(self) -> None:
        if self.problems < 1 or self.samples < 0 or self.examples < 0:
            raise ValueError("needs problems >= 1, samples >= 0 and examples >= 0")
        if self.k is not None and not 1 <= self.k <= self.samples:
            raise ValueError(f"pass@k needs 1 <= k <= samples, got k = {self.k} with samples = {self.samples}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if not self.temperature > 0:
            raise ValueError("temperature must be above 0; the greedy answer is always asked for, and needs no samples")

    async def __call__(self, run: Run, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers) -> dict[str, Any]:
        return await self.measure(run, sampler)

    async def measure(self, run: Run, sampler: OpenSampler) -> dict[str, Any]:
        """The table, of whatever model the sampler holds. DataError where the split has no problems."""
        prompts = list(islice(run.task.prompts(self.split, HELD_OUT_SEED), self.problems))
        if not prompts:
            raise DataError(f"eval accuracy: the task has no problems in its split '{self.split}'; choose another split")
        greedy = await self._ask(run, sampler, prompts, 1, 0.0)
        table = {"problems": len(prompts), **_greedy(greedy), **_by_kind(run, greedy)}
        if self.samples:  # after the greedy answers, never among them: one batch holds one temperature
            drawn = await self._ask(run, sampler, prompts, self.samples, self.temperature)
            table |= _sampled(drawn, self.samples, self.k or self.samples, run.seed)
        return {**table, "examples": [_example(*graded[0]) for graded in greedy[: self.examples]]}

    async def _ask(self, run: Run, sampler: OpenSampler, prompts: Sequence[Prompt], n: int, temperature: float) -> list[Graded]:
        draw = Draw(run.step, "eval", self._limit(run), temperature, stop=tuple(run.cfg.sampler.stop), cohort=len(prompts))
        groups = await asyncio.gather(*(sampler.sample(prompt, n, draw) for prompt in prompts))
        verdicts = iter(await run.graders.judge_attempts(run.task, [attempt for group in groups for attempt in group]))
        return [[(attempt, next(verdicts)) for attempt in group] for group in groups]

    def _limit(self, run: Run) -> int:
        if self.max_tokens is not None:
            return self.max_tokens
        return int(max(at(run.cfg.sampler.max_tokens, step) for step in range(max(1, run.cfg.steps))))


def _greedy(problems: list[Graded]) -> dict[str, Any]:
    attempts = [attempt.rollout for graded in problems for attempt, _ in graded]
    return {
        **_mean("accuracy", problems),
        "ungraded": sum(verdict.value is None for graded in problems for _, verdict in graded),
        "truncated": sum(rollout.finish == "length" for rollout in attempts) / len(attempts),
        "mean_tokens": sum(rollout.length for rollout in attempts) / len(attempts),
    }


def _mean(name: str, problems: list[Graded]) -> dict[str, Any]:
    """The mean verdict under `name`, with its interval. Nothing judged: null."""
    values = [verdict.value for graded in problems for _, verdict in graded if verdict.value is not None]
    ends = ("low", "high") if name == "accuracy" else (f"{name}.low", f"{name}.high")
    if not values:
        return {name: None, ends[0]: None, ends[1]: None}
    low, high = wilson(sum(values), len(values))
    return {name: sum(values) / len(values), ends[0]: low, ends[1]: high}


def _by_kind(run: Run, problems: list[Graded]) -> dict[str, Any]:
    """The accuracy by part of a mix and by route, each only where there are several."""
    from reflux.tasks.mix import Mix

    kinds: list[Callable[[Prompt], str | None]] = [lambda prompt: prompt.route]
    if isinstance(run.task, Mix):
        kinds.insert(0, run.task.part_of)
    table: dict[str, Any] = {}
    for kind in kinds:
        sorted_by: dict[str, list[Graded]] = {}
        for graded in problems:
            name = kind(graded[0][0].rollout.prompt)
            if name is not None:
                sorted_by.setdefault(name, []).append(graded)
        if len(sorted_by) > 1:
            for name in sorted(sorted_by):
                table |= {**_mean(f"accuracy.{name}", sorted_by[name]), f"accuracy.{name}.problems": len(sorted_by[name])}
    return table


def _sampled(problems: list[Graded], samples: int, k: int, seed: int) -> dict[str, Any]:
    """avg@n over problems with a judged sample; pass@k over problems with at least k of them."""
    judged = [[verdict.value for _, verdict in graded if verdict.value is not None] for graded in problems]
    averages = [sum(values) / len(values) for values in judged if values]
    passes = [pass_at_k(len(values), sum(value >= 1 for value in values), k) for values in judged if len(values) >= k]
    table: dict[str, Any] = {"samples": samples, "ungraded_samples": sum(samples - len(values) for values in judged)}
    for name, values in ((f"avg@{samples}", averages), (f"pass@{k}", passes)):
        low, high = bootstrap_mean(values, seed) if values else (None, None)
        table |= {name: sum(values) / len(values) if values else None, f"{name}.low": low, f"{name}.high": high}
    return table


def _example(attempt: Attempt, verdict: Verdict) -> dict[str, Any]:
    rollout = attempt.rollout
    return {
        "id": rollout.prompt.id,
        "prompt": rollout.prompt.messages[-1]["content"],
        "answer": rollout.prompt.answer,
        "text": rollout.text if isinstance(rollout, TokenRollout) else None,
        "verdict": verdict.value,
        "finish": rollout.finish,
    }
