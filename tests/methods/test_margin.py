"""Uni-OPD's margin: returns, margins, shifts and the mask, from their definitions (identities 1 to 6 of the
method page).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from laws.estimators import World
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.balance import Balance
from reflux.credit.base import share_credit
from reflux.credit.margin import DIRECTIONS, MODES, Margin, margin, margin_keep, margin_shifts
from reflux.loss.term import Rows
from reflux.models.text import as_model
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, Finish, Group, Prompt, Reward, Rollout, SampledTarget, TeacherAnswer
from tiny import close, gradients, same

NOW = StepContext(0, 0)
INF, NAN = math.inf, math.nan
values = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
groups = st.lists(st.tuples(values, st.booleans()), max_size=8).map(
    lambda pairs: ([g for g, _ in pairs], [c for _, c in pairs])
)
mixed = groups.filter(lambda group: len(set(group[1])) == 2)
modes, directions = st.sampled_from(MODES), st.sampled_from(DIRECTIONS)
deltas = st.floats(-2, 2).map(lambda x: round(x, 3))


def defined(returns: list[float], correct: list[bool], mode: str) -> float | None:
    """The page's m, once more in numpy."""
    good, bad = (
        np.array([g for g, c in zip(returns, correct, strict=True) if c is wanted])
        for wanted in (True, False)
    )
    if not len(good) or not len(bad):
        return None
    return float(good.mean() - bad.mean()) if mode == "mean" else float(good.min() - bad.max())


def attempt(
    ratio: list[float | None] | None,
    reward: float | None,
    *,
    mask: list[bool] | None = None,
    finish: Finish = "stop",
    sample: int = 0,
    judged: bool = True,
) -> Attempt:
    """An attempt along which log q - log p is known; None in it: the teacher has no value there; no list: it
    said nothing.
    """
    length = len(ratio or [])
    own_T = -np.linspace(1, 2, length)
    rollout = Rollout(
        prompt=Prompt("p", ()),
        sample=sample,
        version=0,
        finish=finish,
        mask_T=np.ones(length, dtype=bool) if mask is None else np.array(mask),
        logp_T=own_T.astype(np.float32),
    )
    made = Attempt(rollout, reward=Reward(reward) if judged else None)
    if ratio is not None:
        said_T = np.array([NAN if r is None else r for r in ratio]) + own_T
        made.answers["main"] = TeacherAnswer(target=SampledTarget(teacher="main", logp_T=said_T))
    return made


def shifts(rule: Margin, group: Group) -> list[Any]:
    return [np.asarray(share.advantage_offset_T).round(6).tolist() for share in rule(group, NOW)]


# --- margins and shifts


def test_margins_by_hand() -> None:
    returns, correct = [0.1, -0.3, -0.5, 0.2], [True, True, False, False]
    assert margin(returns, correct, "mean") == pytest.approx(-0.1 - -0.15)
    assert margin(returns, correct, "minmax") == pytest.approx(-0.3 - 0.2)
    assert margin_shifts(returns, correct) == pytest.approx([0.175, 0.175, -0.175, -0.175])
    assert margin_shifts(returns, correct, direction="lift") == pytest.approx([0.35, 0.35, 0, 0])
    assert margin_shifts(returns, correct, direction="down") == pytest.approx([0, 0, -0.35, -0.35])
    assert margin_shifts(returns, correct, delta=0.0, mode="minmax") == pytest.approx(
        [0.25, 0.25, -0.25, -0.25]
    )


@given(group=groups, mode=modes)
def test_the_margin_is_that_of_its_definition(group: Any, mode: str) -> None:
    assert margin(*group, mode) == pytest.approx(defined(*group, mode))


@given(group=mixed, mode=modes, direction=directions, delta=deltas)
def test_after_a_shift_the_margin_is_the_larger_of_the_two_and_stays(
    group: Any, mode: str, direction: str, delta: float
) -> None:
    """Identity 1."""
    returns, correct = group
    before = defined(returns, correct, mode)
    assert before is not None
    given_ = margin_shifts(returns, correct, delta, mode, direction)
    moved = [g + s for g, s in zip(returns, given_, strict=True)]
    assert defined(moved, correct, mode) == pytest.approx(max(before, delta), abs=1e-9)
    assert margin_shifts(moved, correct, delta, mode, direction) == pytest.approx(
        [0.0] * len(moved), abs=1e-9
    )
    assert all(s == 0 for s in given_) == (before >= delta)


