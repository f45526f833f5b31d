"""The real vLLM server of `make test-engines`: one sampler for the whole session, in a loop of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

import tiny
from reflux.config.context import Generation
from reflux.config.registry import build
from reflux.config.requirements import Requirements
from reflux.engines.vllm_command import ServerSettings, installed_in
from reflux.engines.vllm_server import VLLMServer
from reflux.models.locations import ASSETS
from reflux.runtime.services import Services
from reflux.runtime.weights import InMemory
from reflux.tasks.word_problems import WordProblems
from reflux.types import TokenRollout

STUDENT, TEACHER = ASSETS / "student", ASSETS / "teacher"
Result = TypeVar("Result")


# What the fault tests counted, for the end of the session.
TALLIES: list[str] = []


@dataclass
class Tally:
    """Attempts under a fault, compared with the same attempts without it."""

    fault: str
    injected: int = 0
    attempts: int = 0
    same: int = 0
    # ended by an error that the caller got
    told: int = 0

    @property
    def lost(self) -> int:
        """Attempts that are missing or other ones, without an error."""
        return self.attempts - self.same - self.told

    def add(self, plain: Sequence[TokenRollout], found: Sequence[TokenRollout]) -> None:
        """One fault, and what came of the attempts that are `plain` without it."""
        self.injected += 1
        self.attempts += len(plain)
        self.same += sum(
            len(found) == len(plain)
            and np.array_equal(one.tokens_T, other.tokens_T)
            and np.array_equal(one.logp_T, other.logp_T)
            and one.version == other.version
            for one, other in zip(plain, found, strict=False)
        )

    def close(self) -> None:
        TALLIES.append(
            f"{self.fault}: {self.injected} faults, {self.attempts} attempts, {self.same} as without a "
            f"fault, {self.told} ended by an error, {self.lost} lost"
        )
        assert self.lost == 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in TALLIES:
        terminalreporter.write_line(line)


@dataclass
class Real:
    """The open sampler, and the model whose weights its server has. run: in the sampler's event loop."""

    sampler: Any
    net: Any
    runner: asyncio.Runner
    notes: list[str]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    async def publish(self, net: Any, version: int) -> None:
        await self.sampler.publish(InMemory.of(net.state_dict(), version), version)
        self.net = net

    async def client(self) -> Any:
        return (await self.sampler.served.supervisor.ready()).requests


@pytest.fixture(scope="session")
def python() -> str:
    """An interpreter with vLLM."""
    named = os.environ.get("REFLUX_VLLM_PYTHON", "")
    if not named:
        pytest.skip("REFLUX_VLLM_PYTHON names no interpreter with vLLM: `make test-engines` makes one")
    return named


def own_net(model: str = "reflux:student") -> Any:
    from transformers import AutoModelForCausalLM

    folder = ASSETS / model.removeprefix("reflux:")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """It is made at its first use and kept to the end of the session."""
    with opened(python, tmp_path_factory.mktemp("real")) as made:
        yield made


@dataclass
class Found:
    """A server that somebody else has started, with the weights of the embedded teacher."""

    server: VLLMServer
    runner: asyncio.Runner

    @property
    def url(self) -> str:
        return self.server.requests.url

    @property
    def pid(self) -> int:
        assert self.server.process is not None
        return self.server.process.pid

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)


@pytest.fixture(scope="session")
def found(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    settings = ServerSettings(
        installed=installed_in(python, "k"), model=str(TEACHER), dtype="float32", context_tokens=512
    )
    folder = tmp_path_factory.mktemp("found")
    with asyncio.Runner() as runner:
        starting = VLLMServer.started(
            settings, folder / "log", folder=None, concurrency=8, timeout_s=200, start_timeout_s=1700
        )
        server = runner.run(starting)
        try:
            yield Found(server, runner)
        finally:
            runner.run(server.close())


@contextmanager
def opened(
    python: str | None,
    folder: Path,
    model: str = "reflux:student",
    weights: InMemory | None = None,
    **fields: Any,
) -> Iterator[Real]:
    """python: None for a server that runs already. weights: the first that are published; None: those of the
    model.
    """
    managed = {} if python is None else {"python": python, "start_timeout_s": 1700.0}
    table = {"kind": "vllm", "max_tokens": 64, **managed, **fields}
    context = tiny.context(
        Requirements(behaviour=5),
        name="sampler",
        seed=7,
        model=model,
        task=WordProblems(),
        generation=Generation(),
        folder=folder,
    )
    heard = tiny.Heard()
    services, stack = Services(context.student, listener=heard), AsyncExitStack()
    with asyncio.Runner() as runner:
        part = build("samplers", table, "sampler")
        sampler = runner.run(stack.enter_async_context(part.open(context, services)))
        try:
            made = Real(sampler, own_net(model), runner, heard.notes)
            first = (
                made.publish(made.net, 0) if weights is None else sampler.publish(weights, weights.version)
            )
            runner.run(first)
            yield made
        finally:
            runner.run(stack.aclose())
            services.close()
