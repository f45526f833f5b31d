"""Divergences between two rows of log-probs, and the tail bucket that completes K listed ids to a whole
distribution.

`student` and `teacher` are log-probs [N, V]; each row's probabilities sum to 1. Results are nats [N]. All are
>= 0 and are 0 where the two agree. A token of probability 0 contributes 0 with a zero gradient. KL(p || q) is
+inf, its true value, where q gives probability 0 to a token to which p gives more than 0. `jsd`, the skewed
forms, `alpha_divergence` and `total_variation` stay finite there (alpha strictly inside (0, 1)). NaN inputs
give NaN. ValueError for shapes that differ or are not 2-D, for V = 0, and for a beta or alpha outside [0, 1].

References: JSD as in GKD (arXiv 2306.13649), skewed KL as in DistiLLM (arXiv 2402.03898).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reflux.loss.gradients import KL, Mixture, Tail


def kl(p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
    """sum_v p (log p - log q), nats [N], differentiable in both arguments."""
    _check(p_logp_NV, q_logp_NV)
    return KL.apply(p_logp_NV, q_logp_NV)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): mode-seeking. Its gradient in student logits is p (log p - log q - KL)."""
    return kl(student, teacher)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student): mass-covering. Its gradient in student logits is p - q."""
    return kl(teacher, student)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = (1 - beta) student + beta teacher; at
    most the binary entropy of beta.

    The formula is not continuous at the ends. Towards beta = 0 and beta = 1 the value of the formula vanishes
    (jsd / beta tends to the forward KL, jsd / (1 - beta) to the reverse). So beta = 0 is defined to be
    exactly `forward_kl` and beta = 1 exactly `reverse_kl`, as in GKD.
    """
    _check(student, teacher)
    _check_share("beta", beta)
    if beta in (0.0, 1.0):
        return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
    m = Mixture.apply(student, teacher, beta)
    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(student || (1 - alpha) teacher + alpha student), nats [N], from log-probs [N, V]. It is at most
    -log(alpha). With alpha = 0 it equals the reverse KL. With alpha = 1 it is 0.
    """
    return kl(student, _mix(teacher, student, "alpha", alpha))


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student), nats [N], from log-probs [N, V]. It is at most
    -log(alpha). With alpha = 0 it equals the forward KL. With alpha = 1 it is 0.
    """
    return kl(teacher, _mix(student, teacher, "alpha", alpha))


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)); exactly `reverse_kl` at alpha = 1 and
    `forward_kl` at alpha = 0, its limits.

    It is summed as alpha p + (1 - alpha) q - p^alpha q^(1 - alpha) >= 0 per token, which has the same sum
    for probabilities. This form is exactly 0 where the two agree and does not lose a small divergence to
    rounding in 1 - sum. This is Amari's family, except for the name of the parameter.
    """
    _check(student, teacher)
    _check_share("alpha", alpha)
    if alpha in (0.0, 1.0):
        return reverse_kl(student, teacher) if alpha else forward_kl(student, teacher)
    larger = torch.maximum(student, teacher)
    gap = (student - teacher).masked_fill(larger == -torch.inf, 0)
    weight = torch.full_like(gap, 1 - alpha).masked_fill_(gap < 0, alpha)
    drop = -gap.abs()
    terms = larger.exp() * (weight * drop.expm1() - (weight * drop).expm1())
    return terms.sum(-1) / (alpha * (1 - alpha))


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """1/2 sum |p - q|, in [0, 1] (not nats). Its gradient is 0 where the two agree exactly, but the gradient
    does not become small near such a point.
    """
    _check(student, teacher)
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd": jsd,
    "skew_reverse": skew_reverse_kl,
    "skew_forward": skew_forward_kl,
    "alpha": alpha_divergence,
    "tv": total_variation,
}


def with_tail(
    logp_NV: Tensor, ids_NK: Tensor, check: bool = True, repeated_NK: Tensor | None = None
) -> Tensor:
    """The log-probs at K listed ids and, last, of ONE bucket with all remaining mass: [N, K + 1]. The
    probabilities sum to 1.

    The bucket is the logsumexp over the ids that are not listed (exact, not 1 minus a sum), -inf at K = V.
    repeated_NK (from `union`) is True at every entry whose id already stands in the row; these entries get
    probability 0, so that no mass counts twice. ValueError for an id outside 0..V-1, for a repeated id that
    is not marked so, and for a marked id that stands nowhere else in its row (its mass would be lost).
    `check = False` skips this check (and its GPU synchronisation) for ids that come from a top-k.
    """
    return torch.cat([_listed(logp_NV, ids_NK, check, repeated_NK), Tail.apply(logp_NV, ids_NK)], dim=-1)


def renormalised(
    logp_NV: Tensor, ids_NK: Tensor, check: bool = True, repeated_NK: Tensor | None = None
) -> Tensor:
    """The log-probs at K listed ids [N, K], normalised over the list; the mass outside the list is dropped.
    The arguments are those of `with_tail`.

    This is not a bound of the full divergence, and its optimum is a different one. Two models that agree on
    the list up to a factor have cost 0, however much mass they give to other tokens. NaN where a model
    gives the whole list no mass.
    """
    return _listed(logp_NV, ids_NK, check, repeated_NK).log_softmax(-1)


def union(ids_NK: Tensor, others_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Two lists of ids combined: ids [N, 2K] in rising order, and True [N, 2K] at every entry whose id
    already stands in the row.
    """
    ids_NM = torch.cat([ids_NK, others_NK], dim=-1).sort(dim=-1).values
    repeated_NM = torch.zeros_like(ids_NM, dtype=torch.bool)
    repeated_NM[:, 1:] = ids_NM[:, 1:] == ids_NM[:, :-1]
    return ids_NM, repeated_NM


