"""Law 1, Alive. The expected per-position gradient of every objective, over ALL sequences, is not zero and
agrees with the exact one.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from laws.estimators import (
    SETTINGS,
    Setting,
    World,
    assert_alive,
    choices,
    compare,
    expected_and_exact,
    np_kl,
    settings_of,
    world_of,
)
from reflux.config.registry import kind_of
from reflux.credit.group_advantage import group_advantages
from reflux.loss.baselines import kl_value
from reflux.loss.divergences import kl
from reflux.objectives import OBJECTIVES
from reflux.objectives.divergence import MIXED, Divergence
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL

CASES = settings_of(OBJECTIVES)
# vocabulary, horizon, seed
WORLDS = [(5, 3, 0), (7, 2, 1), (8, 2, 2), (4, 3, 3), (6, 2, 4)]
# smaller worlds, because every choice of siblings is enumerated
GROUP_WORLDS = [(3, 2, 0), (3, 2, 1), (4, 1, 2), (2, 3, 3), (4, 2, 4)]
PREFIX_BASELINES = [name for name in choices(SampledKL, "baseline") if name not in GROUP_BASELINES]
few = settings(max_examples=60, deadline=None, derandomize=True)
shapes = {
    "vocabulary": st.integers(2, 8), "horizon": st.integers(1, 3), "seed": st.integers(0, 10**6),
    "spread": st.sampled_from([0.3, 1.0, 2.0])
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "setting"), CASES, ids=[f"{kind}-{index}" for index, (kind, _) in enumerate(CASES)]
)
def test_expected_gradient_is_alive_and_exact_where_promised(kind: str, setting: Setting | None) -> None:
    assert setting, f"'{kind}' is registered but has no setting in tests/laws/estimators.py"
    assert kind_of("objectives", setting.objective) == kind
    for shape in GROUP_WORLDS[: 5 if setting.group == 2 else 4] if setting.group else WORLDS:
        assert_alive(*expected_and_exact(world_of(*shape), setting), setting.unbiased, setting.points)


def something_to_learn(world: World, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    expected, exact = expected_and_exact(world, setting)
    assume(np.linalg.norm(exact) > 1e-3)
    return expected, exact


@few
@given(**shapes, data=st.data())
def test_every_divergence_over_the_whole_vocabulary_is_exact_in_any_world(
    vocabulary, horizon, seed, spread, data
) -> None:
    kind = data.draw(st.sampled_from(choices(Divergence, "divergence")))
    shares = [0.0, 0.05, 0.3, 0.5, 0.9] + ([] if kind.startswith("skew") else [1.0])
    beta = data.draw(st.sampled_from(shares)) if kind in MIXED else None
    support = data.draw(st.sampled_from(choices(Divergence, "support")))
    tail = data.draw(st.sampled_from(choices(Divergence, "tail"))) if support != "full" else "bucket"
    k = vocabulary + data.draw(st.integers(0, 3))
    objective = Divergence(
        divergence=kind,
        beta=beta,
        support=support,
        tail=tail,
        k=k,
        ratio=data.draw(st.sampled_from(["none", "truncated"])),
    )
    assert_alive(
        *something_to_learn(World(vocabulary, horizon, seed, spread), Setting(objective, kind)), unbiased=True
    )


@few
@given(
    **shapes,
    baseline=st.sampled_from(PREFIX_BASELINES),
    k=st.integers(1, 10),
    ratio=st.sampled_from(choices(SampledKL, "ratio")),
)
def test_every_value_of_the_prefix_is_unbiased_in_any_world(
    vocabulary, horizon, seed, spread, baseline, k, ratio
) -> None:
    setting = Setting(SampledKL(baseline=baseline, baseline_k=k, ratio=ratio), "reverse")
    assert_alive(*something_to_learn(World(vocabulary, horizon, seed, spread), setting), unbiased=True)


@few
@given(
    vocabulary=st.integers(2, 3),
    horizon=st.integers(1, 3),
    seed=shapes["seed"],
    spread=shapes["spread"],
    group=st.integers(2, 3),
)
def test_leave_one_out_is_unbiased_in_any_world(vocabulary, horizon, seed, spread, group) -> None:
    setting = Setting(
        SampledKL(baseline="leave_one_out"), "reverse", outputs="sampled", group=2 if horizon == 3 else group
    )
    assert_alive(*something_to_learn(World(vocabulary, horizon, seed, spread), setting), unbiased=True)


@few
@given(
    vocabulary=st.integers(4, 8),
    seed=shapes["seed"],
    kind=st.sampled_from(choices(Divergence, "divergence")),
    k=st.integers(1, 3),
)
def test_the_union_never_misses_more_of_the_divergence_than_one_models_list(
    vocabulary, seed, kind, k
) -> None:
    world = World(vocabulary, 2, seed)
    rows = world.rows(world.student, world.teacher)
    cost = {
        support: Divergence(divergence=kind, support=support, k=k)(rows).detach()
        for support in choices(Divergence, "support")
    }
    assert (cost["union"] <= cost["full"] + 1e-12).all()
    assert (cost["union"] >= torch.maximum(cost["student"], cost["teacher"]) - 1e-12).all()


def detached_kl_alone(rows):
    """A known error: a per-position KL as the advantage ignores the sampled token."""
    return kl_value(rows.student.logp_NV, rows.teachers["main"].logp_NV).neg() * rows.student.logp_N


def differentiated_log_ratio(rows):
    """A known error: the sampled log-ratio itself, differentiated on fixed samples."""
    return rows.student.logp_N - rows.teachers["main"].logp_N


@pytest.mark.parametrize("trap", [detached_kl_alone, differentiated_log_ratio])
def test_published_errors_are_flagged_as_dead(trap) -> None:
    world = World()
    expected = world.expected_gradient(trap, world.student, world.rows(world.student, world.teacher))
    exact = world.exact_gradient(np_kl, world.student)
    assert np.abs(expected).max() < 1e-12
    with pytest.raises(AssertionError, match="dead"):
        assert_alive(expected, exact, unbiased=False)


def test_a_wrong_sign_and_a_token_dependent_baseline_are_flagged() -> None:
    world = World()
    rows = world.rows(world.student, world.teacher)
    exact = world.exact_gradient(np_kl, world.student)
    with pytest.raises(AssertionError, match="points away"):
        assert_alive(
            world.expected_gradient(lambda r: -SampledKL()(r), world.student, rows), exact, unbiased=True
        )

    def leaky(rows):
        # the "baseline" depends on the sampled token
        return SampledKL()(rows) + 0.5 * rows.student.logp_N.detach() * rows.student.logp_N

    with pytest.raises(AssertionError, match="unbiased"):
        assert_alive(world.expected_gradient(leaky, world.student, rows), exact, unbiased=True)


def test_exact_reference_agrees_with_automatic_differentiation() -> None:
    world = World()
    rows = world.rows(world.student, world.teacher)
    gradient = world.expected_gradient(
        lambda r: kl(r.student.logp_NV, r.teachers["main"].logp_NV), world.student, rows
    )
    np.testing.assert_allclose(gradient, world.exact_gradient(np_kl, world.student), atol=1e-9)


@pytest.mark.parametrize("baseline", PREFIX_BASELINES)
def test_truncated_ratio_corrects_staleness_exactly_when_nothing_is_capped(baseline) -> None:
    for seed in range(5):
        world = world_of(5, 3, seed)
        corrected = Setting(SampledKL(baseline=baseline, baseline_k=3, ratio_cap=1e6), "reverse")
        assert_alive(*expected_and_exact(world, corrected, "lagged"), unbiased=True)
        for ratio in ("none", "clip"):
            uncorrected = Setting(SampledKL(baseline=baseline, baseline_k=3, ratio=ratio), "reverse")
            expected, exact = expected_and_exact(world, uncorrected, "lagged")
            with pytest.raises(AssertionError, match="unbiased"):
                assert_alive(expected, exact, unbiased=True)
            # the clip has a larger effect in some worlds
            assert compare(expected, exact)[0] > (0.8 if ratio == "none" or seed == 0 else 0.3)


@pytest.mark.parametrize("shape", GROUP_WORLDS)
def test_leave_one_out_stays_exact_under_staleness_with_the_ratio(shape) -> None:
    setting = Setting(
        SampledKL(baseline="leave_one_out", ratio_cap=1e6), "reverse", outputs="sampled", group=2
    )
    assert_alive(*expected_and_exact(world_of(*shape), setting, "lagged"), unbiased=True)


@pytest.mark.parametrize("kind", choices(Divergence, "divergence"))
@pytest.mark.parametrize("support", ["full", "union"])
def test_a_ratio_on_a_divergence_changes_nothing_in_expectation_and_adds_noise(kind, support) -> None:
    """The divergence sums over all actions, for any policy that sampled. The capped ratio lowers the weight
    of prefixes and corrects nothing.
    """
    world = world_of(5, 3, 0)
    rows = world.rows(world.lagged, world.teacher)
    plain = Divergence(divergence=kind, support=support, k=2)
    weighed = dataclasses.replace(plain, ratio="truncated", ratio_cap=1e6)
    without, within = (
        world.expected_gradient(objective, world.lagged, rows) for objective in (plain, weighed)
    )
    np.testing.assert_allclose(within, without, rtol=0, atol=1e-12)
    weight_N = world.log_probability(world.lagged).exp()[world.sequence_N]
    second_moments = [
        float((weight_N * objective(rows).detach().square()).sum()) for objective in (plain, weighed)
    ]
    # the mean at every prefix is the same, so the difference is variance
    assert second_moments[1] > 1.01 * second_moments[0]
    capped = world.expected_gradient(
        dataclasses.replace(plain, ratio="truncated", ratio_cap=1.0), world.lagged, rows
    )
    assert 0.5 < np.linalg.norm(capped) / np.linalg.norm(without) < 0.99
    if support == "full":
        assert_alive(*expected_and_exact(world, Setting(weighed, kind), "lagged"), unbiased=True)


def test_a_renormalised_list_can_point_away_where_the_bucket_does_not() -> None:
    """A shipped option with a known bias: the probability outside the list is dropped."""
    cosines = {tail: [] for tail in choices(Divergence, "tail")}
    for tail, shape in itertools.product(cosines, WORLDS):
        setting = Setting(Divergence(support="teacher", tail=tail, k=3), "reverse")
        cosines[tail].append(compare(*expected_and_exact(world_of(*shape), setting))[0])
    assert min(cosines["bucket"]) > 0.8
    assert min(cosines["renormalised"]) < 0
    assert np.mean(cosines["renormalised"]) < 0.5


def test_wide_clip_corrects_staleness_exactly() -> None:
    world = World()
    objective = SampledKL(ratio="clip", clip=(0.999999, 1e6))
    expected = world.expected_gradient(objective, world.lagged, world.rows(world.lagged, world.teacher))
    assert_alive(expected, world.exact_gradient(np_kl, world.lagged), unbiased=True)


@pytest.mark.parametrize("baseline", PREFIX_BASELINES)
def test_a_shift_adds_the_policy_gradient_of_the_reward(baseline) -> None:
    world = World()
    rows = world.rows(world.student, world.teacher, advantage_offset_N=world.reward[world.sequence_N])
    expected = world.expected_gradient(SampledKL(baseline=baseline), world.student, rows)
    assert_alive(
        expected, world.exact_gradient(np_kl, world.student) + world.policy_gradient(), unbiased=True
    )


@pytest.mark.parametrize("size", [2, 3])
def test_group_advantage_with_the_attempt_in_the_mean_shrinks_the_gradient_by_one_over_g(size) -> None:
    """Enumerates every group of `size` attempts: cosine 1, norm 1 - 1/G."""
    world = World(vocabulary=3, horizon=2)
    probability = world.log_probability(world.student.detach()).exp()
    # expected advantage of each sequence over its siblings
    shift_S = torch.zeros(len(world.sequences), dtype=torch.float64)
    for group in itertools.product(range(len(world.sequences)), repeat=size):
        siblings = float(probability[list(group[1:])].prod())
        shift_S[group[0]] += siblings * group_advantages([float(world.reward[index]) for index in group])[0]
    rows = world.rows(world.student, world.teacher, advantage_offset_N=shift_S[world.sequence_N])
    cosine, norm = compare(
        world.expected_gradient(PolicyGradient(), world.student, rows), world.policy_gradient()
    )
    assert cosine == pytest.approx(1, abs=1e-9)
    assert norm == pytest.approx(1 - 1 / size, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_group_mean_shrinks_the_gradient_of_one_token_answers_by_one_over_g(size, seed) -> None:
    for vocabulary in (2, 5):
        setting = Setting(SampledKL(baseline="group_mean"), "reverse", outputs="sampled", group=size)
        cosine, norm = compare(*expected_and_exact(world_of(vocabulary, 1, seed), setting))
        assert cosine == pytest.approx(1, abs=1e-9)
        assert norm == pytest.approx(1 - 1 / size, abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_group_mean_of_longer_answers_shrinks_less_and_turns(seed) -> None:
    setting = Setting(SampledKL(baseline="group_mean"), "reverse", outputs="sampled", group=2)
    cosine, norm = compare(*expected_and_exact(world_of(3, 2, seed), setting))
    assert 0.95 < cosine < 1 - 1e-6
    assert 0.5 < norm < 0.9


def test_every_choice_of_the_menu_is_in_the_laws() -> None:
    """A new value of a Literal field joins the settings automatically."""
    literal = {
        "sampled_kl": (SampledKL, ("baseline", "ratio")),
        "divergence": (Divergence, ("divergence", "support", "tail", "ratio")),
    }
    for kind, (cls, names) in literal.items():
        for name in names:
            assert {getattr(setting.objective, name) for setting in SETTINGS[kind]} == set(choices(cls, name))
