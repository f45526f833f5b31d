"""Things of which one is enough in a run: text encoders that several models share, a frozen base under
several adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Thing = TypeVar("Thing")


class SharedCache:
    """`once(key, make)`: what `make()` gave the first time that this key was asked for. It is kept as long as
    this object.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
