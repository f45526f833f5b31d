"""How long attempts may be in training and in evaluations: two limits, and what is seldom meant about them."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.types import TokenRollout


def warnings(cfg: RunConfig) -> Iterator[str]:
    shortest = min(
        (cfg.draw(step).max_positions for step in range(cfg.steps)), default=cfg.evaluation_positions
    )
    if cfg.rewards and cfg.sampler.on_policy and shortest < cfg.evaluation_positions:
        yield f"a reward is given while training answers may be cut at {shortest} positions: what rewards them meets unfinished answers."
    if cfg.sampler.rollouts is not TokenRollout:
        return
    for name, evaluation in cfg.evals.items():
        yield from _shorter(cfg, f"evals.{name}", evaluation.max_tokens)
    if cfg.extrapolation is not None:
        yield from _shorter(cfg, "extrapolation", cfg.extrapolation.scoring.max_tokens)


def cut_by_window(cfg: RunConfig, context_tokens: int | None) -> Iterator[str]:
    """Answers that cannot be written out even after the shortest prompt. Nothing is said of a window that is
    not known, or of images.
    """
    if (
        context_tokens is not None
        and cfg.sampler.rollouts is TokenRollout
        and cfg.evaluation_positions >= context_tokens
    ):
        yield (
            f"sampler.max_tokens = {cfg.evaluation_positions} does not fit into the student's window of "
            f"{context_tokens} tokens: answers "
            f"are cut there, in evaluations too. Lower it to what the window leaves after a prompt."
        )


def _shorter(cfg: RunConfig, where: str, limit: int | None) -> Iterator[str]:
    """A limit of one evaluation below what training writes: its answers are cut where those of training go
    on.
    """
    if limit is not None and limit < cfg.training_positions:
        yield (
            f"{where}.max_tokens = {limit} cuts answers that training lets run to {cfg.training_positions} "
            "tokens: unfinished ones count "
            f"as wrong. Raise it, or leave it out: then the limit is {cfg.evaluation_positions}, as the "
            "sampler says."
        )
