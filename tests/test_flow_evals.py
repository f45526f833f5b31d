"""Evaluations of images: verdicts with parts, the teachers' images from the same noise, the KL of every step
in closed form.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
import tiny_flow
from reflux.config.context import StudentSpec
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams, StepContext
from reflux.errors import DataError
from reflux.evals import teacher_accuracy
from reflux.evals.accuracy import Accuracy
from reflux.evals.agreement import Agreement, gap_T
from reflux.evals.evaluation import Evaluation
from reflux.evals.problems import HELD_OUT_SEED
from reflux.evals.teacher_accuracy import TeacherAccuracy
from reflux.grading.graders import Graders
from reflux.metrics.intervals import bootstrap_mean, wilson
from reflux.models.flow.sde import step_moments
from reflux.models.images import from_text
from reflux.models.shared_cache import SharedCache
from reflux.runtime.timers import Clock
from reflux.samplers.flow import Flow
from reflux.samplers.flow_engine import FlowSampler
from reflux.tasks import glyph_drawing
from reflux.tasks.glyphs import Glyphs
from reflux.teachers.base import TeacherRequest
from reflux.teachers.collection import Teachers
from reflux.teachers.flow import Flow as FlowTeacherPart
from reflux.teachers.names import measured
from reflux.teachers.self_teacher import SelfTeacher
from reflux.types import (
    Attempt,
    FlowRollout,
    Group,
    Prompt,
    SampledTarget,
    TeacherAnswer,
    TokenRollout,
    VelocityTarget,
)
from tiny import HEADS

GLYPHS = Glyphs(held_out=20)
STEPS = 3


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders() as open_graders:
        yield open_graders


def glyph_model(seed: int) -> Any:
    """Untrained, of the task's size and prompts."""
    return tiny_flow.model(seed, side=16, layers=1, texts=("", *GLYPHS.texts()))


def run_of(
    task: Any = GLYPHS,
    graders: Any = None,
    step: int = 0,
    teachers: dict[str, Any] | None = None,
    **sampler: Any,
) -> Any:
    acting = Flow(**{"steps": STEPS, "eval_steps": 2, "batch_images": 7, **sampler})
    cfg = SimpleNamespace(
        evaluation_positions=STEPS, draw=acting.draw, sampler=acting, teachers=teachers or {}
    )
    return SimpleNamespace(
        task=task, graders=graders, seed=0, step=step, cfg=cfg, requirements=Requirements(), clock=Clock(),
        shared_cache=SharedCache(), heads=HEADS,
        off_loop=asyncio.to_thread, step_context=lambda: StepContext(step, 0),
        context=lambda name: tiny.context(name=name, generation=acting.generation), services=tiny.services(),
        part=acting,
    )  # fmt: skip


def asked_of(run: Any, sampler: Any, teachers: Any = None) -> Evaluation:
    """The same without a run."""
    told = {"task": run.task, "generation": run.part.generation}
    asked = tiny.evaluation(sampler, teachers, graders=run.graders, positions=STEPS, step=run.step, **told)
    return replace(asked, part=run.part, context=replace(asked.context, teachers=run.cfg.teachers))


def sampler_of(run: Any, model: Any) -> FlowSampler:
    return FlowSampler(run.cfg.sampler, run.context("sampler"), run.services, model)


# --- accuracy


class Draughtsman:
    """A sampler that draws what was asked, every third time something else, under noise of its own."""

    def __init__(self) -> None:
        self.drawn = 0

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        self.drawn += 1
        rng = np.random.default_rng(self.drawn)
        image = (
            glyph_drawing.draw(prompt, random.Random(self.drawn))
            if self.drawn % 3
            else np.zeros((16, 16), np.uint8)
        )
        flawed = (image * 0.9 + rng.uniform(0, self.drawn, image.shape)).astype(np.uint8)
        return [Attempt(tiny_flow.rollout(2, prompt=prompt, image=flawed))]


