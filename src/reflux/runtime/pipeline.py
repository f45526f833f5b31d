"""Produce groups of attempts with bounded staleness. max_staleness = 0 is the synchronous loop.

Consumes: prompts, in order. They are taken in blocks of one step's size, and the number of the block is the
step that its attempts are asked for. A prompt that occurs several times in a block is numbered
(`occurrences.py`). Produces: for each optimiser step, its groups in prompt order. New attempts are started
when the consumer asks for the next step. At that time the new weights are published, so no lock and no queue
is needed. Shutdown: `aclose` cancels the attempts in flight and waits until they have ended.

While step s is trained, attempts of at most `ahead` later steps are in progress or finished.

In order "strict" step s takes block s, and waits for all of it. In order "ready" it takes the oldest groups
that are complete. A group that was started for the consumer's step s must be taken by step s +
max_staleness, its deadline. A step waits only as long as the groups that it would leave could miss their
deadlines; a step takes a fixed number of groups, so the k-th group that is left (from 0, by deadline) can be
taken by step s + 1 + k // per_step. So the staleness of an attempt when it is consumed is at most
max_staleness, and a slow group delays nobody for max_staleness - ahead steps, the window.

An attempt that raises or is cancelled cancels the other attempts of its block. Its error is raised when the
consumer asks for a step, with order "strict" for that step, also after a `settle` or a `refresh` in between.
If several attempts of one block raise, the first error in prompt order is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

from reflux.runtime.occurrences import numbered
from reflux.runtime.positions import Positions
from reflux.runtime.together import Siblings
from reflux.types import Group, Prompt


class Ask(NamedTuple):
    """One prompt that an attempt is asked for."""

    prompt: Prompt
    # its block, which is an optimiser step (from 0), and its place there
    step: int
    place: int
    # the number of prompts that are asked for together
    cohort: int
    # the last step that may take the attempts
    deadline: int
    # True if the attempts were made before a resume
    recalled: bool


Attempting = Callable[[Ask], Coroutine[Any, Any, Group]]


@dataclass(eq=False)
class _Block:
    """The prompts of one block that are not consumed, by their place in the block."""

    step: int
    prompts: dict[int, Prompt]
    # the places whose attempts were made before a resume, with the last steps that may take them
    recalled: dict[int, int]
    # the attempts of these prompts, and of those that are consumed meanwhile; None: not asked for
    attempts: Siblings[Group] | None = None
    tasks: dict[int, asyncio.Task[Group]] = field(default_factory=dict)
    # the last step that may take its groups
    deadline: int = 0

    def start(self, attempt: Attempting, deadline: int) -> None:
        self.deadline = min([deadline, *self.recalled.values()])
        fresh = len(self.prompts) - len(self.recalled)
        asks = [
            Ask(prompt, self.step, place, 1 if old else fresh, self.deadline, old)
            for place, prompt in self.prompts.items()
            for old in [place in self.recalled]
        ]
        self.attempts = Siblings(attempt(ask) for ask in asks)
        self.tasks = dict(zip(self.prompts, self.attempts.tasks, strict=True))

    async def raise_error(self) -> None:
        """Raise the error of an attempt that has failed, once all attempts have ended."""
        if self.attempts is not None and self.attempts.failed:
            await self.attempts.results()

    def drop(self) -> Siblings[Group] | None:
        """Forget the attempts, unless one of them has failed."""
        dropped = self.attempts
        if dropped is None or dropped.failed:
            return None
        self.attempts, self.tasks, self.recalled = None, {}, {}
        dropped.cancel()
        return dropped


class Pipeline:
    """An async iterator that yields, for each step from `positions.consumed` to `steps`, a list of `per_step`
    groups. prompts: the training prompts in order, from block `positions.first` on. attempt: makes the group
    of one prompt. max_staleness, ahead, order: as described above. recalled: the (block, place) of prompts
    whose attempts were made before a resume, with the last step that may take them. discard(block, place): is
    told of attempts that a refresh discards.

    async with aclosing(Pipeline(...)) as stream:
        async for groups in stream: ...
    """

    def __init__(
        self,
        prompts: Iterator[Prompt],
        attempt: Attempting,
        *,
        positions: Positions,
        steps: int,
        per_step: int,
        max_staleness: int,
        ahead: int,
        order: Literal["ready", "strict"] = "ready",
        recalled: Mapping[tuple[int, int], int] = MappingProxyType({}),
        discard: Callable[[int, int], None] = lambda block, place: None,
    ):
        self._prompts, self._attempt = prompts, attempt
        self._step, self._last = positions.consumed, steps
        self._per_step, self._max_staleness, self._ahead, self._order = per_step, max_staleness, ahead, order
        # what was left of the blocks that an earlier pipeline has asked for
        self._asked, self._left = positions.asked, dict(positions.left)
        self._recalled, self._discard = recalled, discard
        # the next block of prompts
        self._next = positions.first
        self._blocks: dict[int, _Block] = {}
        self._dropped: list[Siblings[Group]] = []

    @property
    def positions(self) -> Positions:
        """Which prompts are consumed. A later pipeline can go on from there."""
        left = {block.step: tuple(block.prompts) for block in self._blocks.values()}
        return Positions(self._step, max(self._next, self._asked), {**self._left, **left})

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Group]:
        if self._step >= self._last:
            raise StopAsyncIteration
        await self._clear_dropped()
        self._start()
        taken = await self._complete()
        self._step += 1
        return [self._consume(block, place) for block, place in taken]

    def _consume(self, number: int, place: int) -> Group:
        block = self._blocks[number]
        del block.prompts[place]
        if not block.prompts:
            del self._blocks[number]
        return block.tasks.pop(place).result()

    def _start(self) -> None:
        """Ask for the attempts of as many blocks as may be in progress."""
        while self._next < self._last and (self._next < self._asked or self._has_room()):
            self._take()
        for block in self._blocks.values():
            if block.attempts is None:
                block.start(self._attempt, self._step + self._max_staleness)

    def _has_room(self) -> bool:
        waiting = sum(len(block.prompts) for block in self._blocks.values())
        return waiting <= self._ahead * self._per_step

    def _take(self) -> None:
        prompts = list(islice(self._prompts, self._per_step))
        if len(prompts) < self._per_step:
            raise ValueError(
                f"the task gave only {len(prompts)} more training prompts, but a step needs "
                f"{self._per_step}. The iterator of training prompts must not end."
            )
        whole = () if self._next < self._asked else range(self._per_step)
        left = self._left.pop(self._next, whole)
        block = _Block(
            self._next,
            {place: each for place, each in enumerate(numbered(prompts)) if place in left},
            {
                place: self._recalled[self._next, place]
                for place in left
                if (self._next, place) in self._recalled
            },
        )
        if block.prompts:
            self._blocks[block.step] = block
        self._next += 1

    async def _complete(self) -> list[tuple[int, int]]:
        """Wait for the groups of this step. Gives their (block, place), in prompt order."""
        while True:
            blocks = [b for b in self._blocks.values() if self._order == "ready" or b.step == self._step]
            for block in blocks:
                await block.raise_error()
            oldest = sorted(blocks, key=lambda block: (block.deadline, block.step))
            done, running = [], []
            for block in oldest:
                for place, task in block.tasks.items():
                    (done if task.done() else running).append((block.deadline, block.step, place, task))
            taken = done[: self._per_step]
            left = sorted(deadline for deadline, *_ in [*done[self._per_step :], *running])
            if len(taken) == self._per_step and self._in_time(left):
                return sorted((step, place) for _, step, place, _ in taken)
            await asyncio.wait([task for *_, task in running], return_when=asyncio.FIRST_COMPLETED)

    def _in_time(self, deadlines: list[int]) -> bool:
        """True if the later steps can take groups with these deadlines (ascending) in time."""
        following = self._step + 1
        return all(
            following + place // self._per_step <= deadline for place, deadline in enumerate(deadlines)
        )

    async def settle(self) -> None:
        """Wait until all running attempts have ended. No attempt is started until the consumer asks for the
        next step.
        """
        for block in self._blocks.values():
            if block.attempts is not None:
                await block.attempts.ended()

    def refresh(self) -> None:
        """Discard the attempts that are started or finished and not consumed. When the consumer asks for the
        next step, their prompts are sampled again with the weights of that moment.

        A block that has failed is kept, and its error is raised when the consumer asks for a step.
        """
        for block in self._blocks.values():
            dropped = block.drop()
            if dropped is not None:
                self._dropped.append(dropped)
                for place in block.prompts:
                    self._discard(block.step, place)

    @property
    def in_flight(self) -> int:
        return sum(not task.done() for block in self._blocks.values() for task in block.tasks.values())

    async def _clear_dropped(self) -> None:
        """Wait until the dropped attempts have ended. Otherwise an old and a new attempt at the same
        prompt could be in one batch.
        """
        while self._dropped:
            await self._dropped[0].ended()
            # raises if an attempt failed while it was being cancelled
            self._dropped.pop(0).raise_error()

    async def aclose(self) -> None:
        """Cancel all running attempts and wait until they have ended. May be called twice."""
        alive = [*self._dropped, *(block.attempts for block in self._blocks.values() if block.attempts)]
        for attempts in alive:
            attempts.cancel()
        for attempts in alive:
            await attempts.ended()
        self._last = self._step
