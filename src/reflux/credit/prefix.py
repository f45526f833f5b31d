"""Restricts the loss to the first tokens of an answer, where the teacher can correct most."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
    """Weight 1 on the chosen positions [start, start + length) of each attempt, and 0 on the others.

    Positions where the student did not choose are not counted and keep weight 1. There is no advantage
    offset. This rule is for rollouts that are generated in full. A schedule as the sampler's
    `train_max_tokens` cuts the generation itself, and gives the same gradient with loss_aggregation
    "token-mean-weighted". `length` may be a schedule over optimiser steps. Fractions are rounded down. A
    length below 1 raises ValueError. `start` > 0 serves to study later windows. Note `kept`: the share of
    chosen positions that stay.

    `special_tokens` false: special tokens inside the prefix have weight 0 too. So a teacher that thinks in
    special tokens of its own does not teach them to a base student. Special tokens are those that the
    student's tokenizer declares special; decoding leaves them out of the text. A token that ends a turn keeps
    its weight, so the student still learns to end. Special tokens count towards `length`, as they do towards
    the sampler's `train_max_tokens`, and in a denominator that counts chosen positions. The note `kept`
    leaves special tokens out. Only attempts made of tokens have special tokens. The token that opens thinking
    belongs to the prompt: see `prompt_suffix` of the student.

    Neutral: a length of at least the longest attempt, with `special_tokens` true. arXiv 2602.15260 does not
    teach special tokens. It does not state whether the end of the sequence is one of them.
    """

    length: Number
    start: int = 0
    # false: special tokens have weight 0, except the token that ends a turn
    special_tokens: bool = True

    gives_offsets = False
    min_group = 1

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
            yield (
                f"{where}: cutting answers that the student did not write teaches it never to end (arXiv "
                "2602.15260). Use sampler 'hf'."
            )
        if (step := first_below(self.length, 1, cfg.steps)) is not None:
            yield (
                f"{where}.length falls below 1 position at step {step}. End the schedule at 1 or more "
                "(stop = 1)."
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements(specials=not self.special_tokens)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        length = int(at(self.length, step_context.step) // 1)
        if length < 1:
            raise ValueError(
                f"the length of a prefix falls below 1 position at step {step_context.step}. End the "
                "schedule at 1 or more"
            )
        return [self._share(attempt, length) for attempt in group]

    def _share(self, attempt: Attempt, length: int) -> Credit:
        mask_T = attempt.rollout.mask_T
        if not mask_T.any():
            return Credit()
        # the index among the chosen positions, from 0
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
            "special_tokens = false leaves out tokens, and a flow rollout has none. Keep it at true."
        )
    if rollout.special_T is None:
        raise ValueError(
            f"special_tokens = false needs the special tokens of each rollout, and that of prompt "
            f"{rollout.prompt.id} has none recorded. Add `Requirements(specials=True)` to the `requirements` "
            "of the part."
        )
    return rollout.special_T
