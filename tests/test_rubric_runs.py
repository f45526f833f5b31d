"""Whole runs with judges: what they cost, what a failure leaves, and that no file of a run has a key."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from reflux.errors import ServerError, Stopped
from reflux.reports.page import write_report
from reflux.rewards.oracle import rules
from reflux.rewards.oracle.faults import Faults
from reflux.rewards.oracle.rule_answers import Oracle
from reflux.rewards.oracle.server import serving
from reflux.tasks.word_problems import WordProblems
from tiny import same

KEY = "sk-a-key-that-is-in-no-file"
SMALL = {"steps": 2, "prompts_per_step": 3, "group_size": 4, "evals": "none", "save_every": 1}
# the counts of requests that a resumed run makes again
TIMES = ("seconds", "peak_memory_bytes", "chat")


def faults(**shares: float) -> dict[str, Any]:
    return {f"rewards__rubric__judge__faults__{name}": share for name, share in shares.items()}


def told(done: Any) -> list[Any]:
    metrics = [{k: v for k, v in row.items() if k not in TIMES} for row in done.rows("metrics")]
    return [metrics, done.rows("attempts")]


def rewards(done: Any) -> list[list[float | None]]:
    """By group."""
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    keys = list(dict.fromkeys((row["step"], row["prompt"]) for row in rows))
    return [[row["reward"] for row in rows if (row["step"], row["prompt"]) == key] for key in keys]


def test_requests_tokens_and_costs_are_in_metrics_and_summary(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("rubric", **SMALL)
    rows = [row["chat"] for row in done.rows("metrics")]
    assert [row["rubric"]["requests"] for row in rows] == [3, 3]
    assert [row["teacher"]["requests"] for row in rows] == [12, 12]
    assert done.summary["chat"]["teacher"]["requests"] == 24
    for role in ("rubric", "verdicts", "teacher"):
        for name in ("prompt_tokens", "completion_tokens", "cost"):
            assert done.summary["chat"][role][name] == sum(row[role][name] for row in rows)
    assert json.loads((done.dir / "summary.json").read_text())["chat"] == done.summary["chat"]
    assert all(0 <= value <= 1 for group in rewards(done) for value in group if value is not None)
    assert "chat" not in tiny_run("rl", **SMALL).summary


def test_the_report_shows_what_was_asked_of_chat_servers(tiny_run: Callable[..., Any]) -> None:
    """Each cell is the number of the summary; a run without chat servers has no such table."""
    done = tiny_run("rubric", **SMALL, **faults(busy=0.2))
    page = write_report(done.dir).read_text()
    whole: Counter[str] = Counter()
    for role, counts in sorted(done.summary["chat"].items()):
        whole.update(counts)
        assert cells(page, role) == shown(counts)
    assert cells(page, "total") == shown(whole)
    assert sum(counts.get("replays", 0) for counts in done.summary["chat"].values()) > 0
    assert "Requests to chat servers" not in write_report(tiny_run("rl", **SMALL).dir).read_text()


def cells(page: str, role: str) -> list[str]:
    row = re.search(rf'<th scope="row"><bdi>{role}</bdi></th>(.*?)</tr>', page)
    assert row is not None, role
    return re.findall("<td>(.*?)</td>", row[1])


def shown(counts: Mapping[str, float]) -> list[str]:
    names = ("requests", "cached", "replays", "failed", "invalid", "prompt_tokens", "completion_tokens")
    cost = counts.get("cost", 0)
    return [*(f"{counts.get(name, 0):,.0f}" for name in names), f"{cost:,.4f}" if cost else "0"]


def test_a_resumed_run_asks_for_no_answer_twice(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    whole = tiny_run("rubric", **SMALL)
    folder = shutil.copytree(whole.dir, tmp_path / "again")
    shutil.rmtree(folder / "checkpoints" / "step-2")
    (folder / "summary.json").unlink()
    resumed = tiny_run("rubric", **SMALL, out=folder, resume=True)
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)
    counts = resumed.rows("metrics")[-1]["chat"]
    assert [counts[role].get("requests", 0) for role in ("rubric", "teacher", "verdicts")] == [0, 0, 0]
    assert (counts["rubric"]["cached"], counts["teacher"]["cached"]) == (3, 12)


def test_failing_judges_leave_whole_groups_out(tiny_run: Callable[..., Any]) -> None:
    more = {**SMALL, "prompts_per_step": 12, "rewards__rubric__max_failed_share": 1.0}
    done = tiny_run("rubric", **more, **faults(cut_json=0.3))
    found = rewards(done)
    lost = [group for group in found if None in group]
    assert 0 < len(lost) < 24
    assert all(set(group) == {None} for group in lost)
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt" and row["reward"] is None]
    assert len(rows) == 4 * len(lost)
    assert all("the group was not judged: " in row["error"] for row in rows)
    metrics = done.rows("metrics")
    assert sum(row["ungraded"] for row in metrics) == 4 * len(lost)
    assert done.summary["chat"]["rubric"]["groups_failed"] == len(lost)
    # They add nothing to the gradient.
    learned = [row for row in done.rows("attempts") if row["kind"] == "learned"]
    silent = {(row["step"], row["prompt"], row["sample"]) for row in rows}
    shifts = [
        "advantage_offset" in row for row in learned if (row["step"], row["prompt"], row["sample"]) in silent
    ]
    assert shifts == [False] * len(rows)


def test_a_run_stops_where_too_many_groups_fail(tiny_run: Callable[..., Any]) -> None:
    with pytest.raises(ServerError, match="3 of the 3 groups of this step could not be judged") as stopped:
        tiny_run("rubric", **SMALL, **faults(cut_json=1.0))
    assert "x the group was not judged: the answer of rules cannot be used" in str(stopped.value)
    assert not isinstance(stopped.value, Stopped)


def test_a_judge_that_lies_about_its_sums_changes_no_weight(tiny_run: Callable[..., Any]) -> None:
    honest = tiny_run("rubric", **SMALL)
    lying = tiny_run("rubric", **SMALL, **faults(lying_score=1.0, swapped=1.0, fenced=1.0))
    assert same(honest.state, lying.state)
    assert rewards(honest) == rewards(lying)
    assert honest.summary["chat"]["verdicts"]["sums_differ"] == 0
    assert lying.summary["chat"]["verdicts"]["sums_differ"] > 0


def test_a_rubric_about_the_final_answer_alone_is_the_verifier(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule server is in this process, so its rules can be replaced."""
    final = rules.RULES[0]
    same_rule = tuple(rules.Rule("", f"Rule {n}.", 1 + n, final.met) for n in range(4))
    monkeypatch.setattr(rules, "RULES", same_rule)
    monkeypatch.setattr(rules, "BY_TEXT", {rule.text: rule for rule in same_rule})
    # The shipped student, which solves some problems and not others.
    more = {**SMALL, "learner__model": "reflux:student", "sampler__max_tokens": 40}
    judged, verified = tiny_run("rubric", **more), tiny_run("rl", **more)
    assert rewards(judged) == rewards(verified)
    assert len({value for group in rewards(judged) for value in group}) == 2
    assert same(judged.state, verified.state)


