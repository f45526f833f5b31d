"""A teacher in a server gives what the same model gives in this process, and no wrong answer is used."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fake_vllm import FakeVLLM, fake_vllm_of, serving
from reflux.checks import join
from reflux.clients import http
from reflux.config.registry import build
from reflux.config.requirements import Requirements
from reflux.contexts.base import TeacherPrompt
from reflux.errors import BadAnswer, ConfigError, ModelError, ServerError
from reflux.evals.teacher_accuracy import TeacherAccuracy
from reflux.models.head_files import load_head
from reflux.models.text import Model, load_model
from reflux.teachers.answer_cache import AnswerCache
from reflux.teachers.base import TeacherRequest, plain_requests
from reflux.teachers.served import refuse_broken
from reflux.types import GivenTarget, HiddenTarget, SampledTarget, TeacherAnswer, TokenRollout, TopKTarget

K = 5
WANTS = Requirements(behaviour=K, candidates=K)
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def model(teacher: str) -> Model:
    return load_model(teacher, "model", dtype="float32", device="cpu")


@pytest.fixture
def fake(model: Model) -> Iterator[FakeVLLM]:
    with serving(fake_vllm_of(model)) as fake:
        yield fake


def attempts(number: int = 3, length: int = 6) -> list[TokenRollout]:
    """Rollouts with the student's own lists, of different lengths."""
    made = []
    for seed in range(number):
        rollout = tiny.rollout(length + seed, seed=seed)
        rng = np.random.default_rng(seed)
        ids_TK = np.stack([rng.permutation(102)[:K] for _ in range(rollout.length)])
        listed = TopKTarget(
            teacher="behaviour",
            ids_TK=ids_TK,
            logp_TK=np.full((rollout.length, K), -2.0, np.float32),
            logp_T=rollout.logp_T,
        )
        made.append(replace(rollout, behaviour=listed))
    return made


def requests_of(rollouts: list[TokenRollout], requirements: Requirements = WANTS) -> list[TeacherRequest]:
    return [replace(request, requirements=requirements) for request in plain_requests(rollouts)]


def part(model: str, urls: Any, **fields: Any) -> Any:
    where = {"url": urls} if isinstance(urls, str) else {"urls": urls}
    table = {"kind": "vllm", "model": model, "patience_s": 0.0, "device": "cpu", **where, **fields}
    return build("teachers", table, "teachers.main")


def opened(part: Any, use: Callable[[Any], Awaitable[Any]]) -> Any:
    async def inside() -> Any:
        async with part.open(tiny.context(WANTS), tiny.services()) as teacher:
            return await use(teacher)

    return asyncio.run(inside())


def answers_of(part: Any, rollouts: list[TokenRollout], wants: Requirements = WANTS) -> list[TeacherAnswer]:
    return opened(part, lambda teacher: teacher.score(requests_of(rollouts, wants)))


@pytest.fixture(scope="module")
def local(teacher: str) -> list[TeacherAnswer]:
    """The answers of the same model in this process."""
    made = build("teachers", {"kind": "local", "model": teacher, "device": "cpu"}, "teachers.main")
    return answers_of(made, attempts(), replace(WANTS, logp=True))


def full(answer: TeacherAnswer, model: Model) -> np.ndarray:
    """The log-probs over the whole vocabulary, [T, V]."""
    assert isinstance(answer.target, HiddenTarget)
    with torch.no_grad():
        return model.head.logits(answer.target.h_TH).log_softmax(-1).numpy()


# --- the same as a local teacher


def test_hidden_states_give_the_full_distribution(
    fake: FakeVLLM, teacher: str, model: Model, local: list[TeacherAnswer]
) -> None:
    wants = replace(WANTS, logp=True)
    for served, here in zip(
        answers_of(part(teacher, fake.url, gives="hidden"), attempts(), wants), local, strict=True
    ):
        np.testing.assert_allclose(full(served, model), full(here, model), atol=TOLERANCE)
        assert served.target is not None
        assert here.target is not None
        np.testing.assert_allclose(served.target.logp_T, here.target.logp_T, atol=TOLERANCE)
        assert served.candidates is not None
        assert here.candidates is not None
        np.testing.assert_array_equal(served.candidates.ids_TK, here.candidates.ids_TK)
        np.testing.assert_allclose(served.candidates.logp_TK, here.candidates.logp_TK, atol=TOLERANCE)
        assert served.positions_read == here.positions_read


