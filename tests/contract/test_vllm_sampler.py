"""The vLLM sampler against a server with a real tiny model in it: log-probs, versions, limits, and what it
refuses.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fake_vllm import serving
from reflux.config.context import Generation
from reflux.config.registry import build
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import BadAnswer, ConfigError, DataError, ModelError, ServerError
from reflux.models.rng import row_key
from reflux.runtime.services import Services
from reflux.runtime.weights import AdapterWeights, InMemory
from reflux.tasks.word_problems import WordProblems
from reflux.types import Prompt, TokenRollout
from tiny import END
from vllm_model import ModelFake

PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": text},)) for i, text in enumerate(("ab", "2 + 3?", "x"))
]
DRAW = SamplingParams(3, "train", 12)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny.save(tiny.net(5, lift=1.5).cpu(), tmp_path / "student")


@contextmanager
def server(folder: str, **fields: Any) -> Iterator[ModelFake]:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with serving(ModelFake(net, **fields)) as fake:
        yield fake  # type: ignore[misc]


def opened(
    folder: str,
    tmp_path: Path,
    act: Callable[[Any], Awaitable[Any]],
    url: str,
    requirements: Requirements = Requirements(),
    **fields: Any,
) -> Any:
    """What `act` returns with the open sampler."""

    async def run() -> Any:
        part = build("samplers", {"kind": "vllm", "mode": "url", "url": url, **fields}, "sampler")
        context = tiny.context(
            requirements,
            name="sampler",
            seed=7,
            model=folder,
            task=WordProblems(),
            generation=Generation(),
            folder=tmp_path / "part",
        )
        services = Services(context.student)
        try:
            async with part.open(context, services) as sampler:
                return await act(sampler)
        finally:
            services.close()

    return asyncio.run(run())


async def sample(sampler: Any, draw: SamplingParams = DRAW, n: int = 2) -> list[TokenRollout]:
    groups = await asyncio.gather(*(sampler.sample(prompt, n, draw) for prompt in PROMPTS))
    return [attempt.rollout for group in groups for attempt in group]


def logp_of(net: Any, rollout: TokenRollout) -> np.ndarray:
    """From the definition: log softmax at the tokens, [T, V]."""
    ids = torch.tensor([[*rollout.prompt_tokens.tolist(), *rollout.tokens_T.tolist()]])
    with torch.no_grad():
        logits_LV = net(input_ids=ids).logits[0].double()
    first = len(rollout.prompt_tokens) - 1
    return logits_LV.log_softmax(-1)[first:-1].numpy()


def at(logp_TV: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    return logp_TV[np.arange(len(tokens_T)), tokens_T]


def moved(net: Any) -> Any:
    """The same model with other weights."""
    other = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return other


def published(net: Any, version: int) -> InMemory:
    return InMemory.of(net.state_dict(), version)


def test_log_probs_are_those_of_the_model(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        rollouts = opened(folder, tmp_path, sample, fake.url, max_tokens=12)
        for rollout in rollouts:
            assert rollout.version == 0
            assert rollout.logp_raw_T is None
            np.testing.assert_allclose(
                rollout.logp_T, at(logp_of(fake.net, rollout), rollout.tokens_T), atol=1e-5
            )
            assert rollout.finish == ("stop" if rollout.tokens_T[-1] == END else "length")
            assert rollout.finish == "stop" or rollout.length == 12
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}


def test_each_request_has_its_own_hashed_seed(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        opened(folder, tmp_path, sample, fake.url, max_tokens=12)
        asked = {body["sampling_params"]["seed"]: body["sampling_params"] for body in fake.bodies()}
        expected = {row_key(7, "train", 3, prompt.key, i) for prompt in PROMPTS for i in range(2)}
    assert set(asked) == expected
    assert {params.get("n", 1) for params in asked.values()} == {1}
    assert all(END in params["stop_token_ids"] for params in asked.values())
    seeds = sorted(asked)
    assert min(np.diff(np.asarray(seeds, dtype=object))) > 1


def test_new_weights_are_sampled_from_and_label_the_tokens(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        other = moved(fake.net)

        async def act(sampler: Any) -> Any:
            before = await sample(sampler)
            await sampler.publish(published(other, 4), 9)
            return before, await sample(sampler)

        before, after = opened(folder, tmp_path, act, fake.url, max_tokens=12)
        calls = [path for path in fake.paths() if path not in ("/inference/v1/generate", "/health")]
    assert [rollout.version for rollout in (*before, *after)] == [0] * 6 + [4] * 6
    for rollout in after:
        np.testing.assert_allclose(rollout.logp_T, at(logp_of(other, rollout), rollout.tokens_T), atol=1e-5)
    update = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert calls[-7:] == [*update, "/reset_prefix_cache", "/resume", "/weight_info"]
    assert [query for path, query, _ in fake.served if path == "/pause"] == [{"mode": "keep"}]


def test_weights_come_in_several_files(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reflux.samplers import vllm_weights

    monkeypatch.setattr(vllm_weights.FileDelivery.__init__, "__defaults__", (4096,))
    with server(folder) as fake:
        other = moved(fake.net)

        async def act(sampler: Any) -> Any:
            await sampler.publish(published(other, 1), 1)
            shared = sampler.served.folder
            assert sum(file.stat().st_size for file in shared.iterdir()) > 4096
            return shared

        shared = opened(folder, tmp_path, act, fake.url, max_tokens=12)
        assert fake.paths().count("/update_weights") > 2
        for name, value in other.named_parameters():
            assert torch.equal(dict(fake.net.named_parameters())[name], value)
    assert not shared.exists()


def test_the_likeliest_tokens_are_recorded(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        rollouts = opened(folder, tmp_path, sample, fake.url, Requirements(behaviour=5), max_tokens=12)
        for rollout in rollouts:
            behaviour: Any = rollout.behaviour
            order_TK = np.argsort(-logp_of(fake.net, rollout), axis=1)[:, :5]
            np.testing.assert_array_equal(np.sort(behaviour.ids_TK), np.sort(order_TK))
            listed_TK = np.take_along_axis(logp_of(fake.net, rollout), behaviour.ids_TK, axis=1)
            np.testing.assert_allclose(behaviour.logp_TK, listed_TK, atol=1e-5)


def test_another_distribution_is_recorded_beside_the_models(folder: str, tmp_path: Path) -> None:
    draw = SamplingParams(0, "train", 12, 0.7, 0.9)
    with server(folder) as fake:
        rollouts = opened(
            folder,
            tmp_path,
            lambda sampler: sample(sampler, draw),
            fake.url,
            Requirements(behaviour=3),
            temperature=0.7,
            top_p=0.9,
            allow_biased=True,
            max_tokens=12,
        )
        for rollout in rollouts:
            raw_TV = logp_of(fake.net, rollout)
            tempered_TV = torch.tensor(raw_TV / 0.7).log_softmax(-1).numpy()
            for logp_V, logp, token in zip(tempered_TV, rollout.logp_T, rollout.tokens_T, strict=True):
                order = np.argsort(-logp_V)
                kept = order[np.concatenate([[0], np.cumsum(np.exp(logp_V[order]))[:-1]]) < 0.9]
                assert abs(logp - (logp_V[token] - np.log(np.exp(logp_V[kept]).sum()))) < 1e-5
            assert rollout.logp_raw_T is not None
            np.testing.assert_allclose(rollout.logp_raw_T, at(raw_TV, rollout.tokens_T), atol=1e-5)
            behaviour: Any = rollout.behaviour
            np.testing.assert_allclose(
                behaviour.logp_TK, np.take_along_axis(raw_TV, behaviour.ids_TK, axis=1), atol=1e-5
            )


def test_the_likeliest_token_is_taken_at_temperature_0(folder: str, tmp_path: Path) -> None:
    draw = SamplingParams(0, "eval", 12, 0.0)
    with server(folder) as fake:
        rollouts = opened(folder, tmp_path, lambda sampler: sample(sampler, draw), fake.url, max_tokens=12)
        for rollout in rollouts:
            logp_TV = logp_of(fake.net, rollout)
            np.testing.assert_array_equal(rollout.tokens_T, logp_TV.argmax(1))
            np.testing.assert_allclose(rollout.logp_T, logp_TV.max(1), atol=1e-5)


def test_a_stop_text_ends_an_answer_and_is_part_of_it(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        free = opened(folder, tmp_path, sample, fake.url, max_tokens=12)
        text = max((rollout.text for rollout in free), key=len)
        stop = text[3:5]
        draw = SamplingParams(3, "train", 12, stop=(stop,))
        cut = opened(folder, tmp_path, lambda sampler: sample(sampler, draw), fake.url, max_tokens=12)
    assert any(stop in rollout.text for rollout in free)
    for whole, one in zip(free, cut, strict=True):
        place = whole.text.find(stop)
        if place < 0:
            assert one.text == whole.text
        else:
            assert (one.text, one.finish) == (whole.text[: place + len(stop)], "stop")
            np.testing.assert_array_equal(one.tokens_T, whole.tokens_T[: one.length])


def test_tokens_of_one_request_may_have_two_versions(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        whole = fake.choice

        def choice(ids: Any, params: Any, fault: Any) -> Any:
            made = whole(ids, params, fault)
            length = len(made["token_ids"])
            made["weight_versions"] = [
                {"version": "6", "start": 0, "end": 1},
                *([{"version": "7", "start": 1, "end": length}] if length > 1 else []),
            ]
            return made

        fake.choice = choice  # type: ignore[method-assign]

        async def act(sampler: Any) -> Any:
            turns: list[Any] = []
            generate = sampler.generate

            async def kept(requests: Any) -> Any:
                turns.extend(found := await generate(requests))
                return found

            sampler.driver.generator.generate = kept
            return await sample(sampler), turns

        rollouts, turns = opened(folder, tmp_path, act, fake.url, max_tokens=12)
    assert {rollout.version for rollout in rollouts} == {6}
    assert all(turn.version_T.tolist() == [6, *[7] * (len(turn.tokens) - 1)] for turn in turns)


def test_a_prompt_that_does_not_fit_is_refused_or_left_out(folder: str, tmp_path: Path) -> None:
    prompt = Prompt("long", ({"role": "user", "content": "x" * 60},))
    with server(folder) as fake:
        fake.max_model_len = 50

        async def act(sampler: Any) -> Any:
            return await sampler.sample(prompt, 1, DRAW)

        with pytest.raises(DataError, match="prompt long has 62 tokens, more than the 48 that fit"):
            opened(folder, tmp_path, act, fake.url, max_tokens=12)
        group = opened(folder, tmp_path, act, fake.url, max_tokens=12, long_prompts="skip")
        assert fake.bodies() == []
    assert group[0].rollout.finish == "error"


def test_an_answer_that_the_server_cut_is_no_answer(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:

        async def act(sampler: Any) -> Any:
            # The server has less room than it said.
            fake.max_model_len = 8
            fake.eos = -1
            return await sampler.sample(PROMPTS[0], 6, SamplingParams(0, "train", 60))

        with pytest.raises(ModelError, match=r"ended an answer after \d of 60 tokens"):
            opened(folder, tmp_path, act, fake.url)


def test_weights_that_are_not_finite_are_found(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        fake.always = "nan"
        with pytest.raises(ModelError, match="not finite"):
            opened(folder, tmp_path, sample, fake.url)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.norm.weight"), r"the learner has no model\.norm\.weight"),
        (lambda state: state.update({"extra.weight": torch.ones(3)}), r"extra\.weight is not in its files"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight is \(3,\) in the learner and \(32,\) in its files",
        ),
    ],
)
def test_weights_that_do_not_fit_are_not_sent(
    folder: str, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    with server(folder) as fake:
        state = dict(fake.net.state_dict())
        change(state)

        async def act(sampler: Any) -> None:
            await sampler.publish(InMemory.of(state, 1), 1)

        with pytest.raises(ModelError, match=words):
            opened(folder, tmp_path, act, fake.url)
        assert "/pause" not in fake.paths()


@pytest.mark.parametrize("path", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_a_failed_update_of_a_foreign_server_ends_the_run(folder: str, tmp_path: Path, path: str) -> None:
    with server(folder, refused=(path,)) as fake:

        async def act(sampler: Any) -> None:
            await sampler.publish(published(fake.net, 1), 1)

        with pytest.raises(ServerError, match="cannot be used any more: a change of its weights failed"):
            opened(folder, tmp_path, act, fake.url)


def test_a_server_with_other_log_probs_is_refused(folder: str, tmp_path: Path) -> None:
    """vLLM's own default is another mode than the one that a sampler needs, and at temperature 1 both give
    the same numbers.
    """

    async def act(sampler: Any) -> None:
        await sampler.publish(published(fake.net, 0), 0)

    with server(folder) as fake:
        fake.processed = False
        with pytest.raises(ModelError, match=r"own log-probs .* --logprobs-mode processed_logprobs"):
            opened(folder, tmp_path, act, fake.url)


def test_a_server_that_a_killed_run_left_paused_is_used(folder: str, tmp_path: Path) -> None:
    async def act(sampler: Any) -> Any:
        await sampler.publish(published(fake.net, 3), 0)
        return await sample(sampler)

    with server(folder) as fake:
        fake.paused = True
        assert {rollout.version for rollout in opened(folder, tmp_path, act, fake.url)} == {3}
        fake.updating = True
        words = "an update that another run began was never finished, .* Start it again"
        with pytest.raises(ServerError, match=words):
            opened(folder, tmp_path, act, fake.url)
        assert fake.updating


def test_a_cache_that_is_not_reset_is_found(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        fake.resets = False

        async def act(sampler: Any) -> None:
            await sampler.publish(published(fake.net, 1), 1)

        with pytest.raises(ServerError, match="did not reset its prefix cache"):
            opened(folder, tmp_path, act, fake.url)


def test_a_label_of_another_program_is_found(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:

        async def act(sampler: Any) -> None:
            fake.label = "other-run"
            await sample(sampler)

        with pytest.raises(BadAnswer, match="label 'other-run'"):
            opened(folder, tmp_path, act, fake.url)


def test_an_aborted_request_is_sent_again(folder: str, tmp_path: Path) -> None:
    with server(folder) as fake:
        plain = opened(folder, tmp_path, sample, fake.url, max_tokens=12)
        whole, aborted = fake.choice, [0]

        def choice(ids: Any, params: Any, fault: Any) -> Any:
            made = whole(ids, params, fault)
            aborted[0] += 1
            return {**made, "finish_reason": "abort"} if aborted[0] % 2 else made

        fake.choice = choice  # type: ignore[method-assign]
        again = opened(folder, tmp_path, sample, fake.url, max_tokens=12)
    assert aborted[0] > len(again)
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)


# --- adapters


def adapted(folder: str, version: int) -> InMemory:
    """A student with a new adapter, which changes no number of the model."""
    from reflux.models import lora
    from reflux.models.settings import Lora
    from reflux.models.text import load_model

    model = load_model(folder, "model", dtype="float32", device="cpu")
    lora.attach(model, Lora(rank=2, alpha=4.0), seed=1)
    config = lora.adapter_config(model.net)
    assert config is not None
    adapter = AdapterWeights(config, lambda: lora.adapter_tensors(model.net))
    return InMemory(version, lambda: lora.full_weights(model.net), adapter=adapter)


def test_requests_name_the_adapter_and_its_version_labels_the_tokens(folder: str, tmp_path: Path) -> None:
    async def act(sampler: Any) -> Any:
        await sampler.publish(adapted(folder, 5), 1)
        fake.served.clear()
        first = await sample(sampler)
        named = {body["model"] for body in fake.bodies()}
        await sampler.publish(adapted(folder, 6), 2)
        return first, named, await sample(sampler)

    with server(folder) as fake:
        first, named, second = opened(folder, tmp_path, act, fake.url, max_tokens=12, lora_rank=2)
        assert "/pause" not in fake.paths()
    assert named == {"reflux-version5"}
    assert [rollout.version for rollout in (*first, *second)] == [5] * 6 + [6] * 6


def test_a_temperature_is_refused_where_the_server_has_adapters(folder: str, tmp_path: Path) -> None:
    async def act(sampler: Any) -> None:
        await sampler.publish(adapted(folder, 1), 1)
        await sample(sampler, SamplingParams(0, "eval", 12, 0.7))

    with server(folder) as fake, pytest.raises(ConfigError, match=r"temperature of 0\.7 .* Remove lora_rank"):
        opened(folder, tmp_path, act, fake.url, lora_rank=2)


# --- answers that no working server gives


def test_a_token_beyond_the_tokenizer_is_refused(folder: str, tmp_path: Path) -> None:
    """Models have padding rows in their outputs."""
    with server(folder) as fake:
        whole = fake.choice

        def choice(ids: Any, params: Any, fault: Any) -> Any:
            made = whole(ids, params, fault)
            made["token_ids"][0] = made["logprobs"]["content"][0]["token_id"] = 102
            return made

        fake.choice = choice  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="sampled token 102, and the tokenizer has 102"):
            opened(folder, tmp_path, sample, fake.url, max_tokens=12)


def test_a_server_that_labels_nothing_is_refused(folder: str, tmp_path: Path) -> None:
    async def act(sampler: Any) -> None:
        fake.label = None
        await sample(sampler)

    with server(folder) as fake, pytest.raises(BadAnswer, match="does not tell which weights"):
        opened(folder, tmp_path, act, fake.url, max_tokens=12)
