"""One HTTP server that answers in JSON. Requests are limited in number, have a read time-out, and are sent
again where the server failed.

Uses httpx2, the HTTP client that huggingface_hub uses too, and tenacity for the retries.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import httpx2
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    wait_random_exponential,
)
from tenacity.stop import StopBaseT

from reflux.errors import ConfigError, ServerError, ServerRefused

Method = Literal["GET", "POST"]
# Statuses by which a server says that the same request may succeed later; those from 500 on say so as well.
LATER = (408, 425, 429)
# The network or the server failed. Other errors of httpx2 are mistakes in the request itself.
FAILURES = (
    httpx2.TimeoutException,
    httpx2.NetworkError,
    httpx2.RemoteProtocolError,
    httpx2.DecodingError,
    httpx2.ProxyError,
)
# Servers close an idle connection after some seconds (uvicorn after 5). A connection that is used again at
# that moment fails, so it is given up earlier.
KEEPALIVE_S = 2.0
# Seconds between two tries: random, up to a limit that doubles from the first value to the second.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
MOST_TEXT = 300


@dataclass(slots=True)
class Traffic:
    """What a client has sent. A request counts once, however often it was sent."""

    answered: int = 0
    # the tries after the first, of all requests
    replays: int = 0
    # requests that got no answer, or one that says the request is wrong
    failed: int = 0


class _Failed(Exception):
    """A try that failed and that may be repeated."""


class JsonServer:
    """An async context manager. Inside it `get` and `post` send requests and return the decoded JSON.

    concurrency: the most requests in flight; further ones wait. read_timeout_s: the longest wait for data of
    one try. A failed request is sent again until it was sent `tries` times and `patience_s` seconds have
    passed; both are exceeded before it is given up, so that a server may take `patience_s` to restart.
    token_variable: the name of the environment variable that holds a bearer token. The token is sent in a
    header and never stored elsewhere. Proxies and credentials of the environment are not used.

    Raises ConfigError for a URL or a token that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 64,
        read_timeout_s: float = 600.0,
        patience_s: float = 300.0,
        tries: int = 3,
        token_variable: str | None = None,
    ):
        self.url = checked_url(url)
        self._patient = stop_all(stop_after_attempt(tries), stop_after_delay(patience_s))
        self.token_variable = token_variable
        self.traffic = Traffic()
        self._turn = asyncio.Semaphore(concurrency)
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            headers=token_header(token_variable),
            timeout=httpx2.Timeout(connect=10.0, read=read_timeout_s, write=60.0, pool=None),
            limits=httpx2.Limits(max_keepalive_connections=concurrency, keepalive_expiry=KEEPALIVE_S),
            trust_env=False,
        )

    async def __aenter__(self) -> JsonServer:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """The JSON that the server gives at `path`; a text if it is no JSON. Errors as in `post`."""
        return await self._sent("GET", path, None, query or {}, self._patient)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        *,
        replay: bool = True,
    ) -> Any:
        """The JSON answer to a JSON body. replay: False for a request that must not be made twice; the first
        failure is then final.

        Raises ServerRefused for a mistake in the request, and ServerError if the server gave no answer.
        """
        stop = self._patient if replay else stop_after_attempt(1)
        return await self._sent("POST", path, body or {}, query or {}, stop)

    async def _sent(
        self,
        method: Method,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str],
        stop: StopBaseT,
    ) -> Any:
        """stop: tells after a failed try whether the request is given up."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Failed),
            stop=stop,
            wait=wait_random_exponential(FIRST_WAIT_S, LONGEST_WAIT_S),
            before_sleep=self._count_replay,
            reraise=True,
        )
        try:
            answer = await retrying(self._tried, method, path, body, query)
        except _Failed as error:
            self.traffic.failed += 1
            often = retrying.statistics["attempt_number"]
            raise ServerError(
                f"{self.url}{path} gave no answer in {often} {'try' if often == 1 else 'tries'}: {error}. "
                "Check that the server runs and look into its log."
            ) from error
        except ServerError:
            self.traffic.failed += 1
            raise
        self.traffic.answered += 1
        return answer

    def _count_replay(self, state: RetryCallState) -> None:
        self.traffic.replays += 1

    async def _tried(
        self, method: Method, path: str, body: Mapping[str, Any] | None, query: Mapping[str, str]
    ) -> Any:
        # A request that waits for its turn does not use up its read time-out.
        async with self._turn:
            try:
                answer = await self._http.request(method, path, json=body, params=query)
            except FAILURES as error:
                raise _Failed(f"{type(error).__name__} {error}".strip()) from error
        if answer.status_code in LATER or answer.status_code >= 500:
            raise _Failed(f"status {answer.status_code} {_reason(answer)}".strip())
        if not answer.is_success:
            raise self._refusal(answer, path)
        return _decoded(answer)

    def _refusal(self, answer: httpx2.Response, path: str) -> ServerRefused:
        status, reason = answer.status_code, _reason(answer)
        remedy = ""
        if status in (401, 403):
            remedy = (
                f" The token in the environment variable {self.token_variable} is not accepted."
                if self.token_variable
                else " The server wants a token. Name the environment variable that holds it."
            )
        return ServerRefused(
            f"{self.url}{path} refused the request with status {status}: {reason}.{remedy}", status, reason
        )


def checked_url(url: str) -> str:
    """The URL without a slash at its end. ConfigError for one that names no server or holds a password."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"'{url}' is no URL ({error}). Write it as http://HOST:PORT") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"'{url}' is no URL of a server. Write it as http://HOST:PORT")
    if parsed.userinfo:
        raise ConfigError(
            f"the URL of the server at {parsed.host} contains a user name or a password, which would be "
            "written into the files of the run. Put a token into an environment variable, and name the "
            "variable."
        )
    return url.rstrip("/")


def token_header(token_variable: str | None) -> dict[str, str]:
    """The header with the token of the environment variable; ConfigError if it holds none."""
    if token_variable is None:
        return {}
    token = os.environ.get(token_variable, "")
    if not token:
        raise ConfigError(
            f"the environment variable {token_variable} is to hold the token of a server, but it is not set "
            "or empty."
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"the environment variable {token_variable} holds characters that no token has, such as a line "
            "break."
        )
    return {"authorization": f"Bearer {token}"}


def _reason(answer: httpx2.Response) -> str:
    """What the server said about an error: the message in its JSON, or else the start of the text."""
    try:
        said = answer.json()
    except ValueError:
        return answer.text[:MOST_TEXT].strip()
    for key in ("error", "message", "detail"):
        said = said.get(key, said) if isinstance(said, dict) else said
    return str(said)[:MOST_TEXT].rstrip(". ")


def _decoded(answer: httpx2.Response) -> Any:
    """Servers write NaN and Infinity into JSON as Python does, and the decoder of httpx2 reads them."""
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return answer.text
    try:
        return answer.json()
    except ValueError as error:
        raise _Failed("the answer is not complete JSON") from error
