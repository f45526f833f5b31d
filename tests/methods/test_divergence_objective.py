"""The `divergence` objective: which support it compares on, what it passes on, what it refuses."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from laws.estimators import choices, np_divergence
from reflux.config.requirements import Requirements
from reflux.loss.divergences import DIVERGENCES, with_tail
from reflux.loss.outputs import FullLogits, GivenLogprobs, SampledLogprobs, TopKLogprobs
from reflux.loss.term import Rows
from reflux.objectives.divergence import MIXED, Divergence
from reflux.types import GivenTarget


def table(n: int, v: int, seed: int, spread: float) -> torch.Tensor:
    """Random normalised log-probs in float64."""
    return (spread * torch.randn(n, v, dtype=torch.float64, generator=torch.manual_seed(seed))).log_softmax(
        -1
    )


def rows_of(student: torch.Tensor, teacher: FullLogits | TopKLogprobs | SampledLogprobs) -> Rows:
    ids, zero = torch.zeros(len(student), dtype=torch.int64), torch.zeros(len(student), dtype=student.dtype)
    return Rows(FullLogits(student, ids), {"main": teacher}, zero, zero)


def listed(teacher: torch.Tensor, k: int) -> TopKLogprobs:
    top = teacher.topk(k, dim=-1)
    return TopKLogprobs(top.indices, top.values, teacher[:, 0])


def test_each_support_compares_what_it_says():
    s, t = table(6, 9, 0, 1.5), table(6, 9, 1, 1.5)
    full = FullLogits(t, torch.zeros(6, dtype=torch.int64))
    for name in DIVERGENCES:
        function = DIVERGENCES[name]
        for support, ids in (("student", s.topk(3).indices), ("teacher", t.topk(3).indices)):
            made = Divergence(divergence=name, support=support, k=3)(rows_of(s, full))
            torch.testing.assert_close(made, function(with_tail(s, ids), with_tail(t, ids)))
        from_list = Divergence(divergence=name, support="teacher", k=3)
        torch.testing.assert_close(
            from_list(rows_of(s, listed(t, 3))), from_list(rows_of(s, full)), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            from_list(rows_of(s, listed(t, 7))), from_list(rows_of(s, full)), rtol=1e-9, atol=1e-12
        )
        whole = Divergence(divergence=name, support="teacher", k=100)
        torch.testing.assert_close(whole(rows_of(s, listed(t, 9))), function(s, t), rtol=1e-12, atol=1e-13)


def given(teacher: torch.Tensor, ids: torch.Tensor) -> GivenLogprobs:
    """What a served teacher answers at the ids that the student listed."""
    return GivenLogprobs(ids, teacher.gather(-1, ids), teacher[:, 0])


@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
def test_the_students_list_of_a_served_teacher_gives_cost_and_gradient_of_the_full_one(
    width: int, tail: Any
) -> None:
    """The tail is exact, and of a longer list the student's most likely tokens count."""
    s, t = table(6, 9, 0, 1.5), table(6, 9, 1, 1.5)
    ids = s.topk(width).indices.flip(-1)
    full = FullLogits(t, torch.zeros(6, dtype=torch.int64))
    for name in DIVERGENCES:
        objective, found = Divergence(divergence=name, support="student", k=3, tail=tail), []
        for teacher in (given(t, ids), full):
            logits = s.clone().requires_grad_()
            cost_N = objective(rows_of(logits, teacher))
            (gradient,) = torch.autograd.grad(cost_N.sum(), logits)
            found.append((cost_N.detach(), gradient))
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_only_the_students_own_list_stands_for_support_student() -> None:
    s, t = table(6, 9, 0, 1.5), table(6, 9, 1, 1.5)
    with pytest.raises(ValueError, match="at any token"):
        Divergence(support="student", k=3)(rows_of(s, listed(t, 3)))
    assert GivenTarget in Divergence(support="student").accepts
    assert GivenTarget not in Divergence(support="teacher").accepts
    assert Divergence(support="student", k=7).listed == Requirements(behaviour=7, candidates=7)
    assert Divergence(support="teacher").listed == Divergence().listed == Requirements()


KINDS, SUPPORTS, TAILS = (choices(Divergence, name) for name in ("divergence", "support", "tail"))
LISTS = [pair for pair in itertools.product(SUPPORTS, TAILS) if pair[0] != "full"]


def by_definition(kind: str, support: str, tail: str, k: int, p: np.ndarray, q: np.ndarray) -> float:
    """One row: which tokens are listed, as a set; then a bucket for the rest, or each model over its own
    listed mass.
    """
    student, teacher = ({int(i) for i in np.argsort(-x)[:k]} for x in (p, q))
    listed = sorted({"student": student, "teacher": teacher, "union": student | teacher}[support])
    p_S, q_S = p[listed], q[listed]
    if tail == "bucket":
        p_S, q_S = np.append(p_S, np.delete(p, listed).sum()), np.append(q_S, np.delete(q, listed).sum())
    return np_divergence(kind)(p_S / p_S.sum(), q_S / q_S.sum())


