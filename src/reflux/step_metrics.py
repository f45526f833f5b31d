"""The line that metrics.jsonl gets for a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflux.metrics import Mean, Metric, step_flops
from reflux.types import Attempt, Group, TokenRollout

if TYPE_CHECKING:
    from reflux.learners.base import OpenLearner
    from reflux.rundir import Run
    from reflux.teachers.base import Teachers


def step_metrics(run: Run, stats: dict[str, Metric], groups: Sequence[Group], learner: OpenLearner, teachers: Teachers) -> dict[str, Any]:
    """Everything one step has to say, as plain JSON values but for `step` and memory."""
    attempts = [attempt for group in groups for attempt in group]
    live = [attempt for attempt in attempts if attempt.rollout.finish != "error"]
    values = {name: metric.value for name, metric in stats.items()}
    updates = int(values.get("updates") or 0)
    before = learner.version - updates  # the version that consumed these attempts
    lags = [before - attempt.rollout.version for attempt in live]
    sampled = sum(int(attempt.rollout.mask_T.sum()) for attempt in live)
    prompt = sum(len(a.rollout.prompt_tokens) for a in live if isinstance(a.rollout, TokenRollout))
    trained = int(values.get("tokens_trained") or 0)
    asked = bool(teachers.opened)
    return {
        "loss": values.get("loss", 0.0),
        **{name: value for name, value in values.items() if name not in ("loss", "tokens_trained", "updates")},
        "updates": updates,
        "lag_mean": Mean.of(lags).value,
        "lag_max": max(lags, default=None),
        "tokens_sampled": sampled,
        "tokens_trained": trained,
        "response_tokens_mean": sampled / len(live) if live else None,
        "truncated": Mean.of([a.rollout.finish == "length" for a in live]).value,
        "errors": len(attempts) - len(live),
        "silent": _silent(live, teachers),
        "reward_mean": _reward(live),
        "seconds": run.clock.take(),
        "flops": step_flops(learner.parameters, teachers.parameters if asked else 0, prompt, max(sampled, trained), trained),
        "credit": _credit(live),
    }


def _reward(attempts: list[Attempt]) -> float | None:
    judged = [a.reward.value for a in attempts if a.reward is not None and a.reward.value is not None]
    return Mean.of(judged).value


def _silent(attempts: list[Attempt], teachers: Teachers) -> dict[str, int]:
    """Attempts each teacher name said nothing about: a starved teacher shows here."""
    return {name: sum(name not in attempt.targets for attempt in attempts) for name in teachers.names}


def _credit(attempts: list[Attempt]) -> dict[str, dict[str, float | None]]:
    """Per rule: mean factor and shift over chosen positions, and its notes averaged over attempts."""
    rules: dict[str, dict[str, Metric]] = {}
    for attempt in attempts:
        mask_T = attempt.rollout.mask_T
        for name, share in attempt.shares.items():
            found = {
                "factor_mean": Mean.of(np.broadcast_to(share.factor_T, mask_T.shape)[mask_T]),
                "shift_mean": Mean.of(np.broadcast_to(share.shift_T, mask_T.shape)[mask_T]),
                **{key: Mean(note, 1) if isinstance(note, float | int) else note for key, note in share.notes.items()},
            }
            known = rules.setdefault(name, {})
            rules[name] = {key: known[key] + value if key in known else value for key, value in found.items()}  # type: ignore[operator]
    return {name: {key: value.value for key, value in sorted(found.items())} for name, found in rules.items()}
