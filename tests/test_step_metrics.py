"""What one step says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reflux.metrics.step_metrics import _credit
from reflux.metrics.values import Quantiles
from reflux.types import Attempt, Credit
from tiny import rollout


def test_a_note_counts_the_attempts_that_have_it_wherever_they_stand() -> None:
    """Before, between and after attempts without it."""
    attempts = [Attempt(rollout(2, sample=s)) for s in range(5)]
    for place, attempt in enumerate(attempts):
        attempt.credits["rule"] = Credit(
            notes={"of_some": float(place), "spread": Quantiles((float(place),))} if place in (1, 3) else {}
        )
    attempts[4].credits["late"] = Credit(advantage_offset_T=0.5, notes={"only_here": 2.0})
    found = _credit(attempts)
    assert found["rule"] == {"weight_mean": 1.0, "advantage_offset_mean": 0.0, "of_some": 2.0, "spread": 2.0}
    assert found["late"] == {"weight_mean": 1.0, "advantage_offset_mean": 0.5, "only_here": 2.0}


def test_means_are_over_chosen_positions() -> None:
    first, second = (
        Attempt(rollout(length, seed=length, mask=[True] * 2 + [False] * (length - 2))) for length in (2, 6)
    )
    first.credits["rule"], second.credits["rule"] = Credit(weight_T=2.0), Credit(weight_T=0.0)
    assert _credit([first, second])["rule"]["weight_mean"] == pytest.approx(1.0)


def test_a_teacher_is_billed_for_what_it_read(tiny_run: Callable[..., Any]) -> None:
    """The student as its own teacher reads as much as it sampled; told the answer, a little more; shown other
    attempts, much more.
    """
    settings: dict[str, Any] = {"steps": 1, "group_size": 4, "task": {"kind": "outside:Chat"}}
    same, told, peers = (
        tiny_run("peers", **settings, teachers__main={"kind": "self", "context": {"kind": context}}).rows(
            "metrics"
        )[0]["flops"]
        for context in ("same", "privileged", "peers")
    )
    assert same["teach"] == same["sample"]
    assert told["sample"] < told["teach"] < peers["teach"]


def test_attempts_are_counted_by_how_they_ended(tiny_run: Callable[..., Any]) -> None:
    """Those that a tool or a limit of time ended keep their weight, are read by the teacher, and are judged
    by nobody.
    """
    limits = {"sampler__max_tokens": 60, "sampler__max_turns": 2, "sampler__environment_timeout_s": 0.05}
    settings: dict[str, Any] = {
        "steps": 2,
        "group_size": 2,
        "task": {"kind": "outside:Unruly"},
        "rewards__verifier": {"kind": "verifier"},
    }
    done = tiny_run("opd", **settings, **limits)
    arrived = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    learned = [row for row in done.rows("attempts") if row["kind"] == "learned"]
    unjudged = {"tool_error": "a tool of the environment failed", "timeout": "the environment took too long"}
    assert {row["finish"] for row in arrived} >= {"stop", "max_turns", *unjudged}
    for row, after in zip(arrived, learned, strict=True):
        assert row.get("error") == unjudged.get(row["finish"])
        assert (row["reward"] is None) == (row["finish"] in unjudged)
        assert after["weight"] == row["mask"]
        assert len(after["teacher_logp"]["main"]) == len(row["mask"])
    for row in done.rows("metrics"):
        ended = [each["finish"] for each in arrived if each["step"] == row["step"]]
        counts = {
            finish: ended.count(finish)
            for finish in ("stop", "length", "error", "max_turns", "tool_error", "timeout")
        }
        assert row["finishes"] == counts
        assert row["truncated"] == counts["length"] / 8
        assert row["ungraded"] == counts["tool_error"] + counts["timeout"]
        assert row["errors"] == 0
