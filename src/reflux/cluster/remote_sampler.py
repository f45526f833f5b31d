"""The sampler that the loop knows, in front of sampler actors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reflux.cluster.sent_weights import SentWeights
from reflux.cluster.wire import packed
from reflux.runtime.cohorts import Gather
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.actors import Reply
    from reflux.cluster.pool import Pool
    from reflux.config.step_context import SamplingParams
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.types import Group, Prompt

Request = tuple["Prompt", int, "SamplingParams"]
# Steps that are sampled at the same time; the pipeline asks for no more.
_STEPS_AT_ONCE = 64


class RemoteSampler:
    """Cuts the prompts of a step into one share for each actor, and puts the groups together again.

    sent: the weights that were published last, and the step. An actor that is started later gets them.
    """

    def __init__(self, services: Services, precision: str):
        self.services, self.precision = services, precision
        self.pool: Pool | None = None
        self.sent: tuple[SentWeights, int] | None = None
        self._gather: Gather[Request, Group] = Gather(self._groups, at_once=_STEPS_AT_ONCE)

    @property
    def _pool(self) -> Pool:
        assert self.pool is not None
        return self.pool

    async def prepare(self, actor: Any) -> None:
        """Open the part in a new actor, and give it the current weights."""
        from reflux.cluster.pool import unwrapped

        self.heard([await unwrapped(actor.open.remote())])
        if self.sent is not None:
            self.heard([await unwrapped(actor.publish.remote(*self.sent))])

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        return await self._gather.ask((draw.purpose, draw.step), draw.cohort, prompt.key, (prompt, n, draw))

    async def publish(self, weights: Weights, step: int) -> None:
        if self.sent is None or self.sent[0].version != weights.version:
            # The weights before are freed when the last actor has let them go.
            self.sent = SentWeights.put(weights, self.precision), step
        sent, _ = self.sent
        self.heard(await self._pool.each(lambda actor: actor.publish.remote(sent, step)))

    async def _groups(self, requests: list[Request]) -> list[Group]:
        """The groups of one step, in order. The shares depend on the prompts and on the number of actors
        alone, so that every batch is the same in every run.
        """
        count = min(len(self._pool.members), len(requests))
        answers = await together(self._share(requests[first::count]) for first in range(count))
        self.heard(answers)
        groups: list[Any] = [None] * len(requests)
        for first, answer in enumerate(answers):
            groups[first::count] = answer.result.value()
        return groups

    async def _share(self, share: Sequence[Request]) -> Reply:
        size = sum(n * draw.max_positions for _, n, draw in share)
        sent = packed(list(share))
        return await self._pool.least(size, lambda actor: actor.sample.remote(sent))

    def heard(self, answers: Sequence[Reply]) -> None:
        """Pass on what the actors tell the user, and the seconds of the slowest one."""
        self.services.tell(note for answer in answers for note in answer.notes)
        for role in sorted({role for answer in answers for role in answer.seconds}):
            self.services.clock.add(role, max(answer.seconds.get(role, 0.0) for answer in answers))