@pytest.mark.parametrize(("support", "tail"), LISTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_list_follows_its_definition(kind, support, tail):
    for seed, k in itertools.product(range(3), (2, 3, 5)):
        s, t = table(6, 9, seed, 1.5), table(6, 9, seed + 10, 1.5)
        made = Divergence(divergence=kind, support=support, tail=tail, k=k)(
            rows_of(s, FullLogits(t, torch.zeros(6, dtype=torch.int64)))
        )
        expected = [
            by_definition(kind, support, tail, k, *row)
            for row in zip(s.exp().numpy(), t.exp().numpy(), strict=True)
        ]
        np.testing.assert_allclose(made.numpy(), expected, rtol=1e-9, atol=1e-12)
        if support == "teacher":
            from_list = Divergence(divergence=kind, support=support, tail=tail, k=k)(rows_of(s, listed(t, 7)))
            np.testing.assert_allclose(from_list.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("support", "tail"), LISTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_list_has_the_gradient_of_finite_differences(kind, support, tail):
    """Also where both models list the same tokens, the student alone rules some out, and nothing is left
    over.
    """
    t = table(4, 6, 1, 1.5)
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.manual_seed(3), requires_grad=True)
    full = FullLogits(t, torch.zeros(4, dtype=torch.int64))
    for k in (2, 4):
        objective = Divergence(divergence=kind, support=support, tail=tail, k=k)
        assert torch.autograd.gradcheck(lambda x, o=objective: o(rows_of(x.log_softmax(-1), full)), logits)
    ruled_out = torch.tensor([[0.0, 1.0, -math.inf, 2.0]], dtype=torch.float64, requires_grad=True)
    for teacher in (torch.tensor([[3.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, -math.inf, 2.0]])):
        one = rows_of(
            ruled_out.log_softmax(-1), FullLogits(teacher.double(), torch.zeros(1, dtype=torch.int64))
        )
        cost = Divergence(divergence=kind, support=support, tail=tail, k=3)(one).sum()
        if cost.isfinite():
            (gradient,) = torch.autograd.grad(cost, ruled_out)
            assert gradient.isfinite().all()
            assert gradient[0, 2] == 0


def test_top_k_of_the_whole_vocabulary_is_the_full_divergence_to_the_bit():
    s, t = table(4, 5, 0, 1.0), FullLogits(table(4, 5, 1, 1.0), torch.zeros(4, dtype=torch.int64))
    for kind in KINDS:
        full = Divergence(divergence=kind)(rows_of(s, t))
        for (support, tail), k in itertools.product(LISTS, (5, 100)):
            assert torch.equal(
                Divergence(divergence=kind, support=support, tail=tail, k=k)(rows_of(s, t)), full
            )


def test_a_list_of_the_whole_vocabulary_has_no_tail_to_drop():
    s, t = table(4, 5, 0, 1.0), table(4, 5, 1, 1.0)
    for kind, tail in itertools.product(KINDS, TAILS):
        made = Divergence(divergence=kind, support="teacher", tail=tail)(rows_of(s, listed(t, 5)))
        torch.testing.assert_close(made, DIVERGENCES[kind](s, t), rtol=1e-12, atol=1e-13)


def test_union_counts_a_token_that_both_list_once():
    """Equal lists: the union is either of them. Disjoint lists: all 2K tokens count."""
    s = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]], dtype=torch.float64).log()
    same_order = torch.tensor([[0.4, 0.35, 0.05, 0.1, 0.1]], dtype=torch.float64).log()
    other_order = torch.tensor([[0.05, 0.05, 0.4, 0.4, 0.1]], dtype=torch.float64).log()
    id_1 = torch.zeros(1, dtype=torch.int64)
    student, union = (Divergence(support=support, k=2) for support in ("student", "union"))
    at = rows_of(s, FullLogits(same_order, id_1))
    torch.testing.assert_close(union(at), student(at), rtol=1e-14, atol=0)
    at = rows_of(s, FullLogits(other_order, id_1))
    # the bucket holds one token: nothing is merged
    torch.testing.assert_close(union(at), Divergence()(at), rtol=1e-12, atol=0)
    assert (union(at) > student(at)).all()


