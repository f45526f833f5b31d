"""Divergences and tail buckets against scipy, written from the definitions, in float64; then their identities
and edges.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, rel_entr

from reflux.loss.divergences import (
    DIVERGENCES,
    alpha_divergence,
    forward_kl,
    jsd,
    kl,
    renormalised,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
    union,
    with_tail,
    with_tail_listed,
)
from reflux.objectives.divergence import MIXED

INF = math.inf
WEIGHTS = (0.0, 0.03, 0.3, 0.5, 0.9, 1.0)


def reference(name: str, p: np.ndarray, q: np.ndarray, weight: float) -> np.ndarray:
    """The method page's formulas over probabilities [N, V]; rel_entr(a, b) = a log(a / b), 0 log 0 = 0."""

    def kl_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return rel_entr(a, b).sum(-1)

    if name == "jsd" and weight in (0, 1):
        return kl_of(p, q) if weight else kl_of(q, p)
    if name == "alpha" and weight in (0, 1):
        return kl_of(p, q) if weight else kl_of(q, p)
    m = (1 - weight) * p + weight * q
    return {
        "reverse": lambda: kl_of(p, q),
        "forward": lambda: kl_of(q, p),
        "jsd": lambda: weight * kl_of(q, m) + (1 - weight) * kl_of(p, m),
        "skew_reverse": lambda: kl_of(p, (1 - weight) * q + weight * p),
        "skew_forward": lambda: kl_of(q, weight * q + (1 - weight) * p),
        "alpha": lambda: (1 - (p**weight * q ** (1 - weight)).sum(-1)) / (weight * (1 - weight)),
        "tv": lambda: 0.5 * np.abs(p - q).sum(-1),
    }[name]()


