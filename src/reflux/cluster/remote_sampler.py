"""The sampler that the loop knows, in front of sampler actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from reflux.cluster.pool import open_part
from reflux.cluster.sent_weights import SentWeights
from reflux.cluster.wire import packed
from reflux.runtime.cohorts import Gather
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.actors import Reply
    from reflux.cluster.pool import Call, Opening, Pool
    from reflux.config.step_context import SamplingParams
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.types import Group, Prompt

Request = tuple["Prompt", int, "SamplingParams"]
# Steps that are sampled at the same time; the pipeline asks for no more.
_STEPS_AT_ONCE = 64


class RemoteSampler:
    """Cuts the prompts of a step into one share for each actor, and puts the groups together again.

    start: makes the pool of actors, from the calls that a new actor gets first. sent: the weights that were
    published last, and the step. An actor that is started later gets them.
    """

    def __init__(self, services: Services, precision: str, start: Callable[[Opening], Pool]):
        self.services, self.precision = services, precision
        self.sent: tuple[SentWeights, int] | None = None
        self._gather: Gather[Request, Group] = Gather(self._groups, at_once=_STEPS_AT_ONCE)
        self.pool = start(self.opening)

    def opening(self) -> Iterator[Call]:
        """Open the part in a new actor, and give it the weights that are the current ones then."""
        yield open_part
        if self.sent is not None:
            weights, step = self.sent
            yield lambda actor: actor.publish.remote(weights, step)

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        return await self._gather.ask((draw.purpose, draw.step), draw.cohort, prompt.key, (prompt, n, draw))

    async def publish(self, weights: Weights, step: int) -> None:
        if self.sent is None or self.sent[0].version != weights.version:
            # The weights before are freed when the last actor has let them go.
            self.sent = SentWeights.put(weights, self.precision), step
        sent, _ = self.sent
        self._add_seconds(await self.pool.each(lambda actor: actor.publish.remote(sent, step)))

    async def _groups(self, requests: list[Request]) -> list[Group]:
        """The groups of one step, in order. The shares depend on the prompts and on the number of actors
        alone, so that every batch is the same in every run.
        """
        count = min(len(self.pool.members), len(requests))
        answers = await together(self._share(requests[first::count]) for first in range(count))
        self._add_seconds(answers)
        groups: list[Any] = [None] * len(requests)
        for first, answer in enumerate(answers):
            groups[first::count] = answer.result.value()
        return groups

    async def _share(self, share: Sequence[Request]) -> Reply:
        size = sum(n * draw.max_positions for _, n, draw in share)
        sent = packed(list(share))
        with self.services.clock.sampling(share[0][2]):
            return await self.pool.least(size, lambda actor: actor.sample.remote(sent))

    def _add_seconds(self, answers: Sequence[Reply]) -> None:
        """Add the seconds of the slowest actor, since they work at the same time."""
        for role in sorted({role for answer in answers for role in answer.seconds}):
            self.services.clock.add(role, max(answer.seconds.get(role, 0.0) for answer in answers))
