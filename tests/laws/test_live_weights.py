"""Law 11 where the weights change within an answer: each token's log-prob, and the draw itself, are exactly
those of the version that the token carries. And how new weights reach a model call that is running.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from reflux.config.recipe import RunConfig
from reflux.config.step_context import SamplingParams
from reflux.loop import train
from reflux.models.cpu.decoder import CpuDecoder, cpu_decoder
from reflux.models.generate import decode
from reflux.models.rng import gumbel
from reflux.models.static_decoder import StaticDecoder
from reflux.models.text import Model, load_model
from reflux.models.turns import Turn, TurnRequest
from reflux.runtime.services import Services
from reflux.runtime.weights import InMemory
from reflux.samplers.live_weights import CallStopped, LiveWeights
from reflux.storage import checkpoints
from reflux.storage.files import read_lines
from reflux.training import Options

BOUND_NATS = 2e-5
DRAW = SamplingParams(0, "train", 40, temperature=0.9)
Weights = dict[str, torch.Tensor]


@pytest.fixture
def model(student: str) -> Model:
    return load_model(student, "model", device="cpu")


def own(model: Model) -> Weights:
    return {name: value.detach().clone() for name, value in model.net.named_parameters()}


@torch.no_grad()
def put(model: Model, weights: Weights) -> None:
    for name, value in model.net.named_parameters():
        value.copy_(weights[name])


def versions_of(model: Model, number: int) -> list[Weights]:
    """So many weights, each far from the one before."""
    rng = torch.Generator().manual_seed(3)
    found = [own(model)]
    for _ in range(number - 1):
        found.append(
            {name: value + 0.2 * torch.randn(value.shape, generator=rng) for name, value in found[-1].items()}
        )
    return found


def requests(rows: int = 6, top_k: int = 3) -> list[TurnRequest]:
    """Prompts and budgets of different lengths."""
    rng = np.random.default_rng(5)
    return [
        TurnRequest(rng.integers(5, 90, 2 + 5 * row).tolist(), 1 + 7 * row, 7919 * row + 5, DRAW, top_k)
        for row in range(rows)
    ]


def changing(model: Model, weights: list[Weights], at: set[int]) -> Callable[[], int]:
    """Every call is one look; at those in `at` the next weights are taken over."""
    looks, version = count(), 0

    def renew() -> int:
        nonlocal version
        if next(looks) in at:
            version += 1
            put(model, weights[version])
        return version

    return renew


@torch.no_grad()
def by_hand(model: Model, weights: list[Weights], ask: TurnRequest, turn: Turn) -> Iterator[tuple[int, Any]]:
    """(token, log-probs) of each position, from the model's own pass over the text so far with the weights of
    the version that the position carries.
    """
    for position, version in enumerate(turn.version_T.tolist()):
        put(model, weights[version])
        text = torch.tensor([[*ask.ids, *turn.tokens[:position]]])
        logits_1V = model.net(input_ids=text, use_cache=False).logits[:, -1, : model.vocabulary].float()
        logp_1V = (logits_1V / DRAW.temperature).log_softmax(-1)
        noise_1V = gumbel(torch.tensor([ask.rng_key]), torch.tensor([position]), model.vocabulary)
        yield int((logp_1V + noise_1V).argmax()), (logp_1V[0].numpy(), logits_1V[0].log_softmax(-1).numpy())


@pytest.mark.parametrize("way", ["plain", "decoder", "static"])
@pytest.mark.parametrize("at", [set(), {1}, {0, 1, 2, 17}], ids=["never", "once", "often"])
def test_every_token_is_drawn_by_the_version_that_it_carries(model: Model, way: str, at: set[int]) -> None:
    decoders: dict[str, Callable[[], CpuDecoder | StaticDecoder | None]] = {
        "plain": lambda: None,
        "decoder": lambda: cpu_decoder(model),
        "static": lambda: StaticDecoder(model),
    }
    weights, asks, decoder = versions_of(model, 5), requests(), decoders[way]()
    assert (decoder is None) == (way == "plain")
    turns = decode(model, asks, changing(model, weights, at), decoder)
    seen = {version for turn in turns for version in turn.version_T.tolist()}
    # The static decoder looks every 16 tokens, and so three times.
    looked = {look for look in at if way != "static" or look < 3}
    assert len(seen) == len(looked | {0})
    for ask, turn in zip(asks, turns, strict=True):
        assert (np.diff(turn.version_T) >= 0).all()
        assert turn.behaviour_TK is not None
        for position, (token, (logp_V, raw_V)) in enumerate(by_hand(model, weights, ask, turn)):
            assert turn.tokens[position] == token
            assert abs(turn.logp_T[position] - logp_V[token]) < BOUND_NATS
            assert abs(turn.raw_T[position] - raw_V[token]) < BOUND_NATS
            ids_K, listed_K = (column[position] for column in turn.behaviour_TK)
            np.testing.assert_allclose(listed_K, raw_V[ids_K], atol=BOUND_NATS)


def test_the_random_numbers_of_a_row_do_not_depend_on_changes_of_the_weights(model: Model) -> None:
    """The same weights again are another version, and the tokens stay."""
    weights = [versions_of(model, 1)[0]] * 4
    once = decode(model, requests(), lambda: 0)
    again = decode(model, requests(), changing(model, weights, {2, 5, 9}))
    assert [turn.tokens for turn in once] == [turn.tokens for turn in again]
    assert {version for turn in again for version in turn.version_T.tolist()} == {0, 1, 2, 3}


# --- how weights reach a running call


class Net:
    def __init__(self) -> None:
        self.net, self.value = self, torch.zeros(2)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}


def published(version: int, value: float | None = None) -> InMemory:
    return InMemory(
        version, lambda: [("value", torch.full((2,), float(version if value is None else value)))]
    )


def test_publishing_waits_for_one_token_and_not_for_the_call() -> None:
    async def main() -> None:
        live, going, over = LiveWeights(Net()), threading.Event(), threading.Event()
        seen: list[tuple[int, float]] = []

        def call() -> None:
            # long enough for every publish below, unless one waits for the end
            while not over.wait(0.001):
                seen.append((live.renew(), float(live.model.value[0])))
                going.set()

        async def running() -> None:
            async with live.call():
                await asyncio.to_thread(call)

        task = asyncio.ensure_future(running())
        await asyncio.to_thread(going.wait)
        for version in (1, 2, 3):
            await asyncio.wait_for(live.publish(published(version)), 5)
            assert live.version == version
            assert not task.done()
        over.set()
        await task
        # never one version with the weights of another
        assert all(version == value for version, value in seen)
        assert {version for version, _ in seen} >= {0, 1, 2}

    asyncio.run(main())


def test_without_a_call_and_at_the_end_of_one_that_never_looks_the_weights_are_replaced() -> None:
    async def main() -> None:
        live = LiveWeights(Net())
        await live.publish(published(4))
        assert (live.version, live.model.value.tolist()) == (4, [4.0, 4.0])
        async with live.call():
            task = asyncio.ensure_future(live.publish(published(5)))
            await asyncio.sleep(0.01)
            assert (live.version, task.done()) == (4, False)
        await task
        assert (live.version, live.model.value.tolist()) == (5, [5.0, 5.0])

    asyncio.run(main())


def test_an_error_of_new_weights_is_raised_where_they_are_published() -> None:
    def broken() -> Any:
        raise OSError("the file is gone")

    async def main() -> None:
        live = LiveWeights(Net())
        async with live.call():
            task = asyncio.ensure_future(live.publish(InMemory(1, broken)))
            await asyncio.sleep(0)
            # the call goes on with the weights that it has
            assert live.renew() == 0
        with pytest.raises(OSError, match="file is gone"):
            await task

    asyncio.run(main())


def test_weights_that_nobody_waits_for_are_not_taken_over_and_harm_no_call() -> None:
    async def main() -> None:
        live = LiveWeights(Net())
        async with live.call():
            task = asyncio.ensure_future(live.publish(published(1)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert live.renew() == 0
        await live.publish(published(2))
        assert live.version == 2

    asyncio.run(main())


def test_a_call_that_nobody_waits_for_ends_at_its_next_token_and_the_next_one_runs() -> None:
    ended: list[str] = []

    async def main() -> None:
        live = LiveWeights(Net())
        with closing(Services(tiny.context().student, overlap=True)) as services:

            def call(ever: bool) -> int:
                try:
                    while ever:
                        live.renew()
                except CallStopped:
                    ended.append("stopped")
                    raise
                return live.renew()

            async def running(ever: bool) -> int:
                async with live.call():
                    return await services.run_model(call, ever, interrupt=live.stop)

            task = asyncio.ensure_future(running(True))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), 5)
            # The thread has ended before its caller was told.
            assert ended == ["stopped"]
            assert await running(False) == 0

    asyncio.run(main())


# --- in a run


def test_in_a_run_answers_have_several_versions_and_their_log_probs_are_exact(
    student: str, teacher: str, tmp_path: Path
) -> None:
    cfg = tiny.config(
        "full", student, teacher,
        steps=8, max_staleness=2, prompts_per_step=2, group_size=1, save_every=1, keep_checkpoints=9,
        task={"kind": "outside:Chat"}, sampler__max_tokens=200, learner__lr=0.02,
    )  # fmt: skip
    done = asyncio.run(train(cfg, Options(tmp_path / "run")))
    assert done["steps"] == 8
    mixed = checked(cfg, tmp_path / "run")
    assert mixed > 0


def checked(cfg: RunConfig, folder: Path) -> int:
    """Compare every recorded log-prob with the weights of its version, from the checkpoints. Gives the number
    of attempts of several versions.
    """
    model = load_model(cfg.learner.model, "model", device="cpu")
    weights = {0: own(model)}
    for step in range(1, cfg.steps + 1):
        state = checkpoints.read(folder / "checkpoints" / f"step-{step}" / "learner")
        weights[step] = {name: state[f"weight/{name}"] for name in weights[0]}
        assert state["version"] == step
    mixed, render = 0, model.renderer(None, {})
    prompts = {prompt.key: prompt for prompt in islice(cfg.task.prompts("train", cfg.seed, 0), 40)}
    for row in read_lines(folder / "attempts.jsonl"):
        if row["kind"] != "attempt":
            continue
        versions_T = np.asarray(row.get("versions", [row["version"]] * len(row["tokens"])))
        assert versions_T.min() == row["version"]
        mixed += len(set(versions_T.tolist())) > 1
        ids = render.ids(prompts[row["prompt"]].messages)
        for version in set(versions_T.tolist()):
            put(model, weights[version])
            with torch.no_grad():
                text = torch.tensor([[*ids, *row["tokens"]]])
                logp_TV = model.net(input_ids=text).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            logp_T = logp_TV.gather(-1, text[0, len(ids) :, None])[:, 0].numpy()
            at = versions_T == version
            np.testing.assert_allclose(np.asarray(row["logp"])[at], logp_T[at], atol=5e-5)
    return mixed