def table(n: int, v: int, seed: int, spread: float, zeros: float = 0.0) -> torch.Tensor:
    """Random normalised log-probs; a share `zeros` of the entries is -inf, never a whole row."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((n, v))
    gone = rng.random((n, v)) < zeros
    gone[:, rng.integers(v)] = False
    return torch.tensor(np.where(gone, -INF, logits)).log_softmax(-1)


def call(name: str, student: torch.Tensor, teacher: torch.Tensor, weight: float) -> torch.Tensor:
    return (
        DIVERGENCES[name](student, teacher, weight) if name in MIXED else DIVERGENCES[name](student, teacher)
    )


shapes = {
    "n": st.integers(0, 4),
    "v": st.integers(1, 9),
    "seed": st.integers(0, 10**6),
    "spread": st.sampled_from([0.1, 1.0, 6.0]),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@given(**shapes, weight=st.sampled_from(WEIGHTS), zeros=st.sampled_from([0.0, 0.4]))
def test_divergences_follow_their_definition(name, n, v, seed, spread, weight, zeros):
    student, teacher = table(n, v, seed, spread, zeros), table(n, v, seed + 1, spread, zeros)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = reference(name, student.exp().numpy(), teacher.exp().numpy(), weight)
    np.testing.assert_allclose(call(name, student, teacher, weight).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(**shapes, weight=st.sampled_from(WEIGHTS), zeros=st.sampled_from([0.0, 0.4]))
def test_gradients_are_finite_wherever_the_cost_is_and_zero_where_p_is_zero(
    name, n, v, seed, spread, weight, zeros
):
    student, teacher = table(n, v, seed, spread, zeros).requires_grad_(), table(n, v, seed + 1, spread, zeros)
    cost = call(name, student, teacher, weight)
    if not cost.requires_grad:
        assert weight == 1.0
        assert name == "skew_forward"
        return
    finite = cost.isfinite()
    (gradient,) = torch.autograd.grad(cost[finite].sum(), student)
    assert gradient[finite].isfinite().all()
    absent = finite[:, None] & (student == -INF)
    assert (gradient[absent] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradients_in_logits_match_finite_differences(name, weight):
    teacher = table(3, 5, 1, 1.0)
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.manual_seed(3), requires_grad=True)
    if not (weight == 1.0 and name == "skew_forward"):
        assert torch.autograd.gradcheck(lambda x: call(name, x.log_softmax(-1), teacher, weight), logits)
        assert (
            torch.autograd.gradcheck(lambda x: call(name, teacher, x.log_softmax(-1), weight), logits)
            or weight == 1.0
        )


def test_kl_gradients_hold_for_unnormalised_log_probs_too():
    p, q = (
        torch.randn(3, 4, dtype=torch.float64, generator=torch.manual_seed(s), requires_grad=True)
        for s in (0, 1)
    )
    assert torch.autograd.gradcheck(kl, (p, q))


def test_full_kl_logit_gradient_is_p_times_centred_log_ratio():
    logits, teacher = (
        torch.randn(4, 7, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True),
        table(4, 7, 1, 2.0),
    )
    student = logits.log_softmax(-1)
    cost = reverse_kl(student, teacher)
    (gradient,) = torch.autograd.grad(cost.sum(), logits)
    torch.testing.assert_close(
        gradient, (student.exp() * (student - teacher - cost[:, None])).detach(), rtol=1e-10, atol=1e-12
    )


@given(**shapes, weight=st.floats(0.01, 0.99))
def test_bounds_and_symmetries(n, v, seed, spread, weight):
    s, t = table(n, v, seed, spread, 0.3), table(n, v, seed + 1, spread, 0.3)
    assert all((call(name, s, t, weight) >= -1e-12).all() for name in DIVERGENCES)
    torch.testing.assert_close(jsd(s, t, weight), jsd(t, s, 1 - weight), rtol=1e-9, atol=1e-12)
    entropy = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
    assert (jsd(s, t, weight) <= entropy + 1e-12).all()
    assert (skew_reverse_kl(s, t, weight) <= -math.log(weight) + 1e-12).all()
    assert (skew_forward_kl(s, t, weight) <= -math.log(weight) + 1e-12).all()
    assert (total_variation(s, t) <= 1 + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_cost_zero_to_the_bit(name, dtype):
    s = table(5, 50, 0, 3.0, 0.2).to(dtype)
    assert all((call(name, s, s.clone(), weight) == 0).all() for weight in WEIGHTS)


def test_jsd_ends_are_the_plain_kls_exactly_and_jump():
    s, t = table(3, 6, 0, 1.0), table(3, 6, 1, 1.0)
    assert torch.equal(jsd(s, t, 0.0), forward_kl(s, t))
    assert torch.equal(jsd(s, t, 1.0), reverse_kl(s, t))
    assert torch.equal(alpha_divergence(s, t, 0.0), forward_kl(s, t))
    assert torch.equal(alpha_divergence(s, t, 1.0), reverse_kl(s, t))
    assert torch.equal(skew_reverse_kl(s, t, 0.0), reverse_kl(s, t))
    assert torch.equal(skew_forward_kl(s, t, 0.0), forward_kl(s, t))
    torch.testing.assert_close(jsd(s, t, 1e-7) / 1e-7, forward_kl(s, t), rtol=1e-5, atol=0)
    torch.testing.assert_close(jsd(s, t, 1 - 1e-7) / 1e-7, reverse_kl(s, t), rtol=1e-5, atol=0)
    torch.testing.assert_close(alpha_divergence(s, t, 1e-6), forward_kl(s, t), rtol=1e-4, atol=0)
    torch.testing.assert_close(alpha_divergence(s, t, 1 - 1e-6), reverse_kl(s, t), rtol=1e-4, atol=0)


def test_default_weights_are_the_vetted_ones():
    s, t = table(3, 6, 0, 1.0), table(3, 6, 1, 1.0)
    for name, weight in (("jsd", 0.5), ("skew_reverse", 0.1), ("skew_forward", 0.1), ("alpha", 0.5)):
        assert torch.equal(DIVERGENCES[name](s, t), DIVERGENCES[name](s, t, weight))


def test_disjoint_supports_are_infinite_for_the_kl_and_finite_for_mixtures():
    s, t = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    assert reverse_kl(s, t).item() == INF
    assert forward_kl(s, t).item() == INF
    assert jsd(s, t).item() == pytest.approx(math.log(2))
    assert skew_reverse_kl(s, t).item() == pytest.approx(-math.log(0.1))
    assert alpha_divergence(s, t, 0.3).item() == pytest.approx(1 / 0.21)
    assert total_variation(s, t).item() == 1


def test_a_probability_that_underflows_counts_as_zero_and_nan_is_passed_on():
    s, t = torch.tensor([[0.0, -300.0]], requires_grad=True), torch.tensor([[0.0, -INF]])
    cost = reverse_kl(s, t)
    assert cost.item() == 0
    assert torch.autograd.grad(cost.sum(), s)[0].isfinite().all()
    assert all(call(name, torch.full((1, 2), math.nan), t, 0.5).isnan().all() for name in DIVERGENCES)


def test_small_alpha_divergence_keeps_its_digits_in_float32():
    s, t = table(4, 50, 0, 1.0), table(4, 50, 1, 1.0)
    near = torch.lerp(s, t, 1e-3).log_softmax(-1)
    exact = alpha_divergence(s, near, 0.01)
    torch.testing.assert_close(
        alpha_divergence(s.float(), near.float(), 0.01).double(), exact, rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_do_not_depend_on_each_other(name):
    s, t = table(6, 9, 0, 2.0), table(6, 9, 1, 2.0)
    parts = torch.cat(
        [DIVERGENCES[name](a, b) for a, b in zip(s.split([1, 3, 2]), t.split([1, 3, 2]), strict=True)]
    )
    torch.testing.assert_close(parts, DIVERGENCES[name](s, t), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bad_shapes_and_weights_are_refused(name):
    good = torch.zeros(2, 1)
    for student, teacher in (
        (good, torch.zeros(2, 2)),
        (good[0], good[0]),
        (torch.zeros(2, 0), torch.zeros(2, 0)),
        (good, torch.zeros(1, 1)),
    ):
        with pytest.raises(ValueError, match="shape"):
            DIVERGENCES[name](student, teacher)
    for weight in (-0.1, 1.1, math.nan) if name in MIXED else ():
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            DIVERGENCES[name](good, good, weight)


# --------------------------------------------------------------------------------------------------
# tail buckets


@given(
    n=st.integers(0, 4),
    v=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1.0, 30.0]),
    data=st.data(),
)
def test_with_tail_is_the_definition_and_sums_to_one(n, v, seed, spread, data):
    k = data.draw(st.integers(0, v))
    logp, rng = table(n, v, seed, spread, 0.2), np.random.default_rng(seed)
    ids = np.array([rng.permutation(v)[:k] for _ in range(n)], dtype=np.int64).reshape(n, k)
    made = with_tail(logp, torch.tensor(ids)).numpy()
    assert made.shape == (n, k + 1)
    for row, listed, source in zip(made, ids, logp.numpy(), strict=True):
        rest = np.delete(source, listed)
        with np.errstate(divide="ignore"):
            tail = logsumexp(rest) if len(rest) else -INF
        np.testing.assert_allclose(row, [*source[listed], tail], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.exp(made).sum(-1), 1, rtol=1e-12)


def test_bucketed_divergence_never_exceeds_the_full_one_and_grows_with_ids():
    s, t = table(20, 8, 0, 1.5), table(20, 8, 1, 1.5)
    order = torch.stack([torch.randperm(8, generator=torch.manual_seed(row)) for row in range(20)])
    for name in ("reverse", "forward", "jsd", "tv", "alpha", "skew_reverse", "skew_forward"):
        full, last = DIVERGENCES[name](s, t), torch.zeros(20, dtype=torch.float64)
        for k in range(9):
            bucketed = DIVERGENCES[name](with_tail(s, order[:, :k]), with_tail(t, order[:, :k]))
            assert (bucketed >= last - 1e-12).all()
            assert (bucketed <= full + 1e-12).all()
            last = bucketed
        torch.testing.assert_close(last, full, rtol=1e-12, atol=1e-13)
        shuffled = DIVERGENCES[name](with_tail(s, order[:, :4].flip(-1)), with_tail(t, order[:, :4].flip(-1)))
        torch.testing.assert_close(
            shuffled,
            DIVERGENCES[name](with_tail(s, order[:, :4]), with_tail(t, order[:, :4])),
            rtol=1e-12,
            atol=1e-14,
        )


def test_bucketed_reverse_kl_has_the_stated_gradient_also_outside_the_list():
    logits, t = (
        torch.randn(4, 7, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True),
        table(4, 7, 1, 1.0),
    )
    s = logits.log_softmax(-1)
    ids = s.detach().topk(3, dim=-1).indices
    p_b, q_b = with_tail(s, ids), with_tail(t, ids)
    cost = kl(p_b, q_b)
    (gradient,) = torch.autograd.grad(cost.sum(), logits)
    bucket = torch.full((4, 7), 3).scatter(-1, ids, torch.arange(3).expand(4, 3))
    expected = s.exp() * ((p_b - q_b).gather(-1, bucket) - cost[:, None])
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-12)
    assert (gradient != 0).all()


def test_bucketed_gradient_is_exact_when_the_ratio_is_constant_over_the_tail():
    logits, ids = (
        torch.randn(2, 6, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True),
        torch.tensor([[4, 1], [0, 5]]),
    )
    t = (
        logits.detach().scatter_add(-1, ids, torch.tensor([[1.0, -2.0], [0.3, 0.5]], dtype=torch.float64))
    ).log_softmax(-1)
    s = logits.log_softmax(-1)
    (full,) = torch.autograd.grad(reverse_kl(s, t).sum(), logits, retain_graph=True)
    (bucketed,) = torch.autograd.grad(kl(with_tail(s, ids), with_tail(t, ids)).sum(), logits)
    torch.testing.assert_close(bucketed, full, rtol=1e-10, atol=1e-12)


def test_with_tail_gradcheck_and_empty_tail_without_nan():
    logits = torch.randn(2, 4, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    ids = torch.tensor([[2, 0], [3, 1]])
    assert torch.autograd.gradcheck(lambda x: with_tail(x, ids), logits)
    everything = torch.tensor([[2, 0, 1, 3], [3, 1, 0, 2]])
    made = with_tail(logits.log_softmax(-1), everything)
    assert (made[:, -1] == -INF).all()
    teacher = with_tail(table(2, 4, 1, 1.0), everything)
    for name in DIVERGENCES:
        cost = DIVERGENCES[name](with_tail(logits.log_softmax(-1), everything), teacher)
        assert torch.autograd.grad(cost.sum(), logits)[0].isfinite().all()


def test_tail_is_exact_where_one_minus_a_sum_would_be_empty():
    logp = torch.tensor([[0.0, -200.0, -201.0]]).log_softmax(-1)
    assert with_tail(logp, torch.tensor([[0]]))[0, 1].item() == pytest.approx(
        -200 + math.log1p(math.exp(-1)), rel=1e-6
    )


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [([[0, 0]], "repeat"), ([[0, 3]], r"0\.\.2"), ([[-1, 0]], r"0\.\.2"), ([[0], [1]], "ids")],
)
def test_bad_ids_are_refused(ids, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_tail(torch.zeros(1, 3), torch.tensor(ids))


# -------------------------------------------------------------------------------------------------
# renormalised lists, two lists in one


@given(v=st.integers(1, 9), seed=st.integers(0, 10**6), spread=st.sampled_from([1.0, 30.0]), data=st.data())
def test_renormalised_divides_by_the_listed_mass(v, seed, spread, data):
    k = data.draw(st.integers(1, v))
    logp, rng = table(3, v, seed, spread), np.random.default_rng(seed)
    ids = np.array([rng.permutation(v)[:k] for _ in range(3)])
    made = renormalised(logp, torch.tensor(ids)).numpy()
    picked = np.take_along_axis(logp.numpy(), ids, -1)
    np.testing.assert_allclose(
        made, picked - logsumexp(picked, axis=-1, keepdims=True), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(np.exp(made).sum(-1), 1, rtol=1e-12)


@given(v=st.integers(1, 9), seed=st.integers(0, 10**6), data=st.data())
def test_a_union_holds_each_token_of_either_list_once(v, seed, data):
    k = data.draw(st.integers(1, v))
    logp, rng = table(4, v, seed, 1.0, 0.2), np.random.default_rng(seed)
    one, other = (torch.tensor(np.array([rng.permutation(v)[:k] for _ in range(4)])) for _ in range(2))
    ids, repeated = union(one, other)
    assert ids.shape == repeated.shape == (4, 2 * k)
    tailed, closed = with_tail(logp, ids, repeated_NK=repeated), renormalised(logp, ids, repeated_NK=repeated)
    for close, made in ((with_tail, tailed), (renormalised, closed)):
        torch.testing.assert_close(
            close(logp, ids, check=False, repeated_NK=repeated), made, rtol=0, atol=0, equal_nan=True
        )
    for row in range(4):
        wanted = sorted({*one[row].tolist(), *other[row].tolist()})
        kept = ids[row][~repeated[row]]
        assert kept.tolist() == wanted
        assert (tailed[row, :-1][repeated[row]] == -INF).all()
        assert torch.equal(tailed[row, :-1][~repeated[row]], logp[row, kept])
        rest = np.delete(logp[row].numpy(), wanted)
        with np.errstate(divide="ignore"):
            assert tailed[row, -1].item() == pytest.approx(
                logsumexp(rest) if len(rest) else -INF, rel=1e-12, abs=1e-12
            )
        total = logsumexp(logp[row, kept].numpy())
        if total > -INF:
            np.testing.assert_allclose(
                closed[row][~repeated[row]], logp[row, kept] - total, rtol=1e-12, atol=1e-12
            )
    np.testing.assert_allclose(tailed.exp().sum(-1).numpy(), 1, rtol=1e-12)


def test_repeated_entries_get_no_gradient_and_the_rest_theirs():
    logits = torch.randn(2, 5, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    ids, repeated = union(torch.tensor([[2, 0], [3, 1]]), torch.tensor([[0, 4], [3, 1]]))
    assert repeated.sum(-1).tolist() == [1, 2]
    assert torch.autograd.gradcheck(lambda x: renormalised(x, ids, False, repeated)[~repeated], logits)
    loud = torch.cat([~repeated, torch.ones(2, 1, dtype=torch.bool)], -1)
    assert torch.autograd.gradcheck(lambda x: with_tail(x, ids, False, repeated)[loud], logits)


@pytest.mark.parametrize(
    ("ids", "marks", "sentence"),
    [
        ([2, 0, 2], [0, 0, 0], "not repeat"),
        ([2, 0, 2], [0, 1, 0], "not repeat"),
        ([2, 2, 2], [0, 0, 1], "not repeat"),
        ([2, 0, 2], [1, 0, 1], "once without a mark"),
        ([2, 0, 1], [0, 0, 1], "once without a mark"),
        ([0, 1, 2], [1, 0, 0], "once without a mark"),
        ([3, 3, 0], [0, 1, 0], r"0\.\.2"),
        ([-1, -1, 0], [0, 1, 0], r"0\.\.2"),
        ([2, 0, 2], [0, 1], "shape"),
    ],
)
def test_ids_repeat_exactly_where_they_are_marked(ids, marks, sentence):
    """In any row; a good row beside it does not help."""
    logp = torch.zeros(2, 3).log_softmax(-1)
    rows, marked = torch.tensor([[0, 0, 1], ids]), torch.tensor([[0, 1, 0][: len(marks)], marks]).bool()
    for close in (with_tail, renormalised):
        with pytest.raises(ValueError, match=sentence):
            close(logp, rows, repeated_NK=marked)


def test_bad_ids_of_a_renormalised_list_are_refused_and_no_mass_is_no_number():
    for ids, sentence in (([[0, 0]], "repeat"), ([[0, 3]], r"0\.\.2"), ([[0], [1]], "ids")):
        with pytest.raises(ValueError, match=sentence):
            renormalised(torch.zeros(1, 3), torch.tensor(ids))
    assert renormalised(torch.tensor([[0.0, -INF, -INF]]), torch.tensor([[1, 2]])).isnan().all()


def test_listed_tail_is_one_minus_the_sum_and_never_below_its_floor():
    logp = table(5, 8, 0, 1.0)
    top = logp.topk(3, dim=-1)
    torch.testing.assert_close(
        with_tail_listed(top.values), with_tail(logp, top.indices), rtol=1e-12, atol=1e-12
    )
    assert with_tail_listed(torch.tensor([[0.0], [1e-6]]))[:, 1].exp().tolist() == pytest.approx([1e-7, 1e-7])
    assert with_tail_listed(torch.tensor([[0.0]]), floor=1e-3)[0, 1].exp().item() == pytest.approx(1e-3)
    for floor in (0.0, 1.0):
        with pytest.raises(ValueError, match="floor"):
            with_tail_listed(torch.zeros(1, 1), floor)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        with_tail_listed(torch.zeros(3))
