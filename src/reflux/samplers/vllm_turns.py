"""Requests to a server from turns to be generated, and turns from its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reflux.clients.decoding import Generated, PromptScores
from reflux.clients.inference import GenerateRequest
from reflux.config.step_context import SamplingParams
from reflux.errors import BadAnswer, ModelError
from reflux.models.stop_texts import StopTexts
from reflux.models.turns import Turn, TurnRequest


def is_changed(draw: SamplingParams) -> bool:
    """True if the log-probs of the sampled distribution are not those of the model. At temperature 0 the
    server reports those of the model.
    """
    return draw.temperature != 0 and (draw.temperature != 1 or draw.top_p != 1)


class Turns:
    """tokenizer: finds stop texts. end_ids: the token ids that end a turn. vocabulary: number of tokens."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], vocabulary: int):
        self.tokenizer, self.end_ids, self.vocabulary = tokenizer, tuple(end_ids), vocabulary

    def request(self, ask: TurnRequest, model: str | None) -> GenerateRequest:
        """model: the name of an adapter; None: the served model. The seed is the key of the turn's random
        numbers, which is a hash, so the seeds of two requests are never neighbours by design.
        """
        return GenerateRequest(
            token_ids=ask.ids,
            max_tokens=ask.max_tokens,
            seed=ask.rng_key,
            temperature=ask.draw.temperature,
            top_p=ask.draw.top_p,
            stop_token_ids=self.end_ids,
            stop=ask.draw.stop,
            top=0 if is_changed(ask.draw) else self.listed(ask),
            model=model,
        )

    def listed(self, ask: TurnRequest) -> int:
        """Number of most likely tokens that are recorded at each position."""
        return min(ask.top_k, self.vocabulary - 1)

    def turn(
        self, ask: TurnRequest, answer: Generated, raw: PromptScores | None, version: int | None
    ) -> Turn:
        """raw: the log-probs of the same tokens at temperature 1, where the answer does not have them.
        version: of the adapter that was named in the request; None: the answer tells it for each token.

        ModelError for an answer that no working model gives.
        """
        _refuse(ask, answer, self.vocabulary)
        tokens = answer.tokens_T.tolist()
        length, beyond = self._end(tokens, ask.draw.stop)
        scores = (answer.logp_T, answer.top_ids_TK, answer.top_logp_TK) if raw is None else raw
        raw_T, ids_TK, logp_TK = scores
        listed = None
        if ask.top_k and ids_TK is not None and logp_TK is not None:
            listed = ids_TK[:length], logp_TK[:length]
        return Turn(
            tokens[:length],
            answer.logp_T[:length],
            raw_T[:length],
            listed,
            _versions(answer, version)[:length],
            "stop" if answer.finish == "stop" or beyond is not None else "length",
            beyond or 0,
        )

    def _end(self, tokens: list[int], stop: Sequence[str]) -> tuple[int, int | None]:
        """The number of tokens up to the one in which a stop text ends, and the characters beyond it; None
        where no stop text ends.
        """
        if not stop:
            return len(tokens), None
        texts = StopTexts(self.tokenizer, stop)
        for length in range(1, len(tokens) + 1):
            if tokens[length - 1] in self.end_ids:
                break
            beyond = texts.beyond(tokens[:length])
            if beyond is not None:
                return length, beyond
        return len(tokens), None


def _refuse(ask: TurnRequest, answer: Generated, vocabulary: int) -> None:
    if not answer.finite:
        raise ModelError(
            "the server samples from weights that are not finite: its log-probs are no numbers. Check "
            "that the student's weights are finite, and lower learner.lr if training made them so."
        )
    if answer.cut:
        raise ModelError(
            f"the server ended an answer after {len(answer.tokens_T)} of {ask.max_tokens} tokens, because "
            "its context window is full. Start it with a larger --max-model-len, or lower "
            "sampler.context_tokens and sampler.max_tokens."
        )
    if len(answer.tokens_T) and int(answer.tokens_T.max()) >= vocabulary:
        raise ModelError(
            f"the server sampled token {int(answer.tokens_T.max())}, and the tokenizer has {vocabulary}: the "
            'model gives probability to padding rows of its output. Use sampler.kind = "hf".'
        )


def _versions(answer: Generated, version: int | None) -> np.ndarray:
    version_T = np.zeros(len(answer.tokens_T), dtype=np.int64)
    if version is not None:
        return version_T + version
    if not answer.versions:
        raise BadAnswer(
            "the server does not tell which weights sampled a token. It needs vLLM 0.32 or later."
        )
    for label, start, end in answer.versions:
        try:
            version_T[start:end] = int(label)
        except ValueError as error:
            raise BadAnswer(
                f"the server's weights have the label '{label}', which is not from this run: another program "
                "has changed them, or the server was started again."
            ) from error
    return version_T