def test_the_students_own_tokens_are_scored_with_the_exact_tail(
    fake: FakeVLLM, teacher: str, model: Model, local: list[TeacherAnswer]
) -> None:
    rollouts = attempts()
    answers = answers_of(part(teacher, fake.url), rollouts)
    for rollout, served, here in zip(rollouts, answers, local, strict=True):
        target = served.target
        assert isinstance(target, GivenTarget)
        assert isinstance(rollout.behaviour, TopKTarget)
        np.testing.assert_array_equal(target.ids_TK, rollout.behaviour.ids_TK)
        logp_TV = full(here, model)
        np.testing.assert_allclose(
            target.logp_TK, np.take_along_axis(logp_TV, target.ids_TK, 1), atol=TOLERANCE
        )
        others = np.exp(logp_TV).sum(1) - np.exp(np.take_along_axis(logp_TV, target.ids_TK, 1)).sum(1)
        np.testing.assert_allclose(1 - np.exp(target.logp_TK).sum(1), others, atol=TOLERANCE)
        assert here.target is not None
        np.testing.assert_allclose(target.logp_T, here.target.logp_T, atol=TOLERANCE)
        assert served.candidates is target


def test_without_a_list_of_the_student_the_sampled_token_is_scored(
    fake: FakeVLLM, teacher: str, local: list[TeacherAnswer]
) -> None:
    """Attempts of evaluations have none."""
    bare = [replace(rollout, behaviour=None) for rollout in attempts()]
    for gives in ("student_topk", "sampled"):
        for served, here in zip(answers_of(part(teacher, fake.url, gives=gives), bare), local, strict=True):
            assert type(served.target) is SampledTarget
            assert here.target is not None
            np.testing.assert_allclose(served.target.logp_T, here.target.logp_T, atol=TOLERANCE)


def test_the_teachers_own_list(
    fake: FakeVLLM, teacher: str, model: Model, local: list[TeacherAnswer]
) -> None:
    answers = answers_of(part(teacher, fake.url, gives="teacher_topk", k=4), attempts())
    for served, here in zip(answers, local, strict=True):
        target, logp_TV = served.target, full(here, model)
        assert type(target) is TopKTarget
        np.testing.assert_array_equal(target.ids_TK, np.argsort(-logp_TV, axis=1)[:, :4])
        np.testing.assert_allclose(target.logp_TK, -np.sort(-logp_TV, axis=1)[:, :4], atol=TOLERANCE)


def test_a_context_that_changes_the_messages_is_rendered_with_the_teachers_template(
    fake: FakeVLLM, teacher: str, model: Model
) -> None:
    view = TeacherPrompt(({"role": "user", "content": "the answer is 7, and the question was 3 + 4"},))
    asked = [TeacherRequest(rollout, view, WANTS) for rollout in attempts()]
    here = build("teachers", {"kind": "local", "model": teacher, "device": "cpu"}, "teachers.main")
    there = part(teacher, fake.url, gives="hidden")
    both = [opened(one, lambda opened: opened.score(asked)) for one in (here, there)]
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(full(one, model), full(other, model), atol=TOLERANCE)


def test_a_temperature_divides_the_logits(fake: FakeVLLM, teacher: str, local: list[TeacherAnswer]) -> None:
    rollouts = attempts()

    async def use(opened: Any) -> Any:
        answers = await opened.score(requests_of(rollouts))
        return [
            answer.target.logp_at(rollout.behaviour.ids_TK, opened.services.heads)
            for answer, rollout in zip(answers, rollouts, strict=True)
        ]

    served = opened(part(teacher, fake.url, gives="hidden", temperature=2.5), use)
    head = load_head(teacher, "head", 102, "cpu")
    for got, rollout, here in zip(served, rollouts, local, strict=True):
        assert isinstance(here.target, HiddenTarget)
        assert rollout.behaviour is not None
        expected = (head.logits(here.target.h_TH) / 2.5).log_softmax(-1).numpy()
        np.testing.assert_allclose(
            got, np.take_along_axis(expected, rollout.behaviour.ids_TK, 1), atol=TOLERANCE
        )


