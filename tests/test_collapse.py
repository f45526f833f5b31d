"""The parts of studies/release.toml: the teacher is flat from the drawn position on, and points go to other
attempts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.step_context import StepContext
from reflux.credit.release import Release
from reflux.models.text import as_model
from reflux.types import Credit

# scripts import their neighbours
sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import collapse

NOW = StepContext(3, 7)


def test_the_teacher_is_flat_from_the_drawn_position_on_and_as_it_was_before() -> None:
    teacher = as_model(tiny.net(2), character_tokenizer())
    for seed in range(8):
        made = tiny.attempt(tiny.rollout(20, seed=seed), teacher)
        before = made.target("main")
        start = collapse.collapse(NOW, f"p{seed}", 0, 20)
        after = collapse.flatten(made.rollout, made.answers["main"], 0.25, NOW, tiny.HEADS).target
        logits = [tiny.HEADS[target.head].logits(target.h_TH).detach().cpu() for target in (before, after)]  # type: ignore[union-attr]
        np.testing.assert_array_equal(logits[1][:start], logits[0][:start])
        np.testing.assert_allclose(logits[1][start:], logits[0][start:] * 0.25, rtol=1e-4, atol=1e-6)


def test_positions_are_spread_and_some_attempts_stay_whole() -> None:
    drawn = [collapse.collapse(NOW, f"p{i}", 0, 100) for i in range(600)]
    assert min(drawn) >= 20
    assert np.mean([position == 100 for position in drawn]) == pytest.approx(0.2, abs=0.06)
    assert len(set(drawn)) > 60
    assert drawn[0] == collapse.collapse(NOW, "p0", 0, 100)


def test_a_cut_keeps_the_mass() -> None:
    mask_T = np.array([False, True, True, False, True, True])
    assert collapse.cut(mask_T, 3).tolist() == [0, 2, 2, 0, 0, 0]
    assert collapse.cut(mask_T, 0).tolist() == [0, 4, 0, 0, 0, 0]
    assert collapse.cut(mask_T, 6).tolist() == mask_T.tolist()


def test_shuffling_moves_the_points_and_keeps_how_many_there_are() -> None:
    kept = list(range(2, 12))
    groups = [[tiny.attempt(tiny.rollout(20, seed=i))] for i in kept]
    for (made,), count in zip(groups, kept, strict=True):
        made.credits = {"release": Credit(weight_T=collapse.cut(made.rollout.mask_T, count))}
    collapse.shuffle(groups, "release", NOW)
    found = [int((np.asarray(made.credits["release"].weight_T) > 0).sum()) for (made,) in groups]
    assert sorted(found) == kept
    assert found != kept
    assert all(np.asarray(made.credits["release"].weight_T).sum() == pytest.approx(20) for (made,) in groups)


def test_found_and_true_points_are_read_from_a_run(tiny_run: Callable[..., Any], teacher: str) -> None:
    settings: dict[str, Any] = {
        "task": {"kind": "outside:Chat"},
        "sampler__max_tokens": 40,
        "teachers": {"main": {"kind": "collapse:Collapsing", "model": teacher, "left": 0.0}},
        "credit": {"release": {"segments": 1, "min_segments": 6, "min_side": 1}},
        "prompts_per_step": 12,
        "loss_aggregation": "token-mean",
        "steps": 1,
    }
    done = tiny_run("opd", **settings)
    points = list(collapse.points(done.dir))
    assert len(points) == 12
    learned = {row["prompt"]: row for row in done.rows("attempts") if row["kind"] == "learned"}
    for point, row in zip(points, learned.values(), strict=True):
        behaviour = row["detail"]["release"]
        flat = [
            margin
            for start, margin in zip(behaviour["starts"], behaviour["margins"], strict=True)
            if start >= point.true
        ]
        # uniform: no margin at all, so the position is the true one
        assert all(margin < 1e-3 for margin in flat)
        assert (point.found is None) == (behaviour["kept"] == len(behaviour["starts"]))
    assert f"| {len(points)} |" in collapse.row("x", points)
    assert any(point.found is not None and abs(point.found - point.true) <= 1 for point in points)


def test_the_arms_differ_in_what_they_say() -> None:
    from arms import load_study

    study = load_study(Path(collapse.__file__).with_name("release.toml"))
    assert study.config("release").credit == {"release": Release(segments=2)}
    assert study.config("full").credit == {}
    assert set(study.config("shuffled").credit) == {"release"}
    learners = [
        json.dumps(vars(study.config(arm).learner), default=str, sort_keys=True)
        for arm in ("release", "shuffled")
    ]
    assert learners[0] == learners[1].replace('"rule": "release", ', "")


def test_the_oracle_releases_where_the_teacher_goes_flat() -> None:
    group = [tiny.attempt(tiny.rollout(30, seed=1, sample=i)) for i in range(6)] + [
        tiny.attempt(tiny.rollout(0, seed=1, sample=6))
    ]
    for made, share in zip(group, collapse.Oracle()(group, NOW), strict=True):
        start = collapse.collapse(NOW, "p1", made.rollout.sample, made.rollout.length)
        weight_T = np.broadcast_to(share.weight_T, made.rollout.length)
        assert np.flatnonzero(weight_T).tolist() == list(range(start))
        assert weight_T.sum() == pytest.approx(made.rollout.length)
