"""The chat client over a socket: what it sends, what it repeats, what it counts, and what never leaves it."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
import stamina

from fake_chat import FakeChat, Reply, chatting, refused
from reflux.clients.chat import ChatClient, ChatSettings
from reflux.clients.chat_cache import ChatCache
from reflux.clients.chat_messages import ChatRequest, Schema
from reflux.clients.retry_after import retry_after_s
from reflux.clients.usage import Prices, Usage
from reflux.errors import BadAnswer, ConfigError, ServerError, ServerRefused

Result = TypeVar("Result")
KEY = "sk-a-key-that-nobody-may-read"
FORM = Schema(name="form", schema={"type": "object"})


@pytest.fixture(autouse=True)
def no_key_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLUX_TEST_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    monkeypatch.setenv("OPENAI_ORG_ID", "organisation-of-the-environment")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, no log of any library has the key."""
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text
    assert all(KEY not in repr(vars(record)) for record in caplog.records)


def request(text: str = "1+1?", **more: Any) -> ChatRequest:
    messages = ({"role": "user", "content": text},)
    return ChatRequest(**{"role": "teacher", "messages": messages, "max_tokens": 20, **more})


def asked(
    fake: FakeChat,
    use: Callable[[ChatClient], Awaitable[Result]] | None = None,
    usage: Usage | None = None,
    cache: ChatCache | None = None,
    **settings: Any,
) -> Any:
    """What `use` gets from a client of `fake`; by default one answer."""
    changed = {"url": fake.url, "model": "m", "first_wait_s": 0.01, "longest_wait_s": 0.02, **settings}

    async def inside() -> Any:
        async with ChatClient(ChatSettings(**changed), usage or Usage(), cache) as client:
            return await (use(client) if use else client.answer(request()))

    return asyncio.run(inside())


# --- what is sent


def test_what_is_asked_is_sent_and_what_is_not_asked_is_left_to_the_server() -> None:
    with chatting() as fake:
        answer = asked(fake)
        every = request(temperature=0.0, top_p=0.5, seed=0)
        asked(fake, lambda client: client.answer(every), limit_key="max_completion_tokens")
    messages = [{"role": "user", "content": "1+1?"}]
    plain = {"model": "m", "messages": messages, "max_tokens": 20}
    assert fake.bodies[0] == plain
    sampling = {"temperature": 0.0, "top_p": 0.5, "seed": 0}
    assert fake.bodies[1] == {"model": "m", "messages": messages, "max_completion_tokens": 20, **sampling}
    assert (answer.text, answer.finish, answer.model) == ("yes", "stop", "served")
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)