@pytest.mark.parametrize("gives", ["hidden", "student_topk", "teacher_topk"])
def test_a_long_request_is_split(fake: FakeVLLM, teacher: str, gives: str) -> None:
    whole = answers_of(part(teacher, fake.url, gives=gives), attempts(1, 7))
    before = len(fake.served)
    pieces = answers_of(part(teacher, fake.url, gives=gives, max_rows=3), attempts(1, 7))
    lengths = [len(body["token_ids"]) for body in fake.bodies()][-3:]
    assert sorted(lengths) == [5 + 3, 5 + 6, 5 + 7]
    assert len(fake.served) > before
    assert (whole[0].positions_read, pieces[0].positions_read) == (12, 8 + 11 + 12)
    one, other = whole[0].target, pieces[0].target
    for name in ("h_TH",) if gives == "hidden" else ("ids_TK", "logp_TK", "logp_T"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("gives", "objective"),
    [
        ("hidden", {}),
        ("student_topk", {"objectives.0.support": "student", "objectives.0.k": 8}),
        ("teacher_topk", {"objectives.0.support": "teacher", "objectives.0.k": 8}),
    ],
)
def test_a_run_with_a_served_teacher_has_the_losses_of_one_with_the_same_model_here(
    fake: FakeVLLM, tiny_run: Callable[..., Any], gives: str, objective: dict[str, Any]
) -> None:
    changes = {key.replace(".", "__"): value for key, value in objective.items()}
    here = tiny_run("full", steps=2, **changes)
    fields = {"kind": "vllm", "url": fake.url, "gives": gives, "device": "cpu", "k": 8}
    there = tiny_run(
        "full", steps=2, **changes, **{f"teachers__main__{key}": value for key, value in fields.items()}
    )
    for name in ("loss", "kl_nats", "grad_norm"):
        one, other = ([row[name] for row in run.rows("metrics")] for run in (here, there))
        np.testing.assert_allclose(one, other, rtol=2e-3, err_msg=name)
    assert len(fake.served) > 8


def test_the_accuracy_of_a_served_teacher_is_null_and_said(fake: FakeVLLM, teacher: str) -> None:
    async def use(opened: Any) -> Any:
        bare = tiny.evaluation(None, SimpleNamespace(opened={}))
        asked = replace(bare, context=replace(bare.context, teachers={"main": made}))
        heard = tiny.Heard()
        asked.services.listener = heard
        return await TeacherAccuracy()(asked, None), heard.notes  # type: ignore[arg-type]

    made = part(teacher, fake.url)
    found, notes = opened(made, use)
    assert (found["accuracy"], found["problems"]) == (None, 0)
    assert ["teachers.main" in note and "is not measured" in note for note in notes] == [True]


def test_an_objective_that_needs_more_than_the_teacher_gives_is_refused(student: str, teacher: str) -> None:
    fields = {"teachers__main__kind": "vllm", "teachers__main__url": "http://localhost:1"}
    with pytest.raises(ConfigError, match="offers log-probs at the student's most likely tokens"):
        join(tiny.config("full", student, teacher, **fields))
    release = {"credit__release__segments": 4, "credit__release__candidates": "now"}
    listed = {"objectives__0__support": "student", "loss_aggregation": "token-mean"}
    with pytest.raises(ConfigError, match='candidates = "behaviour"'):
        join(tiny.config("full", student, teacher, **fields, **listed, **release))
    needed = join(tiny.config("full", student, teacher, **fields, **listed))
    assert (needed.behaviour, needed.candidates) == (100, 100)


# --- failures


