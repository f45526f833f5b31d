"""What runs in the processes of a cluster: an open sampler, an open teacher, or a rank of the learner."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reflux.cluster.wire import Packed, packed
from reflux.learners.sent_heads import SentHead
from reflux.models.torch_settings import prepare_torch
from reflux.runtime.library_logging import quiet_libraries
from reflux.runtime.services import Services
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.sent_weights import SentWeights
    from reflux.config.context import PartContext
    from reflux.config.step_context import Purpose
    from reflux.learners.base import Learner


@dataclass(frozen=True)
class Reply:
    """The result of a call. seconds: by role, since the last answer. notes: for the user, since then."""

    result: Packed
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TeacherInfo:
    """What the process of the loop must know of an open teacher. head: the key of its output head. heads: by
    key, every head that targets may name and that is a plain matrix.
    """

    macs: int
    autocast: str
    context_tokens: int
    head: str
    heads: Mapping[str, SentHead]


class NoteBuffer:
    """A listener that keeps its messages until they are taken."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def noted(self, text: str) -> None:
        self._texts.append(text)

    def take(self) -> tuple[str, ...]:
        taken, self._texts = tuple(self._texts), []
        return taken


class Actor:
    """A process that Ray has started. gpus: the GPUs that are reserved for it."""

    def __init__(self, gpus: float):
        if not gpus:
            # Ray hides no GPU from an actor that has reserved none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""


class PartActor(Actor):
    """A part that is open from `open` to `close`. The part and its context are all that it knows."""

    def __init__(self, part: Any, context: PartContext, gpus: float, overlaps: bool = False):
        super().__init__(gpus)
        self.part, self.context = part, context
        self.listener = NoteBuffer()
        # With staleness, new weights and further work arrive during a model call.
        overlap = overlaps or context.numbers.max_staleness > 0
        self.services = Services(context.student, overlap=overlap, parties=1, listener=self.listener)
        self.opened: Any = None
        self._ending = asyncio.Event()
        self._holding: asyncio.Task[None] | None = None

    async def open(self) -> Reply:
        """Open the part, and say what the process of the loop must know of it."""
        quiet_libraries()
        # Settings of torch belong to a thread, and this one does the work.
        prepare_torch(self.context.placement.threads, self.context.placement.deterministic)
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # One task opens and closes it, as in a process of its own.
        self._holding = asyncio.create_task(self._hold(ready))
        self.opened = await ready
        return self.reply(self.info())

    async def _hold(self, ready: asyncio.Future[Any]) -> None:
        try:
            async with self.part.open(self.context, self.services) as opened:
                ready.set_result(opened)
                await self._ending.wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(error)

    def info(self) -> TeacherInfo | None:
        return None

    def reply(self, result: Any) -> Reply:
        seconds = self.services.clock.take()
        # The wall clock of this process counts the time in which nothing is asked of it.
        seconds.pop("total")
        return Reply(packed(result), seconds, self.listener.take())

    async def close(self) -> None:
        self._ending.set()
        if self._holding is not None:
            await self._holding
        self.services.close()


class SamplerActor(PartActor):
    def __init__(self, part: Any, context: PartContext, gpus: float):
        super().__init__(part, context, gpus, part.overlaps)
        # A sampler waits for all prompts of a step before it begins, and two shares of one step must not be
        # mixed.
        self._turns: dict[tuple[Purpose, int], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def publish(self, weights: SentWeights, step: int) -> Reply:
        await self.opened.publish(await weights.fetched(), step)
        return self.reply(None)

    async def sample(self, share: Packed) -> Reply:
        """share: (prompt, number of attempts, sampling parameters) of some prompts of one step."""
        asked = share.value()
        draw = replace(asked[0][2], cohort=len(asked))
        async with self._turns[draw.purpose, draw.step]:
            groups = await together(self.opened.sample(prompt, n, draw) for prompt, n, _ in asked)
        return self.reply(groups)


class TeacherActor(PartActor):
    def info(self) -> TeacherInfo:
        heads, opened = self.services.heads, self.opened
        return TeacherInfo(
            macs=opened.macs,
            autocast=opened.autocast,
            context_tokens=opened.model.context_tokens,
            head=opened.head,
            heads={
                key: SentHead(*matrix, head.scale, head.cap)
                for key, head in heads.items()
                if (matrix := head.matrix) is not None
            },
        )

    async def score(self, share: Packed) -> Reply:
        """share: a list of `TeacherRequest`."""
        return self.reply(await self.opened.score(share.value()))


class RankActor(Actor):
    """A process that holds a part of the student and takes part in its passes."""

    def __init__(self, learner: Learner, gpus: float):
        super().__init__(gpus)
        self.learner = learner

    def follow(self, group: Mapping[str, str]) -> None:
        """Take part in the run until it ends. group: the environment variables that describe the group."""
        os.environ.update(group)
        try:
            self.learner.follow()
        except BaseException:
            # The other ranks notice the end of a process, and nothing less.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


class DriverActor(Actor):
    """Holds the bundle of the process of the loop, which Ray has not started and so cannot put there."""

    def gpus(self) -> list[str]:
        """The numbers of the GPUs that are reserved here."""
        import ray

        return [str(each) for each in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