def test_a_picture_is_judged_with_its_parts_and_shown_as_it_was_judged(graders: Graders) -> None:
    run = run_of(graders=graders)
    table = asyncio.run(Accuracy(problems=20, examples=20).measure(asked_of(run, Draughtsman())))
    prompts = list(GLYPHS.prompts("validation", HELD_OUT_SEED))
    images = [from_text(example["image"]) for example in table["examples"]]
    verdicts = [GLYPHS.verify(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    quality = [verdict.parts["quality"] for verdict in verdicts]
    assert len(set(quality)) > 10
    assert table["parts"] == ["quality"]
    assert table["quality"] == pytest.approx(np.mean(quality))
    assert (table["quality.low"], table["quality.high"]) == bootstrap_mean(quality, 0)
    for route in ("digits", "counts"):
        own = [value for value, prompt in zip(quality, prompts, strict=True) if prompt.route == route]
        assert table[f"quality.{route}"] == pytest.approx(np.mean(own))
        assert (table[f"quality.{route}.low"], table[f"quality.{route}.high"]) == bootstrap_mean(own, 0)
        assert table[f"accuracy.{route}.problems"] == 10
    right = sum(verdict.value or 0.0 for verdict in verdicts)
    assert (table["accuracy"], table["low"], table["high"]) == (right / 20, *wilson(right, 20))
    assert (table["mean_steps"], table["truncated"], "mean_tokens" in table) == (2, 0, False)
    assert [(e["id"], e["prompt"], e["parts"]["quality"]) for e in table["examples"]] == [
        (prompt.id, prompt.messages[-1]["content"], value)
        for prompt, value in zip(prompts, quality, strict=True)
    ]
    assert "text" not in table["examples"][0]
    assert json.loads(json.dumps(table)) == table


def test_greedy_pictures_begin_with_the_same_noise_at_every_evaluation(graders: Graders) -> None:
    """Else before and after differ by luck; drawn ones have other random numbers each time."""
    asked = Accuracy(problems=3, examples=3)
    runs = [run_of(graders=graders, step=step) for step in (0, 9)]
    tables = [asyncio.run(asked.measure(asked_of(run, sampler_of(run, glyph_model(1))))) for run in runs]
    assert tables[0] == tables[1]
    other = run_of(graders=graders)
    assert (
        asyncio.run(asked.measure(asked_of(other, sampler_of(other, glyph_model(2)))))["examples"]
        != tables[0]["examples"]
    )


def test_a_picture_larger_than_a_thumbnail_is_listed_small() -> None:
    from reflux.evals.kinds import kind_of

    drawn = tiny_flow.rollout(image=np.full((200, 100, 3), 9, np.uint8))
    assert from_text(kind_of(drawn).show(drawn.made)).shape == (96, 48, 3)
    assert kind_of(drawn).units == "steps"


# --- the teachers' accuracy


class Named:
    """A sampler whose image says who drew it: one grey, the number of the table."""

    def __init__(self, grey: int, objective_teachers: list[tuple[int, str, int]]):
        self.grey, self.objective_teachers = grey, objective_teachers

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        self.objective_teachers.append((self.grey, prompt.id, draw.cohort))
        await asyncio.sleep(0)
        return [Attempt(tiny_flow.rollout(2, prompt=prompt, image=np.full((16, 16), self.grey, np.uint8)))]


def part(alias: str | None = None, routes: Sequence[str] = ()) -> Any:
    """A table without a model that could draw."""
    asked = {"is_student": False, "acts_with": lambda opened: None}
    return SimpleNamespace(alias=alias, routes=tuple(routes), rollouts=FlowRollout, in_process=True, **asked)


@pytest.fixture
def objective_teachers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, int]]:
    """What tables were asked by the evaluation: (its place, prompt, cohort)."""
    asked: list[tuple[int, str, int]] = []
    opened: list[str] = []

    @asynccontextmanager
    async def acting(evaluation: Any, table: str) -> AsyncIterator[Named]:
        assert not opened, "one teacher at a time"
        opened.append(table)
        yield Named(list(evaluation.context.teachers).index(table), asked)
        opened.remove(table)

    monkeypatch.setattr(teacher_accuracy, "_acting", acting)
    return asked


ROUTED = {"one": part("main", ["digits"]), "two": part("main", ["counts"]), "frozen": part()}


def ceiling(
    tables: dict[str, Any], graders: Any = None, teacher: str = "main", **fields: Any
) -> dict[str, Any]:
    asked: Any = TeacherAccuracy(**{"teacher": teacher, "problems": 6, **fields})
    run = run_of(graders=graders, teachers=tables)
    return asyncio.run(asked(asked_of(run, None, SimpleNamespace()), None))


