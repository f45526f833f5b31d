"""Law 10. Every config survives writing and reading, and so do the recorded fields of every attempt."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.config.bases import recipe_names
from reflux.config.groups import GROUPS
from reflux.config.recipe import (
    RunConfig,
    config_hash,
    differences,
    from_table,
    load_recipe,
    to_table,
    to_toml,
)
from reflux.config.registry import build, kinds, part, table_of
from reflux.config.schedules import SCHEDULES
from reflux.storage import attempt_log, failed_batch
from reflux.storage.attempt_log import learned, read_attempt
from reflux.storage.files import append_lines, read_lines
from reflux.types import (
    Attempt,
    Credit,
    FlowRollout,
    Prompt,
    Reward,
    Rollout,
    StepRecord,
    TeacherAnswer,
    TokenRollout,
    VelocityTarget,
)
from tiny import rollout

SCHEDULED: dict[str, dict[str, Any]] = {
    "constant": {"value": 0.25},
    "linear": {"start": 1.0, "stop": 9.5, "warmup": 3},
    "cosine": {"peak": 2e-3, "floor": 1e-5, "warmup": 2},
    "steps": {"values": [1.0, 2.5, 4.0], "boundaries": [3, 30]},
}
# the fields that a part requires
PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("teachers", "local"): {"model": "m"},
    ("teachers", "flow"): {"model": "m"},
    ("teachers", "vllm"): {"model": "m", "url": "http://127.0.0.1:8000"},
    ("learners", "hf"): {"model": "m"},
    ("learners", "flow"): {"model": "m"},
    ("learners", "fsdp"): {"model": "m"},
    ("credit", "prefix"): {"length": 4},
    ("credit", "position"): {"weight": 0.5},
    ("cluster", "ray"): {"samplers": 2, "teachers": {"main": 1}},
    ("samplers", "imported"): {"path": "attempts.jsonl"},
    ("tasks", "jsonl"): {"path": "lines.jsonl"},
    ("tasks", "verifiers"): {"taskset": "adding", "settings": {"taskset": {"split": "train"}}},
    ("tasks", "answered"): {
        "of": {"kind": "word_problems"},
        "teacher": {"kind": "local", "faults": {"busy": 0.5}},
        "path": "answers.jsonl",
    },
    ("rewards", "rubric"): {"judge": {"kind": "local"}},
    ("rewards", "judge"): {"judge": {"kind": "openai", "url": "http://127.0.0.1:8000/v1", "model": "m"}},
    ("endpoints", "openai"): {"url": "http://127.0.0.1:8000/v1", "model": "m"},
    ("tasks", "mix"): {
        "parts": {"a": {"kind": "word_problems"}, "b": {"kind": "word_problems", "longer": 2, "weight": 2.0}}
    },
}


def there_and_back(cfg: RunConfig) -> RunConfig:
    return from_table(tomllib.loads(to_toml(cfg)))


BASES = {TokenRollout: ("toy", "hub"), FlowRollout: ("glyphs", "sd3")}


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_survives(recipe: str) -> None:
    cfg = load_recipe(recipe)
    survives(cfg)
    for base in BASES[cfg.task.rollouts]:
        survives(load_recipe(recipe, {"base": base}))


def survives(cfg: RunConfig) -> None:
    again = there_and_back(cfg)
    assert again == cfg
    assert config_hash(again) == config_hash(cfg)
    assert to_toml(again) == to_toml(cfg)


@pytest.mark.parametrize(
    "field", ["learner.lr", "sampler.train_max_tokens", "credit.group_advantage.nats", "credit.prefix.length"]
)
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
    table = {
        "kind": kind,
        **PARTS.get((group, kind), SCHEDULED.get(kind, {}) if group == "schedules" else {}),
    }
    value = build(group, table, "here", steps=7)
    assert isinstance(value, part(group, kind))
    assert build(group, table_of(group, value), "here", steps=99) == value


def test_everything_set_at_once_survives() -> None:
    overrides: dict[str, Any] = {
        "learner.lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "learner.betas": [0.8, 0.95],
        "learner.prompt_suffix": "<think>\n",
        "sampler.stop": ["\n\n", "Question:"],
        "learner.template": {"enable_thinking": False, "depth": 2},
        "learner.system": 'Say "hello" \\ world\n',
        "teachers": {
            "main": "none",
            "plus": {"model": "a", "alias": "main", "routes": ["add"]},
            "times": {"model": "b", "alias": "main", "routes": ["mul"], "context": {"kind": "same"}},
            "self": {
                "kind": "self",
                "follow": "frozen",
                "step": 3,
                "context": {"kind": "peers", "failures": 0, "threshold": 0.25},
            },
        },
        "credit": {
            "half": {"kind": "outside:Half", "factor": 0.25},
            "prefix": {"length": {"kind": "linear", "start": 1, "increment": 0.5}},
        },
        "extrapolation": {"kind": "outside:Jump", "at": 4},
        "track": {"kind": "tensorboard", "project": "p", "name": "n"},
        "health": {"stop_on": ["falling_evaluation"], "skip": ["ratio_outside"], "window": 3, "stall_s": 1.5},
        "trace": True,
        "evals.accuracy": {"problems": 7, "samples": 4, "k": 2},
        "max_staleness": 2,
    }
    cfg = load_recipe("opd", overrides)
    again = there_and_back(cfg)
    assert again == cfg
    assert again.learner.lora.targets == ("q_proj", "v_proj")
    # as it is written, not as Python must call it
    assert to_table(cfg)["teachers"]["plus"]["alias"] == "main"
    assert [teacher.alias for teacher in again.teachers.values()] == ["main", "main", None]
    assert differences(to_table(cfg), tomllib.loads(to_toml(cfg))) == []


def test_the_written_config_names_every_field_of_the_run() -> None:
    table = tomllib.loads(to_toml(load_recipe("rl_opd")))
    absent = {name for name in (entry.name for entry in fields(RunConfig)) if name not in table}
    # TOML has no null
    assert absent == {"ahead", "cluster", "extrapolation", "refresh"}


def test_a_run_holds_its_resolved_config(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("vopd", steps=1)
    cfg = load_recipe(done.dir / "config.toml")
    assert config_hash(cfg) == done.summary["config_hash"]
    assert there_and_back(cfg) == cfg


rewards = st.none() | st.builds(
    Reward,
    st.none() | st.floats(-5, 5),
    st.dictionaries(st.text(max_size=5), st.floats(-5, 5), max_size=2),
    st.none() | st.text(max_size=9),
    st.none() | st.text(max_size=9),
)


@settings(max_examples=100)
@given(
    length=st.integers(0, 6),
    text=st.text(max_size=20),
    reward=rewards,
    finish=st.sampled_from(["stop", "length", "error"]),
    data=st.data(),
)
def test_every_attempt_survives_in_its_recorded_fields(
    length: int, text: str, reward: Reward | None, finish: Any, data: st.DataObject
) -> None:
    from dataclasses import replace

    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    spoken = replace(rollout(length, finish=finish, mask=mask), text=text, version=3, sample=2)
    made = Attempt(spoken, reward, asked_step=4)
    with TemporaryDirectory() as scratch:
        append_lines(Path(scratch) / "attempts.jsonl", [attempt_log.arrived(made)])
        (line,) = read_lines(Path(scratch) / "attempts.jsonl")
    again = read_attempt(line)
    assert isinstance(again.rollout, TokenRollout)
    for name in ("sample", "version", "finish", "text"):
        assert getattr(again.rollout, name) == getattr(spoken, name)
    assert again.rollout.prompt.id == spoken.prompt.id
    np.testing.assert_array_equal(again.rollout.tokens_T, spoken.tokens_T)
    np.testing.assert_array_equal(again.rollout.mask_T, spoken.mask_T)
    np.testing.assert_allclose(again.rollout.logp_T, spoken.logp_T, atol=1e-5)
    assert again.reward == reward
    assert line["step"] == 5


def flow_rollout(steps: int = 3, *, side: int = 4, colour: bool = False, **fields: Any) -> FlowRollout:
    """An image of random pixels after random states."""
    rng = np.random.default_rng((steps, side))
    t_S = np.linspace(1, 0, steps + 1).astype(np.float32)
    made: dict[str, Any] = {
        "prompt": Prompt("p7", ({"role": "user", "content": "the digit 7"},), route="digits"),
        "sample": 1,
        "version": 3,
        "finish": "stop",
        "mask_T": np.arange(steps) < steps - 1,
        "logp_T": rng.normal(-80, 5, steps).astype(np.float32),
        "x_SD": rng.normal(size=(steps + 1, side * side)).astype(np.float32),
        "t_S": t_S,
        "noise_level": 0.7,
        "guidance": 4.5,
        "image": rng.integers(0, 256, (side, side, 3) if colour else (side, side), np.uint8),
    }
    return FlowRollout(**{**made, **fields})


def first_line(made: Attempt) -> dict[str, Any]:
    """The first line of an attempt as it is read from the file."""
    with TemporaryDirectory() as scratch:
        append_lines(Path(scratch) / "attempts.jsonl", [attempt_log.arrived(made)])
        (line,) = read_lines(Path(scratch) / "attempts.jsonl")
    return line


@settings(max_examples=100)
@given(
    steps=st.integers(1, 12),
    side=st.integers(1, 96),
    colour=st.booleans(),
    shift=st.floats(0.2, 5),
    reward=rewards,
    finish=st.sampled_from(["stop", "length", "error"]),
)
def test_every_image_survives_in_its_recorded_fields(
    steps: int, side: int, colour: bool, shift: float, reward: Reward | None, finish: Any
) -> None:
    t_S = np.linspace(1, 0, steps + 1)
    t_S = (shift * t_S / (1 + (shift - 1) * t_S)).astype(np.float32)
    drawn = flow_rollout(steps, side=side, colour=colour, t_S=t_S, finish=finish)
    line = first_line(Attempt(drawn, reward, asked_step=4))
    again = read_attempt(line)
    assert isinstance(again.rollout, FlowRollout)
    for name in ("sample", "version", "finish", "noise_level", "guidance"):
        assert getattr(again.rollout, name) == getattr(drawn, name)
    for name in ("mask_T", "t_S", "image"):
        # bit for bit
        assert getattr(again.rollout, name).dtype == getattr(drawn, name).dtype
        np.testing.assert_array_equal(getattr(again.rollout, name), getattr(drawn, name))
    np.testing.assert_allclose(again.rollout.logp_T, drawn.logp_T, atol=1e-5)
    assert (again.rollout.length, again.rollout.x_SD.shape) == (steps, (steps + 1, 0))
    assert (again.rollout.prompt.id, again.rollout.prompt.messages) == ("p7", drawn.prompt.messages)
    assert again.reward == reward
    assert (line["kind"], line["step"], line["question"]) == ("attempt", 5, "the digit 7")
    assert ("parts" in line) == (reward is not None and bool(reward.parts))


def test_a_large_image_is_kept_as_a_thumbnail() -> None:
    again = read_attempt(first_line(Attempt(flow_rollout(side=200, colour=True))))
    assert again.rollout.made.shape == (96, 96, 3)


def test_the_line_of_a_text_is_the_same_as_ever() -> None:
    """Equal byte for byte. Only a verdict with parts adds a field."""
    spoken = rollout(2)
    logp = ",".join(str(round(float(value), 5)) for value in spoken.logp_T)
    expected = (
        f'{{"kind":"attempt","step":1,"prompt":"p0","question":"question 0","sample":0,"version":0,'
        f'"finish":"stop",'
        f'"tokens":[{",".join(map(str, spoken.tokens_T))}],"mask":[1,1],"logp":[{logp}],'
        f'"text":"","reward":1.0}}\n'
    )
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "a.jsonl"
        append_lines(
            path,
            [
                attempt_log.arrived(Attempt(spoken, reward=reward))
                for reward in (Reward(1.0), Reward(1.0, {"style": 0.5}))
            ],
        )
        assert path.read_text() == expected + expected.replace("1.0}", '1.0,"parts":{"style":0.5}}')


def test_an_attempt_of_no_known_kind_is_refused_in_words() -> None:
    nothing = np.zeros(0)
    other = Rollout(
        prompt=Prompt("p", ()), sample=0, version=0, finish="stop", mask_T=nothing, logp_T=nothing
    )
    with pytest.raises(TypeError, match="Rollout is neither"):
        attempt_log.arrived(Attempt(other))
    with pytest.raises(ValueError, match="must have one of the keys tokens, image"):
        read_attempt({"kind": "attempt", "step": 1})


def test_a_refused_step_keeps_the_states_and_every_velocity(tmp_path: Path) -> None:
    """One file can hold lines of both kinds. Arrays are found by line, and the files of an older refusal are
    removed.
    """
    drawn = [Attempt(flow_rollout(steps)) for steps in (2, 3)]
    v_TD = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    v_TD[-1] = np.nan
    drawn[1].answers["main"] = TeacherAnswer(target=VelocityTarget(teacher="main", v_TD=v_TD))
    drawn[1].now = VelocityTarget(teacher="now", v_TD=-v_TD)
    path = tmp_path / "failed-batch-step-1.jsonl"
    path.with_suffix(".npz").write_text("older")
    assert failed_batch.keep(path, [[Attempt(rollout(2))], drawn], 0, "loss nan") == path
    lines = list(read_lines(path))
    assert [line["why"] for line in lines] == ["loss nan"] * 3
    assert all(len(line["weight"]) == len(line["mask"]) for line in lines)
    np.testing.assert_array_equal(read_attempt(lines[2]).rollout.made, drawn[1].rollout.made)
    kept = np.load(path.with_suffix(".npz"))
    assert sorted(kept) == ["1/image", "1/x_SD", "2/image", "2/v_TD/main", "2/v_TD/now", "2/x_SD"]
    np.testing.assert_array_equal(kept["1/x_SD"], drawn[0].rollout.x_SD)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(kept["2/v_TD/now"], -v_TD)
    failed_batch.keep(path, [[Attempt(rollout(2))]], 0, "again")
    assert [line["why"] for line in read_lines(path)] == ["again"]
    assert not path.with_suffix(".npz").exists()


def test_the_second_line_holds_teacher_weight_shift_and_notes(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("rl_opd", steps=1, group_size=2, credit={"prefix": {"length": 3}, "group_advantage": {}})
    arrived, second = (
        {(r["prompt"], r["sample"]): r for r in done.rows("attempts") if r["kind"] == kind}
        for kind in ("attempt", "learned")
    )
    assert arrived.keys() == second.keys()
    for key, line in second.items():
        length = len(arrived[key]["tokens"])
        assert len(line["weight"]) == len(line["teacher_logp"]["main"]) == len(line["student_logp"]) == length
        assert line["weight"] == [1.0] * min(3, length) + [0.0] * max(0, length - 3)
        assert {"prefix.kept", "group_advantage.mixed"} <= line["notes"].keys()
        for now, then in zip(line["student_logp"][:3], arrived[key]["logp"][:3], strict=True):
            assert now == pytest.approx(then, abs=1e-3)


def test_values_that_were_not_computed_are_null(tmp_path: Path) -> None:
    made = Attempt(rollout(3))
    made.credits["x"] = Credit(weight_T=np.asarray([1.0, 0.0, 1.0], dtype=np.float32))
    made.learned = StepRecord(logp={"main": np.asarray([-1.0, np.nan, -2.0], dtype=np.float32)})
    append_lines(tmp_path / "attempts.jsonl", [learned(made, 0)])
    (line,) = read_lines(tmp_path / "attempts.jsonl")
    assert line["teacher_logp"] == {"main": [-1.0, None, -2.0]}
    assert "kl" not in line
    made.learned = StepRecord(kl_T=np.asarray([0.25, np.nan, 0.123456789], dtype=np.float32))
    assert learned(made, 0)["kl"].tolist() == pytest.approx([0.25, np.nan, 0.12346], nan_ok=True)
    assert line["weight"] == [1.0, 0.0, 1.0]


def test_half_a_character_in_a_users_text_is_kept(tmp_path: Path) -> None:
    append_lines(tmp_path / "a.jsonl", [{"text": "half \ud83d", "ids": np.asarray([1, 2])}])
    assert list(read_lines(tmp_path / "a.jsonl")) == [{"text": "half \ud83d", "ids": [1, 2]}]


def test_custom_recipes_are_read_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "toy"\nsteps = 3\n[[objectives]]\nkind = "nll"\n')
    cfg = load_recipe(tmp_path / "mine.toml")
    assert (cfg.recipe, cfg.steps) == ("mine", 3)
    assert there_and_back(cfg) == cfg
