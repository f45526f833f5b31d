"""The value of a prefix, taken from sibling attempts: the mean reward of their tokens.

It uses no torch, because it is computed before the batch is cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def group_values(rewards: Sequence[np.ndarray | None], leave_one_out: bool) -> list[float]:
    """Mean reward per token over the group's attempts, one value per attempt, in the unit of the reward
    (nats).

    rewards: for each attempt, the rewards of its chosen tokens (log q - log p at temperature 1, whatever
    temperature they were sampled at), of any length. None for an attempt without rewards (not scored,
    failed); its value is 0. Rewards that are not finite are left out. All tokens have equal weight, so a
    long attempt contributes more than a short one.

    leave_one_out: the mean is over the tokens of the OTHER attempts. A value then does not depend on its own
    attempt, not even by rounding, and any estimator stays unbiased (Kool et al. 2019, "Buy 4 REINFORCE
    samples, get a baseline for free!"; arXiv 2402.14740). Otherwise the mean is over all attempts, including
    the attempt's own tokens, and is one number for the whole group (as the group mean of arXiv 2402.03300).
    That is biased, see `SampledKL`. The value is 0 where no other attempt has a finite reward.
    """
    finite = [
        np.asarray(own, dtype=np.float64)[np.isfinite(own)] if own is not None else np.zeros(0)
        for own in rewards
    ]
    values = []
    for i, own in enumerate(rewards):
        others = [other for j, other in enumerate(finite) if j != i and len(other)]
        counted = others if leave_one_out else [*others, finite[i]]
        silent = own is None or not others
        values.append(
            0.0 if silent else math.fsum(r for one in counted for r in one.tolist()) / sum(map(len, counted))
        )
    return values
