"""Law 1 if attempts are sampled at another temperature, with top-p, or by an older student: the ratio
corrects the choice at each prefix.

Every answer of a small world becomes an attempt, weighted by its sampling probability (`drawing.py`). The
exact gradient is computed from the definition in float64, at the prefixes that are visited.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from laws.drawing import Drawing, reverse_kl_inside
from laws.estimators import assert_alive, choices, compare
from reflux.objectives.divergence import Divergence
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL

# vocabulary, longest answer, seed
WORLDS = [(5, 2, 0), (4, 3, 1), (6, 2, 2)]
# temperature, top-p
DRAWN = [(0.7, 1.0), (1.6, 1.0), (1.0, 0.8), (0.7, 0.8)]
# a clip that never binds
WIDE = (1 - 1e-9, 1e9)
UNBOUND = [SampledKL(ratio_cap=1e9), SampledKL(ratio="clip", clip=WIDE)]


@pytest.mark.parametrize(("temperature", "top_p"), DRAWN)
@pytest.mark.parametrize("objective", UNBOUND, ids=["truncated", "clip"])
@pytest.mark.parametrize("policy", ["student", "lagged"])
def test_the_ratio_corrects_what_was_drawn_from_another_distribution(
    objective, temperature, top_p, policy
) -> None:
    for shape in WORLDS:
        drawing = Drawing(shape, temperature, top_p, policy)
        assert drawing.inside.all() == (top_p == 1)
        assert_alive(
            drawing.expected_gradient(objective), drawing.exact_gradient(reverse_kl_inside), unbiased=True
        )


@pytest.mark.parametrize(
    "baseline", [name for name in choices(SampledKL, "baseline") if name not in GROUP_BASELINES]
)
def test_every_value_of_the_prefix_stays_unbiased_at_another_temperature(baseline) -> None:
    for shape in WORLDS:
        drawing = Drawing(shape, 0.7, 1.0)
        objective = SampledKL(baseline=baseline, baseline_k=2, ratio_cap=1e9)
        assert_alive(
            drawing.expected_gradient(objective), drawing.exact_gradient(reverse_kl_inside), unbiased=True
        )


@pytest.mark.parametrize("shape", [(3, 2, 0), (4, 1, 1)])
def test_leave_one_out_stays_unbiased_at_another_temperature(shape) -> None:
    drawing = Drawing(shape, 0.7, 1.0)
    expected = drawing.expected_gradient(SampledKL(baseline="leave_one_out", ratio_cap=1e9), size=2)
    assert_alive(expected, drawing.exact_gradient(reverse_kl_inside), unbiased=True)


def test_a_value_adds_the_gradient_of_the_mass_inside_top_p() -> None:
    """Over a part of the tokens the mean of the score function is not 0, so a baseline changes the
    gradient.
    """
    drawing = Drawing(WORLDS[0], 1.0, 0.8)
    plain, based = (
        drawing.expected_gradient(SampledKL(baseline=name, ratio_cap=1e9)) for name in ("none", "kl")
    )

    def value_of_the_mass(p: Tensor, q: Tensor, inside: Tensor) -> Tensor:
        kl = (p.exp() * (p - q)).sum(-1).detach()
        return -kl * p.exp().where(inside, 0.0).sum(-1)

    np.testing.assert_allclose(based - plain, drawing.exact_gradient(value_of_the_mass), atol=1e-7)


@pytest.mark.parametrize(("temperature", "top_p"), DRAWN)
def test_rewards_are_corrected_too(temperature, top_p) -> None:
    """The ratio corrects the token of a row and not the tokens after it: the result is the sum over tokens of
    p(a) times the mean reward of the sampled continuations.
    """
    for shape in [(6, 1, 0), *WORLDS]:
        drawing = Drawing(shape, temperature, top_p)
        reward = drawing.onward_reward()
        exact = drawing.exact_gradient(
            lambda p, q, inside, reward=reward: -(p.exp() * reward).where(inside, 0.0).sum(-1)
        )
        assert_alive(drawing.expected_gradient(PolicyGradient(clip=WIDE)), exact, unbiased=True)
        if shape[1] == 1 and top_p == 1:
            assert_alive(exact, drawing.world.policy_gradient(), unbiased=True)


@pytest.mark.parametrize(("temperature", "top_p"), DRAWN)
def test_a_ratio_on_a_divergence_weighs_a_prefix_by_the_mass_that_may_be_drawn(temperature, top_p) -> None:
    for shape in WORLDS:
        drawing = Drawing(shape, temperature, top_p)
        mass = drawing.raw.exp().where(drawing.inside, 0.0).sum(-1)
        exact = drawing.exact_gradient(lambda p, q, _, mass=mass: mass * (p.exp() * (p - q)).sum(-1))
        assert_alive(
            drawing.expected_gradient(Divergence(ratio="truncated", ratio_cap=1e9)), exact, unbiased=True
        )


@pytest.mark.parametrize(
    "objective", [SampledKL(ratio="none"), SampledKL(ratio_cap=1.0), SampledKL(ratio="clip")]
)
def test_without_a_ratio_or_where_its_bound_binds_the_bias_stays(objective) -> None:
    drawing = Drawing(WORLDS[0], 0.7, 1.0)
    expected, exact = drawing.expected_gradient(objective), drawing.exact_gradient(reverse_kl_inside)
    with pytest.raises(AssertionError, match="unbiased"):
        assert_alive(expected, exact, unbiased=True)
    free = drawing.expected_gradient(replace(objective, ratio="truncated", ratio_cap=1e9))
    assert compare(expected, exact)[0] < 0.999 < compare(free, exact)[0]
