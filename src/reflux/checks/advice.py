"""Settings that work but are rarely intended."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.checks import lengths
from reflux.config.recipe import RunConfig
from reflux.config.registry import within
from reflux.teachers.base import alias_of
from reflux.teachers.names import tables_of


def warnings(cfg: RunConfig) -> list[str]:
    """All warnings about this run: those of its single parts, and those that concern several parts."""
    own = [text for where, _, part in within(cfg) for text in part.advice(where, cfg)]
    return [
        *_unheard(cfg),
        *own,
        *_as_it_acted(cfg),
        *_left_to_others(cfg),
        *_idle_refresh(cfg),
        *_nothing_ahead(cfg),
        *lengths.warnings(cfg),
    ]


def _unheard(cfg: RunConfig) -> Iterator[str]:
    used = {objective.teacher for objective in cfg.objectives}
    for table, teacher in cfg.teachers.items():
        if alias_of(table, teacher) not in used and not cfg.sampler.asks_teachers:
            yield (
                f"teachers.{table} scores attempts, but no objective uses it. Its answers only appear in "
                "metrics."
            )


def _as_it_acted(cfg: RunConfig) -> Iterator[str]:
    for index, objective in enumerate(cfg.objectives):
        shifted = objective.takes_advantage_offset and any(rule.gives_offsets for rule in cfg.credit.values())
        if (
            objective.teacher == "behaviour"
            and cfg.sampler.on_policy
            and not cfg.max_staleness
            and not shifted
        ):
            yield (
                f"objectives[{index}] has the teacher 'behaviour' at max_staleness = 0. The policy that "
                "sampled is then the current student, so the student learns nothing from it."
            )


def _idle_refresh(cfg: RunConfig) -> Iterator[str]:
    if cfg.refresh is not None and not cfg.max_staleness:
        yield "refresh has no effect at max_staleness = 0, because no attempt is in flight between two steps."


def _nothing_ahead(cfg: RunConfig) -> Iterator[str]:
    if cfg.max_staleness and not cfg.steps_ahead:
        yield (
            f"ahead = 0 asks for the attempts of a step when the step before it is done, so max_staleness = "
            f"{cfg.max_staleness} saves no time. Leave ahead out to sample while the learner steps."
        )


def _left_to_others(cfg: RunConfig) -> Iterator[str]:
    """Warnings for routes on which one objective has no teacher but another one has. Routes on
    which none has a teacher are refused by `teacher_rules`.
    """
    for index, objective in enumerate(cfg.objectives):
        served = [cfg.teachers[table].routes for table in tables_of(cfg, objective.teacher or "")]
        if not served or not all(served):
            continue
        missing = (cfg.task.routes or frozenset()) - {route for routes in served for route in routes}
        if missing:
            names = ", ".join(sorted(f"'{route}'" if route else "(none)" for route in missing))
            yield (
                f"objectives[{index}]: no teacher called '{objective.teacher}' serves the route {names}, so "
                "only other objectives train on those prompts."
            )
