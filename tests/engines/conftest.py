"""The real vLLM server of `make test-engines`: one sampler for the whole session, in a loop of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import tiny
from reflux.config.context import Generation
from reflux.config.registry import build
from reflux.config.requirements import Requirements
from reflux.models.locations import ASSETS
from reflux.runtime.services import Services
from reflux.runtime.weights import InMemory
from reflux.tasks.word_problems import WordProblems

STUDENT = ASSETS / "student"
Result = TypeVar("Result")


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


def own_net() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """It is made at its first use and kept to the end of the session."""
    with opened(python, tmp_path_factory.mktemp("real")) as made:
        yield made


@contextmanager
def opened(python: str, folder: Path, **fields: Any) -> Iterator[Real]:
    table = {"kind": "vllm", "python": python, "max_tokens": 64, "start_timeout_s": 1700.0, **fields}
    context = tiny.context(
        Requirements(behaviour=5),
        name="sampler",
        seed=7,
        model="reflux:student",
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
            made = Real(sampler, own_net(), runner, heard.notes)
            runner.run(made.publish(made.net, 0))
            yield made
        finally:
            runner.run(stack.aclose())
            services.close()
