"""Every shipped recipe parses, fits, plans, runs at tiny scale, and says in its first line what it is. No
torch before a run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from reflux import checks
from reflux.config.bases import RECIPES, bases, recipe_names
from reflux.config.recipe import load_recipe, to_table
from reflux.config.requirements import Requirements
from reflux.errors import ConfigError
from reflux.inspection.plan import plan, wanted
from reflux.types import FlowRollout, TokenRollout

WANTED = {
    "quickstart",
    "opd",
    "full",
    "topk",
    "gkd",
    "vopd",
    "prefix",
    "sft",
    "rl",
    "flow",
    "flow_sft",
    "flow_grpo",
}
# images: test_flow_recipes.py
TEXTS = [name for name in recipe_names() if load_recipe(name).learner.rollouts is TokenRollout]
SCALES = {"toy": TokenRollout, "hub": TokenRollout, "glyphs": FlowRollout, "sd3": FlowRollout}


def test_the_recipes_that_must_be_there_are() -> None:
    assert set(recipe_names()) >= WANTED


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_says_what_it_is_and_sets_only_its_own(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.toml").read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()[0]) > 20
    assert any(f'base = "{base}"' in text for base in bases())
    # scale lives in the base, but for embedded models of a kind
    assert "model =" not in text.replace('model = "reflux:', "")


@pytest.mark.parametrize("recipe", TEXTS)
def test_a_recipe_plans(student: str, teacher: str, recipe: str) -> None:
    found = plan(tiny.config(recipe, student, teacher))
    assert found.student.parameters == tiny.net(1).num_parameters()
    assert found.positions_at_most == 3 * found.attempts_per_step * 12 or recipe == "prefix"
    assert found.position == "token"
    assert found.flops_at_most
    assert found.method


def test_a_plan_says_in_words_what_is_computed_beyond_the_loss(student: str, teacher: str) -> None:
    assert plan(tiny.config("opd", student, teacher)).requirements == []
    grouped = tiny.config("opd", student, teacher, objectives__0__baseline="leave_one_out", group_size=2)
    assert plan(grouped).requirements == [
        "the teacher's log-probs when attempts arrive (one more pass through its head)"
    ]
    everything = wanted(
        Requirements(
            behaviour=1,
            now_at_behaviour=True,
            now_topk=7,
            logp=True,
            candidates=9,
            now_candidates=8,
            supervision_drift=True,
            spans=True,
            specials=True,
            reward=True,
        )
    )
    assert len(everything) == len(dataclasses.fields(Requirements))
    assert [number for number in "1789" if any(f"top-{number} tokens" in line for line in everything)] == [
        "1",
        "7",
        "8",
        "9",
    ]
    assert not any("{" in line or "True" in line for line in everything)


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("base", SCALES)
def test_a_recipe_fits_at_every_scale_of_its_kind(recipe: str, base: str, tmp_path: Path) -> None:
    """Text recipes with text models, flow recipes with flow models; of the others it is said that they do not
    fit.
    """
    changes = {"base": base} | ({"task.path": two_prompts(tmp_path)} if base == "sd3" else {})
    if recipe == "tools" and SCALES[base] is TokenRollout:
        # Its own scale, which has tasks with tools, is tried in test_tool_assets.py.
        with pytest.raises(ConfigError, match="no tools whose replies can be replayed"):
            checks.join(load_recipe(recipe, changes))
        return
    if recipe == "rl" or (recipe in TEXTS) == (SCALES[base] is TokenRollout):
        # a policy gradient of verdicts knows no kind
        if base == "sd3" and load_recipe(recipe, changes).rewards:
            with pytest.raises(ConfigError, match="nothing is ever judged"):
                checks.join(load_recipe(recipe, changes))
            changes["task.grader"] = "outside:brightness"
        cfg = load_recipe(recipe, changes)
        checks.join(cfg)
        assert cfg.task.rollouts is SCALES[base]
    else:
        with pytest.raises(ConfigError):
            checks.join(load_recipe(recipe, changes))


def two_prompts(folder: Path) -> str:
    """A file for the base sd3: a prompt of each of its routes."""
    lines = [{"prompt": "a sign that says go", "route": "text"}, {"prompt": "two cats", "route": "objects"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "prompts.jsonl")


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("recipe", TEXTS)
def test_a_recipe_runs(tiny_run: Callable[..., Any], recipe: str, max_staleness: int) -> None:
    if max_staleness and any(teacher.follows for teacher in load_recipe(recipe).teachers.values()):
        with pytest.raises(ConfigError, match="follows the student"):
            tiny_run(recipe, max_staleness=max_staleness)
        return
    group: dict[str, Any] = {"group_size": 3} if recipe in ("rl", "rl_opd") else {}
    task = {"kind": "outside:Chat"}
    if recipe == "rubric":
        # The rule server solves its own tasks only, and the answers of a random student all miss its rules.
        task = {"kind": "word_problems"}
        group = {"group_size": 3, "learner__model": "reflux:student", "sampler__max_tokens": 40}
    if recipe == "gad":
        group = {"group_size": 3, "rewards__discriminator__warmup_steps": 1}
    if recipe == "tools":
        # its context replays
        task = {"kind": "calculator"}
    if recipe == "uni_opd":
        # its teachers serve the routes of its own task
        group = {"teachers__main__routes": ["even"], "teachers__times__routes": ["odd"]}
    done = tiny_run(recipe, steps=3, max_staleness=max_staleness, task=task, **group)
    assert [row["step"] for row in done.rows("metrics")] == [1, 2, 3]
    moved = [row for row in done.rows("metrics") if "grad_norm" in row]
    assert all(row["loss"] is not None and row["grad_norm"] > 0 for row in moved)
    # where all verdicts of a step agree there is nothing to learn
    assert len(moved) == 3 or (recipe in ("rl", "rubric", "gad") and moved)
    assert max(row["staleness_max"] for row in done.rows("metrics")) <= max_staleness
    assert (done.dir / "student" / "model.safetensors").exists()
    assert json.loads((done.dir / "summary.json").read_text()) == done.summary


@pytest.mark.parametrize("recipe", TEXTS)
def test_a_recipe_runs_with_the_evaluations_it_ships_with(tiny_run: Callable[..., Any], recipe: str) -> None:
    """What training wants of teachers and sampler must not be missed where an evaluation asks them."""
    evals = to_table(load_recipe(recipe))["evals"]
    sizes = {
        "accuracy": {"problems": 2, "examples": 0},
        "agreement": {"prompts": 2},
        "teacher_accuracy": {"problems": 2},
    }
    sizes["test_accuracy"] = {"problems": 2}
    group: dict[str, Any] = (
        {"teachers__main__routes": ["even"], "teachers__times__routes": ["odd"]}
        if recipe == "uni_opd"
        else {}
    )
    group |= {f"evals__{name}": {**table, **sizes[name]} for name, table in evals.items()}
    task = {"kind": {"rubric": "word_problems", "tools": "calculator"}.get(recipe, "outside:Chat")}
    done = tiny_run(recipe, steps=1, prompts_per_step=2, task=task, **group)
    before, after = done.rows("evals")
    assert set(before) == {"step", *evals}
    assert all(before[name].get("kl_nats") is not None for name in evals if name == "agreement")
    assert after["step"] == 1


@pytest.mark.parametrize("recipe", ["full", "gkd", "topk", "vopd", "opd", "sft"])
def test_a_recipe_learns(tiny_run: Callable[..., Any], recipe: str) -> None:
    """On its own prompts the divergence (or the loss, for given answers) falls clearly in 30 steps."""
    done = tiny_run(recipe, steps=30, prompts_per_step=16, task={"kind": "outside:Chat"}, learner__lr=1e-2)
    name = "loss" if recipe == "sft" else "kl_nats_trained"
    values = [row[name] for row in done.rows("metrics")]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_planning_all_recipes_imports_neither_torch_nor_transformers(student: str, teacher: str) -> None:
    code = (
        "import sys\n"
        "from reflux.config.recipe import load_recipe\n"
        "from reflux.inspection.plan import plan\n"
        f"for name in {TEXTS!r}:\n"
        "    tables = [name for name, table in load_recipe(name).teachers.items() if 'model' in "
        "vars(table)]\n"
        f"    changes = {{'learner.model': {student!r}}} | "
        f"{{f'teachers.{{table}}.model': {teacher!r} for table in tables}}\n"
        "    plan(load_recipe(name, changes))\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'datasets', 'peft', 'plotly', 'math_verify'} & "
        "set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
