"""Balances correct and wrong attempts at a prompt: a random part of the larger class is left out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.credit.margin import UNI_OPD
from reflux.rewards.base import unlike_threshold
from reflux.types import Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


def _named(ratio: object) -> object:
    """Replaces None with the name that a recipe can write, because TOML has no null."""
    return "none" if ratio is None else ratio


@dataclass(frozen=True, config=STRICT)
class Balance(CreditPart):
    """Weight 0 on random attempts of the larger class of a group, so that correct : wrong is `ratio`.

    The other attempts have weight 1. There is no advantage offset. An attempt is correct if its reward is at
    least `threshold`. The function `keep` defines which attempts stay. ratio 0 keeps only the wrong attempts,
    inf only the correct ones, and "none" all of them (neutral). With 0 and inf the rule is a gate by the
    verdict alone, and one attempt per prompt is enough. With a finite ratio above 0, one class always
    stays complete. Groups that are all correct or all wrong stay complete too. Attempts that ended in an
    error or were not judged are not counted and keep weight 1. Left-out attempts stay in the margins of the
    credit rule `margin`, and in the denominators of the loss aggregations "token-mean" and
    "seq-mean-token-mean". With "token-mean-weighted" the attempts that stay count for more. Note `kept`: the
    share of judged attempts that stay. arXiv 2605.03677 (Uni-OPD). The paper does not print its tolerance
    (here none), and its code counts an attempt without a verdict as wrong.
    """

    ratio: Annotated[float | Literal["none"], BeforeValidator(_named)] = 1.0
    threshold: float = 0.5

    gives_offsets = False

    def __post_init__(self) -> None:
        if self.ratio != "none":
            _check(self.ratio)
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite reward, got {self.threshold}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (UNI_OPD,)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.ratio != "none" and cfg.loss_aggregation == "token-mean-weighted":
            yield (
                f'{where} with loss_aggregation = "token-mean-weighted": the attempts that stay count for '
                'more; see "seq-mean-token-mean".'
            )
        yield from unlike_threshold(where, self.threshold, cfg.rewards)

    @property
    def min_group(self) -> int:
        """1 where one class is left out whole, for which no comparison is needed."""
        return 1 if self.ratio in (0, math.inf) else 2

    @property
    def requirements(self) -> Requirements:
        return Requirements(reward=True)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        verdicts = [attempt.verdict for attempt in group]
        correct = [verdict >= self.threshold for verdict in verdicts if verdict is not None]
        if self.ratio == "none" or not correct:
            return [Credit() for _ in group]
        kept = iter(keep(correct, self.ratio, step_context.rng("balance", group[0].rollout.prompt.key)))
        return [Credit() if verdict is None else _share(next(kept)) for verdict in verdicts]


def keep(correct: list[bool], ratio: float, rng: random.Random) -> list[bool]:
    """True for each attempt that stays. correct: for each judged attempt, True if it is correct. One class
    stays complete. The other is reduced towards `ratio` = correct : wrong, with the number of its attempts
    rounded down.

    There are n_c correct and n_w wrong attempts. ratio 0 keeps only the wrong ones and inf only the correct
    ones, even if no attempt stays. Otherwise, if one class is empty, all stay. Otherwise d_c = floor(n_w *
    ratio) and d_w = floor(n_c / ratio). If n_c > d_c >= 1, then d_c random correct ones and all wrong ones
    stay. Else if n_w > d_w >= 1, then d_w random wrong ones and all correct ones stay. Else all stay. So a d
    that rounds to 0 removes nothing. rng: chooses the random attempts. [] gives []. A negative ratio or NaN:
    ValueError.
    """
    _check(ratio)
    if ratio in (0, math.inf):
        return [right == (ratio > 0) for right in correct]
    good, bad = ([i for i, right in enumerate(correct) if bool(right) == wanted] for wanted in (True, False))
    if not good or not bad:
        return [True] * len(correct)
    # Limited to the size of the class, at which it stays complete. So no quotient overflows.
    few_good = math.floor(min(len(bad) * ratio, len(good)))
    few_bad = math.floor(min(len(good) / ratio, len(bad)))
    if len(good) > few_good >= 1:
        staying = {*bad, *rng.sample(good, few_good)}
    elif len(bad) > few_bad >= 1:
        staying = {*good, *rng.sample(bad, few_bad)}
    else:
        staying = {*good, *bad}
    return [i in staying for i in range(len(correct))]


def _share(kept: bool) -> Credit:
    return Credit(weight_T=float(kept), notes={"kept": float(kept)})


def _check(ratio: float) -> None:
    if math.isnan(ratio) or ratio < 0:
        raise ValueError(f'ratio is correct : wrong and must be >= 0 (or "none" to keep all), got {ratio}')
