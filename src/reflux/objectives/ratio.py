"""The importance ratio p(a) / behaviour(a) per token, for attempts not drawn from the current student.

behaviour(a) is the probability with which the token was drawn. One ratio therefore corrects for an older
student, for a sampler that computes slightly differently, and for a temperature or top-p other than 1. A
token that top-p excludes is never drawn, and no ratio can correct for that. With top-p below 1 only the
tokens inside its set are corrected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Literal["truncated", "clip", "none"]
# how far below and above 1 the ratio may be
Clip = tuple[float, float]


def score_cost(
    advantage_N: Tensor, logp_N: Tensor, behaviour_logp_N: Tensor, ratio: Ratio, clip: Clip, ratio_cap: float
) -> Tensor:
    """The cost -A log p(a) for attempts drawn from another distribution, with rho = p(a) / behaviour(a).

    truncated: -min(rho, ratio_cap) A log p, with the ratio detached. It is biased only where the ratio is
    capped. clip: PPO's -min(rho A, clip(rho, 1 - clip[0], 1 + clip[1]) A), differentiated through rho (arXiv
    1707.06347). none: rho is ignored. At rho = 1 the three have the same gradient.
    """
    advantage_N = advantage_N.detach()
    if ratio == "none":
        return -advantage_N * logp_N
    if ratio == "truncated":
        return -(truncated_ratio(logp_N, behaviour_logp_N, ratio_cap) * advantage_N) * logp_N
    log_ratio_N = logp_N - behaviour_logp_N
    lower_N, upper_N = log_ratio_N.clamp(min=math.log1p(-clip[0])), log_ratio_N.clamp(max=math.log1p(clip[1]))
    # Clamped before exp, because inf * 0 of a huge ratio would be NaN.
    return -advantage_N * upper_N.where(advantage_N >= 0, lower_N).exp()


def truncated_ratio(logp_N: Tensor, behaviour_logp_N: Tensor, ratio_cap: float) -> Tensor:
    """min(p(a) / behaviour(a), ratio_cap) per token, [N], detached. These are truncated importance weights,
    applied per step as in arXiv 1802.01561.
    """
    return (logp_N - behaviour_logp_N).detach().exp().clamp(max=ratio_cap)


def outside(
    advantage_N: Tensor, logp_N: Tensor, behaviour_logp_N: Tensor, ratio: Ratio, clip: Clip, ratio_cap: float
) -> Tensor | None:
    """True where the bound of the ratio binds, [N]. None if the ratio has no bound. The arguments are those
    of `score_cost`.

    truncated: the bound binds where the ratio is above its cap (see `above_cap`). clip: the bound is
    one-sided (arXiv 1707.06347). It binds above 1 + clip[1] where the advantage is positive, and below 1 -
    clip[0] where the advantage is negative. Such a token has no gradient. On the other side the ratio is not
    bounded. A token with advantage 0 has no gradient, so the bound does not bind there.
    """
    if ratio == "none":
        return None
    if ratio == "truncated":
        return above_cap(logp_N, behaviour_logp_N, ratio_cap)
    log_ratio_N = (logp_N - behaviour_logp_N).detach()
    above_N, below_N = log_ratio_N > math.log1p(clip[1]), log_ratio_N < math.log1p(-clip[0])
    return (above_N & (advantage_N > 0)) | (below_N & (advantage_N < 0))


def above_cap(logp_N: Tensor, behaviour_logp_N: Tensor, ratio_cap: float) -> Tensor:
    """True where p(a) / behaviour(a) is above `ratio_cap`, [N], for any sign of the advantage. At these
    tokens the capped ratio makes the gradient estimate biased.
    """
    return (logp_N - behaviour_logp_N).detach() > math.log(ratio_cap)


def check_ratio(clip: Clip = (0.2, 0.2), ratio_cap: float = 1.0) -> None:
    if not (0 <= clip[0] < 1 and 0 <= clip[1] < math.inf):
        raise ValueError(
            "clip must be (below, above) with 0 <= below < 1 and above >= 0, such as [0.2, 0.28], got "
            f"{list(clip)}"
        )
    if not ratio_cap >= 1:
        raise ValueError(
            f"ratio_cap must be at least 1, got {ratio_cap}: a smaller cap scales down on-policy tokens too"
        )
