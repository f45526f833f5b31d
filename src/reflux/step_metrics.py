"""The line that metrics.jsonl gets for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reflux.metrics import Mean, Metric, Stats, merge, step_flops
from reflux.types import Attempt, Group, Share

if TYPE_CHECKING:
    from reflux.accelerators.score import Spent
    from reflux.learners.base import OpenLearner
    from reflux.rundir import Run
    from reflux.teachers.collection import Teachers


@dataclass(frozen=True)
class Acted:
    """What attempts cost the student: tokens sampled, and tokens read, prompts included. It does not change once they have landed."""

    sampled: int = 0
    read: int = 0

    @classmethod
    def of(cls, attempts: Sequence[Attempt]) -> Acted:
        rollouts = [attempt.rollout for attempt in attempts]
        prompts = sum(rollout.prompt_length for rollout in rollouts)
        return cls(sum(int(rollout.mask_T.sum()) for rollout in rollouts), prompts + sum(rollout.length for rollout in rollouts))

    def __add__(self, other: Acted) -> Acted:
        return Acted(self.sampled + other.sampled, self.read + other.read)

    def __sub__(self, other: Acted) -> Acted:
        """Never below 0: attempts that never were written (in a test of one part) are no refund."""
        return Acted(max(0, self.sampled - other.sampled), max(0, self.read - other.read))


def step_metrics(run: Run, stats: dict[str, Metric], groups: Sequence[Group], learner: OpenLearner, teachers: Teachers) -> dict[str, Any]:
    """Everything one step has to say, as plain JSON values but for `step` and memory."""
    attempts = [attempt for group in groups for attempt in group]
    live = [attempt for attempt in attempts if attempt.rollout.finish != "error"]
    values = {name: metric.value for name, metric in stats.items()}
    updates = int(values.get("updates") or 0)
    before = learner.version - updates  # the version that consumed these attempts
    lags = [before - attempt.rollout.version for attempt in live]
    sampled = sum(int(attempt.rollout.mask_T.sum()) for attempt in live)
    prompt = sum(attempt.rollout.prompt_length for attempt in live)
    trained = int(values.get("tokens_trained") or 0)
    by_table = _asked(live, teachers)
    spent = run.scorer.take() if run.scorer else None
    discarded = run.landed.pop(run.step, Acted()) - Acted.of(attempts)
    return {
        "loss": values.get("loss", 0.0),
        **{name: value for name, value in values.items() if name not in ("loss", "tokens_trained", "updates")},
        "updates": updates,
        "lag_mean": Mean.of(lags).value,
        "lag_max": max(lags, default=None),
        "tokens_sampled": sampled,
        "tokens_trained": trained,
        **({"tokens_scored": spent.sampled, "tokens_discarded": discarded.sampled} if spent else {}),
        "response_tokens_mean": sampled / len(live) if live else None,
        "truncated": Mean.of([a.rollout.finish == "length" for a in live]).value,
        "errors": len(attempts) - len(live),
        "silent": _silent(live, teachers),
        "asked": {table: len(heard) for table, heard in by_table.items()},
        "answer_errors": _answer_errors(live, teachers),
        "kl_nats_by_table": {table: _kl(heard, teachers.spoken(table)).value for table, heard in by_table.items()},
        "reward_mean": Mean.of([a.verdict for a in live if a.verdict is not None]).value,
        "ungraded": sum(a.reward is not None and a.verdict is None for a in live),
        "seconds": run.clock.take(),
        "flops": _flops(live, learner, teachers, prompt, max(sampled, trained), trained, spent, discarded.read),
        "credit": _credit(live),
        "context": _context(live),
    }


def _flops(
    attempts: list[Attempt],
    learner: OpenLearner,
    teachers: Teachers,
    prompt: int,
    sampled: int,
    trained: int,
    spent: Spent | None,
    discarded: int,
) -> dict[str, float]:
    """`step_flops`, with what each teacher table really read: its context may be longer than the student's prompt.

    discarded: what the student read and wrote in attempts that a jump threw away. What the teachers read of those is not counted.
    """
    scored = (spent.read, spent.taught) if spent else (0.0, 0.0)
    flops = step_flops(learner.macs, teachers.macs, prompt, sampled, trained, (scored[0] + discarded, scored[1]))
    answers = [answer for attempt in attempts for answer in attempt.answers.values()]
    taught = sum(teachers.opened[answer.table][1].macs * answer.positions_read for answer in answers)
    return {**flops, "teach": 2.0 * (taught + teachers.macs * scored[1])}


def _silent(attempts: list[Attempt], teachers: Teachers) -> dict[str, int]:
    """Attempts each teacher name said nothing about."""
    return {name: sum(attempt.target(name) is None for attempt in attempts) for name in teachers.names}


def _asked(attempts: list[Attempt], teachers: Teachers) -> dict[str, list[Attempt]]:
    """By table, the attempts it was asked about: one that shares a name and is starved of its routes shows here."""
    return {table: [a for a in attempts if table in (answer.table for answer in a.answers.values())] for table in teachers.opened}


def _answer_errors(attempts: list[Attempt], teachers: Teachers) -> dict[str, int]:
    """By table, the attempts it was asked about and could not answer."""
    failed = [answer.table for attempt in attempts for answer in attempt.answers.values() if answer.error is not None]
    return {table: failed.count(table) for table in teachers.opened}


def _kl(attempts: list[Attempt], name: str) -> Mean:
    """Mean of log p - log q over the positions learnt from, by the student of now: the sampled reverse KL, nats per token."""
    known = [attempt.learned.logp for attempt in attempts if attempt.learned and name in attempt.learned.logp]
    gaps = [logp["student"] - logp[name] for logp in known]
    return Mean.of(np.concatenate([gap[np.isfinite(gap)] for gap in gaps]) if gaps else [])


def _context(attempts: list[Attempt]) -> dict[str, dict[str, float | None]]:
    """Per teacher name, what its context noted of the attempts it was asked about, averaged over them; only names with a note."""
    found: dict[str, dict[str, Mean]] = {}
    for attempt in attempts:
        for name, answer in attempt.answers.items():
            for key, note in answer.context_notes.items():
                known = found.setdefault(name, {})
                known[key] = known.get(key, Mean()) + Mean(note, 1)
    return {name: {key: mean.value for key, mean in sorted(means.items())} for name, means in sorted(found.items())}


def _credit(attempts: list[Attempt]) -> dict[str, dict[str, float | None]]:
    """Per rule: mean factor and shift over chosen positions, and its notes merged over the attempts that have them."""
    said: dict[str, list[Stats]] = {}
    for attempt in attempts:
        for name, share in attempt.shares.items():
            said.setdefault(name, []).append(_share(share, attempt.rollout.mask_T))
    return {name: {key: metric.value for key, metric in sorted(merge(found).items())} for name, found in said.items()}


def _share(share: Share, mask_T: np.ndarray) -> Stats:
    return {
        "factor_mean": Mean.of(np.broadcast_to(share.factor_T, mask_T.shape)[mask_T]),
        "shift_mean": Mean.of(np.broadcast_to(share.shift_T, mask_T.shape)[mask_T]),
        **{key: Mean(note, 1) if isinstance(note, float | int) else note for key, note in share.notes.items()},
    }
