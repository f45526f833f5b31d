"""A client for servers that speak the chat protocol of OpenAI: POST /chat/completions, text in, text out.

Uses the packages openai (2.54 or later, or 3) for the protocol, stamina for the retries, and aiolimiter for
the rates. They are installed with the extra `chat`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, TypeVar

from reflux.clients.chat_cache import ChatCache
from reflux.clients.chat_messages import REPAIR, ChatAnswer, ChatRequest, answer_in
from reflux.clients.chat_transport import connected, said
from reflux.clients.http import LATER, MOST_TEXT, checked_url, token_header
from reflux.clients.retry_after import retry_after_s
from reflux.clients.usage import Prices, Usage
from reflux.errors import BadAnswer, ConfigError, ServerError, ServerRefused

Parsed = TypeVar("Parsed")
# Statuses by which a server says that a request is wrong, as one that does not know `response_format` does.
WRONG = (400, 404, 422, 501)
CONFLICT = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How a server is reached. url: with its version, such as "https://HOST:PORT/v1"."""

    url: str
    model: str
    # the name of the environment variable that holds the key; None: no key is sent
    key_variable: str | None = None
    # the most requests in flight
    concurrency: int = 32
    # 0: no limit
    requests_per_minute: int = 0
    # the most tokens in a minute, by the estimate `tokens_at_most`; 0: no limit
    tokens_per_minute: int = 0
    # seconds of one try, from its first to its last byte
    timeout_s: float = 120.0
    # how often a request is sent before it is given up
    tries: int = 3
    # seconds before the second try; they double with each try, up to the longest, and a random part is added
    first_wait_s: float = 1.0
    longest_wait_s: float = 8.0
    # the longest Retry-After that is waited for
    patience_s: float = 300.0
    # "schema": answers of a given form are asked for by `response_format`. "text": by the prompt alone.
    # "auto": by `response_format` until the server refuses it.
    structured: Literal["auto", "schema", "text"] = "auto"
    # the name under which the server takes the limit of an answer
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    prices: Prices = Prices()


