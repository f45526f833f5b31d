"""The model's own passes over one text, to compare the library's computations with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reflux.models.dtensors import gathered
from reflux.types import Attempt, TokenRollout

if TYPE_CHECKING:
    from reflux.learners.hf_engine import HFLearner


def own_logps(learner: HFLearner, rollouts: Sequence[TokenRollout]) -> list[np.ndarray]:
    """`own_logp` of every rollout, in order."""
    return [own_logp(learner, rollout.prompt_tokens, rollout.tokens_T) for rollout in rollouts]


@torch.no_grad()
def own_logp(learner: HFLearner, prompt: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    """logp_T of the tokens after the prompt by the model's own forward pass: one text, without a cache,
    without padding and with the model's own output head; nats, float32.
    """
    learner.ranks.gather()
    ids_L = torch.from_numpy(np.concatenate([prompt, tokens_T])).to(learner.model.device)
    with learner.autocast():
        logits_LV = learner.model.net(input_ids=ids_L[None], use_cache=False).logits[0]
    rows_TV = logits_LV[len(prompt) - 1 : -1, : learner.model.vocabulary].float().log_softmax(-1)
    return rows_TV.gather(-1, ids_L[len(prompt) :, None].to(rows_TV.device))[:, 0].cpu().numpy()


def gradient_norm(learner: HFLearner, attempt: Attempt) -> float:
    """The norm of a gradient with respect to the trained weights: of the log-probs of an attempt's tokens,
    less the mean log-prob of all tokens. The latter keeps it above 0 for a student that is sure of each
    token. No gradient is kept.
    """
    batch, count = learner.batch([learner.whole(attempt)]), len(learner.ranks.together(None))
    with learner.passing():
        logp_NV = learner.model.head.logits(learner.hidden_rows(batch)).float().log_softmax(-1)
        if not logp_NV.requires_grad:
            return 0.0
        logp_N1 = logp_NV.gather(-1, batch.tokens_N[:, None].to(logp_NV.device))
        (logp_N1.mean() - logp_NV.mean()).backward()
    learner.ranks.add_up(learner.trained.values())
    norms: list[Tensor] = [p.grad.float().norm() for p in learner.trained.values() if p.grad is not None]
    learner.optimiser.zero_grad(set_to_none=True)
    # Every rank has computed the same gradient, and they are added up.
    return float(gathered(torch.stack(norms).norm())) / count if norms else 0.0
