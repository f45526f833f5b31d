"""Token ids in, token ids and log-probs out: all that a text generator knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from reflux.types import SamplingParams


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One assistant turn to be generated."""

    ids: list[int]  # all tokens before it
    max_tokens: int
    rng_key: int  # what the turn's draws depend on, besides the position
    draw: SamplingParams  # temperature, top-p, stop texts; those of one call are alike
    top_k: int = 0  # so many of the student's likeliest tokens are recorded at each position


@dataclass(slots=True)
class Turn:
    """One assistant turn as it was sampled: one token or more. The end token, where there is one, is the last of `tokens`."""

    tokens: list[int]
    logp_T: np.ndarray  # under the distribution sampled from, nats
    raw_T: np.ndarray  # at temperature 1, nats
    behaviour_TK: tuple[np.ndarray, np.ndarray] | None  # ids and log-probs of the likeliest tokens
    version_T: np.ndarray  # int64: the policy version that each token was drawn from
    finish: Literal["stop", "length"]  # stop: an end token or a stop text ended it


class Generator(Protocol):
    """A model that continues tokens. It knows nothing of tasks, and returns the turns in the order of the requests."""

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]: ...
