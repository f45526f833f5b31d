"""f-OPD: the freshness of an attempt, its two drifts and the weight, each against its definition."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from reflux import checks
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.freshness import Freshness, freshness, weight
from reflux.errors import ConfigError
from reflux.metrics.values import EffectiveShare, jsonable
from reflux.models.flow.sde import kl_weight
from reflux.teachers.collection import Teachers
from reflux.types import (
    Attempt,
    FlowRollout,
    HiddenTarget,
    Prompt,
    SampledTarget,
    TeacherAnswer,
    TokenRollout,
    TopKTarget,
    VelocityTarget,
)

drifts = st.floats(0, 50)
V = 6


# --- the formula


@given(st.integers(0, 40), drifts, drifts, st.floats(0, 3), st.floats(0, 3), st.floats(0, 2))
def test_freshness_is_its_formula(
    lag: int, roll: float, sup: float, alpha: float, beta: float, power: float
) -> None:
    f = freshness(lag, roll, sup, alpha, beta, power)
    assert f == pytest.approx(
        1 / (1 + lag) ** power * math.exp(-alpha * math.sqrt(roll)) * math.exp(-beta * math.sqrt(sup))
    )
    assert 0 <= f <= 1


@given(st.integers(0, 20), st.floats(0, 9), st.floats(0, 9), st.floats(1e-3, 2))
def test_it_falls_with_lag_and_with_each_drift_that_has_a_coefficient(
    lag: int, roll: float, sup: float, more: float
) -> None:
    f = freshness(lag, roll, sup)
    assert freshness(lag + 1, roll, sup) < f
    assert freshness(lag, roll + more, sup) < f
    assert freshness(lag, roll, sup + more) < f
    assert freshness(lag, roll + more, sup, alpha=0.0) == freshness(lag, roll, sup, alpha=0.0)
    assert freshness(lag, roll, sup + more, beta=0.0) == freshness(lag, roll, sup, beta=0.0)


def test_it_is_1_only_without_lag_and_drift_and_0_at_an_infinite_drift() -> None:
    assert freshness(0, 0.0, 0.0) == 1
    assert freshness(0, -1e-7, -1e-7) == 1
    assert freshness(0, math.inf) == 0
    assert freshness(0, 0.0, math.inf) == 0
    assert freshness(2, math.inf, math.inf, alpha=0.0, beta=0.0) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lag": -1}, "lag must be finite and at least 0"),
        ({"alpha": -0.1}, "alpha must be finite"),
        ({"beta": math.nan}, "beta must be finite"),
        ({"lag_power": math.inf}, "lag_power must be finite"),
        ({"rollout_drift": -1e-3}, "rollout_drift is a KL in nats"),
        ({"supervision_drift": math.nan}, "supervision_drift is a KL in nats"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        freshness(**{"lag": 0, "rollout_drift": 0.0, **values})


def test_the_weight_is_what_is_above_the_floor() -> None:
    assert [weight(f, 0.2) for f in (0.0, 0.2, 0.5, 1.0)] == pytest.approx([0, 0, 0.3, 0.8])
    for f, floor in ((1.1, 0.0), (-0.1, 0.0), (math.nan, 0.0), (0.5, 1.0), (0.5, -0.1)):
        with pytest.raises(ValueError, match="f must lie in"):
            weight(f, floor)


# --- the drifts of an attempt


def logp(seed: int, rows: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, V)) * 1.5
    return (drawn - np.log(np.exp(drawn).sum(1, keepdims=True))).astype(np.float32)


def full(name: str, logp_TV: np.ndarray, tokens_T: np.ndarray) -> TopKTarget:
    ids_TV = np.tile(np.arange(V), (len(logp_TV), 1))
    return TopKTarget(
        teacher=name, ids_TK=ids_TV, logp_TK=logp_TV, logp_T=logp_TV[np.arange(len(tokens_T)), tokens_T]
    )


def attempt(then_TV: np.ndarray, now_TV: np.ndarray | None, tokens: list[int], **fields: Any) -> Attempt:
    tokens_T = np.array(tokens)
    behaviour = full("behaviour", then_TV, tokens_T)
    prompt = Prompt("p", ({"role": "user", "content": "q"},))
    rollout = TokenRollout(
        prompt=prompt,
        sample=0,
        version=3,
        finish="stop",
        mask_T=np.ones(len(tokens_T), dtype=bool),
        logp_T=behaviour.logp_T,
        behaviour=behaviour,
        prompt_tokens=np.array([1]),
        tokens_T=tokens_T,
        text="",
        messages=prompt.messages,
    )
    made = Attempt(replace(rollout, **fields))
    made.answers["main"] = TeacherAnswer(target=SampledTarget(teacher="main", logp_T=behaviour.logp_T))
    made.now = None if now_TV is None else full("now", now_TV, tokens_T)
    return made


def share(rule: Freshness, made: Attempt, version: int) -> Any:
    (credit,) = rule([made], StepContext(step=9, seed=0, version=version))
    return credit


def test_the_drift_of_the_rollout_is_the_mean_kl_of_the_student_now_from_the_one_that_sampled() -> None:
    then, now = logp(1, 3), logp(2, 3)
    p, q = np.exp(now.astype(np.float64)), np.exp(then.astype(np.float64))
    kl_T = (p * np.log(p / q)).sum(1)
    mask = np.array([True, False, True])
    credit = share(Freshness(floor=0.0, alpha=0.7), attempt(then, now, [0, 1, 2], mask_T=mask), 5)
    drift = kl_T[mask].mean()
    assert credit.notes["rollout_drift"] == pytest.approx(drift, abs=1e-6)
    assert credit.weight_T == pytest.approx(math.exp(-0.7 * math.sqrt(drift)) / 3, abs=1e-6)
    assert credit.notes["lag"] == 2
    # the other direction is another number
    assert drift != pytest.approx((q * np.log(q / p)).sum(1)[mask].mean(), rel=1e-2)


@pytest.mark.parametrize("drift", ["exact", "sampled"])
def test_a_position_of_the_current_version_has_no_drift_and_the_lag_is_that_of_the_oldest(drift: Any) -> None:
    then, now = logp(1, 4), logp(2, 4)
    rule, version_T = Freshness(floor=0.0, drift=drift), np.array([3, 4, 5, 5])
    mixed = share(rule, attempt(then, now, [0, 1, 2, 3], version_T=version_T), 5)
    old = share(rule, attempt(then[:2], now[:2], [0, 1]), 5)
    # the mean over all four positions, two of which are exactly 0
    assert mixed.notes["rollout_drift"] == pytest.approx(old.notes["rollout_drift"] / 2, rel=1e-6)
    assert (mixed.notes["lag"], old.notes["lag"]) == (2, 2)


def test_at_lag_0_there_is_no_drift_by_definition_and_nothing_is_observed() -> None:
    credit = share(Freshness(floor=0.25), attempt(logp(1, 2), None, [0, 1]), 3)
    assert credit.weight_T == 0.75
    assert credit.notes["rollout_drift"] == 0
    assert share(Freshness(floor=0.25, rescale=True), attempt(logp(1, 2), None, [0, 1]), 3).weight_T == 1


def test_the_sampled_drift_has_the_kl_as_its_expectation() -> None:
    """E over a ~ p_then of rho log rho - rho + 1 is KL(p_now || p_then), by enumeration (identity 7)."""
    then, now = logp(3, 1), logp(4, 1)
    rule = Freshness(drift="sampled", floor=0.0)
    drifts = [share(rule, attempt(then, now, [a]), 4).notes["rollout_drift"] for a in range(V)]
    p, q = np.exp(now[0].astype(np.float64)), np.exp(then[0].astype(np.float64))
    assert min(drifts) >= 0
    assert float(np.dot(q, drifts)) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-6)


def test_a_small_parameter_step_moves_the_root_of_the_drift_linearly() -> None:
    then = logp(5, 4)
    direction = np.random.default_rng(0).normal(size=then.shape)

    def root(size: float) -> float:
        moved = then + size * direction
        moved = (moved - np.log(np.exp(moved).sum(1, keepdims=True))).astype(np.float32)
        return math.sqrt(share(Freshness(), attempt(then, moved, [0] * 4), 4).notes["rollout_drift"])

    assert root(0.1) / root(0.05) == pytest.approx(2, rel=0.05)


def test_the_drift_of_the_supervision_is_that_of_the_new_answer() -> None:
    made = attempt(logp(1, 3), None, [0, 1, 2], mask_T=np.array([True, True, False]))
    target = made.answers["main"].target
    drift_T = np.array([0.2, 0.6, 7.0])
    made.answers["main"] = TeacherAnswer(target=target, previous=target, drift_T=drift_T)
    credit = share(Freshness(floor=0.0, beta=2.0), made, 3)
    assert credit.weight_T == pytest.approx(math.exp(-2 * math.sqrt(0.4)))
    assert credit.notes["supervision_drift"] == pytest.approx(0.4)


def test_teachers_measure_the_new_answer_from_the_old_one() -> None:
    """KL(teacher in its present context || in its first one), in this order."""
    then, now, tokens_T = logp(6, 2), logp(7, 2), np.array([0, 1])
    again, once = (attempt(logp(1, 2), None, [0, 1]) for _ in range(2))
    again.answers["main"] = TeacherAnswer(
        target=full("main", now, tokens_T), previous=full("main", then, tokens_T)
    )
    teachers = Teachers({}, Requirements(supervision_drift=True), tiny.services())
    asyncio.run(teachers.follow_up([[again, once]]))
    p, q = np.exp(now.astype(np.float64)), np.exp(then.astype(np.float64))
    np.testing.assert_allclose(again.answers["main"].drift_T, (p * np.log(p / q)).sum(1), atol=1e-6)
    assert once.answers["main"].drift_T is None
    asyncio.run(Teachers({}, Requirements(), tiny.services()).follow_up([[again]]))


def test_the_drift_of_hidden_states_is_exact_and_never_below_0(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = tiny.rollout(5, seed=3)
    models = [tiny.learner(tiny.net(seed)).model for seed in (1, 2)]
    one, other = (tiny.hidden(model, spoken) for model in models)
    p_TV, q_TV = (
        tiny.HEADS[each.head].logits(each.h_TH).double().softmax(-1).detach().cpu().numpy()
        for each in (one, other)
    )
    found = one.drift_T(other, spoken, tiny.HEADS)
    np.testing.assert_allclose(found, (p_TV * np.log(p_TV / q_TV)).sum(1), atol=1e-5)
    assert one.drift_T(SampledTarget(teacher="main", logp_T=spoken.logp_T), spoken, tiny.HEADS) is None
    # Sums over a large vocabulary round to numbers below 0.
    monkeypatch.setattr(HiddenTarget, "kl_T", lambda *_: np.array([-1e-5, 0.5]))
    assert one.drift_T(other, spoken, tiny.HEADS).tolist() == [0.0, 0.5]


def unanswered() -> Attempt:
    made = attempt(logp(1, 2), logp(2, 2), [0, 1])
    made.answers["main"] = TeacherAnswer(error="timeout", previous=made.answers["main"].target)
    return made


def never_answered() -> Attempt:
    made = attempt(logp(1, 2), logp(2, 2), [0, 1])
    made.answers["main"] = TeacherAnswer(error="timeout")
    return made


def incomparable() -> Attempt:
    made = attempt(logp(1, 2), logp(2, 2), [0, 1])
    target = made.answers["main"].target
    made.answers["main"] = TeacherAnswer(target=target, previous=target)
    return made


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(attempt(logp(1, 2), None, [0, 1]), id="the current student was not observed"),
        pytest.param(attempt(logp(1, 2), logp(2, 2), [0, 1], behaviour=None), id="no lists at sampling"),
        pytest.param(unanswered(), id="the teacher failed when asked again"),
        pytest.param(never_answered(), id="the teacher never answered"),
        pytest.param(incomparable(), id="answers that cannot be compared"),
    ],
)
def test_what_cannot_be_compared_has_weight_0_and_is_counted(made: Attempt) -> None:
    credit = share(Freshness(floor=0.0), made, 4)
    assert credit.weight_T == 0
    assert (credit.notes["aligned"], credit.notes["zero"], credit.notes["freshness"]) == (0, 1, 0)


def test_an_infinite_drift_has_weight_0_and_stays_out_of_the_mean() -> None:
    then, now = logp(1, 1), logp(2, 1)
    then[0, 2] = -np.inf
    credit = share(Freshness(floor=0.0), attempt(then, now, [0]), 4)
    assert (credit.weight_T, credit.notes["aligned"]) == (0, 0)
    assert "rollout_drift" not in credit.notes


def test_attempts_without_positions_and_other_teachers_prompts_are_left_alone() -> None:
    for fields in ({"finish": "error"}, {"mask_T": np.zeros(2, dtype=bool)}):
        credit = share(Freshness(), attempt(logp(1, 2), None, [0, 1], **fields), 4)
        assert (credit.weight_T, credit.notes) == (1.0, {})
    # another teacher serves this prompt
    assert share(Freshness(teacher="other", floor=0.0), attempt(logp(1, 2), None, [0, 1]), 3).weight_T == 1


def test_the_drift_of_a_flow_is_that_of_its_velocities() -> None:
    rng, t_S = np.random.default_rng(0), np.array([1.0, 0.7, 0.4, 0.1], dtype=np.float32)
    then, now = (
        VelocityTarget(teacher=name, v_TD=rng.normal(size=(3, 5)).astype(np.float32))
        for name in ("behaviour", "now")
    )
    mask_T = np.array([True, True, False])
    rollout = FlowRollout(
        prompt=Prompt("p", ({"role": "user", "content": "q"},)),
        sample=0,
        version=0,
        finish="stop",
        mask_T=mask_T,
        logp_T=np.zeros(3, np.float32),
        behaviour=replace(then, v_TD=np.where(mask_T[:, None], then.v_TD, np.nan)),
        x_SD=np.zeros((4, 5), np.float32),
        t_S=t_S,
        noise_level=0.7,
        guidance=1.0,
        image=np.zeros((2, 2), np.uint8),
    )
    made = Attempt(rollout, now=now)
    weight_T = kl_weight(t_S[:-1].astype(float), np.diff(t_S).astype(float), 0.7)
    by_hand = (weight_T * ((now.v_TD - then.v_TD).astype(float) ** 2).sum(1))[:2].mean()
    assert share(Freshness(floor=0.0), made, 1).notes["rollout_drift"] == pytest.approx(by_hand)


# --- effective sample size


def test_the_effective_share_is_the_effective_sample_size_over_the_number() -> None:
    weights = [0.5, 0.1, 0.0, 0.9]
    one, other = (sum(map(EffectiveShare.of, part), EffectiveShare()) for part in (weights[:1], weights[1:]))
    assert (one + other).value == pytest.approx(sum(weights) ** 2 / sum(w**2 for w in weights) / 4)
    assert EffectiveShare.of(0.0).value == 0
    assert EffectiveShare().value is None
    assert jsonable({"effective": EffectiveShare.of(0.4)}) == {"effective": 1.0}


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_staleness": 19}, "max_staleness = 18 or less"),
        ({"max_staleness": 9, "credit.freshness.floor": 0.1}, "max_staleness = 8 or less"),
        ({"max_staleness": 3, "credit.freshness.floor": 0.3}, "max_staleness = 2 or less"),
        ({"max_staleness": 4, "credit.freshness": {"floor": 0.3, "lag_power": 0.5}}, None),
        ({"max_staleness": 12, "credit.freshness": {"floor": 0.3, "lag_power": 0.5}}, "= 10 or less"),
        ({"loss_aggregation": "token-mean-weighted"}, 'Use "token-mean" or "seq-mean-token-mean"'),
        ({"credit.freshness.teacher": "mian"}, "there is no teacher 'mian'"),
        ({"max_staleness": 0}, None),
        ({"credit.release": {"candidates": "now", "segments": 4}}, None),
        ({"credit.freshness": "none", "refresh.below": "none"}, None),
        ({"credit.freshness": {"floor": 0.0, "lag_power": 1000}}, None),
        ({"credit.freshness": "none"}, "Add .credit.freshness., or set refresh.below"),
        ({}, None),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], words: str | None, student: str, teacher: str
) -> None:
    cfg = tiny.config("fresh", student, teacher, **changes)
    if words is None:
        checks.join(cfg)
        return
    with pytest.raises(ConfigError, match=words):
        checks.join(cfg)


def test_a_refresh_without_staleness_is_said_to_have_no_effect(student: str, teacher: str) -> None:
    words = "refresh has no effect at max_staleness = 0"
    for max_staleness in (0, 2):
        cfg = tiny.config("fresh", student, teacher, max_staleness=max_staleness)
        assert any(words in text for text in checks.warnings(cfg)) == (max_staleness == 0)
