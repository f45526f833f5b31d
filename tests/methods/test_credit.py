"""Credit rules: the credit of each, and the laws of every rule (neutral, commuting, pure, no effect)."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.config.registry import kind_of
from reflux.config.schedules import Linear, Steps
from reflux.config.step_context import StepContext
from reflux.credit import CREDIT
from reflux.credit.balance import Balance
from reflux.credit.base import share_credit
from reflux.credit.discrepancy import Discrepancy
from reflux.credit.freshness import Freshness
from reflux.credit.group_advantage import GroupAdvantage, group_advantages
from reflux.credit.margin import Margin
from reflux.credit.position import Position
from reflux.credit.prefix import Prefix
from reflux.credit.release import Release
from reflux.credit.sign_gate import SignGate
from reflux.credit.unlikely import Unlikely
from reflux.types import (
    Attempt,
    Finish,
    Group,
    Prompt,
    Reward,
    SampledTarget,
    TeacherAnswer,
    TokenRollout,
    TopKTarget,
)

NOW = StepContext(step=0, seed=0)


@dataclass(frozen=True)
class Setting:
    """How the properties below run a rule: somewhere it acts, and where it is the identity."""

    acting: Any
    neutral: Any


SETTINGS = {
    "prefix": Setting(Prefix(2), Prefix(1000)),
    "position": Setting(Position(Linear(start=1.0, stop=0.0, horizon=3)), Position(1.0)),
    "group_advantage": Setting(GroupAdvantage(), GroupAdvantage(nats=0.0)),
    "margin": Setting(Margin(), Margin(delta=-math.inf)),
    "balance": Setting(Balance(0.0), Balance("none")),
    "freshness": Setting(
        Freshness(drift="sampled", floor=0.1), Freshness(alpha=0.0, beta=0.0, lag_power=0.0, floor=0.0)
    ),
    "discrepancy": Setting(Discrepancy(), Discrepancy(gamma=0.0)),
    "sign_gate": Setting(SignGate(conflicting=0.3), SignGate(conflicting=1.0)),
    "unlikely": Setting(Unlikely(), Unlikely(advantage=0.0)),
    "release": Setting(Release(segments=1, min_segments=2, min_side=1, min_gain=-9.0), Release(segments=1)),
}


def attempt(
    mask: list[bool], reward: float | None = None, finish: Finish = "stop", sample: int = 0
) -> Attempt:
    mask_T = np.array(mask, dtype=bool)
    ids_T, logp_T = np.zeros(len(mask_T), dtype=np.int64), np.zeros(len(mask_T), dtype=np.float32)
    made = {
        "prompt": Prompt("p", ()),
        "sample": sample,
        "version": 0,
        "finish": finish,
        "mask_T": mask_T,
        "logp_T": logp_T,
    }
    rollout = TokenRollout(**made, prompt_tokens=ids_T, tokens_T=ids_T, text="", messages=())
    return Attempt(rollout, reward=Reward(reward))


def objective_teachers(one: Attempt) -> Attempt:
    """With a teacher's word, which tells the student's candidates apart at the first position only."""
    length = one.rollout.length
    logp_TK = np.full((length, 4), -1.4, dtype=np.float32)
    logp_TK[:1, 0] = -0.1
    target = SampledTarget(teacher="main", logp_T=np.full(length, -0.5, dtype=np.float32))
    ids_TK = np.zeros((length, 4), dtype=np.int64)
    candidates = TopKTarget(teacher="main", ids_TK=ids_TK, logp_TK=logp_TK, logp_T=np.zeros(length))
    one.answers["main"] = TeacherAnswer(target=target, candidates=candidates)
    return one


def number(note: Any) -> float:
    """A note's value, where it is a metric."""
    return note if isinstance(note, float | int) else note.value


def group() -> Group:
    """Tool text in the middle, a plain one, nothing chosen, an empty one, an error, one not judged."""
    return [objective_teachers(one) for one in _group()]


