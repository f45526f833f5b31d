"""Find the class of a part by (group, kind), and make parts from tables. A part is a frozen dataclass; a kind
is a registered name or "my_package.module:Class".

Each group's package has a dictionary from kind to dotted name. The dictionary and the class are imported only
when they are used, so the command line starts without torch. For the same reason a module that defines parts
does not import torch at its top. Computations that need torch are in other modules.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, ValidationError
from pydantic_core import core_schema
from typing_extensions import get_protocol_members

from reflux.config.groups import BASES, GROUPS, PROTOCOLS
from reflux.config.renamed import new_key, new_kind, new_value
from reflux.errors import ConfigError

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclasses.dataclass(frozen=True)
class PartOf:
    """Marks a field that holds a part of `group`: `Annotated[Context, PartOf("contexts")]`.

    many: the field holds a list of parts, or a table of named parts. default: the kind if the table names
    none. Without a default, the name in a table of named parts is the kind. horizon: False for a schedule
    that is not read over optimiser steps and therefore must state its own horizon.
    """

    group: str
    many: Literal["", "list", "table"] = ""
    default: str | None = None
    horizon: bool = True

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Accept any value. The protocol in the annotation is for readers and type checkers; the values come
        from `build`, which has validated them.
        """
        held = core_schema.any_schema()
        many = {
            "list": core_schema.tuple_variable_schema(held),
            "table": core_schema.dict_schema(core_schema.str_schema(), held),
        }
        return many.get(self.many, held)


def load(dotted: str) -> Any:
    """The object at "package.module:name"."""
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def kinds(group: str) -> dict[str, str]:
    """The registered kinds of a group, each with the dotted name of its class."""
    return dict(load(GROUPS[group]))


def part(group: str, kind: str, path: str = "") -> type:
    """The class of a kind of a group, such as kind "local" of group "teachers". Raises ConfigError for an
    unknown kind, with the most similar known name. path: the path of the table in the recipe, for errors.
    """
    known = kinds(group)
    if kind in known:
        return load(known[kind])
    where = f"{path}: " if path else ""
    if kind == "none" and path:
        raise ConfigError(f"{path}: there is no kind none. To remove the whole table, write {path}=none")
    if ":" not in kind:
        raise ConfigError(
            f"{where}unknown {group} kind '{kind}'{new_kind(group, kind) or did_you_mean(kind, known, '.')} "
            f"Known: {', '.join(sorted(known)) or 'none yet'}. "
            f'The kind of your own part is written "my_package.module:Class".'
        )
    try:
        found = load(kind)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{where}cannot import '{kind}': {error}. Is the package installed, or its folder on PYTHONPATH?"
        ) from error
    if not belongs(found, group):
        inherits = f" that inherits {BASES[group].replace(':', '.')}" if group in BASES else ""
        raise ConfigError(
            f"{where}'{kind}' is not a part of the group {group}: it must be a frozen dataclass{inherits}."
        )
    if lacking := _lacking(found, group):
        raise ConfigError(
            f"{where}'{kind}' lacks members that every part of the group {group} has: {', '.join(lacking)}. "
            "docs/extending.md describes them."
        )
    return found


def _lacking(cls: type, group: str) -> list[str]:
    """The members of the group's protocol that a class neither defines nor inherits."""
    if group not in PROTOCOLS:
        return []
    return sorted(get_protocol_members(load(PROTOCOLS[group])) - {*dir(cls), *field_names(cls)})


def belongs(value: object, group: str) -> bool:
    """True for a class that a recipe may name in this group: a dataclass that inherits the group's base
    class. Schedules have no base class.
    """
    return (
        isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and (group not in BASES or load(BASES[group]) in value.__mro__)
    )


