"""The control arms `unlikely`, `discrepancy` (IW-OPD) and `sign_gate` (OPDVR): each from its definition, by
enumeration where there is an expected value, and through the loss.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.step_context import StepContext
from reflux.credit.balance import Balance
from reflux.credit.base import share_credit
from reflux.credit.discrepancy import Discrepancy
from reflux.credit.share_credit import least_likely, share_before
from reflux.credit.sign_gate import SignGate
from reflux.credit.unlikely import Unlikely
from reflux.loss.term import Rows
from reflux.models.text import as_model
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, Credit, Finish, Group, Reward, SampledTarget, TeacherAnswer
from tiny import close, gradients, rollout

NOW = StepContext(0, 0)
INF = math.inf
RULES: dict[str, Any] = {
    "unlikely": Unlikely(),
    "discrepancy": Discrepancy(gamma=2.0),
    "sign_gate": SignGate(conflicting=0.25),
}


def attempt(
    ratio_T: list[float],
    reward: float | None = None,
    mask: list[bool] | None = None,
    finish: Finish = "stop",
    logp_T: list[float] | None = None,
    seed: int = 0,
) -> Attempt:
    """An attempt at whose tokens teacher and student differ by ratio_T nats."""
    spoken = rollout(len(ratio_T), seed=seed, mask=mask, finish=finish)
    if logp_T is not None:
        spoken = replace(spoken, logp_T=np.array(logp_T, dtype=np.float32))
    made = Attempt(spoken, reward=Reward(reward))
    target = SampledTarget(teacher="main", logp_T=(spoken.logp_T.astype(np.float64) + np.array(ratio_T)))
    made.answers["main"] = TeacherAnswer(target=target)
    return made


def credit(rule: Any, *attempts: Attempt) -> list[Credit]:
    return rule(list(attempts), NOW)


# --------------------------------------------------------------------------------------------------
# unlikely


def test_the_least_likely_fifth_has_the_offset_and_nothing_else() -> None:
    logp_T = [-1.0, -9.0, -0.1, -3.0, -2.0, -0.2, -0.3, -4.0, -0.4, -0.5]
    (share,) = credit(Unlikely(), attempt([0.0] * 10, logp_T=logp_T))
    assert np.asarray(share.advantage_offset_T).tolist() == [0, -0.5, 0, 0, 0, 0, 0, -0.5, 0, 0]
    assert share.weight_T == 1.0
    assert share.notes == {"taken": 0.2, "taken_nats": pytest.approx(6.5)}


def test_the_text_of_tools_is_neither_taken_nor_counted() -> None:
    logp_T, mask = [-50.0, -1.0, -60.0, -2.0, -3.0], [False, True, False, True, True]
    taken_T = least_likely(np.array(logp_T), np.array(mask), 0.67)
    assert taken_T.tolist() == [False, False, False, True, True]
    assert least_likely(np.array(logp_T), np.array(mask), 0.66).tolist() == [False] * 4 + [True]


@given(
    logp=st.lists(st.floats(-20, 0).map(lambda x: round(x, 1)), max_size=12),
    share=st.sampled_from([0.01, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0]),
    most=st.sampled_from([0.01, 0.3, 1.0]),
    mask=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_who_is_taken_is_the_head_of_the_sorted_list(
    logp: list[float], share: float, most: float, mask: list[bool]
) -> None:
    mask = mask[: len(logp)]
    chosen = sorted((value, place) for place, value in enumerate(logp) if mask[place])
    count = max(1, len(chosen) * round(share * 100) // 100)
    wanted = {place for value, place in chosen[:count] if math.exp(value) <= most}
    taken_T = least_likely(np.array(logp), np.array(mask, dtype=bool), share, most)
    assert set(np.flatnonzero(taken_T).tolist()) == wanted


def test_a_share_that_rounds_just_below_a_number_is_that_number() -> None:
    assert 0.29 * 100 < 29
    assert least_likely(-np.arange(100.0), np.ones(100, dtype=bool), 0.29).sum() == 29
    assert least_likely(np.zeros(3), np.ones(3, dtype=bool), 0.34).tolist() == [True, False, False]


def test_the_probability_is_that_of_the_policy_and_not_of_the_draw() -> None:
    one = attempt([0.0, 0.0], logp_T=[-1.0, -2.0])
    one.rollout = replace(one.rollout, logp_raw_T=np.array([-4.0, -3.0], dtype=np.float32))
    (share,) = credit(Unlikely(share=0.5, advantage=-1.0), one)
    assert np.asarray(share.advantage_offset_T).tolist() == [-1.0, 0.0]


def expected_gradient(logits_V: torch.Tensor, rule: Unlikely) -> torch.Tensor:
    """The expected gradient of the loss at the logits, over all answers of one token: enumeration."""
    gradient_V, probs = torch.zeros_like(logits_V), logits_V.softmax(0)
    for token, p in enumerate(probs.tolist()):
        free_V = logits_V.clone().requires_grad_()
        logp = free_V.log_softmax(0)[token]
        (share,) = credit(rule, attempt([0.0], logp_T=[logp.item()]))
        offset_N = torch.tensor(np.broadcast_to(share.advantage_offset_T, 1).copy())
        student = SimpleNamespace(logp_N=logp[None])
        rows: Rows[Any] = Rows(student, {}, logp[None].detach(), offset_N)
        PolicyGradient()(rows).sum().backward()
        assert free_V.grad is not None
        gradient_V += p * free_V.grad
    return gradient_V


def test_a_threshold_lowers_the_mass_below_it_and_all_tokens_together_have_no_gradient() -> None:
    """The expected gradient is that of 0.7 times the mass of the unlikely set, which is held fixed. At all
    tokens alike the score function has mean 0.
    """
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -1.5], dtype=torch.float64)
    unlikely = logits_V.softmax(0) <= 0.2
    assert unlikely.tolist() == [False, False, True, True, True]
    free_V = logits_V.clone().requires_grad_()
    (0.7 * free_V.softmax(0)[unlikely].sum()).backward()
    found_V = expected_gradient(logits_V, Unlikely(advantage=-0.7, share=1.0, max_probability=0.2))
    torch.testing.assert_close(found_V, free_V.grad, rtol=1e-6, atol=1e-8)
    entropy = torch.distributions.Categorical(logits=logits_V).entropy()
    stepped = torch.distributions.Categorical(logits=logits_V - 0.1 * found_V).entropy()
    assert stepped < entropy
    everywhere_V = expected_gradient(logits_V, Unlikely(advantage=-0.7, share=1.0))
    assert everywhere_V.abs().max() < 1e-7


# --------------------------------------------------------------------------------------------------
# discrepancy


def test_weights_by_hand() -> None:
    (share,) = credit(Discrepancy(), attempt([1.0, -2.0, 0.0, 1.0]))
    # F = 0, 1/4, 3/4, 3/4
    assert np.asarray(share.weight_T).tolist() == pytest.approx([1.5, 1.375, 1.125, 1.125])
    assert share.notes == {"discrepancy": pytest.approx(1.0), "first_half": 0.5}
    (tool,) = credit(
        Discrepancy(), attempt([1.0, -70.0, -2.0, 9.0, 1.0], mask=[True, False, True, False, True])
    )
    assert np.asarray(tool.weight_T).tolist() == pytest.approx([1.5, 1.0, 1.375, 1.0, 1.125])


ratios = st.lists(st.floats(-30, 30) | st.sampled_from([0.0, INF, -INF]), min_size=1, max_size=9)


@given(ratios=ratios, gamma=st.floats(0, 4))
def test_weights_are_the_definition(ratios: list[float], gamma: float) -> None:
    finite = all(map(math.isfinite, ratios))
    d = [abs(r) if finite else float(math.isinf(r)) for r in ratios]
    total = sum(d)
    wanted = [1 + gamma * (1 - (sum(d[:t]) / total if total else 0.0)) for t in range(len(d))]
    (share,) = credit(Discrepancy(gamma=gamma), attempt(ratios))
    weight_T = np.asarray(share.weight_T)
    # the target and the log-prob of the tokens are rounded, so their difference is too
    assert weight_T.tolist() == pytest.approx(wanted, abs=gamma * 1e-5 * len(d) if total > 1e-3 else 4)
    assert weight_T[0] == 1 + gamma
    assert (np.diff(weight_T) <= 0).all()
    assert ((weight_T >= 1) & (weight_T <= 1 + gamma)).all()


def test_infinite_values_share_alike_and_nan_counts_nothing() -> None:
    assert share_before(np.array([3.0, INF, 5.0, INF, 1.0])).tolist() == [0, 0, 0.5, 0.5, 1]
    assert share_before(np.array([1.0, math.nan, 1.0])).tolist() == [0, 0.5, 0.5]
    assert share_before(np.zeros(3)).tolist() == [0, 0, 0]
    assert share_before(np.zeros(0)).tolist() == []
    # the limit of values that grow together
    grown = share_before(np.array([3.0, 1e12, 5.0, 1e12, 1.0]))
    assert grown == pytest.approx([0, 0, 0.5, 0.5, 1], abs=1e-10)


def test_what_comes_later_changes_earlier_weights_but_never_the_first() -> None:
    firsts = {
        tuple(np.asarray(credit(Discrepancy(), attempt([1.0, 1.0, last]))[0].weight_T)[:2].tolist())
        for last in (0.0, 2.0, 6.0)
    }
    assert {weights[0] for weights in firsts} == {1.5}
    assert len({weights[1] for weights in firsts}) == 3


def test_the_current_student_may_be_compared_instead() -> None:
    one = attempt([1.0, 3.0], logp_T=[-2.0, -2.0])
    one.now = SampledTarget(teacher="now", logp_T=np.array([-4.0, -2.0], dtype=np.float32))
    (then,), (now,) = (credit(Discrepancy(student=side), one) for side in ("behaviour", "now"))
    assert np.asarray(then.weight_T).tolist() == pytest.approx([1.5, 1.375])
    assert np.asarray(now.weight_T).tolist() == pytest.approx([1.5, 1.25])
    assert (Discrepancy().requirements.now_topk, Discrepancy(student="now").requirements.now_topk) == (0, 1)


# --------------------------------------------------------------------------------------------------
# sign_gate


@pytest.mark.parametrize(("reward", "relu"), [(1.0, max), (0.0, min)])
def test_the_gated_advantage_is_the_relu_of_the_paper(reward: float, relu: Any) -> None:
    ratio_T = [2.0, -1.0, 0.5, -3.0]
    (share,) = credit(SignGate(), attempt(ratio_T, reward))
    assert (share.weight_T * np.array(ratio_T)).tolist() == [relu(0.0, r) for r in ratio_T]
    assert share.notes == {"conflicting": 0.5}


def test_who_agrees_at_the_edges() -> None:
    ratio_T, mask = [0.0, INF, -INF, math.nan, -5.0], [True, True, True, True, False]
    for reward, wanted in ((1.0, [2, 2, 0.5, 2, 1]), (0.0, [2, 0.5, 2, 2, 1])):
        (share,) = credit(SignGate(agreeing=2, conflicting=0.5), attempt(ratio_T, reward, mask))
        assert np.asarray(share.weight_T).tolist() == wanted
        assert share.notes == {"conflicting": 0.25}
    (at,) = credit(SignGate(threshold=0.7), attempt([-1.0], 0.7))
    (below,) = credit(SignGate(threshold=0.7), attempt([-1.0], 0.69))
    assert (float(at.weight_T[0]), float(below.weight_T[0])) == (0.0, 1.0)  # type: ignore[index]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_who_is_left_alone(rule: Any) -> None:
    error, empty = attempt([1.0, -1.0], 1.0, finish="error"), attempt([], 1.0)
    nothing = attempt([1.0, -1.0], 1.0, mask=[False, False])
    assert credit(rule, error, empty, nothing) == [Credit()] * 3
    for unjudged in (attempt([-1.0, 2.0], None), attempt([-1.0, 2.0], 1.0, finish="timeout")):
        if isinstance(rule, SignGate):
            assert credit(rule, unjudged) == [Credit()]
    unscored = attempt([-1.0, 2.0], 1.0)
    unscored.answers.clear()
    if isinstance(rule, Unlikely):
        # it asks neither a teacher nor a verifier
        assert np.asarray(credit(rule, unscored)[0].advantage_offset_T).any()
    else:
        assert credit(rule, unscored) == [Credit()]


def test_an_attempt_gate_is_balance_of_one_class_in_groups_of_one_too() -> None:
    for ratio, kept in ((INF, [1.0, 0.0, 1.0]), (0.0, [0.0, 1.0, 1.0])):
        rule = Balance(ratio)
        assert rule.min_group == 1
        attempts = [attempt([1.0], reward) for reward in (1.0, 0.0, None)]
        assert [rule([one], NOW)[0].weight_T for one in attempts] == kept
        assert [share.weight_T for share in rule(attempts, NOW)] == kept
    assert (Balance().min_group, Balance("none").min_group) == (2, 2)


# --------------------------------------------------------------------------------------------------
# through the loss


def judged() -> list[Group]:
    """Two groups with a teacher's word, verdicts, and the text of a tool in one attempt."""
    teacher, groups = as_model(tiny.net(2).double(), character_tokenizer()), []
    for seed, lengths in enumerate(((7, 4), (9, 1))):
        groups.append([])
        for sample, length in enumerate(lengths):
            mask = [t not in (2, 3) for t in range(length)]
            spoken = rollout(length, seed=seed, sample=sample, mask=mask)
            one = tiny.attempt(spoken)
            one.reward = Reward(float(sample))
            known_T = spoken.logp_T + np.sin(np.arange(length) + 1).astype(np.float32)
            target = replace(tiny.hidden(teacher, spoken), logp_T=known_T)
            one.answers["main"] = TeacherAnswer(target=target)
            groups[-1].append(one)
    return groups