def _listed(logp_NV: Tensor, ids_NK: Tensor, check: bool, repeated_NK: Tensor | None) -> Tensor:
    if logp_NV.ndim != 2 or ids_NK.ndim != 2 or len(logp_NV) != len(ids_NK) or logp_NV.shape[1] == 0:
        raise ValueError(
            f"listed ids [N, K] need log-probs [N, V] with V > 0, got {_shapes(logp_NV, ids_NK)}"
        )
    if repeated_NK is not None and repeated_NK.shape != ids_NK.shape:
        raise ValueError(
            f"marks of repeated ids need the shape of the ids, got {_shapes(ids_NK, repeated_NK)}"
        )
    if check and ids_NK.numel():
        _check_ids(ids_NK, logp_NV.shape[1], repeated_NK)
    logp_NK = logp_NV.gather(-1, ids_NK)
    return logp_NK if repeated_NK is None else logp_NK.masked_fill(repeated_NK, -torch.inf)


def with_tail_listed(logp_NK: Tensor, floor: float = 1e-7) -> Tensor:
    """The same [N, K + 1] as `with_tail`, from the K listed log-probs alone. The bucket is log(1 - sum
    exp(logp)), with a mass of at least `floor`.

    A stored TopKTarget has only these log-probs, so its exact bucket is not known. The floor prevents an
    empty or negative tail from rounding. A list of the whole vocabulary has no tail and should be compared
    without one.
    """
    if logp_NK.ndim != 2:
        raise ValueError(f"with_tail_listed needs log-probs [N, K], got {_shapes(logp_NK)}")
    if not 0 < floor < 1:
        raise ValueError(f"the floor of the tail's mass must lie between 0 and 1, got {floor}")
    mass_N1 = -logp_NK.logsumexp(-1, keepdim=True).expm1()
    return torch.cat([logp_NK, mass_N1.clamp_min(floor).log()], dim=-1)


def _mix(a: Tensor, b: Tensor, name: str, share: float) -> Tensor:
    """log((1 - share) a + share b) for log-probs of a and b, exact at share 0 and 1."""
    _check(a, b)
    _check_share(name, share)
    if share in (0.0, 1.0):
        return b if share else a
    return Mixture.apply(a, b, share)


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] == 0:
        raise ValueError(
            "a divergence needs two matrices of log-probs [N, V] of one shape with V > 0, got "
            f"{_shapes(student, teacher)}"
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1 or math.isnan(value):
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _check_ids(ids_NK: Tensor, vocabulary: int, repeated_NK: Tensor | None) -> None:
    marks_NK = torch.zeros_like(ids_NK) if repeated_NK is None else repeated_NK.to(ids_NK.dtype)
    # After the sort, equal ids are adjacent, and those without a mark come first.
    keys_NK = (2 * ids_NK + marks_NK).sort(-1).values
    sorted_NK, marked_NK = keys_NK.div(2, rounding_mode="floor"), keys_NK.remainder(2).bool()
    first_NK = torch.ones_like(marked_NK)
    first_NK[:, 1:] = sorted_NK[:, 1:] != sorted_NK[:, :-1]
    outside = (sorted_NK[:, 0] < 0).any() | (sorted_NK[:, -1] >= vocabulary).any()
    twice, lost = (~first_NK & ~marked_NK).any(), (first_NK & marked_NK).any()
    if outside | twice | lost:
        # The condition above is the only GPU synchronisation of this function unless it raises.
        what = (
            f"lie in 0..{vocabulary - 1}"
            if outside
            else "not repeat within a row without a mark: the mass would count twice"
        )
        raise ValueError(
            "the listed ids must "
            f"{what if outside | twice else 'stand in the row once without a mark: the mass would be lost'}"
        )


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)