def _group() -> Group:
    return [
        attempt([True, False, False, True, True], 1.0),
        attempt([True] * 4, 0.0),
        attempt([False] * 3, 0.0),
        attempt([], 1.0),
        attempt([True] * 3, 1.0, finish="error"),
        attempt([True, True], None),
    ]


def weights(credit: dict[str, Any], step: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    attempts = group()
    share_credit([attempts], credit, StepContext(step=step, seed=0))
    return [(one.weight_T, one.advantage_offset_T) for one in attempts]


def same(a: list[tuple[np.ndarray, np.ndarray]], b: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return all(
        np.array_equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", CREDIT)
def test_every_rule_has_a_neutral_setting_that_changes_no_bit(kind):
    assert kind in SETTINGS, f"'{kind}' is registered but has no setting in tests/methods/test_credit.py"
    rules = SETTINGS[kind]
    assert kind_of("credit", rules.acting) == kind_of("credit", rules.neutral) == kind
    assert same(weights({kind: rules.neutral}), weights({}))
    assert not same(weights({kind: rules.acting}), weights({}))


@pytest.mark.parametrize("kind", CREDIT)
def test_every_rule_keeps_shape_sign_and_silence(kind):
    rule, attempts = SETTINGS[kind].acting, group()
    for _ in range(2):
        # pure: asking twice says the same
        share_credit([attempts], {kind: rule}, NOW)
    for one in attempts:
        weight_T, advantage_offset_T = one.weight_T, one.advantage_offset_T
        assert weight_T.dtype == advantage_offset_T.dtype == np.float32
        assert weight_T.shape == advantage_offset_T.shape == one.rollout.mask_T.shape
        assert (weight_T >= 0).all()
        assert np.isfinite(weight_T).all()
        assert np.isfinite(advantage_offset_T).all()
        assert (weight_T[~one.rollout.mask_T] == 0).all()
        assert all(math.isfinite(note) for note in map(number, one.credits[kind].notes.values()))
    # ended in an error
    assert not attempts[4].weight_T.any()
    if rule.gives_offsets:
        assert not attempts[4].advantage_offset_T.any()
        # not judged
        assert not attempts[5].advantage_offset_T.any() or not rule.requirements.reward
    else:
        assert all(not one.advantage_offset_T.any() for one in attempts)
    assert rule([], NOW) == []


def test_rules_commute_to_the_bit():
    rules = {kind: setting.acting for kind, setting in SETTINGS.items()}
    plain = weights(rules)
    rng = random.Random(0)
    orders = [list(rules)[::-1], *(rng.sample(list(rules), len(rules)) for _ in range(300))]
    for order in orders:
        assert same(weights({kind: rules[kind] for kind in order}), plain)


# --------------------------------------------------------------------------------------------------
# prefix


def test_prefix_counts_chosen_positions_only():
    mask = [False, True, True, False, True, True]
    (share,) = Prefix(2)([attempt(mask)], NOW)
    assert share.weight_T.tolist() == [1, 1, 1, 1, 0, 0]
    assert share.notes == {"kept": 0.5}
    assert not np.any(share.advantage_offset_T)
    assert Prefix(1)([attempt([True, False, False, True])], NOW)[0].notes == {"kept": 0.5}
    (window,) = Prefix(2, start=1)([attempt(mask)], NOW)
    assert (window.weight_T * mask).tolist() == [0, 0, 1, 0, 1, 0]


@given(mask=st.lists(st.booleans(), max_size=12), length=st.integers(1, 6), start=st.integers(0, 4))
def test_prefix_keeps_min_of_length_and_what_is_there(mask, length, start):
    one = attempt(mask)
    share_credit([[one]], {"prefix": Prefix(length, start)}, NOW)
    assert set(np.unique(one.weight_T)) <= {0.0, 1.0}
    kept = np.flatnonzero(one.weight_T)
    assert kept.tolist() == np.flatnonzero(mask)[start : start + length].tolist()
    if any(mask):
        assert one.credits["prefix"].notes["kept"] == pytest.approx(len(kept) / sum(mask))
        windows = [Prefix(length, length * w)([attempt(mask)], NOW)[0].weight_T for w in range(13)]
        # windows tile the attempt
        assert (sum(windows)[np.array(mask)] == 1).all()


def test_prefix_of_a_rollout_is_the_weight_of_the_cut_rollout():
    full = attempt([True, False, True, True, True])
    share_credit([[full]], {"prefix": Prefix(2)}, NOW)
    assert full.weight_T.tolist() == [1, 0, 1, 0, 0]
    assert attempt([True, False, True]).weight_T.tolist() == [1, 0, 1]


def test_prefix_length_follows_its_schedule_by_step_and_floors():
    rule = Prefix(Linear(start=1, increment=0.75))
    kept = [
        float(rule([attempt([True] * 8)], StepContext(step=step, seed=0))[0].weight_T.sum())
        for step in range(6)
    ]
    assert kept == [1, 1, 2, 3, 4, 4]
    assert Prefix(2.9)([attempt([True] * 8)], NOW)[0].weight_T.sum() == 2


def test_prefix_refuses_what_is_below_one_position():
    for bad in (0, -3, 0.5, math.nan, True, "64"):
        with pytest.raises(ValueError, match="length"):
            Prefix(bad)
    with pytest.raises(ValueError, match="start"):
        Prefix(4, start=-1)
    with pytest.raises(ValueError, match="step 3"):
        Prefix(Linear(start=3, increment=-1))([attempt([True])], StepContext(step=3, seed=0))


# --------------------------------------------------------------------------------------------------
# position


def test_position_reads_its_schedule_over_chosen_positions_not_steps():
    one = attempt([True, False, True, True])
    for step in (0, 7):
        (share,) = Position(Linear(start=1.0, stop=0.0, horizon=2))([one], StepContext(step=step, seed=0))
        assert share.weight_T.tolist() == [1.0, 1.0, 0.5, 0.0]
        assert share.notes == {"weight": 0.5}


def test_position_of_one_and_zero_is_a_prefix():
    cut = Position(Steps(values=(1.0, 0.0), boundaries=(2,)))
    assert same(weights({"position": cut}), weights({"prefix": Prefix(2)}))


def test_position_refuses_negative_weights():
    with pytest.raises(ValueError, match="weight"):
        Position(-0.5)
    with pytest.raises(ValueError, match="position 2"):
        Position(Linear(start=1, increment=-0.75))([attempt([True] * 4)], NOW)


# --------------------------------------------------------------------------------------------------
# outcome


def test_group_advantages_by_hand():
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([2.0, None, 0.0]) == [1.0, 0.0, -1.0]
    # unbiased standard deviation of 1, 0, 0, 1
    spread = math.sqrt(1 / 3) + 1e-6
    assert group_advantages([1.0, 0.0, 0.0, 1.0], normalise_std=True) == pytest.approx(
        [0.5 / spread, -0.5 / spread, -0.5 / spread, 0.5 / spread]
    )


def test_leave_one_out_by_hand_and_by_the_exact_relation():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], baseline="others") == pytest.approx(
        [2 / 3, -2 / 3, -2 / 3, 2 / 3]
    )
    assert group_advantages([2.0, None, 0.0], baseline="others") == [2.0, 0.0, -2.0]
    assert group_advantages([0.1] * 7, baseline="others") == [0.0] * 7


def test_group_advantages_at_the_edges():
    assert group_advantages([]) == []
    assert group_advantages([3.0]) == [0.0]
    assert group_advantages([None, None]) == [0.0, 0.0]
    for std in (False, True):
        # the mean of 0.1 is rounded; it must not leak
        assert group_advantages([0.1] * 7, std) == [0.0] * 7
        assert group_advantages([0.1, None, 0.1], std) == [0.0] * 3
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="reward 1"):
            group_advantages([0.0, bad])


