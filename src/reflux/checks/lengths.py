"""Warnings about the limits of an attempt's length in training and in evaluations."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.types import TokenRollout


def warnings(cfg: RunConfig) -> Iterator[str]:
    shortest = min(
        (cfg.draw(step).max_positions for step in range(cfg.steps)), default=cfg.evaluation_positions
    )
    if cfg.rewards and cfg.sampler.on_policy and shortest < cfg.evaluation_positions:
        yield (
            f"rewards are used, but training answers may be cut at {shortest} positions, so unfinished "
            "answers are rewarded."
        )
    if cfg.sampler.rollouts is not TokenRollout:
        return
    for name, evaluation in cfg.evals.items():
        yield from _shorter(cfg, f"evals.{name}", evaluation.max_tokens)
    if cfg.extrapolation is not None:
        yield from _shorter(cfg, "extrapolation", cfg.extrapolation.scoring.max_tokens)


def cut_by_window(cfg: RunConfig, context_tokens: int | None) -> Iterator[str]:
    """A warning if the length limit of an answer is not below the student's context window. context_tokens:
    the size of this window; with None (not known), and for images, there is no warning.
    """
    if (
        context_tokens is not None
        and cfg.sampler.rollouts is TokenRollout
        and cfg.evaluation_positions >= context_tokens
    ):
        yield (
            f"sampler.max_tokens = {cfg.evaluation_positions} does not fit into the student's context window "
            f"of {context_tokens} tokens. Answers are cut at the window, in evaluations too. Lower it to the "
            "tokens that remain in the window after a prompt."
        )


def _shorter(cfg: RunConfig, where: str, limit: int | None) -> Iterator[str]:
    """A warning if one evaluation has a lower limit than training, so that it cuts answers that training does
    not cut.
    """
    if limit is not None and limit < cfg.training_positions:
        yield (
            f"{where}.max_tokens = {limit} cuts answers that may have up to {cfg.training_positions} tokens "
            "in training, and unfinished answers count as wrong. Raise it, or remove it: the limit is then "
            f"the sampler's, {cfg.evaluation_positions}."
        )
