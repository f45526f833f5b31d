"""A real vLLM server that fails: `make test-engines`. After each fault the attempts must be those of an
undisturbed server. REFLUX_FAULT_ROUNDS repeats the faults; the counts are printed at the end.
"""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.conftest import STUDENT, Real, Tally
from engines.real_server import DRAW, agree, group_of, moved, process_of, sample
from processes import alive, wait_for
from reflux.clients.inference import GenerateRequest
from reflux.errors import DataError, ModelError, ServerRefused
from reflux.runtime.weights import InMemory
from reflux.types import Prompt, TokenRollout

# a start of the server on a machine that is busy
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1700)]
ROUNDS = int(os.environ.get("REFLUX_FAULT_ROUNDS", "1"))
# Waits, and prints one line first.
LIBRARY = """
import asyncio, sys
from pathlib import Path
from reflux.clients.inference import GenerateRequest
from reflux.engines.vllm_command import ServerSettings, installed_in
from reflux.engines.vllm_server import VLLMServer

async def main():
    settings = ServerSettings(
        installed=installed_in(sys.argv[1], "k"), model=sys.argv[2], dtype="float32", context_tokens=512
    )
    folder = Path(sys.argv[3])
    limits = dict(concurrency=8, timeout_s=1000, start_timeout_s=1700)
    server = await VLLMServer.started(settings, folder / "log", folder=folder / "weights", **limits)
    asks = [GenerateRequest(token_ids=[5, 6, seed], max_tokens=400, seed=seed) for seed in range(10, 18)]
    bodies = [ask.body() for ask in asks]
    for body in bodies:
        body["sampling_params"]["ignore_eos"] = True
    tasks = [asyncio.create_task(server.requests.post("/inference/v1/generate", body)) for body in bodies]
    await asyncio.sleep(0.2)
    print(server.process.pid, flush=True)
    await asyncio.gather(*tasks)

asyncio.run(main())
"""

Spoil = Callable[[Any, Any], Awaitable[None]]


# --- what is refused, and the server goes on


def test_a_prompt_that_is_too_long_is_refused(real: Real) -> None:
    long = Prompt("long", ({"role": "user", "content": "x" * 600},))
    with pytest.raises(DataError, match="more than the 510 that fit"):
        real.run(real.sampler.sample(long, 1, DRAW))

    async def directly() -> None:
        await (await real.client()).generate(GenerateRequest(token_ids=[5] * 600, max_tokens=1, seed=1))

    with pytest.raises(ServerRefused, match="maximum model length"):
        real.run(directly())
    agree(real, real.run(sample(real)))


def test_an_answer_ends_where_the_window_is_full(real: Real) -> None:
    near = Prompt("near", ({"role": "user", "content": "Tom has 12 apples. " * 26},))
    group = real.run(real.sampler.sample(near, 8, DRAW))
    rollouts = [attempt.rollout for attempt in group]
    room = 511 - len(rollouts[0].prompt_tokens)
    assert 2 < room < 30
    assert {rollout.finish for rollout in rollouts} >= {"length"}
    assert all(rollout.length == room for rollout in rollouts if rollout.finish == "length")


def test_weights_of_another_shape_are_not_sent(real: Real) -> None:
    plain, version = real.run(sample(real)), real.sampler.version
    state = {**real.net.state_dict(), "model.norm.weight": torch.ones(3)}
    with pytest.raises(ModelError, match=r"is \(3,\) in the learner .* Nothing was sent"):
        real.run(real.sampler.publish(InMemory.of(state, version + 1), 0))
    # The server has what it had before.
    tally = Tally("an update with a wrong shape, refused before it is sent")
    tally.add(plain, real.run(sample(real)))
    tally.close()


def test_weights_that_are_not_finite_are_found(real: Real) -> None:
    broken, whole = copy.deepcopy(real.net), real.net
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    real.run(real.publish(broken, 7))
    with pytest.raises(ModelError, match="not finite"):
        real.run(sample(real))

    async def looked() -> tuple[Any, np.ndarray]:
        client = await real.client()
        answer = await client.generate(GenerateRequest(token_ids=[5, 6, 7], max_tokens=4, seed=1, top=2))
        given = await client.logp_at([5, 6, 7, 8], 2, np.asarray([[1, 2]] * 2))
        with pytest.raises(ServerRefused, match="not JSON compliant"):
            await client.listed([5, 6, 7, 8], 2, 0)
        return answer, given

    answer, given = real.run(looked())
    assert answer.tokens_T.tolist() == [0, 0, 0, 0]
    assert not answer.finite
    assert np.isnan(answer.logp_T).all()
    assert np.isnan(given).all()
    real.run(real.publish(whole, 8))
    agree(real, real.run(sample(real)))


