"""The names that teachers answer under, and the `[teachers.NAME]` tables of each name. A teacher answers
under the `alias` in its table, or else under the table's NAME.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reflux.teachers.base import alias_of
from reflux.types import FlowRollout, SampledTarget, Target, TopKTarget, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig


def objective_teachers(cfg: RunConfig) -> set[str]:
    """The names that the teachers of a run answer under."""
    return {alias_of(table, teacher) for table, teacher in cfg.teachers.items()}


def tables_of(cfg: RunConfig | PartContext, name: str) -> list[str]:
    """The teacher tables that answer under a name."""
    return [table for table, teacher in cfg.teachers.items() if alias_of(table, teacher) == name]


def measured(cfg: RunConfig | PartContext, name: str) -> list[str]:
    """The teacher tables to measure for `name`: all tables that answer under this name if there are several;
    otherwise the table with this NAME, or the one table that answers under it; empty if there is none.
    """
    spoken = tables_of(cfg, name)
    return [name] if name in cfg.teachers and len(spoken) < 2 else spoken


def unknown(cfg: RunConfig, where: str, name: str, or_said: bool = False) -> str:
    """A sentence that says there is no teacher with this name. where: the path of the key in the recipe that
    has the name. or_said: True if 'behaviour', the policy that sampled, is allowed too and is listed.
    """
    said = ", and 'behaviour' (the policy that sampled)" if or_said else ""
    known = (
        f"Known: {', '.join(sorted(objective_teachers(cfg)))}{said}."
        if cfg.teachers
        else f"Add a [teachers.{name}] table."
    )
    return f"{where}: there is no teacher '{name}'. {known}"


def unless_known(cfg: RunConfig, where: str, name: str) -> Iterator[str]:
    """Yield the sentence of `unknown` if no teacher answers under the name. The arguments are those of
    `unknown`.
    """
    if name not in objective_teachers(cfg):
        yield unknown(cfg, where, name)


def offered(cfg: RunConfig, name: str) -> set[type[Target]]:
    """The types of targets that all teacher tables of the name `name` offer. "behaviour" stands for what the
    sampler recorded.
    """
    if name == "behaviour":
        return {VelocityTarget} if cfg.sampler.rollouts is FlowRollout else {TopKTarget, SampledTarget}
    tables = tables_of(cfg, name)
    return set.intersection(*(set(cfg.teachers[table].offers) for table in tables)) if tables else set()
