"""The teacher that the loop knows, in front of teacher actors. Its output head is in this process too: here
the loss reads the distributions from the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.cluster.actors import Heading, shares
from reflux.cluster.wire import packed
from reflux.errors import ModelError
from reflux.kernels.head import Head
from reflux.models.chat.renderer import Renderer
from reflux.models.placement import first_device
from reflux.models.text import load_tokenizer
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.actors import Reply
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
    """Divides requests among the actors by length. It has what the preflight measures of a teacher."""

    def __init__(self, part: Teacher, context: PartContext, services: Services):
        self.services, self.table = services, context.name
        self.pool: Pool | None = None
        self.heading: Heading | None = None
        read_by = part.reader(context.student)
        # Only texts are placed.
        assert read_by is not None
        where = f"teachers.{context.name}.model"
        tokenizer = load_tokenizer(read_by.model, where, read_by.trust_remote_code, read_by.base_model)
        self.renderer = Renderer(tokenizer, read_by.system, read_by.template, read_by.prompt_suffix)

    @property
    def told(self) -> Heading:
        assert self.heading is not None
        return self.heading

    @property
    def macs(self) -> int:
        return self.told.macs

    @property
    def autocast(self) -> str:
        return self.told.autocast

    @property
    def head(self) -> str:
        return self.told.head

    @property
    def model(self) -> Window:
        return Window(self.told.context_tokens)

    async def prepare(self, actor: Any) -> None:
        """Open the part in a new actor. The first one tells what it is, and gives its output head."""
        from reflux.cluster.pool import unwrapped

        answer: Reply = await unwrapped(actor.open.remote())
        self.services.tell(answer.notes)
        if self.heading is None:
            self.heading = answer.result.value()
            self._take_heads(self.told)

    def _take_heads(self, told: Heading) -> None:
        if told.head not in told.matrices:
            raise ModelError(
                f"teachers.{self.table}: its output head is quantised or has an adapter, and only a plain "
                "one can be sent to the process of the loop. Give the teacher in float32 or bfloat16, with "
                "its adapter merged, or leave it out of cluster.teachers."
            )
        device = first_device()
        for key, (weight_VH, bias_V, scale, cap) in told.matrices.items():
            bias = None if bias_V is None else bias_V.to(device)
            self.services.heads.add(key, Head.of(weight_VH.to(device), bias, scale, cap))

    def close(self) -> None:
        for key in self.heading.matrices if self.heading else ():
            self.services.heads.remove(key)

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        assert self.pool is not None
        sizes = [request.rollout.prompt_length + request.rollout.length for request in requests]
        split = shares(sizes, len(self.pool.members))
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
        assert self.pool is not None
        sent = packed(share)
        answer = await self.pool.least(size, lambda actor: actor.score.remote(sent))
        self.services.tell(answer.notes)
        return answer.result.value()

    async def publish(self, weights: Weights, step: int) -> None:
        """Does nothing: only frozen teachers are placed."""

    def save(self, folder: Path) -> None:
        """Writes nothing: the teacher is frozen."""

    def load(self, folder: Path) -> None:
        """Reads nothing: `save` wrote nothing."""