rewards = st.lists(
    st.one_of(st.none(), st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))), max_size=8
)


@given(rewards=rewards, constant=st.floats(-5, 5), scale=st.floats(0.5, 20), std=st.booleans())
def test_group_advantages_are_centred_shift_free_and_with_std_scale_free(rewards, constant, scale, std):
    made = group_advantages(rewards, std)
    assert math.fsum(made) == pytest.approx(0, abs=1e-9)
    moved = group_advantages([None if r is None else r + constant for r in rewards], std)
    assert moved == pytest.approx(made, abs=1e-6 if not std else 1e-3)
    scaled = group_advantages([None if r is None else r * scale for r in rewards], std)
    if std and len({r for r in rewards if r is not None}) > 1:
        known = [r for r in rewards if r is not None]
        assert scaled == pytest.approx(made, rel=4e-6 / np.std(known, ddof=1) + 1e-9, abs=1e-9)
    elif not std:
        assert scaled == pytest.approx([scale * a for a in made], rel=1e-9, abs=1e-9)


@given(rewards=rewards, std=st.booleans())
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(rewards, std):
    made = group_advantages(rewards, std, baseline="others")
    known = [r for r in rewards if r is not None]
    scale = np.std(known, ddof=1) + 1e-6 if std and len(set(known)) > 1 else 1.0
    for i, (reward, advantage) in enumerate(zip(rewards, made, strict=True)):
        others = [r for j, r in enumerate(rewards) if j != i and r is not None]
        alone = reward is None or not others
        assert advantage == pytest.approx(0.0 if alone else (reward - np.mean(others)) / scale, abs=1e-9)
    mean = group_advantages(rewards, std)
    if len(known) > 1:
        factor = len(known) / (len(known) - 1)
        assert made == pytest.approx([factor * advantage for advantage in mean], rel=1e-12)


