"""The papers behind a run: those that its parts name, and those that follow from the run as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.papers import GKD, PREFIX_OPD, Paper
from reflux.config.recipe import RunConfig
from reflux.config.registry import within

# the groups of parts that make the method; their papers come first
_FIRST = ("objectives", "credit", "contexts", "teachers", "extrapolation")


def papers(cfg: RunConfig) -> list[Paper]:
    """Each paper once, in this order: the method's parts, the run as a whole, the other parts."""
    parts = list(within(cfg))
    method = [
        paper for first in _FIRST for _, group, part in parts if group == first for paper in part.papers(cfg)
    ]
    others = [paper for _, group, part in parts if group not in _FIRST for paper in part.papers(cfg)]
    return list({paper.key: paper for paper in (*method, *_whole(cfg), *others)}.values())


def _whole(cfg: RunConfig) -> Iterator[Paper]:
    if len({cfg.draw(step).max_positions for step in range(cfg.steps)}) > 1:
        yield PREFIX_OPD
    if cfg.sampler.on_policy and cfg.teachers:
        yield GKD