def test_each_problem_goes_to_the_teacher_of_its_route(
    objective_teachers: list[Any], graders: Graders
) -> None:
    table = ceiling(ROUTED, graders, examples=6)
    prompts = list(GLYPHS.prompts("validation", HELD_OUT_SEED))[:6]
    # in the problems' own order
    assert [int(from_text(example["image"])[0, 0]) for example in table["examples"]] == [0, 1] * 3
    assert [example["id"] for example in table["examples"]] == [prompt.id for prompt in prompts]
    assert objective_teachers == [(0, p.id, 3) for p in prompts[::2]] + [(1, p.id, 3) for p in prompts[1::2]]
    assert table["problems"] == 6
    assert table["accuracy.digits.problems"] == table["accuracy.counts.problems"] == 3


def test_one_table_is_asked_everything_whatever_its_routes(
    objective_teachers: list[Any], graders: Graders
) -> None:
    assert ceiling(ROUTED, graders, teacher="two")["problems"] == 6
    assert {who for who, _, cohort in objective_teachers} == {1}
    assert {cohort for _, _, cohort in objective_teachers} == {6}
    objective_teachers.clear()
    # alone under its name
    assert ceiling({"main": part(None, ["digits"])}, graders)["problems"] == 6


def test_what_no_table_serves_is_left_out_and_counted(
    objective_teachers: list[Any], graders: Graders
) -> None:
    tables = {"one": part("main", ["digits"]), "two": part("main", ["letters"])}
    table = ceiling(tables, graders)
    assert table["problems"] == 3
    assert {who for who, _, _ in objective_teachers} == {0}
    nobody = ceiling({"one": part("main", ["a"]), "two": part("main", ["b"])}, graders)
    assert (nobody["accuracy"], nobody["low"], nobody["problems"], nobody["examples"]) == (None, None, 0, [])


def test_a_name_is_looked_up_among_tables_and_what_they_answer_as() -> None:
    cfg: Any = SimpleNamespace(teachers={**ROUTED, "main": part(None, ["letters"])})
    assert measured(cfg, "main") == ["one", "two", "main"]
    assert [measured(cfg, name) for name in ("one", "frozen", "nobody")] == [["one"], ["frozen"], []]
    cfg.teachers = {"one": part("main")}
    assert measured(cfg, "main") == measured(cfg, "one") == ["one"]


def test_a_teacher_without_a_model_is_null_or_refused(graders: Graders) -> None:
    assert ceiling({"main": SelfTeacher()}, graders) == {
        "accuracy": None,
        "low": None,
        "high": None,
        "problems": 0,
        "split": "validation",
    }
    for tables in ({}, {"other": part()}):
        with pytest.raises(ValueError, match="teacher 'main' has no model of its own"):
            ceiling(tables, graders)
    run = run_of(graders=graders, teachers={"main": part()})
    opened: Any = Teachers({"main": (part(), SimpleNamespace())}, run.requirements, run.clock)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="teacher 'main' has no model of its own"):
        asyncio.run(TeacherAccuracy()(asked_of(run, None, opened), None))  # pyright: ignore[reportArgumentType]


def test_an_empty_split_is_named(objective_teachers: list[Any]) -> None:
    with pytest.raises(DataError, match="no problems in its split 'validation'"):
        asyncio.run(TeacherAccuracy()(asked_of(run_of(Glyphs(held_out=0), teachers=ROUTED), None), None))  # type: ignore[arg-type]


def test_flow_teachers_draw_with_their_own_weights_and_the_students_dice(
    tmp_path: Path, graders: Graders
) -> None:
    """Routed, two models on disk: each image is the one that its route's model draws of the noise that the
    student gets.
    """
    models = {"digits": glyph_model(5), "counts": glyph_model(6)}
    tables = {}
    for route, model in models.items():
        model.save(tmp_path / route)
        tables[route] = FlowTeacherPart(model=str(tmp_path / route), alias="main", routes=(route,))
    run = run_of(graders=graders, teachers=tables)
    run.cfg.learner = SimpleNamespace(model=str(tmp_path / "digits"), adapter=None)

    async def measure() -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            digits = StudentSpec(str(tmp_path / "digits"))
            contexts = {name: replace(run.context(name), student=digits) for name in tables}
            opened = {
                name: (part, await stack.enter_async_context(part.open(contexts[name], run.services)))
                for name, part in tables.items()
            }
            teachers = Teachers(opened, run.requirements, run.clock)  # type: ignore[arg-type]
            return await TeacherAccuracy(problems=6)(asked_of(run, None, teachers), None)  # type: ignore[arg-type]

    table = asyncio.run(measure())
    assert (table["problems"], len(table["examples"]), table["parts"]) == (6, 6, ["quality"])
    for example, prompt in zip(table["examples"], GLYPHS.prompts("validation", HELD_OUT_SEED), strict=False):
        student = sampler_of(run_of(step=0), models[prompt.route or ""])
        (alone,) = asyncio.run(student.sample(prompt, 1, SamplingParams(0, "eval", STEPS, temperature=0.0)))
        assert example["id"] == prompt.id
        # rounding, in another batch
        np.testing.assert_allclose(from_text(example["image"]).astype(int), alone.rollout.made, atol=1)


