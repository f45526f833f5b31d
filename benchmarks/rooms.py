"""The rooms of a checkout, counted: python benchmarks/rooms.py [CHECKOUT].

- entries and modules on the package's top level;
- import cycles: sets of files that import each other, directly or through others. Type-only imports and
  imports inside functions count like any other;
- upward imports: pairs (room, imported room) that point upward under the best order of the rooms. That order
  is looked for by moving one room at a time, from several starts;
- names of files and of top-level classes that are used more than once.

Nothing of the checkout is changed. The numbers go to NOTEBOOK.md, before and after.
"""

from __future__ import annotations

import ast
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
STARTS = 12

Imports = dict[str, set[str]]


def main(checkout: Path) -> None:
    source = checkout / "src" / "reflux"
    imports = imports_of(source)
    entries = top_level(source)
    cycles = cycles_of(imports)
    pairs = room_pairs(imports)
    upward, order = fewest_upward(pairs)
    print(f"entries on the top level            {len(entries)}, of them modules {modules_in(entries)}")
    print(f"files in the largest import cycle   {max(map(len, cycles), default=1)}")
    print(f"upward imports between rooms        {len(upward)} of {len(pairs)}")
    print(f"file names used more than once      {len(repeated_files(source))}")
    print(f"class names used more than once     {len(repeated_classes(source))}")
    print(f"order, the highest room first       {' > '.join(reversed(order))}")
    for importing, imported in sorted(upward):
        print(f"    upward: {importing} -> {imported}")
    for what, found in (("file", repeated_files(source)), ("class", repeated_classes(source))):
        for name, places in sorted(found.items()):
            print(f"    {what} {name}: {', '.join(places)}")


def top_level(source: Path) -> list[str]:
    """The files and folders of the package, hidden ones and caches left out."""
    return sorted(path.name for path in source.iterdir() if not path.name.startswith((".", "__pycache__")))


def modules_in(entries: list[str]) -> int:
    return sum(name.endswith(".py") for name in entries)


def imports_of(source: Path) -> Imports:
    """Module -> the modules of the package that it imports anywhere, by their dotted names."""
    trees = {_dotted(source, path): ast.parse(path.read_text()) for path in sorted(source.rglob("*.py"))}
    return {name: set(_imported(tree, trees)) - {name} for name, tree in trees.items()}


def _dotted(source: Path, path: Path) -> str:
    parts = [source.name, *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def _imported(tree: ast.Module, known: Mapping[str, ast.Module]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in (inner if inner in known else node.module,) if name in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def cycles_of(imports: Imports) -> list[set[str]]:
    """The sets of two and more modules of which each reaches every other."""
    reach = {name: _reached(imports, name) for name in imports}
    found: list[set[str]] = []
    for name in imports:
        cycle = {other for other in reach[name] if name in reach[other]}
        if len(cycle) > 1 and cycle not in found:
            found.append(cycle)
    return found


def _reached(imports: Imports, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in imports[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def room_pairs(imports: Imports) -> set[tuple[str, str]]:
    """(room, imported room): the top-level entry of a module, and that of a module that it imports."""
    pairs = {(_room(name), _room(other)) for name, others in imports.items() for other in others}
    return {pair for pair in pairs if pair[0] != pair[1]}


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def fewest_upward(pairs: set[tuple[str, str]]) -> tuple[set[tuple[str, str]], list[str]]:
    """The upward pairs under the best order found, and that order, the lowest room first."""
    rooms = sorted({room for pair in pairs for room in pair})
    # Rooms that many import and that import few are likely to lie low.
    balance = {room: sum(a == room for a, _ in pairs) - sum(b == room for _, b in pairs) for room in rooms}
    starts = [sorted(rooms, key=lambda room: balance[room])]
    starts += [random.Random(seed).sample(rooms, len(rooms)) for seed in range(STARTS)]
    best = min((_improved(pairs, start) for start in starts), key=lambda order: len(_upward(pairs, order)))
    return _upward(pairs, best), best


def _improved(pairs: set[tuple[str, str]], order: list[str]) -> list[str]:
    """The order after the best single moves, until none makes it better."""
    while True:
        moves = [_moved(order, room, place) for room in order for place in range(len(order))]
        best = min(moves, key=lambda move: len(_upward(pairs, move)))
        if len(_upward(pairs, best)) >= len(_upward(pairs, order)):
            return order
        order = best


def _moved(order: list[str], room: str, place: int) -> list[str]:
    rest = [other for other in order if other != room]
    return [*rest[:place], room, *rest[place:]]


def _upward(pairs: set[tuple[str, str]], order: list[str]) -> set[tuple[str, str]]:
    height = {room: place for place, room in enumerate(order)}
    return {(room, other) for room, other in pairs if height[room] < height[other]}


def repeated_files(source: Path) -> dict[str, list[str]]:
    """File name -> where it lies, for those used more than once; `__init__.py` is in every folder."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(source.rglob("*.py")):
        places[path.name].append(str(path.relative_to(source).parent))
    return {name: found for name, found in places.items() if len(found) > 1 and name != "__init__.py"}


def repeated_classes(source: Path) -> dict[str, list[str]]:
    """Name of a top-level class -> the files that define one, where there are several."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(source.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(source)))
    return {name: found for name, found in places.items() if len(found) > 1}


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE)
