"""Learn from the first tokens only: most of what a teacher can correct lies early in an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.papers import PREFIX_OPD, Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.schedules import Number, at, first_below, number
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.types import Attempt, Credit, Group, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


@dataclass(frozen=True, config=STRICT)
class Prefix(CreditPart):
    """Factor 1 on the chosen positions [start, start + length) of each attempt, 0 on its other chosen ones;
    positions where the student did not choose are not counted and keep factor 1. No shift.

    For rollouts generated in full; a schedule as the sampler's `train_max_tokens` cuts the generation itself
    and gives the same gradient under the denominator `kept`. `length` may be a schedule over optimiser steps,
    fractions floored; below 1: ValueError. `start` > 0 exists to study later windows. Note `kept`: the share
    of chosen positions that stay.

    `special_tokens` false: special tokens inside the prefix have factor 0 too, so a teacher that thinks in
    tokens of its own does not teach a base student those. They are the tokens that the student's tokenizer
    declares special, which decoding leaves out of the text; a token that ends a turn keeps its weight, so
    that the student still learns to end. They count towards `length`, as they do in a sampled cap, and in a
    denominator that counts chosen positions; `kept` leaves them out. Only attempts made of tokens have any.
    The opening token of thinking belongs to the prompt: see `prompt_suffix` of the student.

    Neutral: a length at or above the longest attempt, with `special_tokens` true. arXiv 2602.15260 does not
    teach special tokens and does not say whether the end of the sequence is one of them.
    """

    length: Number
    start: int = 0
    # false: special tokens weigh nothing, but for the one that ends a turn
    special_tokens: bool = True

    shifts = False
    min_group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        number(self.length, "length")
        if isinstance(self.length, (int, float)) and self.length < 1:
            raise ValueError(f"length must be at least 1 position, got {self.length}")
        if self.start < 0:
            raise ValueError(f"start counts chosen positions from 0, got {self.start}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (PREFIX_OPD,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.sampler.on_policy and cfg.sampler.rollouts is TokenRollout:
            yield f"{where}: cutting answers the student did not write teaches it never to end (arXiv 2602.15260). Use sampler 'hf'."
        if (step := first_below(self.length, 1, cfg.steps)) is not None:
            yield f"{where}.length falls below 1 position at step {step}. End the schedule at 1 or more (stop = 1)."

    @property
    def requirements(self) -> Requirements:
        return Requirements(specials=not self.special_tokens)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        length = int(at(self.length, step_context.step) // 1)
        if length < 1:
            raise ValueError(
                f"the length of a prefix falls below 1 position at step {step_context.step}; end the "
                "schedule at 1 or more"
            )
        return [self._share(attempt, length) for attempt in group]

    def _share(self, attempt: Attempt, length: int) -> Credit:
        mask_T = attempt.rollout.mask_T
        if not mask_T.any():
            return Credit()
        # which chosen position this is
        order_T = np.cumsum(mask_T) - 1
        inside_T = (order_T >= self.start) & (order_T < self.start + length)
        if not self.special_tokens:
            inside_T &= ~_special_T(attempt)
        return Credit(
            weight_T=np.where(mask_T, inside_T, True).astype(np.float32),
            notes={"kept": float(inside_T[mask_T].mean())},
        )


def _special_T(attempt: Attempt) -> np.ndarray:
    rollout = attempt.rollout
    if not isinstance(rollout, TokenRollout):
        raise ValueError(
            "special_tokens = false leaves out tokens, and a flow rollout has none. Leave it at true."
        )
    if rollout.special_T is None:
        raise ValueError(
            f"special_tokens = false needs to know which tokens are special, and prompt {rollout.prompt.id} "
            "came without that. Ask for it: "
            f"`Requirements(specials=True)`."
        )
    return rollout.special_T
