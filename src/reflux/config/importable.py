"""Could a module be imported?"""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec


def importable(module: str) -> bool:
    """Could it be imported? Nothing is: not even the packages it lies in."""
    first, *inner = module.split(".")
    try:
        found = find_spec(first)
        for number in range(len(inner)):
            places = None if found is None else found.submodule_search_locations
            if places is None:
                return False
            found = PathFinder.find_spec(".".join([first, *inner[: number + 1]]), places)
    except ValueError:
        # an empty name, or a module that was made by hand
        return False
    return found is not None
