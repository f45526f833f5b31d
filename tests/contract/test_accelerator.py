"""The seam for jumps, with a part from outside: asked when, told what, saved and restored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import outside
import tiny
from laws.test_resume import stop_after, told
from tiny import same

PLAIN: dict[str, Any] = {"steps": 4, "task": {"kind": "outside:Chat"}}


@pytest.fixture(autouse=True)
def empty() -> None:
    outside.HEARD.clear()


def jump(**fields: Any) -> dict[str, Any]:
    return {"accelerator": {"kind": "outside:Jump", **fields}}


def test_it_is_told_of_the_start_and_asked_after_every_step(tiny_run: Callable[..., Any], student: str) -> None:
    done = tiny_run("opd", **PLAIN, **jump(at=2))
    assert [entry[0] for entry in outside.HEARD] == ["start", "jump"]
    weights = AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert outside.HEARD[0][1] == pytest.approx(sum(float(value.double().sum()) for value in weights.values()), rel=1e-6)
    _, step, before, after = outside.HEARD[1]
    assert (step, 0 <= before <= 1, 0 <= after <= 1) == (2, True, True)
    from reflux import checkpoints

    state = checkpoints.load(done.dir / "checkpoints", 4)["accelerator"]
    assert (state["calls"], state["trace"].tolist()) == (4, [4.0])


def test_a_jump_moves_the_student_and_everyone_learns_of_it(tiny_run: Callable[..., Any]) -> None:
    """Attempts of the next step are the jumped student's: sampled anew, they have its log-probs."""
    done = tiny_run("opd", **PLAIN, **jump(at=2, by=0.2))
    assert not same(done.weights, tiny_run("opd", **PLAIN).weights)
    pairs: dict[Any, dict[str, Any]] = {}
    for row in done.rows("attempts"):
        pairs.setdefault((row["step"], row["prompt"]), {}).update(row)
    gaps = [abs(now - then) for row in pairs.values() for now, then in zip(row["student_logp"], row["logp"], strict=True)]
    assert max(gaps) < 1e-3
    assert [row["lag_max"] for row in done.rows("metrics")] == [0, 0, 0, 0]


def test_a_jump_is_no_optimiser_step(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", **PLAIN, **jump(at=2))
    assert done.state["version"] == 4
    assert len(done.rows("metrics")) == 4


@pytest.mark.parametrize("step", [1, 2, 3])
def test_its_state_is_restored_and_the_run_goes_on_bit_for_bit(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path, step: int
) -> None:
    settings = {**PLAIN, **jump(at=3, by=0.1)}
    whole = tiny_run("opd", **settings)
    start = outside.HEARD[0][1]
    stop_after(step, tmp_path / "stopped", tiny.config("opd", student, teacher, **settings))
    outside.HEARD.clear()
    resumed = tiny_run("opd", **settings, out=tmp_path / "stopped", resume=True)
    assert outside.HEARD[0] == ("load", step, start, [float(step)])
    assert ("start",) not in [entry[:1] for entry in outside.HEARD]
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)


def test_scores_use_the_weights_of_the_moment(student: str, teacher: str, tmp_path: Path) -> None:
    """The score's prompts are fixed; two candidates meet the same dice, so equal weights have equal scores."""
    from reflux.loop import train
    from reflux.rundir import Options

    cfg = tiny.config(
        "opd", student, teacher, **PLAIN, accelerator={"kind": "outside:Jump", "at": 2, "by": 0.0, "prompts": 5, "samples": 3}
    )
    asyncio.run(train(cfg, Options(tmp_path / "run")))
    assert outside.HEARD[1][2] == outside.HEARD[1][3]
