"""A whole run with packed rows: the preflight's parity holds, and its numbers are those of padded rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from reflux.errors import ModelError
from reflux.learners import hf_engine
from reflux.models import packed_attention
from reflux.models.packed_attention import trial
from reflux.teachers import in_process_teacher

ON: dict[str, Any] = {
    "task": {"kind": "outside:Chat"},
    "steps": 2,
    "skip_checks": [],
    "learner.micro_batch_tokens": 60,
    "learner.gradient_checkpointing": True,
}


def told(done: Any) -> list[tuple[float, float, float]]:
    rows = [json.loads(line) for line in (done.dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["kl_nats"], row["grad_norm"]) for row in rows]


def pack_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hf_engine, in_process_teacher):
        monkeypatch.setattr(module, "why_padded", trial)


def test_a_packed_run_has_the_numbers_of_a_padded_one(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = told(tiny_run("full", **ON))
    pack_on_a_cpu(monkeypatch)
    reads = []
    kernel = packed_attention._text_by_text
    monkeypatch.setattr(packed_attention, "_text_by_text", lambda *given: reads.append(1) or kernel(*given))
    packed = told(tiny_run("full", **ON))
    assert reads
    for one, other in zip(padded, packed, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_the_preflight_finds_texts_that_read_one_another(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trial has passed and the kernel is wrong on other lengths."""
    pack_on_a_cpu(monkeypatch)
    kernel, lengths = packed_attention._text_by_text, sum(packed_attention._TRIAL)

    def wrong(query: Any, key: Any, value: Any, scale: Any, bounds: list[int]) -> Any:
        ends = bounds if bounds[-1] == lengths else [0, bounds[-1]]
        return kernel(query, key, value, scale, ends)

    monkeypatch.setattr(packed_attention, "_text_by_text", wrong)
    with pytest.raises(ModelError, match="parity"):
        tiny_run("full", **ON)
