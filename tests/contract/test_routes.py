"""Several teacher tables under one name: each prompt asks exactly one, and the metrics, the evaluation and
the page say which.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams, StepContext
from reflux.contexts.same import Same
from reflux.errors import DataError
from reflux.evals.agreement import Agreement
from reflux.reports.metrics import Heard, read_metrics
from reflux.reports.page import write_report
from reflux.reports.teacher_tables import teachers_table
from reflux.teachers.collection import Teachers
from reflux.types import Attempt, Group, Prompt, Rollout, SampledTarget, TeacherAnswer

CHAT = {"kind": "outside:Chat"}
NOW = StepContext(0, 0)


class Flat:
    """A teacher that gives every sampled token `gap` nats less than the student did; keeps the ids it was
    asked about.
    """

    parameters = 1

    def __init__(self, gap: float):
        self.gap = gap
        self.asked: list[str] = []

    async def score(self, requests: Any) -> list[TeacherAnswer]:
        self.asked += [request.rollout.prompt.id for request in requests]
        return [
            TeacherAnswer(target=SampledTarget(teacher="main", logp_T=r.rollout.logp_T - self.gap))
            for r in requests
        ]


def tables(**gaps: tuple[float, tuple[str, ...]]) -> tuple[Teachers, dict[str, Flat]]:
    answers = {name: Flat(gap) for name, (gap, _) in gaps.items()}
    opened = {
        name: (
            SimpleNamespace(
                context=Same(), routes=routes, alias="main", in_process=True, scorer=lambda opened: None
            ),
            answers[name],
        )
        for name, (_, routes) in gaps.items()
    }
    return Teachers(opened, Requirements(), tiny.services()), answers  # type: ignore[arg-type]


def group(route: str | None, number: int, size: int = 2) -> Group:
    from dataclasses import replace

    made = [tiny.rollout(3, seed=number, sample=sample) for sample in range(size)]
    return [
        Attempt(replace(one, prompt=Prompt(f"{route}{number}", one.prompt.messages, route=route)))
        for one in made
    ]


def test_each_prompt_asks_exactly_the_table_of_its_route() -> None:
    teachers, answers = tables(plus=(0.5, ("add", "sub")), times=(2.0, ("mul",)), idle=(9.0, ("div",)))
    groups = [group("add", 1), group("mul", 2), group("sub", 3), group("add", 4)]
    asyncio.run(teachers.score(groups, NOW))
    assert {name: sorted(set(one.asked)) for name, one in answers.items()} == {
        "plus": ["add1", "add4", "sub3"],
        "times": ["mul2"],
        "idle": [],
    }
    for made in groups:
        for attempt in made:
            table = attempt.answers["main"].table
            gap = attempt.rollout.logp_T - attempt.target("main").logp_T  # type: ignore[union-attr]
            assert gap == pytest.approx({"plus": 0.5, "times": 2.0}[table])
    assert teachers.tables == dict.fromkeys(("plus", "times", "idle"), "main")


def test_a_prompt_of_a_route_that_nobody_serves_is_asked_of_nobody() -> None:
    teachers, answers = tables(plus=(0.5, ("add",)), times=(2.0, ("mul",)))
    groups = [group("div", 1), group(None, 2)]
    asyncio.run(teachers.score(groups, NOW))
    assert not any(one.asked for one in answers.values())
    assert all(not attempt.answers for made in groups for attempt in made)


def unserved(teachers: Teachers, *groups: Group) -> str:
    with pytest.raises(DataError) as refused:
        asyncio.run(teachers.score(groups, NOW))
    return str(refused.value)


def test_a_prompt_that_none_of_those_who_teach_serves_is_refused_by_name() -> None:
    """A task on the hub tells its routes only as its prompts come."""
    opened = tables(plus=(0.5, ("add",)), times=(2.0, ("mul",)))[0].opened
    assert (
        "prompt div1 has the route 'div', but the teachers of the objectives serve only add, mul."
        in unserved(
            Teachers(opened, Requirements(), tiny.services(), {"main"}), group("add", 1), group("div", 1)
        )
    )
    assert "prompt None2 has no route, but" in unserved(
        Teachers(opened, Requirements(), tiny.services(), {"main"}), group(None, 2)
    )
    asyncio.run(
        Teachers(opened, Requirements(), tiny.services(), {"main"}).score(
            [group("add", 1), group("mul", 2), []], NOW
        )
    )


def test_a_prompt_is_refused_only_where_nobody_teaches_it() -> None:
    """Another name may serve it, with or without routes; a teacher that is asked for metrics alone does not
    have to.
    """
    (plus,) = tables(plus=(0.5, ("add",)))[0].opened.values()
    common: Any = {"context": Same(), "alias": None, "in_process": True, "scorer": lambda opened: None}
    other = (SimpleNamespace(routes=(), **common), Flat(1.0))
    routed_other = (SimpleNamespace(routes=("div",), **common), Flat(1.0))
    div = group("div", 1)
    for objective_teachers, others in (
        ((), {}),
        ({"behaviour"}, {}),
        ({"main", "anchor"}, {"anchor": other}),
        ({"main", "anchor"}, {"anchor": routed_other}),
        ({"anchor"}, {"anchor": other}),
    ):
        asyncio.run(
            Teachers({"plus": plus, **others}, Requirements(), tiny.services(), objective_teachers).score(
                [div], NOW
            )
        )  # type: ignore[dict-item]
    for objective_teachers in ({"main"}, {"main", "behaviour"}):
        # an anchor that no objective listens to teaches nobody
        assert "serve only add." in unserved(
            Teachers({"plus": plus, "anchor": other}, Requirements(), tiny.services(), objective_teachers),
            div,
        )  # type: ignore[dict-item]


def routed(teacher: str, student: str) -> dict[str, Any]:
    return {
        "main": "none",
        "good": {"kind": "local", "model": teacher, "alias": "main", "routes": ["even"]},
        "home": {"kind": "local", "model": student, "alias": "main", "routes": ["odd"]},
        "idle": {"kind": "local", "model": student, "alias": "main", "routes": ["never"]},
    }


def test_the_metrics_name_every_table_and_the_starved_one_has_nothing(
    tiny_run: Callable[..., Any], teacher: str, student: str
) -> None:
    settings = {"steps": 2, "prompts_per_step": 6, "group_size": 2, "evals__agreement": {"prompts": 8}}
    done = tiny_run("opd", **settings, task=CHAT, teachers=routed(teacher, student))
    for row in done.rows("metrics"):
        assert row["asked"] == {"good": 6, "home": 6, "idle": 0}
        assert row["without_target"] == {"main": 0}
        assert row["kl_nats_trained_by_table"]["idle"] is None
    first = done.rows("metrics")[0]["kl_nats_trained_by_table"]
    assert abs(first["home"]) < 1e-4
    gaps = []
    for row in (row for row in done.rows("attempts") if row["kind"] == "learned" and row["step"] == 1):
        if int(row["prompt"].split("-")[1]) % 2 == 0:
            gaps += list(np.asarray(row["student_logp"]) - np.asarray(row["teacher_logp"]["main"]))
    # written with five digits
    assert first["good"] == pytest.approx(np.mean(gaps), abs=1e-4)
    before = done.rows("evals")[0]["agreement"]
    assert set(before["by_teacher"]) == {"good", "home", "idle"}
    assert [before["by_teacher"][name]["attempts"] for name in ("good", "home", "idle")] == [4, 4, 0]
    assert before["by_teacher"]["idle"]["kl_nats"] is None
    assert before["kl_nats.even"] == before["by_teacher"]["good"]["kl_nats"]
    assert before["kl_nats.odd"] == pytest.approx(0, abs=1e-4)
    page = write_report(done.dir).read_text()
    assert "never asked" in page


def test_one_teacher_for_all_is_counted_too(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=1, task=CHAT, evals__agreement={"prompts": 2})
    assert done.rows("metrics")[0]["asked"] == {"main": 4}
    assert done.rows("metrics")[0]["kl_nats_trained_by_table"]["main"] == pytest.approx(
        done.rows("metrics")[0]["kl_nats_trained"], abs=2.0
    )
    assert "by_teacher" not in done.rows("evals")[0]["agreement"]


# --- agreement, where every number is known beforehand


class Speaking:
    """Gives each prompt one attempt of as many tokens as its text is long."""

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        from dataclasses import replace

        return [Attempt(replace(tiny.rollout(len(prompt.messages[0]["content"]), seed=1), prompt=prompt))]


def ask(teachers: Teachers, routes: list[str | None]) -> dict[str, Any]:
    prompts = [
        Prompt(f"p{i}", ({"role": "user", "content": "x" * (i + 1)},), route=route)
        for i, route in enumerate(routes)
    ]
    task = SimpleNamespace(prompts=lambda split, seed, start=0: iter(prompts))
    asked = tiny.evaluation(Speaking(), teachers, task=task, step=3, positions=9)
    return asyncio.run(Agreement()(asked, None))  # type: ignore[arg-type]


def test_agreement_by_route_and_by_table() -> None:
    teachers, _ = tables(plus=(0.5, ("add", "sub")), times=(2.0, ("mul",)))
    # 1, 2, 3 and 4 tokens
    found = ask(teachers, ["add", "mul", "sub", "mul"])
    assert found["kl_nats"] == pytest.approx((0.5 * (1 + 3) + 2.0 * (2 + 4)) / 10)
    assert {name: found[f"kl_nats.{name}"] for name in ("add", "sub", "mul")} == pytest.approx(
        {"add": 0.5, "sub": 0.5, "mul": 2.0}
    )
    assert [found[f"kl_nats.{name}.attempts"] for name in ("add", "sub", "mul")] == [1, 1, 2]
    assert found["kl_nats.mul.low"] <= found["kl_nats.mul"] <= found["kl_nats.mul.high"]
    # one attempt says nothing of the spread
    assert (found["kl_nats.add.low"], found["kl_nats.add.high"]) == (None, None)
    assert (found["by_position"][3]["low"], found["by_position"][3]["high"]) == (None, None)
    assert json.loads(json.dumps(found)) == found
    assert {name: (row["attempts"], row["kl_nats"]) for name, row in found["by_teacher"].items()} == {
        "plus": (2, pytest.approx(0.5)),
        "times": (2, pytest.approx(2.0)),
    }


def test_one_route_and_one_table_add_nothing() -> None:
    teachers, _ = tables(plus=(0.5, ()))
    found = ask(teachers, ["add", "add", None])
    assert set(found) == {"kl_nats", "low", "high", "attempts", "split", "by_position"}


class Noisy:
    """A teacher `gap` nats below the student on average: each attempt has a share of its own in that, and
    each token another.
    """

    parameters = 1

    def __init__(self, rng: np.random.Generator, gap: float):
        self.rng, self.gap = rng, gap

    async def score(self, requests: Any) -> list[TeacherAnswer]:
        return [self.answer(request.rollout) for request in requests]

    def answer(self, rollout: Rollout) -> TeacherAnswer:
        gap_T = self.gap + self.rng.normal() + self.rng.normal(0, 1, rollout.length)
        return TeacherAnswer(target=SampledTarget(teacher="main", logp_T=rollout.logp_T - gap_T))


@pytest.mark.parametrize("attempts", [2, 5, 20])
def test_the_interval_of_agreement_covers_the_kl_as_often_as_it_says(attempts: int) -> None:
    """Not where it is halved, nor where positions of one attempt are taken as independent of each other."""
    rng, draws, hits = np.random.default_rng(attempts), 800, 0
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": "x" * (6 + i % 3)},)) for i in range(attempts)]
    task = SimpleNamespace(prompts=lambda split, seed, start=0: iter(prompts))
    part: Any = SimpleNamespace(
        context=Same(), routes=(), alias="main", in_process=True, scorer=lambda opened: None
    )

    async def measure() -> dict[str, Any]:
        teachers = Teachers({"main": (part, Noisy(rng, 2.5))}, Requirements(), tiny.services())  # type: ignore[arg-type]
        return await Agreement()(tiny.evaluation(Speaking(), teachers, task=task, step=3, positions=9), None)  # type: ignore[arg-type]

    for _ in range(draws):
        found = asyncio.run(measure())
        hits += found["low"] <= 2.5 <= found["high"]
    assert 0.92 < hits / draws < 0.98


# --- the page


def test_the_table_of_the_page() -> None:
    config = {
        "teachers": {
            "main": {"routes": ["add"]},
            "times": {"alias": "main", "routes": ["mul", "div"]},
            "<b>": {},
        }
    }
    rows = [
        {
            "step": step,
            "asked": {"main": 6, "times": 2, "<b>": 0},
            "kl_nats_trained_by_table": {"main": 1.0 - 0.01 * step, "times": None},
        }
        for step in range(1, 21)
    ]
    objective_teachers = read_metrics(rows).teachers
    assert objective_teachers["main"][0] == Heard(6, 0.99)
    assert teachers_table(config, objective_teachers) == [
        ("main", "main", "add", "120", "75 %", "0.9850", "0.8050"),
        ("times", "main", "mul, div", "40", "25 %", "–", "–"),
        ("<b>", "<b>", "all", "never asked", "0 %", "–", "–"),
    ]
    assert teachers_table(config, {}) == []
    assert teachers_table({}, {"x": [Heard(None, None)]}) == [("x", "x", "all", "never asked", "–", "–", "–")]


def test_the_first_and_last_tenth_weigh_steps_by_their_attempts() -> None:
    objective_teachers = {
        "main": [Heard(1, 4.0), Heard(3, 0.0), *[Heard(5, 9.0)] * 16, Heard(0, None), Heard(2, 0.25)]
    }
    assert teachers_table({}, objective_teachers)[0][-2:] == ("1.0000", "0.2500")


def test_attempts_that_could_not_be_judged_are_in_metrics_and_on_the_page(
    tiny_run: Callable[..., Any], tmp_path: Any
) -> None:
    """A verifier that raises, hangs or says NaN costs those attempts only."""
    lines = [{"prompt": f"{k}" * (k % 3 + 1), "answer": "a", "id": f"q{k}"} for k in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "kind": "jsonl",
        "path": str(tmp_path / "data.jsonl"),
        "validation": 0.0,
        "grader": "judges:moody",
    }
    rules = {"margin": {}, "balance": {}}
    done = tiny_run(
        "opd",
        steps=2,
        task=task,
        group_size=3,
        rewards={"verifier": {}},
        credit=rules,
        loss_aggregation="seq-mean-token-mean",
    )
    assert [row["ungraded"] for row in done.rows("metrics")] == [3, 3]
    for row in (row for row in done.rows("attempts") if row["kind"] == "attempt"):
        assert (row["reward"] is None) == (row["prompt"] == "q3")
    for row in (row for row in done.rows("attempts") if row["kind"] == "learned" and row["prompt"] == "q3"):
        assert set(row["weight"]) == {1.0}
        assert "advantage_offset" not in row
    assert "attempts that could not be graded" in write_report(done.dir).read_text()
    plain = tiny_run("opd", steps=1, task=CHAT)
    assert plain.rows("metrics")[0]["ungraded"] == 0
    assert "could not be graded" not in write_report(plain.dir).read_text()