@pytest.mark.parametrize(("baseline", "factor"), [("others", 1.0), ("mean", 2 / 3)])
def test_the_expected_gradient_of_three_attempts_by_enumeration(baseline, factor):
    """Answers of one of 4 tokens; the exact gradient of the expected reward is p_v (r_v - E r)."""
    p_V, reward_V = np.array([0.4, 0.3, 0.2, 0.1]), [0.0, 1.0, 0.25, 0.7]
    exact_V = p_V * (np.array(reward_V) - p_V @ reward_V)
    found_V = np.zeros(4)
    for tokens in itertools.product(range(4), repeat=3):
        made = group_advantages([reward_V[token] for token in tokens], baseline=baseline)
        for token, advantage in zip(tokens, made, strict=True):
            found_V += np.prod(p_V[list(tokens)]) * advantage * (np.eye(4)[token] - p_V) / 3
    assert found_V == pytest.approx(factor * exact_V, abs=1e-12)


def test_outcome_shifts_every_position_alike_and_ignores_errors_and_the_unjudged():
    # judged: 1, 0, 0, 1; the error's reward of 1 and the missing one stay out
    shares = GroupAdvantage()(group(), NOW)
    assert [share.advantage_offset_T for share in shares] == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0]
    assert all(share.weight_T == 1.0 and share.notes == {"mixed": 1.0} for share in shares)
    alike = GroupAdvantage(normalise_std=True)([attempt([True], 1.0), attempt([True], 1.0)], NOW)
    assert [(share.advantage_offset_T, share.notes["mixed"]) for share in alike] == [(0.0, 0.0)] * 2


def test_outcome_worth_follows_its_schedule():
    shares = GroupAdvantage(nats=Linear(start=1.0, increment=1.0))(
        [attempt([True], 1.0), attempt([True], 0.0)], StepContext(step=2, seed=0)
    )
    assert [share.advantage_offset_T for share in shares] == [1.5, -1.5]


def test_rules_declare_what_they_want():
    assert GroupAdvantage().requirements.reward
    assert GroupAdvantage().min_group == 2
    assert GroupAdvantage().gives_offsets
    assert not Prefix(4).requirements.reward
    assert not Prefix(4).gives_offsets
    assert not Position(1.0).gives_offsets
    with pytest.raises(ValueError, match="std_floor"):
        GroupAdvantage(std_floor=0.0)
