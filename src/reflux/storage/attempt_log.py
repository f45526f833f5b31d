"""The lines of attempts.jsonl. An attempt has one line when it is sampled and a second one after
the optimiser step that used it.

Both lines have `step`, the optimiser step, from 1, that the attempt was asked for. The second one has
`trained`, the step that used it, as metrics.jsonl counts it. They are equal unless order = "ready" lets a
step take the groups of another one. The states of a flow are not written, because they are large and the
same weights and random numbers give them again. The batch of a failed step contains them (`failed_batch.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reflux.metrics.teacher_distance import teacher_logp_T
from reflux.models import images
from reflux.storage import files
from reflux.types import Attempt, FlowRollout, Message, Prompt, Reward, Rollout, StepRecord, TokenRollout

NAME = "attempts.jsonl"
# decimal digits of a log-prob: far more precise than any parity bound, and a third of the file size
_DIGITS = 5
Line = dict[str, Any]


def arrived(attempt: Attempt) -> Line:
    """The first line of an attempt. Raises TypeError for a rollout of an unknown class."""
    rollout = attempt.rollout
    kept = next((kept for kept in _KEPT if isinstance(rollout, kept.kind)), None)
    if kept is None:
        raise TypeError(
            f"attempts.jsonl holds texts and images only, and an attempt of class {type(rollout).__name__} "
            "is neither"
        )
    line = {
        "kind": "attempt",
        "step": attempt.asked_step + 1,
        "prompt": rollout.prompt.key,
        "question": question(rollout.prompt.messages),
        "sample": rollout.sample,
        "version": rollout.version,
        "finish": rollout.finish,
        **kept.fields(rollout),
    }
    if rollout.version_T is not None:
        line["versions"] = rollout.version_T
    return {**line, **_judged(attempt.reward)}


def learned(attempt: Attempt, step: int) -> Line:
    """The second line of an attempt: the teachers' log-probs of the sampled tokens or denoising steps, and
    the weight of each position. step: the optimiser step that used it, from 0.
    """
    rollout = attempt.rollout
    line: Line = {
        "kind": "learned",
        "step": attempt.asked_step + 1,
        "trained": step + 1,
        "prompt": rollout.prompt.key,
        "sample": rollout.sample,
    }
    record = attempt.learned or StepRecord()
    names = sorted({*attempt.answers, *record.logp} - {"student"})
    known = {name: logp_T for name in names if (logp_T := teacher_logp_T(attempt, name)) is not None}
    line["teacher_logp"] = {name: _rounded(logp_T) for name, logp_T in known.items()}
    if "student" in record.logp:
        line["student_logp"] = _rounded(record.logp["student"])
    if record.kl_T is not None:
        line["kl"] = _rounded(record.kl_T)
    line["weight"] = _rounded(attempt.weight_T)
    if attempt.advantage_offset_T.any():
        line["advantage_offset"] = _rounded(attempt.advantage_offset_T)
    line["notes"] = {
        f"{name}.{key}": value
        for name, share in attempt.credits.items()
        for key, value in share.notes.items()
    }
    shown = {name: answer.context_notes for name, answer in attempt.answers.items() if answer.context_notes}
    if shown:
        line["context"] = shown
    detail = {name: share.detail for name, share in attempt.credits.items() if share.detail}
    return {**line, "detail": detail} if detail else line


def cut_back(path: Path, step: int) -> None:
    """Remove the lines of attempts that no optimiser step up to `step` (from 1) has used. The resumed run
    samples them again.
    """

    def used(row: Line) -> bool:
        return row["kind"] == "learned" and row["trained"] <= step

    kept = {_key(row) for row in files.read_lines(path) if used(row)}
    files.keep_lines(path, lambda row: used(row) or (row["kind"] == "attempt" and _key(row) in kept))


def _key(row: Line) -> tuple[int, str, int]:
    return row["step"], row["prompt"], row["sample"]


def question(messages: tuple[Message, ...]) -> str:
    """The last user message, or ""."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def read_attempt(line: Line) -> Attempt:
    """An attempt made from its first line in attempts.jsonl (law 10). Raises ValueError for a line that is
    neither a text nor an image.
    """
    kept = next((kept for kept in _KEPT if kept.mark in line), None)
    if kept is None:
        raise ValueError(
            f"a line of attempts.jsonl must have one of the keys {', '.join(kept.mark for kept in _KEPT)}, "
            f"but this one has only {', '.join(line)}"
        )
    common = {
        "prompt": Prompt(line["prompt"], ({"role": "user", "content": line["question"]},)),
        "sample": line["sample"],
        "version": line["version"],
        "finish": line["finish"],
        "mask_T": np.asarray(line["mask"], dtype=bool),
        "logp_T": np.asarray(line["logp"], dtype=np.float32),
        "version_T": np.asarray(line["versions"], dtype=np.int64) if "versions" in line else None,
        "logp_raw_T": np.asarray(line["logp_raw"], dtype=np.float32) if "logp_raw" in line else None,
    }
    return Attempt(kept.rollout(line, common), _reward(line), asked_step=line["step"] - 1)


