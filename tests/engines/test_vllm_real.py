"""The vLLM sampler on a real server: `make test-engines`. Its faults are in test_faults_real.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract.test_vllm_sampler import at, logp_of
from engines.conftest import Real, opened, own_net
from engines.real_server import CLOSE, DRAW, agree, moved, prompts, sample
from reflux.clients.decoding import generated
from reflux.clients.inference import GENERATE, GenerateRequest
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.models import lora
from reflux.models.settings import Lora
from reflux.models.text import as_model, load_tokenizer
from reflux.runtime.weights import AdapterWeights, InMemory
from reflux.types import Prompt, TokenRollout

# a start of the server on a machine that is busy
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1700)]
# At temperature 1 it gives the same numbers.
RAW = ["--logprobs-mode", "raw_logprobs"]


def test_log_probs_are_those_of_the_model(real: Real) -> None:
    real.run(real.publish(own_net(), 0))
    rollouts = real.run(sample(real))
    agree(real, rollouts)
    for rollout in rollouts:
        assert rollout.version == 0
        behaviour: Any = rollout.behaviour
        logp_TV = logp_of(real.net, rollout)
        np.testing.assert_allclose(behaviour.logp_TK, -np.sort(-logp_TV, axis=1)[:, :5], **CLOSE)
        np.testing.assert_allclose(
            np.take_along_axis(logp_TV, behaviour.ids_TK, axis=1), behaviour.logp_TK, **CLOSE
        )
    assert {rollout.finish for rollout in rollouts} >= {"stop"}


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_log_probs_of_other_distributions(real: Real, temperature: float, top_p: float) -> None:
    rollouts = real.run(sample(real, SamplingParams(0, "eval", 64, temperature, top_p)))
    agree(real, rollouts)
    for rollout in rollouts:
        logp_TV = logp_of(real.net, rollout)
        if temperature == 0:
            np.testing.assert_array_equal(rollout.tokens_T, logp_TV.argmax(1))
            continue
        logp_TV = torch.tensor(logp_TV / temperature).log_softmax(-1).numpy()
        for logp_V, logp, token in zip(logp_TV, rollout.logp_T, rollout.tokens_T, strict=True):
            order = np.argsort(-logp_V)
            kept = order[np.concatenate([[0], np.cumsum(np.exp(logp_V[order]))[:-1]]) < top_p]
            assert abs(logp - (logp_V[token] - np.log(np.exp(logp_V[kept]).sum()))) < CLOSE["atol"]


def test_a_request_gives_the_same_alone_and_among_others(real: Real) -> None:
    async def alone() -> list[TokenRollout]:
        groups = [await real.sampler.sample(prompt, 3, DRAW) for prompt in reversed(prompts())]
        return [attempt.rollout for group in reversed(groups) for attempt in group]

    together, single = real.run(sample(real)), real.run(alone())
    for one, other in zip(together, single, strict=True):
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)
        np.testing.assert_array_equal(one.logp_T, other.logp_T)


def test_a_stop_text_ends_an_answer(real: Real) -> None:
    free = real.run(sample(real))
    stop = max((rollout.text for rollout in free), key=len)[8:11]
    cut = real.run(sample(real, SamplingParams(3, "train", 64, stop=(stop,))))
    assert any(stop in rollout.text for rollout in free)
    for whole, one in zip(free, cut, strict=True):
        place = whole.text.find(stop)
        assert one.text == (whole.text if place < 0 else whole.text[: place + len(stop)])
        assert place < 0 or one.finish == "stop"


def test_the_plugin_answers_with_given_ids_and_hidden_states(real: Real) -> None:
    async def act() -> Any:
        client, rollout = await real.client(), (await sample(real))[0]
        ids, first = [*rollout.prompt_tokens.tolist(), *rollout.tokens_T.tolist()], len(rollout.prompt_tokens)
        asked_TK = np.tile([[3, 9, 40]], (rollout.length, 1))
        return rollout, await client.logp_at(ids, first, asked_TK), await client.hidden_at(ids, first)

    rollout, logp_TK, h_TH = real.run(act())
    np.testing.assert_allclose(logp_TK, logp_of(real.net, rollout)[:, [3, 9, 40]], **CLOSE)
    ids = torch.tensor([[*rollout.prompt_tokens.tolist(), *rollout.tokens_T.tolist()]])
    with torch.no_grad():
        expected = real.net.model(input_ids=ids).last_hidden_state[0, len(rollout.prompt_tokens) - 1 : -1]
    np.testing.assert_allclose(h_TH, expected.numpy(), atol=1e-3)


def test_new_weights_are_sampled_from(real: Real) -> None:
    """The head of this model is tied. A long prompt, whose first blocks were in the cache, is read anew."""
    long = Prompt("long", ({"role": "user", "content": "2 + 3 " * 60},))

    async def both() -> list[TokenRollout]:
        group = await real.sampler.sample(long, 3, DRAW)
        return [attempt.rollout for attempt in group] + await sample(real)

    agree(real, real.run(both()))
    for version in (1, 2):
        real.run(real.publish(moved(version), version))
        rollouts = real.run(both())
        assert {rollout.version for rollout in rollouts} == {version}
        agree(real, rollouts)


def test_requests_in_flight_go_on_with_new_weights(real: Real) -> None:
    """Each token is labelled with the weights that it was sampled from."""
    nets = {2: moved(2), 3: moved(3)}
    real.run(real.publish(nets[2], 2))

    async def written(control: Any) -> float:
        text = await control.get("/metrics")
        lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
        return float(lines[0].split()[-1])

    async def act() -> list[Any]:
        server = await real.sampler.served.supervisor.ready()
        asks = [GenerateRequest(token_ids=[5, 6, seed], max_tokens=400, seed=seed) for seed in range(10, 14)]
        before = await written(server.control)

        async def flying(ask: GenerateRequest) -> Any:
            body = ask.body()
            body["sampling_params"]["ignore_eos"] = True
            answer = await server.requests.post(GENERATE, body)
            return generated(answer, ask.max_tokens, 0)

        tasks = [asyncio.create_task(flying(ask)) for ask in asks]
        while await written(server.control) < before + 80:
            await asyncio.sleep(0.01)
        await real.publish(nets[3], 3)
        return [(ask, await task) for ask, task in zip(asks, tasks, strict=True)]

    for ask, answer in real.run(act()):
        labels = [span.version for span in answer.versions]
        assert labels == ["2", "3"]
        for label, start, end in answer.versions:
            ids = torch.tensor([[*ask.token_ids, *answer.tokens_T.tolist()]])
            with torch.no_grad():
                logp_LV = nets[int(label)](input_ids=ids).logits[0].double().log_softmax(-1)
            first = len(ask.token_ids) - 1
            logp_T = at(logp_LV[first:-1].numpy(), answer.tokens_T)
            np.testing.assert_allclose(answer.logp_T[start:end], logp_T[start:end], **CLOSE)


def test_an_adapter_is_served_under_its_version(python: str, tmp_path: Path) -> None:
    """On a server of its own: with adapters, vLLM 0.32 ends at a request for log-probs of a prompt."""
    model = as_model(own_net(), load_tokenizer("reflux:student"))
    lora.attach(model, Lora(rank=4, alpha=8.0), seed=1)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in model.net.named_parameters():
            if "lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=rng))
    config = lora.adapter_config(model.net)
    assert config is not None
    adapter = AdapterWeights(config, lambda: lora.adapter_tensors(model.net))
    weights = InMemory(5, lambda: lora.full_weights(model.net), adapter=adapter)
    merged = own_net()
    merged.load_state_dict(lora.merged(model.net))

    with opened(python, tmp_path / "own", weights=weights, lora_rank=4, arguments=RAW) as real:
        real.net = merged
        rollouts = real.run(sample(real))
        assert {rollout.version for rollout in rollouts} == {5}
        agree(real, rollouts)
        # A sampler that finds such a server does not take these log-probs for those of the distribution.
        url = real.run(real.client()).url
        with (
            pytest.raises(ModelError, match=r"own log-probs .* --logprobs-mode processed_logprobs"),
            opened(None, tmp_path / "found", mode="url", url=url),
        ):
            pass
        # A student without an adapter is sent merged, also to this server.
        real.run(real.publish(moved(6), 6))
        rollouts = real.run(sample(real))
        assert {rollout.version for rollout in rollouts} == {6}
        agree(real, rollouts)
