"""One denoising step and its density, from the formulas: scalars in plain Python, Gaussian data in closed
form, scipy's normal.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reflux.models.flow.diffusers_library import library
from reflux.models.flow.sde import sde_step, step_logp
from reflux.samplers.flow import Flow
from reflux.types import FlowRollout

few = settings(max_examples=80, deadline=None, derandomize=True)
numbers = st.floats(-3, 3)
LEVELS = (0.0, 0.1, 0.3, 0.7, 1.0, math.sqrt(2), 2.0)


def by_hand(x: float, v: float, t: float, dt: float, a: float) -> tuple[float, float]:
    """The page's step, letter by letter."""
    sigma = a * math.sqrt(t / (1 - t)) if t < 1 else a / math.sqrt(-dt)
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * math.sqrt(-dt)


@few
@given(
    x=numbers, v=numbers, noise=numbers, t=st.floats(0.01, 1), share=st.floats(0.001, 1), a=st.floats(0, 3)
)
def test_a_step_is_the_formula(x, v, noise, t, share, a) -> None:
    dt = -share * t
    made, mean, std = sde_step(np.array([x]), np.array([v]), t, dt, a, np.array([noise]))
    expected, spread = by_hand(x, v, t, dt, a)
    scale = 1 + abs(x) * (1 + a * a / (1 - t if t < 1 else -dt)) + abs(v) * (1 + a * a)
    assert mean[0] == pytest.approx(expected, abs=1e-12 * scale)
    assert std == pytest.approx(spread, rel=1e-9)
    assert made[0] == pytest.approx(expected + spread * noise, abs=1e-12 * scale + 1e-9 * spread)


@few
@given(x=numbers, v=numbers, noise=numbers, dt=st.floats(-1, -1e-3), a=st.floats(0, 3))
def test_at_pure_noise_the_pole_is_replaced(x, v, noise, dt, a) -> None:
    made, mean, std = sde_step(np.array([x]), np.array([v]), 1.0, dt, a, np.array([noise]))
    assert std == pytest.approx(a, rel=1e-12)
    assert mean[0] == pytest.approx(x * (1 - a * a / 2) + v * dt, abs=1e-12 * (1 + abs(x) * a * a))
    assert made[0] == pytest.approx(mean[0] + a * noise, abs=1e-12)


@few
@given(x=numbers, v=numbers, t=st.floats(0.01, 1), share=st.floats(0.001, 1), noise=st.floats(-1e6, 1e6))
def test_without_noise_a_step_is_eulers_bit_for_bit(x, v, t, share, noise) -> None:
    dt = -share * t
    made, mean, std = sde_step(np.array([x]), np.array([v]), t, dt, 0.0, np.array([noise]))
    assert std == 0
    assert made[0] == mean[0] == x + v * dt


