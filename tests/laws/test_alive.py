"""Law 1, alive: the expected per-position gradient of every objective, over ALL sequences, against the exact one."""

import itertools

import numpy as np
import pytest
import torch

from laws.estimators import Setting, World, assert_alive, compare, np_kl, settings_of
from reflux.credit.outcome import group_advantages
from reflux.objectives import OBJECTIVES
from reflux.objectives.baselines import kl_value
from reflux.objectives.divergences import kl
from reflux.objectives.outcome import Outcome
from reflux.objectives.sampled_kl import SampledKL
from reflux.parts import kind_of

CASES = settings_of(OBJECTIVES)


def expected_and_exact(world: World, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    policy = world.student if setting.policy == "student" else world.teacher
    if setting.target == "reward":
        rows = world.rows(policy, world.teacher, setting.says, shift_N=world.reward[world.sequence_N] - 0.7)
        return world.expected_gradient(setting.objective, policy, rows), world.policy_gradient()
    rows = world.rows(policy, world.teacher, setting.says)
    return world.expected_gradient(setting.objective, policy, rows), world.exact_gradient(setting.exact, policy)


@pytest.mark.parametrize(("kind", "setting"), CASES, ids=[f"{kind}-{index}" for index, (kind, _) in enumerate(CASES)])
def test_expected_gradient_is_alive_and_exact_where_promised(kind: str, setting: Setting | None) -> None:
    assert setting, f"'{kind}' is registered but has no setting in tests/laws/estimators.py"
    assert kind_of("objectives", setting.objective) == kind
    for vocabulary, horizon, seed in ((5, 3, 0), (7, 2, 1)):
        world = World(vocabulary, horizon, seed)
        cosine, norm = assert_alive(*expected_and_exact(world, setting), setting.unbiased)
        if not setting.unbiased:
            print(f"biased: {setting.objective} V={vocabulary} cosine {cosine:.4f} relative norm {norm:.4f}")


def detached_kl_alone(rows):
    """Trap: a per-position KL as the advantage ignores the sampled token."""
    return kl_value(rows.student.logp_NV, rows.teachers["main"].logp_NV).neg() * rows.student.logp_N


def differentiated_log_ratio(rows):
    """Trap: the sampled log-ratio itself, differentiated on fixed samples."""
    return rows.student.logp_N - rows.teachers["main"].logp_N


@pytest.mark.parametrize("trap", [detached_kl_alone, differentiated_log_ratio])
def test_published_traps_are_flagged_as_dead(trap) -> None:
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
        assert_alive(world.expected_gradient(lambda r: -SampledKL()(r), world.student, rows), exact, unbiased=True)

    def leaky(rows):  # the sampled token enters the "baseline"
        return SampledKL()(rows) + 0.5 * rows.student.logp_N.detach() * rows.student.logp_N

    with pytest.raises(AssertionError, match="unbiased"):
        assert_alive(world.expected_gradient(leaky, world.student, rows), exact, unbiased=True)


def test_exact_reference_agrees_with_automatic_differentiation() -> None:
    world = World()
    rows = world.rows(world.student, world.teacher)
    gradient = world.expected_gradient(lambda r: kl(r.student.logp_NV, r.teachers["main"].logp_NV), world.student, rows)
    np.testing.assert_allclose(gradient, world.exact_gradient(np_kl, world.student), atol=1e-9)


@pytest.mark.parametrize("baseline", ["none", "kl", "topk_kl"])
def test_truncated_ratio_corrects_lag_exactly_when_nothing_is_capped(baseline) -> None:
    world = World()
    rows, exact = world.rows(world.lagged, world.teacher), world.exact_gradient(np_kl, world.lagged)
    objective = SampledKL(baseline=baseline, baseline_k=3, ratio_cap=1e6)
    assert_alive(world.expected_gradient(objective, world.lagged, rows), exact, unbiased=True)
    for ratio in ("none", "clip"):
        uncorrected = world.expected_gradient(SampledKL(baseline=baseline, baseline_k=3, ratio=ratio), world.lagged, rows)
        with pytest.raises(AssertionError, match="unbiased"):
            assert_alive(uncorrected, exact, unbiased=True)
        assert compare(uncorrected, exact)[0] > 0.8


def test_wide_clip_corrects_lag_exactly() -> None:
    world = World()
    objective = SampledKL(ratio="clip", clip=(0.999999, 1e6))
    expected = world.expected_gradient(objective, world.lagged, world.rows(world.lagged, world.teacher))
    assert_alive(expected, world.exact_gradient(np_kl, world.lagged), unbiased=True)


@pytest.mark.parametrize("baseline", ["none", "kl", "topk_kl"])
def test_a_shift_adds_the_policy_gradient_of_the_reward(baseline) -> None:
    world = World()
    rows = world.rows(world.student, world.teacher, shift_N=world.reward[world.sequence_N])
    expected = world.expected_gradient(SampledKL(baseline=baseline), world.student, rows)
    assert_alive(expected, world.exact_gradient(np_kl, world.student) + world.policy_gradient(), unbiased=True)


@pytest.mark.parametrize("size", [2, 3])
def test_group_advantage_with_oneself_in_the_mean_shrinks_the_gradient_by_one_over_g(size) -> None:
    """Enumerates every group of `size` attempts: cosine 1, norm 1 - 1/G."""
    world = World(vocabulary=3, horizon=2)
    probability = world.log_probability(world.student.detach()).exp()
    shift_S = torch.zeros(len(world.sequences), dtype=torch.float64)  # expected advantage of each sequence over its siblings
    for group in itertools.product(range(len(world.sequences)), repeat=size):
        siblings = float(probability[list(group[1:])].prod())
        shift_S[group[0]] += siblings * group_advantages([float(world.reward[index]) for index in group])[0]
    rows = world.rows(world.student, world.teacher, shift_N=shift_S[world.sequence_N])
    cosine, norm = compare(world.expected_gradient(Outcome(), world.student, rows), world.policy_gradient())
    assert cosine == pytest.approx(1, abs=1e-9)
    assert norm == pytest.approx(1 - 1 / size, abs=1e-9)
