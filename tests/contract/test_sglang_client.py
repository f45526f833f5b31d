"""The client of SGLang against a server made from its documentation; none was at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from fake_sglang import FakeSGLang
from fake_vllm import FakeVLLM, serving
from reflux.clients import http
from reflux.clients.inference import InferenceClient
from reflux.clients.probe import probe
from reflux.clients.sglang import SGLangClient
from reflux.errors import BadAnswer

Result = TypeVar("Result")
IDS = [5, 6, 7, 8, 9, 10]
ASKED = np.asarray([[1, 2], [2, 3], [50, 1]])


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)


def asked(client: type[Any], fake: FakeVLLM, use: Callable[[Any], Awaitable[Result]]) -> Result:
    async def inside() -> Result:
        async with client(fake.url, patience_s=0.0) as opened:
            return await use(opened)

    return asyncio.run(inside())


@pytest.mark.parametrize("k", [0, 3])
def test_both_languages_give_the_same_numbers(k: int) -> None:
    with serving(FakeVLLM()) as vllm, serving(FakeSGLang()) as sglang:
        one = asked(InferenceClient, vllm, lambda client: client.listed(IDS, 3, k))
        other = asked(SGLangClient, sglang, lambda client: client.listed(IDS, 3, k))
        given = asked(InferenceClient, vllm, lambda client: client.logp_at(IDS, 3, ASKED))
        through_union = asked(SGLangClient, sglang, lambda client: client.logp_at(IDS, 3, ASKED))
    np.testing.assert_array_equal(one.ids_TK, other.ids_TK)
    np.testing.assert_allclose(one.logp_TK, other.logp_TK, atol=1e-6)
    np.testing.assert_allclose(one.logp_T, other.logp_T, atol=1e-6)
    np.testing.assert_allclose(given, through_union, atol=1e-6)


def test_one_list_of_ids_is_sent_for_all_positions() -> None:
    with serving(FakeSGLang()) as fake:
        asked(SGLangClient, fake, lambda client: client.logp_at(IDS, 3, ASKED))
    ((_, _, body),) = fake.served
    assert body["token_ids_logprob"] == [1, 2, 3, 50]
    assert body["logprob_start_len"] == 2


def test_what_it_can_do_is_measured() -> None:
    with serving(FakeSGLang(label="5")) as fake:
        found = asked(SGLangClient, fake, lambda client: probe(client, IDS))
    assert (found.given_ids, found.hidden, found.version) == (True, 0, "5")


@pytest.mark.parametrize(("fault", "words"), [("short", "does not have"), ("other", "another text")])
def test_wrong_answers_are_refused(fault: str, words: str) -> None:
    with serving(FakeSGLang(always=fault)) as fake:
        for use in (lambda client: client.logp_at(IDS, 3, ASKED), lambda client: client.listed(IDS, 3, 2)):
            with pytest.raises(BadAnswer, match=words):
                asked(SGLangClient, fake, use)


def test_log_probs_of_other_tokens_are_refused() -> None:
    with serving(FakeSGLang(always="foreign")) as fake, pytest.raises(BadAnswer, match="other tokens"):
        asked(SGLangClient, fake, lambda client: client.listed(IDS, 3, 2))


def test_a_failed_request_is_sent_again() -> None:
    with serving(FakeSGLang()) as fake:
        fake.faults.extend(["error", "drop"])
        asked(SGLangClient, fake, lambda client: client.listed(IDS, 3, 0))
    assert len(fake.served) == 3
