"""Recipes merge by stated rules, and every mistake is named by its path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflux.config.bases import RECIPES, recipe_names
from reflux.config.overrides import merge, nest, split_override, unpack
from reflux.config.recipe import config_hash, differences, load_recipe, to_table
from reflux.errors import ConfigError

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"stepss": 3}, "stepss: unexpected field; did you mean 'steps'"),
    "unknown inner key": (
        {"credit.prefix": {"lenght": 3}},
        "credit.prefix.lenght: unexpected field; did you mean 'length'",
    ),
    "unknown kind": ({"sampler.kind": "hff"}, "sampler: unknown samplers kind 'hff'; did you mean 'hf'"),
    "unknown rule": (
        {"credit.prefiks": {"length": 3}},
        "credit.prefiks: unknown credit kind 'prefiks'; did you mean 'prefix'",
    ),
    "wrong type": ({"steps": "many"}, "steps"),
    "out of range": ({"sampler.top_p": 1.5}, "sampler.top_p"),
    "negative": ({"max_staleness": -1}, "max_staleness"),
    "not in the list": ({"loss_aggregation": "keept"}, "loss_aggregation"),
    "no table": ({"sampler": 3}, "sampler"),
    "lora": ({"learner.lora": {"rank": 0}}, "learner.lora.rank"),
    "objective": ({"objectives.0.coeff": 2}, "objectives[0].coeff: unexpected field; did you mean 'coef'"),
    "no objectives": ({"objectives": []}, "at least one [[objectives]] table"),
    "index": ({"objectives.3.coef": 2}, "there are only 1 entries in objectives"),
    "outside, no module": (
        {"credit.mine": {"kind": "no_such_package.x:Y"}},
        "cannot import 'no_such_package.x:Y'",
    ),
    "outside, no class": ({"credit.mine": {"kind": "outside:Nothing"}}, "cannot import 'outside:Nothing'"),
    "outside, half a part": (
        {"rewards.mine": {"kind": "outside:Weightless"}},
        "rewards.mine: 'outside:Weightless' lacks members that every part",
    ),
    "no kind": ({"evals.accuracy.kind": "none"}, "To remove the whole table, write evals.accuracy=none"),
    "dtype": (
        {"sampler.dtype": "foo"},
        "sampler.dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'foo'",
    ),
    "no end": (
        {"rewards.verifier": {"timeout_s": float("inf")}},
        "rewards.verifier.timeout_s: input should be a finite number",
    ),
    "beta": ({"learner.betas": [0.9, 1.0]}, "learner.betas.1: input should be less than 1"),
    "base of another type": ({"base": 3}, "base: expected the name of a recipe or a base"),
    "missing field": ({"credit.prefix": {}}, "credit.prefix.length"),
    "bad value": ({"credit.prefix": {"length": 0}}, "credit.prefix: length must be at least 1 position"),
    "number": ({"learner.lr": "fast"}, "learner: lr must be a number or a schedule"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_by_its_path(case: str) -> None:
    overrides, words = MISTAKES[case]
    with pytest.raises(ConfigError) as refused:
        load_recipe("opd", overrides)
    assert words in str(refused.value)
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize("name", ["opdd", "nowhere.toml", "folder/none"])
def test_an_unknown_recipe_is_refused_in_words(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no recipe|there is no file"):
        load_recipe(name)


def test_text_that_is_no_toml_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_tables_merge_key_by_key_and_a_new_kind_drops_the_old_keys() -> None:
    under = {"a": {"kind": "x", "p": 1, "q": {"r": 1}}, "b": [1, 2], "c": {"d": 1}}
    assert merge(under, {"a": {"p": 2, "q": {"s": 3}}}) == {
        **under,
        "a": {"kind": "x", "p": 2, "q": {"r": 1, "s": 3}},
    }
    assert merge(under, {"a": {"kind": "y", "z": 0}})["a"] == {"kind": "y", "z": 0}
    assert merge(under, {"a": {"kind": "x", "p": 5}})["a"] == {"kind": "x", "p": 5, "q": {"r": 1}}
    assert merge(under, {"b": [3], "c": 4}) == {**under, "b": [3], "c": 4}
    assert under["a"] == {"kind": "x", "p": 1, "q": {"r": 1}}


@pytest.mark.parametrize(
    ("table", "kind", "stays"),
    [
        ("sampler", "vllm", {"max_tokens": 64, "train_max_tokens": 32, "stop": ["x"]}),
        ("learner", "fsdp", {"model": "m", "lr": 0.5, "compile": True}),
        ("teacher", "vllm", {"model": "t", "system": "s"}),
        ("teacher", "self", {}),
        ("sampler", "references", {}),
        ("sampler", "no_such_kind", {}),
        ("schedule", "cosine", {}),
        ("sampler", 3, {}),
        ("sampler", [1], {}),
        ("learner", {"a": 1}, {}),
    ],
)
def test_a_kind_that_does_the_same_by_other_means_keeps_the_keys_that_both_have(
    table: str, kind: Any, stays: dict[str, Any]
) -> None:
    under = {
        "sampler": {"kind": "hf", "max_tokens": 64, "train_max_tokens": 32, "stop": ["x"], "batch_tokens": 5},
        "learner": {"kind": "hf", "model": "m", "lr": 0.5, "compile": True},
        "teacher": {"kind": "local", "model": "t", "system": "s", "offload": True},
        "schedule": {"kind": "linear", "start": 1, "warmup": 2},
    }
    assert merge(under, {table: {"kind": kind}})[table] == {"kind": kind, **stays}


def test_a_kind_goes_back_to_the_one_it_did_the_work_of() -> None:
    under = {"sampler": {"kind": "vllm", "max_tokens": 64, "dtype": "float32", "url": "u"}}
    over = {"sampler": {"kind": "hf", "dtype": "bfloat16"}}
    assert merge(under, over) == {"sampler": {"kind": "hf", "max_tokens": 64, "dtype": "bfloat16"}}


def test_an_engine_is_changed_on_the_command_line_by_its_kind_alone() -> None:
    changes = {"sampler.kind": "vllm", "learner.kind": "fsdp", "teachers.main.kind": "vllm"}
    url = {"teachers.main.url": "http://host:8000"}
    plain, served = load_recipe("quickstart"), load_recipe("quickstart", {**changes, **url})
    assert served.sampler.max_tokens == plain.sampler.max_tokens != type(plain.sampler)().max_tokens
    assert (served.learner.model, served.learner.lr) == (plain.learner.model, plain.learner.lr)
    assert served.teachers["main"].model == plain.teachers["main"].model


def test_overrides_are_toml_or_text() -> None:
    assert [unpack(text) for text in ("3", "1e-3", "true", "[1, 2]", '{kind = "linear", start = 1}',
                                      "my/model", "'3'", "")] == [
        3, 1e-3, True, [1, 2], {"kind": "linear", "start": 1}, "my/model", "3", "",
    ]  # fmt: skip
    assert split_override("a.b=c=d") == ("a.b", "c=d")
    for text in ("a.b", "=3"):
        with pytest.raises(ConfigError, match=r"Write key\.path=value"):
            split_override(text)


def test_a_number_in_a_path_edits_one_entry_of_a_list() -> None:
    table = {"objectives": [{"kind": "nll"}, {"kind": "policy_gradient", "coef": 1}]}
    assert nest(["objectives", "1", "coef"], 2, table) == {
        "objectives": [{"kind": "nll"}, {"kind": "policy_gradient", "coef": 2}]
    }
    assert table["objectives"][1]["coef"] == 1
    assert load_recipe("opd", ["objectives.0.coef=0.5"]).objectives[0].coef == 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_overrides_does_not_matter(order: int) -> None:
    changes = [
        "sampler.kind=references",
        "sampler.generate.max_tokens=7",
        "objectives.0.kind=nll",
        "objectives.0.coef=2",
        "learner.lr=1",
    ][::order]
    cfg = load_recipe("opd", changes)
    assert (cfg.sampler.generate.max_tokens, cfg.objectives[0].coef, cfg.learner.lr) == (7, 2, 1)


def test_base_is_the_scale(tmp_path: Path) -> None:
    toy, hub = load_recipe("gkd"), load_recipe("gkd", {"base": "hub"})
    assert toy.objectives == hub.objectives
    assert (toy.learner.model, hub.learner.model) == ("reflux:student", "Qwen/Qwen3-0.6B")
    (tmp_path / "mine.toml").write_text('base = "gkd"\nseed = 5\n[learner]\nweight_decay = 0.1\n')
    mine = load_recipe(tmp_path / "mine.toml", {"base": "hub"})
    assert (mine.objectives, mine.seed, mine.learner.weight_decay) == (hub.objectives, 5, 0.1)
    assert mine.learner.model == hub.learner.model
    with pytest.raises(ConfigError, match="no base 'hubb'; did you mean 'hub'"):
        load_recipe("gkd", {"base": "hubb"})


def test_a_base_that_is_a_path_is_looked_up_beside_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scale.toml").write_text('base = "toy"\nsteps = 7\n')
    (tmp_path / "mine" / "top.toml").write_text('base = "gkd"\nseed = 5\n')
    (tmp_path / "mine" / "low.toml").write_text('base = "scale.toml"\n[[objectives]]\nkind = "nll"\n')
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine/low.toml").steps == 7
    # on the command line: from where one is
    assert load_recipe("mine/top.toml", {"base": "mine/scale.toml"}).steps == 7


def test_what_a_base_says_of_a_recipe_holds_by_path_too() -> None:
    for name in recipe_names():
        assert to_table(load_recipe(RECIPES / f"{name}.toml")) == to_table(load_recipe(name))


@pytest.mark.parametrize(
    ("text", "base", "words"),
    [
        ('base = "gkd"\n[methods.rl]\nsteps = 3\n', None, r'methods\.rl: this recipe does not build on "rl"'),
        ('base = "rl"\n[methods]\nrl = 3\n', None, r"methods\.rl: expected a table \[methods\.rl\], got 3"),
        ("steps = 3\n", "hub", r'base: this recipe has no base that "hub" could replace'),
        ("base = 3\n", None, r"base: expected the name of a recipe or a base, or the path of a file, got 3"),
    ],
)
def test_what_would_change_nothing_is_refused(
    tmp_path: Path, text: str, base: str | None, words: str
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_recipe(tmp_path / "mine.toml", {"base": base} if base else {})


def test_none_takes_a_table_away() -> None:
    cfg = load_recipe("rl_opd", {"evals": "none", "credit.group_advantage": "none", "rewards": "none"})
    assert (cfg.evals, cfg.credit, cfg.rewards) == ({}, {}, {})


def test_the_hash_is_of_the_work() -> None:
    plain = config_hash(load_recipe("opd"))
    assert config_hash(load_recipe("opd", {"track": {"kind": "tensorboard"}})) == plain
    assert config_hash(load_recipe("opd", {"learner.lr": 1e-4})) != plain
    code = "from reflux.config.recipe import *; print(config_hash(load_recipe('opd')))"
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip()
        == plain
    )


def test_differences_are_one_line_each() -> None:
    old = to_table(load_recipe("opd"))
    new = to_table(load_recipe("opd", {"learner.lr": 1e-4, "credit.prefix": {"length": 3}, "seed": 1}))
    lines = differences(old, new)
    assert [line.split(":")[0] for line in lines] == ["credit.prefix", "learner.lr", "seed"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("opd", {"max_lag": 1}, "max_lag: unexpected field; it is called 'max_staleness' now."),
        ("opd", {"normalise": "kept"}, "normalise: unexpected field; it is called 'loss_aggregation' now."),
        (
            "opd",
            {"loss_aggregation": "kept"},
            "loss_aggregation: the value 'kept' is called 'token-mean-weighted' now.",
        ),
        ("opd", {"loss_aggregation": "chosen"}, "the value 'chosen' is called 'token-mean' now."),
        (
            "opd",
            {"loss_aggregation": "rollout_means"},
            "the value 'rollout_means' is called 'seq-mean-token-mean' now.",
        ),
        (
            "opd",
            {"learner.noise_floor": 0},
            "learner.noise_floor: unexpected field; it is called 'min_grad_norm' now.",
        ),
        (
            "opd",
            {"accelerator": {"kind": "extrapolate"}},
            "accelerator: unexpected field; it is called 'extrapolation' now.",
        ),
        ("opd", {"teachers.main.as": "x"}, "teachers.main.as: unexpected field; it is called 'alias' now."),
        ("opd", {"teachers.main.kind": "own"}, "unknown teachers kind 'own'; it is called 'self' now."),
        ("opd", {"sampler.kind": "stored"}, "unknown samplers kind 'stored'; it is called 'references' now."),
        (
            "flow_sft",
            {"sampler.kind": "drawn"},
            "unknown samplers kind 'drawn'; it is called 'teacher_samples' now.",
        ),
        ("flow_sft", {"sampler.times": 3}, "sampler.times: unexpected field; it is called 'positions' now."),
        (
            "flow",
            {"sampler.length": 3},
            "sampler.length: unexpected field; it is called 'max_denoising_steps' now.",
        ),
        (
            "opd",
            {"credit.outcome": {}},
            "credit.outcome: unknown credit kind 'outcome'; it is called 'group_advantage' now.",
        ),
        (
            "opd",
            {"objectives": [{"kind": "outcome"}]},
            "unknown objectives kind 'outcome'; it is called 'policy_gradient' now.",
        ),
        (
            "opd",
            {"objectives.0.teacher": "said"},
            "objectives[0].teacher: the value 'said' is called 'behaviour' now.",
        ),
        (
            "release",
            {"credit.release.candidates": "said"},
            "credit.release.candidates: the value 'said' is called 'behaviour' now.",
        ),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(recipe: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, changes)
    assert words in str(refused.value)


def test_values_are_frozen() -> None:
    from dataclasses import FrozenInstanceError

    cfg = load_recipe("opd")
    for value in (cfg, cfg.learner, cfg.sampler, cfg.objectives[0], cfg.teachers["main"]):
        with pytest.raises(FrozenInstanceError):
            value.seed = 3


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        (
            "release",
            {"credit.release.segments": "sentance"},
            "segments: input should be 'sentences', 'lines' or 'steps', or input should be a valid",
        ),
        (
            "release",
            {"credit.release.segments": True},
            "segments: input should be 'sentences', 'lines' or 'steps', or input should be a valid",
        ),
        (
            "opd",
            {"teachers.main.routes": "add"},
            'teachers.main.routes: input should be a list, such as ["a", "b"], got \'add\'',
        ),
        (
            "effopd",
            {"extrapolation.include": []},
            "include lists parts of the names of the modules that move",
        ),
        ("effopd", {"extrapolation.include": [""]}, "the list and its entries must not be empty"),
        ("opd", {"learner.betas": [0.9]}, "learner.betas.1: field required"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_sentence(
    recipe: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, changes)
    assert words in str(refused.value)
    assert len(str(refused.value).split("\n")) == 1


def test_a_list_of_plain_values_is_set_whole() -> None:
    with pytest.raises(
        ConfigError, match=r"betas is a list of plain values. Set the whole list: betas=\[...\]"
    ):
        load_recipe("opd", ["learner.betas=[0.9,0.95]", "learner.betas.0=0.5"])


def test_bytes_that_are_no_text_are_refused_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"recipe.toml: not valid TOML"):
        load_recipe(str(path))
