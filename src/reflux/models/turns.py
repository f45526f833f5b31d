"""The interface of a text generator: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from reflux.config.step_context import SamplingParams


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One assistant turn to be generated."""

    # all tokens before the next one to be drawn
    ids: list[int]
    # the most tokens that are still drawn
    max_tokens: int
    # the key of the turn's random numbers, which depend on it and on the position
    rng_key: int
    # temperature, top-p, stop texts; equal for all requests of one call
    draw: SamplingParams
    # number of the student's most likely tokens that are recorded at each position
    top_k: int = 0
    # the number of tokens of the turn that are drawn already; they are the last of `ids`
    drawn: int = 0


@dataclass(slots=True)
class Turn:
    """One sampled assistant turn, of one token or more. The end token, where there is one, is the last of
    `tokens`.
    """

    tokens: list[int]
    # log-probs under the distribution that was sampled from, nats
    logp_T: np.ndarray
    # log-probs at temperature 1, nats
    raw_T: np.ndarray
    # ids and log-probs of the most likely tokens; None where `top_k` is 0
    behaviour_TK: tuple[np.ndarray, np.ndarray] | None
    # int64: the policy version that each token was sampled from
    version_T: np.ndarray
    # "stop": an end token or a stop text ended the turn
    finish: Literal["stop", "length"]
    # number of characters that the last token wrote after a stop text; they are not part of the answer's text
    beyond: int = 0


class Generator(Protocol):
    """A model that continues tokens. It does not know tasks. It returns the turns in the order of the
    requests.
    """

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]: ...