def gradient(rules: dict[str, Any], objective: Any, **fields: Any) -> dict[str, Any]:
    groups = judged()
    share_credit(groups, rules, NOW)
    learner = tiny.learner(tiny.net(1).double(), **fields)
    return gradients(learner, groups, [objective], "token-mean")


def test_gated_and_inverse_gated_gradients_add_up_to_the_plain_one() -> None:
    """Proposition A.2 of the paper as it is described: the plain gradient is the gated one and a conflict."""
    kl = SampledKL(ratio="none")
    gated, conflict = (
        gradient({"gate": SignGate(agreeing=a, conflicting=c)}, kl) for a, c in ((1, 0), (0, 1))
    )
    plain = gradient({}, kl)
    close({name: value + conflict[name] for name, value in gated.items()}, plain, rtol=1e-6)
    assert all(float(part["model.embed_tokens.weight"].abs().max()) > 1e-4 for part in (gated, conflict))


@pytest.mark.parametrize("kind", RULES)
def test_how_the_batch_is_cut_changes_no_gradient(kind: str) -> None:
    objective = PolicyGradient(ratio="none") if kind == "unlikely" else SampledKL(ratio="none")
    whole = gradient({kind: RULES[kind]}, objective)
    for budget in (1, 14):
        close(whole, gradient({kind: RULES[kind]}, objective, micro_batch_tokens=budget), rtol=1e-9)


