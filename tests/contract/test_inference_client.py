"""The client of inference servers over a socket, against a server that fails as the real one does."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from fake_vllm import FakeVLLM, normalised, random_head, serving
from reflux.clients import http
from reflux.clients.decoding import VersionSpan
from reflux.clients.inference import GenerateRequest, InferenceClient
from reflux.clients.probe import logprobs_mode, probe
from reflux.errors import BadAnswer, ConfigError, RefluxError, ServerError, ServerRefused

Result = TypeVar("Result")
IDS = [5, 6, 7, 8, 9]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries of a request."""
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)


def asked(fake: FakeVLLM, use: Callable[[InferenceClient], Awaitable[Result]], **limits: Any) -> Result:
    """What `use` gets from a client of `fake`. By default a request is sent three times at most."""

    async def inside() -> Result:
        async with InferenceClient(fake.url, **{"patience_s": 0.0, **limits}) as client:
            return await use(client)

    return asyncio.run(inside())


def sample(seed: int = 3, **more: Any) -> GenerateRequest:
    return GenerateRequest(**{"token_ids": IDS, "max_tokens": 6, "seed": seed, **more})


# --- what is sampled


def test_tokens_and_log_probs_are_those_of_the_model() -> None:
    with serving(FakeVLLM(eos=-1)) as fake:
        made = asked(fake, lambda client: client.generate(sample(temperature=0.7)))
        assert (made.finish, made.stop_reason, made.cut, made.finite) == ("length", None, False, True)
        logits_LV = fake.states([*IDS, *made.tokens_T]) @ random_head().T
        expected_TV = normalised(logits_LV / 0.7)[len(IDS) - 1 : -1]
        np.testing.assert_allclose(
            made.logp_T, np.take_along_axis(expected_TV, made.tokens_T[:, None], 1)[:, 0], atol=1e-5
        )
    assert (made.tokens_T.dtype, made.logp_T.dtype) == (np.int64, np.float32)
    assert made.versions == (VersionSpan("default", 0, 6),)


def test_every_setting_is_sent_and_never_a_number_of_samples() -> None:
    with serving() as fake:
        asked(fake, lambda client: client.generate(sample(top_p=0.9, stop_token_ids=(4,), model="adapter")))
    (body,) = fake.bodies()
    params = body["sampling_params"]
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"} <= {*params}
    assert (params["n"], params["stop_token_ids"], body["model"]) == (1, [4], "adapter")


def test_an_end_token_and_a_stop_token_are_part_of_the_answer() -> None:
    with serving(FakeVLLM(eos=-1)) as fake:
        free = asked(fake, lambda client: client.generate(sample())).tokens_T.tolist()
        stopped = asked(fake, lambda client: client.generate(sample(stop_token_ids=(free[2],))))
        fake.eos = free[2]
        ended = asked(fake, lambda client: client.generate(sample()))
    cut = free[: free.index(free[2]) + 1]
    assert (stopped.tokens_T.tolist(), stopped.finish, stopped.stop_reason) == (cut, "stop", free[2])
    assert (ended.tokens_T.tolist(), ended.finish, ended.stop_reason) == (cut, "stop", None)


def test_an_answer_that_the_context_window_ended_says_so() -> None:
    with serving(FakeVLLM(max_model_len=8, eos=-1)) as fake:
        made = asked(fake, lambda client: client.generate(sample()))
    assert (len(made.tokens_T), made.finish, made.cut) == (3, "length", True)


def test_the_likeliest_tokens_come_sorted_and_a_filtered_one_is_minus_infinity() -> None:
    with serving(FakeVLLM(eos=-1)) as fake:
        made = asked(fake, lambda client: client.generate(sample(top=4, top_k=2)))
    assert made.top_ids_TK is not None
    assert made.top_logp_TK is not None
    assert made.top_ids_TK.shape == (6, 4)
    assert (np.diff(made.top_logp_TK[:, :2]) <= 0).all()
    assert (made.top_logp_TK[:, 2:] == -np.inf).all()
    assert made.finite


