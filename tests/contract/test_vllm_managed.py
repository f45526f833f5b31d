"""A vLLM server that the sampler starts: what happens when it dies, and how it sleeps."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from contract.test_vllm_sampler import DRAW, PROMPTS, published, sample
from fake_python import FakePython, fake_python
from processes import alive
from reflux.config.context import Generation
from reflux.config.registry import build
from reflux.config.requirements import Requirements
from reflux.errors import ServerError
from reflux.runtime.services import Services
from reflux.tasks.word_problems import WordProblems
from reflux.types import TokenRollout

GENERATE = "/inference/v1/generate"
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.net(5).cpu(), tmp_path_factory.mktemp("student"))


def opened(
    folder: str, python: FakePython, act: Callable[[Any], Awaitable[Any]], **fields: Any
) -> tuple[Any, list[str]]:
    """What `act` returns with the open sampler, and what the user was told."""
    heard = tiny.Heard()

    async def run() -> Any:
        table = {"kind": "vllm", "python": python.path, "max_tokens": 12, **fields}
        context = tiny.context(
            Requirements(),
            name="sampler",
            seed=7,
            model=folder,
            task=WordProblems(),
            generation=Generation(),
            folder=python.folder / "part",
        )
        services = Services(context.student, listener=heard)
        try:
            async with build("samplers", table, "sampler").open(context, services) as sampler:
                return await act(sampler)
        finally:
            services.close()

    return asyncio.run(run()), heard.notes


def tokens(rollouts: list[TokenRollout]) -> list[list[int]]:
    return [rollout.tokens_T.tolist() for rollout in rollouts]


async def two_steps(sampler: Any) -> list[TokenRollout]:
    """The attempts of two versions."""
    await sampler.publish(published(tiny.net(6).cpu(), 1), 1)
    first = await sample(sampler)
    await sampler.publish(published(tiny.net(7).cpu(), 2), 2)
    return first + await sample(sampler)


@pytest.fixture(scope="module")
def undisturbed(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[TokenRollout]:
    python = fake_python(tmp_path_factory.mktemp("undisturbed"))
    rollouts, notes = opened(folder, python, two_steps)
    assert [rollout.version for rollout in rollouts] == [1] * 6 + [2] * 6
    assert len(python.servers()) == 1
    assert not any(map(alive, python.processes()))
    assert "vLLM 0.32.0 serves the student on a CPU" in notes[0]
    return rollouts


FAULTS = {
    "killed with requests in flight": {GENERATE: {3: "exit"}},
    "killed twice": {GENERATE: {3: "exit", 9: "exit"}},
    "killed in an update": {"/update_weights": {1: "exit"}},
    "refuses an update": {"/update_weights": {1: "error"}},
    "cannot start an update": {"/start_weight_update": {1: "error"}},
    "cannot finish an update": {"/finish_weight_update": {1: "error"}},
    "refuses an update twice": {"/update_weights": {1: "error", 2: "error"}},
    "an engine error in a request": {GENERATE: {2: "error"}},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_fails_changes_no_attempt(
    folder: str, tmp_path: Path, undisturbed: list[TokenRollout], name: str
) -> None:
    """It is started again with the current weights, and lost requests are sent again; each counts once."""
    python = fake_python(tmp_path, FAULTS[name])
    rollouts, notes = opened(folder, python, two_steps)
    assert tokens(rollouts) == tokens(undisturbed)
    for one, other in zip(rollouts, undisturbed, strict=True):
        np.testing.assert_array_equal(one.logp_T, other.logp_T)
        assert one.version == other.version
    assert len(python.servers()) == (3 if "twice" in name else 2)
    assert sum("is started again" in note for note in notes) == len(python.servers()) - 1
    assert not any(map(alive, python.processes()))


def test_a_server_that_fails_always_ends_the_run(folder: str, tmp_path: Path) -> None:
    python = fake_python(tmp_path, {GENERATE: dict.fromkeys(range(40), "exit")})
    with pytest.raises(ServerError, match="failed 3 times without an answer in between"):
        opened(folder, python, sample, restarts=2)
    assert len(python.servers()) == 3
    assert not any(map(alive, python.processes()))


def test_a_server_that_was_killed_while_idle_is_started_again(folder: str, tmp_path: Path) -> None:
    import os

    python = fake_python(tmp_path)

    async def act(sampler: Any) -> Any:
        first = await sample(sampler)
        server = await sampler.served.supervisor.ready()
        os.kill(server.process.pid, signal.SIGKILL)
        await server.process.ended.wait()
        return first, await sample(sampler)

    (first, again), _ = opened(folder, python, act)
    assert tokens(first) == tokens(again)
    assert len(python.servers()) == 2


def test_the_command_has_the_student_and_its_window(folder: str, tmp_path: Path) -> None:
    python = fake_python(tmp_path)
    opened(folder, python, sample, arguments=["--seed", "3"], context_tokens=100)
    told = (python.folder / "part" / "server.log").read_text().split("\n")[0]
    for words in (f"--model {folder}", "--dtype float32", "--max-model-len 100", "--seed 3", "reflux_file"):
        assert words in told


@pytest.mark.parametrize("level", [1, 2])
def test_a_colocated_server_sleeps_between_cohorts(
    folder: str, tmp_path: Path, undisturbed: list[TokenRollout], level: int
) -> None:
    python = fake_python(tmp_path)
    rollouts, _ = opened(folder, python, two_steps, mode="colocated", sleep_level=level)
    assert tokens(rollouts) == tokens(undisturbed)
    calls = [call for call in python.calls() if call not in (GENERATE, "/health", "/v1/models")]
    update = ["/pause", *UPDATE, "/reset_prefix_cache", "/resume", "/weight_info"]
    # New weights wait until the server wakes, and come before the memory of its cache.
    turn = ["/wake_up", *update, "/wake_up", "/sleep"]
    start = ["/update_weight_version", "/init_weight_transfer_engine"]
    assert calls == [*start, *update, "/sleep", *turn, "/pause"][: len(calls)]
    assert calls.count("/sleep") == 2


def test_a_server_that_cannot_sleep_is_replaced_by_one_that_does(
    folder: str, tmp_path: Path, undisturbed: list[TokenRollout]
) -> None:
    """Its memory is the learner's while the student learns."""
    python = fake_python(tmp_path, {"/sleep": {0: "error"}})
    rollouts, notes = opened(folder, python, two_steps, mode="colocated")
    assert tokens(rollouts) == tokens(undisturbed)
    assert sum("is started again" in note for note in notes) == 1
    assert python.calls().count("/sleep") == 3


