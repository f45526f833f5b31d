"""KL of a step: over what was generated and over what was learnt from; what of it is on disk."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import tiny
import tiny_flow
import tiny_glyphs
from reflux.cli.progress import Progress
from reflux.kernels.head import Head
from reflux.loop import train
from reflux.metrics.teacher_distance import (
    generated_kl,
    sampled_entropy,
    teacher_logp_T,
    teacher_nats,
    trained_kl,
)
from reflux.metrics.values import Mean
from reflux.models.flow.sde import kl_weight
from reflux.storage.attempt_log import arrived, read_attempt
from reflux.training import Options
from reflux.types import Attempt, Credit, SampledTarget, StepRecord, TeacherAnswer, VelocityTarget
from tiny import rollout

CHAT = {"kind": "outside:Chat"}


def answered(length: int, logp: Any = None, **fields: Any) -> Attempt:
    made = Attempt(rollout(length, seed=length, **fields))
    if logp is not None:
        target = SampledTarget(teacher="main", logp_T=np.asarray(logp, dtype=np.float32))
        made.answers["main"] = TeacherAnswer(target=target, table="main")
    return made


def test_the_generated_kl_is_the_mean_of_the_sampled_log_ratio_over_chosen_positions() -> None:
    """Weights do not matter, and neither does an attempt that the teacher was not asked about."""
    one, other = answered(3, [-1, -2, -3], mask=[1, 0, 1]), answered(2, [-4, -5])
    other.credits["prefix"] = Credit(weight_T=0.0)
    by_hand = [
        one.rollout.logp_T[0] + 1,
        one.rollout.logp_T[2] + 3,
        other.rollout.logp_T[0] + 4,
        other.rollout.logp_T[1] + 5,
    ]
    found = generated_kl([one, other, answered(4)], "main")
    assert found.count == 4
    assert found.value == pytest.approx(np.mean(by_hand), rel=1e-6)
    assert generated_kl([answered(4)], "main") == generated_kl([one], "anchor") == Mean()


def test_it_is_unknown_where_one_position_is_unknown() -> None:
    """A mean of the rest would be one of other positions."""
    known, partly = answered(3, [-1, -2, -3]), answered(3, [-1, -2, -3])
    # hidden states: log-probs come with the step
    object.__setattr__(partly.answers["main"].target, "logp_T", None)
    assert generated_kl([known, partly], "main") == Mean()
    partly.learned = StepRecord(
        logp={"main": np.asarray([-1, np.nan, np.nan], np.float32), "student": np.zeros(3, np.float32)}
    )
    assert generated_kl([known, partly], "main") == Mean()
    assert trained_kl([known, partly], "main") == Mean(1.0, 1)
    partly.learned = StepRecord(
        logp={"main": np.asarray([-1, -2, -3], np.float32), "student": np.zeros(3, np.float32)}
    )
    assert generated_kl([known, partly], "main").count == 6
    assert trained_kl([known, partly], "main") == Mean(6.0, 3)


def test_of_pictures_it_is_exact_from_velocities_that_are_there() -> None:
    """From what the sampler recorded; else what the step computed, where that is whole; else unknown."""
    student, teacher = tiny_flow.model(1), tiny_flow.model(2)
    made = tiny_flow.attempt(5, teacher=teacher, drawn_by=student)
    drawn: Any = made.rollout
    exact = []
    for i in range(4):
        t, dt = float(drawn.t_S[i]), float(drawn.t_S[i + 1] - drawn.t_S[i])
        v_TD, said_TD = (target.v_TD for target in (made.target("main"), drawn.behaviour))  # type: ignore[union-attr]
        exact.append(kl_weight(t, dt, drawn.noise_level) * float(((v_TD[i] - said_TD[i]) ** 2).sum()))
    assert generated_kl([made], "main").value == pytest.approx(np.mean(exact), rel=1e-5)
    # nothing recorded
    plain = tiny_flow.attempt(5, teacher=teacher)
    assert isinstance(plain.target("main"), VelocityTarget)
    assert generated_kl([plain], "main") == Mean()
    plain.learned = StepRecord(kl_T=np.asarray([1, 2, 3, 6, np.nan], np.float32))
    assert generated_kl([plain], "main") == Mean(12.0, 4)
    plain.learned = StepRecord(kl_T=np.asarray([1, 2, np.nan, np.nan, np.nan], np.float32))
    assert generated_kl([plain], "main") == Mean()


def test_the_entropy_is_the_mean_surprise_of_the_chosen_tokens_at_temperature_1() -> None:
    one, other = answered(3, mask=[1, 0, 1]), answered(2)
    raw_T = np.asarray([-0.5, -1.5], dtype=np.float32)
    object.__setattr__(other.rollout, "logp_raw_T", raw_T)
    by_hand = [-one.rollout.logp_T[0], -one.rollout.logp_T[2], 0.5, 1.5]
    assert sampled_entropy([one, other]).count == 4
    assert sampled_entropy([one, other]).value == pytest.approx(np.mean(by_hand), rel=1e-6)
    picture = tiny_flow.attempt(5, teacher=tiny_flow.model(2))
    assert sampled_entropy([picture]) == sampled_entropy([]) == Mean()


def test_the_entropy_of_sampled_tokens_is_that_of_their_distribution() -> None:
    """E[-log p(a)] = H(p)."""
    p, rng = np.asarray([0.5, 0.3, 0.15, 0.05]), np.random.default_rng(0)
    made = answered(20_000)
    object.__setattr__(made.rollout, "logp_T", np.log(rng.choice(p, 20_000, p=p)).astype(np.float32))
    assert sampled_entropy([made]).value == pytest.approx(-(p * np.log(p)).sum(), abs=0.02)


def test_the_nats_of_a_teacher_have_mean_and_deviation_over_the_known_chosen_positions() -> None:
    one, other = answered(3, [-1, -2, -3], mask=[1, 0, 1]), answered(2, [-4, -5])
    found = teacher_nats([one, other, answered(4)], "main")
    assert found == pytest.approx({"mean": 13 / 4, "std": np.std([1, 3, 4, 5])})
    # a step that left positions out
    object.__setattr__(other.answers["main"].target, "logp_T", None)
    other.learned = StepRecord(logp={"main": np.asarray([-7, np.nan], np.float32)})
    assert teacher_nats([other], "main") == {"mean": 7.0, "std": 0.0}
    assert teacher_nats([answered(4)], "main") is None
    assert teacher_nats([one], "anchor") is None
    assert teacher_nats([tiny_flow.attempt(5, teacher=tiny_flow.model(2))], "main") is None


def test_entropy_and_nats_are_in_the_rows_of_a_run(tiny_run: Callable[..., Any]) -> None:
    (row,) = tiny_run("vopd", steps=1).rows("metrics")
    # the sampled reverse KL is what the teacher's surprise is above the student's
    above = row["teacher_nats_by_table"]["main"]["mean"] - row["entropy_nats"]
    assert above == pytest.approx(row["kl_nats"], abs=1e-4)
    (given,) = tiny_run("sft", steps=1).rows("metrics")
    assert "entropy_nats" not in given
    assert given["teacher_nats_by_table"] == {}


def test_a_prefix_moves_the_kl_where_learnt_from_and_not_the_generated_one(
    tiny_run: Callable[..., Any],
) -> None:
    """The same attempts: the curve of one run is the curve of the other, where the teacher's log-probs are
    there (a margin needs them).
    """
    margin = {"kind": "margin", "delta": 0.0}
    settings: dict[str, Any] = {
        "steps": 1,
        "task": CHAT,
        "group_size": 2,
        "rewards": {"verifier": {}},
        "prompts_per_step": 6,
    }
    whole = tiny_run("opd", **settings, credit={"margin": margin}).rows("metrics")[0]
    cut = tiny_run("opd", **settings, credit={"margin": margin, "prefix": {"length": 2}}).rows("metrics")[0]
    assert cut["kl_nats"] == whole["kl_nats"]
    assert abs(cut["kl_nats_trained"] - whole["kl_nats_trained"]) > 0.05


def test_it_is_omitted_where_it_would_cost_a_row(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a prefix, a local teacher's states do not go through its head, not even for a metric."""
    heads: list[int] = []
    for name in ("logp_of", "logp_at", "logits"):
        through = getattr(Head, name)
        monkeypatch.setattr(
            Head,
            name,
            lambda self, h, *rest, through=through: (heads.append(len(h)), through(self, h, *rest))[1],
        )
    settings: dict[str, Any] = {"steps": 1, "task": CHAT, "credit": {"prefix": {"length": 2}}}
    cut = tiny_run("opd", **settings).rows("metrics")[0]
    computed = sum(heads)
    assert "kl_nats" not in cut
    assert cut["kl_nats_trained"] > 0
    monkeypatch.setattr("reflux.metrics.step_metrics.generated_kl", lambda *_: Mean())
    heads.clear()
    tiny_run("opd", **settings)
    assert sum(heads) == computed
    # nobody drew those tokens
    assert "kl_nats" not in tiny_run("sft", steps=1).rows("metrics")[0]