@pytest.mark.parametrize("kind", RULES)
def test_what_the_student_did_not_choose_changes_no_weight(kind: str) -> None:
    plain, changed = judged(), judged()
    for group in changed:
        for one in group:
            target = one.target("main")
            assert target is not None
            assert target.logp_T is not None
            for values_T in (one.rollout.logp_T, target.logp_T):
                values_T[~one.rollout.mask_T] = -77.0
    share_credit(plain, {kind: RULES[kind]}, NOW)
    share_credit(changed, {kind: RULES[kind]}, NOW)
    for one, other in zip(itertools.chain(*plain), itertools.chain(*changed), strict=True):
        assert np.array_equal(one.weight_T, other.weight_T)
        assert np.array_equal(one.advantage_offset_T, other.advantage_offset_T)


# --------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        (Unlikely, {"advantage": INF}, "advantage must be a finite number"),
        (Unlikely, {"share": 0.0}, "share"),
        (Unlikely, {"max_probability": 1.5}, "max_probability"),
        (Discrepancy, {"gamma": -0.1}, "gamma"),
        (Discrepancy, {"gamma": INF}, "gamma"),
        (SignGate, {"conflicting": -1.0}, "conflicting"),
        (SignGate, {"agreeing": INF}, "agreeing"),
        (SignGate, {"threshold": math.nan}, "threshold must be a finite reward"),
    ],
)
def test_settings_without_a_meaning_are_refused(part: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part(**fields)
