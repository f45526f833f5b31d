"""One line of a file of attempts, read and checked. An error is the end of a sentence about the line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from reflux.config.line_fields import messages_of, text_of
from reflux.types import Finish, Message

# The names of the fields in attempts.jsonl of a run, where they differ.
_OF_RUNS = {
    "prompt_id": "prompt",
    "response_ids": "tokens",
    "logprobs": "logp",
    "raw_logprobs": "logp_raw",
    "messages": "",
}
# An attempt that ended in an error has no token.
_FINISHES = tuple(finish for finish in get_args(Finish) if finish != "error")


@dataclass(frozen=True, slots=True)
class Stored:
    """One attempt of a file."""

    # the id of the prompt; None if the line has none
    name: str | None
    # the messages of the prompt; None if the line has none
    messages: tuple[Message, ...] | None
    # the last user message of the prompt, in lines of a run
    question: str | None
    answer: str | None
    route: str | None
    # int64, or None if the line has none
    prompt_tokens: np.ndarray | None
    # int64
    tokens_T: np.ndarray
    mask_T: np.ndarray
    # float32, nats; 0 where the policy did not choose
    logp_T: np.ndarray
    logp_raw_T: np.ndarray | None
    # the lowest and the highest policy version of the tokens
    versions: tuple[int, int]
    # None: the last token decides
    finish: Finish | None
    reward: float | None


def passed_over(fields: Mapping[str, Any]) -> bool:
    """True for lines of a run that hold no attempt to train on: the second line of an attempt, and attempts
    that ended in an error.
    """
    return fields.get("kind") == "learned" or (
        fields.get("kind") == "attempt" and fields.get("finish") == "error"
    )


def stored(fields: Mapping[str, Any]) -> Stored:
    """The attempt of a line. ValueError, with the end of a sentence, for a line that cannot be used."""
    own = _OF_RUNS if fields.get("kind") == "attempt" else {}

    def of(key: str) -> tuple[Any, str]:
        """The value of a field, and its name in this line."""
        return fields.get(own.get(key, key)), own.get(key, key)

    tokens_T = _required(*of("response_ids"), fields)
    length = len(tokens_T)
    mask_T = _mask(*of("mask"), length)
    if not mask_T.any():
        raise ValueError("has no position that was sampled: its mask is false everywhere")
    asked, name = of("prompt_ids")
    raw, raw_name = of("raw_logprobs")
    found, found_name = of("logprobs")
    if found is None:
        raise ValueError(f"has no field '{found_name}' ({_fields(fields)})")
    prompt_id, id_name = of("prompt_id")
    if prompt_id is None:
        prompt_id, id_name = fields.get("id"), "id"
    chat = of("messages")[0]
    if prompt_id is None and chat is None:
        raise ValueError(
            "names no prompt. Give 'prompt_id', the id of a training prompt of the task, or 'messages', the "
            "prompt itself"
        )
    return Stored(
        name=text_of(prompt_id, id_name),
        messages=None if chat is None else _messages(chat),
        question=fields.get("question") if own else None,
        answer=text_of(fields.get("answer"), "answer"),
        route=text_of(fields.get("route"), "route"),
        prompt_tokens=None if asked is None else _ids(asked, name),
        tokens_T=tokens_T,
        mask_T=mask_T,
        logp_T=_logp(found, found_name, mask_T),
        logp_raw_T=None if raw is None else _logp(raw, raw_name, mask_T),
        versions=_versions(fields.get("version", 0), length),
        finish=_finish(fields.get("finish")),
        reward=_reward(fields.get("reward")),
    )


def _required(value: Any, name: str, fields: Mapping[str, Any]) -> np.ndarray:
    if value is None:
        raise ValueError(f"has no field '{name}' ({_fields(fields)})")
    return _ids(value, name)


def _fields(fields: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(repr, fields)) or 'none'}"


def _messages(chat: Any) -> tuple[Message, ...]:
    last = chat[-1] if isinstance(chat, list) and chat else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise ValueError(
            "ends with an assistant turn in its field 'messages', which is the prompt alone. Leave out the "
            "turns that 'response_ids' holds"
        )
    return messages_of(None, chat, ("prompt", "messages"))


def _ids(value: Any, name: str) -> np.ndarray:
    """Token ids as int64."""
    found = _numbers(value, name, "token ids")
    if found.dtype.kind != "i":
        raise ValueError(f"has other values than whole numbers in its field '{name}', which holds token ids")
    if found.min() < 0:
        raise ValueError(f"has the token id {found.min()} in its field '{name}', and no id is below 0")
    return found.astype(np.int64)


def _numbers(value: Any, name: str, what: str) -> np.ndarray:
    """A list with at least one entry, as an array of one dimension."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"needs a list of {what} in its field '{name}', got {_short(value)}")
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        found = np.zeros((0, 0))
    if found.ndim != 1:
        raise ValueError(f"has a list inside the list of its field '{name}', which holds {what}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same_length(values: np.ndarray, name: str, length: int) -> None:
    if len(values) != length:
        raise ValueError(
            f"has {len(values)} entries in its field '{name}' for {length} response tokens, and needs one "
            "for each"
        )


def _mask(value: Any, name: str, length: int) -> np.ndarray:
    if value is None:
        return np.ones(length, dtype=bool)
    found = _numbers(value, name, "true and false")
    _same_length(found, name, length)
    if found.dtype.kind not in "bi" or not np.isin(found, (0, 1)).all():
        raise ValueError(
            f"has other values than true and false (or 1 and 0) in its field '{name}'. True: the policy "
            "sampled the token; false: a tool or a template wrote it"
        )
    return found.astype(bool)


def _logp(value: Any, name: str, mask_T: np.ndarray) -> np.ndarray:
    """Log-probs of the sampled tokens. Entries of other tokens may be anything, also null."""
    filled = [math.nan if entry is None else entry for entry in value] if isinstance(value, list) else value
    found = _numbers(filled, name, "log-probs")
    _same_length(found, name, len(mask_T))
    if found.dtype.kind not in "fi":
        raise ValueError(f"has other values than numbers in its field '{name}', which holds log-probs")
    wrong = np.flatnonzero(mask_T & ~(np.isfinite(found) & (found <= 0)))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"has {'no number' if np.isnan(found[at]) else format(found[at], 'g')} at position {at} (from 0) "
            f"of its field '{name}'. The log-prob of a sampled token is finite and at most 0, in nats"
        )
    return np.where(mask_T, found, 0).astype(np.float32)


def _versions(value: Any, length: int) -> tuple[int, int]:
    per_token = isinstance(value, list)
    found = _numbers(value if per_token else [value], "version", "policy versions")
    if per_token:
        _same_length(found, "version", length)
    if found.dtype.kind != "i" or found.min() < 0:
        raise ValueError(
            f"needs whole numbers of at least 0 in its field 'version', got {_short(value)}. It is the "
            "number of optimiser steps of the policy that sampled, one for all tokens or one for each; "
            "leave it out if it is not known"
        )
    return int(found.min()), int(found.max())


def _finish(value: Any) -> Finish | None:
    if value is not None and value not in _FINISHES:
        raise ValueError(
            f"has the finish {_short(value)}. Known: {', '.join(_FINISHES)}. Leave the field out, and the "
            "last token decides between stop and length"
        )
    return value


def _reward(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"has no finite number in its field 'reward', but {_short(value)}")
    return float(value)