class _TryFailed(Exception):
    """A try that failed and that may be repeated. wait_s: how long the server wants to be left alone."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


class ChatClient:
    """An async context manager for one model of one server. cache: None to ask for every answer.

    The key is sent in a header. It is never part of a text: where a server repeats it, it is cut out.
    Credentials and proxies of the environment are not used. Raises ConfigError for a URL or a key that cannot
    be used, or if a package is missing.
    """

    def __init__(self, settings: ChatSettings, usage: Usage, cache: ChatCache | None = None):
        self.settings, self.usage, self._cache = settings, usage, cache
        self.url = checked_url(settings.url)
        header = token_header(settings.key_variable).get("authorization", "")
        self._key = header.removeprefix("Bearer ")
        self._plain = settings.structured == "text"
        self._turn = asyncio.Semaphore(settings.concurrency)
        try:
            import aiolimiter
            import openai
            import stamina
        except ImportError as error:
            raise ConfigError(
                f"a chat server needs packages that are not installed ({error}). Install them with: pip "
                "install 'reflux[chat]'"
            ) from error
        self._openai, self._retrying = openai, stamina.retry_context
        requests, tokens = settings.requests_per_minute, settings.tokens_per_minute
        self._requests = aiolimiter.AsyncLimiter(requests, 60) if requests else None
        self._tokens = aiolimiter.AsyncLimiter(tokens, 60) if tokens else None
        # Without a key the package wants to be told that none is meant.
        self._headers = {} if self._key else {"Authorization": openai.Omit()}
        self._api = connected(openai, self.url, self._key, settings.concurrency)

    async def __aenter__(self) -> ChatClient:
        await self._api.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._api.__aexit__(kind, error, trace)

    async def answer(self, request: ChatRequest) -> ChatAnswer:
        """The server's answer, from the cache if it is there. It may be empty or cut.

        Raises ServerRefused for a request that the server calls wrong, and ServerError if there was no answer
        after the last try.
        """
        body = request.body(self.settings.model, self.settings.limit_key)
        asked = {**body, "number": request.number}
        if request.schema is not None and self.settings.structured != "text":
            asked["response_format"] = request.schema.response_format
        key = self._cache.key(asked) if self._cache else ""
        found = self._cache.get(key) if self._cache else None
        if found is not None:
            self.usage.add(request.role, {"cached": 1})
            return ChatAnswer.of_record(found)
        try:
            answer = await self._asked(request, body)
        except ServerError:
            self.usage.add(request.role, {"failed": 1})
            raise
        if self._cache is not None:
            answer = ChatAnswer.of_record(self._cache.put(key, answer.record()))
        return answer

    async def parsed(
        self, request: ChatRequest, parse: Callable[[str], Parsed], repairs: int = 1
    ) -> tuple[Parsed, ChatAnswer]:
        """What `parse` makes of the answer's text, and the answer. `parse` raises ValueError, with a sentence
        for the model, for a text that it cannot use. Such an answer is shown to the model with that sentence,
        at most `repairs` times. After an empty or a cut answer the first request is sent again.

        Raises BadAnswer if no answer could be used, and the errors of `answer`.
        """
        reason, asking = "", request
        for number in range(1 + repairs):
            answer = await self.answer(replace(asking, number=request.number + number))
            reason, asking = f"it is {answer.unusable}.", request
            if not answer.unusable:
                try:
                    return parse(answer.text), answer
                except ValueError as error:
                    reason = str(error)
                shown = ({"role": "assistant", "content": answer.text}, _repair(reason))
                asking = replace(request, messages=(*request.messages, *shown))
            self.usage.add(request.role, {"invalid": 1})
        raise BadAnswer(f"the answer of {self.settings.model} cannot be used: {reason}")

    async def _asked(self, request: ChatRequest, body: dict[str, Any]) -> ChatAnswer:
        """The answer of the server. Its form is asked for unless the server has refused that before."""
        if request.schema is None or self._plain:
            return await self._sent(request, body)
        try:
            return await self._sent(request, {**body, "response_format": request.schema.response_format})
        except ServerRefused as refused:
            if refused.status not in WRONG or self.settings.structured == "schema":
                raise
        # If this request fails too, the form was not the reason.
        answer = await self._sent(request, body)
        self._plain = True
        return answer

    async def _sent(self, request: ChatRequest, body: dict[str, Any]) -> ChatAnswer:
        settings, failed, sent = self.settings, None, 0
        retries = self._retrying(
            on=self._wait_of,
            attempts=settings.tries,
            timeout=None,
            wait_initial=settings.first_wait_s,
            wait_max=settings.longest_wait_s,
            wait_jitter=settings.first_wait_s,
        )
        try:
            async for attempt in retries:
                with attempt:
                    sent = attempt.num
                    self.usage.add(request.role, {"replays": 1} if sent > 1 else {})
                    answer = await self._tried(request, body)
                    self._count(request.role, answer)
                    return answer
        except _TryFailed as error:
            failed = error.reason
        raise ServerError(
            f"{self.url} gave no answer in {sent} {'try' if sent == 1 else 'tries'}: {failed}. Check that "
            "the server runs, and its limits of requests and tokens."
        )

    def _wait_of(self, error: Exception) -> bool | float:
        """Whether a try is repeated, and after how many seconds if the server said so."""
        if not isinstance(error, _TryFailed):
            return False
        if error.wait_s is None:
            return True
        return error.wait_s if error.wait_s <= self.settings.patience_s else False

    async def _tried(self, request: ChatRequest, body: dict[str, Any]) -> ChatAnswer:
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None:
            await self._tokens.acquire(min(request.tokens_at_most, self.settings.tokens_per_minute))
        # A request that waits for its turn does not use up its time.
        async with self._turn:
            completion, problem = await self._exchanged(request, body)
        if problem is not None:
            raise problem
        try:
            answer = answer_in(completion)
        except BadAnswer as error:
            raise _TryFailed(str(error)) from None
        return replace(answer, text=self._without_key(answer.text))

    async def _exchanged(self, request: ChatRequest, body: dict[str, Any]) -> tuple[Any, Exception | None]:
        """The decoded JSON, or what went wrong. Errors of the package hold the request with its key, so they
        end here.
        """
        openai, limit_s = self._openai, request.timeout_s or self.settings.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                options = {"headers": self._headers}
                return await self._api.post(
                    "/chat/completions", body=body, cast_to=object, options=options
                ), None
        except (TimeoutError, openai.APITimeoutError):
            return None, _TryFailed(f"no answer within {limit_s:g} s")
        except openai.APIStatusError as error:
            return None, self._status(error.status_code, self._clean(said(error)), error.response.headers)
        except openai.APIError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else type(error).__name__
            return None, _TryFailed(self._clean(f"{cause} {error}"))
        except ValueError as error:
            # The body is no JSON.
            return None, _TryFailed(self._clean(f"the answer is no complete JSON ({error})"))

    def _status(self, status: int, reason: str, headers: Any) -> Exception:
        if status in (*LATER, CONFLICT) or status >= 500:
            return _TryFailed(f"status {status} {reason}".strip(), retry_after_s(headers))
        remedy = ""
        if status in (401, 403):
            variable = self.settings.key_variable
            remedy = (
                f" The key in the environment variable {variable} is not accepted."
                if variable
                else " The server wants a key. Name the environment variable that holds it in key_variable."
            )
        return ServerRefused(
            f"{self.url} refused the request with status {status}: {reason}.{remedy}", status, reason
        )

    def _count(self, role: str, answer: ChatAnswer) -> None:
        used = (answer.prompt_tokens, answer.completion_tokens)
        prompt, completion = (count or 0 for count in used)
        counts = {"requests": 1, "prompt_tokens": prompt, "completion_tokens": completion}
        if None in used:
            counts["unmetered"] = 1
        self.usage.add(role, {**counts, "cost": self.settings.prices.of(prompt, completion)})

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _clean(self, text: str) -> str:
        """The start of a text of the server, for an error."""
        return self._without_key(text)[:MOST_TEXT].rstrip(". ")


def _repair(reason: str) -> dict[str, str]:
    return {"role": "user", "content": REPAIR.format(reason=reason)}
