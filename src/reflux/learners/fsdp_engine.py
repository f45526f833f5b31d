"""Rank 0 of `learners.fsdp`: the learner that the loop knows. Each of its methods that computes with the
weights is a message to the other ranks, and all ranks then do the same work at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from reflux.errors import StepRefused
from reflux.learners.follower import one_rank
from reflux.learners.group_shares import places, shares
from reflux.learners.hf_engine import HFLearner
from reflux.learners.rank_group import RankGroup
from reflux.learners.sent_heads import HeadSender, SentHead, take
from reflux.loss.step import StepRequest, StepResult
from reflux.models import lora
from reflux.runtime.weights import AdapterWeights, InMemory
from reflux.types import Group, Target

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.fsdp import FSDP
    from reflux.runtime.services import Services

Done = TypeVar("Done")

# Weights are gathered for their readers in lists of about so many bytes.
_GATHERED_BYTES = 1 << 28


class FSDPLearner:
    """The parts of the student in this process (`local`), and the ranks that have the others."""

    def __init__(self, local: HFLearner, group: RankGroup):
        self.local, self.group = local, group
        self.cfg, self.model, self.macs = local.cfg, local.model, local.macs
        self.context, self.services = local.context, local.services
        self.access = SharedAccess(self)
        self._heads = HeadSender(local.services.heads)
        # With max_staleness above 0, methods may be called in different threads.
        self._turn = threading.Lock()

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: FSDP, context: PartContext, services: Services) -> AsyncIterator[FSDPLearner]:
        group = RankGroup.join(cfg.device)
        try:
            group.scatter([(cfg, context)] * group.size)
            group.busy = True
            local = await services.run_model(one_rank, cfg, context, services, group)
            group.busy = False
            services.listener.noted(f"the student is divided among {group.size} processes (FSDP2)")
            yield cls(local, group)
        finally:
            group.leave()

    @property
    def version(self) -> int:
        return self.local.version

    @version.setter
    def version(self, value: int) -> None:
        self.local.version = value

    def everywhere(self, work: Callable[..., Done], *arguments: Any) -> Done:
        return self._order(work, [arguments] * self.group.size)

    def _order(self, work: Callable[..., Done], arguments: Sequence[tuple[Any, ...]]) -> Done:
        """Run work(learner, *arguments[rank]) in every rank, and return the result of this one."""
        with self._turn:
            self.group.busy = True
            self.group.scatter([(work, each) for each in arguments])
            try:
                done = work(self.local, *arguments[0])
            except StepRefused:
                # All ranks refuse the same step, and wait for the next message.
                self.group.busy = False
                raise
            except RuntimeError:
                self.group.wait_for_lost_rank()
                raise
            self.local.ranks.rest()
            self.group.busy = False
            return done

    def publish(self) -> InMemory:
        config = lora.adapter_config(self.model.net)
        adapter = None if config is None else AdapterWeights(config, lambda: self.everywhere(adapter_weights))
        return InMemory(self.version, self._gathered, adapter=adapter)

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        for names in _lists(lora.weight_bytes(self.model.net)):
            yield from self.everywhere(full_weights, names).items()

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return dict(self._gathered())

    def at_mean(self) -> AbstractContextManager[bool]:
        return nullcontext(False)

    async def observe(self, groups: Sequence[Group]) -> list[Target | None]:
        whole: list[Target | None] = [None] * sum(map(len, groups))
        if self.local.observes:
            split = shares(groups, self.group.size)
            found = await self.services.run_model(
                self._order, observed, [([groups[index] for index in share],) for share in split]
            )
            for share, targets in zip(split, found, strict=True):
                for place, target in zip(places(groups, share), targets, strict=True):
                    whole[place] = target
        return whole

    async def step(self, request: StepRequest) -> StepResult:
        groups = request.groups
        split = shares(groups, self.group.size)
        news = self._heads.news(request.attempts) if self.group.size > 1 else {}
        orders = [
            (
                replace(request, groups=[groups[index] for index in share]),
                places(groups, share),
                len(request.attempts),
                news,
            )
            for share in split
        ]
        return await self.services.run_model(self._order, stepped, orders)

    def save(self, folder: Path) -> None:
        self.everywhere(HFLearner.save, folder)

    def load(self, folder: Path) -> None:
        self.everywhere(HFLearner.load, folder)

    def export(self, folder: Path) -> None:
        self.everywhere(HFLearner.export, folder)


class SharedAccess:
    """`WeightAccess` to weights that several ranks hold."""

    def __init__(self, learner: FSDPLearner):
        self._learner = learner

    @property
    def names(self) -> Sequence[str]:
        return self._learner.local.access.names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._learner.everywhere(read, list(names))

    def base(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._learner.everywhere(base, list(names))

    def write(self, base: Mapping[str, Tensor]) -> None:
        self._learner.everywhere(write, dict(base))


# --- what all ranks do at the same time


def full_weights(learner: HFLearner, names: Sequence[str]) -> dict[str, Tensor]:
    return dict(lora.full_weights(learner.net, frozenset(names)))


def adapter_weights(learner: HFLearner) -> list[tuple[str, Tensor]]:
    return list(lora.adapter_tensors(learner.net))


def observed(learner: HFLearner, groups: Sequence[Group]) -> list[list[Target | None]]:
    """For each rank, the current student's outputs at the attempts of its share."""
    found = learner.seen(groups)
    return learner.ranks.together([found.get(id(attempt)) for group in groups for attempt in group])


def stepped(
    learner: HFLearner, request: StepRequest, places: Sequence[int], attempts: int, news: dict[str, SentHead]
) -> StepResult:
    take(learner, news)
    return learner.learn(request, places, attempts)


def read(learner: HFLearner, names: Sequence[str]) -> dict[str, Tensor]:
    return learner.access.read(names)


def base(learner: HFLearner, names: Sequence[str]) -> dict[str, Tensor]:
    return learner.access.base(names)


def write(learner: HFLearner, values: Mapping[str, Tensor]) -> None:
    learner.access.write(values)


def _lists(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in lists of about `_GATHERED_BYTES` bytes, in order."""
    names: list[str] = []
    taken = 0
    for name, size in sizes.items():
        if names and taken + size > _GATHERED_BYTES:
            yield names
            names, taken = [], 0
        names.append(name)
        taken += size
    yield names
