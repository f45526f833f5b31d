"""A matrix of raw logits as the fused kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reflux.kernels.head import Head


@dataclass(frozen=True)
class RawTable:
    """The products [N, V] of hidden states and a head's matrix, not yet scaled or capped, and their head. The
    logits of one row lie side by side in memory; there may be gaps between rows.
    """

    raw_NV: Tensor
    head: Head

    @property
    def logits_NV(self) -> Tensor:
        """The logits as a table of their own if the head scales or caps them."""
        return self.head.finish(self.raw_NV)

    def logits_at(self, ids_NK: Tensor) -> Tensor:
        """The logits at K ids per row, [N, K], float32."""
        return self.head.finish(self.raw_NV.gather(-1, ids_NK).float())
