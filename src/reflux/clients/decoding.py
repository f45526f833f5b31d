"""Decode the answers of inference servers into arrays, and refuse those that do not hold what was requested.

The functions raise BadAnswer. Log-probs are natural logs, float32.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from reflux.errors import BadAnswer

# vLLM writes this number in the place of -inf and of NaN, because JSON has neither.
NOT_A_LOGP = -9999.0


class VersionSpan(NamedTuple):
    """The output tokens [start, end) were sampled from the weights with this label."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One sampled continuation of T tokens. An end token or a stop token that ended it is its last token."""

    # int64
    tokens_T: np.ndarray
    # float32, nats, under the distribution that the server's mode of log-probs names; NaN or -inf where the
    # server's weights give no number
    logp_T: np.ndarray
    finish: Literal["stop", "length", "abort"]
    # the stop token or stop text that ended it; None for an end token
    stop_reason: int | str | None
    # consecutive, from 0 to T; empty if the server reports none
    versions: tuple[VersionSpan, ...]
    # True if the server's context window, and not `max_tokens`, ended it
    cut: bool
    # the most likely tokens, [T, K], the likeliest first; None if none were requested
    top_ids_TK: np.ndarray | None = None
    top_logp_TK: np.ndarray | None = None

    @property
    def finite(self) -> bool:
        """False if a log-prob of a sampled token is no number: the weights in the server are broken."""
        return bool(np.isfinite(self.logp_T).all())


class PromptScores(NamedTuple):
    """The log-probs of given tokens, and of the K tokens that are most likely before each of them."""

    logp_T: np.ndarray
    ids_TK: np.ndarray
    logp_TK: np.ndarray


@contextmanager
def reading() -> Iterator[None]:
    """Errors of decoding inside become BadAnswer, because they come from an answer of another form."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadAnswer(
            f"the answer has another form than the server's documentation says ({error!r})."
        ) from error


def generated(answer: Any, max_tokens: int, top: int) -> Generated:
    """The one continuation in an answer of `/inference/v1/generate`. max_tokens, top: as requested."""
    choice = only_choice(answer)
    tokens, entries = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
    if not isinstance(tokens, list) or not isinstance(entries, list) or len(tokens) != len(entries):
        raise BadAnswer("the answer does not have one log-prob for each sampled token.")
    if [entry.get("token_id") for entry in entries] != tokens:
        raise BadAnswer("the log-probs in the answer belong to other tokens than the sampled ones.")
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length", "abort"):
        raise BadAnswer(f"the answer ends with an unknown reason: {finish!r}.")
    if len(tokens) > max_tokens or (not tokens and finish != "abort"):
        raise BadAnswer(f"the answer has {len(tokens)} tokens, and up to {max_tokens} were requested.")
    best = [_top(entry, top) for entry in entries] if top else []
    return Generated(
        tokens_T=np.asarray(tokens, dtype=np.int64),
        logp_T=np.asarray([_logp(entry) for entry in entries], dtype=np.float32),
        finish=finish,
        stop_reason=choice.get("stop_reason"),
        versions=_versions(choice.get("weight_versions"), len(tokens)),
        cut=finish == "length" and len(tokens) < max_tokens,
        top_ids_TK=np.asarray([ids for ids, _ in best], dtype=np.int64).reshape(-1, top) if top else None,
        top_logp_TK=np.asarray([logp for _, logp in best], dtype=np.float32).reshape(-1, top)
        if top
        else None,
    )


def only_choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("the answer does not have the one choice that was requested.")
    return choices[0]


def _logp(entry: Mapping[str, Any]) -> float:
    """-9999.0 without a rank stands for NaN, and with a rank for -inf."""
    value = entry.get("logprob")
    if value is None:
        return float("nan")
    if value != NOT_A_LOGP:
        return float(value)
    return float("nan") if entry.get("rank") is None else float("-inf")


def _top(entry: Mapping[str, Any], top: int) -> tuple[list[int], list[float]]:
    """The `top` most likely tokens of one position. The list of the server begins with the sampled token,
    which may be none of them.
    """
    found = {listed["token_id"]: _logp(listed) for listed in entry.get("top_logprobs") or ()}
    if len(found) < top:
        raise BadAnswer(f"the answer lists {len(found)} likely tokens at a position instead of {top}.")
    best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:top]
    return [token for token, _ in best], [logp for _, logp in best]


def _versions(spans: Any, length: int) -> tuple[VersionSpan, ...]:
    if not spans:
        return ()
    found = tuple(VersionSpan(str(span["version"]), int(span["start"]), int(span["end"])) for span in spans)
    edges = [0, *(span.end for span in found)]
    if edges[-1] != length or edges[:-1] != [span.start for span in found]:
        raise BadAnswer(f"the weight versions in the answer do not cover its {length} tokens: {found}.")
    return found


def matrix(text: Any, rows: int) -> np.ndarray:
    """The float32 matrix [rows, K] in a base64 text that holds an .npy file. Pickled data are not read."""
    if not isinstance(text, str):
        raise BadAnswer("the answer has no log-probs at the given tokens.")
    try:
        values = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise BadAnswer(f"the numbers in the answer cannot be decoded ({error}).") from error
    if values.ndim != 2 or len(values) != rows or values.dtype != np.float32:
        raise BadAnswer(
            f"the answer has numbers of the shape {values.shape} and the type {values.dtype}, and "
            f"{rows} rows of float32 were requested."
        )
    return values


def listed(entries: Any, ids: Sequence[int], first: int, k: int) -> PromptScores:
    """`prompt_logprobs` of the tokens ids[first:]. entries: for each token of `ids` a table from token id to
    log-prob and rank, with the token itself and the `k` most likely ones.
    """
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise BadAnswer(f"the answer does not have log-probs for the {len(ids)} tokens of the request.")
    rows = [_row(entry, token, k) for entry, token in zip(entries[first:], ids[first:], strict=True)]
    return PromptScores(
        np.asarray([logp for logp, _ in rows], dtype=np.float32),
        np.asarray([[token for token, _ in best] for _, best in rows], dtype=np.int64).reshape(len(rows), k),
        np.asarray([[logp for _, logp in best] for _, best in rows], dtype=np.float32).reshape(len(rows), k),
    )


def _row(entry: Any, token: int, k: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-prob of `token`, and the k most likely tokens with theirs."""
    if not isinstance(entry, dict) or str(token) not in entry:
        raise BadAnswer("the answer lacks the log-prob of a token of the request.")
    found = {int(key): _logp(value) for key, value in entry.items()}
    if not k <= len(found) <= k + 1:
        raise BadAnswer(f"the answer lists {len(found)} tokens at a position instead of {k} or {k + 1}.")
    # With k + 1 entries the token of the text is not among the most likely ones.
    others = [pair for pair in found.items() if len(found) == k or pair[0] != token]
    return found[token], sorted(others, key=lambda pair: (-pair[1], pair[0]))
