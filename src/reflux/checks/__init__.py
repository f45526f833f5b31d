"""Check that the parts of a recipe fit together, before any weight is loaded.

Each part has its own rules (`Part.refusals`, `Part.advice`). The modules of this package contain the rules
that concern several parts, one module per subject, each with a function `problems(cfg)`. These rules use only
the protocols of the groups (samplers, teachers and so on) and name no particular part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from reflux.checks import credit, domains, extrapolation, objectives, sampling, teacher_rules
from reflux.checks.advice import warnings
from reflux.checks.inputs import inputs, models
from reflux.config.recipe import RunConfig
from reflux.config.registry import within
from reflux.config.requirements import Requirements
from reflux.errors import ConfigError

__all__ = ["inputs", "join", "models", "warnings"]


def join(cfg: RunConfig) -> Requirements:
    """The union of what objectives, credit rules, contexts and rewards of the recipe require of attempts.
    Raises ConfigError if parts of the recipe do not fit together, with every problem found, one per line.
    """
    problems = list(_problems(cfg))
    if problems:
        raise ConfigError("\n".join(problems))
    speakers = [
        *cfg.objectives,
        *cfg.credit.values(),
        *(teacher.context for teacher in cfg.teachers.values()),
    ]
    required = [*(part.requirements for part in speakers), *objectives.listed(cfg)]
    return reduce(Requirements.__or__, required, Requirements(reward=bool(cfg.rewards)))


def _problems(cfg: RunConfig) -> Iterator[str]:
    for about in (domains, sampling, teacher_rules, objectives, credit, extrapolation):
        yield from about.problems(cfg)
    for where, _, part in within(cfg):
        yield from part.refusals(where, cfg)
