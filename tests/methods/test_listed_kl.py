"""The KL of two lists of tokens, against sums over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from reflux.loss.listed_kl import TAIL_FLOOR, listed_kl

V = 9


def drawn(seed: int, rows: int = 4) -> np.ndarray:
    """Random distributions, [rows, V]."""
    p_TV = np.random.default_rng(seed).exponential(size=(rows, V)) ** 2
    return p_TV / p_TV.sum(1, keepdims=True)


def listed(p_TV: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most likely tokens and their log-probs, as float32."""
    ids_TK = np.argsort(-p_TV, axis=1)[:, :k]
    return ids_TK, np.log(np.take_along_axis(p_TV, ids_TK, axis=1)).astype(np.float32)


def by_definition(p: np.ndarray, q: np.ndarray, shared: set[int]) -> float:
    """The KL of one position over the shared tokens and the bucket of all others."""
    cells = [(p[token], q[token]) for token in shared]
    others = [token for token in range(V) if token not in shared]
    cells.append((p[others].sum(), q[others].sum()))
    return sum(a * np.log(a / b) for a, b in cells if a > 0)


def events(p: np.ndarray, q: np.ndarray, one: set[int], other: set[int]) -> list[float]:
    """The bounds by the tokens of a single list, where the other model has at most its own tail."""
    p_only, q_only = sum(p[list(one - other)]), sum(q[list(other - one)])
    p_tail, q_tail = 1 - sum(p[list(one)]), 1 - sum(q[list(other)])
    found = []
    for a, b, holds in ((p_only, q_tail, p_only > q_tail), (p_tail, q_only, q_only > p_tail)):
        found.append(a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)) if holds and a > 0 else 0.0)
    return found


@pytest.mark.parametrize(("k", "other_k"), [(3, 3), (1, 4), (5, 2), (4, 8)])
def test_it_is_the_kl_over_the_shared_tokens_and_one_bucket(k: int, other_k: int) -> None:
    p_TV, q_TV = drawn(1), drawn(2)
    (ids, logp), (other_ids, other_logp) = listed(p_TV, k), listed(q_TV, other_k)
    found_T = listed_kl(ids, logp, other_ids, other_logp)
    for t in range(len(p_TV)):
        one, other = set(ids[t].tolist()), set(other_ids[t].tolist())
        coarse = by_definition(p_TV[t], q_TV[t], one & other)
        assert found_T[t] == pytest.approx(max(coarse, *events(p_TV[t], q_TV[t], one, other)), abs=2e-6)
    exact_T = (p_TV * np.log(p_TV / q_TV)).sum(1)
    assert (found_T <= exact_T + 1e-6).all()
    assert (found_T >= 0).all()
    assert found_T.dtype == np.float64


def test_lists_of_all_tokens_give_the_exact_kl_in_any_order() -> None:
    p_TV, q_TV = drawn(3), drawn(4)
    (ids, logp), (other_ids, other_logp) = listed(p_TV, V), listed(q_TV, V)
    exact_T = (p_TV * np.log(p_TV / q_TV)).sum(1)
    np.testing.assert_allclose(listed_kl(ids, logp, other_ids, other_logp), exact_T, atol=2e-6)
    order = np.random.default_rng(0).permutation(V)
    np.testing.assert_allclose(
        listed_kl(ids[:, order], logp[:, order], other_ids, other_logp), exact_T, atol=2e-6
    )


def test_equal_lists_are_at_distance_0_and_a_token_that_q_excludes_at_infinity() -> None:
    ids, logp = listed(drawn(5), 4)
    assert (listed_kl(ids, logp, ids, logp) == 0).all()
    excluded = logp.copy()
    excluded[0, 1] = -np.inf
    assert np.isinf(listed_kl(ids, logp, ids, excluded)[0])
    # p excludes it: only the mass of q counts
    back = listed_kl(ids, excluded, ids, logp)
    assert np.isfinite(back).all()
    assert back[0] > 0


def test_rounding_of_a_full_list_is_no_tail() -> None:
    p = np.log(np.full((1, V), 1 / V, dtype=np.float32) * np.float32(1 - 3e-8))
    ids = np.arange(V)[None]
    assert abs(listed_kl(ids, p, ids, np.log(np.full((1, V), 1 / V, np.float32)))[0]) < 2 * TAIL_FLOOR


def test_lists_that_share_no_token_are_far_apart_and_no_position_is_no_number() -> None:
    ids = np.array([[0, 1]])
    logp = np.log(np.array([[0.6, 0.3]], dtype=np.float32))
    # q has at most 0.1 where p has 0.9
    assert listed_kl(ids, logp, ids + 5, logp)[0] == pytest.approx(
        0.9 * np.log(9) + 0.1 * np.log(1 / 9), abs=1e-6
    )
    flat = np.log(np.array([[0.02, 0.01]], dtype=np.float32))
    assert listed_kl(ids, flat, ids + 5, flat)[0] < 1e-9
    assert listed_kl(ids[:0], logp[:0], ids[:0], logp[:0]).shape == (0,)
