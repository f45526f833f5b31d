"""Rules about teachers: their names, routes and contexts."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.teachers.base import alias_of
from reflux.teachers.names import objective_teachers, tables_of


def problems(cfg: RunConfig) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for table, teacher in cfg.teachers.items():
        names.setdefault(alias_of(table, teacher), []).append(table)
        yield from _context(cfg, table)
        yield from _moving(cfg, table)
    for name, tables in names.items():
        yield from _shared(cfg, name, tables)
    yield from _unserved(cfg)


def _context(cfg: RunConfig, table: str) -> Iterator[str]:
    context = cfg.teachers[table].context
    if context.min_group > cfg.group_size:
        yield (
            f"teachers.{table}.context needs at least {context.min_group} attempts per prompt, but "
            f"group_size is {cfg.group_size}. "
            f"Raise group_size."
        )
    if context.requirements.reward and not cfg.rewards:
        yield f"teachers.{table}.context sorts attempts by their rewards. Add [rewards.verifier]."


def _moving(cfg: RunConfig, table: str) -> Iterator[str]:
    if cfg.max_staleness and cfg.teachers[table].follows:
        yield (
            f"teachers.{table} follows the student, so its output head has changed by the time its hidden "
            f"states are used; max_staleness is {cfg.max_staleness}. Use max_staleness = 0, or a frozen "
            "teacher."
        )


def _shared(cfg: RunConfig, name: str, tables: list[str]) -> Iterator[str]:
    """If several teachers (tables `[teachers.NAME]`) share an alias, exactly one of them must answer each
    prompt.
    """
    routes = [route for table in tables for route in cfg.teachers[table].routes]
    if len(tables) > 1 and (
        len(set(routes)) < len(routes) or any(not cfg.teachers[table].routes for table in tables)
    ):
        yield (
            f"teachers {', '.join(tables)} share the alias '{name}', so each needs its own routes, and no "
            "route may belong to two of them."
        )


def _unserved(cfg: RunConfig) -> Iterator[str]:
    """Each route of the task's prompts needs a teacher. This is checked for the teachers that share an alias,
    and for all teachers of objectives together, if each of them has `routes`.
    """
    spoken = sorted(
        {objective.teacher for objective in cfg.objectives if objective.teacher} & objective_teachers(cfg)
    )
    by_name = {name: [cfg.teachers[table].routes for table in tables_of(cfg, name)] for name in spoken}
    told = {"the teachers that objectives use": [routes for served in by_name.values() for routes in served]}
    told |= {
        f"the teachers of the alias '{name}'": served for name, served in by_name.items() if len(served) > 1
    }
    routed = {whose: served for whose, served in told.items() if served and all(served)}
    # only asked where needed, because a task may have to read its data for its routes
    carried = cfg.task.routes if routed else None
    for whose, served in routed.items():
        known = sorted({route for routes in served for route in routes})
        unserved = sorted(
            f"'{route}'" if route else "(none)" for route in (carried or frozenset()) - set(known)
        )
        if unserved:
            yield (
                f"teachers: this task has prompts of the route {', '.join(unserved)}, but {whose} serve only "
                f"{', '.join(known)}. Add that "
                "route to the `routes` of a teacher, or remove `routes` from one teacher, which then answers "
                "every prompt."
            )
            return
