"""Find out what an inference server can do. vLLM ignores unknown parameters and answers 200, so each ability
is proved by the content of an answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from reflux.clients.inference import GenerateRequest, InferenceClient, TextScorer
from reflux.errors import BadAnswer, ServerRefused

Result = TypeVar("Result")
# Log-probs of the same tokens by two ways of asking may differ by so many nats: a server in bfloat16 rounds
# a log-prob of 10 nats to 0.06.
TOLERANCE_NATS = 0.1
# Servers are measured on the first tokens of this text. Plain words have no special tokens, such as those
# that stand for an image.
_SENTENCE = "This sentence is given to each server of a teacher, and what they say about it is compared."
_PROBED = 16
# Statuses of a request that the server does not know. 401 and 403 are not among them.
UNKNOWN = (400, 404, 405, 422, 501)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server proved that it can do. `missing` has a sentence for each ability that it lacks."""

    # log-probs at token ids that the request lists for each position
    given_ids: bool
    # size of the hidden states that it gives; 0: none
    hidden: int
    # the label of the weights in the server; None if it labels nothing
    version: str | None
    missing: Mapping[str, str]
    # log-probs of the probed tokens ids[1:], float32, nats
    logp_T: np.ndarray


def probed_ids(tokenizer: Any) -> list[int]:
    """The tokens on which servers of a model with this tokenizer are measured."""
    return tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"][:_PROBED]


async def probe(client: TextScorer, ids: Sequence[int], model: str | None = None) -> Abilities:
    """ids: three or more tokens of the vocabulary. Raises the errors of the client, where the server does not
    answer plain requests either.
    """
    missing: dict[str, str] = {}
    plain = await client.listed(ids, 1, 0, model)
    asked_TK = np.asarray([[token, ids[0], token] for token in ids[1:]], dtype=np.int64)
    given = await _proved(client.logp_at(ids, 1, asked_TK, model), "given_ids", missing)
    if given is not None and not _agree(given, plain.logp_T):
        missing["given_ids"] = "its log-probs at given ids differ from its log-probs of the same tokens."
        given = None
    h_TH = await _proved(client.hidden_at(ids, 1, model), "hidden", missing)
    version = await client.weight_version(ids, model)
    if version is None:
        missing["version"] = "its answers have no weight versions."
    width = 0 if h_TH is None else h_TH.shape[1]
    return Abilities(given is not None, width, version, missing, plain.logp_T)


async def _proved(answer: Awaitable[Result], ability: str, missing: dict[str, str]) -> Result | None:
    try:
        return await answer
    except BadAnswer as error:
        missing[ability] = str(error)
    except ServerRefused as error:
        if error.status not in UNKNOWN:
            raise
        missing[ability] = error.reason
    return None


def _agree(given_T3: np.ndarray, logp_T: np.ndarray) -> bool:
    """The first and the third column are the tokens of the text themselves. NaN agrees with nothing."""
    return bool(
        np.array_equal(given_T3[:, 0], given_T3[:, 2])
        and (np.abs(given_T3[:, 0] - logp_T) <= TOLERANCE_NATS).all()
    )


async def logprobs_mode(
    client: InferenceClient, ids: Sequence[int], model: str | None = None
) -> Literal["processed", "raw", "other"] | None:
    """How the server reports log-probs of sampled tokens: under the distribution that it sampled from
    ("processed"), as those of the model ("raw"), or as other numbers. None where they are not finite.

    One token is sampled after each beginning of `ids`: at temperature 1, where both are the same, and among
    the two likeliest tokens at temperature 2. No log-probs of a prompt are asked for, because vLLM 0.32 with
    adapters ends at such a request.
    """
    texts = [ids[:length] for length in range(1, len(ids) + 1)]
    plain_N2 = await _both(client, [_likeliest_two(text, model) for text in texts])
    tempered = [_likeliest_two(text, model, temperature=2.0, top_k=2) for text in texts]
    shown_N2 = await _both(client, tempered)
    if not (np.isfinite(plain_N2).all() and np.isfinite(shown_N2).all()):
        return None
    expected_N2 = plain_N2 / 2 - np.logaddexp(*(plain_N2 / 2).T)[:, None]
    if np.abs(shown_N2 - expected_N2).max() <= TOLERANCE_NATS:
        return "processed"
    return "raw" if np.abs(shown_N2 - plain_N2).max() <= TOLERANCE_NATS else "other"


def _likeliest_two(
    ids: Sequence[int], model: str | None, temperature: float = 1.0, top_k: int = 0
) -> GenerateRequest:
    """One token after `ids`, and the log-probs of the two likeliest ones."""
    return GenerateRequest(
        token_ids=ids, max_tokens=1, seed=0, temperature=temperature, top_k=top_k, top=2, model=model
    )


async def _both(client: InferenceClient, asks: Sequence[GenerateRequest]) -> np.ndarray:
    rows = [(await client.generate(ask)).top_logp_TK for ask in asks]
    return np.concatenate([row_12 for row_12 in rows if row_12 is not None])
