"""The teacher that the loop knows, in front of teacher actors. Its output head is in this process too: here
the loss reads the distributions from the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.cluster.wire import packed
from reflux.errors import ModelError
from reflux.models.chat.renderer import Renderer
from reflux.models.placement import first_device
from reflux.models.text import load_tokenizer
from reflux.runtime.even_shares import even_shares
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.actors import TeacherInfo
    from reflux.cluster.pool import Pool
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.base import Teacher, TeacherRequest
    from reflux.types import TeacherAnswer


@dataclass(frozen=True)
class Window:
    """What is known here of a model that is elsewhere."""

    context_tokens: int


class RemoteTeacher:
    """Divides requests among the actors by length. It has what the preflight measures of a teacher.

    pool: of actors in which the teacher is open. info: of the teacher.
    """

    def __init__(
        self, part: Teacher, context: PartContext, services: Services, pool: Pool, info: TeacherInfo
    ):
        self.services, self.pool, self._keys = services, pool, list(info.heads)
        self.macs, self.autocast, self.head = info.macs, info.autocast, info.head
        self.model = Window(info.context_tokens)
        read_by = part.reader(context.student)
        # Only texts are placed.
        assert read_by is not None
        where = f"teachers.{context.name}"
        tokenizer = load_tokenizer(
            read_by.model, f"{where}.model", read_by.trust_remote_code, read_by.base_model
        )
        self.renderer = Renderer(tokenizer, read_by.system, read_by.template, read_by.prompt_suffix)
        if info.head not in info.heads:
            raise ModelError(
                f"{where}: its output head is quantised or has an adapter, and only a plain one can be sent "
                "to the process of the loop. Give the teacher in float32 or bfloat16, with its adapter "
                "merged, or leave it out of cluster.teachers."
            )
        device = first_device()
        for key, head in info.heads.items():
            services.heads.add(key, head.on(device))

    def close(self) -> None:
        for key in self._keys:
            self.services.heads.remove(key)

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        sizes = [request.rollout.prompt_length + request.rollout.length for request in requests]
        split = [share for share in even_shares(sizes, len(self.pool.members)) if share]
        answers = await together(
            self._share([requests[index] for index in share], sum(sizes[index] for index in share))
            for share in split
        )
        found: list[Any] = [None] * len(requests)
        # The actors read at the same time, so each attempt has its part of the slowest one's seconds.
        slowest = max((sum(answer.seconds for answer in each) for each in answers), default=0.0)
        for share, each in zip(split, answers, strict=True):
            for index, answer in zip(share, each, strict=True):
                found[index] = replace(answer, seconds=slowest / len(requests))
        return found

    async def _share(self, share: list[TeacherRequest], size: int) -> list[TeacherAnswer]:
        sent = packed(share)
        answer = await self.pool.least(size, lambda actor: actor.score.remote(sent))
        return answer.result.value()

    async def publish(self, weights: Weights, step: int) -> None:
        """Does nothing: only frozen teachers are placed."""

    def save(self, folder: Path) -> None:
        """Writes nothing: the teacher is frozen."""

    def load(self, folder: Path) -> None:
        """Reads nothing: `save` wrote nothing."""
