"""The model's own passes over one text, to compare the library's computations with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reflux.types import Attempt

if TYPE_CHECKING:
    from reflux.learners.hf_engine import HFLearner


@torch.no_grad()
def own_logp(learner: HFLearner, prompt: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    """logp_T of the tokens after the prompt by the model's own forward pass: one text, without a cache,
    without padding and with the model's own output head; nats, float32.
    """
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
    batch = learner.batch([learner.whole(attempt)])
    with learner.passing():
        logp_NV = learner.model.head.logits(learner.hidden_rows(batch)).float().log_softmax(-1)
        if not logp_NV.requires_grad:
            return 0.0
        logp_N1 = logp_NV.gather(-1, batch.tokens_N[:, None].to(logp_NV.device))
        (logp_N1.mean() - logp_NV.mean()).backward()
    norms: list[Tensor] = [p.grad.float().norm() for p in learner.trained.values() if p.grad is not None]
    learner.optimiser.zero_grad(set_to_none=True)
    return float(torch.stack(norms).norm()) if norms else 0.0