@pytest.mark.parametrize(
    ("gives", "fault", "words"),
    [
        ("student_topk", "nan", "not numbers"),
        ("student_topk", "uniform", "the same probability"),
        ("student_topk", "short", "rows"),
        ("student_topk", "none", "no log-probs at the given tokens"),
        ("student_topk", "crossed", "another request"),
        ("student_topk", "error", "EngineCore"),
        ("hidden", "nan", "not numbers"),
        ("hidden", "short", "rows"),
        ("hidden", "uniform", "the same probability"),
        ("sampled", "nan", "not JSON compliant"),
        ("sampled", "uniform", "the same probability"),
        ("teacher_topk", "short", "does not have log-probs"),
    ],
)
def test_a_wrong_answer_is_no_target_and_is_counted(
    fake: FakeVLLM, teacher: str, gives: str, fault: str, words: str
) -> None:
    async def use(opened: Any) -> Any:
        fake.always = fault
        wrong = await opened.score(requests_of(attempts(1)))
        fake.always = ""
        return wrong, await opened.score(requests_of(attempts(2))), (opened.asked, opened.failed)

    wrong, right, counted = opened(part(teacher, fake.url, gives=gives), use)
    assert [answer.target for answer in wrong] == [None]
    assert words in str(wrong[0].error)
    assert all(answer.error is None and answer.target is not None for answer in right)
    assert counted == (3, 1)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"logp_T": [0.5, -1.0]}, "above 0"),
        ({"logp_T": [-1.0, np.nan]}, "not numbers"),
        ({"h_TH": [[1.0, np.inf]]}, "not numbers"),
        ({"logp_T": [-1.0], "ids_TK": [[1, 102]], "logp_TK": [[-1.0, -2.0]]}, "not in the vocabulary"),
        ({"logp_T": [-1.0], "ids_TK": [[-1, 2]], "logp_TK": [[-1.0, -2.0]]}, "not in the vocabulary"),
        ({"logp_T": [-1.0], "ids_TK": [[1, 2]], "logp_TK": [[-0.1, -0.2]]}, "a sum above 1"),
        ({"logp_TK": [[-3.0, -3.0], [-3.0, -3.0]]}, "the same probability"),
    ],
)
def test_numbers_that_no_model_gives_are_refused(arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(BadAnswer, match=words):
        refuse_broken({name: np.asarray(values) for name, values in arrays.items()}, 102)


def test_numbers_of_a_certain_model_are_accepted() -> None:
    for values in ([0.0, 0.0], [-np.inf, -1.0], [-3.0]):
        refuse_broken({"logp_T": np.asarray(values)}, 102)


def test_above_a_share_of_failures_the_run_stops(fake: FakeVLLM, teacher: str) -> None:
    async def use(opened: Any) -> None:
        fake.always = "nan"
        two = await opened.score(requests_of(attempts(2)))
        assert [answer.target for answer in two] == [None, None]
        await opened.score(requests_of(attempts(1)))

    with pytest.raises(ModelError, match=r"3 of 3 attempts.*max_failed_share is 0\.1.*not numbers"):
        opened(part(teacher, fake.url), use)


def test_a_share_of_many_attempts_may_fail(fake: FakeVLLM, teacher: str) -> None:
    async def use(opened: Any) -> None:
        # so many had an answer
        opened.asked = 30
        fake.always = "nan"
        three = await opened.score(requests_of(attempts(3)))
        assert [answer.target for answer in three] == [None] * 3
        await opened.score(requests_of(attempts(1)))

    with pytest.raises(ModelError, match="4 of 34 attempts"):
        opened(part(teacher, fake.url), use)


def test_a_text_that_is_too_long_for_the_server_is_named(fake: FakeVLLM, teacher: str) -> None:
    fake.max_model_len = 17
    (answer,) = answers_of(part(teacher, fake.url), attempts(1, 20))
    assert "longer than the maximum model length" in str(answer.error)


@pytest.mark.parametrize(
    ("gives", "server", "words"),
    [
        ("hidden", {"hidden": False}, "gives no hidden states.*student_topk"),
        ("student_topk", {"given_ids": "ignored"}, "gives no log-probs at given ids.*teacher_topk.*unknown"),
        ("student_topk", {"given_ids": "refused"}, "requires the V2 model runner.*plugin"),
    ],
)
def test_what_the_server_cannot_do_is_said_with_what_is_lost(
    model: Model, teacher: str, gives: str, server: dict[str, Any], words: str
) -> None:
    with serving(fake_vllm_of(model, **server)) as fake, pytest.raises(ModelError, match=words):
        answers_of(part(teacher, fake.url, gives=gives), attempts(1))


def test_a_head_of_another_model_is_refused(fake: FakeVLLM, teacher: str, tmp_path: Path) -> None:
    same_size = tiny.save(tiny.net(9, layers=1), tmp_path / "other")
    with pytest.raises(ModelError, match=r"teachers\.main\.head.*differ from the server's"):
        answers_of(part(teacher, fake.url, gives="hidden", head=same_size), attempts(1))
    wider = tiny.save(tiny.net(9, width=48), tmp_path / "wider")
    with pytest.raises(ModelError, match="takes 48 numbers, and the server gives 32"):
        answers_of(part(teacher, fake.url, gives="hidden", head=wider), attempts(1))


def test_another_token_map_is_refused(fake: FakeVLLM, teacher: str) -> None:
    async def use() -> None:
        services = tiny.services()
        services.tokenizer.add_tokens(["<new>"])
        async with part(teacher, fake.url).open(tiny.context(), services):
            pass

    with pytest.raises(ModelError, match="token map differs"):
        asyncio.run(use())


# --- several servers


def test_requests_are_spread_and_a_lost_server_is_replaced(model: Model, teacher: str) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(serving(fake_vllm_of(model, delay_s=0.02))) for _ in range(2))

        async def use(opened: Any) -> Any:
            asked = [len(one.served) for one in (first, second)]
            many = await opened.score(requests_of(attempts(6)))
            spread = [len(one.served) - before for one, before in zip((first, second), asked, strict=True)]
            first.always = "error"
            later = await opened.score(requests_of(attempts(3)))
            # A server that failed is asked last from then on.
            known = len(first.served)
            later += await opened.score(requests_of(attempts(3)))
            assert len(first.served) == known
            second.always = "error"
            first.always = ""
            return many, spread, later + await opened.score(requests_of(attempts(3)))

        many, spread, later = opened(part(teacher, [first.url, second.url]), use)
    assert min(spread) >= 2
    assert all(answer.error is None for answer in [*many, *later])


