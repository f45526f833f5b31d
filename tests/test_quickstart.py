"""The quickstart's promise, and its two controls: the teacher is what the student learns from, and nothing
else is.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reflux.config.recipe import load_recipe
from reflux.loop import train
from reflux.models.locations import ASSETS
from reflux.models.sizes import size_of
from reflux.training import Options

SHORT = {
    "steps": 24,
    "prompts_per_step": 48,
    "threads": 1,
    "evals.agreement": "none",
    "evals.teacher_accuracy": "none",
    "evals.accuracy": "none",
    "evals.test_accuracy.problems": 100,
}


def run(out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(train(load_recipe("quickstart", {**SHORT, **changes}), Options(out)))


def kl_by_step(out: Path) -> list[float]:
    return [json.loads(line)["kl_nats_trained"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_student_is_the_smaller_one() -> None:
    student, teacher = (size_of(f"reflux:{name}", name).parameters for name in ("student", "teacher"))
    assert student is not None
    assert teacher is not None
    assert student <= 0.8 * teacher


@pytest.mark.slow
# trains the shipped models: a minute on a free core, many where the machine is busy
@pytest.mark.timeout(1500)
def test_the_quickstart_keeps_its_promise(tmp_path: Path) -> None:
    summary = asyncio.run(
        train(
            load_recipe("quickstart", {"evals.agreement": "none", "evals.accuracy": "none"}),
            Options(tmp_path / "run"),
        )
    )
    before, after, teacher = (
        summary[name] for name in ("accuracy_before", "accuracy_after", "teacher_accuracy")
    )
    assert {(score["problems"], score["split"]) for score in (before, after, teacher)} == {(500, "test")}
    assert before["accuracy"] < 0.35
    assert after["accuracy"] >= 0.75
    assert teacher["accuracy"] >= 0.96
    kl = kl_by_step(tmp_path / "run")
    assert sum(kl[-10:]) < 0.5 * sum(kl[:10])


@pytest.mark.slow
def test_control_its_own_twin_teaches_nothing(tmp_path: Path) -> None:
    """Rounding differs between reading and acting; Adam must not scale that up to a step."""
    run(tmp_path / "run", {"teachers.main.model": "reflux:student", "steps": 3, "evals": "none"})
    before, after = (
        load_file(ASSETS / "student" / "model.safetensors"),
        load_file(tmp_path / "run" / "student" / "model.safetensors"),
    )
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert max(map(abs, kl_by_step(tmp_path / "run"))) < 1e-6


@pytest.mark.slow
# trains the shipped models: a minute on a free core, many where the machine is busy
@pytest.mark.timeout(1500)
def test_control_an_untrained_teacher_makes_it_worse(tmp_path: Path) -> None:
    from reflux.assets.characters import character_tokenizer
    from reflux.assets.specs import SPECS
    from reflux.assets.text_models import blank

    tokenizer = character_tokenizer()
    blank(SPECS["teacher"], tokenizer).save_pretrained(tmp_path / "untrained")
    tokenizer.save_pretrained(tmp_path / "untrained")
    # The preflight refuses a teacher whose distribution is uniform.
    changes = {"teachers.main.model": str(tmp_path / "untrained"), "steps": 16, "skip_checks": ["teacher"]}
    summary = run(tmp_path / "run", changes)
    assert summary["accuracy_after"]["high"] < summary["accuracy_before"]["low"]
