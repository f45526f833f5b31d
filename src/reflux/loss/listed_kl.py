"""The KL of two models that are known at lists of tokens."""

from __future__ import annotations

import numpy as np

# Least mass of the tokens outside a list. Below it the difference 1 - sum is rounding of float32.
TAIL_FLOOR = 1e-7


def listed_kl(
    ids_TK: np.ndarray, logp_TK: np.ndarray, other_ids_TK: np.ndarray, other_logp_TK: np.ndarray
) -> np.ndarray:
    """A lower bound of KL(p || q) at each position in nats, float64, [T]: the largest of three. First, the KL
    over the tokens that are in both lists and ONE bucket with all remaining mass; it is exact where the lists
    hold all tokens. Second, the KL of one event: the tokens that only the list of p has, of which q has at
    most the mass outside its own list. Third, likewise for the tokens that only the list of q has.

    ids_TK, logp_TK: the list of p; the other two: the list of q, of any length. A list names a token once.
    Computed as the sum of p log(p / q) - p + q, of which no term is negative. Infinite where q is 0 and p is
    not.
    """
    places_TK, shared_TK = _places(ids_TK, other_ids_TK)
    found_TK = np.take_along_axis(other_logp_TK, places_TK, axis=1)
    p_TK = np.where(shared_TK, np.exp(logp_TK, dtype=np.float64), 0.0)
    q_TK = np.where(shared_TK, np.exp(found_TK, dtype=np.float64), 0.0)
    p_T, q_T = (np.maximum(1 - mass_TK.sum(1), TAIL_FLOOR) for mass_TK in (p_TK, q_TK))
    # the mass outside each whole list, and inside of it but outside the other list
    p_tail_T, q_tail_T = (
        np.maximum(1 - np.exp(logp, dtype=np.float64).sum(1), TAIL_FLOOR) for logp in (logp_TK, other_logp_TK)
    )
    p_only_T, q_only_T = p_T - p_tail_T, q_T - q_tail_T
    coarse_T = _terms(p_TK, q_TK).sum(1) + _terms(p_T, q_T)
    of_p_T = np.where(p_only_T > q_tail_T, _binary(p_only_T, q_tail_T), 0.0)
    of_q_T = np.where(q_only_T > p_tail_T, _binary(p_tail_T, q_only_T), 0.0)
    return np.maximum(coarse_T, np.maximum(of_p_T, of_q_T))


def _binary(p_T: np.ndarray, q_T: np.ndarray) -> np.ndarray:
    """The KL of an event of mass p from the same event of mass q."""
    p_T, q_T = (np.clip(mass_T, 0.0, 1.0) for mass_T in (p_T, q_T))
    return _terms(p_T, q_T) + _terms(1 - p_T, np.maximum(1 - q_T, TAIL_FLOOR))


def _places(ids_TK: np.ndarray, other_ids_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The column of each id in the other list of its row, [T, K], and True where that list has the id."""
    order_TK = np.argsort(other_ids_TK, axis=1)
    # Rows are kept apart by an offset, so that one search finds the ids of all rows.
    offset_T1 = np.arange(len(ids_TK))[:, None] * (
        1 + max(ids.max(initial=0) for ids in (ids_TK, other_ids_TK))
    )
    sorted_N = (np.take_along_axis(other_ids_TK, order_TK, axis=1) + offset_T1).ravel()
    wanted_TK = ids_TK + offset_T1
    found_TK = np.searchsorted(sorted_N, wanted_TK).clip(max=max(0, sorted_N.size - 1))
    return order_TK.ravel()[found_TK], sorted_N[found_TK] == wanted_TK


def _terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0) - p + q
