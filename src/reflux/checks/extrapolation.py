"""Extrapolation: the weights that they move are those that are looked at."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig


def problems(cfg: RunConfig) -> Iterator[str]:
    if cfg.extrapolation is not None and cfg.learner.averages:
        yield (
            "learner.average is what would be evaluated and exported, and a jump moves the weights but not "
            "their average: the jump would "
            "hardly be seen. Leave out learner.average, or the extrapolation."
        )