def test_servers_with_other_weights_or_versions_are_refused(model: Model, teacher: str) -> None:
    other, broken = load_model("reflux:student", "model", dtype="float32", device="cpu"), fake_vllm_of(model)
    # vLLM's number for NaN
    broken.prompt_logprobs = (
        lambda ids, params, fault: [  # type: ignore[method-assign]
            None,
            *({str(token): {"logprob": -9999.0, "rank": None}} for token in ids[1:]),
        ]
    )
    for unlike, words in (
        (broken, "differ by up to nan nats, so they do not have the same weights"),
        (fake_vllm_of(other), "do not have the same weights"),
        (fake_vllm_of(model, label="2"), "weight versions"),
        (fake_vllm_of(model, hidden=False), "hidden states"),
    ):
        with (
            serving(fake_vllm_of(model)) as one,
            serving(unlike) as two,
            pytest.raises(ModelError, match=words),
        ):
            answers_of(part(teacher, [one.url, two.url]), attempts(1))


def test_groups_that_are_scored_beside_each_other_count_their_time_once(fake: FakeVLLM, teacher: str) -> None:
    async def use(opened: Any) -> tuple[float, float]:
        fake.delay_s = 0.3
        began = time.perf_counter()
        groups = await asyncio.gather(*(opened.score(requests_of([one])) for one in attempts(4)))
        return time.perf_counter() - began, sum(answer.seconds for group in groups for answer in group)

    wall, told = opened(part(teacher, fake.url), use)
    assert 0.3 <= told <= wall


# --- answers on disk