@given(group=groups, mode=modes, direction=directions, constant=st.floats(-5, 5))
def test_a_constant_added_to_all_returns_changes_no_shift(
    group: Any, mode: str, direction: str, constant: float
) -> None:
    returns, correct = group
    moved = margin_shifts([g + constant for g in returns], correct, 0.4, mode, direction)
    assert moved == pytest.approx(margin_shifts(returns, correct, 0.4, mode, direction), abs=1e-9)


@given(group=mixed, mode=modes, direction=directions)
def test_within_a_class_differences_survive(group: Any, mode: str, direction: str) -> None:
    """Identity 2, and each direction moves only the classes it names, the right way."""
    given_ = margin_shifts(*group, 0.4, mode, direction)
    for wanted, sign in ((True, 1), (False, -1)):
        own = {s for s, c in zip(given_, group[1], strict=True) if c is wanted}
        assert len(own) == 1
        assert sign * own.pop() >= 0
    up, down = max(given_), min(given_)
    assert {"spread": up == -down, "lift": down == 0, "down": up == 0}[direction]


@given(group=mixed, mode=modes)
def test_what_a_shift_does_to_the_mean_of_the_group(group: Any, mode: str) -> None:
    """Identity 3: spread with equal classes keeps it; lift raises it by lambda n_c / n."""
    returns, correct = group
    gap = max(0.0, 0.4 - (defined(returns, correct, mode) or 0.0))
    lifted = margin_shifts(returns, correct, 0.4, mode, "lift")
    assert np.mean(lifted) == pytest.approx(gap * np.mean(correct))
    spread = margin_shifts(returns * 2, [*correct, *(not c for c in correct)], 0.4, mode)
    assert np.mean(spread) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("correct", [[], [True], [False], [True] * 3, [False] * 3])
def test_an_empty_class_shifts_and_masks_nothing(mode: str, direction: str, correct: list[bool]) -> None:
    returns = [0.1 * i for i in range(len(correct))]
    assert margin(returns, correct, mode) is None
    assert margin_shifts(returns, correct, 0.4, mode, direction) == [0.0] * len(correct)
    assert margin_keep(returns, correct, 0.4, mode) == [True] * len(correct)


