"""Several servers with the same weights. They are measured and compared when they are opened; a request goes
to the one with the fewest in flight, and to another one where it fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from reflux.clients.inference import InferenceClient, TextScorer
from reflux.clients.probe import TOLERANCE_NATS, Abilities, probe
from reflux.clients.sglang import SGLangClient
from reflux.errors import BadAnswer, ModelError, ServerError, ServerRefused
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.teachers.vllm import VLLM

Result = TypeVar("Result")
CLIENTS = {"vllm": InferenceClient, "sglang": SGLangClient}


@dataclass(eq=False)
class _Replica:
    scorer: TextScorer
    in_flight: int = 0
    # True from a failed request to its next answer; it is asked last then
    failing: bool = False


class Replicas:
    """The open servers of one teacher. `abilities`: what all of them proved."""

    def __init__(self, scorers: Sequence[TextScorer], abilities: Abilities):
        self._replicas = [_Replica(scorer) for scorer in scorers]
        self.abilities = abilities

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: VLLM, name: str, ids: Sequence[int]) -> AsyncIterator[Replicas]:
        """name: the teacher's table, for errors. ids: the tokens on which the servers are compared.
        ServerError where one does not answer; ModelError where they differ.
        """
        async with AsyncExitStack() as stack:
            scorers: list[TextScorer] = []
            for url in cfg.addresses:
                client = CLIENTS[cfg.dialect](
                    url,
                    concurrency=cfg.concurrency,
                    read_timeout_s=cfg.read_timeout_s,
                    # Where there are others, these are asked after a part of the time.
                    patience_s=cfg.patience_s / len(cfg.addresses),
                    token_variable=cfg.token_variable,
                )
                scorers.append(await stack.enter_async_context(client))
            found = await together(probe(scorer, ids, cfg.adapter) for scorer in scorers)
            for url, abilities in zip(cfg.addresses[1:], found[1:], strict=True):
                _refuse_others(name, cfg.addresses[0], found[0], url, abilities)
            yield cls(scorers, found[0])

    async def ask(self, question: Callable[[TextScorer], Awaitable[Result]]) -> Result:
        """The answer of one server. Where a server does not answer, the next one is asked. An answer that is
        wrong, or that calls the request wrong, is the answer.
        """
        order = sorted(self._replicas, key=lambda replica: (replica.failing, replica.in_flight))
        for index, replica in enumerate(order):
            replica.in_flight += 1
            try:
                answer = await question(replica.scorer)
            except (BadAnswer, ServerRefused):
                raise
            except ServerError:
                replica.failing = True
                if index == len(order) - 1:
                    raise
            else:
                replica.failing = False
                return answer
            finally:
                replica.in_flight -= 1
        raise AssertionError("a teacher has at least one server")


def _refuse_others(name: str, url: str, first: Abilities, other: str, second: Abilities) -> None:
    """Raise ModelError where two servers do not have the same weights and abilities."""
    gap = float(np.abs(first.logp_T - second.logp_T).max())
    # also true for a gap that is not a number
    if not gap <= TOLERANCE_NATS:
        raise ModelError(
            f"teachers.{name}: the servers {url} and {other} give the same {len(first.logp_T)} tokens "
            f"log-probs that differ by up to {gap:.3g} nats, so they do not have the same weights. Start "
            "both with the same model."
        )
    for what, one, two in (
        ("weight versions", first.version, second.version),
        ("log-probs at given ids", first.given_ids, second.given_ids),
        ("hidden states", first.hidden, second.hidden),
    ):
        if one != two:
            raise ModelError(
                f"teachers.{name}: the servers {url} and {other} differ in their {what} ({one} and {two}). "
                "Start both in the same way."
            )