@pytest.mark.parametrize("gives", ["hidden", "student_topk", "sampled"])
def test_kept_answers_are_used_again(fake: FakeVLLM, teacher: str, tmp_path: Path, gives: str) -> None:
    made = part(teacher, fake.url, gives=gives, cache=str(tmp_path / "kept"))
    first = answers_of(made, attempts())
    fake.served.clear()
    again = answers_of(made, attempts())
    probing = len(fake.bodies())
    assert all(len(body["token_ids"]) >= 16 for body in fake.bodies())
    assert [answer.positions_read for answer in again] == [0, 0, 0]
    for one, other in zip(first, again, strict=True):
        name = "h_TH" if gives == "hidden" else "logp_T"
        np.testing.assert_array_equal(getattr(one.target, name), getattr(other.target, name))
    # another text
    fake.served.clear()
    answers_of(made, [*attempts(), tiny.rollout(4, seed=77)])
    assert len(fake.bodies()) == probing + 1
    # another list of the student
    (one, *_) = attempts()
    assert isinstance(one.behaviour, TopKTarget)
    listed = replace(one.behaviour, ids_TK=(one.behaviour.ids_TK + 1) % 102)
    (answer,) = answers_of(made, [replace(one, behaviour=listed)])
    assert (answer.positions_read > 0) == (gives == "student_topk")
    assert type(answer.target) is not GivenTarget or np.array_equal(answer.target.ids_TK, listed.ids_TK)


def test_an_answer_is_kept_for_one_way_of_asking_and_one_version(
    fake: FakeVLLM, teacher: str, tmp_path: Path
) -> None:
    def read(model: str = teacher, **fields: Any) -> int:
        made = part(model, fake.url, cache=str(tmp_path / "kept"), **fields)
        return answers_of(made, attempts(1))[0].positions_read

    ways: list[dict[str, Any]] = [
        {"gives": "sampled"},
        {"gives": "sampled", "adapter": "adapter"},
        {"gives": "hidden"},
        {"gives": "student_topk"},
        {"gives": "teacher_topk", "k": 4},
        {"gives": "teacher_topk", "k": 5},
        {"gives": "sampled", "model": str(shutil.copytree(teacher, tmp_path / "copy"))},
    ]
    assert all(read(**way) for way in ways)
    assert not any(read(**way) for way in ways)
    fake.label = "2"
    assert all(read(**way) for way in ways)


def test_the_name_of_a_kept_answer_says_what_was_asked(tmp_path: Path) -> None:
    """Each way to ask about some tokens has its own name, also where the numbers are the same in a row."""
    cache = AnswerCache(tmp_path, ("a", "b"))
    lists = [None, np.ones((2, 1)), np.ones((1, 2)), np.ones((2, 2)), np.zeros((2, 1))]
    asked = list(product(([3, 4, 5], [3, 4, 6]), (1, 2), lists))
    names = [cache.key(*one) for one in asked]
    names += [AnswerCache(tmp_path, settings).key(*asked[0]) for settings in (("a", "c"), ("ab", ""), ("a",))]
    assert len(set(names)) == len(names)
    assert cache.key(*asked[0]) == names[0]


