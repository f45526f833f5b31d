"""Schedules whose amounts are shares of another number of the recipe, so that one recipe fits every scale.

`{ kind = "linear", of = "sampler.max_tokens", start = 0.25, stop = 1.0 }` goes from a quarter of
`sampler.max_tokens` to all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reflux.config.schedules import AMOUNTS
from reflux.errors import ConfigError


def without_shares(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a recipe in which the amounts of every schedule with `of` are multiplied by that number,
    so that all schedules hold plain numbers.

    table: the recipe after its `base` and all overrides were merged in. Raises ConfigError, with the path of
    the schedule, if `of` does not name a plain number of the recipe.
    """
    return {key: _walked(table, value, key) for key, value in table.items()}


def _walked(root: Mapping[str, Any], value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_walked(root, entry, f"{path}[{index}]") for index, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if "of" in value and value.get("kind") in AMOUNTS:
        return _multiplied(value, _number_at(root, value["of"], path))
    return {key: _walked(root, entry, f"{path}.{key}") for key, entry in value.items()}


def _number_at(root: Mapping[str, Any], of: Any, path: str) -> float:
    found: Any = root
    for key in of.split(".") if isinstance(of, str) else ():
        found = found.get(key) if isinstance(found, Mapping) else None
    if not _is_number(found):
        raise ConfigError(
            f"{path}.of: this recipe has no plain number at {of!r}. Set that key to a number, or write the "
            "schedule in plain numbers, without `of`."
        )
    return found


def _multiplied(schedule: Mapping[str, Any], whole: float) -> dict[str, Any]:
    """The schedule with its amounts multiplied by `whole`. Values that are not numbers stay unchanged; the
    schedule's own validation refuses them.
    """

    def times(value: Any) -> Any:
        if isinstance(value, list):
            return [times(entry) for entry in value]
        return value * whole if _is_number(value) else value

    amounts = AMOUNTS[schedule["kind"]]
    return {key: times(value) if key in amounts else value for key, value in schedule.items() if key != "of"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