def test_broken_weights_are_read_as_not_a_number() -> None:
    with serving(FakeVLLM(always="nan")) as fake:
        made = asked(fake, lambda client: client.generate(sample()))
    assert np.isnan(made.logp_T).all()
    assert not made.finite


@pytest.mark.parametrize(
    ("fault", "words"),
    [("foreign", "other tokens"), ("lost", "one log-prob for each"), ("crossed", "another request")],
)
def test_an_answer_of_another_content_is_refused_and_not_asked_again(fault: str, words: str) -> None:
    with serving(FakeVLLM(always=fault)) as fake, pytest.raises(BadAnswer, match=words):
        asked(fake, lambda client: client.generate(sample()))
    assert len(fake.served) == 1


# --- retries


@pytest.mark.parametrize("fault", ["error", "busy", "drop", "cut"])
def test_a_failed_request_is_replayed_and_counted_once(fault: str) -> None:
    async def use(client: InferenceClient) -> Any:
        return await client.generate(sample()), client.traffic

    with serving() as fake:
        plain, _ = asked(fake, use)
        fake.served.clear()
        fake.faults.extend([fault, fault])
        made, traffic = asked(fake, use)
    bodies = fake.bodies()
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]
    np.testing.assert_array_equal(made.tokens_T, plain.tokens_T)
    np.testing.assert_array_equal(made.logp_T, plain.logp_T)
    assert (traffic.answered, traffic.replays, traffic.failed) == (1, 2, 0)


def test_a_silent_server_is_given_up_after_the_read_time_out() -> None:
    """Every request has one, and the first answer that does come is taken."""

    async def use(client: InferenceClient) -> Any:
        return await client.generate(sample()), client.traffic

    with serving(FakeVLLM(faults=deque(["hang"]))) as fake:
        made, traffic = asked(fake, use, read_timeout_s=0.5)
    assert made.finite
    assert (traffic.answered, traffic.replays) == (1, 1)


def test_a_mistake_of_the_caller_is_never_sent_again() -> None:
    async def use(client: InferenceClient) -> Any:
        with pytest.raises(ServerRefused, match="out of vocabulary") as caught:
            await client.generate(sample(token_ids=[5, 102]))
        return caught.value, client.traffic

    with serving() as fake:
        error, traffic = asked(fake, use, patience_s=60.0)
    assert (error.status, error.reason) == (400, "Token id 102 is out of vocabulary")
    assert len(fake.served) == 1
    assert (traffic.answered, traffic.replays, traffic.failed) == (0, 0, 1)


def test_a_server_that_keeps_failing_ends_in_a_sentence() -> None:
    with (
        serving(FakeVLLM(always="error")) as fake,
        pytest.raises(ServerError, match=r"no answer in 3 tries: status 500 EngineCore.*Check that"),
    ):
        asked(fake, lambda client: client.generate(sample()))
    assert len(fake.served) == 3


def test_no_server_at_all_is_a_sentence_too() -> None:
    with serving() as fake:
        pass
    with pytest.raises(ServerError, match="Check that the server runs"):
        asked(fake, lambda client: client.generate(sample()))


def test_a_server_that_restarts_is_waited_for() -> None:
    """Longer than the tries alone would last."""
    with serving() as fake:
        port = int(fake.url.rpartition(":")[2])

    async def use(client: InferenceClient) -> Any:
        waiting = asyncio.create_task(client.generate(sample()))
        await asyncio.sleep(0.5)
        assert client.traffic.replays > 3
        with serving(FakeVLLM(), port):
            return await waiting

    assert asked(fake, use, patience_s=60.0).finite


