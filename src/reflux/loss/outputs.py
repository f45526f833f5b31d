"""The outputs of a model at N rows, in three classes that match the targets of `targets.py`. Each class
gives:

    logp_N            log-prob of the sampled token                         all three
    ids_NK, logp_NK   listed ids and their log-probs                        TopKLogprobs
    everything else   see its methods                                       FullLogits
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reflux.loss.baselines import kl_value, minimum_variance_value, topk_kl_value
from reflux.loss.divergences import DIVERGENCES, with_tail
from reflux.loss.gradients import TokenLogp

# Replaces the log-prob -inf of an impossible token, so that its product with the probability 0 is 0.
_FAR = -1e4


@dataclass
class SampledLogprobs:
    """Only the sampled token's log-prob is known."""

    logp_N: Tensor


@dataclass
class TopKLogprobs:
    """K listed ids per row, the sampled token's log-prob, and one tail bucket for the rest."""

    ids_NK: Tensor
    logp_NK: Tensor
    logp_N: Tensor


@dataclass
class GivenLogprobs(TopKLogprobs):
    """A TopKLogprobs of a teacher at the student's own most likely tokens."""


class FullLogits:
    """The whole distribution, from logits of any float dtype. Log-probs are at least float32, computed once
    and shared by all objectives. On a GPU, `fused_outputs.FusedLogits` gives the same results without the
    matrix `logp_NV`.
    """

    def __init__(self, logits_NV: Tensor, ids_N: Tensor):
        self.logits_NV = logits_NV
        self.ids_N = ids_N
        # By the id() of the other model's outputs. The outputs are kept too, so that Python cannot reuse
        # the id.
        self._kl: dict[int, tuple[FullLogits, Tensor]] = {}

    @property
    def vocabulary(self) -> int:
        return self.logits_NV.shape[1]

    @cached_property
    def logp_NV(self) -> Tensor:
        narrow = self.logits_NV.element_size() < 4
        with self._graph():
            return (self.logits_NV.float() if narrow else self.logits_NV).log_softmax(-1)

    @cached_property
    def logp_N(self) -> Tensor:
        """Log-probs of the sampled tokens, nats, differentiable."""
        with self._graph():
            return TokenLogp.apply(self.logits_NV, self.logp_NV.detach(), self.ids_N)

    def _graph(self) -> AbstractContextManager[object]:
        """Cached tensors are computed with autograd enabled even if the first access happens under no_grad,
        because a later objective may need gradients through them.
        """
        return torch.set_grad_enabled(self.logits_NV.requires_grad)

    @torch.no_grad()
    def top_ids(self, k: int, ordered: bool = False) -> Tensor:
        """The k most likely tokens, [N, k]; most likely first if `ordered`."""
        return self.logits_NV.topk(k, dim=-1, sorted=ordered).indices

    def at(self, ids_NK: Tensor) -> Tensor:
        """Log-probs at given ids, nats, differentiable. The ids of one row must differ."""
        return self.logp_NV.gather(-1, ids_NK)

    def with_tail(self, ids_NK: Tensor) -> Tensor:
        """The log-probs of `at` and, last, that of one bucket with all other mass, [N, K + 1];
        differentiable.
        """
        return with_tail(self.logp_NV, ids_NK, check=False)

    def divergence(self, teacher: FullLogits, kind: str, weight: float | None = None) -> Tensor:
        """A function of `DIVERGENCES` over the whole vocabulary, nats [N], differentiable in this model only.
        kind: the name of the function. weight: its beta or alpha; None: the default.
        """
        given = () if weight is None else (weight,)
        return DIVERGENCES[kind](self.logp_NV, teacher.logp_NV.detach(), *given)

    @torch.no_grad()
    def kl(self, teacher: FullLogits) -> Tensor:
        """KL(this || teacher), nats [N], >= 0, detached. It is computed once for a baseline, its variance
        and the records.
        """
        if id(teacher) not in self._kl:
            self._kl[id(teacher)] = (teacher, -kl_value(self.logp_NV, teacher.logp_NV))
        return self._kl[id(teacher)][1]

    @torch.no_grad()
    def topk_kl_value(self, teacher: FullLogits, k: int) -> Tensor:
        """`baselines.topk_kl_value` of this model and the teacher."""
        return topk_kl_value(self.logp_NV, teacher.logp_NV, k)

    @torch.no_grad()
    def minimum_variance_value(self, teacher: FullLogits) -> Tensor:
        """`baselines.minimum_variance_value` of this model and the teacher."""
        return minimum_variance_value(self.logp_NV, teacher.logp_NV)

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """-sum p log p, nats [N], detached."""
        return -torch.linalg.vecdot(self.logp_NV.exp(), self.logp_NV.clamp_min(_FAR))


Outputs = SampledLogprobs | TopKLogprobs | FullLogits