def test_weights_that_were_dropped_come_again(folder: str, tmp_path: Path) -> None:
    async def act(sampler: Any) -> Any:
        await sampler.publish(published(tiny.net(6).cpu(), 1), 1)
        return [await sampler.sample(PROMPTS[0], 1, DRAW) for _ in range(2)]

    for level, updates in ((1, 1), (2, 2)):
        python = fake_python(tmp_path / str(level))
        groups, _ = opened(folder, python, act, mode="colocated", sleep_level=level)
        assert groups[0][0].rollout.text == groups[1][0].rollout.text
        assert python.calls().count("/update_weights") == updates


def test_a_student_without_files_of_its_own_is_written_once(tmp_path: Path) -> None:
    """Of an adapter: the merged model."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    base = tiny.save(tiny.net(5).cpu(), tmp_path / "base")
    net = get_peft_model(tiny.net(5).cpu(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, value in net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    net.peft_config["default"].base_model_name_or_path = base
    net.save_pretrained(str(tmp_path / "adapter"))
    python = fake_python(tmp_path)
    opened(str(tmp_path / "adapter"), python, sample)
    served = load_file(python.folder / "part" / "served" / "model.safetensors")
    merged = net.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(served[name], merged[name])
    assert (
        "--model " + str(python.folder / "part" / "served")
        in (python.folder / "part" / "server.log").read_text()
    )