def test_a_margin_equal_to_delta_or_a_delta_of_minus_infinity_shifts_nothing() -> None:
    assert margin_shifts([0.5, 0.0], [True, False], 0.5) == [0.0, 0.0]
    assert margin_shifts([-9.0, 9.0], [True, False], -INF) == [0.0, 0.0]
    # a negative delta is legal
    assert margin_shifts([-1.0, 0.0], [True, False], -0.5) == [0.25, -0.25]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: margin([0.1], [True, False], "mean"), "got 1 returns and 2 verdicts"),
        (lambda: margin([0.1, NAN], [True, False], "mean"), "return of attempt 1 of the group is nan"),
        (lambda: margin_shifts([-INF, 0.1], [True, False]), "return of attempt 0 of the group is -inf"),
        (lambda: margin_keep([0.1, INF], [True, True]), "return of attempt 1 of the group is inf"),
        (lambda: margin([], [], "median"), "mode must be one of mean, minmax, got 'median'"),
        (lambda: margin_keep([], [], mode="median"), "mode must be one of"),
        (
            lambda: margin_shifts([], [], direction="up"),
            "direction must be one of spread, lift, down, got 'up'",
        ),
        (lambda: margin_shifts([], [], NAN), "delta must be a number"),
        (lambda: margin_shifts([], [], INF), "delta must be a number"),
        (lambda: margin_keep([], [], NAN), "delta must be a number"),
        (lambda: margin_keep([], [], retain=1.5), "0 <= retain <= 1"),
        (lambda: margin_keep([], [], retain=NAN), "0 <= retain <= 1"),
        (lambda: Margin(delta=NAN), "delta must be a number"),
        (lambda: Margin(delta=INF), "delta must be a number"),
        (lambda: Margin(retain=-0.1), "0 <= retain <= 1"),
        (lambda: Margin(threshold=NAN), "threshold must be a finite reward"),
        (lambda: Margin(action="mask", level="attempt"), "Remove level"),
    ],
)
def test_bad_input_is_refused_in_words(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call()


# --- the mask


def test_the_mask_by_hand() -> None:
    """m = -1/3; -1/30 without the lowest correct, -0.2 without the highest wrong: the correct one goes, then
    the wrong one for m = 0.1.
    """
    returns, correct = [-0.6, 0.0, 0.3, -0.1, -0.1], [True, True, False, False, False]
    assert margin_keep(returns, correct, delta=-0.35) == [True] * 5
    assert margin_keep(returns, correct, delta=-0.3) == [False, True, True, True, True]
    assert margin_keep(returns, correct, delta=0.0) == [False, True, False, True, True]
    # the rest are equal: nothing raises m
    assert margin_keep(returns, correct, delta=9.0) == [False, True, False, True, True]
    assert margin_keep(returns, correct, delta=9.0, retain=0.9) == [False, True, False, True, True]
    assert margin_keep(returns, correct, delta=9.0, retain=1.0) == [True] * 5


def test_the_mask_takes_the_correct_one_at_equal_gain() -> None:
    assert margin_keep([-1.0, 0.0, 1.0, 0.0], [True, True, False, False], delta=-0.6) == [
        False,
        True,
        True,
        True,
    ]


def slow_mask(
    returns: list[float], correct: list[bool], delta: float, mode: str, retain: float
) -> list[bool]:
    """The page's words, one drop at a time."""
    kept = set(range(len(returns)))
    floor = {side: max(1, math.floor(retain * correct.count(side))) for side in (True, False)}

    def measure(of: set[int]) -> float | None:
        chosen = sorted(of)
        return defined([returns[i] for i in chosen], [correct[i] for i in chosen], mode)

    while (m := measure(kept)) is not None and m < delta:
        best: tuple[float, int] | None = None
        for side, pick in ((True, min), (False, max)):
            own = [i for i in sorted(kept) if correct[i] is side]
            if len(own) > floor[side]:
                out = pick(own, key=lambda i: returns[i])
                gained = measure(kept - {out})
                assert gained is not None
                if best is None or gained > best[0] + 1e-12:
                    best = (gained, out)
        if best is None or best[0] <= m + 1e-12:
            break
        kept.remove(best[1])
    return [i in kept for i in range(len(returns))]


@given(group=groups, mode=modes, delta=deltas, retain=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_the_mask_follows_the_page_never_lowers_the_margin_and_keeps_its_floors(
    group: Any, mode: str, delta: float, retain: float
) -> None:
    # ties, and sums without rounding
    returns, correct = [round(8 * g) / 8 for g in group[0]], group[1]
    kept = margin_keep(returns, correct, delta, mode, retain)
    assert kept == slow_mask(returns, correct, delta, mode, retain)
    chosen = [i for i, k in enumerate(kept) if k]
    before, after = (
        margin(returns, correct, mode),
        margin([returns[i] for i in chosen], [correct[i] for i in chosen], mode),
    )
    if before is None or after is None:
        assert all(kept)
        return
    assert after >= before
    for side in (True, False):
        assert sum(correct[i] is side for i in chosen) >= max(1, math.floor(retain * correct.count(side)))


def test_equal_returns_are_not_dropped_by_rounding() -> None:
    for value, good, bad in itertools.product((0.1, 0.3, 0.7, -0.1, -1 / 3), range(2, 9), range(2, 9)):
        assert all(margin_keep([value] * (good + bad), [True] * good + [False] * bad, delta=INF))


# --- the rule


def test_the_return_is_the_raw_length_mean_over_chosen_positions_with_a_value() -> None:
    """Tool text and positions without a teacher value are left out; factors of others never enter."""
    group = [
        attempt([0.5, 99.0, 0.1, None], 1.0, mask=[True, False, True, True]),
        attempt([-0.2], 0.0, sample=1),
    ]
    for one in group:
        one.credits["other"] = Balance(0.0)(group, NOW)[0]
    first, second = Margin(delta=2.0)(group, NOW)
    assert first.notes == pytest.approx(
        {"margin": 0.5, "mixed_fraction": 1.0, "shifted_fraction": 1.0, "return_correct": 0.3}
    )
    assert second.notes["return_wrong"] == pytest.approx(-0.2)
    assert (first.advantage_offset_T, second.advantage_offset_T) == pytest.approx((0.75, -0.75))
    assert first.weight_T == second.weight_T == 1.0


@given(times=st.integers(1, 4))
def test_repeating_an_attempts_tokens_changes_no_shift(times: int) -> None:
    """Identity 3."""
    ratio: list[float | None] = [0.4, -0.6, 0.3]
    shared_cache = shifts(Margin(), [attempt(ratio, 1.0), attempt([0.2, 0.1], 0.0)])
    assert (
        shifts(Margin(), [attempt(ratio * times, 1.0), attempt([0.2, 0.1] * (5 - times), 0.0)])
        == shared_cache
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_levels_give_the_mean_advantage_g_plus_s(direction: Any) -> None:
    """Identity 2: (A) keeps the differences between tokens, (B) levels them."""
    group = [
        attempt([0.5, -0.7, 0.1], 1.0),
        attempt([0.3, 0.0], 0.0),
        attempt([-0.4, -0.2], 0.0),
        attempt([0.9], 1.0),
    ]
    token, flat = (
        Margin(delta=1.0, direction=direction, level=level)(group, NOW) for level in ("token", "attempt")
    )
    for one, a, b in zip(group, token, flat, strict=True):
        ratio_T = one.target("main").logp_T - one.rollout.logp_T  # type: ignore[union-attr]
        with_a, with_b = ratio_T + a.advantage_offset_T, ratio_T + b.advantage_offset_T
        assert with_b == pytest.approx(np.full(len(ratio_T), with_a.mean()), abs=1e-6)
        assert np.diff(with_a) == pytest.approx(np.diff(ratio_T), abs=1e-6)
        assert with_a.mean() == pytest.approx(ratio_T.mean() + float(a.advantage_offset_T), abs=1e-6)


def test_level_attempt_is_finite_where_the_teacher_has_no_value() -> None:
    share = Margin(level="attempt")([attempt([0.5, None, 0.1], 1.0), attempt([0.0], 0.0)], NOW)[0]
    assert np.isfinite(share.advantage_offset_T).all()


def test_a_teacher_that_is_the_student_leaves_pure_reinforcement() -> None:
    """Identity 4: r = 0, m = 0."""
    group = [attempt([0.0] * n, reward) for n, reward in ((3, 1.0), (1, 0.0), (2, 1.0), (4, 0.0), (2, 0.0))]
    assert shifts(Margin(), group) == pytest.approx([0.2, -0.2, 0.2, -0.2, -0.2])
    assert shifts(Margin(delta=0.0), group) == [0.0] * 5


def test_who_has_no_verdict_or_no_return_stays_outside() -> None:
    inside = [attempt([0.1, -0.1], 1.0), attempt([0.3], 0.0)]
    outside = [
        # not judged
        attempt([9.0], None),
        # a verdict that is no number
        attempt([9.0], NAN),
        attempt([9.0], 1.0, judged=False),
        attempt([9.0], 1.0, finish="error"),
        # an empty answer
        attempt([], 1.0),
        attempt([9.0, 9.0], 0.0, mask=[False, False]),
        # the teacher has no value anywhere
        attempt([None, None], 0.0),
        # the teacher was not asked
        attempt(None, 0.0),
    ]
    for rule in (
        Margin(),
        Margin(level="attempt"),
        Margin(action="mask"),
        Margin(mode="minmax", direction="lift"),
    ):
        alone, beside = rule(inside, NOW), rule([*inside, *outside], NOW)
        for one, other in zip(alone, beside, strict=False):
            assert np.array_equal(one.advantage_offset_T, other.advantage_offset_T)
            assert one.weight_T == other.weight_T
        assert all(
            share.weight_T == 1.0 and not np.any(share.advantage_offset_T) for share in beside[len(inside) :]
        )
        assert all("return_wrong" not in share.notes for share in beside[len(inside) :])
    assert shifts(Margin(), outside) == [0.0] * len(outside)


def test_classes_by_threshold() -> None:
    group = [attempt([0.0], 0.7), attempt([0.0], 0.3), attempt([0.0], 0.5)]
    assert shifts(Margin(), group) == pytest.approx([0.2, -0.2, 0.2])
    assert shifts(Margin(threshold=0.6), group) == pytest.approx([0.2, -0.2, -0.2])
    assert shifts(Margin(threshold=0.8), group) == [0.0] * 3


def test_notes_tell_mixed_from_shifted_and_returns_by_class_and_finish() -> None:
    apart = [attempt([1.0], 1.0), attempt([0.0], 0.0, finish="length")]
    notes = [share.notes for share in Margin()(apart, NOW)]
    assert notes[0] == pytest.approx(
        {"margin": 1.0, "mixed_fraction": 1.0, "shifted_fraction": 0.0, "return_correct": 1.0}
    )
    assert notes[1] == pytest.approx(
        {
            "margin": 1.0,
            "mixed_fraction": 1.0,
            "shifted_fraction": 0.0,
            "return_wrong": 0.0,
            "return_cut": 0.0,
        }
    )
    (alike,) = Margin()([attempt([0.25], 1.0)], NOW)
    assert alike.notes == pytest.approx(
        {"mixed_fraction": 0.0, "shifted_fraction": 0.0, "return_correct": 0.25}
    )


def test_the_mask_gives_factors_and_no_shift() -> None:
    group = [
        attempt([g], float(c))
        for g, c in ((-0.6, True), (0.0, True), (0.3, False), (-0.1, False), (-0.1, False))
    ]
    rule = Margin(delta=0.0, action="mask")
    assert [
        (share.weight_T, share.advantage_offset_T, share.notes["kept"]) for share in rule(group, NOW)
    ] == [(float(kept), 0.0, float(kept)) for kept in (False, True, False, True, True)]
    assert (rule.gives_offsets, Margin().gives_offsets) == (False, True)


def test_what_it_asks_for() -> None:
    assert Margin().requirements == Requirements(reward=True, logp=True)
    assert Margin(student="now").requirements == Requirements(reward=True, logp=True, now_topk=1)
    assert Margin().min_group == 2


def test_it_speaks_of_the_teacher_it_names() -> None:
    group = [attempt([0.0], 1.0), attempt([0.0], 0.0)]
    for one, ratio in zip(group, (2.0, 0.0), strict=True):
        one.answers["other"] = TeacherAnswer(
            target=SampledTarget(teacher="other", logp_T=one.rollout.logp_T + ratio)
        )
    assert shifts(Margin(teacher="other"), group) == [0.0, 0.0]
    assert shifts(Margin(teacher="nobody"), group) == [0.0, 0.0]
    assert shifts(Margin(), group) == pytest.approx([0.2, -0.2])


# --- gradients


def pairs(world: World, delta: float, teacher: torch.Tensor, reward: torch.Tensor) -> np.ndarray:
    """Expected gradient of sampled_kl with margin shifts over all groups of two, one member followed."""
    one = world.rows(world.student, teacher)
    ratio_N = (one.teachers["main"].logp_N - one.student.logp_N).detach().numpy()
    sequences = len(world.sequences)
    returns = [float(ratio_N[world.sequence_N.numpy() == s].mean()) for s in range(sequences)]
    probability = world.log_probability(world.student.detach()).exp()
    total = torch.zeros(())
    for sibling in range(sequences):
        shift = [
            margin_shifts(
                [returns[own], returns[sibling]], [bool(reward[own] > 0), bool(reward[sibling] > 0)], delta
            )[0]
            for own in range(sequences)
        ]
        rows = Rows(
            one.student,
            one.teachers,
            one.behaviour_logp_N,
            torch.tensor(shift, dtype=torch.float64)[world.sequence_N],
        )
        weight_N = (probability[sibling] * probability)[world.sequence_N]
        total = total + (weight_N * SampledKL()(rows)).sum()
    return torch.autograd.grad(total, world.student, retain_graph=True)[0].numpy()


def test_where_shifts_fire_the_expected_gradient_is_not_plain_opd() -> None:
    """Identity 5, over every group: the shift depends on the outcome, so it is no baseline."""
    world = World(vocabulary=4, horizon=2, seed=3)
    plain = world.expected_gradient(SampledKL(), world.student, world.rows(world.student, world.teacher))
    never = pairs(world, -INF, world.teacher, world.reward)
    np.testing.assert_allclose(never, plain, rtol=1e-10, atol=1e-12)
    often = pairs(world, 0.4, world.teacher, world.reward)
    assert np.linalg.norm(often - plain) > 0.02 * np.linalg.norm(plain)


def test_at_home_the_expected_gradient_is_that_of_the_outcome() -> None:
    """Identity 4: teacher = student leaves delta/2 times REINFORCE on +-1 in groups of both kinds; delta = 0
    leaves nothing.
    """
    world = World(vocabulary=4, horizon=2, seed=3)
    home = world.student.detach()
    found = pairs(world, 0.4, home, world.reward)
    right_S = (world.reward > 0).double()
    probability = world.log_probability(world.student).exp()
    # of correct answers
    share = float((probability * right_S).sum().detach())
    # E[s | own] = +0.2 (1 - share) where correct, -0.2 share where wrong; the cost is -s log p, so its
    # gradient is minus this one
    worth_S = 0.2 * (right_S - share)
    (exact,) = torch.autograd.grad(-(probability * worth_S).sum(), world.student)
    np.testing.assert_allclose(found, exact.numpy(), rtol=1e-9, atol=1e-12)
    assert not pairs(world, 0.0, home, world.reward).any()


def whole_groups() -> list[Group]:
    teacher = as_model(tiny.net(2).double(), character_tokenizer())
    batch = []
    for seed, lengths in ((1, (3, 6, 2, 5)), (2, (1, 4, 0, 7))):
        group = [tiny.attempt(tiny.rollout(n, seed=seed, sample=i), teacher) for i, n in enumerate(lengths)]
        for i, one in enumerate(group):
            one.reward = Reward(float(i % 2))
            if one.rollout.length:
                target = one.target("main")
                tokens_T = torch.from_numpy(one.rollout.tokens_T)  # type: ignore[attr-defined]
                one.answers["main"] = TeacherAnswer(
                    target=dataclasses.replace(
                        target, logp_T=tiny.HEADS[target.head].logp_of(target.h_TH, tokens_T).cpu().numpy()
                    )
                )  # type: ignore
        batch.append(group)
    return batch


def test_the_cut_into_micro_batches_changes_nothing() -> None:
    """Law 4: shifts are made of whole groups, before any cut; a single attempt a batch gives the same
    gradient.
    """
    found = []
    for budget in (1, 10_000):
        batch = whole_groups()
        share_credit(batch, {"margin": Margin(delta=3.0), "balance": Balance(0.5)}, NOW)
        assert any(one.advantage_offset_T.any() for group in batch for one in group)
        learner = tiny.learner(tiny.net(1).double(), micro_batch_tokens=budget)
        found.append(gradients(learner, batch, [SampledKL(max_gap_nats=10)], "seq-mean-token-mean"))
    close(*found)


def test_a_batch_of_groups_that_are_all_right_or_all_wrong_is_plain_opd() -> None:
    plain, shared = whole_groups(), whole_groups()
    for batch in (plain, shared):
        for group, value in zip(batch, (0.0, 1.0), strict=True):
            for one in group:
                one.reward = Reward(value)
    share_credit(shared, {"margin": Margin(), "balance": Balance()}, NOW)
    learner = tiny.learner(tiny.net(1).double())
    assert same(
        *(gradients(learner, batch, [SampledKL()], "seq-mean-token-mean") for batch in (plain, shared))
    )


@pytest.mark.parametrize("side", ["behaviour", "now"])
def test_a_run_shifts_and_says_so(tiny_run: Callable[..., Any], side: str) -> None:
    rules = {"margin": {"delta": 5.0, "student": side}, "balance": {}}
    settings = {
        "task": {"kind": "outside:Chat"},
        "rewards": {"verifier": {}},
        "group_size": 4,
        "max_staleness": 2 * (side == "now"),
    }
    done = tiny_run(
        "opd",
        steps=3,
        **settings,
        loss_aggregation="seq-mean-token-mean",
        credit=rules,
        objectives__0__max_gap_nats=10.0,
    )
    rows = [row["credit"]["margin"] for row in done.rows("metrics")]
    assert all(row["mixed_fraction"] == row["shifted_fraction"] for row in rows)
    assert any(row["mixed_fraction"] > 0 for row in rows)
    assert {"return_correct", "return_wrong", "return_cut", "margin"} <= {
        name for row in rows for name in row
    }
    for line in (
        row for row in done.rows("attempts") if row["kind"] == "learned" and "advantage_offset" in row
    ):
        # a constant along the attempt
        assert len(set(line["advantage_offset"])) == 1


def test_every_group_of_rewards_is_borne() -> None:
    """Whatever is right, wrong, unjudged or unscored: finite shares, and the rule is pure."""
    choices = [
        attempt([0.3, -0.2], 1.0),
        attempt([0.1], 0.0),
        attempt([0.2], None),
        attempt(None, 1.0),
        attempt([], 0.0),
    ]
    for group in itertools.product(choices, repeat=3):
        for rule in (
            Margin(),
            Margin(action="mask", mode="minmax"),
            Margin(level="attempt", direction="down"),
        ):
            shared_cache, again = rule(list(group), NOW), rule(list(group), NOW)
            assert all(
                np.isfinite(share.advantage_offset_T).all() and share.weight_T in (0.0, 1.0)
                for share in shared_cache
            )
            assert all(
                np.array_equal(a.advantage_offset_T, b.advantage_offset_T)
                for a, b in zip(shared_cache, again, strict=True)
            )
