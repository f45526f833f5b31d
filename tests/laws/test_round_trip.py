"""Law 10. Every config survives write and read; so does every attempt in what is kept of it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux import records
from reflux.config import RunConfig, config_hash, differences, from_table, load_recipe, recipe_names, to_table, to_toml
from reflux.files import append_lines, read_lines
from reflux.parts import GROUPS, build, kinds, part, table_of
from reflux.records import learned, read_attempt
from reflux.schedules import SCHEDULES
from reflux.types import Attempt, Reward, Share
from tiny import rollout

SCHEDULED: dict[str, dict[str, Any]] = {
    "constant": {"value": 0.25},
    "linear": {"start": 1.0, "stop": 9.5, "warmup": 3},
    "cosine": {"peak": 2e-3, "floor": 1e-5, "warmup": 2},
    "steps": {"values": [1.0, 2.5, 4.0], "boundaries": [3, 30]},
}
PARTS: dict[tuple[str, str], dict[str, Any]] = {  # what a part cannot be without
    ("teachers", "local"): {"model": "m"},
    ("learners", "hf"): {"model": "m"},
    ("credit", "prefix"): {"length": 4},
    ("credit", "position"): {"factor": 0.5},
    ("tasks", "jsonl"): {"path": "lines.jsonl"},
    ("tasks", "mix"): {"parts": {"a": {"kind": "word_problems"}, "b": {"kind": "word_problems", "longer": 2, "weight": 2.0}}},
}


def there_and_back(cfg: RunConfig) -> RunConfig:
    return from_table(tomllib.loads(to_toml(cfg)))


@pytest.mark.parametrize("base", ["toy", "hub"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_survives(recipe: str, base: str) -> None:
    cfg = load_recipe(recipe, {"base": base})
    again = there_and_back(cfg)
    assert again == cfg
    assert config_hash(again) == config_hash(cfg)
    assert to_toml(again) == to_toml(cfg)


@pytest.mark.parametrize("field", ["learner.lr", "sampler.max_tokens", "credit.outcome.nats", "credit.prefix.length"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_survives_in_every_number(kind: str, field: str) -> None:
    assert sorted(SCHEDULED) == sorted(SCHEDULES)
    cfg = load_recipe("rl_opd", {field: {"kind": kind, **SCHEDULED[kind]}})
    assert there_and_back(cfg) == cfg
    for step in (0, 2, 3, 29, 30, 199, 500):
        part_of = (cfg, there_and_back(cfg))
        one, other = (_at(found, field)(step) for found in part_of)
        assert one == other


def _at(cfg: Any, path: str) -> Any:
    for name in path.split("."):
        cfg = cfg[name] if isinstance(cfg, dict) else getattr(cfg, name)
    return cfg


@pytest.mark.parametrize(("group", "kind"), [(group, kind) for group in GROUPS for kind in kinds(group)])
def test_every_part_survives(group: str, kind: str) -> None:
    table = {"kind": kind, **PARTS.get((group, kind), SCHEDULED.get(kind, {}) if group == "schedules" else {})}
    value = build(group, table, "here", steps=7)
    assert isinstance(value, part(group, kind))
    assert build(group, table_of(group, value), "here", steps=99) == value


def test_everything_set_at_once_survives() -> None:
    overrides: dict[str, Any] = {
        "learner.lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "learner.betas": [0.8, 0.95],
        "sampler.stop": ["\n\n", "Question:"],
        "sampler.template": {"enable_thinking": False, "depth": 2},
        "sampler.system": 'Say "hello" \\ world\n',
        "teachers": {
            "main": "none",
            "plus": {"model": "a", "as": "main", "routes": ["add"]},
            "times": {"model": "b", "as": "main", "routes": ["mul"], "context": {"kind": "same"}},
            "self": {"kind": "own", "follow": "frozen", "step": 3, "context": {"kind": "peers", "failures": 0, "threshold": 0.25}},
        },
        "credit": {
            "half": {"kind": "outside:Half", "factor": 0.25},
            "prefix": {"length": {"kind": "linear", "start": 1, "increment": 0.5}},
        },
        "accelerator": {"kind": "outside:Jump", "at": 4},
        "track": {"kind": "tensorboard", "project": "p", "name": "n"},
        "evals.accuracy": {"problems": 7, "samples": 4, "k": 2},
        "max_lag": 2,
    }
    cfg = load_recipe("opd", overrides)
    again = there_and_back(cfg)
    assert again == cfg
    assert again.learner.lora.targets == ("q_proj", "v_proj")
    assert to_table(cfg)["teachers"]["plus"]["as"] == "main"  # as it is written, not as Python must call it
    assert [teacher.as_ for teacher in again.teachers.values()] == ["main", "main", None]
    assert differences(to_table(cfg), tomllib.loads(to_toml(cfg))) == []


def test_the_written_config_names_every_field_of_the_run() -> None:
    table = tomllib.loads(to_toml(load_recipe("rl_opd")))
    absent = {name for name in (entry.name for entry in fields(RunConfig)) if name not in table}
    assert absent == {"accelerator"}  # TOML has no null


def test_a_run_holds_its_resolved_config(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("vopd", steps=1)
    cfg = load_recipe(done.dir / "config.toml")
    assert config_hash(cfg) == done.summary["config_hash"]
    assert there_and_back(cfg) == cfg


@given(
    length=st.integers(0, 6),
    text=st.text(max_size=20),
    reward=st.none() | st.floats(-5, 5),
    finish=st.sampled_from(["stop", "length", "error"]),
    data=st.data(),
)
def test_every_attempt_survives_in_what_is_kept(length: int, text: str, reward: float | None, finish: Any, data: st.DataObject) -> None:
    from dataclasses import replace

    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    spoken = replace(rollout(length, finish=finish, mask=mask), text=text, version=3, sample=2)
    made = Attempt(spoken, reward=None if reward is None else Reward(reward))
    with TemporaryDirectory() as scratch:
        append_lines(Path(scratch) / "attempts.jsonl", [records.arrived(made, 4)])
        (line,) = read_lines(Path(scratch) / "attempts.jsonl")
    again = read_attempt(line)
    for name in ("sample", "version", "finish", "text"):
        assert getattr(again.rollout, name) == getattr(spoken, name)
    assert again.rollout.prompt.id == spoken.prompt.id
    np.testing.assert_array_equal(again.rollout.tokens_T, spoken.tokens_T)
    np.testing.assert_array_equal(again.rollout.mask_T, spoken.mask_T)
    np.testing.assert_allclose(again.rollout.logp_T, spoken.logp_T, atol=1e-5)
    assert (again.reward.value if again.reward else None) == reward
    assert line["step"] == 5


def test_the_second_line_holds_teacher_weight_shift_and_notes(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("rl_opd", steps=1, group_size=2, credit={"prefix": {"length": 3}, "outcome": {}})
    arrived, second = (
        {(r["prompt"], r["sample"]): r for r in done.rows("attempts") if r["kind"] == kind} for kind in ("attempt", "learned")
    )
    assert arrived.keys() == second.keys()
    for key, line in second.items():
        length = len(arrived[key]["tokens"])
        assert len(line["weight"]) == len(line["teacher_logp"]["main"]) == len(line["student_logp"]) == length
        assert line["weight"] == [1.0] * min(3, length) + [0.0] * max(0, length - 3)
        assert {"prefix.kept", "outcome.mixed"} <= line["notes"].keys()
        for now, then in zip(line["student_logp"][:3], arrived[key]["logp"][:3], strict=True):
            assert now == pytest.approx(then, abs=1e-3)


def test_what_was_never_computed_is_null_and_not_a_number(tmp_path: Path) -> None:
    made = Attempt(rollout(3))
    made.shares["x"] = Share(factor_T=np.asarray([1.0, 0.0, 1.0], dtype=np.float32))
    made.notes["logp"] = {"main": np.asarray([-1.0, np.nan, -2.0], dtype=np.float32)}
    append_lines(tmp_path / "attempts.jsonl", [learned(made, 0)])
    (line,) = read_lines(tmp_path / "attempts.jsonl")
    assert line["teacher_logp"] == {"main": [-1.0, None, -2.0]}
    assert line["weight"] == [1.0, 0.0, 1.0]


def test_half_a_character_in_a_users_text_is_kept(tmp_path: Path) -> None:
    append_lines(tmp_path / "a.jsonl", [{"text": "half \ud83d", "ids": np.asarray([1, 2])}])
    assert list(read_lines(tmp_path / "a.jsonl")) == [{"text": "half \ud83d", "ids": [1, 2]}]


def test_recipes_of_ones_own_are_read_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "toy"\nsteps = 3\n[[objectives]]\nkind = "nll"\n')
    cfg = load_recipe(tmp_path / "mine.toml")
    assert (cfg.recipe, cfg.steps) == ("mine", 3)
    assert there_and_back(cfg) == cfg