def test_no_file_of_a_run_has_the_key(
    tiny_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where some requests fail, and where the server repeats the key in an answer."""
    monkeypatch.setenv("REFLUX_TEST_KEY", KEY)
    said = Oracle._answer
    monkeypatch.setattr(Oracle, "_answer", lambda self, *words: f"{KEY} {said(self, *words)}")
    caplog.set_level("DEBUG")
    with serving(Oracle(WordProblems(), Faults(cut_json=0.5, failing=0.2, busy=0.2))) as url:
        server = {"kind": "openai", "url": url, "model": "m", "key_variable": "REFLUX_TEST_KEY"}
        done = tiny_run(
            "rubric",
            **SMALL,
            rewards__rubric__judge=server,
            rewards__rubric__teacher=server,
            rewards__rubric__max_failed_share=1.0,
            out=tmp_path / "run",
        )
    write_report(done.dir)
    paths = [Path(folder) / name for folder, _, names in os.walk(done.dir) for name in names]
    assert len([path for path in paths if "chat" in path.parts]) > 20
    assert [str(path) for path in paths if KEY.encode() in path.read_bytes()] == []
    assert any(b"[key]" in path.read_bytes() for path in paths if "chat" in path.parts)
    assert KEY not in caplog.text
    assert "REFLUX_TEST_KEY" in (done.dir / "config.toml").read_text()
