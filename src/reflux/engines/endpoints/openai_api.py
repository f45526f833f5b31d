"""Any server that speaks OpenAI's chat protocol: a hosted model, or vLLM or SGLang on own machines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.engines.endpoints.base import CLIENT, ChatEndpoint, missing_packages, opened
from reflux.errors import ConfigError

if TYPE_CHECKING:
    from reflux.clients.chat import ChatClient
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class OpenAI(ChatEndpoint):
    """A model of any server that speaks OpenAI's chat protocol.

    Requests are sent again after a lost connection, a time-out and the statuses 408, 409, 425, 429 and from
    500 on, and Retry-After is kept. Every answer is stored, so that a resumed run asks for none twice. The
    key is read from the environment variable `key_variable` and is written nowhere.
    """

    # with its version, which is mostly /v1
    url: str
    # the name by which the server knows the model
    model: str
    # the name of the environment variable with the key; not set: no key is sent
    key_variable: str | None = None
    # the most requests in flight
    concurrency: Annotated[int, Field(ge=1)] = 32
    # 0: no limit
    requests_per_minute: Annotated[int, Field(ge=0)] = 1920
    # by an estimate: the limit of the answer, and a token for every three characters of the prompt; 0: no
    # limit
    tokens_per_minute: Annotated[int, Field(ge=0)] = 0
    # seconds of one try, where the request has no limit of its own
    timeout_s: Positive = 120.0
    # how often a request is sent before it is given up
    tries: Annotated[int, Field(ge=1)] = 3
    # "schema": the form of an answer is asked for by `response_format`; "text": by the prompt alone; "auto":
    # by `response_format` until the server refuses it
    structured: Literal["auto", "schema", "text"] = "auto"
    # the name under which the server takes the limit of an answer
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    # the price of a million tokens, in any currency, for metrics and summary
    prompt_price: Price = 0.0
    # see `prompt_price`
    completion_price: Price = 0.0
    # a folder for answers that several runs share; not set: one in the run directory
    cache: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return ("cache",)

    @property
    def fingerprint(self) -> dict[str, object]:
        return {"kind": "openai", "url": self.url.rstrip("/"), "model": self.model}

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        from reflux.clients.http import checked_url

        yield from missing_packages(where, CLIENT)
        try:
            checked_url(self.url)
        except ConfigError as error:
            yield f"{where}.url: {error}"

    def inputs(self, where: str) -> None:
        from reflux.clients.http import token_header

        try:
            token_header(self.key_variable)
        except ConfigError as error:
            raise ConfigError(f"{where}.key_variable: {error}") from error

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[ChatClient]:
        from reflux.clients.chat import ChatSettings
        from reflux.clients.usage import Prices

        folder = Path(self.cache).expanduser() if self.cache else context.folder / "chat"
        settings = ChatSettings(
            url=self.url,
            model=self.model,
            key_variable=self.key_variable,
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            timeout_s=self.timeout_s,
            tries=self.tries,
            structured=self.structured,
            limit_key=self.limit_key,
            prices=Prices(prompt=self.prompt_price, completion=self.completion_price),
        )
        async with opened(settings, json.dumps(self.fingerprint), folder, services) as client:
            yield client
