"""Picks the next token of each row from its logits, with counter-based noise."""

from __future__ import annotations

import torch
from torch import Tensor

from reflux.config.step_context import SamplingParams
from reflux.kernels.triton_draw import draw_rows
from reflux.kernels.triton_launch import usable
from reflux.models.rng import gumbel

# a probability of 1 in the unit of the sums of `top_p`
_WHOLE = 1 << 40


def pick(
    logits_BV: Tensor, keys_B: Tensor, position_B: Tensor, draw: SamplingParams, behaviour_k: int
) -> tuple[Tensor, ...]:
    """(tokens_B, logp_B, raw_B[, behaviour ids_BK, behaviour logp_BK]). Temperature 0 takes the most likely
    token, and its logp is the raw one. Nothing here waits for the device.

    position_B: the number of tokens that each row has drawn before.
    """
    fused = usable(logits_BV.device) and draw.temperature > 0
    if fused and draw.top_p == 1:
        tokens_B, lse_B, tempered_B = draw_rows(logits_BV, keys_B, position_B, draw.temperature)
        logit_B = logits_BV.gather(-1, tokens_B[:, None])[:, 0].float()
        picked = (tokens_B, logit_B / draw.temperature - tempered_B, logit_B - lse_B)
        return picked + _behaviour(logits_BV, behaviour_k, lse_B)
    raw_BV = logits_BV.float().log_softmax(-1)
    logp_BV = _tempered(raw_BV, draw)
    if draw.temperature == 0:
        tokens_B = raw_BV.argmax(-1)
    elif fused:
        tokens_B = draw_rows(logp_BV, keys_B, position_B, 1.0)[0]
    else:
        tokens_B = (logp_BV + gumbel(keys_B, position_B, raw_BV.shape[-1])).argmax(-1)
    chosen = tokens_B[:, None]
    picked = (tokens_B, logp_BV.gather(-1, chosen)[:, 0], raw_BV.gather(-1, chosen)[:, 0])
    return picked + _behaviour(raw_BV, behaviour_k)


def _behaviour(logits_BV: Tensor, k: int, lse_B: Tensor | None = None) -> tuple[Tensor, ...]:
    """Ids and log-probs of the k most likely tokens. Without `lse_B` the logits are log-probs."""
    if not k:
        return ()
    top = logits_BV.topk(min(k, logits_BV.shape[-1]))
    return top.indices, top.values if lse_B is None else top.values.float() - lse_B[:, None]


def _tempered(raw_BV: Tensor, draw: SamplingParams) -> Tensor:
    """Log-probs at the sampling temperature, cut to the smallest set of tokens with a mass of at least
    top_p, and renormalised.
    """
    if draw.temperature in (0, 1) and draw.top_p == 1:
        return raw_BV
    logp_BV = (raw_BV / draw.temperature).log_softmax(-1) if draw.temperature not in (0, 1) else raw_BV
    if draw.top_p < 1:
        ordered = logp_BV.sort(descending=True)
        # Sums of whole numbers are exact, so they do not depend on the order in which a GPU adds.
        shares_BV = (ordered.values.exp() * _WHOLE).to(torch.int64)
        before_BV = shares_BV.cumsum(-1) - shares_BV
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(
            -1, ordered.indices, before_BV >= round(draw.top_p * _WHOLE)
        )
        logp_BV = logp_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    return logp_BV