def test_renormalised_is_blind_to_mass_outside_the_list_and_the_bucket_is_not():
    """Its optimum moves: the student is right on the list up to a factor, wrong everywhere else, and nothing
    pulls it back.
    """
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log().requires_grad_()
    teacher = FullLogits(
        torch.tensor([[0.25, 0.15, 0.5, 0.1]], dtype=torch.float64).log(), torch.zeros(1, dtype=torch.int64)
    )
    for kind in KINDS:
        blind, seeing = (
            Divergence(divergence=kind, support="student", k=2, tail=tail)
            for tail in ("renormalised", "bucket")
        )
        cost = blind(rows_of(logits, teacher))
        assert cost.item() == pytest.approx(0, abs=1e-12)
        if kind != "tv":
            # a kink
            assert torch.autograd.grad(cost.sum(), logits)[0].abs().max() < 1e-12
        cost = seeing(rows_of(logits, teacher))
        assert cost.item() > 0.01
        assert torch.autograd.grad(cost.sum(), logits)[0].abs().max() > 0.01


def test_the_ratio_multiplies_by_a_capped_constant():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    teacher, ids = table(5, 4, 1, 1.0), torch.tensor([0, 3, 1, 2, 2])
    behaviour = (
        logits.detach().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        - torch.tensor([0.0, 0.4, -0.7, 3.0, -30.0]).double()
    )
    at = Rows(
        FullLogits(logits, ids),
        {"main": FullLogits(teacher, ids)},
        behaviour,
        torch.zeros(5, dtype=torch.float64),
    )
    factor = np.minimum(np.exp([0.0, 0.4, -0.7, 3.0, -30.0]), 5.0)
    plain, weighed = Divergence()(at), Divergence(ratio="truncated")(at)
    np.testing.assert_allclose(weighed.detach().numpy(), plain.detach().numpy() * factor, rtol=1e-6)
    grads = [torch.autograd.grad(cost.sum(), logits, retain_graph=True)[0] for cost in (plain, weighed)]
    # nothing through the ratio
    torch.testing.assert_close(grads[1], grads[0] * torch.tensor(factor)[:, None], rtol=1e-6, atol=1e-14)
    assert Divergence(ratio="truncated", ratio_cap=1.0)(at)[3].item() == pytest.approx(plain[3].item())


def test_no_gradient_reaches_the_teacher():
    logits = table(4, 5, 1, 1.0).requires_grad_()
    for support, tail in [("full", "bucket"), *LISTS]:
        student = table(4, 5, 0, 1.0).requires_grad_()
        Divergence(support=support, tail=tail, k=2, ratio="truncated")(
            rows_of(student, FullLogits(logits, torch.zeros(4, dtype=torch.int64)))
        ).sum().backward()
        assert logits.grad is None
        assert student.grad is not None


def test_beta_reaches_the_mixture():
    """Up to rounding in float64: the objective normalises the rows itself, which moves a last digit where
    processors sum differently.
    """
    s, t = table(4, 5, 0, 1.0), FullLogits(table(4, 5, 1, 1.0), torch.zeros(4, dtype=torch.int64))
    for name in MIXED:
        made, expected = (
            Divergence(divergence=name, beta=0.25)(rows_of(s, t)),
            DIVERGENCES[name](s, t.logp_NV, 0.25),
        )
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-14)
        # of the default weight
        assert not torch.allclose(made, DIVERGENCES[name](s, t.logp_NV), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"beta": 0.5}, "no such weight"),
        ({"divergence": "jsd", "beta": 1.5}, r"\[0, 1\]"),
        ({"divergence": "skew_forward", "beta": 1.0}, "has no gradient"),
        ({"k": 0}, "k must be at least 1"),
        ({"tail_floor": 0.0}, "tail_floor"),
        ({"coef": math.inf}, "coef"),
        ({"tail": "renormalised"}, "Use tail = 'bucket'"),
        ({"tail": "renormalised", "support": "student", "k": 1}, "Use k = 2"),
        ({"ratio": "truncated", "ratio_cap": 0.5}, "ratio_cap"),
        ({"ratio": "clip"}, "ratio"),
    ],
)
def test_bad_fields_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Divergence(**fields)


def test_a_teacher_that_cannot_answer_is_refused_with_the_remedy():
    t = table(4, 5, 1, 1.0)
    for support, outputs in (
        ("full", listed(t, 2)),
        ("student", listed(t, 2)),
        ("union", listed(t, 2)),
        ("teacher", SampledLogprobs(t[:, 0])),
    ):
        with pytest.raises(ValueError, match="local teacher"):
            Divergence(support=support)(rows_of(table(4, 5, 0, 1.0), outputs))
    with pytest.raises(ValueError, match="needs the log-probs of teacher 'main' at any token"):
        Divergence(support="union")(rows_of(table(4, 5, 0, 1.0), listed(t, 2)))
    with pytest.raises(ValueError, match="lists one token"):
        Divergence(support="teacher", tail="renormalised")(rows_of(table(4, 5, 0, 1.0), listed(t, 1)))
