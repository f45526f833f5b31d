"""Texts and images do not mix; what needs words, noise or one guidance is refused before anything is loaded,
with its remedy.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from reflux import checks
from reflux.config.recipe import load_recipe
from reflux.config.requirements import Requirements
from reflux.errors import ConfigError, DataError, ModelError
from reflux.inspection.plan import plan
from reflux.samplers.teacher_samples import drawers
from reflux.teachers.flow import Flow as FlowTeacher
from reflux.training import Options, Run
from reflux.types import FlowRollout

KL, MSE = {"kind": "velocity_kl"}, {"kind": "velocity_kl", "weight": "mse"}
TEXT_TEACHER = {"kind": "local", "model": "m"}
FLOW_TEACHER = {"kind": "flow", "model": "m"}
VERDICTS = {"rewards": {"verifier": {}}, "group_size": 4}
ODE_JUMPS = {
    "extrapolation": {"kind": "extrapolate", "score": "minus_kl"},
    "teachers": {"main": FLOW_TEACHER},
}
GIVEN = "sampler 'teacher_samples' gives states without noise, so the KL is infinite"
ILLEGAL: dict[str, tuple[str, dict[str, Any], str]] = {
    # parts of both kinds
    "a sampler of texts": (
        "flow",
        {"sampler": {"kind": "hf"}},
        "task 'glyphs' asks for images, which sampler ('hf') cannot handle. Use sampler.kind = \"flow\".",
    ),
    "a learner of texts": (
        "flow",
        {"learner": {"kind": "hf", "model": "m"}},
        "learner ('hf') cannot handle. Use learner.kind = \"flow\".",
    ),
    "one teacher of texts": (
        "flow",
        {"teachers.digits": {**TEXT_TEACHER, "alias": "main", "routes": ["digits"]}},
        "which teachers.digits ('local') cannot handle. Use teachers.digits.kind = \"flow\".",
    ),
    "itself as teacher": (
        "flow",
        {"teachers.anchor": {"kind": "self"}},
        "teachers.anchor ('self') cannot handle.",
    ),
    "images of a text task": (
        "full",
        {"task": {"kind": "glyphs"}},
        "no other part supports those: sampler ('hf'), learner ('hf'), ",
    ),
    "texts of an image task": (
        "flow",
        {"task": {"kind": "word_problems"}},
        "task 'word_problems' asks for texts, and no other part supports those: sampler ('flow'), learner "
        "('flow'), teachers.",
    ),
    "a teacher of images": (
        "full",
        {"teachers.main": FLOW_TEACHER},
        "task 'word_problems' asks for texts, which teachers.main ('flow') cannot handle. Use "
        'teachers.main.kind = "local".',
    ),
    "a sampler of images": (
        "full",
        {"sampler": {"kind": "flow"}},
        "sampler ('flow') cannot handle. Use sampler.kind = \"hf\".",
    ),
    "two at once": (
        "full",
        {"sampler": {"kind": "flow"}, "learner": {"kind": "flow", "model": "m"}},
        "sampler ('flow'), learner ('flow') cannot handle. Use sampler.kind = \"hf\", learner.kind = \"hf\".",
    ),
    # words of an image
    "a divergence of velocities": (
        "flow",
        {"objectives": [{"kind": "divergence"}]},
        "divergence needs hidden states (the full distribution), but teacher 'main' offers the velocity at "
        "each denoising step. "
        'For images use kind = "velocity_kl".',
    ),
    "a sampled KL of velocities": (
        "flow",
        {"objectives": [{"kind": "sampled_kl"}]},
        "but teacher 'main' offers the velocity at each denoising step. For images use",
    ),
    "a sampled KL of what was said": (
        "flow",
        {"objectives": [{"kind": "sampled_kl", "teacher": "behaviour"}], "max_staleness": 1},
        "but teacher 'behaviour' offers the velocity at each denoising step",
    ),
    "velocities of a text model": (
        "full",
        {"objectives": [KL]},
        "velocity_kl needs the velocity at each denoising step, but teacher 'main' offers hidden states (the "
        "full distribution). "
        'This objective compares flow models; for texts use kind = "divergence" or "sampled_kl".',
    ),
    "velocities of texts said": (
        "opd",
        {"objectives": [{**KL, "teacher": "behaviour"}], "max_staleness": 1},
        "but teacher 'behaviour' offers the sampled token's log-prob, a top-k list. This",
    ),
    "a baseline of siblings' words": (
        "flow",
        {"objectives": [{"kind": "sampled_kl", "baseline": "leave_one_out"}], "group_size": 2},
        "objectives[0] ('sampled_kl') needs the teacher's log-probs of tokens, and image attempts have "
        "none. Remove it.",
    ),
    "nll": (
        "flow",
        {"objectives": [{"kind": "nll"}]},
        "objectives[0] ('nll') learns the tokens of given answers, and images have no tokens.",
    ),
    "nll of drawn images": (
        "flow_sft",
        {"objectives": [{"kind": "nll"}]},
        "learns the tokens of given answers, and images have no tokens.",
    ),
    "margin": (
        "flow_grpo",
        {"credit.margin": {"teacher": "main"}, "teachers": {"main": FLOW_TEACHER}},
        "credit.margin ('margin') needs the teacher's log-probs of tokens, and image attempts have none.",
    ),
    "margin of now": (
        "flow_grpo",
        {"credit.margin": {"teacher": "main", "student": "now"}, "teachers": {"main": FLOW_TEACHER}},
        "needs the student's likeliest tokens and the teacher's log-probs of tokens, and image attempts "
        "have none.",
    ),
    "release": (
        "flow",
        {"credit.release": {"segments": 4}, "loss_aggregation": "token-mean"},
        "credit.release ('release') needs the teacher's log-probs at the student's likeliest tokens, and "
        "image attempts have none.",
    ),
    "special tokens left out": (
        "flow",
        {"credit.prefix": {"length": 4, "special_tokens": False}},
        "credit.prefix ('prefix') needs the special tokens, and image attempts have none. Remove it.",
    ),
    "release by sentences": (
        "flow",
        {"credit.release": {"segments": "sentences"}, "loss_aggregation": "token-mean"},
        "at the student's likeliest tokens and the characters that each token wrote, and image attempts "
        "have none.",
    ),
    "peers": (
        "flow",
        {"teachers.anchor.context": {"kind": "peers"}, **VERDICTS},
        "teachers.anchor.context ('peers') adds text to the teacher's prompt, and image attempts have no "
        "text. Use 'same'.",
    ),
    "privileged": (
        "flow",
        {"teachers.anchor.context": {"kind": "privileged"}},
        "teachers.anchor.context ('privileged') adds text to the teacher's prompt",
    ),
    "variance": (
        "flow",
        {"log_variance": True},
        "log_variance = true measures the variance of a sampled gradient",
    ),
    # steps without noise
    "the KL of the ODE": (
        "flow",
        {"sampler.noise_level": 0},
        "sampler.noise_level = 0 makes the denoising steps deterministic, so the KL is infinite. "
        'Use weight = "mse", or a noise_level '
        "above 0, such as 0.7.",
    ),
    "the anchor's KL of the ODE": (
        "flow",
        {"sampler.noise_level": 0, "objectives.0.weight": "mse"},
        "objectives[1]: sampler.noise_level = 0",
    ),
    "outcome of the ODE": (
        "flow_grpo",
        {"sampler.noise_level": 0},
        "sampler.noise_level = 0 makes the denoising steps deterministic, so policy_gradient has no "
        "log-probs to work with. Use a "
        "noise_level above 0, such as 0.7.",
    ),
    "the KL of drawn images": ("flow_sft", {"objectives.0.weight": "kl"}, f'{GIVEN}. Use weight = "mse".'),
    "the KL of drawn images to a teacher": ("flow_sft", {"objectives": [{**KL, "teacher": "main"}]}, GIVEN),
    "outcome of drawn images": (
        "flow_sft",
        {"objectives": [{"kind": "policy_gradient"}], "credit.group_advantage": {}, **VERDICTS},
        "needs attempts that the student sampled, but the attempts of sampler 'teacher_samples' "
        "come from elsewhere. Use velocity_kl.",
    ),
    "jumps by the KL of the ODE": (
        "flow_grpo",
        {**ODE_JUMPS, "sampler.noise_level": 0},
        'extrapolation.score = "minus_kl" computes the KL of random denoising steps, but sampler.noise_level '
        "= 0 makes them deterministic and the KL infinite.",
    ),
    "jumps by the KL of an inner ODE": (
        "flow_sft",
        {"extrapolation": ODE_JUMPS["extrapolation"], "sampler.generate.noise_level": 0},
        "but sampler.generate.noise_level = 0 makes them deterministic and the KL infinite. Use a "
        "noise_level above 0, such as 0.7",
    ),
    # one guidance
    "a teacher of another guidance": (
        "flow",
        {"teachers.digits.guidance": 2.0},
        "teachers.digits.guidance is 2, but the student is sampled with guidance 1: student and teachers "
        "must use the same guidance",
    ),
    "a student of another guidance": (
        "flow",
        {"teachers.anchor.guidance": 4.5, "sampler.guidance": 4},
        "is 4.5, but the student is sampled with",
    ),
    "drawn at another guidance": (
        "flow_sft",
        {"teachers.digits.guidance": 1.0, "sampler.generate.guidance": 3},
        "teachers.digits.guidance is 1, but the student is sampled with guidance 3",
    ),
    # routes
    "an unserved route": (
        "flow",
        {"teachers.counts": "none", "teachers.anchor": "none", "objectives": [KL]},
        "prompts of the route 'counts', but the teachers that objectives use serve only digits",
    ),
    "a route in its plural": (
        "flow",
        {"teachers.counts.routes": ["count"]},
        "but the teachers of the alias 'main' serve only count, digits.",
    ),
    "an unserved route without anchor": (
        "flow",
        {"teachers.anchor": "none", "objectives": [KL], "teachers.counts.routes": ["count"]},
        "the teachers that objectives use serve only count, digits",
    ),
    "nobody draws a route": (
        "flow_sft",
        {"teachers.counts.routes": ["count"]},
        "for the route 'counts' no teacher samples it. Give that route to exactly one teacher "
        "table of kind flow, or leave the other teacher tables out.",
    ),
    "two draw one route": (
        "flow_sft",
        {"teachers.second": {**FLOW_TEACHER, "routes": ["digits"]}},
        "for the route 'digits' digits and second could sample it",
    ),
}
LEGAL: dict[str, tuple[str, dict[str, Any]]] = {
    "a student without noise": ("flow", {"sampler.noise_level": 0, "objectives.0.weight": "mse",
                                         "objectives.1.weight": "mse"}),
    "the same guidance, said": ("flow", {"sampler.guidance": 4.5, "teachers.digits.guidance": 4.5}),
    "prefixes": ("flow", {"sampler.max_denoising_steps": {"kind": "linear", "start": 2, "increment": 0.1,
                                                          "stop": 10}}),
    "prefixes by weight": ("flow", {"credit.prefix": {"length": 4}}),
    "early times of drawn images": ("flow_sft", {"credit.prefix": {"length": 4}}),
    "positions": ("flow", {"credit.position": {"weight": {"kind": "constant", "value": 0.5}}}),
    "staleness": ("flow", {"max_staleness": 2}),
    "the student of then as anchor": ("flow", {"objectives.1.teacher": "behaviour", "max_staleness": 1}),
    "a verifier and teachers": (
        "flow",
        {"objectives": [KL, {"kind": "policy_gradient"}], "credit.group_advantage": {}, **VERDICTS},
    ),
    "balance": ("flow", {"credit.balance": {}, "loss_aggregation": "seq-mean-token-mean", **VERDICTS}),
    "jumps": ("flow", {"extrapolation": {"kind": "extrapolate"}}),
    "jumps by the KL": ("flow", {"extrapolation": {"kind": "extrapolate", "score": "minus_kl"}}),
    "jumps by the KL over drawn "
    "images": ("flow_sft", {"extrapolation": {"kind": "extrapolate", "score": "minus_kl"}}),
    "jumps of the ODE by accuracy": (
        "flow",
        {
            "extrapolation": {"kind": "extrapolate"},
            "sampler.noise_level": 0,
            "objectives.0.weight": "mse",
            "objectives.1.weight": "mse",
        },
    ),
    "foresight": ("flow", {"evals.foresight": {}}),
    "a teacher's velocities at drawn images": ("flow_sft", {"objectives.0.teacher": "main"}),
    "one specialist and an "
    "anchor": ("flow", {"teachers.counts": "none", "teachers.digits.alias": "digits",
                        "objectives.0.teacher": "digits", "evals.agreement.teacher": "digits",
                        "evals.teacher_accuracy.teacher": "digits"}),
    "everyone draws with one": ("flow_sft", {"teachers.digits": "none",
                                             "teachers.counts": {**FLOW_TEACHER, "routes": []}}),
}  # fmt: skip


@pytest.mark.parametrize("case", ILLEGAL)
def test_what_does_not_fit_is_refused_with_its_remedy(case: str) -> None:
    recipe, overrides, words = ILLEGAL[case]
    with pytest.raises(ConfigError) as refused:
        checks.join(load_recipe(recipe, overrides))
    assert words in str(refused.value)


@pytest.mark.parametrize("case", LEGAL)
def test_what_flows_can_do_is_let_through(case: str) -> None:
    checks.join(load_recipe(*LEGAL[case]))


def test_parts_of_another_kind_are_one_sentence() -> None:
    changes = {
        "sampler": {"kind": "hf"},
        "learner": {"kind": "hf", "model": "m"},
        "teachers.anchor": TEXT_TEACHER,
    }
    with pytest.raises(ConfigError) as refused:
        checks.join(load_recipe("flow", changes))
    assert str(refused.value).count("cannot handle") == 1


def test_every_want_is_of_texts_or_of_both() -> None:
    """A new field of Requirements has to be sorted: an image has what its student said, and a verdict; all
    else is made of words.
    """
    from reflux.checks.domains import _WORDS

    both = {"behaviour", "now_at_behaviour", "supervision_drift", "reward"}
    assert {field.name for field in dataclasses.fields(Requirements)} == both | set(_WORDS)
    assert not both & set(_WORDS)


def test_a_flow_wants_what_velocities_can_give() -> None:
    assert checks.join(load_recipe("flow")) == Requirements()
    assert checks.join(load_recipe("flow_sft")) == Requirements(behaviour=1)
    assert checks.join(load_recipe("flow_grpo")) == Requirements(reward=True)


def test_who_really_draws_the_students_pictures() -> None:
    assert load_recipe("opd").sampler.generation.grids == ()
    assert load_recipe("flow", {"sampler.steps": 7}).sampler.generation.grids[0] == 7
    assert load_recipe("flow_sft", {"sampler.generate.eval_steps": 9}).sampler.generation.grids[1] == 9


def test_a_route_is_drawn_by_the_table_that_names_it() -> None:
    one, all_ = FlowTeacher("a", routes=("digits", "rest")), FlowTeacher("b")
    assert drawers({"one": one, "all": all_}, "digits") == ["one"]
    assert drawers({"one": one, "all": all_}, "counts") == ["all"]
    assert drawers({"one": one, "all": all_}, None) == ["all"]
    assert drawers({"one": one}, None) == []
    assert drawers({"all": all_, "more": all_}, "x") == ["all", "more"]


# --- what works but is seldom meant


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teachers.anchor.model": "reflux:glyph_digits"},
            "teachers.digits is the model of 'anchor' too: on the prompts of this table the weight",
        ),
        (
            {"objectives.1.teacher": "main", "objectives.1.coef": 0.5, "teachers.anchor": "none"},
            "teachers.digits is the model of 'main' too: on the prompts of this table the weight",
        ),
        (
            {"objectives.1.scale": "released"},
            'objectives[1]: scale = "released" is the KL times |dt| / D, and objectives[0] has no such',
        ),
        (
            {"objectives.0.scale": "released"},
            'objectives[0]: scale = "released" is the KL times |dt| / D, and objectives[1] has no such',
        ),
        (
            {"objectives.1.teacher": "behaviour", "teachers.anchor": "none"},
            "objectives[1] has the teacher 'behaviour' at max_staleness = 0",
        ),
        (
            {"teachers.counts": "none"},
            "objectives[0]: no teacher called 'main' serves the route 'counts', so only other objectives "
            "train on those prompts.",
        ),
        ({"teachers.more": FLOW_TEACHER}, "teachers.more scores attempts, but no objective uses it"),
    ],
)
def test_what_is_seldom_meant_is_said(changes: dict[str, Any], words: str) -> None:
    assert checks.warnings(load_recipe("flow")) == []
    cfg = load_recipe("flow", changes)
    checks.join(cfg)
    assert any(words in warning for warning in checks.warnings(cfg))


def test_an_adapter_is_another_model_than_its_base_and_a_silent_anchor_adds_nothing() -> None:
    assert (
        checks.warnings(
            load_recipe(
                "flow", {"teachers.anchor.model": "reflux:glyph_digits", "teachers.anchor.adapter": "x"}
            )
        )
        == []
    )
    assert (
        checks.warnings(
            load_recipe("flow", {"teachers.anchor.model": "reflux:glyph_digits", "objectives.1.coef": 0.0})
        )
        == []
    )
    assert (
        checks.warnings(
            load_recipe("flow", {"objectives.0.scale": "released", "objectives.1.scale": "released"})
        )
        == []
    )


def test_teachers_that_draw_are_asked_for_a_reason() -> None:
    assert checks.warnings(load_recipe("flow_sft")) == []
    assert checks.warnings(load_recipe("flow_sft", {"max_staleness": 1})) == []


# --- images of a user's own prompts


def images(folder: Path, **fields: Any) -> dict[str, Any]:
    lines = [{"prompt": "a sign that says go", "route": "text"}, {"prompt": "two cats", "route": "objects"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "kind": "jsonl",
        "path": str(folder / "prompts.jsonl"),
        "makes": "image",
        "grader": "none",
        "validation": 0.0,
        **fields,
    }


def test_lines_of_prompts_may_ask_for_pictures(tmp_path: Path) -> None:
    cfg = load_recipe("flow", {"base": "sd3", "task.path": images(tmp_path)["path"]})
    checks.join(cfg)
    assert cfg.task.rollouts is FlowRollout
    assert cfg.task.routes == {"text", "objects"}
    with pytest.raises(
        ConfigError,
        match="prompts of the route 'text', but the teachers of the alias 'main' serve only objects, texts",
    ):
        checks.join(
            load_recipe(
                "flow",
                {"base": "sd3", "task.path": images(tmp_path)["path"], "teachers.text.routes": ["texts"]},
            )
        )
    with pytest.raises(ConfigError, match=r"task 'jsonl' asks for texts, and no other part supports those"):
        checks.join(load_recipe("flow", {"task": images(tmp_path, makes="text")}))


@pytest.mark.parametrize("grader", ["math", "exact"])
def test_a_grader_of_texts_judges_no_picture(tmp_path: Path, grader: str) -> None:
    with pytest.raises(
        ConfigError, match=f'grader "{grader}" judges texts. For images use "my_module:function", or "none"'
    ):
        load_recipe("flow", {"task": images(tmp_path, grader=grader)})


def test_a_judge_of_ones_own_meets_the_picture(tmp_path: Path) -> None:
    import numpy as np

    from reflux.tasks.jsonl import Jsonl

    task = Jsonl(
        **{
            key: value
            for key, value in images(tmp_path, grader="outside:brightness").items()
            if key != "kind"
        }
    )
    (first, *_) = task._load("train", str(tmp_path / "prompts.jsonl"))
    verdict = task.verify(first, np.full((4, 4), 51, dtype=np.uint8))
    assert (verdict.value, verdict.parts) == (1.0, {"brightness": 0.2})  # type: ignore[union-attr]


def test_verdicts_that_nobody_gives_are_refused(tmp_path: Path) -> None:
    """Hours of sampling, and nothing to learn from."""
    nobody = {"base": "sd3", "task.path": images(tmp_path)["path"], "learner.average": "none"}
    jumps = {"extrapolation": {"kind": "extrapolate"}}
    for recipe, changes, words in (
        (
            "flow_grpo",
            {},
            "rewards.verifier: the verifier takes the verdicts of the task, and with the grader "
            '"none" nothing is ever judged.',
        ),
        (
            "flow",
            jumps,
            'extrapolation.score = "accuracy" compares weights by the task\'s verdicts, but its grader '
            '"none" gives none.',
        ),
    ):
        with pytest.raises(ConfigError) as refused:
            checks.join(load_recipe(recipe, nobody | changes))
        assert words in str(refused.value)
        assert 'task.grader = "my_module:function"' in str(refused.value)
        checks.join(load_recipe(recipe, nobody | changes | {"task.grader": "outside:brightness"}))
    checks.join(load_recipe("flow", nobody | {"extrapolation": {"kind": "extrapolate", "score": "minus_kl"}}))
    # which judges by itself
    checks.join(load_recipe("flow_grpo", nobody | {"rewards": {"verifier": {"kind": "outside:Dark"}}}))
    silent, judged = images(tmp_path), images(tmp_path, grader="outside:brightness")
    rewarded = {"task": {"kind": "mix", "parts": {"a": silent, "b": silent}}}
    with pytest.raises(ConfigError, match="nothing is ever judged"):
        checks.join(load_recipe("flow_grpo", rewarded))
    checks.join(load_recipe("flow_grpo", {"task": {"kind": "mix", "parts": {"a": silent, "b": judged}}}))


@pytest.mark.parametrize(
    "module", ["nosuch", "outside.inner", "reflux.tasks.nosuch", "reflux.nosuch.tasks", "__main__.x", ""]
)
def test_a_grader_that_is_nowhere_is_refused(tmp_path: Path, module: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.grader: there is no module \'{module}\'\."):
        checks.join(load_recipe("flow_grpo", {"task": images(tmp_path, grader=f"{module}:judge")}))
    mixed = {
        "kind": "mix",
        "parts": {"a": {"kind": "glyphs"}, "b": images(tmp_path, grader=f"{module}:judge")},
    }
    with pytest.raises(ConfigError, match=r"task\.parts\.b\.grader: there is no module"):
        checks.join(load_recipe("flow_grpo", {"task": mixed}))


def test_a_grader_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges" / "inner").mkdir(parents=True)
    source = "raise RuntimeError('this loads for minutes')\ndef judge(): ...\n"
    for file in ("__init__.py", "inner/__init__.py", "inner/heavy.py"):
        (tmp_path / "my_judges" / file).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("my_judges", "my_judges.inner", "my_judges.inner.heavy"):
        checks.join(load_recipe("flow_grpo", {"task": images(tmp_path, grader=f"{module}:judge")}))
    with pytest.raises(ConfigError, match=r"no module 'my_judges\.inner\.light'"):
        checks.join(
            load_recipe("flow_grpo", {"task": images(tmp_path, grader="my_judges.inner.light:judge")})
        )


# --- models and adapters that are not there, or of the other kind: before a directory is made, and in a plan

NOWHERE = r"there is no adapter in .*: give a folder with adapter_config\.json"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a teacher's adapter": (
        "flow",
        {"teachers.digits.adapter": "nowhere/at/all"},
        rf"teachers\.digits\.adapter: {NOWHERE}",
    ),
    "one beside here": (
        "flow",
        {"teachers.digits.adapter": "./nowhere"},
        rf"teachers\.digits\.adapter: {NOWHERE}",
    ),
    "the student's adapter": (
        "flow",
        {"learner.merge": "none", "learner.adapter": "a/b/c"},
        rf"learner\.adapter: {NOWHERE}",
    ),
    "a shipped adapter": (
        "flow",
        {"learner.merge": "none", "learner.adapter": "reflux:glyph_base"},
        r"learner\.adapter: there is no adapter in reflux:glyph_base",
    ),
    "one of a merge": (
        "flow",
        {"learner.merge.models": ["reflux:glyph_digits", "runs/no/such"]},
        r"learner\.merge\.models\[1\]: the folder runs/no/such does not exist",
    ),
    "a merge with texts": (
        "flow",
        {"learner.merge.models": ["reflux:student", "reflux:glyph_digits"]},
        r"learner\.merge\.models\[0\]: reflux:student is not a flow model: its folder has no "
        r"model_index\.json\. .* kind = \"hf\"",
    ),
    "a flow of texts": (
        "flow",
        {"learner.model": "reflux:student"},
        r"learner\.model: reflux:student is not a flow model",
    ),
    "a flow teacher of texts": (
        "flow",
        {"teachers.anchor.model": "reflux:teacher"},
        r"teachers\.anchor\.model: reflux:teacher is not a flow model: .* kind = \"local\"",
    ),
    "texts of a flow": (
        "opd",
        {"learner.model": "reflux:glyph_base"},
        r"learner\.model: reflux:glyph_base is not a text model: its folder has a model_index\.json and no "
        r"config\.json\.",
    ),
    "a teacher of texts that draws": (
        "opd",
        {"teachers.main.model": "reflux:glyph_base"},
        r"teachers\.main\.model: .* is not a text model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_not_load_is_refused_before_it_is_tried(case: str, tmp_path: Path) -> None:
    recipe, changes, words = WRONG[case]
    cfg = load_recipe(recipe, changes)
    with pytest.raises(ModelError, match=words):
        plan(cfg)
    with pytest.raises(ModelError, match=words):
        Run.open(cfg, checks.join(cfg), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_adapters_that_are_there_or_on_the_hub_are_let_through(tmp_path: Path) -> None:
    """A folder, a run directory that trained one, a hub id; of a merge models and adapters alike. Nothing is
    asked of the hub.
    """
    for name in ("peft", "run/student"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).write_bytes(b"")
    here, run = str(tmp_path / "peft"), str(tmp_path / "run")
    checks.models(
        load_recipe(
            "flow",
            {
                "teachers.digits.adapter": here,
                "teachers.counts.adapter": run,
                "teachers.anchor.adapter": "me/mine",
            },
        )
    )
    checks.models(load_recipe("flow", {"learner.merge.models": [here, "me/mine"]}))
    checks.models(
        load_recipe("flow", {"learner.merge.models": ["reflux:glyph_digits", "reflux:glyph_counts"]})
    )
    checks.models(load_recipe("flow", {"base": "sd3"}))
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"learner\.adapter: .* has only a part of an adapter"):
        checks.models(load_recipe("flow", {"learner.merge": "none", "learner.adapter": here}))


def test_routes_are_read_only_where_they_decide() -> None:
    """A file of prompts that is not here yet does not stand in the way of a plan with one teacher."""
    nowhere = {"task": {"kind": "jsonl", "path": "/no/where.jsonl"}}
    cfg = load_recipe("opd", nowhere)
    checks.join(cfg)
    assert checks.warnings(cfg) == []
    with pytest.raises(DataError, match="cannot read /no/where"):
        checks.join(load_recipe("opd", {**nowhere, "teachers.main.routes": ["a"]}))