def test_the_key_comes_from_the_named_variable_and_nothing_else_of_the_environment_is_sent() -> None:
    with chatting() as fake:
        asked(fake)
        asked(fake, key_variable="REFLUX_TEST_KEY")
    assert "authorization" not in fake.headers[0]
    assert fake.headers[1]["authorization"] == f"Bearer {KEY}"
    assert "of-the-environment" not in repr(fake.headers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "host:1"}, "is no URL of a server"),
        ({"url": "http://me:secret@host/v1"}, "contains a user name or a password"),
        ({"key_variable": "REFLUX_NO_SUCH_KEY"}, "REFLUX_NO_SUCH_KEY"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_it_is_asked(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        ChatClient(ChatSettings(**{"url": "http://h/v1", "model": "m", **settings}), Usage())
    assert "secret" not in str(refusal.value)


# --- what is repeated


@pytest.mark.parametrize(
    "failure",
    [
        *(refused(status) for status in (408, 409, 425, 429, 500, 503)),
        Reply(cut=30),
        Reply(body='{"choices": [{"mess'),
        Reply(body='{"choices": []}'),
        Reply(body="[1]"),
        Reply(body="null"),
        Reply(body='{"choices": [{"message": {"content": 3}}]}'),
    ],
    ids=lambda failure: f"{failure.status} {failure.body and failure.body[:30]} {failure.cut}",
)
def test_a_failure_is_sent_again_until_the_last_try(failure: Reply) -> None:
    usage = Usage()
    with chatting(failure, failure) as fake:
        assert asked(fake, usage=usage).text == "yes"
        assert len(fake.bodies) == 3
    assert usage.take()["teacher"] == {
        "completion_tokens": 3,
        "cost": 0.0,
        "prompt_tokens": 7,
        "replays": 2,
        "requests": 1,
    }
    with chatting(otherwise=failure) as fake, pytest.raises(ServerError, match="in 3 tries") as given_up:
        asked(fake, usage=usage)
    assert not isinstance(given_up.value, ServerRefused)
    assert len(fake.bodies) == 3
    assert usage.take()["teacher"] == {"failed": 1, "replays": 2}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_final(status: int) -> None:
    with chatting(otherwise=refused(status, "wrong model")) as fake:
        with pytest.raises(ServerRefused, match="wrong model") as refusal:
            asked(fake)
        assert len(fake.bodies) == 1
    assert refusal.value.status == status


def test_a_slow_answer_ends_at_the_limit_of_its_own_request() -> None:
    with chatting(Reply(delay_s=0.6)) as fake:
        late = request(timeout_s=0.2)
        assert asked(fake, lambda client: client.answer(late), timeout_s=60).text == "yes"
        assert len(fake.bodies) == 2
    with chatting(otherwise=Reply(delay_s=0.3)) as fake, pytest.raises(ServerError, match=r"within 0\.1 s"):
        asked(fake, timeout_s=0.1, tries=1)


def test_a_server_that_is_not_there_is_named() -> None:
    with chatting() as fake:
        pass
    with pytest.raises(ServerError, match=r"http://127.0.0.1:\d+/v1 gave no answer in 1 try"):
        asked(fake, tries=1)


class Waits(list[float]):
    """The waits between tries, in place of waiting."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    found = Waits()
    monkeypatch.setattr(stamina._core, "_smart_sleep", found)
    return found


def test_waits_double_up_to_the_longest(waits: Waits) -> None:
    with chatting(otherwise=refused(500)) as fake, pytest.raises(ServerError):
        asked(fake, tries=6, first_wait_s=1.0, longest_wait_s=8.0)
    assert len(waits) == 5
    assert all(least <= wait <= 8.0 for least, wait in zip((1, 2, 4, 8, 8), waits, strict=True))
    assert waits[0] <= 2.0


def test_retry_after_is_waited_for_and_a_long_one_ends_the_request(waits: Waits) -> None:
    with chatting(refused(429, retry_after="17"), refused(503, retry_after="0.5")) as fake:
        assert asked(fake).text == "yes"
    assert waits == [17.0, 0.5]
    waits.clear()
    with chatting(refused(429, "quota", retry_after="301")) as fake:
        with pytest.raises(ServerError, match="in 1 try: status 429 quota"):
            asked(fake)
        assert (len(fake.bodies), waits) == (1, [])


def test_retry_after_is_a_number_or_a_date() -> None:
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    date = format_datetime(datetime(2026, 1, 1, 12, 0, 30, tzinfo=UTC), usegmt=True)
    found = [
        retry_after_s({"retry-after": text}, now)
        for text in ("3", "-1", "0.25", date, "soon", "nan", "inf", "Thu, 01 Jan 2026 11:00:00 -0000")
    ]
    assert found == [3.0, 0.0, 0.25, 30.0, None, None, None, 0.0]
    assert retry_after_s({}) is None


# --- limits


def several(client: ChatClient, count: int) -> Awaitable[Any]:
    return asyncio.gather(*(client.answer(request(f"{n}?")) for n in range(count)))


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    with chatting(otherwise=Reply(delay_s=0.05)) as fake:
        asked(fake, lambda client: several(client, 9), concurrency=3)
    assert (fake.most, len(fake.bodies)) == (3, 9)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"requests_per_minute": 3}, 3), ({"tokens_per_minute": 66}, 3), ({"tokens_per_minute": 1}, 1)],
)
def test_rates_hold_back_further_requests(settings: dict[str, int], allowed: int) -> None:
    """20 tokens of answer and 1 of "0?" are 21, so 66 tokens are three requests. A request above the limit is
    sent alone.
    """

    async def some(client: ChatClient) -> int:
        asking = asyncio.ensure_future(several(client, 5))
        while len(fake.bodies) < allowed:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        asking.cancel()
        return len(fake.bodies)

    with chatting() as fake:
        assert asked(fake, some, **settings) == allowed


# --- what is counted


def test_tokens_and_costs_are_counted_by_role() -> None:
    usage = Usage()

    async def roles(client: ChatClient) -> None:
        for role in ("rubric", "verdicts", "rubric"):
            await client.answer(request(role=role))

    with chatting(Reply(), Reply(usage=None), Reply()) as fake:
        asked(fake, roles, usage, prices=Prices(prompt=2.0, completion=10.0))
    assert usage.take() == {
        "rubric": {"completion_tokens": 6, "cost": pytest.approx(88e-6), "prompt_tokens": 14, "requests": 2},
        "verdicts": {"completion_tokens": 0, "cost": 0.0, "prompt_tokens": 0, "requests": 1, "unmetered": 1},
    }
    assert usage.take() == {}
    assert usage.total["rubric"]["prompt_tokens"] == 14


# --- answers of a given form


def number(text: str) -> int:
    found = json.loads(text)
    if not isinstance(found, int):
        raise ValueError("it must be one whole number.")
    return found


def form(**more: Any) -> Callable[[ChatClient], Awaitable[Any]]:
    asking = request(schema=FORM)
    return lambda client: client.parsed(asking, number, **more)


def test_a_form_is_asked_for_by_a_schema_until_the_server_refuses_it() -> None:
    with chatting(Reply("3")) as fake:
        assert asked(fake, form())[0] == 3
    expected = {"name": "form", "strict": True, "schema": {"type": "object"}}
    assert fake.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": expected}

    async def twice(client: ChatClient) -> list[int]:
        return [(await form()(client))[0], (await client.parsed(request(schema=FORM, number=9), number))[0]]

    with chatting(refused(400), Reply("4"), Reply("5")) as fake:
        assert asked(fake, twice) == [4, 5]
    assert ["response_format" in body for body in fake.bodies] == [True, False, False]
    with chatting(Reply("6")) as fake:
        asked(fake, form(), structured="text")
    assert "response_format" not in fake.bodies[0]
    with chatting(refused(400)) as fake, pytest.raises(ServerRefused):
        asked(fake, form(), structured="schema")


@pytest.mark.parametrize("status", [400, 413])
def test_a_refusal_for_another_reason_stays_one(status: int) -> None:
    usage = Usage()

    async def then(client: ChatClient) -> int:
        with pytest.raises(ServerRefused, match="too long"):
            await form()(client)
        return (await form()(client))[0]

    with chatting(*[refused(status, "too long")] * (2 if status == 400 else 1), Reply("1")) as fake:
        assert asked(fake, then, usage) == 1
    # The form is still asked for.
    assert "response_format" in fake.bodies[-1]
    assert usage.take()["teacher"]["failed"] == 1


def test_an_answer_that_cannot_be_used_is_shown_to_the_model_once() -> None:
    usage = Usage()
    with chatting(Reply('"x"'), Reply("8")) as fake:
        assert asked(fake, form(), usage)[0] == 8
    first, second = (body["messages"] for body in fake.bodies)
    assert second[: len(first)] == first
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == '"x"'
    assert "it must be one whole number." in second[2]["content"]
    assert usage.take()["teacher"]["invalid"] == 1
    with chatting(Reply('"x"'), Reply("{"), Reply("9")) as fake:
        with pytest.raises(BadAnswer, match="cannot be used: Expecting"):
            asked(fake, form())
        assert len(fake.bodies) == 2
    with chatting(Reply('"x"'), Reply("{"), Reply("9")) as fake:
        assert asked(fake, form(repairs=2))[0] == 9


@pytest.mark.parametrize("bad", [Reply("1", finish="length"), Reply(" \n"), Reply(None)])
def test_an_empty_or_cut_answer_is_asked_for_again_as_it_was(bad: Reply, tmp_path: Path) -> None:
    with chatting(bad, Reply("2")) as fake:
        cache = ChatCache(tmp_path, "")
        assert asked(fake, form(), cache=cache)[0] == 2
        assert fake.bodies[0] == fake.bodies[1]
        assert asked(fake, form(), cache=cache)[0] == 2
        assert len(fake.bodies) == 2
    with chatting(otherwise=bad) as fake, pytest.raises(BadAnswer, match=r"it is (cut|empty)\."):
        asked(fake, form())


# --- the cache


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    usage, cache = Usage(), ChatCache(tmp_path / "cache", "server")
    with chatting(Reply("first"), Reply("second")) as fake:
        assert [asked(fake, usage=usage, cache=cache).text for _ in range(3)] == ["first"] * 3
        assert len(fake.bodies) == 1
    assert usage.take()["teacher"] == {
        "cached": 2,
        "completion_tokens": 3,
        "cost": 0.0,
        "prompt_tokens": 7,
        "requests": 1,
    }


CHANGES: dict[str, dict[str, Any]] = {
    "text": {"messages": ({"role": "user", "content": "1+2?"},)},
    "speaker": {"messages": ({"role": "system", "content": "1+1?"},)},
    "limit": {"max_tokens": 21},
    "temperature": {"temperature": 0.0},
    "top_p": {"top_p": 0.9},
    "seed": {"seed": 1},
    "number": {"number": 1},
    "form": {"schema": FORM},
}


@pytest.mark.parametrize("change", CHANGES)
def test_everything_that_determines_an_answer_is_part_of_its_key(change: str, tmp_path: Path) -> None:
    def texts(asking: ChatRequest, identity: str = "server", **settings: Any) -> str:
        cache = ChatCache(tmp_path, identity)
        return asked(fake, lambda client: client.answer(asking), cache=cache, **settings).text

    with chatting(Reply("first"), Reply("second"), Reply("third"), Reply("fourth")) as fake:
        assert texts(request()) == "first"
        assert texts(request(**CHANGES[change])) == "second"
        assert texts(request(), model="other") == "third"
        assert texts(request(), "another server") == "fourth"
        assert texts(request(role="other", timeout_s=9.0), timeout_s=5.0, concurrency=1) == "first"


def test_failures_are_not_stored(tmp_path: Path) -> None:
    cache = ChatCache(tmp_path, "")
    with chatting(refused(400), otherwise=Reply("now")) as fake:
        with pytest.raises(ServerRefused):
            asked(fake, cache=cache)
        assert asked(fake, cache=cache).text == "now"


def test_the_first_of_two_answers_stays_and_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    one, other = ChatCache(tmp_path, "s"), ChatCache(tmp_path, "s")
    key = one.key({"a": 1})
    assert one.get(key) is None
    assert one.put(key, {"text": "one"})["text"] == "one"
    assert other.put(key, {"text": "other"})["text"] == "one"
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    for damage in ("", '{"key": "', "[]", json.dumps({"key": "another", "text": "x"})):
        path.write_text(damage)
        assert one.get(key) is None
        assert one.put(key, {"text": "new"})["text"] == "new"
        assert other.get(key) == {"key": key, "text": "new"}
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_two_writers_at_once_use_one_answer(tmp_path: Path) -> None:
    found: dict[int, list[str]] = {}
    start = threading.Barrier(4)

    def write(who: int) -> None:
        cache = ChatCache(tmp_path, "s")
        start.wait()
        found[who] = [cache.put(cache.key({"n": n}), {"text": f"{who}"})["text"] for n in range(30)]

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2] == found[3]
    assert len(list(tmp_path.rglob("*.json"))) == 30
    assert list(tmp_path.rglob("*.tmp")) == []


def test_half_a_surrogate_pair_is_stored(tmp_path: Path) -> None:
    cache = ChatCache(tmp_path, "s")
    cache.put(key := cache.key({}), {"text": "\ud800"})
    assert (cache.get(key) or {})["text"] == "\ud800"


# --- the key


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_key_that_the_server_repeats_is_in_no_error(status: int) -> None:
    echo = refused(status, f"Incorrect API key provided: {KEY}.")
    with chatting(otherwise=echo) as fake, pytest.raises(ServerError) as failed:
        asked(fake, key_variable="REFLUX_TEST_KEY", tries=2)
    shown = [*traceback.format_exception(failed.value), repr(failed.value), str(pickle.dumps(failed.value))]
    assert all(KEY not in text for text in shown)
    assert "[key]" in str(failed.value)
    assert failed.value.__cause__ is None
    assert failed.value.__context__ is None
    assert ("REFLUX_TEST_KEY is not accepted" in str(failed.value)) == (status in (401, 403))


def test_a_key_in_an_answer_is_cut_out_before_it_is_stored(tmp_path: Path) -> None:
    cache = ChatCache(tmp_path, "")
    with chatting(Reply(f"your key is {KEY}")) as fake:
        answer = asked(fake, key_variable="REFLUX_TEST_KEY", cache=cache)
    assert answer.text == "your key is [key]"
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*.json"))
