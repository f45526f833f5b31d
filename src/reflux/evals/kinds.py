"""What evaluations call the positions of an attempt, and how they show what was made, by the kind of attempt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reflux.models import images
from reflux.types import FlowRollout, Rollout, TokenRollout


@dataclass(frozen=True)
class Kind:
    """`units` is what its positions are, `shown` the name under which an example has what was made, and
    `show` makes it JSON.
    """

    units: str
    shown: str
    show: Callable[[Any], Any]


KINDS = {
    TokenRollout: Kind("tokens", "text", str),
    # base64 of a PNG, a thumbnail where it is large
    FlowRollout: Kind("steps", "image", images.to_text),
    # of a user's own
    Rollout: Kind("positions", "text", repr),
}


def kind_of(rollout: Rollout) -> Kind:
    """That of the nearest class."""
    return next(KINDS[cls] for cls in type(rollout).__mro__ if cls in KINDS)
