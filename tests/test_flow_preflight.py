"""Preflight, eval and difficulty know images."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_flow
import tiny_glyphs
from reflux.config.recipe import RunConfig, load_recipe
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.inspection.doctor import examine
from reflux.loop import train
from reflux.tasks.glyphs import Glyphs
from reflux.training import Options
from tiny_glyphs import EVAL_STEPS, NO_EVALS, STEPS, behaviour, glyphs

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny_glyphs.Models:
    return tiny_glyphs.models(tmp_path_factory.mktemp("flows"))


@pytest.fixture
def config(models: tiny_glyphs.Models) -> Config:
    return partial(tiny_glyphs.config, known=models)


# --- preflight


def findings(cfg: RunConfig) -> dict[str, Any]:
    async def made() -> list[Any]:
        return [finding async for finding in examine(cfg, prompts=4)]

    return {
        f"{finding.check} {finding.text.split()[0]}" if finding.check == "teacher" else finding.check: finding
        for finding in asyncio.run(made())
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler__guidance": 2.0},
        {"sampler__noise_level": 0.0, "objectives": [{"kind": "velocity_kl", "weight": "mse"}]},
    ],
)
def test_preflight_measures_a_flow(config: Config, changes: dict[str, Any]) -> None:
    found = findings(config("flow", **changes))
    assert {"grid", "images", "parity", "teacher 'main'", "teacher 'anchor'", "identity"} <= set(found)
    assert {finding.verdict for check, finding in found.items() if check not in ("disk", "recipe")} == {"ok"}
    assert f"{STEPS} steps of" in found["grid"].text
    assert "16 x 16 pixels" in found["images"].text
    assert (
        "0.0e+00" in found["identity"].text
        or float(found["identity"].text.split(" is ")[1].split()[0]) < 1e-5
    )


@pytest.mark.parametrize("recipe", ["flow_sft", "flow_grpo"])
def test_preflight_lets_the_other_flow_recipes_through(config: Config, recipe: str) -> None:
    found = findings(config(recipe))
    assert found["parity"].verdict == found["identity"].verdict == "ok"


@pytest.mark.parametrize(
    "changes", [{}, {"sampler__noise_level": 0.0, "objectives": [{"kind": "velocity_kl", "weight": "mse"}]}]
)
@pytest.mark.parametrize("fault", ["weights", "time", "guidance"])
def test_preflight_sees_a_learner_that_is_not_its_sampler(
    config: Config, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fault: str
) -> None:
    from reflux.learners.flow_engine import FlowLearner
    from reflux.loss.flow_loss import FlowMicroBatch

    real = FlowLearner._velocity

    def wrong(self: Any, batch: FlowMicroBatch) -> Any:
        if fault == "time":
            batch.t_N = batch.t_N * 0.999
        if fault == "guidance":
            batch.guidance = 1.01
        v_ND = real(self, batch)
        return v_ND * 1.001 if fault == "weights" else v_ND

    monkeypatch.setattr(FlowLearner, "_velocity", wrong)
    assert findings(config("flow", **changes))["parity"].verdict == "failed"


def test_the_parity_bound_is_what_a_share_of_the_velocity_moves() -> None:
    """Velocities off by the share in a random direction stay inside the bound, ten times as far do not; over
    all noise levels.
    """
    from reflux.evals.flow_findings import _log_prob_gap, _step_gap
    from reflux.models.flow.sde import step_logp, step_moments

    rng, share = np.random.default_rng(0), 1e-3
    model = tiny_flow.model(1)
    for noise_level in (0.1, 0.7, 3.0, 0.0):
        ratios: dict[float, list[float]] = {1.0: [], 10.0: []}
        for sample in range(8):
            made = tiny_flow.rollout(6, sample=sample, noise_level=noise_level or 0.7, drawn_by=model)
            v_TD = np.where(made.mask_T[:, None], behaviour(made), 1.0).astype(np.float64)
            t_T1, dt_T1 = (
                made.t_S[:-1, None].astype(np.float64),
                np.diff(made.t_S)[:, None].astype(np.float64),
            )
            noise_TD = rng.standard_normal(v_TD.shape)
            x_SD = made.x_SD.astype(np.float64)
            mean_TD, std_T1 = step_moments(x_SD[:-1], v_TD, t_T1, dt_T1, noise_level)
            next_TD = mean_TD + std_T1 * noise_TD
            for factor, found in ratios.items():
                push_TD = rng.standard_normal(v_TD.shape)
                push_TD *= (
                    factor
                    * share
                    * np.linalg.norm(v_TD, axis=1, keepdims=True)
                    / np.linalg.norm(push_TD, axis=1, keepdims=True)
                )
                for i in np.flatnonzero(made.mask_T):
                    # a rollout of one step each: the states here need not be a chain
                    x_2D = np.stack([x_SD[i], next_TD[i]])
                    logp_1 = (
                        np.zeros(1) if not noise_level else step_logp(next_TD[i], mean_TD[i], std_T1[i])[None]
                    )
                    one = replace(
                        made,
                        x_SD=x_2D,
                        t_S=made.t_S[i : i + 2],
                        logp_T=logp_1,
                        mask_T=np.ones(1, bool),
                        noise_level=noise_level,
                    )
                    gap_1, bound_1 = (_log_prob_gap if noise_level else _step_gap)(
                        one, (v_TD + push_TD)[i : i + 1], share
                    )
                    found.append(float(gap_1[0] / bound_1[0]))
        assert max(ratios[1.0]) <= 1 + 1e-6
        assert max(ratios[10.0]) > 1
        # and it is not far too wide; without noise it is no chance
        assert np.mean(ratios[1.0]) > (0.05 if noise_level else 0.9)


def test_preflight_names_a_teacher_that_says_what_the_student_says(config: Config) -> None:
    found = findings(config("flow", learner__merge="none"))
    assert found["teacher 'anchor'"].verdict == "warning"
    assert "gives the same velocities as the student" in found["teacher 'anchor'"].text
    assert found["teacher 'main'"].verdict == "ok"


def test_preflight_counts_what_a_teacher_is_silent_about(config: Config) -> None:
    found = findings(config("flow", teachers__counts="none"))
    assert found["teacher 'main'"].verdict == "warning"
    assert "gave no target for 2 of 4 attempts" in found["teacher 'main'"].text


def test_preflight_works_on_the_text_recipes_whose_attempts_are_not_the_students(
    student: str, teacher: str
) -> None:
    """Stored answers were never drawn: parity is measured where the student acts."""
    import tiny

    found = findings(tiny.config("sft", student, teacher, task={"kind": "outside:Chat"}))
    assert found["parity"].verdict == "ok"
    found = findings(tiny.config("rl", student, teacher, task={"kind": "outside:Chat"}, group_size=2))
    assert found["parity"].verdict == "ok"


# --- eval and difficulty


def test_a_flow_model_is_evaluated_by_its_folder(
    models: tiny_glyphs.Models, capsys: pytest.CaptureFixture[str]
) -> None:
    from reflux.cli.evaluate import evaluate_model

    evaluate_model(
        models["student"], None, 4, 1, None, [f"sampler.eval_steps={EVAL_STEPS}", f"sampler.steps={STEPS}"]
    )
    behaviour = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert behaviour["problems"] == "4"
    assert behaviour["mean_steps"] == f"{EVAL_STEPS:.4f}"
    assert {"accuracy", "quality", "avg@1", "accuracy.digits"} <= set(behaviour)


def test_a_flow_run_is_evaluated_by_its_own_sampler(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reflux.cli.evaluate import evaluate_model

    cfg = config("flow_sft", steps=1, task={"kind": "glyphs", "domains": ["digits"]}, **NO_EVALS)
    asyncio.run(train(cfg, Options(tmp_path / "run")))
    evaluate_model(str(tmp_path / "run"), None, 4, 0, None, [])
    behaviour = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert behaviour["mean_steps"] == f"{EVAL_STEPS:.4f}"
    assert "accuracy.counts" not in behaviour


def test_a_folder_without_a_flow_model_is_a_sentence(tmp_path: Path) -> None:
    from reflux.cli.evaluate import evaluate_model

    with pytest.raises(
        ModelError, match=r"MODEL: the folder .* has no config\.json and no model_index\.json"
    ):
        evaluate_model(str(tmp_path), None, 4, 0, None, [])


def test_eval_refuses_files_that_are_not_there(models: tiny_glyphs.Models, tmp_path: Path) -> None:
    """Also those that the sampler does not read."""
    from reflux.cli.evaluate import evaluate_model

    with pytest.raises(ModelError, match=r"learner\.adapter"):
        evaluate_model(models["student"], None, 4, 0, None, [f"learner.adapter={tmp_path / 'nowhere'}"])


def test_difficulty_counts_pictures_and_writes_a_recipe_of_pictures(
    config: Config, models: tiny_glyphs.Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    from reflux import checks
    from reflux.cli.difficulty import balance_prompts
    from reflux.config.recipe import to_table

    (tmp_path / "mine.toml").write_text(tomli_w.dumps(to_table(config("flow", task__held_out=4))))
    balance_prompts(str(tmp_path / "mine.toml"), [], 3, 6, (1.0, 0.95), 8, tmp_path / "out")
    counts = [json.loads(line) for line in (tmp_path / "out" / "difficulty.jsonl").read_text().splitlines()]
    assert len(counts) == 6
    assert all(row["ungraded"] == 0 and 0 <= row["correct"] <= 3 for row in counts)
    found = load_recipe(tmp_path / "out" / "recipe.toml")
    checks.join(found)
    assert (found.task.makes, found.task.grader) == ("image", "reflux.evals.prompt_difficulty:as_glyph")
    assert found.task.routes == {"digits", "counts"}
    prompt = next(iter(found.task.prompts("test", 0)))
    black = np.zeros((16, 16), dtype=np.uint8)
    assert found.task.verify(prompt, black) == Glyphs().verify(prompt, black)
    assert "judges answers by" not in capsys.readouterr().out


def test_difficulty_is_that_of_the_student_training_begins_with(
    config: Config, tmp_path: Path, models: tiny_glyphs.Models
) -> None:
    """A merged student's images: those of a sampler that was given the mean of its teachers."""
    from reflux.cli.difficulty import _student

    images = {}
    for name, changes in {"merged": {}, "plain": {"learner__merge": "none"}}.items():
        cfg = replace(config("flow", **changes), teachers={}, evals={})

        async def act(cfg: RunConfig = cfg, name: str = name) -> np.ndarray:
            async with _student(cfg, tmp_path / name) as student:
                (attempt,) = await student.sampler.sample(glyphs(1)[0], 1, SamplingParams(0, "score", STEPS))
                return attempt.rollout.x_SD  # type: ignore[attr-defined]

        images[name] = asyncio.run(act())
    # the first noise
    assert np.array_equal(images["merged"][0], images["plain"][0])
    assert abs(images["merged"][-1] - images["plain"][-1]).max() > 0.05
