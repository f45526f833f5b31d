"""The model's own forward pass over one text, to compare the library's computations with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.types import TokenRollout

if TYPE_CHECKING:
    from reflux.learners.hf_engine import HFLearner


@torch.no_grad()
def own_logp(learner: HFLearner, rollout: TokenRollout) -> np.ndarray:
    """logp_T of the attempt's tokens by the model's own forward pass: one text, without a cache, without
    padding and with the model's own output head; nats, float32.
    """
    ids_L = torch.from_numpy(np.concatenate([rollout.prompt_tokens, rollout.tokens_T]))
    tokens_T = torch.from_numpy(rollout.tokens_T).to(learner.model.device)
    with learner.autocast():
        logits_LV = learner.model.net(input_ids=ids_L[None].to(learner.model.device), use_cache=False).logits[
            0
        ]
    rows_TV = logits_LV[rollout.prompt_length - 1 : -1, : learner.model.vocabulary].float().log_softmax(-1)
    return rows_TV.gather(-1, tokens_T[:, None].to(rows_TV.device))[:, 0].cpu().numpy()
