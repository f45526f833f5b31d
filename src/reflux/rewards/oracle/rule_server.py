"""The rule server as an endpoint of a recipe: no model, no download."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, fields_of, kind_of, table_of
from reflux.engines.endpoints.base import CLIENT, ChatEndpoint, missing_packages, opened
from reflux.rewards.oracle.faults import Faults

if TYPE_CHECKING:
    from reflux.clients.chat import ChatClient
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class RuleServer(ChatEndpoint):
    """A server on this machine that answers, writes rubrics and judges by rule, for the tasks `word_problems`
    and `chains`. It starts with the part that asks it, on a free port, and speaks HTTP as any other server.

    It reads the question and the marked answers out of the prompts and solves the question itself. So it
    knows the truth: it tests a recipe, and not whether a language model judges well.
    """

    # what the server does wrong
    faults: Faults = Faults()
    # the most requests in flight
    concurrency: Annotated[int, Field(ge=1)] = 32
    # seconds of one try
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    # how often a request is sent before it is given up
    tries: Annotated[int, Field(ge=1)] = 3

    @property
    def paths(self) -> tuple[str, ...]:
        return ()

    @property
    def fingerprint(self) -> dict[str, object]:
        return {"kind": "local", "faults": fields_of(self.faults)}

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from missing_packages(where, (*CLIENT, "starlette", "uvicorn"))
        if not cfg.task.solves:
            yield (
                f"{where}: the rule server solves word_problems and chains only, and the task is "
                f"'{kind_of('tasks', cfg.task)}'. Use kind = \"openai\" with a url and a model."
            )

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[ChatClient]:
        from reflux.clients.chat import ChatSettings
        from reflux.rewards.oracle.rule_answers import Oracle
        from reflux.rewards.oracle.server import MODEL, serving

        identity = json.dumps([self.fingerprint, table_of("tasks", context.task)], sort_keys=True)
        with serving(Oracle(context.task, self.faults)) as url:
            settings = ChatSettings(
                url=url,
                model=MODEL,
                concurrency=self.concurrency,
                timeout_s=self.timeout_s,
                tries=self.tries,
                first_wait_s=0.05,
                longest_wait_s=1.0,
            )
            async with opened(settings, identity, context.folder / "chat", services) as client:
                yield client