def within(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(where, group, part) of every part inside a config or inside another part. where: the path of the key
    in the recipe, such as "credit.prefix". A part comes before the parts that it contains. Schedules are left
    out.
    """
    for name, marker in markers(type(value)).items():
        if not isinstance(marker, PartOf) or marker.group not in BASES:
            continue
        for where, entry in _entries(marker, f"{path}.{name}" if path else name, getattr(value, name)):
            yield where, marker.group, entry
            yield from within(entry, where)


def _entries(marker: PartOf, where: str, value: Any) -> Iterable[tuple[str, Any]]:
    if marker.many == "table":
        return ((f"{where}.{name}", entry) for name, entry in value.items())
    if marker.many == "list":
        return ((f"{where}[{index}]", entry) for index, entry in enumerate(value))
    return () if value is None else ((where, value),)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else otherwise


def markers(cls: type) -> dict[str, PartOf | type]:
    """The fields of a class that hold parts (PartOf) or plain tables (their dataclass)."""
    found: dict[str, PartOf | type] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for layer in _layers(hint):
            if isinstance(layer, PartOf) or (isinstance(layer, type) and dataclasses.is_dataclass(layer)):
                found.setdefault(name, layer)
    return found


def _layers(hint: Any) -> Iterable[Any]:
    """A hint, its annotations and those of its arguments. `Annotated[X, mark] | None` gives mark before X."""
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
    yield hint
    for inner in get_args(hint):
        yield from _layers(inner)


def build(group: str, table: Any, path: str, *, default_kind: str | None = None, steps: int = 0) -> Any:
    """Make a part of a group (such as "teachers") from its table in the recipe. path: the path of the table,
    for errors. default_kind: the kind if the table has no key `kind`. steps: the horizon of schedules that
    state none.

    Raises ConfigError, with the path of the key, if a kind or a key is unknown or a value is invalid.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: expected a table with a 'kind', got {table!r}")
    kind = table.get("kind", default_kind)
    if not isinstance(kind, str):
        raise ConfigError(f"{path}: needs kind = one of {', '.join(sorted(kinds(group)))}")
    cls = part(group, kind, path)
    rest = {key: value for key, value in table.items() if key != "kind"}
    if group == "schedules" and "horizon" in field_names(cls):
        rest.setdefault("horizon", steps)
    return make(cls, rest, path, steps=steps)


def make(cls: type, table: Mapping[str, Any], path: str, *, steps: int = 0) -> Any:
    """Make a frozen value of class `cls` from a table, with all parts and tables inside it. path, steps: as
    in `build`. Raises ConfigError as `build` does.
    """
    names, inner = field_names(cls), markers(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key not in names:
            raise ConfigError(f"{where}: unexpected field{new_key(key, names) or did_you_mean(key, names)}")
        if (new := new_value(key, value)) is not None:
            raise ConfigError(f"{where}: the value '{value}' is called '{new}' now.")
        values[key] = _inner(inner[key], value, where, steps) if key in inner else value
    try:
        return cls(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, path))) from error


def _inner(marker: PartOf | type, value: Any, where: str, steps: int) -> Any:
    if value == "none" and not (isinstance(marker, PartOf) and marker.many):
        return None
    if isinstance(marker, type):
        return make(marker, value, where, steps=steps) if isinstance(value, Mapping) else value
    if marker.many == "table":
        value = {} if value == "none" else value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected named tables such as [{where}.NAME], got {value!r}")
        named = value.items()
        return {
            name: build(
                marker.group, table, f"{where}.{name}", default_kind=marker.default or name, steps=steps
            )
            for name, table in named
            if table != "none"
        }
    if marker.many == "list":
        if not isinstance(value, list):
            raise ConfigError(
                f"{where}: expected a list of tables such as [[{where}]], got {value!r}. An "
                f"override names an entry by its number: {where}.0"
            )
        return tuple(
            build(marker.group, table, f"{where}[{i}]", default_kind=marker.default, steps=steps)
            for i, table in enumerate(value)
        )
    steps = steps if marker.horizon else 0
    if marker.group == "schedules" and not isinstance(value, Mapping):
        # a plain number
        return value
    return build(marker.group, value, where, default_kind=marker.default, steps=steps)


def field_names(cls: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(cls)]


def _sentences(error: ValidationError, path: str) -> list[str]:
    """One sentence per field. If a field allows several types, the messages of all types are
    joined by "or".
    """
    found: dict[str, list[Any]] = {}
    for entry in error.errors():
        first, *inner = entry["loc"] or ("",)
        # The strings in `inner` name the alternative types of a field, so only the numbers are kept.
        places = [str(key) for key in inner if isinstance(key, int)]
        found.setdefault(".".join(filter(None, (path, str(first), *places))), []).append(entry)
    return [_sentence(where, entries) for where, entries in found.items()]


def _sentence(where: str, entries: list[Any]) -> str:
    asked = list(dict.fromkeys(_asked(entry) for entry in entries))
    first = entries[0]
    said_by_hand = first["type"] in ("missing", "value_error")
    return f"{where}: {', or '.join(asked)}" + ("" if said_by_hand else f", got {first['input']!r}")


def _asked(entry: Any) -> str:
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "tuple_type":
        message = 'input should be a list, such as ["a", "b"]'
    return message[0].lower() + message[1:]


def kind_of(group: str, value: object) -> str:
    """The kind of a part `value` of a group: the registered name, or the dotted name of its class."""
    dotted = f"{type(value).__module__}:{type(value).__qualname__}"
    for kind, known in kinds(group).items():
        if known == dotted:
            return kind
    return dotted


def table_of(group: str, value: object) -> dict[str, Any]:
    """The table from which `build` makes the part `value` again (law 10)."""
    return {"kind": kind_of(group, value), **fields_of(value)}


def fields_of(value: Any) -> dict[str, Any]:
    inner = markers(type(value))
    table = {name: _plain(inner.get(name), getattr(value, name)) for name in field_names(type(value))}
    return {name: entry for name, entry in table.items() if entry is not None}


def _plain(marker: PartOf | type | None, entry: Any) -> Any:
    if entry is None:
        return None
    if isinstance(marker, type):
        return fields_of(entry)
    if isinstance(marker, PartOf) and marker.many == "table":
        return {key: table_of(marker.group, item) for key, item in entry.items()}
    if isinstance(marker, PartOf) and marker.many == "list":
        return [table_of(marker.group, item) for item in entry]
    if isinstance(marker, PartOf) and dataclasses.is_dataclass(entry):
        return table_of(marker.group, entry)
    return list(entry) if isinstance(entry, tuple) else entry
