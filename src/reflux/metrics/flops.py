"""Add up the computation of a step. Samplers report it in rollouts, teachers in answers, learners in results.
This module does not depend on particular kinds of samplers, teachers or learners.

A position is one token or denoising step that a model ran over. The last token of a text counts,
although no model runs after it. So the count equals the length of prompt and answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflux.types import Attempt, Group

# the beginning of the keys under which the use of chat servers is added up
CHAT = "chat."
# keys in metrics.jsonl: tokens of a step's attempts, tokens of extrapolation's scorings, discarded tokens
TOKENS = ("tokens_sampled", "tokens_scored", "tokens_discarded")


@dataclass(frozen=True)
class Work:
    """Positions computed for attempts before a learner gets them. The keys of `drawn` and `taught` are
    teachers' keys in the recipe (NAME of `[teachers.NAME]`).
    """

    # positions that the student chose
    sampled: int = 0
    # positions that the student ran forward to choose them
    acted: int = 0
    # positions that teachers ran forward to sample attempts
    drawn: Mapping[str, int] = field(default_factory=Counter)
    # positions that teachers ran forward to answer
    taught: Mapping[str, int] = field(default_factory=Counter)

    @classmethod
    def of(cls, attempts: Sequence[Attempt]) -> Work:
        rollouts = [attempt.rollout for attempt in attempts]
        drawn, taught = Counter[str](), Counter[str]()
        for attempt in attempts:
            drawn.update(attempt.rollout.drawn_positions)
            for answer in attempt.answers.values():
                taught[answer.table] += answer.positions_read
        chosen = sum(int(rollout.mask_T.sum()) for rollout in rollouts if rollout.positions_acted)
        return cls(chosen, sum(rollout.positions_acted for rollout in rollouts), drawn, taught)

    def __add__(self, other: Work) -> Work:
        drawn, taught = Counter(self.drawn), Counter(self.taught)
        drawn.update(other.drawn)
        taught.update(other.taught)
        return Work(self.sampled + other.sampled, self.acted + other.acted, drawn, taught)


@dataclass(frozen=True)
class Ran:
    """Positions that a learner ran forward and backward in one step. One position takes `macs`
    multiply-accumulates.
    """

    macs: int
    forward: int
    backward: int


class Landed:
    """The computation of the groups that are sampled and not trained on. If a prompt is sampled again after a
    refresh, the new attempts replace the old ones, which count as discarded.
    """

    def __init__(self) -> None:
        # by the step that the group was asked for, and its prompt
        self._latest: dict[tuple[int, str], Work] = {}
        self._discarded: dict[tuple[int, str], Work] = {}

    def add(self, group: Group) -> None:
        key = _place(group)
        if key in self._latest:
            self._discarded[key] = self._discarded.get(key, Work()) + self._latest[key]
        self._latest[key] = Work.of(group)

    def take(self, groups: Iterable[Group]) -> Work:
        """What was discarded before these groups were sampled. They are trained on now, and forgotten."""
        discarded = Work()
        for key in map(_place, groups):
            self._latest.pop(key, None)
            discarded += self._discarded.pop(key, Work())
        return discarded


def _place(group: Group) -> tuple[int, str]:
    return group[0].asked_step, group[0].rollout.prompt.key


def add_up(totals: dict[str, float], metrics: Mapping[str, Any]) -> None:
    """Add the tokens, the FLOP and the use of chat servers in the metrics of one step to `totals`, the sums
    of the run.
    """
    for name in TOKENS:
        totals[name] += metrics.get(name, 0)
    totals["flops"] += sum(metrics["flops"].values())
    for role, counts in metrics.get("chat", {}).items():
        for name, count in counts.items():
            key = f"{CHAT}{role}.{name}"
            totals[key] = totals.get(key, 0) + count


def flops(learner: Ran, teacher_macs: Mapping[str, int], work: Work) -> dict[str, float]:
    """FLOP by role: 2 for each multiply-accumulate forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1).

    sample: 2 (S acted + sum over teachers of T drawn). teach: 2 sum over teachers of T taught. learn: S (2
    forward + 4 backward). S and T are the multiply-accumulates of one position of the student and of a
    teacher. learner: the positions of the learner. teacher_macs: T by the teacher's key in the recipe. work:
    the positions of sampler and teachers. Adapters are counted as if all weights had gradients.
    """
    return {
        "sample": 2.0 * (learner.macs * work.acted + _macs(teacher_macs, work.drawn)),
        "teach": 2.0 * _macs(teacher_macs, work.taught),
        "learn": learner.macs * (2.0 * learner.forward + 4.0 * learner.backward),
    }


def _macs(by_table: Mapping[str, int], positions: Mapping[str, int]) -> int:
    return sum(by_table[table] * count for table, count in positions.items())


@dataclass
class Spent:
    """The cost of extrapolation's scorings in one optimiser step."""

    work: Work = field(default_factory=Work)
    # number of sampled answers that could not be judged
    ungraded: int = 0

    @property
    def sampled(self) -> int:
        """Positions that the student chose."""
        return self.work.sampled
