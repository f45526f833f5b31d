"""A client of SGLang's native endpoint `/generate` that scores given texts.

It follows SGLang's documentation and source (0.5); no such server was at hand. With `return_logprob` the
answer's `meta_info` has, from the position `logprob_start_len` on, lists of (log-prob, id, text). The first
entry of each list is empty, because the token there is not scored.

Log-probs at given ids are one list a request (`token_ids_logprob`), and not one a position. The client sends
the union of all positions and picks from the answer. A text with T positions and U different ids in the union
costs T * U entries of JSON, some 20 bytes each, instead of T * K numbers of 4 bytes: for 1,000 positions with
32 tokens, of which 3,000 differ, 60 MB instead of 0.13 MB. Shorter pieces have smaller unions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reflux.clients import decoding
from reflux.clients.decoding import PromptScores
from reflux.clients.http import JsonServer
from reflux.errors import BadAnswer

GENERATE = "/generate"
# One token is generated and thrown away.
SCORING = {"max_new_tokens": 1, "temperature": 0.0}


class SGLangClient(JsonServer):
    """An async context manager: one SGLang server. Arguments and errors are those of InferenceClient, and
    `model` is the name of a LoRA adapter.
    """

    async def __aenter__(self) -> SGLangClient:
        await super().__aenter__()
        return self

    async def logp_at(
        self, ids: Sequence[int], first: int, asked_TK: np.ndarray, model: str | None = None
    ) -> np.ndarray:
        """As `InferenceClient.logp_at`, through the union of all asked ids."""
        union_U, places = np.unique(asked_TK, return_inverse=True)
        meta = await self._scored(ids, first, model, {"token_ids_logprob": union_U.tolist()})
        with decoding.reading():
            rows = _entries(meta, "input_token_ids_logprobs", len(ids) - first)
            listed = [[token for _, token, *_ in row] for row in rows]
            if any(tokens != union_U.tolist() for tokens in listed):
                raise BadAnswer("the answer has log-probs at other ids than those of the request.")
            logp_TU = np.asarray([[_number(value) for value, *_ in row] for row in rows], dtype=np.float32)
            return np.take_along_axis(logp_TU, places.reshape(asked_TK.shape), axis=1)

    async def hidden_at(self, ids: Sequence[int], first: int, model: str | None = None) -> np.ndarray:
        raise BadAnswer("SGLang gives hidden states as JSON only, and this client does not read them.")

    async def listed(self, ids: Sequence[int], first: int, k: int, model: str | None = None) -> PromptScores:
        """As `InferenceClient.listed`."""
        meta = await self._scored(ids, first, model, {"top_logprobs_num": k})
        with decoding.reading():
            own = _entries(meta, "input_token_logprobs", len(ids) - first)
            # SGLang reports the last id of the vocabulary as 0.
            if any(found not in (token, 0) for (_, found, *_), token in zip(own, ids[first:], strict=True)):
                raise BadAnswer("the answer has log-probs of other tokens than those of the text.")
            best = _entries(meta, "input_top_logprobs", len(ids) - first) if k else [[]] * len(own)
            if any(len(row) != k for row in best):
                raise BadAnswer(f"the answer does not list {k} tokens at each position.")
            ids_TK = [[token for _, token, *_ in row] for row in best]
            logp_TK = [[_number(value) for value, *_ in row] for row in best]
            return PromptScores(
                np.asarray([_number(value) for value, *_ in own], dtype=np.float32),
                np.asarray(ids_TK, dtype=np.int64).reshape(len(own), k),
                np.asarray(logp_TK, dtype=np.float32).reshape(len(own), k),
            )

    async def weight_version(self, ids: Sequence[int], model: str | None = None) -> str | None:
        meta = await self._scored(ids, 1, model, {})
        label = meta.get("weight_version")
        return None if label is None else str(label)

    async def _scored(
        self, ids: Sequence[int], first: int, model: str | None, more: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The `meta_info` of an answer for the tokens ids[first:]. The token before them comes with it."""
        body = {
            "input_ids": [int(token) for token in ids],
            "sampling_params": SCORING,
            "return_logprob": True,
            "logprob_start_len": first - 1,
            **more,
        }
        answer = await self.post(GENERATE, body if model is None else {**body, "lora_path": model})
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise BadAnswer("the answer has no `meta_info`.")
        if meta.get("prompt_tokens") not in (None, len(ids)):
            raise BadAnswer("the answer belongs to another text.")
        return meta


def _entries(meta: Mapping[str, Any], name: str, rows: int) -> list[Any]:
    """The entries of the scored tokens, without the empty one before them."""
    found = meta.get(name)
    if not isinstance(found, list) or len(found) != rows + 1:
        raise BadAnswer(f"the answer does not have `{name}` for the {rows} tokens that were asked.")
    return found[1:]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
