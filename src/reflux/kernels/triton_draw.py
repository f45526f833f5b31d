"""A sample from each row of a table of logits, in one pass over the table.

The noise is that of `reflux.models.rng.gumbel`: the same hash gives the same uniform numbers bit for bit, and
the noise differs from it by rounding only, at most 1e-5 nats. So the tokens are the same except where two
tokens are that close.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reflux.kernels.triton_launch import launch


@torch.no_grad()
def draw_rows(
    logits_BV: Tensor, keys_B: Tensor, position_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_B, lse_B, tempered_B): argmax(logits / temperature + Gumbel noise) as int64, and the logsumexp
    of the logits and of logits / temperature, float32, nats. Of equal values the lowest id is taken.

    keys_B, position_B: int64, as for `reflux.models.rng.gumbel`. temperature: above 0. A logit may be -inf.
    """
    from reflux.kernels.triton_draw_kernel import draw_row

    # The kernel reads the logits of a row as neighbours in memory; there may be gaps between rows.
    logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    lse_B, tempered_B = torch.empty(2, len(logits_BV), dtype=torch.float32, device=logits_BV.device)
    launch(
        draw_row,
        logits_BV,
        logits_BV,
        logits_BV.stride(0),
        keys_B.contiguous(),
        position_B.contiguous(),
        tokens_B,
        lse_B,
        tempered_B,
        logits_BV.shape[1],
        1 / temperature,
    )
    return tokens_B, lse_B, tempered_B