# --- agreement


def kl_by_means(drawn: FlowRollout, student_TD: np.ndarray, teacher_TD: np.ndarray) -> np.ndarray:
    """KL between two Gaussians of one width, from the means of the two steps: |mean_s - mean_T|^2 / (2
    std^2), float64.
    """
    t_T, dt_T = drawn.t_S[:-1].astype(np.float64), np.diff(drawn.t_S).astype(np.float64)
    kl = []
    for i in np.flatnonzero(drawn.mask_T):
        x_D = drawn.x_SD[i].astype(np.float64)
        (mean_s, std), (mean_t, _) = (
            step_moments(x_D, v_TD[i].astype(np.float64), t_T[i], dt_T[i], drawn.noise_level)
            for v_TD in (student_TD, teacher_TD)
        )
        kl.append(((mean_s - mean_t) ** 2).sum() / (2 * std**2))
    return np.asarray(kl)


def scored(noise_level: float = 0.7, whole: bool = True, seed: int = 0, shift: float = 1.0) -> Attempt:
    """An attempt along which both have spoken, in random velocities."""
    drawn = tiny_flow.rollout(5, seed=seed, noise_level=noise_level, whole=whole, shift=shift)
    rng = np.random.default_rng(seed)
    outputs = [rng.normal(size=(5, drawn.x_SD.shape[1])).astype(np.float32) for _ in range(2)]
    for v_TD in outputs:
        v_TD[~drawn.mask_T] = np.nan
    made = Attempt(replace(drawn, behaviour=VelocityTarget(teacher="behaviour", v_TD=outputs[0])))
    made.answers["main"] = TeacherAnswer(target=VelocityTarget(teacher="main", v_TD=outputs[1]))
    return made


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 2.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("whole", [True, False])
def test_the_gap_of_a_step_is_the_kl_of_its_gaussians(noise_level: float, shift: float, whole: bool) -> None:
    made = scored(noise_level, whole, shift=shift)
    found_T = gap_T(made, "main", HEADS)
    assert found_T is not None
    assert np.isnan(found_T).tolist() == (~made.rollout.mask_T).tolist()
    behaviour, told = made.rollout.behaviour, made.target("main")
    assert isinstance(behaviour, VelocityTarget)
    assert isinstance(told, VelocityTarget)
    expected = kl_by_means(made.rollout, behaviour.v_TD, told.v_TD)  # type: ignore[arg-type]
    np.testing.assert_allclose(found_T[made.rollout.mask_T], expected, rtol=1e-6)
    assert len(expected) == 5 - whole


def test_a_student_is_at_home_with_itself() -> None:
    made = scored()
    assert isinstance(made.rollout.behaviour, VelocityTarget)
    made.answers["main"] = TeacherAnswer(
        target=VelocityTarget(teacher="main", v_TD=made.rollout.behaviour.v_TD)
    )
    found_T = gap_T(made, "main", HEADS)
    assert found_T is not None
    assert (found_T[made.rollout.mask_T] == 0).all()


