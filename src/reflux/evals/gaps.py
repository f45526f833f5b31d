"""Differences of log-probs, and the bounds that the precision of the two sides sets.

A structural fault (a cache that is not used, another template, positions that depend on the batch) moves
log-probs by tenths of a nat or more. Rounding moves them by much less; by how much depends on the precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reflux.evals.finding import Verdict

# the largest difference of two float32 computations, nats
FLOAT32_NATS = 1e-3
# 16 bits on one side: bounds on the median and the 99.9 % quantile of the differences, nats
MEDIAN_NATS, TAIL_NATS = 0.02, 0.3
# A difference of so many times these bounds is no longer explained by the precision.
STRUCTURAL = 5.0


@dataclass(frozen=True)
class Gaps:
    """Absolute differences of log-probs, nats, one array per attempt. narrow: one side has 16 bits."""

    between: str
    gaps: Sequence[np.ndarray]
    narrow: bool

    @property
    def excess(self) -> float:
        """The difference as a multiple of its bound; infinite where a number is not finite."""
        gap_N = np.concatenate([np.zeros(1), *self.gaps])
        if not np.isfinite(gap_N).all():
            return float("inf")
        if not self.narrow:
            return float(gap_N.max()) / FLOAT32_NATS
        return max(float(np.median(gap_N)) / MEDIAN_NATS, float(np.quantile(gap_N, 0.999)) / TAIL_NATS)

    @property
    def verdict(self) -> Verdict:
        if self.excess <= 1:
            return "ok"
        return "warning" if self.narrow and self.excess <= STRUCTURAL else "failed"

    def __str__(self) -> str:
        gap_N = np.concatenate([np.zeros(1), *self.gaps])
        place = max(range(len(self.gaps)), key=lambda i: self.gaps[i].max(initial=0.0))
        bounds = (
            f"median {np.median(gap_N):.2g} (bound {MEDIAN_NATS:g}), 99.9 % quantile "
            f"{np.quantile(gap_N, 0.999):.2g} (bound {TAIL_NATS:g})"
            if self.narrow
            else f"bound {FLOAT32_NATS:g}"
        )
        return (
            f"the log-probs of {self.between} differ by at most {gap_N.max():.2g} nats, at position "
            f"{int(self.gaps[place].argmax())} ({bounds})"
        )
