"""Test whether a module can be imported, without importing it."""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec


def importable(module: str) -> bool:
    """True if the module can be found. Neither the module nor the packages that contain it are imported."""
    first, *inner = module.split(".")
    try:
        found = find_spec(first)
        for number in range(len(inner)):
            places = None if found is None else found.submodule_search_locations
            if places is None:
                return False
            found = PathFinder.find_spec(".".join([first, *inner[: number + 1]]), places)
    except ValueError:
        # the name is empty, or the module was created in code and has no spec
        return False
    return found is not None