# --- what breaks the server


async def cut(server: Any, delivery: Any) -> None:
    """The file ends early."""
    file = delivery.files[0]
    file.write_bytes(file.read_bytes()[:-1000])
    await delivery.give(server)


async def other_shape(server: Any, delivery: Any) -> None:
    weights = load_file(delivery.files[0])
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, delivery.files[0])
    await delivery.give(server)


async def killed_between(server: Any, delivery: Any) -> None:
    """The server has begun the update, and its worker ends before the weights come."""
    await server.pause()
    await server.control.control("/start_weight_update")
    os.kill(process_of(server.process.pid, "VLLM::Worker"), signal.SIGKILL)
    await delivery.give(server)


@pytest.mark.parametrize("spoil", [cut, other_shape, killed_between])
def test_an_update_that_fails_starts_the_server_again(real: Real, spoil: Spoil) -> None:
    net = moved(9)
    real.run(real.publish(net, 9))
    plain = real.run(sample(real))
    tally = Tally(f"an update that fails: {spoil.__name__}")

    async def act() -> None:
        served = real.sampler.served
        before = served.supervisor.replaced
        served.delivery.take(InMemory.of(net.state_dict(), 9))
        file = served.delivery.files[0]
        right = file.read_bytes()

        async def spoiled(server: Any) -> None:
            try:
                await spoil(server, served.delivery)
            finally:
                file.write_bytes(right)

        await served.supervisor.change(spoiled)
        assert served.supervisor.replaced == before + 1

    for number in range(ROUNDS):
        real.run(real.publish(moved(8), 10 + number))
        real.run(act())
        real.net = net
        tally.add(plain, real.run(sample(real)))
    agree(real, plain)
    tally.close()


async def struck(real: Real, victim: str, number: int, wait_s: float) -> tuple[list[TokenRollout], int]:
    """The attempts of a step in which a process of the server gets the signal `number`, and the id of the
    server's group.
    """
    server = await real.sampler.served.supervisor.ready()
    pid, before = server.process.pid, real.sampler.served.supervisor.replaced
    # vLLM may hang, and then only a time-out tells it.
    server.requests._http.timeout = httpx2.Timeout(20.0)
    asking = asyncio.create_task(sample(real, n=16))
    while not real.sampler.flying.calls:
        await asyncio.sleep(0.001)
    await asyncio.sleep(wait_s)
    assert real.sampler.flying.calls
    os.kill(process_of(pid, victim), number)
    rollouts = await asking
    assert real.sampler.served.supervisor.replaced == before + 1
    return rollouts, pid


@pytest.mark.parametrize(
    ("what", "victim", "number"),
    [
        ("kill -9 of the worker", "VLLM::Worker", signal.SIGKILL),
        ("kill -9 of the engine core", "VLLM::EngineCore", signal.SIGKILL),
        ("kill -9 of the API server", "api_server", signal.SIGKILL),
        ("a worker that hangs", "VLLM::Worker", signal.SIGSTOP),
    ],
)
def test_a_server_that_fails_changes_no_attempt(real: Real, what: str, victim: str, number: int) -> None:
    """With requests in flight: each is sent again and counts once; nothing of the old server is left."""
    plain = real.run(sample(real, n=16))
    tally = Tally(f"{what}, requests in flight")
    for round_number in range(ROUNDS):
        rollouts, pid = real.run(struck(real, victim, number, 0.02 + 0.2 * round_number))
        assert group_of(pid) == []
        tally.add(plain, rollouts)
    agree(real, plain)
    tally.close()


def test_a_library_that_is_killed_leaves_nothing(python: str, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    library = subprocess.Popen(
        [sys.executable, "-c", LIBRARY, python, str(STUDENT), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert library.stdout is not None
    pid = int(library.stdout.readline())
    family = group_of(pid)
    assert len(family) >= 3
    library.kill()
    library.wait()
    wait_for(lambda: not any(map(alive, family)))
    wait_for(lambda: not (tmp_path / "weights").exists())