def test_a_damaged_file_is_asked_for_again(fake: FakeVLLM, teacher: str, tmp_path: Path) -> None:
    made = part(teacher, fake.url, cache=str(tmp_path))
    first = answers_of(made, attempts())
    for file in tmp_path.rglob("*.answer"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    again = answers_of(made, attempts())
    assert all(answer.positions_read for answer in again)
    for one, other in zip(first, again, strict=True):
        assert one.target is not None
        assert other.target is not None
        np.testing.assert_array_equal(one.target.logp_T, other.target.logp_T)


def test_a_file_under_the_name_of_another_answer_is_not_used(
    fake: FakeVLLM, teacher: str, tmp_path: Path
) -> None:
    """The checksum covers the name: the content alone is whole."""
    made, rollouts = part(teacher, fake.url, cache=str(tmp_path)), attempts(2)
    # of one length, so that only the checksum shows it
    rollouts = [replace(rollouts[0], tokens_T=rollouts[0].tokens_T + shift) for shift in (0, -1)]
    first = answers_of(made, rollouts)
    newest = sorted(tmp_path.rglob("*.answer"), key=lambda file: file.stat().st_mtime_ns)[-2:]
    contents = [file.read_bytes() for file in newest]
    for file, content in zip(newest, reversed(contents), strict=True):
        file.write_bytes(content)
    again = answers_of(made, rollouts)
    for one, other in zip(first, again, strict=True):
        assert one.target is not None
        assert other.target is not None
        np.testing.assert_array_equal(one.target.logp_T, other.target.logp_T)


def test_a_wrong_answer_is_not_kept(fake: FakeVLLM, teacher: str, tmp_path: Path) -> None:
    async def use(opened: Any) -> Any:
        fake.always = "nan"
        wrong = await opened.score(requests_of(attempts(1)))
        fake.always = ""
        return wrong + await opened.score(requests_of(attempts(1)))

    wrong, right = opened(part(teacher, fake.url, cache=str(tmp_path)), use)
    assert (wrong.target, right.error) == (None, None)
    assert right.positions_read > 0
    assert np.isfinite(right.target.logp_T).all()


def test_answers_of_other_weights_under_the_same_label_are_refused(
    fake: FakeVLLM, teacher: str, tmp_path: Path
) -> None:
    made = part(teacher, fake.url, cache=str(tmp_path))
    answers_of(made, attempts(1))
    fake.head_VH = fake.head_VH[::-1]
    with pytest.raises(ModelError, match="other weights of the same name"):
        answers_of(made, attempts(1))


def test_the_token_is_written_nowhere(
    model: Model, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "very-secret-77")
    with serving(fake_vllm_of(model, token="very-secret-77")) as fake:
        made = part(teacher, fake.url, token_variable="MY_TOKEN", cache=str(tmp_path))
        assert answers_of(made, attempts(1))[0].error is None
    assert "very-secret" not in repr(made)
    assert not any(b"very-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


# --- settings


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": None}, "give the address"),
        ({"urls": ["http://a:1"]}, "give the address"),
        ({"temperature": 2.0}, 'use gives = "hidden"'),
        ({"dialect": "sglang", "gives": "hidden"}, "no hidden states"),
        ({"head": "x"}, "Remove it"),
        ({"url": None, "urls": ["http://a:1", "http://a:1"]}, "twice"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    table = {"kind": "vllm", "model": "m", "url": "http://a:1", **fields}
    with pytest.raises(ConfigError, match=words):
        build("teachers", {key: value for key, value in table.items() if value is not None}, "teachers.main")


def test_the_address_and_the_variable_are_checked_before_anything_is_loaded(
    teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="no URL of a server"):
        part(teacher, "localhost:8000").inputs("teachers.main")
    with pytest.raises(ConfigError, match="NO_SUCH_TOKEN"):
        part(teacher, "http://localhost:8000", token_variable="NO_SUCH_TOKEN").inputs("teachers.main")


def test_without_a_server_the_error_says_so(teacher: str) -> None:
    with serving() as fake:
        pass
    with pytest.raises(ServerError, match="Check that the server runs"):
        answers_of(part(teacher, fake.url), attempts(1))


# --- the head alone


def test_a_head_is_read_from_one_file_of_several(tmp_path: Path) -> None:
    net = tiny.net(3, layers=2)
    net.config.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone() + 1)
    net.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    head = load_head(str(tmp_path / "shards"), "head", 102, "cpu")
    h_NH = torch.randn(3, 32)
    torch.testing.assert_close(head.logits(h_NH), net.lm_head(h_NH).detach().cpu())


def test_of_a_hub_model_only_the_file_with_the_head_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny.net(3, layers=2)
    net.save_pretrained(tmp_path / "hub", max_shard_size="20KB")
    fetched: list[str] = []

    def download(name: str, file: str) -> str:
        fetched.append(file)
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    read: list[tuple[str, bool]] = []

    def config(name: str, trust_remote_code: bool) -> Any:
        read.append((name, trust_remote_code))
        return net.config

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", config)
    head = load_head("me/model", "head", 102, "cpu", trust_remote_code=True)
    assert read == [("me/model", True)]
    h_NH = torch.randn(3, 32)
    torch.testing.assert_close(head.logits(h_NH), net.lm_head(h_NH).detach().cpu())
    assert len({*fetched}) == 2


def test_a_folder_without_a_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "headless"
    tiny.save(tiny.net(3), folder)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="no output head under a known name"):
        load_head(str(folder), "head", 102, "cpu")
