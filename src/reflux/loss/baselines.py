"""Values of a prefix that are subtracted from a sampled advantage. They do not change the expected gradient
and usually lower its variance (vOPD, arXiv 2605.07865).

Any number that does not depend on the sampled token keeps the estimator unbiased. Under student p and
teacher q the reward r(a) = log q(a) - log p(a) has the value E_p[r] = -KL(p || q), which is known without a
critic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reflux.loss.divergences import kl


@torch.no_grad()
def kl_value(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """-KL(p || q), nats [N], <= 0, detached. -inf where the teacher gives probability 0 to a token that the
    student may sample.
    """
    # Without the clamp, rounding could make the value positive.
    return -kl(student_logp_NV, teacher_logp_NV).clamp_min(0)


@torch.no_grad()
def topk_kl_value(student_logp_NV: Tensor, teacher_logp_NV: Tensor, k: int) -> Tensor:
    """-KL(p_S || q_S), nats [N], <= 0, detached. S is the set of the student's k most likely tokens, and
    each model is renormalised by its own mass on S.

    The sampled token is never added to S, because a baseline must not depend on it. k >= V gives exactly
    `kl_value`; k = 1 gives 0 (plain sampled distillation). ValueError for k < 1. The renormalisation
    follows the paper and its code; the partial sum over S without it is a different number.
    """
    if k < 1:
        raise ValueError(f"the top-k baseline needs k >= 1, got {k}")
    if k >= student_logp_NV.shape[-1]:
        return kl_value(student_logp_NV, teacher_logp_NV)
    top = student_logp_NV.topk(k, dim=-1, sorted=False)
    return kl_value(top.values.log_softmax(-1), teacher_logp_NV.gather(-1, top.indices).log_softmax(-1))


@torch.no_grad()
def minimum_variance_value(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """b* = E_p[r w] / E_p[w], nats [N], detached, of either sign, with r = log q - log p. Of all values
    that depend on the prefix alone, it gives the sampled logit gradient (r(a) - value) (e_a - p) the least
    total variance (`gradient_variance`).

    w(a) = |e_a - p|^2 = 1 - 2 p(a) + sum p^2, so E_p[w] = 1 - sum p^2 = E_p[1 - p(a)] and w(a) = 2 (1 -
    p(a)) - E_p[w]. The sum uses this last form, so no digits are lost when the student is nearly certain.
    The value is 0 where E_p[w] vanishes (one token has all the mass, so the gradient has no noise). Tokens
    with p = 0 contribute nothing. A token with q = 0 and p > 0 makes the value -inf, as in `kl_value`. The
    variance is least in the student's LOGITS at one prefix. Parameters share logits, so it need not be
    least for a whole model. arXiv 1301.2315; Greensmith, Bartlett, Baxter 2004.
    """
    # p, 1 - p
    p_NV, rest_NV = student_logp_NV.exp(), -student_logp_NV.expm1()
    mean_N1 = (p_NV * rest_NV).sum(-1, keepdim=True)
    # p w. The clamp is needed because w of a nearly certain token may round below 0.
    weight_NV = p_NV * (2 * rest_NV - mean_N1).clamp_min(torch.finfo(p_NV.dtype).tiny)
    r_NV = (teacher_logp_NV - student_logp_NV).masked_fill_(weight_NV == 0, 0)
    mean_N = mean_N1[:, 0]
    return ((weight_NV * r_NV).sum(-1) / mean_N).masked_fill_(mean_N <= 0, 0)


@torch.no_grad()
def gradient_variance(student_logp_NV: Tensor, teacher_logp_NV: Tensor, value_N: Tensor | float) -> Tensor:
    """Exact total variance [N] of one sampled logit gradient (r(a) - value) (e_a - p), over a ~ p.

    E_p[(r - value)^2 w] - |E_p[r (e_a - p)]|^2 with w(a) = |e_a - p|^2 = 1 - 2 p(a) + sum p^2. Tokens with
    p = 0 contribute nothing.
    """
    p_NV = student_logp_NV.exp()
    r_NV = (teacher_logp_NV - student_logp_NV).masked_fill_(p_NV == 0, 0)
    w_NV = 1 - 2 * p_NV + p_NV.square().sum(-1, keepdim=True)
    mean_NV = p_NV * (r_NV - (p_NV * r_NV).sum(-1, keepdim=True))
    value_N1 = torch.as_tensor(value_N, dtype=p_NV.dtype, device=p_NV.device).reshape(-1, 1)
    return (p_NV * w_NV * (r_NV - value_N1).square()).sum(-1) - mean_NV.square().sum(-1)


def variance_ratio(student_logp_NV: Tensor, teacher_logp_NV: Tensor, value_N: Tensor | float) -> float:
    """sum_n Var_n(value_n) / sum_n Var_n(0). Below 1 the baseline lowers the variance on these rows. 1.0
    where the variance without a baseline is 0.
    """
    without = float(gradient_variance(student_logp_NV, teacher_logp_NV, 0.0).sum())
    return (
        float(gradient_variance(student_logp_NV, teacher_logp_NV, value_N).sum()) / without
        if without
        else 1.0
    )
