"""A rule about extrapolation: the weights that it moves must be those that are evaluated."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig


def problems(cfg: RunConfig) -> Iterator[str]:
    if cfg.extrapolation is not None and cfg.learner.averages:
        yield (
            "learner.average does not work with extrapolation: the averaged weights are evaluated and "
            "exported, and a jump moves the weights but not their average. Remove learner.average, or the "
            "extrapolation."
        )
