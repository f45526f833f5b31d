"""Objects that receive the metrics and messages of a run while it lasts."""

from __future__ import annotations

from typing import Any, Protocol


class Watch(Protocol):
    """Receives the results of each step and evaluation. It does not change the run."""

    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, results: dict[str, Any]) -> None: ...

    def noted(self, text: str) -> None: ...


class Silent:
    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, results: dict[str, Any]) -> None: ...

    def noted(self, text: str) -> None: ...
