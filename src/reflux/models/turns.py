"""Token ids in, token ids and log-probs out: all that a text generator knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from reflux.config.step_context import SamplingParams


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One assistant turn to be generated."""

    # all tokens before it
    ids: list[int]
    max_tokens: int
    # what the turn's draws depend on, besides the position
    rng_key: int
    # temperature, top-p, stop texts; those of one call are alike
    draw: SamplingParams
    # so many of the student's likeliest tokens are recorded at each position
    top_k: int = 0


@dataclass(slots=True)
class Turn:
    """One assistant turn as it was sampled: one token or more. The end token, where there is one, is the last
    of `tokens`.
    """

    tokens: list[int]
    # under the distribution sampled from, nats
    logp_T: np.ndarray
    # at temperature 1, nats
    raw_T: np.ndarray
    # ids and log-probs of the likeliest tokens
    behaviour_TK: tuple[np.ndarray, np.ndarray] | None
    # int64: the policy version that each token was drawn from
    version_T: np.ndarray
    # stop: an end token or a stop text ended it
    finish: Literal["stop", "length"]


class Generator(Protocol):
    """A model that continues tokens. It knows nothing of tasks, and returns the turns in the order of the
    requests.
    """

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]: ...
