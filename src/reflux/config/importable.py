"""Test whether a module can be imported, and whether it has a name, without importing it."""

from __future__ import annotations

import ast
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path


def importable(module: str) -> bool:
    """True if the module can be found. Neither the module nor the packages that contain it are imported."""
    return _found(module) is not None


def lacks(module: str, name: str) -> bool:
    """True if the source of the module gives no object this name, so that loading it would fail. False where
    that is not known: without a source in Python, or where it imports all names of another module.
    """
    found = _found(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return False
    try:
        nodes = list(ast.walk(ast.parse(Path(found.origin).read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.split(".")[0])
    return names.isdisjoint({name, "*", "__getattr__", "globals", "setattr"})


def _found(module: str) -> ModuleSpec | None:
    first, *inner = module.split(".")
    try:
        found = find_spec(first)
        for number in range(len(inner)):
            places = None if found is None else found.submodule_search_locations
            if places is None:
                return None
            found = PathFinder.find_spec(".".join([first, *inner[: number + 1]]), places)
    except ValueError:
        # the name is empty, or the module was created in code and has no spec
        return None
    return found
