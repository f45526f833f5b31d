"""Merge raw tables of recipes, and apply `key.path=value` overrides to them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from reflux.config.groups import BASES
from reflux.config.registry import field_names, kinds, load
from reflux.errors import ConfigError


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` over `under`. Tables are merged key by key; other values are replaced. A table with a new
    kind replaces the old table with all its keys, except those that `kept` returns.

    In a table with a new kind, a key whose value is "base" gets the old table as its value:
    `generate = "base"` puts the old sampler inside the new one.
    """
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            merged[key] = merge(old, value)
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            new = {name: old if inner == "base" else inner for name, inner in value.items()}
            merged[key] = {**kept(old, new["kind"]), **new}
        else:
            merged[key] = value
    return merged


def kept(old: Mapping[str, Any], new_kind: Any) -> dict[str, Any]:
    """The part of a table that stays when its kind becomes `new_kind`: the keys that both kinds have, where
    one of them does the work of the other by other means (`Part.instead_of`), such as the samplers "hf" and
    "vllm". Empty for all other kinds.
    """
    if not (isinstance(old.get("kind"), str) and isinstance(new_kind, str)):
        # A kind that is no text is refused where parts are made.
        return {}
    pair = {old["kind"], new_kind}
    for known in map(kinds, BASES):
        if pair <= known.keys():
            parts = [load(known[kind]) for kind in pair]
            if pair & {part.instead_of for part in parts}:
                shared = set.intersection(*(set(field_names(part)) for part in parts))
                return {key: value for key, value in old.items() if key in shared}
    return {}


def split_override(text: str) -> tuple[str, Any]:
    """ "a.b=3" -> ("a.b", 3). Raises ConfigError if the text has no "="."""
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"'{text}' is not an override. Write key.path=value, for example learner.lr=1e-3.")
    return path.strip(), value.strip()


def unpack(value: Any) -> Any:
    """The value parsed as TOML, or the text itself: "10" gives a number, "my/model" a string."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def nest(path: list[str], value: Any, table: Any) -> dict[str, Any]:
    """A table with the single key `path` set to `value`. A number in the path selects an entry of a list; the
    list is copied from `table`, the recipe so far. Raises ConfigError if the list has no such entry, or if
    its entries are not tables.
    """
    if len(path) == 1:
        return {path[0]: value}
    head, inner = path[0], table.get(path[0], {}) if isinstance(table, Mapping) else {}
    if isinstance(inner, list) and path[1].isdigit():
        if not all(isinstance(item, Mapping) for item in inner):
            raise ConfigError(f"{head} is a list of plain values. Set the whole list: {head}=[...]")
        index, items = int(path[1]), [dict(item) for item in inner]
        if index >= len(items):
            raise ConfigError(
                f"{head}.{index}: there are only {len(items)} entries in {head}, numbered from 0"
            )
        items[index] = merge({"item": items[index]}, nest(["item", *path[2:]], value, {}))["item"]
        return {head: items}
    return {head: nest(path[1:], value, inner)}
