"""A client of vLLM: token ids in, token ids, log-probs and weight versions out.

It uses `POST /inference/v1/generate`, which a server offers that was started with `--enable-scale-out` (or
`--tokens-only`). vLLM ignores unknown parameters and answers 200, so each answer is checked for its content,
and `clients.probe` finds out what a server can do.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from reflux.clients import decoding
from reflux.clients.decoding import Generated, PromptScores
from reflux.clients.http import JsonServer
from reflux.errors import BadAnswer

GENERATE = "/inference/v1/generate"
# One token is sampled and thrown away, because vLLM does not accept 0.
SCORING = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One continuation to sample. Every setting is sent, because a server takes what is left out from the
    generation_config.json of its model.
    """

    token_ids: Sequence[int]
    max_tokens: int
    # The same seed gives the same tokens, so the request may be sent again. Never a count of samples beside
    # it: vLLM seeds sample i with seed + i, and neighbouring seeds would share samples.
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    # 0: all tokens
    top_k: int = 0
    stop_token_ids: Sequence[int] = ()
    # Texts that end it. The token in which such a text ends is the last one.
    stop: Sequence[str] = ()
    # number of most likely tokens that are reported at each position, below the size of the vocabulary
    top: int = 0
    # the name of a loaded LoRA adapter; None: the served model
    model: str | None = None

    def body(self) -> dict[str, Any]:
        params = {
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self.stop_token_ids),
            # In a list of vLLM's the sampled token takes the place of another one.
            "logprobs": self.top + 1 if self.top else 0,
            "n": 1,
            # A server finds stop texts in the text only.
            "detokenize": bool(self.stop),
            **({"stop": list(self.stop), "include_stop_str_in_output": True} if self.stop else {}),
        }
        return _body(self.token_ids, params, self.model)


class TextScorer(Protocol):
    """A client of a server that scores given texts. The methods are those of InferenceClient."""

    url: str

    async def logp_at(
        self, ids: Sequence[int], first: int, asked_TK: np.ndarray, model: str | None = None
    ) -> np.ndarray: ...

    async def hidden_at(self, ids: Sequence[int], first: int, model: str | None = None) -> np.ndarray: ...

    async def listed(
        self, ids: Sequence[int], first: int, k: int, model: str | None = None
    ) -> PromptScores: ...

    async def weight_version(self, ids: Sequence[int], model: str | None = None) -> str | None: ...


class InferenceClient(JsonServer):
    """An async context manager: one vLLM server. The arguments are those of JsonServer.

    The errors of every method: ServerRefused for a request that the server calls wrong; BadAnswer for an
    answer without what was requested; ServerError if there was no answer.
    """

    async def __aenter__(self) -> InferenceClient:
        await super().__aenter__()
        # the names of its requests, which no other client of the server uses
        self._name, self._numbers = f"reflux-{uuid.uuid4().hex}", itertools.count()
        return self

    async def generate(self, request: GenerateRequest) -> Generated:
        """Sample one continuation. A request that fails is sent again with its seed, and counts once."""
        answer = await self._answer(request.body())
        with decoding.reading():
            return decoding.generated(answer, request.max_tokens, request.top)

    async def logp_at(
        self, ids: Sequence[int], first: int, asked_TK: np.ndarray, model: str | None = None
    ) -> np.ndarray:
        """Log-probs of the tokens `asked_TK` in the places of ids[first:], float32 [T, K], T = len(ids) -
        first. Row t is given ids[:first + t]. Always of the model itself, at temperature 1.
        """
        return await self._given(ids, first, asked_TK.tolist(), {}, model, asked_TK.shape[1])

    async def hidden_at(self, ids: Sequence[int], first: int, model: str | None = None) -> np.ndarray:
        """The hidden states, after the final norm, that predict the tokens ids[first:], float32 [T, H].

        Needs Reflux's plugin in the server. A server without it ignores the wish, and the answer then has one
        column; this is refused.
        """
        rows = [[0]] * (len(ids) - first)
        h_TH = await self._given(ids, first, rows, {"extra_args": {"reflux_hidden": 1}}, model)
        if h_TH.shape[1] == 1:
            raise BadAnswer("the server gave log-probs instead of hidden states.")
        return h_TH

    async def _given(
        self,
        ids: Sequence[int],
        first: int,
        asked: list[list[int]],
        more: Mapping[str, Any],
        model: str | None,
        columns: int | None = None,
    ) -> np.ndarray:
        # vLLM counts the rows from the position before the first scored token.
        params = {**SCORING, **more, "prompt_logprob_start": first - 1, "prompt_logprob_token_ids": asked}
        answer = await self._answer(_body(ids, params, model))
        values = decoding.matrix(answer.get("prompt_token_id_logprobs"), len(ids) - first)
        if columns is not None and values.shape[1] != columns:
            raise BadAnswer(f"the answer has {values.shape[1]} log-probs a position instead of {columns}.")
        return values

    async def listed(self, ids: Sequence[int], first: int, k: int, model: str | None = None) -> PromptScores:
        """Log-probs of the tokens ids[first:], and the `k` most likely tokens in the place of each. This
        works on every vLLM server; k is at most its `--max-logprobs`. The answer also carries the positions
        before `first`.
        """
        answer = await self._answer(_body(ids, {**SCORING, "prompt_logprobs": k}, model))
        with decoding.reading():
            return decoding.listed(answer.get("prompt_logprobs"), ids, first, k)

    async def weight_version(self, ids: Sequence[int], model: str | None = None) -> str | None:
        """The label of the weights that continue `ids`; None if the server does not label its tokens."""
        made = await self.generate(GenerateRequest(token_ids=ids, max_tokens=1, seed=0, model=model))
        return made.versions[0].version if made.versions else None

    async def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request of the inference endpoint. Its name, which the server repeats, shows that
        it belongs to this request.
        """
        name = f"{self._name}-{next(self._numbers)}"
        answer = await self.post(GENERATE, {**body, "request_id": name})
        if not isinstance(answer, dict):
            raise BadAnswer("the answer is no JSON object.")
        if not str(answer.get("request_id", "")).endswith(name):
            raise BadAnswer("the answer belongs to another request.")
        return answer

    async def control(
        self, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """A request that changes the server, such as /pause, /update_weights or /resume. It is sent once."""
        return await self.post(path, body, query, replay=False)

    async def health(self) -> None:
        """Wait until the server answers. ServerError if it does not within `patience_s`."""
        await self.get("/health")


def _body(ids: Sequence[int], params: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    body = {"token_ids": [int(token) for token in ids], "sampling_params": params}
    return body if model is None else {**body, "model": model}
