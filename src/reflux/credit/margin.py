"""The margin rule of Uni-OPD: the return of correct attempts at a prompt should exceed that of wrong ones by
a margin, where the return is the mean log-ratio of teacher and student. A smaller margin is corrected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit import margin_rules
from reflux.credit.base import CreditPart
from reflux.credit.log_ratio import Side, log_ratio_T, mean_of_finite
from reflux.credit.log_ratio_rules import ratio_advice
from reflux.rewards.base import unlike_threshold
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

MODES = ("mean", "minmax")
DIRECTIONS = ("spread", "lift", "down")

UNI_OPD = Paper("uni_opd", "Uni-OPD", "2605.03677", 2026)


@dataclass(frozen=True, config=STRICT)
class Margin(CreditPart):
    """Margin shift of Uni-OPD: if the margin m of a group is below `delta`, offsets close the gap delta - m.

    The return G of an attempt is the mean of r = log q(a) - log p(a) over its chosen positions, in nats per
    token. The margin m is the mean G of the correct attempts minus the mean G of the wrong ones (`mode =
    "mean"`), or the lowest correct G minus the highest wrong G ("minmax"). An attempt is correct if its
    reward is at least `threshold`. If a class is empty there is no margin and no shift. Each attempt gets a
    constant margin shift s. With lambda = delta - m, `direction` "spread" gives correct attempts +lambda/2
    and wrong ones -lambda/2, "lift" gives correct ones +lambda, and "down" gives wrong ones -lambda.

    `level`: "token" adds s at every position, so A_t = r_t + s and the differences between tokens remain.
    This is the released code. "attempt" gives every token of an attempt the advantage G + s, even if s = 0,
    with the advantage offset G + s - r_t. `action = "mask"` (an ablation) adds no offset. Instead
    `margin_keep` drops attempts (weight 0), and each class keeps at least the share `retain` of its attempts.
    `student`: the policy whose log-probs are used in r. "behaviour" is the policy that sampled. "now" is the
    current student, which with staleness needs one more forward pass. `teacher`: the teacher's name, as in
    the objectives.

    Attempts that ended in an error, were not judged or have no target of the teacher are left out. They have
    weight 1 and offset 0. A position whose r is not finite is left out of G. The shift depends on the
    outcome, so it is not a baseline: it moves the optimum, and it is partly ordinary reinforcement learning.
    Neutral: delta = -inf with level "token". r is used without the baseline of the objective, because r +
    KL(p || q) has mean 0 everywhere.

    Notes: `margin`; `mixed_fraction` and `shifted_fraction` (shares of groups in which both classes are
    present, and with m < delta); `kept` with action "mask"; `return_correct`, `return_wrong`, and
    `return_cut` of attempts that reached the length limit. arXiv 2605.03677 (Uni-OPD). Its text prints minmax
    and lift, and its runs use mean and spread. Its failed teacher calls count as G = 0; here they are left
    out.
    """

    when: ClassVar[str] = (
        "There are a verifier, groups of attempts, and one teacher or one for each route of the prompts. "
        "`reflux difficulty` balances the prompts beforehand. The metrics give the share of groups that are "
        "mixed and that are shifted (`mixed_fraction`, `shifted_fraction`), and the attempts that each "
        "teacher was asked to score (`asked`)."
    )

    delta: float = 0.4
    mode: Literal["mean", "minmax"] = "mean"
    direction: Literal["spread", "lift", "down"] = "spread"
    action: Literal["shift", "mask"] = "shift"
    level: Literal["token", "attempt"] = "token"
    threshold: float = 0.5
    student: Side = "behaviour"
    retain: float = 0.25
    teacher: str = "main"

    min_group = 2

    def __post_init__(self) -> None:
        _check_delta(self.delta, endless=self.action == "mask")
        _check_retain(self.retain)
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite reward, got {self.threshold}")
        if self.action == "mask" and self.level == "attempt":
            raise ValueError('action = "mask" drops attempts and adds no offset. Remove level = "attempt"')

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (UNI_OPD,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return margin_rules.refusals(self, where, cfg)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from ratio_advice(where, self.student, cfg)
        yield from unlike_threshold(where, self.threshold, cfg.rewards)

    @property
    def gives_offsets(self) -> bool:
        return self.action == "shift"

    @property
    def requirements(self) -> Requirements:
        return Requirements(reward=True, logp=True, now_topk=int(self.student == "now"))

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        known = [
            scored
            for scored in (self._scored(index, attempt) for index, attempt in enumerate(group))
            if scored is not None
        ]
        returns, correct = [one.value for one in known], [one.correct for one in known]
        found = margin(returns, correct, self.mode)
        notes = {
            "mixed_fraction": float(found is not None),
            "shifted_fraction": float(found is not None and found < self.delta),
        }
        notes |= {} if found is None else {"margin": found}
        shares = [Credit(notes=dict(notes)) for _ in group]
        if self.action == "mask":
            for one, kept in zip(
                known, margin_keep(returns, correct, self.delta, self.mode, self.retain), strict=True
            ):
                shares[one.index] = Credit(
                    weight_T=float(kept), notes={**notes, **one.notes, "kept": float(kept)}
                )
            return shares
        for one, shift in zip(
            known, margin_shifts(returns, correct, self.delta, self.mode, self.direction), strict=True
        ):
            shares[one.index] = Credit(
                advantage_offset_T=one.advantage_offset_T(shift) if self.level == "attempt" else shift,
                notes={**notes, **one.notes},
            )
        return shares

    def _scored(self, index: int, attempt: Attempt) -> Scored | None:
        verdict, ratio_T = attempt.verdict, log_ratio_T(attempt, self.teacher, self.student)
        value = None if ratio_T is None else mean_of_finite(ratio_T)
        if verdict is None or ratio_T is None or value is None:
            return None
        return Scored(index, ratio_T, value, verdict >= self.threshold, attempt.rollout.finish == "length")


@plain(frozen=True)
class Scored:
    """An attempt that enters the statistics."""

    # its position in the group
    index: int
    # log-ratio of teacher and student, nats, [T]; NaN where the student did not choose
    ratio_T: np.ndarray
    # the return of the attempt, nats per token
    value: float
    # True if its reward is at least the threshold
    correct: bool
    # True if it reached the length limit
    cut: bool

    @property
    def notes(self) -> dict[str, float]:
        found = {"return_correct" if self.correct else "return_wrong": self.value}
        return {**found, "return_cut": self.value} if self.cut else found

    def advantage_offset_T(self, shift: float) -> np.ndarray:
        """The offset, [T], with which every token's advantage is the return plus `shift`. Positions without a
        finite log-ratio get `shift` alone.
        """
        flat_T = self.value + shift - self.ratio_T
        return np.where(np.isfinite(flat_T), flat_T, shift)


def margin(returns: Sequence[float], correct: Sequence[bool], mode: str) -> float | None:
    """The margin of a group: the return of the correct attempts minus that of the wrong ones, in the unit of
    the returns (nats per token). None if a class is empty.

    mode "mean": mean of the correct minus mean of the wrong. mode "minmax": the lowest correct minus the
    highest wrong. Unequal lengths, a return that is not finite, or an unknown mode: ValueError.
    """
    good, bad = _classes(returns, correct)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return _margin([returns[i] for i in good], [returns[i] for i in bad], mode)


def margin_shifts(
    returns: Sequence[float],
    correct: Sequence[bool],
    delta: float = 0.4,
    mode: str = "mean",
    direction: str = "spread",
) -> list[float]:
    """One shift per attempt, nats. With these shifts the margin of the group, m before, is max(m, delta).
    returns, correct: the return and the verdict of each attempt. mode: as in `margin`.

    With lambda = delta - m: "spread" gives +lambda/2 to the correct attempts and -lambda/2 to the wrong ones,
    "lift" gives +lambda and 0, "down" gives 0 and -lambda. All shifts are 0 if m >= delta or if a class is
    empty. delta may be negative, or -inf (never a shift). Raises ValueError if delta is NaN or +inf, and in
    the cases of `margin`.
    """
    _check_delta(delta)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    found = margin(returns, correct, mode)
    if found is None or found >= delta:
        return [0.0] * len(returns)
    gap = delta - found
    up, down = {"spread": (gap / 2, -gap / 2), "lift": (gap, 0.0), "down": (0.0, -gap)}[direction]
    return [up if right else down for right in correct]


def margin_keep(
    returns: Sequence[float],
    correct: Sequence[bool],
    delta: float = 0.4,
    mode: str = "mean",
    retain: float = 0.25,
) -> list[bool]:
    """True for each attempt that stays. While the margin m of the group is below delta, the correct attempt
    with the lowest return or the wrong one with the highest is dropped, whichever raises m more.

    If both raise m equally, the correct one is dropped. Among equal returns of a class, the first one is
    dropped. The loop ends when no drop raises m. A class keeps at least max(1, floor(retain * size))
    attempts. If a class is empty, all stay. With delta = +inf attempts are dropped as long as m rises. Raises
    ValueError in the cases of `margin`, if delta is NaN, and if retain is outside [0, 1].
    """
    _check_delta(delta, endless=True)
    _check_retain(retain)
    found = margin(returns, correct, mode)
    good, bad = _classes(returns, correct)
    # Sorted so that the next attempt to drop comes first.
    good, bad = sorted(good, key=lambda i: (returns[i], i)), sorted(bad, key=lambda i: (-returns[i], i))
    least_good, least_bad = (max(1, math.floor(retain * len(side))) for side in (good, bad))
    while found is not None and found < delta:
        fewer = [(good[1:], bad)] if len(good) > least_good else []
        fewer += [(good, bad[1:])] if len(bad) > least_bad else []
        margins = [
            _margin([returns[i] for i in up], [returns[i] for i in down], mode) or 0.0 for up, down in fewer
        ]
        best = max(range(len(fewer)), key=margins.__getitem__, default=None)
        if best is None or not margins[best] > found:
            break
        (good, bad), found = fewer[best], margins[best]
    return [i in {*good, *bad} for i in range(len(returns))]


def _margin(good: list[float], bad: list[float], mode: str) -> float | None:
    if not good or not bad:
        return None
    return min(good) - max(bad) if mode == "minmax" else _mean(good) - _mean(bad)


def _mean(values: list[float]) -> float:
    """The mean. It is exact if all values are equal, so dropping one of them cannot raise m by rounding."""
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def _classes(returns: Sequence[float], correct: Sequence[bool]) -> tuple[list[int], list[int]]:
    if len(returns) != len(correct):
        raise ValueError(
            f"each return needs a verdict: got {len(returns)} returns and {len(correct)} verdicts"
        )
    for index, value in enumerate(returns):
        if not math.isfinite(value):
            raise ValueError(
                f"the return of attempt {index} of the group is {value}, but returns must be finite. "
                "Leave out attempts that the teacher did not score"
            )
    return [i for i, right in enumerate(correct) if right], [
        i for i, right in enumerate(correct) if not right
    ]


def _check_delta(delta: float, endless: bool = False) -> None:
    if math.isnan(delta) or (delta == math.inf and not endless):
        raise ValueError(f"delta must be a number of nats, or -inf for no shift, got {delta}")


def _check_retain(retain: float) -> None:
    if not 0 <= retain <= 1:
        raise ValueError(f"retain is the share of a class that stays, so 0 <= retain <= 1, got {retain}")