def test_without_a_prefix_both_are_of_the_same_positions(tiny_run: Callable[..., Any]) -> None:
    """The sampled one is its exact neighbour, up to the noise of a few hundred tokens; it is the log-ratio on
    disk.
    """
    done = tiny_run("full", steps=1, task=CHAT, prompts_per_step=60)
    (row,) = done.rows("metrics")
    assert row["kl_nats"] == pytest.approx(row["kl_nats_trained"], abs=0.25)
    assert row["kl_nats"] != row["kl_nats_trained"]
    lines = done.rows("attempts")
    acted = {line["prompt"]: line["logp"] for line in lines if line["kind"] == "attempt"}
    learned = {line["prompt"]: line["teacher_logp"]["main"] for line in lines if line["kind"] == "learned"}
    ratios = [p - q for prompt, logp in acted.items() for p, q in zip(logp, learned[prompt], strict=True)]
    assert row["kl_nats"] == pytest.approx(np.mean(ratios), abs=1e-4)
    kls = [kl for line in lines if line["kind"] == "learned" for kl in line["kl"]]
    assert row["kl_nats_trained"] == pytest.approx(np.mean(kls), abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"credit": {"prefix": {"length": 2}}}])
def test_pictures_have_it_whole_or_not_at_all(tmp_path: Path, settings: dict[str, Any]) -> None:
    known = tiny_glyphs.models(tmp_path / "models")
    asyncio.run(
        train(tiny_glyphs.config("flow", known, evals="none", steps=1, **settings), Options(tmp_path / "run"))
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert ("kl_nats" in row) == (not settings)
    assert row.get("kl_nats", row["kl_nats_trained"]) == pytest.approx(row["kl_nats_trained"], rel=1e-5)


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"kl_nats": 2.0, "kl_nats_trained": 1.0}, "KL 2.0000 nats"),
        ({"kl_nats_trained": 1.0}, "KL of trained positions 1.0000 nats"),
        ({}, ""),
    ],
)
def test_the_line_of_a_running_run_says_of_which_positions_its_kl_is(
    metrics: dict[str, float], shown: str
) -> None:
    printed = io.StringIO()
    progress = Progress(
        Console(file=printed, width=200), tiny.config("opd", "reflux:student", "reflux:teacher")
    )
    # elsewhere than on a terminal a line comes now and then
    progress._printed = -math.inf
    progress.stepped(
        {"step": 1, "seconds": {"total": 2.0}, "tokens_sampled": 0, "tokens_trained": 8, **metrics}
    )  # type: ignore
    assert printed.getvalue().split("  ")[1] == (shown or "4 tokens/s")


