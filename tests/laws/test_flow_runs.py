"""Runs of flow recipes obey the same laws as runs of texts, and combine with the same parts."""

from __future__ import annotations

import asyncio
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_flow
from conftest import Done
from device import exactly
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError
from reflux.loop import train
from reflux.models.flow.load import load_flow
from reflux.samplers.flow_engine import FlowSampler
from reflux.storage import checkpoints
from reflux.tasks.glyphs import Glyphs
from reflux.training import Options, Run
from tiny import same

TEXTS = (
    "",
    *sorted({prompt.messages[-1]["content"] for prompt in islice(Glyphs().prompts("train", 0), 400)}),
)
SMALL: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 4,
    "sampler.steps": 4,
    "sampler.eval_steps": 4,
    "learner.lr": 1e-2,
    "learner.min_grad_norm": 0.0,
    "save_every": 1000,
    "eval_every": 1000,
    "threads": 1,
    "evals": "none",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = ("base", "digits", "counts")
    folder = tmp_path_factory.mktemp("flows")
    return {
        name: tiny_flow.save(folder / name, seed, side=16, layers=1, texts=TEXTS)
        for seed, name in enumerate(names)
    }


@pytest.fixture
def run(models: dict[str, str], tmp_path: Path) -> Any:
    def start(recipe: str = "flow", name: str = "run", resume: bool = False, **overrides: Any) -> Done:
        named = {"learner.model": models["base"]}
        cfg = load_recipe(recipe)
        if cfg.learner.merge:
            named["learner.merge.models"] = [models["digits"], models["counts"]]
        named |= {f"teachers.{table}.model": models.get(table, models["base"]) for table in cfg.teachers}
        inner = "sampler.generate." if recipe == "flow_sft" else "sampler."
        small = {key.replace("sampler.", inner): value for key, value in SMALL.items()}
        own = {key.replace("__", "."): value for key, value in overrides.items()}
        changes = {**named, **small, **exactly(cfg, own), **own}
        done = asyncio.run(train(load_recipe(recipe, changes), Options(tmp_path / name, resume)))
        return Done(tmp_path / name, done)

    return start


def images(done: Done) -> list[tuple[Any, ...]]:
    return [
        (row["step"], row["prompt"], row["sample"], row["image"])
        for row in done.rows("attempts")
        if row["kind"] == "attempt"
    ]