def test_without_noise_a_walk_is_that_of_diffusers() -> None:
    scheduler = library().FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(torch.sin(y), t, y, return_dict=False)[0]
        start, stop = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        x = sde_step(x, torch.sin(x), start, stop - start, 0.0, torch.zeros_like(x))[0]
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_floats_arrays_and_tensors_agree_and_each_row_has_its_own_time() -> None:
    rng = np.random.default_rng(0)
    x, v, noise = rng.standard_normal((3, 4, 5))
    t, dt, a = (
        np.array([1.0, 0.8, 0.31, 0.05]),
        np.array([-0.2, -0.3, -0.01, -0.05]),
        np.array([0.7, 0.2, 0.0, 2.0]),
    )
    columns = [column[:, None] for column in (t, dt, a)]
    arrays = sde_step(x, v, *columns, noise)
    tensors = sde_step(*map(torch.tensor, (x, v, *columns, noise)))
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-12, atol=1e-15)
    assert arrays[2].shape == (4, 1)
    for n in range(4):
        alone = sde_step(x[n], v[n], float(t[n]), float(dt[n]), float(a[n]), noise[n])
        for row, array in zip(alone, arrays, strict=True):
            np.testing.assert_allclose(
                np.broadcast_to(row, 5), np.broadcast_to(array, (4, 5))[n], rtol=1e-12, atol=1e-15
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_widened_before_they_overflow(dtype) -> None:
    """At t = 0.999 with noise level 5 the factor of x in the drift is 12,500. Already 3,000 times x is beyond
    the largest float16, 65,504.
    """
    x = torch.tensor([[30.0, -8.0]], dtype=dtype)
    narrow = [x, -x, torch.tensor([[0.999]], dtype=torch.float32), torch.tensor([[-0.3]]), 5.0, x]
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in narrow]
    for made, expected in zip(sde_step(*narrow), sde_step(*wide), strict=True):
        assert made.dtype == torch.float32
        assert made.isfinite().all()
        # t itself is rounded to float32
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=0)
    assert sde_step(*wide)[1].abs().max() > 65504
    # 30 / 0.01, squared
    assert step_logp(x, x * 0, torch.tensor([[0.01]], dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("of", [np.asarray, torch.tensor])
def test_16_bit_arrays_too_and_nothing_is_rounded_to_16_bits_on_the_way(of) -> None:
    x, v, noise = (np.array(values, dtype=np.float16) for values in ([30.0, -8.0], [1.5, 0.3], [0.7, -2.1]))
    expected = sde_step(x.astype(float), v.astype(float), 0.5, -0.1, 0.7, noise.astype(float))
    for made, exact in zip(sde_step(of(x), of(v), 0.5, -0.1, 0.7, of(noise))[:2], expected, strict=False):
        assert str(made.dtype).endswith("float32")
        np.testing.assert_allclose(np.asarray(made), exact, rtol=1e-6)


BAD = [
    ({"t": 0.0}, r"t must lie in \(0, 1\]"),
    ({"t": -0.1}, r"t must lie in \(0, 1\]"),
    ({"t": 1.0001}, r"t must lie in \(0, 1\]"),
    ({"t": math.nan}, r"t must lie in \(0, 1\]"),
    ({"t": np.array([0.5, 1.5, 0.5])}, r"t must lie in \(0, 1\]"),
    ({"dt": 0.0}, "dt must be negative"),
    ({"dt": 0.1}, "dt must be negative"),
    ({"dt": math.nan}, "dt must be negative"),
    ({"dt": -0.50001}, "must not end below t = 0"),
    ({"noise_level": -0.1}, "noise_level must be 0"),
    ({"noise_level": math.inf}, "noise_level must be 0"),
    ({"v": np.zeros(2)}, "must have equal shapes"),
    ({"noise": np.zeros((1, 3))}, "must have equal shapes"),
    ({"t": np.full(2, 0.5)}, r"broadcast to this shape \(t\[:, None\] for rows\)"),
    ({"dt": np.full((2, 1), -0.1)}, "broadcast to this shape"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD)
def test_bad_input_is_refused_in_words(wrong, words) -> None:
    good = {
        "x": np.zeros(3),
        "v": np.zeros(3),
        "t": 0.5,
        "dt": -0.1,
        "noise_level": 0.7,
        "noise": np.zeros(3),
    }
    sde_step(**good)
    with pytest.raises(ValueError, match=words):
        sde_step(**(good | wrong))
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in (good | wrong).items()}
    with pytest.raises(ValueError, match=words):
        sde_step(**tensors)


def test_a_grid_in_float32_may_end_a_rounding_below_zero() -> None:
    sde_step(np.zeros(3), np.zeros(3), 0.1, float(np.float32(-0.1)), 0.7, np.zeros(3))


# --- the density


def test_the_log_density_is_the_normal_one_summed_over_a_state() -> None:
    rng = np.random.default_rng(1)
    made, mean = rng.standard_normal((2, 4, 7))
    std = np.array([0.05, 0.5, 1.0, 3.0])[:, None]
    expected = stats.norm.logpdf(made, mean, std).sum(-1)
    np.testing.assert_allclose(step_logp(made, mean, std), expected, rtol=1e-12)
    np.testing.assert_allclose(step_logp(*map(torch.tensor, (made, mean, std))).numpy(), expected, rtol=1e-12)
    assert step_logp(made[1], mean[1], 0.5) == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("std", [0.0, np.array([[0.1], [0.0]]), torch.tensor([[0.1], [0.0]])])
def test_the_ode_has_no_density(std) -> None:
    x = torch.zeros(2, 3) if isinstance(std, torch.Tensor) else np.zeros((2, 3))
    with pytest.raises(ValueError, match="noise_level > 0"):
        step_logp(x, x, std)


def test_a_step_is_drawn_from_its_density() -> None:
    """The mean of -log p over draws is the entropy of the normal, log(std sqrt(2 pi e)) a value."""
    noise = np.random.default_rng(2).standard_normal((200, 500))
    made, mean, std = sde_step(np.full_like(noise, 0.4), np.full_like(noise, -1.0), 0.6, -0.1, 0.7, noise)
    logp = step_logp(made, mean, std)
    assert -logp.mean() == pytest.approx(
        500 * stats.norm(scale=std).entropy(), abs=4 * logp.std() / math.sqrt(200)
    )


# --- the marginals


def exact_velocity(x: np.ndarray, t: float, mu: float, s: float) -> np.ndarray:
    """E[x_1 - x_0 | x_t = x] for x_0 ~ N(mu, s^2) and x_1 ~ N(0, 1): both are linear in x_t ~ N((1-t) mu,
    (1-t)^2 s^2 + t^2).

    cov(x_1 - x_0, x_t) = t - (1-t) s^2, so v = -mu + (t - (1-t) s^2) / ((1-t)^2 s^2 + t^2) (x - (1-t) mu).
    """
    return -mu + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * mu)


def moments(mu: float, s: float, a: float, steps: int) -> np.ndarray:
    """Mean and standard deviation of the state at every time of the walk from N(0, 1): a linear step keeps a
    Gaussian Gaussian.
    """
    mean, variance, found = 0.0, 1.0, [(0.0, 1.0)]
    grid = np.linspace(1, 0, steps + 1)
    for t, dt in itertools.pairwise(grid):
        ends = np.array([mean, mean + 1])
        _, (low, high), std = sde_step(ends, exact_velocity(ends, t, mu, s), t, dt - t, a, np.zeros(2))
        mean, variance = low, (high - low) ** 2 * variance + std**2
        found.append((mean, math.sqrt(variance)))
    return np.array(found)


@pytest.mark.parametrize("a", LEVELS)
@pytest.mark.parametrize(("mu", "s"), [(1.5, 0.5), (-0.7, 2.0), (0.0, 1.0)])
def test_the_marginals_of_gaussian_data_are_kept_at_every_noise_level(mu: float, s: float, a: float) -> None:
    """Means exactly; spreads ever closer as the steps grow. Euler's steps are off by O(1 / S). The first
    step, whose pole is replaced, leaves the noise a variance of (1 - a^2/2)^2 + a^2 = 1 + a^4/4, which the
    steps after it forget as S^(-a^2): the bound at small a."""
    for steps in (10, 40, 160, 640, 2560):
        t = np.linspace(1, 0, steps + 1)
        mean_S, std_S = moments(mu, s, a, steps).T
        np.testing.assert_allclose(mean_S, (1 - t) * mu, atol=1e-12)
        slow = a**4 * steps ** -min(a**2, 1.0) * (1 + math.log(steps) * (a == 1))
        assert abs(std_S[-1] - s) < s * (2 / steps + slow / 2)
    off = np.abs(std_S - np.sqrt((1 - t) ** 2 * s**2 + t**2))[len(t) // 2 :]  # pyright: ignore[reportPossiblyUnbound]
    # all the way, not at the end alone
    assert off.max() < 0.006 * s


def test_drawn_images_have_the_datas_mean_and_spread() -> None:
    mu, s, a, steps, count = 1.5, 0.5, 0.7, 60, 40_000
    rng = np.random.default_rng(3)
    x = rng.standard_normal(count)
    for t, stop in itertools.pairwise(np.linspace(1, 0, steps + 1)):
        x = sde_step(x, exact_velocity(x, t, mu, s), t, stop - t, a, rng.standard_normal(count))[0]
    mean, std = moments(mu, s, a, steps)[-1]
    assert x.mean() == pytest.approx(mean, abs=4 * s / math.sqrt(count))
    assert x.std() == pytest.approx(std, abs=4 * s / math.sqrt(2 * count))
    assert std == pytest.approx(s, abs=0.003)


# --- the part


def test_defaults_are_the_vetted_setting() -> None:
    part = Flow()
    assert (part.steps, part.noise_level, part.guidance, part.eval_steps) == (10, 0.7, 1.0, 40)
    assert (
        part.draw(3).step,
        part.draw(3).purpose,
        part.draw(3).max_positions,
        part.draw(3).temperature,
    ) == (3, "train", 10, 1.0)
    assert Flow.rollouts is FlowRollout


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"noise_level": -1.0}, {"noise_level": math.inf}, {"eval_steps": 0}, {"length": "x"}],
)
def test_a_part_that_cannot_work_is_refused(wrong) -> None:
    with pytest.raises(ValueError):
        Flow(**wrong)
