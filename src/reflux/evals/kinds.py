"""How evaluations name the positions of an attempt and show its result, for each class of rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reflux.models import images
from reflux.types import FlowRollout, Rollout, TokenRollout


@dataclass(frozen=True)
class Kind:
    """How the results of evaluations present one class of rollouts."""

    # the name of the positions of an attempt, in the plural
    units: str
    # the key of the text or image in an example
    shown: str
    # turns the text or image into a JSON value
    show: Callable[[Any], Any]


KINDS = {
    TokenRollout: Kind("tokens", "text", str),
    # The image is base64 of a PNG. A large image is reduced to a thumbnail.
    FlowRollout: Kind("steps", "image", images.to_text),
    # a class of rollouts defined by a user
    Rollout: Kind("positions", "text", repr),
}


def kind_of(rollout: Rollout) -> Kind:
    """How evaluations present this rollout: the entry of its class, else of the nearest base class."""
    return next(KINDS[cls] for cls in type(rollout).__mro__ if cls in KINDS)
