"""Objects that are told of a run while it lasts."""

from __future__ import annotations

from typing import Any, Protocol


class Watch(Protocol):
    """Someone who looks on; what they do changes nothing in the run."""

    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, results: dict[str, Any]) -> None: ...

    def noted(self, text: str) -> None: ...


class Silent:
    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, results: dict[str, Any]) -> None: ...

    def noted(self, text: str) -> None: ...
