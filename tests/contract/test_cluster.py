"""What a cluster refuses and plans, and the model of its step."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tiny
from reflux import checks
from reflux.cluster.ray import Ray
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError
from reflux.inspection.plan import plan
from reflux.runtime.services import Services

ROOT = Path(__file__).parents[2]
CLUSTER = {"kind": "ray", "samplers": 2, "teachers": {"main": 1}}

# --- what a recipe may not ask for

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": ("full", {"cluster": {"kind": "ray"}}, "nothing is placed"),
    "no such teacher": ("full", {"cluster.teachers": {"mian": 1}}, "no teacher table 'mian'. It has: main"),
    "no actor": ("full", {"cluster.teachers": {"main": 0}}, "greater than or equal to 1"),
    "the student as teacher": (
        "full",
        {"teachers.main": {"kind": "self"}},
        "teacher 'main' is made from the student's own weights",
    ),
    "a served teacher": (
        "topk",
        {"teachers.main": {"kind": "vllm", "model": "m", "url": "http://localhost:1"}},
        "teacher 'main' is in a server already",
    ),
    "ranks of hf": ("full", {"cluster.learner_ranks": 2}, 'Use learner.kind = "fsdp"'),
    "references": (
        "sft",
        {"cluster": {"kind": "ray", "samplers": 1}},
        "takes its training attempts from elsewhere",
    ),
    "one server": (
        "full",
        {"sampler": {"kind": "vllm", "mode": "colocated", "max_tokens": 9}},
        'sampler.mode = "colocated" is one server',
    ),
    "a transfer between GPUs": (
        "full",
        {"sampler": {"kind": "vllm", "transfer": "nccl", "max_tokens": 9}},
        'sampler.transfer = "nccl" sends from the process of the learner',
    ),
    "more samplers than prompts": ("full", {"cluster.samplers": 5}, "each prompt goes to one sampler"),
    "more teachers than attempts": ("full", {"cluster.teachers": {"main": 5}}, "more than the attempts"),
    "one and a half": ("full", {"cluster.gpus_per_teacher": 1.5}, "whole GPUs, and not 1.5. Use 1 or 2"),
    "a store of a running cluster": (
        "full",
        {"cluster.address": "auto", "cluster.object_store_mb": 9},
        "object_store_mb is for a cluster that is started here",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_placed_is_refused_by_name(name: str, student: str, teacher: str) -> None:
    recipe, changes, words = REFUSED[name]
    whole = changes if "cluster" in changes else {"cluster": CLUSTER, **changes}
    with pytest.raises(ConfigError, match=words):
        checks.join(tiny.config(recipe, student, teacher, **whole))


def test_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="of images cannot be placed yet"):
        checks.join(load_recipe("flow", {"cluster": {"kind": "ray", "samplers": 1}}))


def test_what_fits_is_allowed(student: str, teacher: str) -> None:
    changes = {"learner.kind": "fsdp", "learner.model": student, "cluster": {**CLUSTER, "learner_ranks": 3}}
    cfg = tiny.config("full", student, teacher, **changes)
    checks.join(cfg)
    assert any("weights are sent" in text for text in checks.warnings(cfg))


def test_an_evaluation_that_loads_a_placed_teacher_is_told(student: str, teacher: str) -> None:
    changes: dict[str, Any] = {"cluster": CLUSTER, "sampler.dtype": "float32"}
    quiet = tiny.config("full", student, teacher, **changes)
    loud = tiny.config("full", student, teacher, **changes, **{"evals.teacher_accuracy": {}})
    told = [[text for text in checks.warnings(cfg) if "loads the teacher" in text] for cfg in (quiet, loud)]
    assert [len(texts) for texts in told] == [0, 1]


def test_a_recipe_without_a_cluster_has_no_such_table() -> None:
    from reflux.config.recipe import to_table

    assert "cluster" not in to_table(load_recipe("full"))
    assert isinstance(load_recipe("full", {"cluster.samplers": 2}).cluster, Ray)


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "reflux.cluster.placing", raising=False)
    cluster = Ray(samplers=1)
    with pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"):
        cluster.open(load_recipe("full").learner, Services(load_recipe("full").learner.student))


# --- the plan


def test_the_plan_says_who_holds_what_and_what_a_step_sends() -> None:
    cluster = {**CLUSTER, "gpus_per_sampler": 1, "cpus_per_teacher": 0.5}
    cfg = load_recipe("full", {"cluster": cluster, "sampler.dtype": "bfloat16"})
    found = plan(cfg)
    lines = dict(found.cluster)
    assert list(lines) == ["learner", "sampler", "teacher main", "in all", "traffic"]
    assert found.student.parameters is not None
    assert f"{16 * found.student.parameters / 1e6:.3g} MB of weights and optimiser" in lines["learner"]
    assert (
        f"2 actors, each 1 CPUs and 1 GPUs, {2 * found.student.parameters / 1e6:.3g} MB" in lines["sampler"]
    )
    assert lines["in all"].startswith("3.5 CPUs and 2 GPUs")
    shape = found.teachers["main"].shape
    assert shape is not None
    assert f"'main' sends {4 * shape.width / 1e3:.3g} kB a position" in lines["traffic"]
    assert plan(load_recipe("full")).cluster == []


def blocks() -> list[str]:
    return re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("text", blocks())
def test_the_tables_of_the_guide_fit(text: str) -> None:
    learner = {"learner.kind": "fsdp", "learner.model": "reflux:student", "learner.lr": 1e-3}
    cfg = load_recipe("full", {**tomllib.loads(text), **learner})
    checks.join(cfg)
    assert cfg.cluster is not None
    assert sum(bundle.gpus for bundle in cfg.cluster.bundles) in (8, 32)


@pytest.fixture(scope="module")
def model() -> ModuleType:
    """benchmarks/cluster_model.py"""
    spec = importlib.util.spec_from_file_location("cluster_model", ROOT / "benchmarks" / "cluster_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_model_of_a_step_counts_what_is_sent(model: ModuleType) -> None:
    teacher = model.MODELS["8B"]
    sizes = [model.row_bytes(teacher, gives, 4) for gives in ("hidden", "top64", "logits")]
    assert sizes == [16_384, 520, 607_744]
    rates, links, step = (
        model.Rates(100, 50, 25),
        model.Links(card=1000, copies=500, call_s=0.5),
        model.Step(800, 200),
    )
    found = model.seconds(model.Split(4, 2, 1, 2), rates, links, step, sent_bytes=1000, row=5)
    assert (found.sample_s, found.score_s, found.learn_s) == (2, 20, 40)
    # packed once, and sent to one machine; targets over the card, and unpacked; five actors, asked twice
    assert (found.sync_s, found.targets_s, found.calls_s) == (3, 12, 5)
    assert found.one_after_another == 82
    assert (found.overlapped, found.slowest) == (52, "learn")
    # The targets go on to the other ranks.
    assert model.seconds(model.Split(4, 2, 2, 2), rates, links, step, 1000, 5).targets_s == 24


def test_the_model_tries_splits_of_the_whole_cluster(model: ModuleType) -> None:
    tried = list(model.splits(32, 4, 3))
    assert tried
    for each in tried:
        assert each.samplers + each.teachers + each.ranks == 32
        assert each.samplers >= 1
        assert each.teachers % 4 == 0
        assert each.ranks >= 3
