"""What is kept of an attempt on disk: one line when it arrives, a second one, for the same attempt, after the step that used it.

Both carry `step` as metrics.jsonl counts it: the optimiser step, from 1, that the attempt is for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reflux.types import Attempt, Message, Prompt, Reward, TokenRollout

_DIGITS = 5  # of a log-prob: far below any parity bound, a third of the file


def arrived(attempt: Attempt, step: int) -> dict[str, Any]:
    """The line of a new attempt; `step` is the one it is meant for, from 0."""
    rollout = attempt.rollout
    assert isinstance(rollout, TokenRollout)
    return {
        "kind": "attempt",
        "step": step + 1,
        "prompt": rollout.prompt.id,
        "question": question(rollout.prompt.messages),
        "sample": rollout.sample,
        "version": rollout.version,
        "finish": rollout.finish,
        "tokens": rollout.tokens_T,
        "mask": rollout.mask_T.astype(np.int8),
        "logp": _rounded(rollout.logp_T),
        "text": rollout.text,
        "reward": attempt.reward.value if attempt.reward else None,
    }


def learned(attempt: Attempt, step: int) -> dict[str, Any]:
    """The line after the step: what the teachers gave the sampled tokens, and what each position counted."""
    rollout = attempt.rollout
    line: dict[str, Any] = {"kind": "learned", "step": step + 1, "prompt": rollout.prompt.id, "sample": rollout.sample}
    logp = attempt.notes.get("logp", {})
    line["teacher_logp"] = {name: _rounded(values) for name, values in logp.items() if name != "student"}
    if "student" in logp:
        line["student_logp"] = _rounded(logp["student"])
    line["weight"] = _rounded(attempt.weight_T)
    if attempt.shift_T.any():
        line["shift"] = _rounded(attempt.shift_T)
    line["notes"] = {f"{name}.{key}": value for name, share in attempt.shares.items() for key, value in share.notes.items()}
    shown = {name: notes for name, notes in attempt.notes.get("shown", {}).items() if notes}
    if shown:
        line["context"] = shown
    detail = {name: share.detail for name, share in attempt.shares.items() if share.detail}
    return {**line, "detail": detail} if detail else line


def question(messages: tuple[Message, ...]) -> str:
    """The last thing the user said."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def read_attempt(line: dict[str, Any]) -> Attempt:
    """An attempt from its first line, in what is kept of it (law 10)."""
    mask_T = np.asarray(line["mask"], dtype=bool)
    prompt = Prompt(line["prompt"], ({"role": "user", "content": line["question"]},))
    rollout = TokenRollout(
        prompt=prompt,
        sample=line["sample"],
        version=line["version"],
        finish=line["finish"],
        mask_T=mask_T,
        logp_T=np.asarray(line["logp"], dtype=np.float32),
        prompt_tokens=np.zeros(0, dtype=np.int64),
        tokens_T=np.asarray(line["tokens"], dtype=np.int64),
        text=line["text"],
        messages=prompt.messages,
    )
    return Attempt(rollout, reward=None if line["reward"] is None else Reward(line["reward"]))


def _rounded(values: np.ndarray) -> np.ndarray:
    """NaN, where a position was not computed, becomes null on its way to the file."""
    return np.round(values.astype(np.float64), _DIGITS)
