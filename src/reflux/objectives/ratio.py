"""p(a) / behaviour(a) per token: what attempts weigh that an older student wrote, or one the sampler computed slightly differently."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Literal["truncated", "clip", "none"]


def score_cost(
    advantage_N: Tensor, logp_N: Tensor, behaviour_logp_N: Tensor, ratio: Ratio, clip: tuple[float, float], ratio_cap: float
) -> Tensor:
    """-A log p(a) for attempts sampled by an older policy, rho = p(a) / behaviour(a) per token. At rho = 1 all have one gradient.

    truncated: -min(rho, ratio_cap) A log p with the ratio detached (biased only where it is capped).
    clip: PPO's -min(rho A, clip(rho, 1 - clip[0], 1 + clip[1]) A), differentiated through rho (arXiv 1707.06347). none: rho is ignored.
    """
    advantage_N = advantage_N.detach()
    if ratio == "none":
        return -advantage_N * logp_N
    if ratio == "truncated":
        return -(truncated_ratio(logp_N, behaviour_logp_N, ratio_cap) * advantage_N) * logp_N
    log_ratio_N = logp_N - behaviour_logp_N
    lower_N, upper_N = log_ratio_N.clamp(min=math.log1p(-clip[0])), log_ratio_N.clamp(max=math.log1p(clip[1]))
    return -advantage_N * upper_N.where(advantage_N >= 0, lower_N).exp()  # clamped before exp: a huge ratio gives no inf * 0


def truncated_ratio(logp_N: Tensor, behaviour_logp_N: Tensor, ratio_cap: float) -> Tensor:
    """min(p(a) / behaviour(a), ratio_cap) per token, [N], detached: truncated importance weights (per step as in arXiv 1802.01561)."""
    return (logp_N - behaviour_logp_N).detach().exp().clamp(max=ratio_cap)


def outside(
    logp_N: Tensor, behaviour_logp_N: Tensor, ratio: Ratio, clip: tuple[float, float] = (0.2, 0.2), ratio_cap: float = 5.0
) -> Tensor | None:
    """True where the ratio lies beyond its cap, or outside the clip's range; None where it has no bound.

    Beyond the cap every token is held back, and the estimator biased. Outside the range a token is, where the advantage would push it
    further away (PPO's bound is one-sided).
    """
    if ratio == "none":
        return None
    log_ratio_N = (logp_N - behaviour_logp_N).detach()
    if ratio == "truncated":
        return log_ratio_N > math.log(ratio_cap)
    return (log_ratio_N > math.log1p(clip[1])) | (log_ratio_N < math.log1p(-clip[0]))


def check_ratio(clip: tuple[float, float] = (0.2, 0.2), ratio_cap: float = 1.0) -> None:
    if not (0 <= clip[0] < 1 and 0 <= clip[1] < math.inf):
        raise ValueError(f"clip must be (below, above) with 0 <= below < 1 and above >= 0, such as [0.2, 0.28], got {list(clip)}")
    if not ratio_cap >= 1:
        raise ValueError(f"ratio_cap must be at least 1, or on-policy tokens are scaled down as well, got {ratio_cap}")
