"""Release: margins, scores and the change point from their definitions, and what the rule makes of an
attempt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tiny
from laws.estimators import World
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.credit.change_point import best_split
from reflux.credit.prefix import Prefix
from reflux.credit.release import Release, candidate_margin, change_point, segment_scores
from reflux.metrics.values import Quantiles
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL
from reflux.teachers.collection import Teachers
from reflux.types import Attempt, Credit, HiddenTarget, Rollout, SampledTarget, TeacherAnswer, TopKTarget
from tiny import gradients, rollout, same

NOW = StepContext(0, 0)
logps = st.floats(-50, 0) | st.just(-math.inf)
tables = st.integers(2, 5).flatmap(lambda K: st.lists(st.lists(logps, min_size=K, max_size=K), max_size=6))


# --- margins


def margin(row: list[float]) -> float:
    """The definition, a row at a time."""
    first, second = sorted(row, reverse=True)[:2]
    return 0.0 if first == -math.inf else min(first - second, 30.0)


@settings(max_examples=100, deadline=None)
@given(table=tables, constant=st.floats(-5, 5), seed=st.integers(0, 99))
def test_a_margin_is_the_gap_between_the_best_two(
    table: list[list[float]], constant: float, seed: int
) -> None:
    logp_TK = np.asarray(table, dtype=np.float64).reshape(len(table), -1) if table else np.zeros((0, 3))
    margin_T = candidate_margin(logp_TK)
    assert margin_T.tolist() == [margin(row) for row in table]
    assert (np.isfinite(margin_T) & (margin_T >= 0) & (margin_T <= 30)).all()
    np.testing.assert_allclose(candidate_margin(logp_TK + constant), margin_T, atol=1e-12)
    shuffled = np.random.default_rng(seed).permutation(logp_TK.T).T
    np.testing.assert_array_equal(candidate_margin(shuffled), margin_T)


def test_ties_and_tokens_ruled_out() -> None:
    inf = math.inf
    rows = [
        [-1.0, -1.0, -3.0],
        [-0.5, -inf, -inf],
        [-inf, -inf, -inf],
        [-1.0, -inf, -2.5],
        [-0.0, -99.0, -99.0],
    ]
    assert candidate_margin(np.asarray(rows, dtype=np.float32)).tolist() == [0.0, 30.0, 0.0, 1.5, 30.0]
    assert candidate_margin(np.zeros((0, 4))).shape == (0,)


@pytest.mark.parametrize(
    "table", [[[0.0]], [[-1.0, math.nan]], [[-1.0, math.inf]], [-1.0, -2.0], np.zeros((0, 1))]
)
def test_what_is_no_table_of_two_candidates_is_refused(table: Any) -> None:
    with pytest.raises(ValueError, match=r"two candidates|NaN or \+inf"):
        candidate_margin(np.asarray(table))


# --- scores


@settings(max_examples=60, deadline=None)
@given(margins=st.lists(st.floats(0, 30), min_size=1, max_size=12), cuts=st.sets(st.integers(1, 11)))
def test_a_score_is_the_logarithm_of_one_and_the_mean_margin(margins: list[float], cuts: set[int]) -> None:
    ends = sorted(cut for cut in cuts if cut < len(margins))
    segments = [slice(a, b) for a, b in zip([0, *ends], [*ends, len(margins)], strict=True)]
    scores = segment_scores(np.asarray(margins), segments)
    assert scores == pytest.approx(
        [math.log(1 + float(np.mean(margins[piece]))) for piece in segments], abs=1e-12
    )
    assert min(scores) >= 0
    more = segment_scores(np.asarray(margins) + 0.5, segments)
    assert all(one < other for one, other in zip(scores, more, strict=True))


def test_equal_margins_give_the_logarithm_of_one_and_that_margin() -> None:
    for c in (0.0, 0.3, 7.0):
        assert segment_scores(np.full(7, c), [slice(0, 3), slice(3, 4), slice(6, 7)]) == pytest.approx(
            [math.log1p(c)] * 3, rel=1e-15
        )
    assert segment_scores(np.ones(4), []) == []


@pytest.mark.parametrize(
    ("segments", "index"),
    [
        ([slice(0, 2), slice(2, 2)], 1),
        ([slice(2, 4), slice(0, 2)], 1),
        ([slice(0, 3), slice(2, 4)], 1),
        ([slice(0, 6)], 0),
        ([slice(-2, 2)], 0),
        ([slice(0, 2), slice(2, None)], 1),
        ([slice(0, 4, 2)], 0),
        ([slice(3, 2)], 0),
    ],
)
def test_a_wrong_segment_is_refused_by_its_index(segments: list[slice], index: int) -> None:
    with pytest.raises(ValueError, match=f"segment {index} is slice"):
        segment_scores(np.ones(5), segments)


# --- the change point


def by_definition(scores: list[float], min_segments: int, min_side: int) -> tuple[int, float] | None:
    """(tau*, gain) from the formula in numpy, every tau tried."""
    S, n = np.asarray(scores, dtype=np.float64), len(scores)
    if n < max(min_segments, 2 * min_side):
        return None

    def rss(x: np.ndarray) -> float:
        return float(np.square(x - x.mean()).sum())

    bic_0 = n * np.log((rss(S) + 1e-12) / n) + np.log(n)
    taus = [tau for tau in range(min_side, n - min_side + 1) if S[tau:].mean() < S[:tau].mean()]
    bic_1 = [n * np.log((rss(S[:tau]) + rss(S[tau:]) + 1e-12) / n) + 3 * np.log(n) for tau in taus]
    return (taus[int(np.argmin(bic_1))], float(bic_0 - min(bic_1))) if taus else None


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.floats(0, 4).map(lambda x: round(x, 3)), max_size=25),
    min_segments=st.integers(1, 12),
    min_side=st.integers(1, 4),
    min_gain=st.sampled_from([-1.0, 0.0, 6.0]),
)
def test_the_change_point_is_that_of_the_formula(
    scores: list[float], min_segments: int, min_side: int, min_gain: float
) -> None:
    assume(len(set(scores)) > 1)
    # Where the means of two sides are equal, rounding decides whether the scores fall there.
    sides = [(scores[:tau], scores[tau:]) for tau in range(1, len(scores))]
    assume(all(abs(np.mean(before) - np.mean(after)) > 1e-12 for before, after in sides))
    exact = by_definition(scores, min_segments, min_side)
    found = best_split(scores, min_segments, min_side)
    assert (exact is None) == (found is None)
    if exact and found:
        assert found.gain == pytest.approx(exact[1], abs=1e-6)
        assume(abs(exact[1] - min_gain) > 1e-6)
        kept = change_point(scores, min_segments, min_side, min_gain)
        assert (kept is not None) == (exact[1] > min_gain)
        if kept is not None and kept != exact[0]:
            # a tie that rounding broke
            one, other = (
                sum(float(np.var(part) * len(part)) for part in (scores[:t], scores[t:]))
                for t in (kept, exact[0])
            )
            assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.integers(0, 40).map(lambda x: x / 10), min_size=6, max_size=20),
    a=st.sampled_from([0.5, 1.0, 3.0, 20.0]),
    b=st.floats(-100, 100),
)
def test_scale_and_offset_change_nothing_and_a_mirror_is_no_release(
    scores: list[float], a: float, b: float
) -> None:
    """Identity 5. Scores that differ by a tenth or more are far above eps."""
    kept, split = change_point(scores, 6, 2), best_split(scores, 6, 2)
    assume(split is None or abs(split.gain) > 1e-3)
    moved = change_point([a * score + b for score in scores], 6, 2)
    assert (kept is None) == (moved is None)
    fits = _fits(scores)
    unique = (
        sum(math.isclose(fit, min(fits.values()), rel_tol=1e-6, abs_tol=1e-9) for fit in fits.values()) == 1
        if fits
        else True
    )
    assert moved == kept or not unique
    if kept is not None:
        assert change_point(scores[::-1], 6, 2) != len(scores) - kept


def _fits(scores: list[float]) -> dict[int, float]:
    S = np.asarray(scores)
    return {
        t: float(np.var(S[:t]) * t + np.var(S[t:]) * (len(S) - t))
        for t in range(2, len(S) - 1)
        if S[t:].mean() < S[:t].mean() - 1e-12
    }


def test_a_clean_step_is_found_exactly() -> None:
    """Identity 6; one too near an end gives the nearest allowed place or nothing."""
    assert change_point([1.0] * 5 + [0.0] * 5, 8, 3) == 5
    for n in (8, 11, 30):
        for tau in range(3, n - 2):
            assert change_point([0.7] * tau + [0.2] * (n - tau), 8, 3) == tau
    assert change_point([1.0] * 2 + [0.0] * 8) in (3, None)
    assert change_point([1.0] * 28 + [0.0] * 2) in (27, None)
    assert change_point([1.0] * 5 + [0.0] * 5, min_gain=1e9) is None


@pytest.mark.parametrize(
    "scores", [[0.3] * 12, sorted([0.1, 0.5, 0.5, 0.9, 2.0, 2.0, 2.1, 3.0]), [0.1] * 6 + [0.1 + 1e-16] * 6]
)
def test_scores_that_never_fall_release_nothing(scores: list[float]) -> None:
    """Identity 7."""
    assert change_point(scores, 8, 3, min_gain=-1e9) is None


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.floats(0, 4), min_size=8, max_size=40).map(sorted))
def test_rounding_makes_no_fall(scores: list[float]) -> None:
    assert change_point(scores, 8, 1, min_gain=-1e9) is None


def test_a_straight_decline_is_split_near_its_middle() -> None:
    """Identity 8."""
    assert change_point([1 - i / 40 for i in range(40)]) == 20


def test_few_segments_release_nothing() -> None:
    step = [1.0] * 4 + [0.0] * 3
    assert change_point(step, min_segments=8) is None
    assert change_point(step, min_segments=7) == 4
    assert change_point(step, min_segments=1, min_side=4) is None
    assert change_point([], 1, 1) is None
    assert change_point([3.0], 1, 1) is None


@pytest.mark.parametrize(
    ("scores", "more", "words"),
    [
        ([1.0, math.nan], {}, "finite"),
        ([math.inf] * 9, {}, "finite"),
        ([1.0], {"min_segments": 0}, "at least 1"),
        ([1.0], {"min_side": 0}, "at least 1"),
    ],
)
def test_bad_scores_are_refused(scores: list[float], more: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        change_point(scores, **more)


# --- the rule

# what the teacher says of four candidates: margin 0, and 5.99
LOW, HIGH = [-0.8, -0.8, -3.0, -3.0], [-0.01, -6.0, -8.0, -9.0]


def scored(
    high: int, low: int, *, mask: Any = None, name: str = "main", k: int = 4, **fields: Any
) -> Attempt:
    """An attempt with a high teacher margin at its first `high` positions and a low one at the next `low`."""
    length = high + low
    made = Attempt(dataclasses.replace(rollout(length, mask=mask), **fields))
    logp_TK = np.asarray([HIGH] * high + [LOW] * low, dtype=np.float32).reshape(length, 4)
    if k > 4:
        # beyond the rule's own k
        logp_TK = np.concatenate([logp_TK, np.full((length, k - 4), -0.005)], axis=1)
    target = SampledTarget(teacher=name, logp_T=np.full(length, -1.0, dtype=np.float32))
    listed = TopKTarget(
        teacher=name, ids_TK=np.zeros((length, k), dtype=np.int64), logp_TK=logp_TK, logp_T=np.zeros(length)
    )
    made.answers[name] = TeacherAnswer(target=target, candidates=listed)
    return made


def shared(made: Attempt, **fields: Any) -> Credit:
    return Release(**{"segments": 2, **fields})([made], NOW)[0]


def test_what_follows_the_step_is_released_and_the_mass_is_kept() -> None:
    """Identity 2: 6 of 20 kept, each 20 / 6 times."""
    share = shared(scored(6, 14))
    np.testing.assert_allclose(share.weight_T, [20 / 6] * 6 + [0.0] * 14, rtol=1e-6)
    assert share.notes["released"] == 1.0
    assert share.notes["kept"] == Quantiles((0.3,))
    assert isinstance(share.notes["gain"], float)
    assert share.notes["gain"] > 0
    assert share.notes["segments"] == 10.0
    assert share.notes["segment_tokens"] == Quantiles((2.0,) * 10)
    assert share.detail["starts"] == list(range(0, 20, 2))
    assert share.detail["margins"] == [5.99] * 3 + [0.0] * 7
    assert share.detail["kept"] == 3
    assert shared(scored(6, 14), rescale=False).weight_T.tolist() == [1.0] * 6 + [0.0] * 14  # type: ignore[union-attr]


def test_only_the_rules_own_k_candidates_count() -> None:
    """Another rule may have asked for more: a fifth candidate that the teacher likes would take the margin
    away.
    """
    assert shared(scored(6, 14, k=7)).notes["released"] == 1.0
    assert shared(scored(6, 14, k=7), k=7).notes["released"] == 0.0


@settings(max_examples=80, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=60),
    high=st.integers(0, 60),
    size=st.integers(1, 5),
    side=st.integers(1, 3),
)
def test_every_attempt_keeps_its_mass(mask: list[bool], high: int, size: int, side: int) -> None:
    """Identities 2 and 9: finite, not negative, the same sum, and 0 after a kept beginning."""
    made = scored(min(high, len(mask)), len(mask) - min(high, len(mask)), mask=mask)
    share = shared(made, segments=size, min_side=side, min_segments=2)
    weight_T = np.broadcast_to(share.weight_T, len(mask))
    assert np.isfinite(weight_T).all()
    assert (weight_T >= 0).all()
    assert (weight_T[~np.asarray(mask)] == 1).all()
    assert weight_T[mask].sum() == pytest.approx(sum(mask), rel=1e-5)
    kept = weight_T[mask] > 0
    assert (np.diff(kept.astype(int)) <= 0).all()
    assert not len(kept) or kept[0]


def test_no_step_is_plain_distillation() -> None:
    for made in (scored(20, 0), scored(0, 20), scored(3, 3), scored(1, 19)):
        share = shared(made)
        assert np.all(np.asarray(share.weight_T) == 1)
        assert share.notes["released"] == 0.0
        assert "kept" not in share.notes
        assert share.detail["kept"] == len(share.detail["starts"])
    rising = scored(6, 14)
    rising.answers["main"].candidates.logp_TK[:] = rising.answers["main"].candidates.logp_TK[::-1].copy()
    assert shared(rising).weight_T == 1.0
    assert shared(scored(6, 14), min_gain=1e6).weight_T == 1.0
    assert shared(scored(6, 14), min_segments=11).weight_T == 1.0


@pytest.mark.parametrize(
    "why", ["not scored", "error", "nothing chosen", "empty", "another teacher", "no tokens"]
)
def test_an_attempt_without_a_score_has_factor_one_and_stays_out_of_the_statistics(why: str) -> None:
    made = scored(6, 14)
    if why == "not scored":
        made = Attempt(rollout(20))
    elif why == "error":
        made = scored(6, 14, finish="error")
    elif why == "nothing chosen":
        made = scored(6, 14, mask=[False] * 20)
    elif why == "empty":
        made = scored(0, 0)
    elif why == "another teacher":
        made = scored(6, 14, name="other")
    else:
        plain = made.rollout
        made = Attempt(
            Rollout(
                prompt=plain.prompt,
                sample=0,
                version=0,
                finish="stop",
                mask_T=plain.mask_T,
                logp_T=plain.logp_T,
            )
        )
    assert shared(made) == Credit()


def test_another_teacher_by_name() -> None:
    assert shared(scored(6, 14, name="other"), teacher="other").notes["released"] == 1.0


def test_what_cannot_be_read_is_refused_in_words() -> None:
    made = scored(6, 14)
    made.answers["main"] = TeacherAnswer(target=made.target("main"))
    with pytest.raises(ValueError, match="prompt p0 has only its target"):
        shared(made)
    with pytest.raises(ValueError, match="the list of the current student for prompt p0"):
        shared(made, candidates="now")
    made.now = scored(6, 14).answers["main"].candidates
    with pytest.raises(ValueError, match="prompt p0 has only its target"):
        shared(made, candidates="now")
    plain = made.rollout
    flow = Attempt(
        Rollout(
            prompt=plain.prompt, sample=0, version=0, finish="stop", mask_T=plain.mask_T, logp_T=plain.logp_T
        )
    )
    flow.answers["main"] = TeacherAnswer(target=made.target("main"))
    with pytest.raises(ValueError, match="a flow rollout has none"):
        shared(flow)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 1},
        {"min_segments": 0},
        {"min_side": 0},
        {"segments": 0},
        {"segments": "words"},
        {"min_gain": math.nan},
    ],
)
def test_fields_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Release(**wrong)


def test_the_defaults_are_the_papers_and_ours() -> None:
    assert Release() == Release(4, 8, 3, 0.0, "sentences", True, "behaviour", "main")


def test_what_it_wants_computed() -> None:
    assert Release().requirements == Requirements(behaviour=4, candidates=4, spans=True)
    assert Release(k=7, segments=5).requirements == Requirements(behaviour=7, candidates=7)
    assert Release(candidates="now", segments="lines").requirements == Requirements(
        now_topk=4, now_candidates=4, spans=True
    )


def test_factors_multiply_with_a_prefixs_and_mass_is_kept_against_the_mask() -> None:
    """The scale looks at mask_T alone."""
    weights = []
    for names in (["release", "prefix"], ["prefix", "release"]):
        made = scored(6, 14)
        rules: dict[str, Any] = {"release": Release(segments=2), "prefix": Prefix(4)}
        share_credit([[made]], {name: rules[name] for name in names}, NOW)
        weights.append(made.weight_T)
    np.testing.assert_array_equal(*weights)
    np.testing.assert_allclose(weights[0], [20 / 6] * 4 + [0.0] * 16, rtol=1e-6)


# --- along real models


def spoken(length: int, k: int = 4) -> tuple[Attempt, Any, Any]:
    """An attempt with a student's list and a teacher's hidden states and candidates; and the two models."""
    student, teacher = (as_model(tiny.net(seed), character_tokenizer()) for seed in (1, 2))
    made = tiny.attempt(rollout(length, seed=3), teacher)
    logp_TV = student.head.logits(tiny.hidden(student, made.rollout).h_TH).log_softmax(-1).detach().cpu()  # type: ignore[arg-type]
    top = logp_TV.topk(k)
    listed = TopKTarget(
        teacher="now", ids_TK=top.indices.numpy(), logp_TK=top.values.numpy(), logp_T=np.zeros(length)
    )
    made.now = listed
    made.rollout = dataclasses.replace(made.rollout, behaviour=listed)
    target = made.target("main")
    assert isinstance(target, HiddenTarget)
    at = tiny.HEADS[target.head].logp_at(target.h_TH, top.indices).cpu().numpy()
    made.answers["main"] = dataclasses.replace(
        made.answers["main"], candidates=dataclasses.replace(listed, teacher="main", logp_TK=at)
    )
    return made, student, teacher


def follow_up(made: Attempt, k: int = 6) -> None:
    """What the loop does after `observe`."""
    made.answers["main"] = dataclasses.replace(made.answers["main"], table="local")
    tables: Any = {"local": (SimpleNamespace(at_ids=True, in_process=True, routes=(), alias="main"), None)}
    asyncio.run(
        Teachers(tables, Requirements(now_topk=k, now_candidates=k), tiny.services()).follow_up([[made]])
    )


def test_candidates_of_now_are_what_the_head_gives_there() -> None:
    made, _, _ = spoken(9, k=6)
    assert made.answers["main"].now_candidates is None
    follow_up(made, k=4)
    target, found = made.target("main"), made.answers["main"].now_candidates
    assert isinstance(target, HiddenTarget)
    assert found is not None
    assert found.ids_TK.tolist() == made.now.ids_TK[:, :4].tolist()  # type: ignore[union-attr]
    logp_TV = tiny.HEADS[target.head].logits(target.h_TH).log_softmax(-1).detach().cpu()
    np.testing.assert_allclose(found.logp_TK, logp_TV.gather(-1, torch.from_numpy(found.ids_TK)), atol=1e-6)
    tokens_T1 = torch.from_numpy(made.rollout.tokens_T[:, None])  # type: ignore[union-attr]
    np.testing.assert_allclose(found.logp_T, logp_TV.gather(-1, tokens_T1)[:, 0], atol=1e-6)


def test_candidates_of_now_are_those_of_then_where_nothing_has_changed() -> None:
    made, _, _ = spoken(24, k=6)
    follow_up(made)
    behaviour, now = (Release(segments=2, candidates=which)([made], NOW)[0] for which in ("behaviour", "now"))
    assert behaviour.detail == now.detail
    assert max(behaviour.detail["margins"]) > 0
    made.now = dataclasses.replace(made.now, ids_TK=made.now.ids_TK[:, ::-1].copy())  # type: ignore[union-attr,type-var]
    # a rule reads what is there, and asks nobody
    assert Release(segments=2, candidates="now")([made], NOW)[0].detail == now.detail
    follow_up(made)
    assert Release(segments=2, candidates="now")([made], NOW)[0].detail != behaviour.detail


def test_a_list_of_the_whole_vocabulary_says_what_hidden_states_say() -> None:
    made, _, _ = spoken(9)
    target = made.target("main")
    assert isinstance(target, HiddenTarget)
    logp_TV = tiny.HEADS[target.head].logits(target.h_TH).log_softmax(-1).detach().cpu()
    order = torch.argsort(logp_TV, descending=True)
    full = TopKTarget(
        teacher="main", ids_TK=order.numpy(), logp_TK=logp_TV.gather(-1, order).numpy(), logp_T=np.zeros(9)
    )
    ids_TK = made.now.ids_TK  # type: ignore[union-attr]
    np.testing.assert_allclose(
        full.logp_at(ids_TK, tiny.HEADS), target.logp_at(ids_TK, tiny.HEADS), atol=1e-6
    )
    cut = dataclasses.replace(full, ids_TK=full.ids_TK[:, :2], logp_TK=full.logp_TK[:, :2])
    with pytest.raises(
        ValueError, match=r"teacher 'main' lists its own most likely tokens.*unknown, which does not mean low"
    ):
        cut.logp_at(ids_TK, tiny.HEADS)
    with pytest.raises(ValueError, match="a SampledTarget has none"):
        SampledTarget(teacher="main", logp_T=np.zeros(9)).logp_at(ids_TK, tiny.HEADS)


@pytest.mark.parametrize("objective", [Divergence(), SampledKL(), SampledKL(baseline="kl")])
def test_released_positions_give_exactly_no_gradient(objective: Any) -> None:
    """Identity 9: what is written and said there is never read; what is kept learns as under a prefix, times
    the scale.
    """
    results = []
    learner = tiny.learner(tiny.net(1))
    for changed in (False, True):
        made, _, _ = spoken(20)
        candidates = made.answers["main"].candidates.logp_TK
        candidates[:6], candidates[6:] = HIGH, LOW
        other = tiny.hidden(as_model(tiny.net(3), character_tokenizer()), made.rollout)  # type: ignore[arg-type]
        if changed:
            made.rollout.tokens_T[6:] = 50  # type: ignore[union-attr]
            made.rollout.logp_T[6:] = -30.0
            made.target("main").h_TH[6:] = other.h_TH[6:]  # type: ignore[union-attr]
        share_credit([[made]], {"release": Release(segments=2)}, NOW)
        assert np.flatnonzero(made.weight_T).tolist() == list(range(6))
        results.append(gradients(learner, [[made]], [objective], "token-mean"))
    assert same(*results)
    made.credits = {"prefix": Prefix(6)([made], NOW)[0]}
    plain = gradients(learner, [[made]], [objective], "token-mean")
    tiny.close({name: value * (20 / 6) for name, value in plain.items()}, results[1], rtol=1e-4)


def test_a_constant_advantage_teaches_nothing_whatever_is_released() -> None:
    """Identity 10: the expected update at a prefix is a covariance. Every answer of a small world, a factor
    for each prefix.
    """
    world = World(4, 3, seed=0)
    rng = torch.Generator().manual_seed(1)
    factor_P = torch.rand(int(world.prefix_N.max()) + 1, generator=rng, dtype=torch.float64)

    def update(advantage_offset_N: torch.Tensor) -> float:
        rows = world.rows(world.student, world.student.detach(), advantage_offset_N=advantage_offset_N)
        weighed = world.expected_gradient(
            lambda rows: factor_P[world.prefix_N] * SampledKL()(rows), world.student, rows
        )
        return float(np.abs(weighed).max())

    constant = torch.full_like(world.ids_N, 1, dtype=torch.float64) * 0.7
    assert update(constant) < 1e-12
    # an advantage that tells tokens apart does teach
    assert update(constant + world.ids_N) > 1e-3


# --- in a run


def test_a_run_reads_the_same_margins_from_then_and_from_now(tiny_run: Any) -> None:
    """At staleness 0 the student of now is the student that acted; every attempt carries what the report
    draws, and the metrics their medians.
    """
    common = {
        "steps": 1,
        "task": {"kind": "outside:Chat", "replies": 1},
        "sampler__max_tokens": 60,
        "loss_aggregation": "token-mean",
    }
    rule = {"min_segments": 2, "min_side": 1, "min_gain": -9.0}
    lines, metrics = [], []
    for candidates, way in (("behaviour", "lines"), ("now", "lines"), ("behaviour", 4), ("now", 4)):
        done = tiny_run(
            "opd", **common, credit={"release": {**rule, "candidates": candidates, "segments": way}}
        )
        rows = [row for row in done.rows("attempts") if row["kind"] == "learned"]
        lines.append({(row["prompt"], row["sample"]): row["detail"]["release"] for row in rows})
        metrics.append(done.rows("metrics")[0]["credit"]["release"])
    for behaviour, now in ((lines[0], lines[1]), (lines[2], lines[3])):
        assert behaviour.keys() == now.keys()
        assert len(behaviour) == 4
        for key, detail in behaviour.items():
            assert detail["starts"] == now[key]["starts"]
            assert detail["margins"] == pytest.approx(now[key]["margins"], abs=2e-3)
    # two turns are two segments at least
    assert any(len(detail["starts"]) > 1 for detail in lines[0].values())
    blocks = metrics[2]
    kept = [detail for detail in lines[2].values() if detail["kept"] < len(detail["starts"])]
    assert blocks["released"] == pytest.approx(len(kept) / 4)
    assert blocks["weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert blocks["segments"] == pytest.approx(
        np.mean([len(detail["starts"]) for detail in lines[2].values()])
    )
