"""The gradient of raw logits from the derivatives of a loss by the leaves of a `FusedStudent`.

Each leaf is a function of the logits whose derivative is known: a divergence, the log-prob of the sampled
token, log-probs at listed ids with or without a tail. One launch writes the sum of them over the vocabulary.
The listed ids are then overwritten with their exact values, from matrices [N, K]. If an objective read the
whole matrix `logp_NV`, its part is added by torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reflux.kernels.raw_table import RawTable
from reflux.kernels.triton_rows import Coefs, write_gradient
from reflux.loss.fused_outputs import Cost, FusedStudent, Listed


@dataclass
class _Derivatives:
    """The derivatives of the loss by the leaves of a student, float32. None: 0."""

    costs: list[tuple[Cost, Tensor]]
    lists: list[tuple[Listed, Tensor]]
    token_N: Tensor | None
    logp_NV: Tensor | None

    @property
    def logps_N(self) -> Tensor | None:
        """By all log-probs of single tokens and of tails together."""
        parts = [coef_NM.sum(-1) for _, coef_NM in self.lists]
        parts += [] if self.token_N is None else [self.token_N]
        return torch.stack(parts).sum(0) if parts else None

    @property
    def tails(self) -> list[tuple[Tensor, Tensor]]:
        """The derivative by the tail, and the logsumexp of the tail, of each list with one."""
        return [
            (coef_NM[:, -1], listed.rest_N) for listed, coef_NM in self.lists if listed.rest_N is not None
        ]


@torch.no_grad()
def write(student: FusedStudent, loss: Tensor, d_NV: Tensor, silent_N: Tensor | None = None) -> None:
    """Write the gradient of `loss` by the raw logits of the student into d_NV. silent_N: True at the rows
    whose gradient is exactly 0, whatever their cost is.
    """
    made = _derivatives(student, loss, silent_N)
    raw, ids_N, plain = student.table, student.ids_N, student.any_sums
    # One launch for the first divergence, the first tail and everything else; one for each further one.
    costs, tails = list(made.costs), list(made.tails)
    for turn in range(max(1, len(costs), len(tails))):
        cost, coef_N = costs[turn] if turn < len(costs) else (None, None)
        tail_N, rest_N = tails[turn] if turn < len(tails) else (None, None)
        teacher, sums = (raw, plain) if cost is None else (cost.teacher, cost.sums)
        alone = (made.token_N, made.logps_N) if not turn else (None, None)
        write_gradient(d_NV, raw, teacher, ids_N, sums, Coefs(coef_N, *alone, tail_N), rest_N, add=turn > 0)
    for listed, _ in made.lists:
        d_NV.scatter_(-1, listed.ids_NK, _at_list(student, made, listed.ids_NK).to(d_NV.dtype))
    if made.logp_NV is not None:
        p_NV = student.logp_NV.exp()
        whole_NV = made.logp_NV - p_NV * made.logp_NV.sum(-1, keepdim=True)
        whole_NV *= _finish_slope(raw, student.logits_NV)
        d_NV += whole_NV if silent_N is None else whole_NV.masked_fill(silent_N[:, None], 0)


def _derivatives(student: FusedStudent, loss: Tensor, silent_N: Tensor | None) -> _Derivatives:
    token, whole = (vars(student).get(name) for name in ("logp_N", "logp_NV"))
    leaves = [cost.leaf_N for cost in student.costs] + [listed.leaf_NK for listed in student.lists]
    leaves += [leaf for leaf in (token, whole) if leaf is not None]
    made = (
        torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    )
    by_leaf = dict(zip(map(id, leaves), made, strict=True))

    def of(leaf: Tensor | None) -> Tensor | None:
        coef = by_leaf.get(id(leaf))
        if coef is None or silent_N is None:
            return coef
        return coef.masked_fill(silent_N if coef.ndim == 1 else silent_N[:, None], 0)

    costs = [(cost, coef_N) for cost in student.costs if (coef_N := of(cost.leaf_N)) is not None]
    lists = [
        (listed, _without_empty_tail(listed, coef_NK))
        for listed in student.lists
        if (coef_NK := of(listed.leaf_NK)) is not None
    ]
    return _Derivatives(costs, lists, of(token), of(whole))


def _without_empty_tail(listed: Listed, coef_NK: Tensor) -> Tensor:
    """An empty tail is -inf for all logits, so it has no gradient."""
    if listed.rest_N is None:
        return coef_NK
    tail_N = coef_NK[:, -1].masked_fill(listed.rest_N == -torch.inf, 0)
    return torch.cat([coef_NK[:, :-1], tail_N[:, None]], dim=-1)


def _at_list(student: FusedStudent, made: _Derivatives, ids_NK: Tensor) -> Tensor:
    """The whole gradient at the ids of one list, [N, K], float32."""
    logits_NK = student.table.logits_at(ids_NK)
    logp_NK = logits_NK - student.any_sums["student_lse"][:, None]
    # by the log-probs of just these tokens
    own_NK = torch.zeros_like(logp_NK)
    d_NK = torch.zeros_like(logp_NK)
    if made.token_N is not None:
        own_NK += (ids_NK == student.ids_N[:, None]) * made.token_N[:, None]
    for listed, coef_NM in made.lists:
        if listed.ids_NK is ids_NK:
            # None of these tokens is in the tail of their own list.
            own_NK += coef_NM[:, : ids_NK.shape[1]]
            continue
        coef_NK, found_NK = _at_other_list(ids_NK, listed.ids_NK, coef_NM)
        own_NK += coef_NK
        if listed.rest_N is not None:
            tail_NK = coef_NM[:, -1:] * (logits_NK - listed.rest_N[:, None]).exp()
            d_NK += tail_NK.masked_fill(found_NK | (coef_NM[:, -1:] == 0), 0)
    others_NK = made.logps_N[:, None] - own_NK if made.logps_N is not None else -own_NK
    # In float32, because 1 - p must not be rounded to bfloat16 first.
    d_NK -= (own_NK * logp_NK.expm1()).masked_fill_(own_NK == 0, 0)
    d_NK -= (others_NK * logp_NK.exp()).masked_fill_(others_NK == 0, 0)
    d_NK *= _finish_slope(student.table, logits_NK)
    for cost, coef_N in made.costs:
        few, other = (
            RawTable(one.raw_NV.gather(-1, ids_NK), one.head) for one in (student.table, cost.teacher)
        )
        write_gradient(d_NK, few, other, student.ids_N, cost.sums, Coefs(coef_N), add=True)
    return d_NK


def _at_other_list(ids_NK: Tensor, others_NJ: Tensor, coef_NM: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of another list's tokens at some ids [N, K], 0 where an id is not in that list, and
    True where it is. By sorting, because a matrix [N, K, J] of all pairs may exceed the memory.
    """
    sorted_NJ, order_NJ = others_NJ.sort(-1)
    place_NK = torch.searchsorted(sorted_NJ, ids_NK.contiguous()).clamp_(max=others_NJ.shape[1] - 1)
    found_NK = sorted_NJ.gather(-1, place_NK) == ids_NK
    return coef_NM.gather(-1, order_NJ.gather(-1, place_NK)).masked_fill(~found_NK, 0), found_NK


def _finish_slope(table: RawTable, logits: Tensor) -> Tensor | float:
    """The derivative of the logits by the raw logits."""
    scale, cap = table.head.scale, table.head.cap
    return scale if cap is None else scale * (1 - (logits / cap).square())
