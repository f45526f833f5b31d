"""Find the parts that a package outside the library defines."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec

from reflux.config.groups import BASES
from reflux.config.registry import belongs
from reflux.errors import ConfigError


def parts_of(module: str) -> dict[str, dict[str, type]]:
    """The classes of parts that a module or package defines, by group (such as "teachers") and by the kind
    "module:Class" that a recipe would name. All modules of the package are imported.

    Raises ConfigError if the package, or a module inside it, cannot be imported.
    """
    found: dict[str, dict[str, type]] = {group: {} for group in BASES}
    for name in _modules(module):
        for value in vars(_imported(name)).values():
            for group in BASES:
                if belongs(value, group) and value.__module__ == name:
                    found[group][f"{name}:{value.__qualname__}"] = value
    return {group: classes for group, classes in found.items() if classes}


def _modules(module: str) -> list[str]:
    """The module and, if it is a package, all modules inside it except `__main__`."""
    _imported(module)
    spec = find_spec(module)
    inside = (
        pkgutil.walk_packages(spec.submodule_search_locations or (), f"{module}.", onerror=_imported)
        if spec
        else ()
    )
    return [module, *sorted(entry.name for entry in inside if not entry.name.endswith(".__main__"))]


def _imported(module: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"cannot import '{module}': {error}. Is the package installed, or its folder on PYTHONPATH?"
        ) from error
