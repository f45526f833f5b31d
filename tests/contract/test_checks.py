"""What does not fit is refused in a sentence with its remedy, before anything is loaded; what is wanted is joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reflux import checks
from reflux.config import load_recipe, recipe_names
from reflux.errors import ConfigError, ModelError
from reflux.rundir import Options, Run
from reflux.types import Wants

OUTCOME = {"credit.outcome": {}, "reward": {"kind": "verifier"}, "group_size": 2}
ILLEGAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "max_tokens below 1": (
        "opd",
        {"sampler.max_tokens": {"kind": "linear", "start": 6, "increment": -1}, "steps": 9},
        "sampler.max_tokens is 0 at step 6; an attempt needs at least 1 token",
    ),
    "max_tokens 0": ("opd", {"sampler.max_tokens": 0}, "sampler.max_tokens is 0 at step 0"),
    "no such teacher": ("opd", {"objectives.0.teacher": "other"}, "objectives[0].teacher: there is no teacher 'other'. Known: main"),
    "no teacher at all": ("opd", {"teachers.main": "none"}, "Add a [teachers.main] table."),
    "a divergence of what was said": (
        "full",
        {"objectives.0.teacher": "said"},
        "objectives[0]: divergence needs hidden states (the full distribution), but teacher 'said' offers",
    ),
    "shifts nobody takes": ("full", OUTCOME, "credit.outcome shifts advantages, but no objective takes a shift: 'divergence'"),
    "outcome without shifts": ("opd", {"objectives": [{"kind": "outcome"}]}, "learns from shifts alone, and no credit rule gives any"),
    "a group of one": ("rl", {"group_size": 1}, "credit.outcome compares attempts at one prompt: it needs group_size >= 2, got 1"),
    "no verdicts": ("rl", {"reward": "none"}, 'credit.outcome needs verdicts: add [reward] with kind = "verifier"'),
    "temperature": (
        "opd",
        {"sampler.temperature": 0.7},
        "make on-policy estimators biased. Use 1 and 1, or say sampler.allow_biased = true",
    ),
    "top_p": ("opd", {"sampler.top_p": 0.9}, "top_p = 0.9"),
    "policy gradient on given answers": ("sft", {"objectives": [{"kind": "outcome"}], **OUTCOME}, "gives answers it did not draw"),
    "no ratio with lag": ("opd", {"objectives.0.ratio": "none", "max_lag": 1}, 'ratio = "none" is biased on attempts of an older student'),
    "nll on own attempts": ("opd", {"objectives": [{"kind": "nll"}]}, "has an expected gradient of zero. Use sampler 'stored'"),
    "prefix on given answers": ("sft", {"credit.prefix": {"length": 5}}, "cutting answers the student did not write"),
    "two teachers of one name": (
        "opd",
        {"teachers.other": {"kind": "local", "model": "m", "as": "main", "routes": ["a"]}},
        "all answer as 'main', so each needs routes of its own",
    ),
    "one route twice": (
        "opd",
        {"teachers.main.routes": ["a"], "teachers.other": {"kind": "local", "model": "m", "as": "main", "routes": ["a"]}},
        "none of them shared",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_combination_is_refused_with_its_remedy(case: str) -> None:
    recipe, overrides, words = ILLEGAL[case]
    with pytest.raises(ConfigError) as refused:
        checks.join(load_recipe(recipe, overrides))
    assert words in str(refused.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        checks.join(load_recipe("rl", {"group_size": 1, "sampler.temperature": 0.5, "sampler.max_tokens": 0}))
    assert all(words in str(refused.value) for words in ("group_size >= 2", "temperature", "max_tokens"))


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_shipped_recipes_fit(recipe: str) -> None:
    wants = checks.join(load_recipe(recipe))
    assert wants.reward == (recipe in ("rl", "rl_opd"))


def test_biased_sampling_may_be_asked_for() -> None:
    checks.join(load_recipe("opd", {"sampler.temperature": 0.7, "sampler.allow_biased": True}))


def test_wants_join_and_the_largest_k_wins() -> None:
    joined = Wants(said=4, logp=True) | Wants(said=9, now_topk=3) | Wants(candidates=2, now_at_said=True, reward=True)
    assert joined == Wants(said=9, now_at_said=True, now_topk=3, logp=True, candidates=2, reward=True)


def test_warnings_name_what_is_seldom_meant() -> None:
    unheard = load_recipe("full", {"teachers.other": {"kind": "local", "model": "m"}})
    assert "teachers.other is asked, but no objective listens to it" in checks.warnings(unheard)[0]
    cut = load_recipe("rl", {"sampler.max_tokens": {"kind": "linear", "start": 8, "increment": 1}})
    assert any("unfinished answers" in text for text in checks.warnings(cut))
    assert checks.warnings(load_recipe("full")) == []


@pytest.mark.parametrize("where", ["learner.model", "teachers.main.model"])
def test_a_missing_model_folder_leaves_no_run_behind(where: str, tmp_path: Path) -> None:
    cfg = load_recipe("opd", {where: str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match=f"{where}: the folder .* does not exist"):
        Run.open(cfg, checks.join(cfg), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
