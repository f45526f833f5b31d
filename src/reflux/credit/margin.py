"""Restore the order: where a prompt's correct attempts do not look better to the teacher than its wrong ones,
by a margin, make them so.
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
from reflux.credit.log_ratio import Side, log_ratio_T
from reflux.rewards.base import unlike_threshold
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

MODES = ("mean", "minmax")
DIRECTIONS = ("spread", "lift", "down")

UNI_OPD = Paper("uni_opd", "Uni-OPD", "2605.03677", 2026)


@dataclass(frozen=True, config=STRICT)
class Margin(CreditPart):
    """Per group, over attempts with a verdict and a return: if margin m < delta, a constant per attempt
    closes the gap delta - m.

    Return G of an attempt: the mean of r = log q(a) - log p(a) over its chosen positions, nats per token. m:
    mean G of the correct minus mean G of the wrong (`mode = "mean"`), or lowest correct minus highest wrong
    ("minmax"); correct is reward >= `threshold`. No m where a class is empty, hence no shift. With lambda =
    delta - m: `direction` "spread" gives correct +lambda/2 and wrong -lambda/2, "lift" correct +lambda,
    "down" wrong -lambda.

    `level`: "token" adds the constant s to every position (A_t = r_t + s, the released code: differences
    between tokens survive); "attempt" gives every token of an attempt G + s, also where s = 0, by the shift G
    + s - r_t. `action = "mask"` (an ablation) shifts nothing: `margin_keep` drops attempts (factor 0)
    instead, each class down to the share `retain` of itself at most. `student`: whose log-probs r is made of,
    "behaviour" as it acted, "now" one more pass under staleness. `teacher`: by the name objectives use.

    Attempts that ended in an error, were not judged, or about which the teacher said nothing stay outside:
    factor 1, shift 0. A position whose r is not finite is left out of G. The shift depends on the outcome, so
    it is no baseline: it moves the optimum, and is part ordinary reinforcement. Neutral: delta = -inf with
    level "token". Raw r is used whatever baseline the objective has: r + KL(p || q) has mean 0 everywhere.

    Notes: `margin`; `mixed_fraction` and `shifted_fraction` (of groups: both classes present; m < delta),
    `kept` under the mask; `return_correct`, `return_wrong`, and `return_cut` of attempts that hit the length
    limit. arXiv 2605.03677 (Uni-OPD), whose text prints minmax and lift, whose runs are mean and spread; its
    failed teacher calls count as G = 0, here they count nowhere.
    """

    when: ClassVar[str] = (
        "There are a verifier, groups of attempts, and one teacher or one for each route of the prompts. "
        "`reflux difficulty` "
        "balances the prompts beforehand. The metrics say how often a group is mixed and how often it is "
        "shifted "
        "(`mixed_fraction`, `shifted_fraction`), and what each teacher was asked (`asked`)."
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

    min_group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_delta(self.delta, endless=self.action == "mask")
        _check_retain(self.retain)
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite reward, got {self.threshold}")
        if self.action == "mask" and self.level == "attempt":
            raise ValueError(
                'action = "mask" drops attempts and shifts nothing, so level = "attempt" has no meaning '
                "beside it"
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (UNI_OPD,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return margin_rules.refusals(self, where, cfg)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.student == "behaviour" and cfg.max_staleness:
            yield f'{where}: student = "behaviour" compares with the student as it was up to {cfg.max_staleness} steps ago; see "now".'
        yield from unlike_threshold(where, self.threshold, cfg.rewards)

    @property
    def shifts(self) -> bool:
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
        if verdict is None or ratio_T is None or not np.isfinite(ratio_T).any():
            return None
        return Scored(index, ratio_T, verdict >= self.threshold, attempt.rollout.finish == "length")


@plain(frozen=True)
class Scored:
    """An attempt inside the statistics."""

    index: int
    ratio_T: np.ndarray
    correct: bool
    cut: bool

    @property
    def value(self) -> float:
        """Its return, nats per token."""
        return float(self.ratio_T[np.isfinite(self.ratio_T)].mean())

    @property
    def notes(self) -> dict[str, float]:
        found = {"return_correct" if self.correct else "return_wrong": self.value}
        return {**found, "return_cut": self.value} if self.cut else found

    def advantage_offset_T(self, shift: float) -> np.ndarray:
        """What makes every token's advantage the return plus `shift`; positions without a ratio get `shift`
        alone.
        """
        flat_T = self.value + shift - self.ratio_T
        return np.where(np.isfinite(flat_T), flat_T, shift)


def margin(returns: Sequence[float], correct: Sequence[bool], mode: str) -> float | None:
    """How far the correct attempts lie above the wrong ones, in the unit of the returns (nats per token).
    None where a class is empty.

    mode "mean": mean of the correct minus mean of the wrong; "minmax": the lowest correct minus the highest
    wrong. Unequal lengths, a return that is not finite, an unknown mode: ValueError.
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
    """One shift per attempt, nats, after which the margin in that mode is max(m, delta).

    With lambda = delta - m: "spread" +lambda/2 for the correct and -lambda/2 for the wrong, "lift" +lambda
    and 0, "down" 0 and -lambda. All 0 where m >= delta, or where a class is empty. delta may be negative, or
    -inf (never a shift); NaN or +inf: ValueError, and as `margin`.
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
    """Which attempts stay: while m < delta, drop the lowest correct or the highest wrong one, whichever
    raises m more.

    Ties of the two go to the correct one; equal returns of a class to the first. It ends where no drop
    strictly raises m. A class keeps at least max(1, floor(retain * size)) members. An empty class: all stay.
    delta = +inf: as far as it goes. ValueError as `margin`, for a delta that is NaN, and for retain outside
    [0, 1].
    """
    _check_delta(delta, endless=True)
    _check_retain(retain)
    found = margin(returns, correct, mode)
    good, bad = _classes(returns, correct)
    # next to go first
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
    """Exact where all are equal, so that dropping one of them raises nothing by rounding."""
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def _classes(returns: Sequence[float], correct: Sequence[bool]) -> tuple[list[int], list[int]]:
    if len(returns) != len(correct):
        raise ValueError(f"a verdict for each return: got {len(returns)} returns and {len(correct)} verdicts")
    for index, value in enumerate(returns):
        if not math.isfinite(value):
            raise ValueError(
                f"return {index} of the group is {value}; attempts the teacher said nothing about stay "
                "outside"
            )
    return [i for i, right in enumerate(correct) if right], [
        i for i, right in enumerate(correct) if not right
    ]


def _check_delta(delta: float, endless: bool = False) -> None:
    if math.isnan(delta) or (delta == math.inf and not endless):
        raise ValueError(f"delta must be a number of nats, or -inf to shift nothing, got {delta}")


def _check_retain(retain: float) -> None:
    if not 0 <= retain <= 1:
        raise ValueError(f"retain is the share of a class that stays, so 0 <= retain <= 1, got {retain}")
