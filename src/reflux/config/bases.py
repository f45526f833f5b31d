"""Recipe files, and the bases that a recipe builds on."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflux.config import registry
from reflux.config.overrides import merge
from reflux.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"


def read_recipe(name: str | Path, base: bool = False) -> dict[str, Any]:
    """The table of one TOML file as it is written, without its `base` merged in. name: the path of a file
    (with an ending), or the name of a shipped recipe. base: True if a base is read; the shipped scales in
    recipes/base are then found too. Raises ConfigError if there is no such file or it is not valid TOML.
    """
    path = Path(name)
    if not path.suffix:
        scale = RECIPES / "base" / f"{name}.toml"
        path = scale if base and scale.exists() else RECIPES / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        known = bases() if base else recipe_names()
        if path.parent != RECIPES:
            raise ConfigError(
                f"there is no file {path}. Shipped recipes are named without a path: {', '.join(known)}."
            ) from None
        raise ConfigError(
            f"no {'base' if base else 'recipe'} '{name}'{registry.did_you_mean(str(name), known, '.')} "
            f"Shipped: {', '.join(known)}. "
            f"To use your own recipe, give its path, which ends in .toml."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    if not base:
        table.setdefault("recipe", path.stem)
    return table


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def bases() -> list[str]:
    """The names that `base` may have: the shipped scales and the shipped recipes."""
    return [*sorted(path.stem for path in (RECIPES / "base").glob("*.toml")), *recipe_names()]


def resolve(table: dict[str, Any], scale: object = None, name: str | Path = "") -> dict[str, Any]:
    """Merge a recipe over its bases: its `base`, the `base` of that one, and so on. The recipe itself is
    merged last. scale: replaces the last of these bases.

    A table `[methods.RECIPE]` in a base is merged over the shipped recipe of that name, wherever that recipe
    is among the bases. name: the name or path of the recipe. A `base` that is a path is relative to the
    folder of the file that names it. Raises ConfigError if a table in `[methods]` of the recipe, or `scale`,
    would change nothing.
    """
    layers = _chain(str(name), table)
    if scale is not None and len(layers) == 1:
        raise ConfigError(
            f'base: this recipe has no base that "{scale}" could replace. Override the single keys instead.'
        )
    if scale is not None:
        below = _named(scale, "base")
        layers[-1:] = _chain(below, read_recipe(below, base=True))
    for other in _methods(*layers[0]).keys() - {shipped_name(where) for where, _ in layers}:
        # Only the recipe's own tables are checked. Those of a base may be meant for other recipes.
        raise ConfigError(
            f'methods.{other}: this recipe does not build on "{other}", so that table has no effect. Write '
            "its keys directly into the recipe."
        )
    methods: dict[str, Any] = {}
    for where, layer in reversed(layers):
        methods = merge(methods, _methods(where, layer))
    resolved: dict[str, Any] = {}
    for where, layer in reversed(layers):
        resolved = merge(
            resolved, {key: value for key, value in layer.items() if key not in ("base", "methods")}
        )
        resolved = merge(resolved, methods.get(shipped_name(where), {}))
    return resolved


def shipped_name(recipe: str) -> str:
    """The name of the shipped recipe or base whose path `recipe` is; any other `recipe` unchanged."""
    path = Path(recipe)
    shipped = path.suffix and path.resolve().parent in (RECIPES.resolve(), (RECIPES / "base").resolve())
    return path.stem if shipped else recipe


def _chain(name: str, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, raw table) of a recipe and of each base below it, the scale last. Raises ConfigError if a base
    builds on itself.
    """
    layers = [(name, table)]
    while "base" in layers[-1][1]:
        where, layer = layers[-1]
        below = _named(layer["base"], f"{where}: base" if where else "base")
        if Path(below).suffix and Path(where).suffix:
            below = str(Path(where).parent / below)
        if shipped_name(below) in [shipped_name(known) for known, _ in layers]:
            raise ConfigError(
                f'base: "{below}" builds on itself: '
                f"{' -> '.join([*(where for where, _ in layers if where), below])}"
            )
        layers.append((below, read_recipe(below, base=True)))
    return layers


def _named(base: object, where: str) -> str:
    if not isinstance(base, str):
        raise ConfigError(
            f"{where}: expected the name of a recipe or a base, or the path of a file, got {base!r}"
        )
    return base


def _methods(where: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """The [methods.RECIPE] tables of a base, by recipe name. Raises ConfigError for a name that no shipped
    recipe has, and for a value that is not a table.
    """
    methods = layer.get("methods", {})
    if not isinstance(methods, Mapping):
        raise ConfigError(f"{where}: methods: expected tables such as [methods.rl], got {methods!r}")
    for recipe, table in methods.items():
        if recipe not in recipe_names():
            raise ConfigError(
                f"{where}: methods.{recipe}: there is no shipped recipe of this "
                f"name{registry.did_you_mean(recipe, recipe_names(), '.')}"
            )
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{where}: methods.{recipe}: expected a table [methods.{recipe}], got {table!r}"
            )
    return dict(methods)