def test_where_one_of_the_two_said_nothing_there_is_no_gap() -> None:
    made = scored()
    assert gap_T(made, "anchor", HEADS) is None
    assert (
        gap_T(Attempt(replace(made.rollout, behaviour=None), answers=dict(made.answers)), "main", HEADS)
        is None
    )  # type: ignore[type-var]
    made.answers["main"] = TeacherAnswer(target=SampledTarget(teacher="main", logp_T=np.zeros(5, np.float32)))
    assert gap_T(made, "main", HEADS) is None
    # infinite
    assert gap_T(scored(noise_level=0.0), "main", HEADS) is None
    nothing = np.zeros(0, np.int64)
    text = TokenRollout(
        prompt=Prompt("p", ()), sample=0, version=0, finish="stop", mask_T=nothing == 1, logp_T=nothing,
        prompt_tokens=nothing,
        tokens_T=nothing, text="", messages=(),
    )  # fmt: skip
    assert gap_T(Attempt(text, answers=dict(scored().answers)), "main", HEADS) is None


class Speaking:
    """An open teacher that says a model's velocities, and how often it was asked."""

    macs = 1

    def __init__(self, model: Any, name: str):
        self.model, self.name, self.asked = model, name, 0

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        self.asked += len(requests)
        return [
            TeacherAnswer(target=tiny_flow.velocities(self.model, request.rollout, self.name))
            for request in requests
        ]


def speaking(**tables: tuple[Any, Sequence[str]]) -> tuple[Teachers, dict[str, Any]]:
    from reflux.contexts.same import Same

    parts = {
        name: SimpleNamespace(
            alias="main",
            routes=tuple(routes),
            in_process=True,
            context=Same(),
            rollouts=FlowRollout,
            scorer=lambda opened: None,
        )
        for name, (_, routes) in tables.items()
    }
    opened: Any = {name: (parts[name], Speaking(model, "main")) for name, (model, _) in tables.items()}
    return Teachers(opened, Requirements(), tiny.services()), parts


def test_agreement_is_the_mean_kl_of_the_steps_the_student_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """By step, by route and by teacher, with the student's states and the velocities it sampled with."""
    student, digits, counts = (glyph_model(seed) for seed in (1, 2, 3))
    teachers, parts = speaking(digits=(digits, ["digits"]), counts=(counts, ["counts"]))
    run = run_of(step=4, teachers=parts, noise_level=0.9)
    kept: list[Attempt] = []
    sample = FlowSampler.sample

    async def spy(self: FlowSampler, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        group = await sample(self, prompt, n, draw)
        kept.extend(group)
        return group

    monkeypatch.setattr(FlowSampler, "sample", spy)
    table = asyncio.run(Agreement(prompts=6)(asked_of(run, sampler_of(run, student), teachers), None))  # type: ignore[arg-type]
    expected: dict[str, list[np.ndarray]] = {"digits": [], "counts": []}
    for made in kept:
        route = made.rollout.prompt.route
        said_TD, told_TD = (
            tiny_flow.velocities(model, made.rollout).v_TD
            for model in (student, {"digits": digits, "counts": counts}[route or ""])
        )
        expected[route or ""].append(kl_by_means(made.rollout, said_TD, told_TD))  # type: ignore[arg-type]
    every = np.asarray([*expected["digits"], *expected["counts"]])
    assert every.shape == (6, STEPS - 1)
    assert table["kl_nats"] == pytest.approx(every.mean(), rel=1e-4)
    assert table["attempts"] == 6
    assert [(row["position"], row["width"], row["steps"]) for row in table["by_position"]] == [
        (0, 1, 6),
        (1, 1, 6),
    ]
    assert [row["kl_nats"] for row in table["by_position"]] == pytest.approx(every.mean(0), rel=1e-4)
    for route in ("digits", "counts"):
        assert table[f"kl_nats.{route}"] == pytest.approx(np.mean(expected[route]), rel=1e-4)
        assert table["by_teacher"][route]["kl_nats"] == pytest.approx(np.mean(expected[route]), rel=1e-4)
        assert table["by_teacher"][route]["attempts"] == 3
    assert table["low"] < table["kl_nats"] < table["high"]
    assert {made.rollout.noise_level for made in kept} == {0.9}  # type: ignore[attr-defined]
    assert json.loads(json.dumps(table)) == table


def test_agreement_without_noise_is_null() -> None:
    teachers, parts = speaking(one=(glyph_model(2), ()))
    run = run_of(teachers=parts, noise_level=0.0)
    table = asyncio.run(Agreement(prompts=2)(asked_of(run, sampler_of(run, glyph_model(1)), teachers), None))  # type: ignore[arg-type]
    assert (table["kl_nats"], table["low"], table["attempts"], table["by_position"]) == (None, None, 0, [])
