"""Sends the output heads of teachers (the matrices that map hidden states to logits) from rank 0, where the
teachers are, to the ranks that compute the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.kernels.head import Head
from reflux.types import Attempt

if TYPE_CHECKING:
    from reflux.learners.hf_engine import HFLearner
    from reflux.models.heads import Heads


@dataclass(frozen=True)
class SentHead:
    """An output head on its way to another process: weight_VH and bias_V over the real vocabulary; the factor
    and the soft cap of its logits.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    def on(self, device: torch.device | str) -> Head:
        """The head, on a device of the process that it was sent to."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return Head.of(self.weight_VH.to(device), bias_V, self.scale, self.cap)


@dataclass
class HeadSender:
    """The heads that the other ranks have. A head is sent again where its values have changed, as those of a
    teacher that follows the student do.
    """

    heads: Heads
    # by key: the values that were sent last, on the device of the head
    sent: dict[str, list[Tensor]] = field(default_factory=dict)

    def news(self, attempts: Iterable[Attempt]) -> dict[str, SentHead]:
        """The heads that these attempts' targets need and the other ranks lack, by key. ModelError for a head
        that is not a plain matrix.
        """
        answers = [answer for attempt in attempts for answer in attempt.answers.values()]
        known = (answer.target.head_key for answer in answers if answer.target is not None)
        keys = sorted({key for key in known if key is not None})
        return {key: head for key in keys if (head := self._changed(key)) is not None}

    @torch.no_grad()
    def _changed(self, key: str) -> SentHead | None:
        head = self.heads[key]
        if head.matrix is None:
            raise ModelError(
                f"the output head of {key} is quantised or has an adapter, and learner.kind = 'fsdp' sends "
                "plain heads only. Give the teacher in float32 or bfloat16, with its adapter merged."
            )
        tensors = [tensor.detach() for tensor in head.matrix if tensor is not None]
        before = self.sent.get(key, [])
        if len(before) == len(tensors) and all(map(torch.equal, before, tensors)):
            return None
        self.sent[key] = [tensor.clone() for tensor in tensors]
        weight_VH, *bias = [tensor.to("cpu", copy=True) for tensor in tensors]
        return SentHead(weight_VH, bias[0] if bias else None, head.scale, head.cap)


def take(learner: HFLearner, news: dict[str, SentHead]) -> None:
    """Make the heads that rank 0 has sent known to this rank. Rank 0 has them."""
    if learner.ranks.leads:
        return
    heads, device = learner.services.heads, learner.model.device
    for key, sent in news.items():
        heads.remove(key)
        heads.add(key, sent.on(device))