@pytest.mark.parametrize("recipe", ["flow", "flow_sft", "flow_grpo"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(run: Any, recipe: str) -> None:
    group = {} if recipe != "flow_grpo" else {"group_size": 3}
    whole = run(recipe, "whole", steps=4, **group)
    run(recipe, "halves", steps=2, **group)
    halves = run(recipe, "halves", resume=True, steps=4, **group)
    assert same(whole.weights, halves.weights)
    assert images(whole) == images(halves)
    assert whole.state["version"] == halves.state["version"]


def test_the_student_starts_at_the_merge(run: Any, models: dict[str, str]) -> None:
    done = run(steps=0)
    digits, counts = (load_flow(models[name], name).net.state_dict() for name in ("digits", "counts"))
    begun = load_flow(str(done.dir), "student").net.state_dict()
    assert all(torch.allclose(begun[name], (digits[name] + counts[name]) / 2, atol=1e-6) for name in begun)


def test_evaluations_leave_the_run_as_it_is(run: Any) -> None:
    asked = {"accuracy": {"problems": 4}, "agreement": {"prompts": 4}, "teacher_accuracy": {"problems": 4}}
    silent, watched = run(name="silent"), run(name="watched", evals=asked, eval_every=1)
    assert same(silent.weights, watched.weights)
    assert images(silent) == images(watched)
    assert [row["step"] for row in watched.rows("evals")] == [0, 1, 2, 3]


def test_an_average_is_evaluated_and_leaves_the_run_as_it_is(run: Any) -> None:
    plain = run(name="plain")
    average = {"decay": 0.5, "every": 1}
    asked = {"peek": {"kind": "outside:Peek", "weight": "transformer.proj_out.bias"}}
    averaged = run(name="averaged", learner__average=average, evals=asked, eval_every=1)
    # attempts are sampled with the weights and not with their average
    assert images(plain) == images(averaged)
    assert same(plain.weights, averaged.weights)
    shown, state = load_flow(str(averaged.dir), "student").net.state_dict(), averaged.state
    assert all(
        torch.equal(shown[name.removeprefix("mean/")].cpu(), value)
        for name, value in state.items()
        if name.startswith("mean/")
    )
    seen = averaged.rows("evals")[-1]["peek"]["first"]
    assert (
        seen
        == float(state["mean/transformer.proj_out.bias"][0])
        != float(state["weight/transformer.proj_out.bias"][0])
    )
    assert not same(
        plain.weights,
        {
            name.replace("mean/", "weight/"): value
            for name, value in state.items()
            if name.startswith("mean/")
        },
    )


def test_no_attempt_is_drawn_with_the_average_however_far_sampling_runs_ahead(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent, drawn_meanwhile = [False], []
    sample, evaluate = FlowSampler._sample, Run.evaluate

    def slow(self: Any, requests: Any) -> Any:
        time.sleep(0.05)
        drawn_meanwhile.append(lent[0] and requests[0][2].purpose == "train")
        return sample(self, requests)

    async def lending(self: Any, *parts: Any, **options: Any) -> None:
        lent[0] = True
        await evaluate(self, *parts, **options)
        lent[0] = False

    monkeypatch.setattr(FlowSampler, "_sample", slow)
    monkeypatch.setattr(Run, "evaluate", lending)
    run(
        steps=5,
        max_staleness=2,
        eval_every=1,
        evals={"accuracy": {"problems": 4}},
        learner__average={"decay": 0.5, "every": 1},
    )
    assert len(drawn_meanwhile) > 5
    assert not any(drawn_meanwhile)


def test_frozen_teachers_stay_as_they_are_and_are_not_in_the_student(
    run: Any, models: dict[str, str]
) -> None:
    before = {name: load_flow(folder, name).net.state_dict() for name, folder in models.items()}
    done = run()
    assert all(
        same(before[name], load_flow(folder, name).net.state_dict()) for name, folder in models.items()
    )
    kept = checkpoints.of_step(done.dir / "checkpoints", 3)
    assert not [path for path in (kept / "teachers").rglob("*") if path.is_file()]
    assert set(load_flow(str(done.dir), "student").net.state_dict()) == set(before["base"])


def test_two_routed_copies_of_one_teacher_are_the_single_one(run: Any, models: dict[str, str]) -> None:
    copies = run(name="copies", teachers__counts__model=models["digits"])
    single = run(name="single", teachers__digits__routes=[], teachers__counts="none")
    assert images(copies)[:4] == images(single)[:4]
    first, second = copies.rows("metrics")[0], single.rows("metrics")[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_staleness_is_used_and_recorded(run: Any) -> None:
    done = run(steps=5, max_staleness=2)
    stalenesses = [row["staleness_max"] for row in done.rows("metrics")]
    assert stalenesses[0] == 0
    assert max(stalenesses) == 2
    assert all(math.isfinite(row["loss"]) for row in done.rows("metrics"))


def test_extrapolation_prefixes_and_verdicts_combine(run: Any) -> None:
    """EffOPD's search, a prefix of the steps, Flow-GRPO's reward and the teachers' velocities in one run."""
    done = run(
        steps=4,
        group_size=2,
        rewards={"verifier": {}},
        credit={"group_advantage": {}, "prefix": {"length": 2}},
        objectives=[{"kind": "velocity_kl"}, {"kind": "policy_gradient"}],
        extrapolation={
            "kind": "extrapolate",
            "prompts": 4,
            "include": ["attn", "ff"],
            "score": "minus_kl",
            "tries": 1,
        },
    )
    rows = done.rows("metrics")
    assert [row["step"] for row in done.rows("searches")] == [1, 2, 4]
    assert all(np.isfinite(row["here"]) for row in done.rows("searches"))
    assert all(row["tokens_trained"] == 2 * 8 for row in rows)
    assert all(row["credit"]["prefix"]["kept"] == pytest.approx(2 / 3) for row in rows)
    assert any(row["reward_mean"] is not None for row in rows)


def test_the_first_steps_alone_may_be_drawn(run: Any) -> None:
    """A prefix by generation gives the same gradient as one by credit, at a lower cost."""
    cut = run(name="cut", steps=1, sampler__max_denoising_steps=2)
    masked = run(name="masked", steps=1, credit={"prefix": {"length": 2}})
    (one,), (other,) = cut.rows("metrics"), masked.rows("metrics")
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["tokens_sampled"] == 2 * 4 < other["tokens_sampled"]
    assert one["truncated"] == 1


def test_a_run_writes_what_it_did(run: Any) -> None:
    done = run(evals={"accuracy": {"problems": 4}})
    first, second = (
        next(row for row in done.rows("attempts") if row["kind"] == kind) for kind in ("attempt", "learned")
    )
    assert len(first["logp"]) == len(first["mask"]) == 4
    assert first["mask"][-1] == 0
    assert len(second["kl"]) == 4
    assert second["weight"] == [1, 1, 1, 0]
    metrics = done.rows("metrics")[0]
    assert metrics["asked"] == {"digits": 2, "counts": 2, "anchor": 4}
    assert all(value > 0 for value in metrics["flops"].values())
    from reflux.reports.page import write_report

    assert "data:image/png;base64," in write_report(done.dir).read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers__counts__routes": ["count"]}, "route"),
        ({"sampler__noise_level": 0.0}, "mse"),
        ({"objectives": [{"kind": "sampled_kl"}]}, "velocity_kl"),
        ({"task": {"kind": "word_problems"}}, "asks for texts"),
        ({"learner": {"kind": "hf", "model": "reflux:student"}}, "learner"),
        ({"teachers__digits__guidance": 3.0}, "guidance"),
    ],
)
def test_what_does_not_fit_is_a_sentence_before_anything_is_loaded(
    run: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**changes)
    assert not (tmp_path / "run").exists()
