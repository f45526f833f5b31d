"""Which training prompts of a run are consumed. A checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Positions:
    """consumed: the number of steps whose groups are consumed. asked: the number of blocks (the prompts of
    one step) from which a prompt was taken. left: the places of the prompts of these blocks that are not
    consumed, by block.
    """

    consumed: int
    asked: int
    left: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def after(cls, step: int) -> Self:
        """The first `step` blocks are consumed."""
        return cls(step, step)

    @property
    def first(self) -> int:
        """The first block that has prompts left."""
        return min(self.left, default=self.asked)

    def has_consumed(self, block: int, place: int) -> bool:
        return block < self.asked and place not in self.left.get(block, ())

    def state(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "consumed": self.consumed,
            "asked": self.asked,
            "left": {str(block): list(places) for block, places in self.left.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        left = {int(block): tuple(places) for block, places in state["left"].items()}
        return cls(state["consumed"], state["asked"], left)
