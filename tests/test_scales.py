"""A recipe is right on every scale: methods hold no number of a scale, and evaluations have a limit that no
training cap changes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from reflux import checks
from reflux.config.bases import RECIPES, recipe_names, resolve
from reflux.config.overrides import merge
from reflux.config.recipe import from_table, load_recipe, to_table
from reflux.errors import ConfigError
from reflux.inspection.plan import plan
from reflux.types import FlowRollout, TokenRollout

SCALE_KEYS = {
    "steps", "prompts_per_step", "save_every", "eval_every", "lr", "max_tokens", "max_prompt_tokens",
    "eval_steps", "segments", "prompts",
    "problems",
}  # fmt: skip
SCALES = {
    TokenRollout: ("toy", "chains", "tool_calls", "hub", "reader", "two_domains"),
    FlowRollout: ("glyphs", "sd3"),
}
# The scale `reader` has no model to teach, and the recipe `tools` is about what a teacher sees.
APART = {("tools", "reader")}
HERE = [
    (name, base)
    for name in recipe_names()
    for base in SCALES[load_recipe(name).learner.rollouts]
    if (name, base) not in APART
]
# tables that stand inside another one
MOVED = {"sft": ("sampler", "sampler.generate"), "flow_sft": ("sampler", "sampler.generate")}
CAPS: dict[str, Any] = {
    "none": None,
    "a number": 5,
    "constant": {"kind": "constant", "value": 3},
    "linear": {"kind": "linear", "start": 2, "increment": 0.5},
    "linear, to its horizon": {"kind": "linear", "start": 1, "stop": 64},
    "falling": {"kind": "linear", "start": 64, "increment": -0.25, "stop": 1},
    "cosine": {"kind": "cosine", "peak": 60, "floor": 1},
    "steps": {"kind": "steps", "values": [4, 9], "boundaries": [3]},
    "in shares": {"kind": "linear", "of": "sampler.max_tokens", "start": 0.25, "increment": 0.1},
}


def leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def at(table: Any, path: str) -> Any:
    """The value at a path; None where a table on the way is not there."""
    for key in path.split("."):
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def raw(name: str) -> dict[str, Any]:
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


def on(recipe: str, base: str, folder: Path) -> Any:
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a sign", "route": "text"}))
    return load_recipe(
        recipe, {"base": base} | ({"task.path": str(folder / "prompts.jsonl")} if base == "sd3" else {})
    )


# --- methods and scales


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_method_says_no_number_of_a_scale(recipe: str) -> None:
    behaviour = {path.split(".")[-1] for path, _ in leaves(raw(recipe))}
    assert not behaviour & SCALE_KEYS


@pytest.mark.parametrize(("recipe", "base"), HERE)
def test_what_a_scale_says_holds_under_every_method(recipe: str, base: str, tmp_path: Path) -> None:
    """But for the size of groups, which is the method's, for tables that it takes away, and for what the
    scale says of this very recipe.
    """
    scale = raw(f"base/{base}")
    of_this = scale.pop("methods", {}).get(recipe, {})
    resolved = to_table(on(recipe, base, tmp_path))
    old, new = MOVED.get(recipe, ("", ""))
    taken_away = {path for path, value in leaves(raw(recipe)) if value == "none"}
    checked = 0
    for path, value in leaves(merge(scale, of_this)):
        where = path.replace(old, new, 1) if old and path.startswith(old) and path != f"{old}.kind" else path
        found = at(resolved, where)
        if (
            path in ("group_size", "task.path")
            or any(path.startswith(gone) for gone in taken_away)
            or path.endswith(".kind")
        ):
            continue
        table = ".".join(path.split(".")[:2])
        if path.startswith("teachers.") and at(resolved, f"{table}.kind") != at(scale, f"{table}.kind"):
            # another teacher stands there, or none
            continue
        if path.startswith("evals.") and at(resolved, table) is None:
            continue
        expected = {"horizon": resolved["steps"], **value} if isinstance(value, dict) else value
        assert found == pytest.approx(expected) if isinstance(found, float) else found == expected, path
        checked += 1
    assert checked >= 8


# what each recipe trained with when methods still held these numbers
OWN_SCALE = {
    "prefix": {"prompts_per_step": 16, "group_size": 1, "sampler.max_tokens": 272},
    "release": {"credit.release.segments": 4, "prompts_per_step": 64, "sampler.max_tokens": 64},
    "effopd": {"extrapolation.prompts": 200, "extrapolation.tries": 5, "prompts_per_step": 64},
    "rl": {"prompts_per_step": 16, "group_size": 8, "learner.lr.peak": 2e-3},
    "rl_opd": {"prompts_per_step": 16, "group_size": 4, "learner.lr.peak": 2e-3},
    "sft": {
        "sampler.generate.max_tokens": 64,
        "sampler.generate.max_prompt_tokens": 0,
        "prompts_per_step": 64,
    },
    "peers": {"prompts_per_step": 8, "group_size": 8, "learner.lr.peak": 2e-4, "sampler.max_tokens": 64},
    "everything": {
        "prompts_per_step": 8,
        "group_size": 8,
        "sampler.max_tokens": 64,
        "extrapolation.prompts": 50,
    },
    "uni_opd": {"prompts_per_step": 8, "group_size": 8, "learner.lr.peak": 1e-3},
    "flow_grpo": {"prompts_per_step": 8, "group_size": 8, "learner.lr": 3e-5, "learner.weight_decay": 1e-4},
    "flow_sft": {
        "prompts_per_step": 32,
        "learner.lr": 3e-4,
        "sampler.generate.eval_steps": 20,
        "sampler.positions": 10,
    },
    "flow": {"prompts_per_step": 32, "learner.lr": 3e-4, "sampler.eval_steps": 20},
}


@pytest.mark.parametrize("recipe", OWN_SCALE)
def test_on_its_own_scale_a_recipe_is_what_it_was(recipe: str) -> None:
    table = to_table(load_recipe(recipe))
    assert {path: at(table, path) for path in OWN_SCALE[recipe]} == OWN_SCALE[recipe]


@pytest.mark.parametrize(
    ("recipe", "path", "start", "increment"),
    [
        ("prefix", "sampler.train_max_tokens", 1 / 8, 1 / 32),
        ("everything", "credit.prefix.length", 1 / 4, 1 / 128),
    ],
)
def test_prefixes_grow_with_the_scale(recipe: str, path: str, start: float, increment: float) -> None:
    """The same shares of the longest answer with the embedded models and on the hub, to the bit."""
    toy, hub = (at(to_table(load_recipe(recipe, {"base": base})), path) for base in ("toy", "hub"))
    assert toy == {
        "kind": "linear",
        "start": 64 * start,
        "increment": 64 * increment,
        "stop": 64.0,
        "warmup": 0,
        "horizon": 200,
    }
    assert hub == {
        "kind": "linear",
        "start": 1024 * start,
        "increment": 1024 * increment,
        "stop": 1024.0,
        "warmup": 0,
        "horizon": 200,
    }
    longer = at(to_table(load_recipe(recipe, {"base": "hub", "sampler.max_tokens": 4096})), path)
    assert (longer["start"], longer["increment"], longer["stop"]) == (4096 * start, 4096 * increment, 4096.0)


def test_a_scale_speaks_to_the_recipes_that_a_recipe_is_built_on(tmp_path: Path) -> None:
    # its own name is no shipped recipe's, though it looks like one
    mine = tmp_path / "rl.toml"
    mine.write_text('base = "release"\nseed = 3\n')
    assert load_recipe(mine).credit["release"].segments == 4
    assert load_recipe(mine).prompts_per_step == 64
    assert load_recipe(mine, {"base": "hub"}).credit["release"].segments == "sentences"
    scale = tmp_path / "mine_scale.toml"
    scale.write_text('base = "hub"\nsteps = 7\n[methods.release.credit.release]\nsegments = "lines"\n')
    resolved = load_recipe("release", {"base": str(scale)})
    assert (resolved.steps, resolved.credit["release"].segments, resolved.learner.model) == (
        7,
        "lines",
        "Qwen/Qwen3-0.6B",
    )


def test_a_scale_that_speaks_to_nobody_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scale.toml").write_text('base = "toy"\n[methods.releese]\nsteps = 3\n')
    with pytest.raises(
        ConfigError,
        match=r"methods\.releese: there is no shipped recipe of this name; did you mean 'release'",
    ):
        load_recipe("release", {"base": str(tmp_path / "scale.toml")})


def test_a_base_that_leads_back_to_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "{path}"\n')
    with pytest.raises(ConfigError, match="builds on itself"):
        load_recipe(path)
    # a recipe in the place of a scale brings its own scale
    assert load_recipe("vopd", {"base": "gkd"}).learner.model == "reflux:student"


def test_base_beside_a_new_kind_is_the_table_that_was_there() -> None:
    under = {"sampler": {"kind": "hf", "max_tokens": 5, "stop": ["x"]}}
    over = {"sampler": {"kind": "references", "generate": "base"}}
    assert merge(under, over) == {"sampler": {"kind": "references", "generate": under["sampler"]}}
    hub = load_recipe("sft", {"base": "hub"}).sampler.generate
    assert (hub.max_tokens, hub.max_prompt_tokens) == (1024, 1024)


# --- shares


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant", "value": 0.5}, {"value": 8.0}),
        (
            {"kind": "linear", "start": 0.25, "increment": 0.125, "warmup": 3},
            {"start": 4.0, "increment": 2.0, "warmup": 3},
        ),
        (
            {"kind": "cosine", "peak": 1.0, "floor": 0.25, "warmup": 2},
            {"peak": 16.0, "floor": 4.0, "warmup": 2},
        ),
        ({"kind": "steps", "values": [0.25, 1], "boundaries": [7]}, {"values": [4.0, 16], "boundaries": [7]}),
    ],
)
def test_shares_are_of_amounts_and_never_of_steps(schedule: dict[str, Any], expected: dict[str, Any]) -> None:
    changes = {"sampler.max_tokens": 16, "sampler.train_max_tokens": {"of": "sampler.max_tokens", **schedule}}
    found = to_table(load_recipe("opd", changes))["sampler"]["train_max_tokens"]
    assert found == {**found, **expected}
    assert "of" not in found


@pytest.mark.parametrize("of", ["sampler.nothing", "learner.lr", "sampler", "task.kind", 3])
def test_shares_of_no_number_are_refused_by_their_path(of: Any) -> None:
    with pytest.raises(ConfigError, match=r"credit.prefix.length.of: this recipe has no plain number at"):
        load_recipe(
            "opd", {"credit.prefix.length": {"kind": "linear", "of": of, "start": 0.5, "increment": 0.1}}
        )


# --- limits


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("base", ["toy", "hub"])
def test_no_training_cap_is_a_limit_of_evaluations(base: str, cap: str) -> None:
    changes = {"base": base} | ({"sampler.train_max_tokens": CAPS[cap]} if CAPS[cap] is not None else {})
    cfg = load_recipe("full", changes)
    longest = {"toy": 64, "hub": 1024}[base]
    assert cfg.evaluation_positions == longest
    lengths = [cfg.draw(step).max_positions for step in range(cfg.steps)]
    assert cfg.training_positions == max(lengths) <= longest
    assert cap == "none" or min(lengths) < longest


@pytest.mark.parametrize("base", ["toy", "hub"])
def test_prefix_evaluates_whole_answers(base: str) -> None:
    cfg = load_recipe("prefix", {"base": base, "steps": 3})
    longest = {"toy": 64, "hub": 1024}[base]
    assert [cfg.draw(step).max_positions for step in range(3)] == [
        (step + 4) * longest // 32 for step in range(3)
    ]
    assert (cfg.training_positions, cfg.evaluation_positions) == (6 * longest // 32, longest)


@pytest.mark.parametrize("cap", CAPS)
def test_evaluations_and_scores_ask_with_their_own_limit(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, cap: str
) -> None:
    """What really is asked of the sampler, training aside."""
    from reflux.samplers.hf_engine import HFSampler

    asked: set[tuple[str, int]] = set()
    sample = HFSampler._groups

    async def listened(self: Any, requests: Any) -> Any:
        asked.update((draw.purpose, draw.max_positions) for _, _, draw in requests)
        return await sample(self, requests)

    monkeypatch.setattr(HFSampler, "_groups", listened)
    tables = {
        "accuracy": {"problems": 2, "samples": 1},
        "agreement": {"prompts": 2},
        "teacher_accuracy": {"problems": 2},
    }
    more = {"sampler__train_max_tokens": CAPS[cap]} if CAPS[cap] is not None else {}
    tiny_run(
        "full", steps=1, prompts_per_step=2, sampler__max_tokens=9, task={"kind": "outside:Chat"}, **more,
        extrapolation={"kind": "extrapolate", "prompts": 2, "tries": 1, "include": ["proj"]},
        **{f"evals__{name}": table for name, table in tables.items()},
    )  # fmt: skip
    assert {length for purpose, length in asked if purpose == "eval"} == {9}
    assert {length for purpose, length in asked if purpose == "score"} == {9}


def test_pictures_are_finished_in_evaluations_whatever_training_walks() -> None:
    cfg = load_recipe(
        "flow", {"sampler.max_denoising_steps": {"kind": "linear", "start": 2, "increment": 0.01}}
    )
    assert (cfg.training_positions, cfg.evaluation_positions) == (2, 10)
    assert load_recipe("flow_sft", {"sampler.positions": 3}).evaluation_positions == 10


def test_a_schedule_of_the_longest_answer_is_sent_to_the_training_cap() -> None:
    with pytest.raises(ConfigError, match="Give the schedule to train_max_tokens"):
        load_recipe("opd", {"sampler.max_tokens": {"kind": "linear", "start": 6, "increment": 1}})


@pytest.mark.parametrize("name", ["accuracy", "agreement", "teacher_accuracy"])
def test_an_evaluation_shorter_than_training_is_told(name: str) -> None:
    (warning,) = checks.warnings(load_recipe("full", {f"evals.{name}.max_tokens": 32}))
    assert warning.startswith(f"evals.{name}.max_tokens = 32 cuts answers that may have up to 64 tokens")
    # training reaches 30 there
    assert not checks.warnings(
        load_recipe("prefix", {"base": "toy", f"evals.{name}.max_tokens": 32, "steps": 12})
    )
    (warning,) = checks.warnings(load_recipe("effopd", {"extrapolation.max_tokens": 32}))
    assert warning.startswith("extrapolation.max_tokens = 32 cuts")


def test_a_cap_above_the_longest_answer_is_refused_and_a_schedule_stays_at_it() -> None:
    with pytest.raises(ConfigError, match="train_max_tokens = 65 is above max_tokens = 64"):
        load_recipe("full", {"sampler.train_max_tokens": 65})
    rising = load_recipe(
        "full", {"sampler.train_max_tokens": {"kind": "linear", "start": 60, "increment": 3}}
    )
    assert [rising.draw(step).max_positions for step in range(3)] == [60, 63, 64]


def test_a_plan_tells_both_limits_and_a_window_too_small() -> None:
    found = plan(load_recipe("prefix", {"base": "toy", "steps": 11}))
    assert (found.training_positions, found.evaluation_positions) == ((8, 28), 64)
    assert not found.warnings
    (warning,) = plan(load_recipe("full", {"sampler.max_tokens": 512})).warnings
    assert warning.startswith(
        "sampler.max_tokens = 512 does not fit into the student's context window of 512 tokens"
    )
    assert not plan(load_recipe("full", {"sampler.max_tokens": 511})).warnings


@pytest.mark.parametrize(("recipe", "line"), [
    ("prefix", "at most 272 tokens in training (lowest limit 34), 272 in evaluations"),
    ("full", "at most 64 tokens in training, 64 in evaluations"),
    ("flow", "at most 10 denoising steps in training; evaluations run all denoising steps"),
])  # fmt: skip
def test_the_plan_is_printed_with_both_limits(recipe: str, line: str) -> None:
    from reflux.cli.show import lengths_in_words

    assert lengths_in_words(plan(load_recipe(recipe))) == line


def test_a_resolved_recipe_is_read_back_as_it_is(tmp_path: Path) -> None:
    """Law 10 for shares: what stands in config.toml has none."""
    table = to_table(load_recipe("everything", {"base": "hub"}))
    assert to_table(from_table(tomllib.loads(tomli_w.dumps(table)))) == table
    assert resolve(table) == table
