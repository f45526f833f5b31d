"""The flow recipes at tiny scale: they run, learn, plan, and cite."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_flow
import tiny_glyphs
from conftest import Done
from reflux.config.recipe import RunConfig, load_recipe
from reflux.config.requirements import Requirements
from reflux.inspection.plan import plan
from reflux.loop import lasting, open_parts, train
from reflux.training import Options, Run
from tiny_glyphs import NO_EVALS, RECIPES, STEPS, TIMES

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny_glyphs.Models:
    return tiny_glyphs.models(tmp_path_factory.mktemp("flows"))


@pytest.fixture
def config(models: tiny_glyphs.Models) -> Config:
    return partial(tiny_glyphs.config, known=models)


@pytest.fixture
def flow_run(config: Config, tmp_path: Path) -> Callable[..., Done]:
    numbers = count()

    def run(recipe: str, **overrides: Any) -> Done:
        folder = tmp_path / f"run{next(numbers)}"
        return Done(folder, asyncio.run(train(config(recipe, **overrides), Options(folder))))

    return run


# --- they run


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flow_recipe_runs_with_its_evaluations(
    flow_run: Callable[..., Done], recipe: str, max_staleness: int
) -> None:
    ratio = {"objectives__0__ratio": "clip"} if recipe == "flow_grpo" and max_staleness else {}
    done = flow_run(recipe, steps=3, max_staleness=max_staleness, **ratio)
    rows, (before, after) = done.rows("metrics"), done.rows("evals")
    assert [row["step"] for row in rows] == [1, 2, 3]
    moved = [row for row in rows if row["updates"]]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in moved)
    # where all verdicts of a step agree there is nothing to learn
    assert len(moved) == 3 or recipe == "flow_grpo"
    assert max(row["staleness_max"] for row in rows) <= max_staleness
    assert set(before) == {"step", *load_recipe(recipe).evals}
    assert {"accuracy.digits", "accuracy.counts", "quality"} <= set(after["accuracy"])
    assert recipe == "flow_grpo" or before["agreement"]["kl_nats"] > 0
    assert (done.dir / "student" / "model_index.json").exists()


def test_the_student_begins_at_the_mean_of_its_teachers(
    config: Config, tmp_path: Path, models: tiny_glyphs.Models
) -> None:
    from reflux.models.flow.load import load_net

    cfg = config("flow")

    async def begin() -> dict[str, Any]:
        run = Run.open(cfg, Requirements(), Options(tmp_path / "run"))
        async with lasting(run), open_parts(cfg, run.context, run.services) as (learner, *_):
            return {name: value.clone() for name, value in learner.weights.items()}

    digits, counts = (load_net(models[name], "m").state_dict() for name in ("digits", "counts"))
    for name, value in asyncio.run(begin()).items():
        torch.testing.assert_close(value, (digits[name] + counts[name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", ["flow", "flow_sft"])
def test_a_flow_recipe_learns(flow_run: Callable[..., Done], recipe: str) -> None:
    """From another model the student comes nearer to its teachers, or to what they drew."""
    done = flow_run(recipe, steps=12, prompts_per_step=8, learner__lr=1e-2, **NO_EVALS)
    losses = [row["loss"] for row in done.rows("metrics")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


# --- plan


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flow_recipe_plans(config: Config, models: tiny_glyphs.Models, recipe: str) -> None:
    from reflux.models.flow.load import load_flow

    cfg, model = config(recipe), load_flow(models["student"], "m", device="cpu")
    found = plan(cfg)
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    assert found.student.parameters == parameters
    assert found.student.macs == model.macs()
    assert found.student.patches == 64
    assert (found.position, found.positions_at_most) == (
        "denoising step",
        2 * found.attempts_per_step * (TIMES if recipe == "flow_sft" else STEPS),
    )
    positions, teachers = found.positions_at_most, {"flow": 2, "flow_sft": 1, "flow_grpo": 0}[recipe]
    assert found.flops_at_most == pytest.approx((2 + 6 + 2 * teachers) * model.macs() * positions)
    # teachers' models; digits, counts and the anchor's
    held = {"flow": 3, "flow_sft": 2, "flow_grpo": 0}[recipe]
    # the table of places too
    stored = sum(value.nbytes for value in model.net.state_dict().values())
    assert found.memory_bytes == parameters * 16 + stored * (1 + held)


def test_guidance_doubles_the_work(config: Config) -> None:
    assert plan(config("flow", sampler__guidance=2.0)).flops_at_most == 2 * (
        plan(config("flow")).flops_at_most or 0
    )


def test_drawing_may_cost_more_than_learning(config: Config) -> None:
    """30 steps of an image of which 5 positions are learnt: six times the steps."""
    assert plan(config("flow_sft", sampler__generate__eval_steps=30)).flops_at_most == 6 * (
        plan(config("flow_sft")).flops_at_most or 0
    )


def test_adapters_on_one_model_share_it(config: Config, models: tiny_glyphs.Models) -> None:
    """Three tables on one model hold it once; under lora the student's weights are frozen."""
    changes = {f"teachers__{name}__model": models["student"] for name in ("digits", "counts", "anchor")}
    changes |= {"teachers__digits__adapter": "me/a", "teachers__counts__adapter": "me/b"}
    student = plan(config("flow")).student
    parameters, stored = student.parameters or 0, student.stored_bytes or 0
    assert plan(config("flow", **changes)).memory_bytes == parameters * 16 + 2 * stored
    assert (
        plan(config("flow", learner__lora={"rank": 2}, **changes)).memory_bytes == parameters * 4 + 2 * stored
    )


