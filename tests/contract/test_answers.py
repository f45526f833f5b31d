"""What every teacher of the registry promises: one answer per request, in order, and nothing that it was
given changes.

And what `Teachers` makes of the answers: all tables are asked at once, and an attempt is asked about again
only where it has to be.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tiny_flow
from fake_vllm import fake_vllm_of, serving
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.errors import ModelError
from reflux.models.flow.shared_base import SharedBase
from reflux.models.text import as_model, load_model
from reflux.runtime.together import together
from reflux.teachers import TEACHERS
from reflux.teachers.base import TeacherRequest
from reflux.teachers.collection import Teachers
from reflux.teachers.flow import Flow
from reflux.teachers.flow_engine import FlowTeacher
from reflux.teachers.local import Local
from reflux.teachers.local_engine import LocalTeacher
from reflux.teachers.self_teacher import SelfTeacher
from reflux.teachers.self_teacher_engine import SelfTeacherEngine
from reflux.teachers.vllm import VLLM
from reflux.types import Attempt, Rollout, SampledTarget, TeacherAnswer, TopKTarget

Opened = dict[str, Callable[[], Any]]
NOW = StepContext(0, 0)
WANTS = Requirements(logp=True, candidates=2, behaviour=2)


def of_text(part: Any, opened: Any, *more: Any) -> Any:
    model = as_model(tiny.net(2), character_tokenizer())
    return opened(part, tiny.context(WANTS), tiny.services(), model, *(made(model) for made in more))


def of_pictures() -> FlowTeacher:
    voice = SharedBase(tiny_flow.model(2)).voice(None, "here")
    return FlowTeacher(Flow("m"), tiny.context(WANTS), tiny.services(), voice)


class Served:
    """A served teacher that is opened for each call, because each call has an event loop of its own. folder:
    of its model.
    """

    macs = 1

    def __init__(self, folder: str) -> None:
        self.folder = folder

    async def score(self, asked: list[TeacherRequest]) -> list[TeacherAnswer]:
        model = load_model(self.folder, "model", dtype="float32", device="cpu")
        with serving(fake_vllm_of(model)) as fake:
            part = VLLM(model=self.folder, url=fake.url, gives="hidden", device="cpu")
            async with part.open(tiny.context(WANTS), tiny.services()) as teacher:
                return await teacher.score(asked)


@pytest.fixture
def opened(teacher: str) -> Opened:
    """By kind, what opens a teacher."""
    return {
        "local": lambda: of_text(Local("m"), LocalTeacher),
        "self": lambda: of_text(SelfTeacher(), SelfTeacherEngine, lambda model: model.renderer(None, {})),
        "flow": of_pictures,
        "vllm": lambda: Served(teacher),
    }


def listed(length: int) -> TopKTarget:
    ids_TK = np.random.default_rng(length).integers(0, 102, (length, 2))
    return TopKTarget(
        teacher="behaviour",
        ids_TK=ids_TK,
        logp_TK=np.zeros((length, 2), np.float32),
        logp_T=np.zeros(length, np.float32),
    )


def rollouts(table: str) -> list[Rollout]:
    """Of several lengths, the longest in the middle: a teacher that batches reorders them."""
    if table == "flow":
        return [tiny_flow.rollout(n, seed=n, guidance=1.0 + n % 2) for n in (2, 5, 4)]
    return [
        dataclasses.replace(tiny.rollout(n, seed=n), behaviour=listed(n) if n != 3 else None)
        for n in (2, 9, 3)
    ]  # type: ignore[misc]


def requests(table: str) -> list[TeacherRequest]:
    return [
        TeacherRequest(rollout, TeacherPrompt(rollout.prompt.messages, notes={"shown": 1.0}), WANTS)
        for rollout in rollouts(table)
    ]


def plain(value: Any) -> Any:
    """Everything in a value as nested tuples of bytes and plain values, for comparison to the bit."""
    if dataclasses.is_dataclass(value):
        return (
            type(value).__name__,
            *(plain(getattr(value, field.name)) for field in dataclasses.fields(value)),
        )
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, torch.Tensor):
        return plain(value.numpy())
    if isinstance(value, dict):
        return tuple((key, plain(one)) for key, one in sorted(value.items()))
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def untimed(answers: list[TeacherAnswer]) -> Any:
    return plain([dataclasses.replace(answer, seconds=0.0) for answer in answers])


@pytest.mark.parametrize("table", sorted(TEACHERS))
def test_every_teacher_gives_one_answer_per_request_in_order_and_changes_nothing(
    opened: Opened, table: str
) -> None:
    teacher, asked = opened[table](), requests(table)
    before = plain(asked)
    answers = asyncio.run(teacher.score(asked))
    assert plain(asked) == before
    assert len(answers) == len(asked)
    for request, answer in zip(asked, answers, strict=True):
        assert answer.target is not None
        assert answer.target.teacher == "main"
        assert answer.error is None
        assert answer.positions_read > 0
        assert answer.seconds > 0
        (alone,) = asyncio.run(teacher.score([request]))
        for name in ("h_TH", "v_TD", "logp_T"):
            found, expected = (getattr(one.target, name, None) for one in (answer, alone))
            assert (found is None) == (expected is None)
            if found is not None:
                np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-4)
        assert (answer.candidates is None) == (not isinstance(request.rollout.behaviour, TopKTarget))


@pytest.mark.parametrize("table", sorted(TEACHERS))
def test_asked_twice_every_teacher_answers_the_same_to_the_bit(opened: Opened, table: str) -> None:
    teacher = opened[table]()
    assert untimed(asyncio.run(teacher.score(requests(table)))) == untimed(
        asyncio.run(teacher.score(requests(table)))
    )


@pytest.mark.parametrize("table", sorted(TEACHERS))
def test_attempts_get_their_answers_once(opened: Opened, table: str) -> None:
    """Asked again only where the context changed; what was shown, by whom and what came before are in the
    answer.
    """
    teacher, told = opened[table](), [1.0]
    calls: list[int] = []
    score = teacher.score

    async def counted(asked: Any) -> list[TeacherAnswer]:
        calls.append(len(asked))
        return await score(asked)

    teacher.score = counted

    def context(group: Any, step_context: StepContext) -> list[TeacherPrompt]:
        text = tiny_flow.TEXTS[int(told[0])]
        return [TeacherPrompt(({"role": "user", "content": text},), notes={"shown": told[0]}) for _ in group]

    part = SimpleNamespace(
        context=context, routes=(), alias="main", in_process=True, scorer=lambda opened: None
    )
    teachers = Teachers({"one": (part, teacher)}, Requirements(), tiny.services())  # type: ignore[dict-item]
    groups = [[Attempt(rollout)] for rollout in rollouts(table)]
    before = [plain(group[0].rollout) for group in groups]
    asyncio.run(teachers.score(groups, NOW))
    first = [group[0].answers["main"] for group in groups]
    asyncio.run(teachers.score(groups, NOW))
    assert [group[0].answers["main"] is answer for group, answer in zip(groups, first, strict=True)] == [
        True
    ] * 3
    told[0] = 2.0
    asyncio.run(teachers.score(groups, NOW))
    assert calls == [3, 3]
    for group, old in zip(groups, first, strict=True):
        new = group[0].answers["main"]
        assert (old.table, old.context_notes, old.previous) == ("one", {"shown": 1.0}, None)
        assert (new.table, new.context_notes) == ("one", {"shown": 2.0})
        assert new.previous is old.target
        assert new.context_hash != old.context_hash
    assert [plain(group[0].rollout) for group in groups] == before


# --- those that are elsewhere


class Elsewhere:
    """A teacher of another process: `meet` is awaited within each call."""

    macs = 1

    def __init__(self, meet: Callable[[], Any], answer: Callable[[Rollout], TeacherAnswer] | None = None):
        self.meet, self.asked, self.answer = meet, 0, answer or self.sampled

    def sampled(self, rollout: Rollout) -> TeacherAnswer:
        return TeacherAnswer(
            target=SampledTarget(teacher="x", logp_T=rollout.logp_T - 1), positions_read=7, seconds=0.25
        )

    async def score(self, asked: Any) -> list[TeacherAnswer]:
        self.asked += len(asked)
        await self.meet()
        return [self.answer(request.rollout) for request in asked]


def part(in_process: bool = False, alias: str | None = None) -> Any:
    from reflux.contexts.same import Same

    return SimpleNamespace(
        context=Same(), routes=(), alias=alias, in_process=in_process, scorer=lambda opened: None
    )


def attempts(count: int = 2) -> list[list[Attempt]]:
    return [[Attempt(tiny.rollout(3, seed=seed))] for seed in range(count)]


@pytest.mark.parametrize("kinds", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("cohort", [0, 2])
def test_tables_are_asked_at_once(kinds: tuple[bool, bool], cohort: int) -> None:
    """Each waits for the other to have begun: asked one after the other, neither would ever answer."""

    async def act() -> list[list[Attempt]]:
        both = asyncio.Barrier(2)
        first, second = Elsewhere(both.wait), Elsewhere(both.wait)
        services = tiny.services()
        teachers = Teachers(
            {"b": (part(kinds[0]), first), "a": (part(kinds[1]), second)}, Requirements(), services
        )  # type: ignore[dict-item]
        groups = attempts()
        async with asyncio.timeout(20):
            if not cohort:
                await teachers.score(groups, NOW)
            elif kinds == (True, True):
                # servers answer each group by itself, and a barrier of two would let two groups pass
                await asyncio.gather(*(teachers.score([group], NOW, cohort) for group in groups))
            else:
                await teachers.score(groups[:1], NOW)
                groups = groups[:1]
        assert services.clock.take()["teach"] == 0.5 * len(groups)
        return groups

    for group in asyncio.run(act()):
        assert list(group[0].answers) == ["a", "b"]


def test_a_table_that_raises_ends_the_others_and_its_error_is_raised_as_it_is() -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("forever")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ModelError("broken weights")

    services = tiny.services()
    for kinds in ((False, False), (True, False), (False, True)):
        tables = {"one": (part(kinds[0]), Elsewhere(forever)), "two": (part(kinds[1]), Elsewhere(fails))}

        async def act(tables: Any = tables) -> None:
            async with asyncio.timeout(20):
                await Teachers(tables, Requirements(), services).score(attempts(), NOW)

        with pytest.raises(ModelError, match="broken weights"):
            asyncio.run(act())
    assert ended == ["forever"] * 3


def test_coroutines_together_keep_their_order_and_end_together() -> None:
    async def later(value: int) -> int:
        for _ in range(5 - value):
            await asyncio.sleep(0)
        return value

    async def cancelled() -> int:
        raise asyncio.CancelledError

    async def act() -> None:
        assert await together([later(1), later(4), later(2)]) == [1, 4, 2]
        assert await together([]) == []
        assert await together([later(3)]) == [3]
        for work in ([cancelled(), asyncio.sleep(60, 0)], [asyncio.sleep(60, 0), cancelled()]):
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(20):
                    await together(work)

    asyncio.run(act())


def test_who_cannot_answer_says_why_is_counted_and_is_asked_again() -> None:
    """No target: nothing is learnt from it. The target of before is not forgotten."""
    from reflux.metrics.step_metrics import _answer_errors, _asked, _without_target

    async def at_once() -> None: ...

    sentences = iter(["the server was busy", "the server was busy"])
    teacher = Elsewhere(at_once)
    teacher.answer = lambda rollout: (
        TeacherAnswer(error=sentence)
        if rollout.prompt.id == "p1" and (sentence := next(sentences, ""))
        else teacher.sampled(rollout)
    )
    services = tiny.services()
    teachers = Teachers({"table": (part(alias="main"), teacher)}, Requirements(), services)  # type: ignore[dict-item]
    groups = attempts()
    made = [group[0] for group in groups]
    asyncio.run(teachers.score(groups, NOW))
    answer = made[1].answers["main"]
    assert (answer.target, answer.error, answer.table) == (None, "the server was busy", "table")
    assert made[1].target("main") is None
    assert (_without_target(made, teachers.tables), _answer_errors(made, teachers.tables)) == (
        {"main": 1},
        {"table": 1},
    )
    assert {name: len(found) for name, found in _asked(made, teachers.tables).items()} == {"table": 2}
    asyncio.run(teachers.score(groups, NOW))
    assert teacher.asked == 3
    asyncio.run(teachers.score(groups, NOW))
    assert teacher.asked == 4
    assert made[1].target("main") is not None
    assert (_without_target(made, teachers.tables), _answer_errors(made, teachers.tables)) == (
        {"main": 0},
        {"table": 0},
    )
    # it knew, then failed in another context, then knew again: freshness still has the first to compare with
    known = made[1].answers["main"]
    made[1].answers["main"] = TeacherAnswer(error="gone", previous=known.target)
    asyncio.run(teachers.score(groups, NOW))
    assert made[1].answers["main"].previous is known.target


def test_answers_survive_a_pickle(opened: Opened) -> None:
    """Whoever answers in another process sends this."""
    for table in ("flow",):
        answers = asyncio.run(opened[table]().score(requests(table)))
        assert plain(pickle.loads(pickle.dumps(answers))) == plain(answers)


def test_the_metrics_of_a_run_count_answers_that_failed(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=1)
    assert done.rows("metrics")[0]["answer_errors"] == {"main": 0}
