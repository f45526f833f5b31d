"""The diagnostic charts of the parts of a run. If a part can no longer be built, the page has a note instead
of its charts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reflux.config import registry
from reflux.config.recipe import RunConfig
from reflux.errors import ConfigError
from reflux.reports.chart import Chart
from reflux.reports.reading import Row, items, table, whole
from reflux.reports.recorded import Recorded


def own_charts(config: Row, recorded: Recorded, notes: list[str]) -> list[Chart]:
    """The charts of every part in config.toml, parts inside other parts included, in the order of the
    recipe's tables. recorded: the files of the run. notes: gets a sentence for each part that cannot be
    built.
    """
    made = list(_parts(config, notes))
    return [chart for where, part in made for chart in part.diagnostics(where.rpartition(".")[2], recorded)]


def _parts(config: Row, notes: list[str]) -> Iterator[tuple[str, Any]]:
    steps = whole(config.get("steps")) or 0
    for name, marker in registry.markers(RunConfig).items():
        if not isinstance(marker, registry.PartOf):
            continue
        for where, kind, value in _tables(marker, name, config.get(name)):
            try:
                part = registry.build(marker.group, value, where, default_kind=kind, steps=steps)
            except ConfigError as error:
                notes.append(
                    f"{where}: this part cannot be built here, so its charts are left out ({error})."
                )
                continue
            yield where, part
            yield from ((inside, inner) for inside, _, inner in registry.within(part, where))


def _tables(marker: registry.PartOf, name: str, value: object) -> Iterator[tuple[str, str | None, Row]]:
    """(path in the config, kind used if the table has none, the part's table)."""
    if marker.many == "table":
        yield from (
            (f"{name}.{key}", marker.default or key, entry)
            for key, entry in table(value).items()
            if isinstance(entry, dict)
        )
    elif marker.many == "list":
        yield from (
            (f"{name}[{place}]", marker.default, entry)
            for place, entry in enumerate(items(value))
            if isinstance(entry, dict)
        )
    elif isinstance(value, dict):
        yield name, marker.default, value