def test_a_plan_of_flows_speaks_of_steps_and_patches(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import tomli_w

    from reflux.cli.show import show_plan
    from reflux.config.recipe import to_table

    (tmp_path / "mine.toml").write_text(tomli_w.dumps(to_table(config("flow_sft"))))
    show_plan(str(tmp_path / "mine.toml"), [])
    behaviour = " ".join(capsys.readouterr().out.split())
    for words in (
        "denoising steps",
        "64 patches an image",
        "the student's velocities at sampling",
        "without activations",
    ):
        assert words in behaviour
    assert not any(word in behaviour for word in ("token", "context", "key-value", "prompts not counted"))


def test_a_model_of_the_hub_with_encoders_and_decoder_is_sized_from_its_files(tmp_path: Path) -> None:
    """Stable Diffusion's layout: two copies of a part in other precisions count once, encoders and decoder
    beside what is trained.
    """
    from safetensors.torch import save_file

    from reflux.models.sizes import size_of

    folder = tmp_path / "sd"
    tiny_flow.model(1, side=8).save(folder, torch.float16)
    for name in ("prompts.json", "prompts.safetensors"):
        (folder / "prompts" / name).unlink()
    (folder / "prompts").rmdir()
    for part, names in {
        "text_encoder": ["model", "model.fp16"],
        "text_encoder_3": ["model"],
        "vae": ["diffusion_pytorch_model"],
    }.items():
        (folder / part).mkdir()
        for name in names:
            save_file({"w": torch.zeros(10, dtype=torch.float16)}, folder / part / f"{name}.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1, 2, 3, 4]}))
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("_encoders", None)
    (folder / "model_index.json").write_text(json.dumps(index))
    own = sum(parameter.numel() for parameter in tiny_flow.model(1, side=8).net.transformer.parameters())
    found = size_of(str(folder), "m")
    held = own + tiny_flow.model(1, side=8).net.transformer.pos_embed.pos_embed.numel()
    assert (found.parameters, found.stored_bytes, found.beside_bytes, found.patches) == (
        own,
        2 * held,
        60,
        16,
    )
    assert found.macs == own * (16 + 77 + 256)
    # 128 / 8 latent values, 2 a patch
    wide = size_of(str(folder), "m", pixels=128)
    assert (wide.patches, wide.macs) == (64, own * (64 + 77 + 256))
    # an export names where its encoders are
    student = tmp_path / "student"
    tiny_flow.model(1, side=8).save(student)
    (student / "model_index.json").write_text(json.dumps({**index, "_encoders": str(folder)}))
    for name in ("prompts.json", "prompts.safetensors"):
        (student / "prompts" / name).unlink()
    (student / "prompts").rmdir()
    assert size_of(str(student), "m", pixels=128).patches == 64
    assert size_of(str(student), "m").beside_bytes == 60
    (folder / "vae" / "config.json").unlink()
    assert size_of(str(folder), "m", pixels=128).macs is None


def test_planning_the_flow_recipes_imports_nothing_heavy(models: tiny_glyphs.Models) -> None:
    code = (
        "import sys\n"
        "from reflux.config.recipe import load_recipe\n"
        "from reflux.inspection.plan import plan\n"
        f"for name in {RECIPES!r}:\n"
        f"    changes = {{'learner.model': {models['student']!r}}}\n"
        f"    changes |= {{f'teachers.{{table}}.model': {models['digits']!r} "
        "for table in load_recipe(name).teachers}\n"
        "    plan(load_recipe(name, changes))\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'peft', 'scipy', 'PIL'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


# --- words


def test_the_papers_of_a_flow_are_cited() -> None:
    from reflux.config.citations import papers

    def keys(recipe: str, **changes: Any) -> set[str]:
        return {paper.key for paper in papers(load_recipe(recipe, changes))}

    assert {"flow_opd", "flow_grpo", "rectified_flow"} <= keys("flow")
    assert not {"guidance", "flow_matching", "grpo", "lora", "gsm8k"} & keys("flow")
    assert {"flow_matching", "rectified_flow"} <= keys("flow_sft")
    assert not {"flow_opd", "flow_grpo"} & keys("flow_sft")
    assert {"flow_grpo", "grpo", "rectified_flow"} <= keys("flow_grpo")
    assert "flow_opd" not in keys("flow_grpo")
    assert {"guidance", "lora"} <= keys("flow", base="sd3")
    assert "guidance" in keys("flow_sft", **{"sampler.generate.guidance": 2.0})
    assert not {"flow_opd", "flow_grpo", "flow_matching", "rectified_flow", "guidance"} & keys("opd")


def test_an_accelerator_moves_the_attention_and_the_feed_forward_of_diffusers() -> None:
    from reflux.learners.access import INCLUDE, moved

    names = [name for name, _ in tiny_flow.model(1).net.named_parameters()]
    found = moved(names, INCLUDE)
    assert {name.split("transformer_blocks.")[1].split(".")[1] for name in found} == {
        "attn",
        "ff",
        "ff_context",
    }
    assert not [
        name for name in set(names) - set(found) if ".ff" in name or (".attn." in name and "norm" not in name)
    ]
