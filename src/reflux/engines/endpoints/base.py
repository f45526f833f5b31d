"""The protocol of endpoints. `open(context, services)` gives a client of one model of one server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reflux.config.part import Part

if TYPE_CHECKING:
    from reflux.clients.chat import ChatClient, ChatSettings
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services


# the packages of the client
CLIENT = ("aiolimiter", "openai", "stamina")


class ChatEndpoint(Part, Protocol):
    """The base class of endpoints."""


def missing_packages(where: str, packages: Iterable[str]) -> Iterable[str]:
    """The refusal of an endpoint whose packages are not installed. where: the path of its table."""
    if missing := [name for name in packages if find_spec(name) is None]:
        yield (
            f"{where}: the packages {', '.join(missing)} are not installed. Install them with: pip install "
            "'reflux[chat]'"
        )


class Endpoint(ChatEndpoint, Protocol):
    @property
    def fingerprint(self) -> Mapping[str, object]:
        """What of the endpoint determines its answers, as JSON values. It holds no key."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[ChatClient]: ...


@asynccontextmanager
async def opened(
    settings: ChatSettings, identity: str, folder: Path, services: Services
) -> AsyncIterator[ChatClient]:
    """A client that counts in the usage of this process and stores answers in `folder`. identity: what
    determines the answers besides the requests.
    """
    from reflux.clients.chat import ChatClient
    from reflux.clients.chat_cache import ChatCache

    async with ChatClient(settings, services.usage, ChatCache(folder, identity)) as client:
        yield client