def _judged(reward: Reward | None) -> Line:
    """The fields of a reward in a line: its value, and the other fields if they are set. Without a value,
    `error` is always written, also as null. This distinguishes a reward without a value from no reward, which
    has no `error`.
    """
    if reward is None:
        return {"reward": None}
    parts = {"parts": reward.parts} if reward.parts else {}
    feedback = {"feedback": reward.feedback} if reward.feedback is not None else {}
    error = {"error": reward.error} if reward.value is None or reward.error is not None else {}
    return {"reward": reward.value, **parts, **feedback, **error}


def _reward(line: Line) -> Reward | None:
    if line["reward"] is None and "error" not in line:
        return None
    return Reward(line["reward"], line.get("parts", {}), line.get("feedback"), line.get("error"))


@dataclass(frozen=True)
class _Kept:
    """How one kind of attempt is written and read. `mark` is a key that only its lines have."""

    kind: type[Rollout]
    mark: str
    fields: Callable[[Any], Line]
    rollout: Callable[[Line, Line], Rollout]


def _said(rollout: TokenRollout) -> Line:
    return {"tokens": rollout.tokens_T, **_choices(rollout), "text": rollout.text}


def _spoken(line: Line, common: Line) -> TokenRollout:
    tokens_T, nothing = np.asarray(line["tokens"], dtype=np.int64), np.zeros(0, dtype=np.int64)
    return TokenRollout(
        **common,
        prompt_tokens=nothing,
        tokens_T=tokens_T,
        text=line["text"],
        messages=common["prompt"].messages,
    )


def _drawn(rollout: FlowRollout) -> Line:
    times = {"t": rollout.t_S, "noise_level": rollout.noise_level, "guidance": rollout.guidance}
    return {**_choices(rollout), **times, "image": images.to_text(rollout.image)}


def _painted(line: Line, common: Line) -> FlowRollout:
    t_S = np.asarray(line["t"], dtype=np.float32)
    return FlowRollout(
        **common,
        # latent values are not written
        x_SD=np.zeros((len(t_S), 0), dtype=np.float32),
        t_S=t_S,
        noise_level=line["noise_level"],
        guidance=line["guidance"],
        image=images.from_text(line["image"]),
    )


def _choices(rollout: Rollout) -> Line:
    line = {"mask": rollout.mask_T.astype(np.int8), "logp": _rounded(rollout.logp_T)}
    return line if rollout.logp_raw_T is None else {**line, "logp_raw": _rounded(rollout.logp_raw_T)}


_KEPT = (_Kept(TokenRollout, "tokens", _said, _spoken), _Kept(FlowRollout, "image", _drawn, _painted))


def _rounded(values: np.ndarray) -> np.ndarray:
    """The values rounded to _DIGITS. NaN marks positions that were not computed; the file has null there."""
    return np.round(values.astype(np.float64), _DIGITS)
