"""Flow teachers that share a base are asked together: one call of the base where there was one per table, and
each teacher answers what it answers alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tiny_flow
from reflux.config.context import StudentSpec
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.errors import ModelError
from reflux.samplers.flow import Flow as Sampler
from reflux.teachers.collection import Teachers
from reflux.teachers.flow import Flow
from reflux.teachers.flow_engine import FlowTeacher
from reflux.types import Attempt, Group, VelocityTarget
from tiny_flow import save, save_adapter

NOW = StepContext(0, 0)


@pytest.fixture
def student(tmp_path: Path) -> str:
    return save(tmp_path / "student", 1)


@pytest.fixture
def tables(tmp_path: Path, student: str) -> dict[str, Flow]:
    """Two routed adapters of other ranks and layers, and the anchor, on one base."""
    base = tiny_flow.model(1)
    one = save_adapter(tmp_path / "one", base, 3)
    two = save_adapter(tmp_path / "two", base, 4, format="diffusers", rank=3, ends=("to_k", "proj_out"))
    return {
        "one": Flow(student, adapter=one, alias="main", routes=("a",)),
        "two": Flow(student, adapter=two, alias="main", routes=("b",)),
        "anchor": Flow(student),
    }


def opened(student: str, tables: dict[str, Flow]) -> dict[str, FlowTeacher]:
    context = tiny.context(model=student, generation=Sampler().generation)
    services = tiny.services(StudentSpec(student))

    async def one(table: str, cfg: Flow) -> FlowTeacher:
        async with cfg.open(replace(context, name=table), services) as teacher:
            return teacher

    return {table: asyncio.run(one(table, cfg)) for table, cfg in tables.items()}


def all_of(student: str, tables: dict[str, Flow]) -> Teachers:
    made = opened(student, tables)
    return Teachers({name: (tables[name], made[name]) for name in tables}, Requirements(), tiny.services())


def groups(routes: str = "abba", **fields: Any) -> list[Group]:
    """A group of one attempt for each route; each attempt has 3 counted states."""
    texts = tiny_flow.TEXTS[1:]
    return [
        [tiny_flow.attempt(4, seed=i, text=texts[i % len(texts)], route=route, **fields)]
        for i, route in enumerate(routes)
    ]


def asked(teachers: Teachers, some: list[Group]) -> list[Group]:
    asyncio.run(teachers.score(some, NOW))
    return some


def spoken(attempt: Attempt, name: str) -> np.ndarray:
    target = attempt.target(name)
    assert isinstance(target, VelocityTarget)
    return target.v_TD


def told(some: list[Group]) -> dict[tuple[int, str], np.ndarray]:
    """What each teacher name said about each attempt."""
    return {(i, name): spoken(attempt, name) for i, (attempt,) in enumerate(some) for name in attempt.answers}


def apart(student: str, tables: dict[str, Flow], make: Callable[[], list[Group]]) -> dict[Any, np.ndarray]:
    """The same from tables of which each is opened and asked alone, one attempt at a time."""
    found: dict[Any, np.ndarray] = {}
    for name, cfg in tables.items():
        alone, some = all_of(student, {name: cfg}), make()
        for group in some:
            asyncio.run(alone.score([group], NOW))
        found |= told(some)
    return found


def close(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for key, v_TD in one.items():
        np.testing.assert_allclose(v_TD, other[key], rtol=1e-5, atol=1e-5, err_msg=str(key))


class Calls:
    """The number of rows of each call of a transformer."""

    def __init__(self, *teachers: FlowTeacher):
        self.rows: list[int] = []
        for net in {id(t.model.net): t.model.net for t in teachers}.values():
            net.transformer.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, inputs: Any, given: dict[str, torch.Tensor], output: Any) -> None:
        self.rows.append(len(given["hidden_states"]))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_each_says_what_it_says_alone(student: str, tables: dict[str, Flow], guidance: float) -> None:
    """Routes mixed: each prompt is answered by the teacher of its route and by the anchor, and by nobody
    else.
    """
    some = asked(all_of(student, tables), groups(guidance=guidance))
    for (attempt,), route in zip(some, "abba", strict=True):
        assert {name: answer.table for name, answer in attempt.answers.items()} == {
            "main": {"a": "one", "b": "two"}[route],
            "anchor": "anchor",
        }
        assert {answer.positions_read for answer in attempt.answers.values()} == {3}
        assert np.abs(spoken(attempt, "main") - spoken(attempt, "anchor"))[:3].max() > 0.05
    close(told(some), apart(student, tables, lambda: groups(guidance=guidance)))


def test_neither_order_nor_batch_changes_an_answer(student: str, tables: dict[str, Flow]) -> None:
    """Tables in another order, calls that end within a table, and one state at a time."""
    expected = told(asked(all_of(student, tables), groups()))
    for batch in (64, 5, 1):
        cut = {
            name: replace(tables[name], batch_positions=batch)
            for name in (reversed(tables) if batch != 5 else tables)
        }
        close(told(asked(all_of(student, cut), groups())), expected)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (3.0, 2)])
def test_one_call_is_made_where_each_table_made_its_own(
    student: str, tables: dict[str, Flow], guidance: float, rows: int
) -> None:
    """4 attempts of 3 states, once for their route's teacher and once for the anchor: 24 rows of one call;
    asked alone the tables make three.
    """
    teachers = all_of(student, tables)
    calls = Calls(*(part for _, part in teachers.opened.values()))  # type: ignore[arg-type]
    asked(teachers, groups(guidance=guidance))
    assert calls.rows == [24 * rows]
    calls.rows.clear()
    for name, pair in teachers.opened.items():
        asked(Teachers({name: pair}, Requirements(), tiny.services()), groups(guidance=guidance))
    assert calls.rows == [6 * rows, 6 * rows, 12 * rows]


def test_a_call_has_at_most_the_smallest_batch_of_its_tables(student: str, tables: dict[str, Flow]) -> None:
    tables["two"] = replace(tables["two"], batch_positions=10)
    teachers = all_of(student, tables)
    calls = Calls(*(part for _, part in teachers.opened.values()))  # type: ignore[arg-type]
    asked(teachers, groups())
    assert calls.rows == [10, 10, 4]
    calls.rows.clear()
    # only the anchor's own limit counts where it is asked alone
    asked(Teachers({"anchor": teachers.opened["anchor"]}, Requirements(), tiny.services()), groups())
    assert calls.rows == [12]


def test_a_cohort_is_one_call(student: str, tables: dict[str, Flow]) -> None:
    """As in a run, where each group asks for itself and waits for the others of its step."""
    teachers = all_of(student, tables)
    calls = Calls(*(part for _, part in teachers.opened.values()))  # type: ignore[arg-type]
    some = groups()

    async def ask() -> None:
        await asyncio.gather(*(teachers.score([group], NOW, len(some)) for group in some))

    asyncio.run(ask())
    assert calls.rows == [24]
    close(told(some), apart(student, tables, groups))
    # nothing is missing now
    asked(teachers, some)
    assert calls.rows == [24]


def test_other_bases_and_guidances_have_calls_of_their_own(
    student: str, tables: dict[str, Flow], tmp_path: Path
) -> None:
    tables["other"] = Flow(save(tmp_path / "other", 2))
    teachers = all_of(student, tables)
    made: dict[str, Any] = {name: teacher for name, (_, teacher) in teachers.opened.items()}
    base, other = Calls(made["anchor"]), Calls(made["other"])

    def two_guidances() -> list[Group]:
        return [*groups("ab"), *groups("ab", guidance=2.0)]

    some = asked(teachers, two_guidances())
    assert (base.rows, other.rows) == ([12, 24], [6, 12])
    close(told(some), apart(student, tables, two_guidances))


def test_one_table_with_an_adapter_is_asked_alone(student: str, tables: dict[str, Flow]) -> None:
    only = {"one": replace(tables["one"], routes=())}
    teachers = all_of(student, only)
    calls = Calls(teachers.opened["one"][1])  # type: ignore[arg-type]
    some = asked(teachers, groups())
    assert calls.rows == [12]
    close(told(some), apart(student, only, groups))


def test_a_velocity_that_is_not_finite_names_its_own_table(student: str, tables: dict[str, Flow]) -> None:
    """The third attempt is of route b and has a state that is no number; the anchor is asked later."""
    some = groups()
    rollout: Any = some[2][0].rollout
    rollout.x_SD[1, 3] = np.inf
    with pytest.raises(ModelError, match=r"teachers.two: its velocity for prompt p2, sample 0, at denoising"):
        asked(all_of(student, tables), some)


def test_the_time_of_a_common_call_is_counted_once(student: str, tables: dict[str, Flow]) -> None:
    teachers = all_of(student, tables)
    some = asked(teachers, groups())
    seconds = [answer.seconds for (attempt,) in some for answer in attempt.answers.values()]
    assert len(seconds) == 8
    assert len(set(seconds)) == 1
    assert teachers.services.clock.take()["teach"] == pytest.approx(sum(seconds), abs=1e-5)
