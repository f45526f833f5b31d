"""The current student's log-probs at tokens that were sampled earlier. No gradient and no random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reflux.kernels.budget import chunk_rows
from reflux.types import Attempt, Group, TopKTarget

if TYPE_CHECKING:
    from reflux.learners.hf_engine import HFLearner


def observed(learner: HFLearner, groups: Sequence[Group]) -> Iterator[tuple[Attempt, TopKTarget]]:
    """The current student's log-probs at each attempt's positions: where a teacher is asked at them
    (`now_candidates`), at the current student's own top-k ids; otherwise, if a part requires this, at the
    top-k ids that were recorded at sampling (`rollout.behaviour`). Attempts of the current student are left
    out where no part requires its own top-k ids, because `behaviour` has their log-probs.
    """
    requirements = learner.context.requirements
    k, at_behaviour = requirements.now_topk, requirements.now_at_behaviour
    if k and at_behaviour:
        # The two lists are compared, so the own one is no shorter.
        k = max(k, requirements.behaviour)
    for attempt, h_TH, tokens_T in states(learner, stale(learner, groups)):
        behaviour = attempt.rollout.behaviour
        if at_behaviour and not requirements.now_candidates and isinstance(behaviour, TopKTarget):
            ids_TK = torch.from_numpy(behaviour.ids_TK).to(h_TH.device)
            yield attempt, _listed(learner, h_TH, tokens_T, ids_TK, 0)
        elif k:
            yield attempt, _listed(learner, h_TH, tokens_T, None, k)


def stale(learner: Any, groups: Sequence[Group]) -> list[Group]:
    """The attempts that have to be observed, in their groups."""
    if learner.context.requirements.now_topk:
        return list(groups)
    return [[each for each in group if each.rollout.version != learner.version] for group in groups]


def logp(learner: HFLearner, groups: Sequence[Group]) -> list[np.ndarray]:
    """logp_T of every attempt's own tokens under the current student, in order; nats, float32."""
    head, found = learner.model.head, {}
    for attempt, h_TH, tokens_T in states(learner, groups):
        found[id(attempt)] = head.logp_of(h_TH, tokens_T).cpu().numpy()
    return [found[id(attempt)] for group in groups for attempt in group if id(attempt) in found]


def states(learner: HFLearner, groups: Sequence[Group]) -> Iterator[tuple[Attempt, Tensor, Tensor]]:
    """(attempt, h_TH, tokens_T) for every attempt with at least one position, computed in micro-batches."""
    items = [
        learner.whole(attempt)
        for group in groups
        for attempt in group
        if attempt.rollout.length and attempt.rollout.finish != "error"
    ]
    for part in learner.ranks.passes(learner.micro_batches(items)):
        if not part:
            with torch.no_grad():
                learner.idle()
            continue
        batch = learner.batch(part)
        with torch.no_grad(), learner.passing():
            rows = learner.hidden_rows(batch).split([len(item.rows_N) for item in part])
        tokens = batch.tokens_N.split([len(item.rows_N) for item in part])
        yield from zip((item.attempt for item in part), rows, tokens, strict=True)


@torch.no_grad()
def _listed(learner: HFLearner, h_TH: Tensor, tokens_T: Tensor, ids_TK: Tensor | None, k: int) -> TopKTarget:
    head = learner.model.head
    size = chunk_rows(head.vocabulary, h_TH.device)
    columns = []
    for start in range(0, len(h_TH), size):
        rows = slice(start, start + size)
        logp_NV = head.logits(h_TH[rows]).float().log_softmax(-1)
        ids_NK = logp_NV.topk(min(k, logp_NV.shape[-1])).indices if ids_TK is None else ids_TK[rows]
        columns.append((ids_NK, logp_NV.gather(-1, ids_NK), logp_NV.gather(-1, tokens_T[rows, None])[:, 0]))
    ids, listed, chosen = (torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))
    return TopKTarget(teacher="now", ids_TK=ids, logp_TK=listed, logp_T=chosen)