def test_a_request_that_changes_the_server_is_sent_once() -> None:
    with serving() as fake:

        async def use(client: InferenceClient) -> None:
            assert await client.control("/pause", query={"mode": "keep"}) == {"status": "paused"}
            assert await client.control("/finish_weight_update", {"weight_version": "7"}) == {}
            assert (await client.get("/weight_info"))["weight_version"] == "7"
            made = await client.generate(sample())
            assert {span.version for span in made.versions} == {"7"}

        asked(fake, use)
        assert fake.served[0] == ("/pause", {"mode": "keep"}, {})
    with pytest.raises(ServerError, match="in 1 try"):
        asked(fake, lambda client: client.control("/resume"), patience_s=60.0)


def test_no_more_requests_than_allowed_are_in_flight() -> None:
    async def use(client: InferenceClient) -> Any:
        return await asyncio.gather(*(client.generate(sample(seed)) for seed in range(20)))

    with serving(FakeVLLM(delay_s=0.05)) as fake:
        apart = asked(fake, use, concurrency=3)
        assert fake.most_at_once <= 3
        together = asked(fake, use, concurrency=20)
    assert fake.most_at_once > 3
    assert [made.tokens_T.tolist() for made in apart] == [made.tokens_T.tolist() for made in together]


def test_an_answer_that_arrived_while_the_loop_was_busy_is_read() -> None:
    """Models in this process compute in the thread of the loop, longer than the read time-out perhaps."""

    async def use(client: InferenceClient) -> Any:
        waiting = asyncio.create_task(client.generate(sample()))
        while not fake.served:
            await asyncio.sleep(0.01)
        time.sleep(1.0)
        return await waiting, client.traffic

    with serving() as fake:
        _, traffic = asked(fake, use, read_timeout_s=0.5)
    assert (traffic.answered, traffic.replays) == (1, 0)


def test_a_cancelled_request_is_not_sent_again() -> None:
    async def use(client: InferenceClient) -> None:
        waiting = asyncio.create_task(client.generate(sample()))
        while not fake.served:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with serving(FakeVLLM(always="hang")) as fake:
        asked(fake, use)
        assert len(fake.served) == 1


# --- tokens and addresses


def test_the_token_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abc-123")
    with serving(FakeVLLM(token="abc-123")) as fake:
        assert asked(fake, lambda client: client.generate(sample()), token_variable="MY_TOKEN").finite
        with pytest.raises(ServerRefused, match="Name the environment variable"):
            asked(fake, lambda client: client.generate(sample()))
        monkeypatch.setenv("MY_TOKEN", "wrong-xyz")
        with pytest.raises(ServerRefused, match="MY_TOKEN is not accepted") as caught:
            asked(fake, lambda client: client.generate(sample()), token_variable="MY_TOKEN")
    assert "xyz" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(ConfigError, match="MY_TOKEN") as caught:
        InferenceClient("http://localhost:1", token_variable="MY_TOKEN")
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:b:c", "http://me:pw@host"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InferenceClient(url)
    assert isinstance(caught.value, RefluxError)
    assert "pw" not in str(caught.value)


# --- scores


def test_log_probs_at_given_ids_are_those_of_the_model() -> None:
    asked_TK = np.asarray([[1, 2], [3, 4], [50, 101]])
    with serving() as fake:
        got = asked(fake, lambda client: client.logp_at(IDS, 2, asked_TK))
        expected = np.take_along_axis(fake.logp(IDS)[1:4], asked_TK, 1)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_hidden_states_are_those_of_the_model_or_refused() -> None:
    with serving() as fake:
        got = asked(fake, lambda client: client.hidden_at(IDS, 2))
        np.testing.assert_allclose(got, fake.states(IDS)[1:4], atol=1e-6)
        fake.hidden = False
        with pytest.raises(BadAnswer, match="instead of hidden states"):
            asked(fake, lambda client: client.hidden_at(IDS, 2))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_prompt_log_probs_list_the_token_and_the_likeliest(k: int) -> None:
    with serving() as fake:
        logp_TV = fake.logp(IDS)[1:4]
        # the last token is the likeliest one: then there are k entries and not k + 1
        ids = [*IDS[:4], int(fake.logp(IDS)[3].argmax())]
        got = asked(fake, lambda client: client.listed(ids, 2, k))
    np.testing.assert_allclose(got.logp_T, logp_TV[np.arange(3), ids[2:]], atol=1e-5)
    assert got.ids_TK.tolist() == np.argsort(-logp_TV, axis=1, kind="stable")[:, :k].tolist()
    np.testing.assert_allclose(got.logp_TK, np.take_along_axis(logp_TV, got.ids_TK, 1), atol=1e-5)


