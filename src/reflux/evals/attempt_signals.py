"""The signals that a recipe could learn from, measured on sampled attempts.

The truth is the verdict of the task's own verifier: right from 0.5 on. ROPD (arXiv 2605.07396) compares
signals in this way before training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflux.config.registry import kind_of
from reflux.config.step_context import SamplingParams
from reflux.credit.log_ratio import log_ratio_T, mean_of_finite
from reflux.errors import ServerError
from reflux.evals.prompt_difficulty import CORRECT
from reflux.rewards.base import RewardFn
from reflux.rewards.weighted import values_by_name
from reflux.runtime.together import together
from reflux.types import UNJUDGED, Attempt, Group, Prompt, Reward

if TYPE_CHECKING:
    from reflux.evals.evaluation import Evaluation
    from reflux.rewards.opened_rewards import Rewards

Row = dict[str, Any]
# the names of signals that every recipe has, or that have no part of their own
SUM, OWN, LENGTH = "weighted_sum", "student_logp", "length"


def described(rewards: Mapping[str, RewardFn], teachers: Sequence[str]) -> dict[str, str]:
    """What each signal is, by its name and in the order of the table. rewards: by name. teachers: the names
    that teachers answer under.

    `rewards.NAME` is the value of one reward, without its weight. `weighted_sum` is the sum from which the
    run would learn, where there are several. `teacher_logp.NAME` is the mean log-prob of the teacher at the
    tokens that the student chose. `return.NAME` is the mean log-ratio of teacher and sampling policy at these
    tokens, the return of `credit.margin`. `student_logp` and `length` are controls: they cost nothing.
    """
    found = {
        f"rewards.{name}": f"the value of reward {name}, of kind {kind_of('rewards', reward)}"
        for name, reward in rewards.items()
    }
    if len(rewards) > 1:
        found[SUM] = "the weighted sum of the rewards"
    for name in teachers:
        found[f"teacher_logp.{name}"] = (
            f"mean log-prob of the sampled tokens under teacher {name}, nats per token"
        )
        found[f"return.{name}"] = (
            f"mean log-ratio of teacher {name} and the student, nats per token: the return of credit.margin"
        )
    found[OWN] = "control: mean log-prob of the sampled tokens under the student, nats per token"
    found[LENGTH] = "control: the number of tokens that the student generated"
    return found


async def measured(
    evaluation: Evaluation,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    samples: int,
    draw: SamplingParams,
    at_once: int = 32,
) -> AsyncIterator[dict[str, list[Row]]]:
    """The attempts at each prompt as rows, by prompt id, for `at_once` prompts that are sampled together.
    rewards: those of the recipe, opened. samples: attempts per prompt. draw: the sampling parameters. The
    attempts depend on prompt and sample index alone.

    Raises ServerError if none of the attempts at `at_once` prompts gets a reward.
    """
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        groups = await evaluation.groups(chunk, samples, draw)
        verdicts = iter(await evaluation.judged([attempt for group in groups for attempt in group]))
        # Contexts of teachers may show the rewards, so these come first.
        await together(map(rewards.judge, groups))
        _refuse_silence(rewards, groups)
        teachers: Sequence[str] = ()
        if evaluation.teachers is not None:
            await evaluation.teachers.score(groups, evaluation.step_context)
            teachers = sorted(set(evaluation.teachers.tables.values()))
        yield {
            prompt.id: [_row(attempt, next(verdicts), rewards.parts, teachers) for attempt in group]
            for prompt, group in zip(chunk, groups, strict=True)
        }


def _refuse_silence(rewards: Rewards, groups: Sequence[Group]) -> None:
    """ServerError, with the reasons, if no attempt at all got a reward, as from a server that is down."""
    found = [
        attempt.reward or Reward(None)
        for group in groups
        for attempt in group
        if attempt.rollout.finish not in UNJUDGED
    ]
    if not rewards.parts or not found or any(each.value is not None for each in found):
        return
    reasons = Counter(each.error or "no verdict was given" for each in found)
    listed = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common())
    raise ServerError(
        f"none of the {len(found)} attempts at these {len(groups)} prompts got a reward. When the cause is "
        f"mended, repeat the command: it keeps the prompts before these. The reasons:\n{listed}"
    )


def _row(attempt: Attempt, verdict: Reward, rewards: Mapping[str, RewardFn], teachers: Sequence[str]) -> Row:
    rollout, value = attempt.rollout, _finite(verdict.value)
    reasons = {name: answer.error for name, answer in attempt.answers.items() if answer.error}
    if attempt.reward is not None and attempt.reward.error:
        reasons["rewards"] = attempt.reward.error
    return {
        "prompt": rollout.prompt.id,
        "sample": rollout.sample,
        "route": rollout.prompt.route,
        "truth": None if value is None else value >= CORRECT,
        "verdict": value,
        "tokens": int(rollout.mask_T.sum()),
        "finish": rollout.finish,
        "signals": _signals(attempt, rewards, teachers),
        # why there is no verdict, and why values are missing
        **({"error": verdict.error} if value is None else {}),
        **({"missing": reasons} if reasons else {}),
    }


def _signals(
    attempt: Attempt, rewards: Mapping[str, RewardFn], teachers: Sequence[str]
) -> dict[str, float | None]:
    """The value of each signal. None: the attempt has none."""
    rollout, reward = attempt.rollout, attempt.reward or Reward(None)
    found = {f"rewards.{name}": value for name, value in values_by_name(rewards, reward).items()}
    if len(rewards) > 1:
        found[SUM] = reward.value
    for name in teachers:
        found[f"teacher_logp.{name}"], found[f"return.{name}"] = _of_teacher(attempt, name)
    found[OWN] = mean_of_finite(rollout.policy_logp_T[rollout.mask_T].astype(np.float64))
    found[LENGTH] = float(rollout.mask_T.sum())
    return {name: _finite(value) for name, value in found.items()}


def _of_teacher(attempt: Attempt, name: str) -> tuple[float | None, float | None]:
    """The mean log-prob and the return, over the same positions. None for both where there is no target."""
    target, ratio_T = attempt.target(name), log_ratio_T(attempt, name)
    if target is None or target.logp_T is None or ratio_T is None:
        return None, None
    logp_T = np.where(np.isfinite(ratio_T), target.logp_T.astype(np.float64), np.nan)
    return mean_of_finite(logp_T), mean_of_finite(ratio_T)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
