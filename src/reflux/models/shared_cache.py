"""A cache of objects that a run needs only once: text encoders that several models share, or a frozen base
under several adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Thing = TypeVar("Thing")


class SharedCache:
    """`shared(key, make)` returns what `make()` returned at the first call with this key. The objects are
    kept as long as this cache.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
