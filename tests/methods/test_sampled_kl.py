"""The sampled objectives at one position: ratio forms, dropped outliers, shifts, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.loss.baselines import kl_value, minimum_variance_value, topk_kl_value
from reflux.loss.outputs import FullLogits, SampledLogprobs, TopKLogprobs
from reflux.loss.term import Rows
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.ratio import above_cap, outside, score_cost, truncated_ratio
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL, advantage
from reflux.types import GivenTarget, HiddenTarget, SampledTarget, TopKTarget

N, V = 6, 5


def rows(staleness: float = 0.0, shift: float = 0.0) -> Rows:
    torch.manual_seed(0)
    logits, ids = torch.randn(N, V, dtype=torch.float64, requires_grad=True), torch.arange(N) % V
    student = FullLogits(logits, ids)
    behaviour = student.logp_N.detach() + staleness * torch.randn(N, dtype=torch.float64)
    teacher = FullLogits(torch.randn(N, V, dtype=torch.float64), ids)
    return Rows(student, {"main": teacher}, behaviour, torch.full((N,), shift, dtype=torch.float64))


def gradient(objective, at: Rows) -> torch.Tensor:
    return torch.autograd.grad(objective(at).sum(), at.student.logits_NV, retain_graph=True)[0]


def test_advantage_is_teacher_minus_student_minus_value_detached():
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    made = advantage(student, torch.tensor([-1.5, -0.5]), torch.tensor([-0.25, 0.0], requires_grad=True))
    assert made.tolist() == [-0.25, 1.5]
    assert not made.requires_grad
    assert advantage(student, student).tolist() == [0, 0]


@pytest.mark.parametrize(
    "make", [lambda ratio: SampledKL(ratio=ratio), lambda ratio: PolicyGradient(ratio=ratio)]
)
def test_all_ratio_forms_have_one_gradient_on_policy(make):
    at = rows(shift=0.7)
    torch.testing.assert_close(gradient(make("clip"), at), gradient(make("none"), at), rtol=1e-12, atol=1e-14)
    at = rows(shift=0.7)
    torch.testing.assert_close(
        gradient(SampledKL(), at), gradient(SampledKL(ratio="none"), at), rtol=1e-12, atol=1e-14
    )


def test_truncated_ratio_scales_the_gradient_by_the_capped_detached_ratio():
    at = rows(staleness=1.5)
    rho = (at.student.logp_N - at.behaviour_logp_N).detach().exp()
    assert (rho > 2).any()
    assert (rho < 2).any()
    expected = gradient(SampledKL(ratio="none"), at) * rho.clamp(max=2)[:, None]
    torch.testing.assert_close(gradient(SampledKL(ratio_cap=2.0), at), expected, rtol=1e-12, atol=1e-14)


def test_clip_is_the_clipped_surrogate_and_stops_gradients_that_go_too_far():
    logp = torch.tensor([-1.0] * 6, dtype=torch.float64, requires_grad=True)
    rho = np.array([0.5, 0.5, 1.1, 1.1, 2.0, 2.0])
    a = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    cost = score_cost(a, logp, (logp.detach() - torch.tensor(rho).log()), "clip", (0.2, 0.3), 5.0)
    expected = -np.minimum(rho * a.numpy(), np.clip(rho, 0.8, 1.3) * a.numpy())
    np.testing.assert_allclose(cost.detach().numpy(), expected, rtol=1e-12)
    (made,) = torch.autograd.grad(cost.sum(), logp)
    np.testing.assert_allclose(made.numpy(), [-0.5, 0, -1.1, 1.1, 0, 2.0], rtol=1e-12)


def test_a_token_the_sampler_thought_impossible_does_not_turn_into_nan():
    logp = torch.tensor([-1.0], requires_grad=True)
    for ratio in ("clip", "truncated"):
        cost = score_cost(torch.tensor([1.0]), logp, torch.tensor([-300.0]), ratio, (0.2, 0.2), 5.0)
        assert cost.isfinite().all()
        assert torch.autograd.grad(cost.sum(), logp)[0].isfinite().all()


def test_shift_and_value_enter_the_advantage():
    at = rows(shift=0.4)
    logp, r = at.student.logp_N, (at.teachers["main"].logp_N - at.student.logp_N).detach()
    kl = (at.student.logp_NV.exp() * (at.student.logp_NV - at.teachers["main"].logp_NV)).sum(-1)
    for objective, extra in ((SampledKL(ratio="none"), 0.0), (SampledKL(ratio="none", baseline="kl"), kl)):
        torch.testing.assert_close(objective(at), -(r + extra + 0.4) * logp)
    torch.testing.assert_close(PolicyGradient(ratio="none")(at), -0.4 * logp)


def test_each_baseline_is_the_function_of_its_name():
    """All are unbiased, so no law tells them apart."""
    at = rows()
    pair = (at.student.logp_NV, at.teachers["main"].logp_NV)
    expected = {
        "kl": kl_value(*pair),
        "minimum_variance": minimum_variance_value(*pair),
        "topk_kl": topk_kl_value(*pair, 2),
    }
    for baseline, value in expected.items():
        assert torch.equal(torch.as_tensor(SampledKL(baseline=baseline, baseline_k=2).value(at)), value)
    assert len({tuple(value.tolist()) for value in expected.values()}) == 3


@pytest.mark.parametrize("ratio", ["truncated", "clip", "none"])
def test_outliers_cost_exactly_zero_whatever_their_shift_also_where_infinite(ratio):
    at = rows(staleness=0.1, shift=3.0)
    teacher = at.teachers["main"].logp_N.clone()
    teacher[0], teacher[1], teacher[2] = (
        -math.inf,
        at.student.logp_N[1].item() - 1.0,
        at.student.logp_N[2].item() + 0.999,
    )
    at.teachers["main"] = SampledLogprobs(teacher)
    gap = (at.student.logp_N - teacher).detach().abs()
    objective = SampledKL(ratio=ratio, max_gap_nats=1.0)
    cost, grads = objective(at), gradient(objective, at)
    assert (gap >= 1)[:3].tolist() == [True, True, False]
    assert ((cost == 0) == (gap >= 1)).all()
    assert ((grads == 0).all(-1) == (gap >= 1)).all()
    assert not SampledKL(ratio=ratio)(at).isfinite().all()


def test_a_dropped_token_that_the_student_never_says_gives_no_nan():
    ids = torch.tensor([0])
    student = FullLogits(torch.tensor([[-math.inf, 0.0, 1.0]], requires_grad=True), ids)
    at = Rows(
        student, {"main": SampledLogprobs(torch.tensor([-1.0]))}, torch.tensor([-1.0]), torch.tensor([0.0])
    )
    objective = SampledKL(max_gap_nats=10.0)
    assert objective(at).item() == 0
    assert not gradient(objective, at).any()


def test_no_gradient_reaches_teacher_or_value():
    at = rows()
    teacher = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    at.teachers["main"] = FullLogits(teacher, at.student.ids_N)
    for baseline in ("none", "kl", "topk_kl", "minimum_variance"):
        SampledKL(baseline=baseline)(at).sum().backward(retain_graph=True)
    assert teacher.grad is None
    at = rows()
    only_score = torch.autograd.grad(
        at.student.logp_N, at.student.logits_NV, -SampledKL().value(at) * torch.ones(N), retain_graph=True
    )
    # value 0 without a baseline
    assert not only_score[0].any()
    value = SampledKL(baseline="kl").value(at)
    weighted = torch.autograd.grad(
        (value.detach() * at.student.logp_N).sum(), at.student.logits_NV, retain_graph=True
    )[0]
    difference = gradient(SampledKL(baseline="kl", ratio="none"), at) - gradient(SampledKL(ratio="none"), at)
    # only log p(a) carries the value's weight
    torch.testing.assert_close(difference, weighted)


def test_baselines_refuse_what_cannot_answer_everywhere():
    at = rows()
    for outputs in (
        SampledLogprobs(torch.zeros(N)),
        TopKLogprobs(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1), torch.zeros(N)),
    ):
        at.teachers["main"] = outputs
        assert SampledKL()(at).shape == (N,)
        for baseline in ("kl", "topk_kl", "minimum_variance"):
            with pytest.raises(ValueError, match="baseline = 'none'"):
                SampledKL(baseline=baseline)(at)
    assert SampledKL().accepts == (SampledTarget, TopKTarget, GivenTarget, HiddenTarget)
    assert all(
        SampledKL(baseline=baseline).accepts == (HiddenTarget,)
        for baseline in ("kl", "topk_kl", "minimum_variance")
    )


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_a_group_value_is_subtracted_and_asked_for(baseline):
    at = rows(shift=0.3)
    with pytest.raises(ValueError, match=r"batch\.plan"):
        SampledKL(baseline=baseline)(at)
    at.group_value_N = torch.linspace(-2, 2, N, dtype=torch.float64)
    r = (at.teachers["main"].logp_N - at.student.logp_N).detach()
    expected = -(r - at.group_value_N + 0.3) * at.student.logp_N
    for outputs in (at.teachers["main"], SampledLogprobs(at.teachers["main"].logp_N)):
        at.teachers["main"] = outputs
        torch.testing.assert_close(SampledKL(baseline=baseline, ratio="none")(at), expected)
    assert SampledKL(baseline=baseline).accepts == (SampledTarget, TopKTarget, GivenTarget, HiddenTarget)
    assert SampledKL(baseline=baseline).requirements == Requirements(logp=True)
    assert SampledKL().requirements == SampledKL(baseline="kl").requirements == Requirements()
    assert SampledKL(teacher="behaviour").requirements == Requirements(behaviour=1)


RATIOS = [0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 3.01]


def test_a_ratio_is_outside_where_its_bound_binds_and_nowhere_else():
    behaviour = torch.zeros(len(RATIOS), dtype=torch.float64)
    logp = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    for sign in (1.0, -1.0, 0.0):
        advantage_N = torch.full_like(behaviour, sign)
        assert outside(advantage_N, logp, behaviour, "none", (0.2, 0.3), 3.0) is None
        assert outside(advantage_N, logp, behaviour, "truncated", (0.2, 0.3), 3.0).tolist() == [False] * 6 + [
            True
        ]
        assert (
            outside(advantage_N, logp, behaviour, "clip", (0.2, 0.3), 3.0).tolist()
            == {1.0: [False] * 5 + [True] * 2, -1.0: [True] * 2 + [False] * 5, 0.0: [False] * 7}[sign]
        )
    assert above_cap(logp, behaviour, 1.0).tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: SampledKL(ratio="clip", clip=(0.2, 0.3), max_gap_nats=2.0),
        lambda: PolicyGradient(clip=(0.2, 0.3)),
    ],
)
def test_the_clip_is_counted_exactly_where_it_takes_the_gradient_away(make):
    """From the definition: where the gradient is 0, and without the clip it is not."""
    objective, found = make(), []
    for shift in (-2.0, 0.5, 2.0):
        at = rows(staleness=0.5, shift=shift)
        quiet_N = (gradient(objective, at) == 0).all(-1)
        alive_N = (gradient(dataclasses.replace(objective, clip=(1 - 1e-9, 1e9)), at) != 0).any(-1)
        found.append(objective.outside(at))
        assert found[-1].tolist() == (quiet_N & alive_N).tolist()
    share = torch.cat(found).double().mean()
    assert 0.1 < share < 0.9
    free = dataclasses.replace(objective, ratio="none")
    assert free.outside(rows(staleness=0.5, shift=2.0)) is None


def test_a_cap_is_counted_where_it_holds_a_ratio_back_but_not_where_nothing_is_learnt():
    at = rows(staleness=1.5)
    ratio_N = (at.student.logp_N - at.behaviour_logp_N).detach().exp()
    above_N = ratio_N > 1.2
    assert 0 < above_N.sum() < N
    for objective in (
        SampledKL(ratio_cap=1.2),
        SampledKL(baseline="kl", ratio_cap=1.2),
        Divergence(ratio="truncated", ratio_cap=1.2),
    ):
        assert objective.outside(at).tolist() == above_N.tolist()
    gap_N = (at.student.logp_N - at.teachers["main"].logp_N).detach().abs()
    least = float(gap_N[above_N].min())
    assert (
        SampledKL(ratio_cap=1.2, max_gap_nats=least).outside(at).tolist()
        == (above_N & (gap_N < least)).tolist()
        != above_N.tolist()
    )
    assert Divergence().outside(at) is None
    assert NLL().outside(at) is None


def test_the_share_of_ratios_outside_their_bound_is_a_metric(tiny_run):
    on_policy = tiny_run("opd", steps=1, task={"kind": "outside:Chat"}).rows("metrics")[0]
    assert on_policy["ratio_outside_share"] == 0
    free = tiny_run(
        "opd", steps=1, task={"kind": "outside:Chat"}, objectives=[{"kind": "sampled_kl", "ratio": "none"}]
    )
    assert "ratio_outside_share" not in free.rows("metrics")[0]


def test_the_share_counts_the_rows_beyond_the_cap():
    teacher = as_model(tiny.net(2), character_tokenizer())
    # behaviour log-probs made up, far from the student's
    attempts = [tiny.attempt(tiny.rollout(n, seed=n), teacher) for n in (9, 4)]
    stats = tiny.move(tiny.learner(tiny.net(1)), [attempts], [SampledKL(ratio_cap=1.5)])
    log_ratio = np.concatenate([entry.learned.logp["student"] - entry.rollout.logp_T for entry in attempts])
    expected = float((log_ratio > np.log(1.5)).mean())
    assert 0 < expected < 1
    assert stats["ratio_outside_share"].value == pytest.approx(expected)


def test_the_share_of_a_clip_is_of_the_side_that_the_advantage_pushes_to():
    """A lift where the ratio is above the range, and where it is below: only one of them is held back."""
    learner, spoken = tiny.learner(tiny.net(1)), tiny.rollout(8)
    first = tiny.attempt(spoken, None, shift=1.0)
    tiny.move(learner, [[first]], [PolicyGradient()])
    now_T = first.learned.logp["student"]
    spoken = dataclasses.replace(
        spoken, logp_T=now_T - np.log([0.5, 0.5, 0.5, 1.0, 1.1, 2.0, 2.0, 3.0]).astype(np.float32)
    )
    for shift, expected in ((1.0, 3 / 8), (-1.0, 3 / 8), ([1, 1, 1, 1, 1, -1, -1, 1], 1 / 8)):
        stats = tiny.move(learner, [[tiny.attempt(spoken, None, shift=shift)]], [PolicyGradient()])
        assert stats["ratio_outside_share"].value == pytest.approx(expected)


def test_the_truncated_ratio_is_capped_and_detached():
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    made = truncated_ratio(logp, torch.tensor([-1.0, -2.0, -9.0], dtype=torch.float64), 3.0)
    assert made.tolist() == pytest.approx([1.0, math.e, 3.0])
    assert not made.requires_grad


def test_nll_is_the_recorded_tokens_surprise():
    at = rows()
    torch.testing.assert_close(
        NLL()(at), -at.student.logits_NV.log_softmax(-1).gather(-1, at.student.ids_N[:, None])[:, 0]
    )


def test_defaults_are_the_vetted_setting():
    sampled = SampledKL()
    assert (sampled.baseline, sampled.baseline_k, sampled.ratio, sampled.ratio_cap) == (
        "none",
        20,
        "truncated",
        5.0,
    )
    assert sampled.clip == (0.2, 0.2)
    assert sampled.max_gap_nats is None
    assert sampled.takes_advantage_offset
    assert (
        PolicyGradient().ratio,
        PolicyGradient().clip,
        PolicyGradient().takes_advantage_offset,
        NLL().takes_advantage_offset,
    ) == ("clip", (0.2, 0.2), True, False)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"baseline_k": 0}, "baseline_k"),
        ({"ratio_cap": 0.5}, "ratio_cap"),
        ({"clip": (1.0, 0.2)}, "clip"),
        ({"clip": (0.2, -0.1)}, "clip"),
        ({"max_gap_nats": 0.0}, "max_gap_nats"),
        ({"coef": math.nan}, "coef"),
        ({"baseline": "mean"}, "baseline"),
    ],
)
def test_bad_fields_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampledKL(**fields)


@pytest.mark.parametrize("baseline", ["minimum_variance", "group_mean", "leave_one_out"])
def test_a_baseline_reaches_the_gradient_of_a_run(tiny_run, baseline):
    """What the first step moves by is another gradient than without it, and its variance is told."""
    done = [
        tiny_run("opd", steps=1, group_size=3, log_variance=True, objectives__0__baseline=name).rows(
            "metrics"
        )
        for name in ("none", baseline)
    ]
    (plain,), (based,) = done
    assert plain["gradient_variance_ratio"] == 1.0
    assert based["tokens_sampled"] == plain["tokens_sampled"]
    assert based["grad_norm"] != plain["grad_norm"]
    assert based["gradient_variance_ratio"] != 1.0
    assert baseline != "minimum_variance" or based["gradient_variance_ratio"] < 1
