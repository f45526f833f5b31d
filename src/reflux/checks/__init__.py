"""One function joins the parts: it refuses what does not fit, in sentences, before any weight is loaded.

Teachers declare what they offer, objectives what they accept, credit rules and contexts what they want. Each check is a sentence a user
can act on; the modules of this package hold them by what they are about, each as `problems(cfg)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from reflux.checks import accelerators, credit, domains, objectives, sampling, teachers, verdicts
from reflux.checks.advice import warnings
from reflux.checks.inputs import inputs, models
from reflux.config import RunConfig
from reflux.errors import ConfigError
from reflux.types import Wants

__all__ = ["inputs", "join", "models", "warnings"]


def join(cfg: RunConfig) -> Wants:
    """What the assembled parts want computed. Raises ConfigError with every problem found, one a line."""
    problems = list(_problems(cfg))
    if problems:
        raise ConfigError("\n".join(problems))
    speakers = [*cfg.objectives, *cfg.credit.values(), *(teacher.context for teacher in cfg.teachers.values())]
    return reduce(lambda joined, part: joined | part.wants, speakers, Wants(reward=cfg.reward is not None))


def _problems(cfg: RunConfig) -> Iterator[str]:
    for about in (domains, sampling, teachers, objectives, credit, verdicts, accelerators):
        yield from about.problems(cfg)
