"""The files and folders that a recipe names, with absolute paths, so that a run can be continued and
evaluated from another working folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from reflux.config.groups import BASES
from reflux.config.recipe import RunConfig, from_table, to_table
from reflux.config.registry import PartOf, markers

# the keys that lead to a value in the table of a recipe
Keys = tuple[str | int, ...]


def absolute(cfg: RunConfig) -> dict[str, Any]:
    """The table of a recipe. Names of files and folders that exist are absolute in it."""
    table = to_table(cfg)
    for keys, name in named(cfg):
        if _exists(name):
            _value(table, keys[:-1])[keys[-1]] = os.path.abspath(Path(name).expanduser())
    return table


def continued(cfg: RunConfig, saved: dict[str, Any]) -> RunConfig:
    """The recipe of a run that is resumed. saved: the table in its config.toml.

    A relative name that does not exist in the working folder becomes the absolute path that the run was
    started with, if this path ends in the same names.
    """
    table = to_table(cfg)
    for keys, name in named(cfg):
        before = _value(saved, keys)
        if isinstance(before, str) and not _exists(name) and _ends_in(before, name):
            _value(table, keys[:-1])[keys[-1]] = before
    return from_table(table)


def _exists(name: str) -> bool:
    return os.path.exists(Path(name).expanduser())


def _ends_in(path: str, name: str) -> bool:
    tail = tuple(part for part in PurePath(os.path.normpath(name)).parts if part != "..")
    if os.path.isabs(name) or not os.path.isabs(path) or not tail:
        return False
    return PurePath(path).parts[-len(tail) :] == tail


def named(cfg: RunConfig) -> Iterator[tuple[Keys, str]]:
    """(keys, name) of every file, folder or model that the parts of the recipe name."""
    table = to_table(cfg)
    for keys in _places(cfg, ()):
        value = _value(table, keys)
        if isinstance(value, str):
            yield keys, value
        elif isinstance(value, list):
            yield from (((*keys, index), name) for index, name in enumerate(value))


def _places(owner: Any, at: Keys) -> Iterator[Keys]:
    for name, marker in markers(type(owner)).items():
        if not isinstance(marker, PartOf) or marker.group not in BASES:
            continue
        for key, part in _entries(marker, getattr(owner, name)):
            where = (*at, name, *key)
            yield from ((*where, *path.split(".")) for path in part.paths)
            yield from _places(part, where)


def _entries(marker: PartOf, held: Any) -> Iterator[tuple[Keys, Any]]:
    """The parts that a field holds, each with the keys that lead from the field to it."""
    if marker.many == "table":
        yield from (((name,), part) for name, part in held.items())
    elif marker.many == "list":
        yield from (((index,), part) for index, part in enumerate(held))
    elif held is not None:
        yield (), held


def _value(table: Any, keys: Keys) -> Any:
    """The value at these keys, or None."""
    for key in keys:
        try:
            table = table[key]
        except (KeyError, IndexError, TypeError):
            return None
    return table
