"""The share of problems that the student solves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.errors import DataError
from reflux.evals.base import Asked, EvalPart
from reflux.evals.kinds import kind_of
from reflux.evals.problems import problems
from reflux.metrics.intervals import mean_interval, pass_at_k, wilson
from reflux.tasks.base import Split
from reflux.types import Attempt, Prompt, Reward

if TYPE_CHECKING:
    from reflux.evals.base import Source
    from reflux.evals.evaluation import Evaluation
    from reflux.samplers.base import OpenSampler
    from reflux.tasks.base import Task

# the attempts at one problem, each with its reward
Graded = list[tuple[Attempt, Reward]]
# Names that no part of a reward may have, because this table or that of `test_accuracy` uses them.
_OWN = {
    "problems",
    "split",
    "accuracy",
    "low",
    "high",
    "ungraded",
    "truncated",
    "samples",
    "parts",
    "examples",
    "seen",
    "teacher",
}


@dataclass(frozen=True, config=STRICT)
class Accuracy(EvalPart):
    """Accuracy on the first `problems` of a split, with one greedy answer each, and optionally with samples.

    Greedy answers: `accuracy` is the mean reward of the judged answers, with the Wilson interval `low`,
    `high`. `accuracy.<task or route>` is the same for each task of a mix or each route, if there are several.
    A greedy image is that of the ODE, from an initial noise that is the same at every evaluation. `ungraded`
    is the number of answers without a verdict; no mean includes these. `truncated` is the share that reached
    the length limit, and `mean_tokens` (`mean_steps` for images) the mean length.

    Rewards may have parts, such as quality. `parts` lists the names of the parts. `<name>` is the mean of a
    part over the answers that have it, with `<name>.low` and `<name>.high` by bootstrap over problems.
    `<name>.<task or route>` is the same for each task of a mix or each route. A part of a reward whose name
    is already a key of the result, such as `accuracy`, is called `part.<name>`. If a part has the same value
    for all problems, both ends are null: the range of its values is not known, so there is no interval.

    Samples: if `samples` > 0, that many further answers are sampled at `temperature`. avg@n is the mean over
    problems of the mean reward. pass@k is unbiased, and an answer with reward 1 passes. Both have 95%
    intervals by bootstrap over problems, or by Wilson if all problems have the same value, such as 0 of 30.

    `split`: the split of the problems. `max_tokens`: the length limit; without it the sampler's `max_tokens`,
    never a cap of training. Images are always finished. `k`: the k of pass@k (default: samples). `examples`:
    the number of problems that are listed with the greedy answer (an image as base64 of a PNG of at most 96
    pixels a side). They are always the same problems, so answers before and after training can be compared.
    """

    asked: ClassVar[Asked] = "always"
    verifies: ClassVar[bool] = True

    problems: int = 500
    samples: int = 0
    k: int | None = None
    temperature: float = 1.0
    max_tokens: int | None = None
    split: Split = "validation"
    examples: int = 8

    def __post_init__(self) -> None:
        if self.problems < 1 or self.samples < 0 or self.examples < 0:
            raise ValueError("accuracy needs problems >= 1, samples >= 0 and examples >= 0")
        if self.k is not None and not 1 <= self.k <= self.samples:
            raise ValueError(
                f"pass@k needs 1 <= k <= samples, got k = {self.k} with samples = {self.samples}"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if not self.temperature > 0:
            raise ValueError(
                "temperature must be above 0; the greedy answers are always included and need no samples"
            )

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        return await self.measure(evaluation)

    async def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """The result of the model in the sampler of `evaluation`, by key. DataError if the split has no
        problems.
        """
        prompts = self.prompts(evaluation)
        greedy = await self.greedy(evaluation, prompts)
        sampled: dict[str, Any] = {}
        if self.samples:
            # Sampled after the greedy answers and not together with them, because one batch has one
            # temperature.
            drawn = await self._ask(evaluation, prompts, self.samples, self.temperature)
            sampled = _sampled(drawn, self.samples, self.k or self.samples, evaluation.seed)
        return self.table(evaluation, greedy, sampled)

    def prompts(self, evaluation: Evaluation) -> list[Prompt]:
        """The problems of this evaluation. DataError if the split has no problems."""
        prompts = list(islice(problems(evaluation.task, self.split), self.problems))
        if not prompts:
            raise DataError(
                f"eval accuracy: the task has no problems in its split '{self.split}'. Choose another split"
            )
        return prompts

    async def greedy(
        self, evaluation: Evaluation, prompts: Sequence[Prompt], sampler: OpenSampler | None = None
    ) -> list[Graded]:
        """A judged greedy answer to each prompt, in order. sampler: replaces that of `evaluation`."""
        return await self._ask(evaluation, prompts, 1, 0.0, sampler)

    def table(
        self, evaluation: Evaluation, greedy: list[Graded], more: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """The result, by key: the numbers of the greedy answers, the numbers in `more`, and the examples.
        Without answers the accuracy is null.
        """
        parts = sorted({name for graded in greedy for _, reward in graded for name in reward.parts})
        table = {
            "problems": len(greedy),
            "split": self.split,
            **_greedy(greedy),
            **_parts(parts, greedy, evaluation.seed),
        }
        for kind, some in _by_kind(evaluation.task, greedy):
            table |= {**_mean(f"accuracy.{kind}", some), f"accuracy.{kind}.problems": len(some)}
            table |= _parts(parts, some, evaluation.seed, f".{kind}")
        listed = {"parts": [_free(name) for name in parts]} if parts else {}
        return {
            **table,
            **more,
            **listed,
            "examples": [_example(*graded[0]) for graded in greedy[: self.examples]],
        }

    async def _ask(
        self,
        evaluation: Evaluation,
        prompts: Sequence[Prompt],
        n: int,
        temperature: float,
        sampler: OpenSampler | None = None,
    ) -> list[Graded]:
        draw = evaluation.draw("eval", limit=self.max_tokens, temperature=temperature)
        groups = await evaluation.groups(prompts, n, draw, sampler)
        rewards = iter(await evaluation.judged([attempt for group in groups for attempt in group]))
        return [[(attempt, next(rewards)) for attempt in group] for group in groups]


def _greedy(problems: list[Graded]) -> dict[str, Any]:
    attempts = [attempt.rollout for graded in problems for attempt, _ in graded]
    if not attempts:
        return _mean("accuracy", problems)
    return {
        **_mean("accuracy", problems),
        "ungraded": sum(reward.value is None for graded in problems for _, reward in graded),
        "truncated": sum(rollout.finish == "length" for rollout in attempts) / len(attempts),
        f"mean_{kind_of(attempts[0]).units}": sum(rollout.length for rollout in attempts) / len(attempts),
    }


def _mean(name: str, problems: list[Graded]) -> dict[str, Any]:
    """The mean reward under `name`, with its interval. null if no answer was judged."""
    values = [reward.value for graded in problems for _, reward in graded if reward.value is not None]
    ends = ("low", "high") if name == "accuracy" else (f"{name}.low", f"{name}.high")
    if not values:
        return {name: None, ends[0]: None, ends[1]: None}
    low, high = wilson(sum(values), len(values))
    return {name: sum(values) / len(values), ends[0]: low, ends[1]: high}


def _parts(names: Sequence[str], problems: list[Graded], seed: int, kind: str = "") -> dict[str, Any]:
    """The mean of each part of the rewards over the answers that have it, with its interval."""
    table: dict[str, Any] = {}
    for name in names:
        values = [reward.parts[name] for graded in problems for _, reward in graded if name in reward.parts]
        table |= _averaged(f"{_free(name)}{kind}", values, seed)
    return table


def _free(name: str) -> str:
    return f"part.{name}" if name in _OWN else name


def _averaged(name: str, values: Sequence[float], seed: int, *, share: bool = False) -> dict[str, Any]:
    """The mean of one number per problem under `name`, with its interval. null without numbers."""
    low, high = mean_interval(values, seed, share=share)
    return {name: sum(values) / len(values) if values else None, f"{name}.low": low, f"{name}.high": high}


def _by_kind(task: Task, problems: list[Graded]) -> Iterator[tuple[str, list[Graded]]]:
    """The problems by part of a mix, and by route. Each only if there are several parts or routes."""
    kinds: list[Callable[[Prompt], str | None]] = [task.part_of, lambda prompt: prompt.route]
    for kind in kinds:
        sorted_by: dict[str, list[Graded]] = {}
        for graded in problems:
            name = kind(graded[0][0].rollout.prompt)
            if name is not None:
                sorted_by.setdefault(name, []).append(graded)
        if len(sorted_by) > 1:
            yield from sorted(sorted_by.items())


def _sampled(problems: list[Graded], samples: int, k: int, seed: int) -> dict[str, Any]:
    """avg@n over problems with at least one judged sample, and pass@k over problems with at least k."""
    judged = [[reward.value for _, reward in graded if reward.value is not None] for graded in problems]
    averages = [sum(values) / len(values) for values in judged if values]
    passes = [
        pass_at_k(len(values), sum(value >= 1 for value in values), k)
        for values in judged
        if len(values) >= k
    ]
    return {
        "samples": samples,
        "ungraded_samples": sum(samples - len(values) for values in judged),
        **_averaged(f"avg@{samples}", averages, seed, share=True),
        **_averaged(f"pass@{k}", passes, seed, share=True),
    }


def _example(attempt: Attempt, reward: Reward) -> dict[str, Any]:
    rollout, kind = attempt.rollout, kind_of(attempt.rollout)
    return {
        "id": rollout.prompt.id,
        "prompt": rollout.prompt.messages[-1]["content"],
        "answer": rollout.prompt.answer,
        kind.shown: kind.show(rollout.made),
        "verdict": reward.value,
        **({"parts": reward.parts} if reward.parts else {}),
        **({"error": reward.error} if reward.error is not None else {}),
        "finish": rollout.finish,
    }
