"""What was computed for a step, as those said who computed it: samplers on their rollouts, teachers in their
answers, learners in their results. Here it is only added up, and no part is known.

A position is one token or denoising step that a model ran over. Of a text, the last token counts although
nothing runs after it, so that prompt and answer together are as long as they read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflux.types import Attempt

# in metrics.jsonl: of a step's attempts, of scorings, thrown away
TOKENS = ("tokens_sampled", "tokens_scored", "tokens_discarded")


@dataclass(frozen=True)
class Work:
    """What attempts cost until a learner gets them. `teacher_samples` and `taught` are positions by teacher
    table.
    """

    # positions that the student chose
    sampled: int = 0
    # positions that the student ran forward to choose them
    acted: int = 0
    # run forward by teachers that drew attempts
    drawn: Mapping[str, int] = field(default_factory=Counter)
    # read by teachers to answer
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
    """What a learner ran for one step: positions forward and backward, of `macs`
    multiply-accumulates each.
    """

    macs: int
    forward: int
    backward: int


class Landed:
    """The attempts of one step as they land. A prompt that is asked again after a jump replaces what it gave
    before, which is discarded.
    """

    def __init__(self) -> None:
        self.discarded = Work()
        # by prompt
        self._latest: dict[str, Work] = {}

    def add(self, prompt: str, work: Work) -> None:
        self.discarded += self._latest.pop(prompt, Work())
        self._latest[prompt] = work


def add_up(totals: dict[str, float], metrics: Mapping[str, Any]) -> None:
    """Add the tokens and FLOP of one step's line to those of the run."""
    for name in TOKENS:
        totals[name] += metrics.get(name, 0)
    totals["flops"] += sum(metrics["flops"].values())


def flops(learner: Ran, teacher_macs: Mapping[str, int], work: Work) -> dict[str, float]:
    """FLOP by role: 2 for each multiply-accumulate forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1).

    sample: 2 (S acted + sum over tables of T drawn), teach: 2 sum of T taught, learn: S (2 forward + 4
    backward), where S and T are multiply-accumulates of one position of the student and of each teacher
    table. Adapters are billed as if all weights had gradients.
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
    """What one optimiser step's scorings cost."""

    work: Work = field(default_factory=Work)
    # answers that could not be judged, of those sampled
    ungraded: int = 0

    @property
    def sampled(self) -> int:
        """Tokens that the student drew."""
        return self.work.sampled
