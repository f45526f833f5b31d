"""The names that teachers answer under, and what stands behind one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reflux.teachers.base import alias_of
from reflux.types import FlowRollout, SampledTarget, Target, TopKTarget, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig


def objective_teachers(cfg: RunConfig) -> set[str]:
    """The names teachers answer under."""
    return {alias_of(table, teacher) for table, teacher in cfg.teachers.items()}


def tables_of(cfg: RunConfig | PartContext, name: str) -> list[str]:
    """The tables that answer under a name."""
    return [table for table, teacher in cfg.teachers.items() if alias_of(table, teacher) == name]


def measured(cfg: RunConfig | PartContext, name: str) -> list[str]:
    """The tables that answer as `name`, where there are several; else the one table of that name or that
    answers so; else none.
    """
    spoken = tables_of(cfg, name)
    return [name] if name in cfg.teachers and len(spoken) < 2 else spoken


def unknown(cfg: RunConfig, where: str, name: str, or_said: bool = False) -> str:
    """A sentence about a teacher that is not there; or_said: the student as it acted would do."""
    said = ", and 'behaviour' (the student as it acted)" if or_said else ""
    known = (
        f"Known: {', '.join(sorted(objective_teachers(cfg)))}{said}."
        if cfg.teachers
        else f"Add a [teachers.{name}] table."
    )
    return f"{where}: there is no teacher '{name}'. {known}"


def unless_known(cfg: RunConfig, where: str, name: str) -> Iterator[str]:
    """That sentence, where no teacher answers under the name."""
    if name not in objective_teachers(cfg):
        yield unknown(cfg, where, name)


def offered(cfg: RunConfig, name: str) -> set[type[Target]]:
    """What the tables behind a teacher name all offer; "said" is what the sampler recorded."""
    if name == "behaviour":
        return {VelocityTarget} if cfg.sampler.rollouts is FlowRollout else {TopKTarget, SampledTarget}
    tables = tables_of(cfg, name)
    return set.intersection(*(set(cfg.teachers[table].offers) for table in tables)) if tables else set()
