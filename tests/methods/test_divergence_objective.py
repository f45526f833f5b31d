"""The `divergence` objective: which support it compares on, what it passes on, what it refuses."""

import math

import pytest
import torch

from reflux.objectives.base import FullSays, ListedSays, Rows, SampledSays
from reflux.objectives.divergence import MIXED, Divergence
from reflux.objectives.divergences import DIVERGENCES, with_tail


def table(n: int, v: int, seed: int, spread: float) -> torch.Tensor:
    """Random normalised log-probs in float64."""
    return (spread * torch.randn(n, v, dtype=torch.float64, generator=torch.manual_seed(seed))).log_softmax(-1)


def rows_of(student: torch.Tensor, teacher: FullSays | ListedSays | SampledSays) -> Rows:
    ids, zero = torch.zeros(len(student), dtype=torch.int64), torch.zeros(len(student), dtype=student.dtype)
    return Rows(ids, FullSays(student, ids), {"main": teacher}, zero, zero)


def listed(teacher: torch.Tensor, k: int) -> ListedSays:
    top = teacher.topk(k, dim=-1)
    return ListedSays(top.indices, top.values, teacher[:, 0])


def test_each_support_compares_what_it_says():
    s, t = table(6, 9, 0, 1.5), table(6, 9, 1, 1.5)
    full = FullSays(t, torch.zeros(6, dtype=torch.int64))
    for name in DIVERGENCES:
        function = DIVERGENCES[name]
        for support, ids in (("student", s.topk(3).indices), ("teacher", t.topk(3).indices)):
            made = Divergence(divergence=name, support=support, k=3)(rows_of(s, full))
            torch.testing.assert_close(made, function(with_tail(s, ids), with_tail(t, ids)))
        from_list = Divergence(divergence=name, support="teacher", k=3)
        torch.testing.assert_close(from_list(rows_of(s, listed(t, 3))), from_list(rows_of(s, full)), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(from_list(rows_of(s, listed(t, 7))), from_list(rows_of(s, full)), rtol=1e-9, atol=1e-12)
        whole = Divergence(divergence=name, support="teacher", k=100)
        torch.testing.assert_close(whole(rows_of(s, listed(t, 9))), function(s, t), rtol=1e-12, atol=1e-13)


def test_top_k_of_the_whole_vocabulary_is_the_full_divergence_to_the_bit():
    s, t = table(4, 5, 0, 1.0), FullSays(table(4, 5, 1, 1.0), torch.zeros(4, dtype=torch.int64))
    full = Divergence()(rows_of(s, t))
    assert torch.equal(Divergence(support="student")(rows_of(s, t)), full)
    assert torch.equal(Divergence(support="teacher", k=5)(rows_of(s, t)), full)


def test_no_gradient_reaches_the_teacher():
    logits = table(4, 5, 1, 1.0).requires_grad_()
    for support in ("full", "student", "teacher"):
        student = table(4, 5, 0, 1.0).requires_grad_()
        Divergence(support=support, k=2)(rows_of(student, FullSays(logits, torch.zeros(4, dtype=torch.int64)))).sum().backward()
        assert logits.grad is None
        assert student.grad is not None


def test_beta_reaches_the_mixture():
    s, t = table(4, 5, 0, 1.0), FullSays(table(4, 5, 1, 1.0), torch.zeros(4, dtype=torch.int64))
    for name in MIXED:
        assert torch.equal(Divergence(divergence=name, beta=0.25)(rows_of(s, t)), DIVERGENCES[name](s, t.logp_NV, 0.25))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"beta": 0.5}, "no such weight"),
        ({"divergence": "jsd", "beta": 1.5}, r"\[0, 1\]"),
        ({"divergence": "skew_forward", "beta": 1.0}, "teaches nothing"),
        ({"k": 0}, "k must be at least 1"),
        ({"tail_floor": 0.0}, "tail_floor"),
        ({"coef": math.inf}, "coef"),
    ],
)
def test_bad_fields_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Divergence(**fields)


def test_a_teacher_that_cannot_answer_is_refused_with_the_remedy():
    t = table(4, 5, 1, 1.0)
    for support, says in (("full", listed(t, 2)), ("student", listed(t, 2)), ("teacher", SampledSays(t[:, 0]))):
        with pytest.raises(ValueError, match="local teacher"):
            Divergence(support=support)(rows_of(table(4, 5, 0, 1.0), says))