@pytest.mark.parametrize("fault", ["short", "none"])
def test_scores_that_are_missing_are_refused(fault: str) -> None:
    with serving(FakeVLLM(always=fault)) as fake, pytest.raises(BadAnswer):
        asked(fake, lambda client: client.logp_at(IDS, 2, np.ones((3, 2), np.int64)))


def test_scores_that_are_no_numbers_are_given_as_such() -> None:
    with serving(FakeVLLM(always="nan")) as fake:
        got = asked(fake, lambda client: client.logp_at(IDS, 2, np.ones((3, 2), np.int64)))
        assert np.isnan(got).all()
        with pytest.raises(ServerRefused, match="not JSON compliant"):
            asked(fake, lambda client: client.listed(IDS, 2, 0))


# --- abilities


def test_a_server_proves_what_it_can_do() -> None:
    with serving() as fake:
        found = asked(fake, lambda client: probe(client, IDS))
        assert (found.given_ids, found.hidden, found.version, dict(found.missing)) == (
            True,
            12,
            "default",
            {},
        )


@pytest.mark.parametrize("given", ["ignored", "refused"])
def test_a_server_without_given_ids_is_found_out(given: str) -> None:
    with serving(FakeVLLM(given_ids=given, label=None, processed=False)) as fake:
        found = asked(fake, lambda client: probe(client, IDS))
        assert (found.given_ids, found.hidden, found.version) == (False, 0, None)
        assert {*found.missing} == {"given_ids", "hidden", "version"}


def test_given_ids_that_are_not_those_of_the_model_are_no_ability() -> None:
    with serving() as fake:
        # prompt_logprobs, given ids, hidden states, one sampled token
        fake.faults.extend(["", "uniform", "", ""])
        found = asked(fake, lambda client: probe(client, IDS))
    assert (found.given_ids, found.hidden) == (False, 12)
    assert "differ" in found.missing["given_ids"]


def test_a_refused_token_is_not_a_missing_ability() -> None:
    with serving(FakeVLLM(token="abc")) as fake, pytest.raises(ServerRefused, match="status 401"):
        asked(fake, lambda client: probe(client, IDS))


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("processed", [True, False])
def test_the_mode_of_log_probs_is_measured(spread: float, processed: bool) -> None:
    """Also of a model that gives all tokens the same probability, and of one that is certain."""
    with serving(FakeVLLM(processed=processed, head_VH=spread * random_head())) as fake:
        found = asked(fake, lambda client: logprobs_mode(client, IDS))
        assert found == ("processed" if processed else "raw")
        assert all("prompt_logprobs" not in body["sampling_params"] for body in fake.bodies())


def test_logits_are_another_mode_and_broken_weights_none() -> None:
    with serving() as fake:
        fake.always = "nan"
        assert asked(fake, lambda client: logprobs_mode(client, IDS)) is None
        fake.always = ""
        plain = fake.choice

        def logits(ids: list[int], params: Any, fault: str) -> Any:
            made = plain(ids, params, fault)
            for one in made["logprobs"]["content"][0]["top_logprobs"]:
                one["logprob"] += 3.0 * params["temperature"]
            return made

        fake.choice = logits  # type: ignore[method-assign]
        assert asked(fake, lambda client: logprobs_mode(client, IDS)) == "other"