# --- on disk


def test_attempts_that_balancing_left_out_have_their_teachers_log_probs_on_disk(
    tiny_run: Callable[..., Any],
) -> None:
    """So the margin of every mixed group can be computed again from the file."""
    settings: dict[str, Any] = {
        "steps": 2,
        "task": CHAT,
        "group_size": 4,
        "rewards": {"verifier": {}},
        "loss_aggregation": "seq-mean-token-mean",
    }
    done = tiny_run("opd", **settings, credit={"margin": {}, "balance": {}})
    lines = done.rows("attempts")
    acted = {
        (line["step"], line["prompt"], line["sample"]): line for line in lines if line["kind"] == "attempt"
    }
    left_out = [line for line in lines if line["kind"] == "learned" and not any(line["weight"])]
    assert left_out
    groups: dict[Any, list[Any]] = {}
    for line in (line for line in lines if line["kind"] == "learned"):
        key = (line["step"], line["prompt"], line["sample"])
        ratio = np.asarray(line["teacher_logp"]["main"]) - np.asarray(acted[key]["logp"])
        assert np.isfinite(ratio).all()
        groups.setdefault(key[:2], []).append((acted[key]["reward"], ratio.mean(), line["notes"]))
    mixed = [group for group in groups.values() if len({reward for reward, _, _ in group}) == 2]
    assert mixed
    for group in mixed:
        right, wrong = ([mean for reward, mean, _ in group if reward == value] for value in (1.0, 0.0))
        noted = next(notes["margin.margin"] for _, _, notes in group if "margin.margin" in notes)
        assert noted in (
            pytest.approx(min(right) - max(wrong), abs=1e-3),
            pytest.approx(np.mean(right) - np.mean(wrong), abs=1e-3),
        )


def test_the_answer_fills_what_the_step_left_open() -> None:
    made = answered(4, [-1, -2, -3, -4], mask=[1, 1, 0, 1])
    np.testing.assert_array_equal(teacher_logp_T(made, "main"), [-1, -2, np.nan, -4])
    made.learned = StepRecord(logp={"main": np.asarray([-1.5, np.nan, np.nan, np.nan], np.float32)})
    np.testing.assert_array_equal(teacher_logp_T(made, "main"), [-1.5, -2, np.nan, -4])
    assert teacher_logp_T(answered(4), "main") is None


def test_log_probs_at_temperature_1_are_kept_where_they_differ() -> None:
    """What margins are made of."""
    plain, warm = (
        Attempt(rollout(3)),
        Attempt(replace(rollout(3), logp_raw_T=np.asarray([-1, -2, -3], np.float32))),
    )
    assert "logp_raw" not in arrived(plain)
    line = arrived(warm)
    line = json.loads(
        json.dumps(
            {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in line.items()}
        )
    )
    assert read_attempt(line).rollout.policy_logp_T.tolist() == [-1, -2, -3]
