"""Every part describes itself through the same methods, and plan, checks and report read these methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reflux import checks
from reflux.config.context import StudentSpec
from reflux.config.groups import BASES
from reflux.config.recipe import load_recipe
from reflux.config.registry import kinds, part, within
from reflux.errors import ConfigError
from reflux.inspection.plan import plan
from reflux.reports.diagnostics import own_charts
from reflux.reports.recorded import Recorded
from reflux.samplers.base import SamplerPart
from reflux.samplers.flow import Flow
from reflux.samplers.hf import HF
from reflux.samplers.references import References
from reflux.samplers.teacher_samples import TeacherSamples
from reflux.tasks.gsm8k import Gsm8k
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.mix import Mix
from reflux.tasks.word_problems import WordProblems
from reflux.teachers.self_teacher import SelfTeacher

SHIPPED = [part(group, kind) for group in BASES for kind in kinds(group)]


def test_every_part_of_a_run_is_found_with_its_place() -> None:
    mix = {"kind": "mix", "parts": {"a": {"kind": "word_problems"}}}
    stored = {"kind": "references", "generate": {"kind": "hf", "max_tokens": 8}}
    cfg = load_recipe("opd", {"task": mix, "sampler": stored, "credit.prefix": {"length": 3}})
    places = [(where, group) for where, group, _ in within(cfg)]
    assert places[:6] == [
        ("task", "tasks"),
        ("task.parts.a", "tasks"),
        ("sampler", "samplers"),
        ("sampler.generate", "samplers"),
        ("learner", "learners"),
        ("objectives[0]", "objectives"),
    ]
    assert {
        ("teachers.main", "teachers"),
        ("teachers.main.context", "contexts"),
        ("credit.prefix", "credit"),
    } <= set(places)
    # schedules are numbers
    assert not [where for where, _ in places if where.endswith("length")]


@pytest.mark.parametrize("cls", SHIPPED, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_shipped_part_may_be_asked_everything(cls: Any) -> None:
    assert isinstance(cls.when, str)
    for name in ("refusals", "advice", "papers", "inputs", "diagnostics"):
        assert callable(getattr(cls, name)), (
            f"{cls.__name__} has a key named {name}, which hides what a part says of itself"
        )


def refused(recipe: str, changes: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        checks.join(load_recipe(recipe, changes))
    return str(error.value).splitlines()


@pytest.mark.parametrize(("group", "kind"), [(group, kind) for group in BASES for kind in kinds(group)])
def test_every_shipped_part_is_whole_by_its_dotted_name(group: str, kind: str) -> None:
    """As one from outside it would be refused if it lacked a member of its protocol."""
    assert part(group, kinds(group)[kind]) is part(group, kind)


def test_two_margins_at_odds_are_told_once() -> None:
    behaviour = refused("uni_opd", {"credit.margin.action": "mask", "credit.other": {"kind": "margin"}})
    assert [line for line in behaviour if "one margin rule" in line] == [
        "credit.margin and credit.other: one margin rule uses shifts and another masks. Keep one of them."
    ]


def test_turns_of_a_task_without_any_are_told() -> None:
    told = "sampler: max_turns and turns have no effect"
    for turns in ({"sampler.max_turns": 3}, {"sampler.turns": "ready"}):
        assert [line for line in checks.warnings(load_recipe("opd", turns)) if line.startswith(told)]
    chat = {"task": {"kind": "outside:Chat", "replies": 1}, "sampler.max_turns": 3}
    for quiet in ({}, chat):
        assert not [line for line in checks.warnings(load_recipe("opd", quiet)) if line.startswith(told)]


def test_two_scales_are_told_once() -> None:
    released = {"kind": "velocity_kl", "scale": "released"}
    cfg = load_recipe(
        "flow",
        {"objectives": [released, {**released, "coef": 0.5}, {"kind": "velocity_kl", "teacher": "anchor"}]},
    )
    assert [
        text.split(":")[0] for text in checks.warnings(cfg) if "their coefs are not comparable" in text
    ] == ["objectives[0]"]


def test_teachers_of_one_flow_hold_it_once() -> None:
    one = {"teachers.digits.model": "reflux:glyph_base", "teachers.counts.model": "reflux:glyph_base"}
    together = plan(load_recipe("flow", {**one, "teachers.anchor.model": "reflux:glyph_base"})).memory_bytes
    apart = plan(load_recipe("flow")).memory_bytes
    assert together is not None
    assert apart is not None
    base = plan(load_recipe("flow")).student.stored_bytes
    assert apart - together == 2 * (base or 0) > 0


def flops(recipe: str, changes: dict[str, Any]) -> float:
    found = plan(load_recipe(recipe, changes)).flops_at_most
    assert found
    return found


def test_guidance_takes_two_passes_and_a_drawn_picture_all_its_steps() -> None:
    assert flops("flow", {"sampler.guidance": 2.0}) == pytest.approx(2 * flops("flow", {}))
    one = {"sampler.positions": 10, "sampler.generate.eval_steps": 10}
    assert flops("flow_sft", {**one, "sampler.generate.eval_steps": 40}) == pytest.approx(
        4 * flops("flow_sft", one)
    )
    assert flops("flow_sft", {**one, "sampler.generate.eval_steps": 5}) == pytest.approx(
        flops("flow_sft", one)
    )
    assert flops("flow_sft", {**one, "sampler.generate.guidance": 3.0}) == pytest.approx(
        2 * flops("flow_sft", one)
    )


@pytest.mark.parametrize("recipe", ["opd", "flow"])
def test_adapters_take_less_than_all_weights(recipe: str) -> None:
    whole, adapters = (plan(load_recipe(recipe, changes)) for changes in ({}, {"learner.lora": {"rank": 2}}))
    assert whole.memory_bytes is not None
    assert adapters.memory_bytes is not None
    assert whole.memory_bytes - adapters.memory_bytes == 12 * (whole.student.parameters or 0)


def test_a_plan_asks_no_prompt_of_what_lies_on_the_hub(tmp_path: Path) -> None:
    here, there = Jsonl(str(tmp_path / "p.jsonl")), Jsonl(dataset="somebody/questions")
    assert [task.local for task in (here, there, Gsm8k(), Gsm8k(str(tmp_path)), WordProblems())] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert (Mix({"a": here, "b": WordProblems()}).local, Mix({"a": here, "b": there}).local) == (True, False)
    plan(load_recipe("opd", {"task": {"kind": "gsm8k"}}))


def test_a_mix_judges_where_one_of_its_tasks_does() -> None:
    silent = Jsonl("p.jsonl", grader="none")
    assert (silent.judges, Mix({"a": silent, "b": WordProblems()}).judges, Mix({"a": silent}).judges) == (
        False,
        True,
        False,
    )


def test_parts_inside_others_show_themselves_too(tmp_path: Path) -> None:
    inner = {"kind": "outside:Showing", "max_tokens": 4}
    charts = own_charts({"sampler": {"kind": "references", "generate": inner}}, Recorded(tmp_path), [])
    assert [chart.title for chart in charts] == ["generate shows itself"]


def test_the_student_as_its_own_teacher_is_as_large_as_the_student_in_float32() -> None:
    found = plan(load_recipe("peers"))
    assert [size.parameters for size in found.teachers.values()] == [found.student.parameters]
    assert [size.stored_bytes for size in found.teachers.values()] == [4 * (found.student.parameters or 0)]
    assert SelfTeacher().sources == ()


def test_a_rules_notes_are_drawn_also_where_they_are_0_and_its_shift_where_it_gave_one(
    tmp_path: Path,
) -> None:
    def drawn(shift: float) -> set[str]:
        notes = {"weight_mean": 1.0, "advantage_offset_mean": shift, "mixed": 0.0, "spread": {"p50": 1.0}}
        (tmp_path / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "credit": {"group_advantage": notes}}) + "\n"
        )
        (chart,) = own_charts({"credit": {"group_advantage": {}}}, Recorded(tmp_path), [])
        return {name for name, _, _ in chart.rows}

    assert drawn(0.0) == {"weight_mean", "mixed"}
    assert drawn(0.5) == {"weight_mean", "mixed", "advantage_offset_mean"}


def test_a_sampler_of_ones_own_leaves_a_teacher_to_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(SamplerPart):
        pass

    monkeypatch.setattr(HF, "open_with", lambda self, model, context, services: ("hf", model))
    monkeypatch.setattr(Flow, "open_with", lambda self, model, context, services: ("flow", model))
    nothing: Any = None
    text = StudentSpec("a/model")
    assert Mine().open_with(text, nothing, nothing) == ("hf", text)
    assert Mine().open_with(nothing, nothing, nothing) == ("flow", None)
    assert References().open_with(text, nothing, nothing) == ("hf", text)


def test_an_evaluation_of_teachers_is_no_reason_to_refuse_a_run_without_any() -> None:
    asked = {
        f"evals.{kind}": {"kind": kind, "teacher": "nobody"} for kind in ("teacher_accuracy", "agreement")
    }
    checks.join(load_recipe("rl", asked))
    behaviour = refused("opd", asked)
    assert [line.split(":")[0].split(" ")[0] for line in behaviour] == [
        "evals.agreement.teacher",
        "evals.teacher_accuracy.teacher",
    ]


@pytest.mark.parametrize(
    ("recipe", "where"),
    [("everything", "credit.margin"), ("everything", "credit.balance"), ("peers", "teachers.main.context")],
)
def test_a_threshold_of_summed_rewards_is_told(recipe: str, where: str) -> None:
    alone = load_recipe(recipe)
    assert not [line for line in checks.warnings(alone) if "threshold" in line]
    summed = load_recipe(recipe, {"rewards.again": {"kind": "verifier", "weight": 3.0}})
    told = [line for line in checks.warnings(summed) if line.startswith(f"{where}.threshold")]
    assert told == [
        f"{where}.threshold = 0.5 is compared with the sum 1 x verifier + 3 x again. Set it to the least sum "
        "that counts as success."
    ]


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (
            References(generate=HF(max_tokens=7, turns="ready", stop=("#",))),
            HF(max_tokens=7, turns="ready", stop=("#",)),
        ),
        (References(generate=HF()), HF()),
        (TeacherSamples(generate=Flow(steps=3, guidance=2.0)), Flow(steps=3, guidance=2.0)),
    ],
)
def test_a_wrapping_sampler_answers_as_the_one_that_evaluations_use(outer: Any, inner: Any) -> None:
    for name in ("evaluation_positions", "generation", "overlaps", "exact_rng"):
        assert getattr(outer, name) == getattr(inner, name), name
    assert not outer.allow_biased


def test_turns_that_are_ready_are_not_repeatable_inside_another_sampler_either() -> None:
    assert not References(generate=HF(turns="ready")).exact_rng
    assert References(generate=HF(turns="ready")).overlaps
