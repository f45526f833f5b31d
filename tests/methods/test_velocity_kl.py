"""The KL of two denoising steps: by means, by velocities, by drawing; its weight; the objective in numpy
float64 from the definition.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from reflux.loss.flow_outputs import VelocityOutputs
from reflux.loss.term import Rows
from reflux.models.flow.sde import kl_weight, sde_step, step_logp
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.velocity_kl import VelocityKL
from reflux.types import SampledTarget, VelocityTarget

few = settings(max_examples=80, deadline=None, derandomize=True)
levels = st.floats(0.05, 3)
N, D = 5, 7
TIMES = np.array([1.0, 0.9, 0.5, 0.2, 0.03])
STEPS = np.array([-0.1, -0.2, -0.05, -0.2, -0.02])
NOISE = np.array([0.7, 0.3, 1.0, 2.0, 0.7])


def by_hand(t: float, dt: float, a: float) -> float:
    if t == 1:
        return dt**2 / (2 * a**2)
    sigma = a * math.sqrt(t / (1 - t))
    return abs(dt) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2


@few
@given(t=st.floats(0.01, 0.999), share=st.floats(0.001, 1), a=levels)
def test_the_weight_is_both_of_its_formulas(t, share, a) -> None:
    dt = -share * t
    assert kl_weight(t, dt, a) == pytest.approx(by_hand(t, dt, a), rel=1e-9)
    assert kl_weight(t, dt, a) == pytest.approx(abs(dt) / 2 * (1 - t) / t * (a / 2 + 1 / a) ** 2, rel=1e-9)


@few
@given(dt=st.floats(-1, -1e-4), a=levels)
def test_the_weight_at_pure_noise(dt, a) -> None:
    assert kl_weight(1.0, dt, a) == pytest.approx(dt**2 / (2 * a**2), rel=1e-12)


def test_arrays_and_tensors_of_rows() -> None:
    expected = [by_hand(*row) for row in zip(TIMES, STEPS, NOISE, strict=True)]
    np.testing.assert_allclose(kl_weight(TIMES, STEPS, NOISE), expected, rtol=1e-12)
    np.testing.assert_allclose(
        kl_weight(*map(torch.tensor, (TIMES, STEPS, NOISE))).numpy(), expected, rtol=1e-12
    )


@pytest.mark.parametrize("t", [0.9, 0.5, 0.05])
def test_over_the_noise_level_the_weight_is_least_at_the_root_of_two(t) -> None:
    found = optimize.minimize_scalar(
        lambda a: kl_weight(t, -0.01, a), bounds=(0.05, 10), method="bounded", options={"xatol": 1e-9}
    )
    assert found.x == pytest.approx(math.sqrt(2), abs=1e-4)


def test_the_weight_grows_like_one_over_t_towards_data_and_without_bound_as_the_noise_fades() -> None:
    t = np.array([1e-2, 1e-3, 1e-4, 1e-5])
    np.testing.assert_allclose(
        kl_weight(t, np.full(4, -1e-6), 0.7) * t, 0.5e-6 * (0.35 + 1 / 0.7) ** 2, rtol=2e-2
    )
    assert (np.diff(kl_weight(np.linspace(0.99, 0.02, 50), np.full(50, -0.01), 0.7)) > 0).all()
    assert kl_weight(0.5, -0.1, 1e-6) * 1e-12 == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("level", [0.0, np.array([0.7, 0.0]), torch.tensor([0.7, 0.0])])
def test_without_noise_there_is_no_kl_and_the_error_names_the_way_out(level) -> None:
    t = 0.5 if isinstance(level, float) else level * 0 + 0.5
    with pytest.raises(ValueError, match="weight = 'mse'"):
        kl_weight(t, -0.1, level)


@pytest.mark.parametrize(("t", "dt"), [(0.0, -0.1), (1.2, -0.1), (0.5, 0.1), (0.1, -0.2)])
def test_the_weight_refuses_what_the_step_refuses(t, dt) -> None:
    with pytest.raises(ValueError, match=r"t must lie|dt must be|must not end below"):
        kl_weight(t, dt, 0.7)


# --- three ways to one KL


@few
@given(
    x=st.floats(-3, 3),
    v=st.floats(-3, 3),
    other=st.floats(-3, 3),
    t=st.floats(0.02, 1),
    share=st.floats(0.01, 1),
    a=levels,
)
def test_kl_by_means_is_kl_by_velocities(x, v, other, t, share, a) -> None:
    state, dt = np.full(3, x), -share * t
    _, mean, std = sde_step(state, np.full(3, v), t, dt, a, state)
    _, mean_T, std_T = sde_step(state, np.full(3, other), t, dt, a, state)
    assert std == std_T
    by_means = ((mean - mean_T) ** 2).sum() / (2 * std**2)
    rounding = 1e-15 * (1 + abs(x) * a * a / (1 - t if t < 1 else -dt)) * abs(mean - mean_T).max() / std**2
    assert 3 * kl_weight(t, dt, a) * (v - other) ** 2 == pytest.approx(
        by_means, rel=1e-6, abs=1e-12 + 30 * rounding
    )


@pytest.mark.parametrize("n", range(N))
def test_kl_by_velocities_is_the_integral_over_both_densities(n) -> None:
    t, dt, a = TIMES[n], STEPS[n], NOISE[n]
    one, other = (
        np.array(sde_step(np.array([0.3]), np.array([v]), t, dt, a, np.zeros(1))[1])[0] for v in (0.8, -0.4)
    )
    std = sde_step(np.array([0.3]), np.array([0.8]), t, dt, a, np.zeros(1))[2]
    p, q = stats.norm(one, std), stats.norm(other, std)
    integral, _ = integrate.quad(
        lambda y: p.pdf(y) * (p.logpdf(y) - q.logpdf(y)), one - 12 * std, one + 12 * std, epsabs=1e-12
    )
    assert kl_weight(t, dt, a) * 1.2**2 == pytest.approx(integral, rel=1e-8)


@pytest.mark.parametrize("n", range(N))
def test_kl_by_velocities_is_the_mean_log_ratio_of_drawn_steps(n) -> None:
    t, dt, a = TIMES[n], STEPS[n], NOISE[n]
    rng = np.random.default_rng(n)
    draws = 20_000
    x, v, v_T = rng.standard_normal((3, D))
    rows = [np.tile(row, (draws, 1)) for row in (x, v, v_T)]
    made, mean, std = sde_step(rows[0], rows[1], t, dt, a, rng.standard_normal((draws, D)))
    _, mean_T, _ = sde_step(rows[0], rows[2], t, dt, a, made)
    ratio = step_logp(made, mean, std) - step_logp(made, mean_T, std)
    expected = kl_weight(t, dt, a) * ((v - v_T) ** 2).sum()
    assert ratio.mean() == pytest.approx(expected, abs=4 * ratio.std() / math.sqrt(draws))
    # there is something to tell apart
    assert expected > 0.01


# --- what a model says


def rows(
    seed: int = 0, dtype: torch.dtype = torch.float64, level: np.ndarray = NOISE
) -> Rows[VelocityOutputs]:
    rng = np.random.default_rng(seed)
    x, v, v_T, noise = (torch.tensor(rng.standard_normal((N, D)), dtype=dtype) for _ in range(4))
    columns = [
        torch.tensor(column, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for column in (TIMES, STEPS, level)
    ]
    made = sde_step(x, v, *(column[:, None] for column in columns), noise)[0]
    student = VelocityOutputs(v.clone().requires_grad_(), x, made, *columns)
    teacher = VelocityOutputs(v_T, x, made, *columns)
    return Rows(
        student,
        {"main": teacher},
        student.logp_N.detach() if level.all() else torch.zeros(N),
        torch.zeros(N, dtype=dtype),
    )


def test_logp_is_the_density_of_the_drawn_state_and_its_gradient_the_score() -> None:
    student = rows().student
    expected = []
    for n, (t, dt, a) in enumerate(zip(TIMES, STEPS, NOISE, strict=True)):
        sigma = a * math.sqrt(t / (1 - t)) if t < 1 else a / math.sqrt(-dt)
        x, v, made = (column[n].detach().numpy() for column in (student.x_ND, student.v_ND, student.next_ND))
        mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        expected.append((mean, sigma * math.sqrt(-dt), (1 + sigma**2 * (1 - t) / (2 * t)) * dt, made))
    logp_N = [stats.norm.logpdf(made, mean, std).sum() for mean, std, _, made in expected]
    np.testing.assert_allclose(student.logp_N.detach().numpy(), logp_N, rtol=1e-12)
    score_ND = [(made - mean) / std**2 * factor for mean, std, factor, made in expected]
    (gradient,) = torch.autograd.grad(student.logp_N.sum(), student.v_ND)
    np.testing.assert_allclose(gradient.numpy(), np.array(score_ND), rtol=1e-9)


def test_logp_keeps_its_graph_for_those_who_come_later() -> None:
    student = rows().student
    student = VelocityOutputs(
        student.v_ND, student.x_ND, student.next_ND, student.t_N, student.dt_N, student.noise_level_N
    )
    with torch.no_grad():
        _ = student.logp_N
    assert student.logp_N.requires_grad


def test_logp_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_level > 0"):
        _ = rows(level=np.zeros(N)).student.logp_N


def test_an_outcome_on_a_step_is_a_policy_gradient_on_its_density() -> None:
    """Flow-GRPO with no code of its own: at the student's own draws the gradient is -A times that of the
    log-density.
    """
    at = rows()
    at.advantage_offset_N = torch.tensor([1.0, -0.5, 0.0, 2.0, -3.0], dtype=torch.float64)
    expected = torch.autograd.grad(
        (-at.advantage_offset_N * at.student.logp_N).sum(), at.student.v_ND, retain_graph=True
    )[0]
    for ratio in ("clip", "none"):
        made = torch.autograd.grad(PolicyGradient(ratio=ratio)(at).sum(), at.student.v_ND, retain_graph=True)[
            0
        ]
        torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-12)


# --- the objective


def squares(at: Rows[VelocityOutputs]) -> np.ndarray:
    return (at.student.v_ND.detach().numpy() - at.teachers["main"].v_ND.numpy()) ** 2


def costs(at: Rows[VelocityOutputs], **settings: str) -> np.ndarray:
    return VelocityKL(**settings)(at).detach().numpy()  # type: ignore[arg-type]


def test_the_cost_is_the_definition() -> None:
    at = rows()
    weight_N = np.array([by_hand(*row) for row in zip(TIMES, STEPS, NOISE, strict=True)])
    np.testing.assert_allclose(costs(at), weight_N * squares(at).sum(1), rtol=1e-12)
    np.testing.assert_allclose(at.student.kl(at.teachers["main"]).numpy(), costs(at), rtol=1e-12)


def test_the_released_scale_is_a_mean_over_d_of_squared_means_over_twice_sigma_squared() -> None:
    """Its code divides by sigma, not by the step's width sigma sqrt(-dt), and averages over D."""
    at = rows()
    sigma_N = np.where(
        TIMES < 1, NOISE * np.sqrt(TIMES / (1 - np.minimum(TIMES, 0.999))), NOISE / np.sqrt(-STEPS)
    )
    of_v_N = (1 + sigma_N**2 * (1 - TIMES) / (2 * TIMES)) * STEPS
    expected = (of_v_N[:, None] ** 2 * squares(at)).mean(1) / (2 * sigma_N**2)
    np.testing.assert_allclose(costs(at, scale="released"), expected, rtol=1e-12)
    np.testing.assert_allclose(costs(at, scale="released"), costs(at) * np.abs(STEPS) / D, rtol=1e-12)


def test_mse_is_the_mean_over_d_with_or_without_noise() -> None:
    for level in (NOISE, np.zeros(N)):
        np.testing.assert_allclose(
            costs(rows(level=level), weight="mse"), squares(rows(level=level)).mean(1), rtol=1e-12
        )


@pytest.mark.parametrize("scale", ["nats", "released"])
def test_without_noise_mse_is_the_only_weight(scale) -> None:
    with pytest.raises(ValueError, match="weight = 'mse'"):
        VelocityKL(scale=scale)(rows(level=np.zeros(N)))


@pytest.mark.parametrize("settings", [{}, {"scale": "released"}, {"weight": "mse"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_at_home_cost_and_gradient_are_exactly_zero(settings, dtype) -> None:
    at = rows(dtype=dtype)
    at.teachers["main"].v_ND = at.student.v_ND.detach().clone()
    cost_N = VelocityKL(**settings)(at)
    assert (cost_N == 0).all()
    assert (torch.autograd.grad(cost_N.sum(), at.student.v_ND)[0] == 0).all()


def test_the_gradient_is_twice_the_weighted_gap_and_reaches_the_student_alone() -> None:
    at = rows()
    teacher = at.teachers["main"]
    teacher.v_ND.requires_grad_()
    at.student.x_ND.requires_grad_()
    cost_N = VelocityKL()(at)
    student, *constants = torch.autograd.grad(
        cost_N.sum(), [at.student.v_ND, teacher.v_ND, at.student.x_ND], allow_unused=True
    )
    assert constants == [None, None]
    weight_N = np.array([by_hand(*row) for row in zip(TIMES, STEPS, NOISE, strict=True)])
    gap_ND = (at.student.v_ND - teacher.v_ND).detach().numpy()
    np.testing.assert_allclose(student.numpy(), 2 * weight_N[:, None] * gap_ND, rtol=1e-12)


def test_a_row_costs_what_it_costs_alone() -> None:
    at, other = rows(), rows()
    other.teachers["main"].v_ND[0] += 5
    np.testing.assert_array_equal(costs(at)[1:], costs(other)[1:])
    assert costs(at)[0] != costs(other)[0]


def test_16_bit_velocities_are_compared_in_32() -> None:
    """300 squared is beyond float16; so is the sum of 4,096 squares of 10."""
    v_ND = torch.full((1, 4096), 10.0, dtype=torch.float16)
    one = torch.ones(1)
    student = VelocityOutputs((v_ND * 30).requires_grad_(), v_ND, v_ND, one * 0.5, one * -0.1, one * 0.7)
    teacher = VelocityOutputs(-v_ND, v_ND, v_ND, one * 0.5, one * -0.1, one * 0.7)
    (cost,) = VelocityKL()(Rows(student, {"main": teacher}, one, one))
    assert cost.dtype == torch.float32
    assert cost.item() == pytest.approx(by_hand(0.5, -0.1, 0.7) * 4096 * 310**2, rel=1e-5)


def test_what_it_hears_and_what_it_refuses() -> None:
    assert VelocityKL().accepts == (VelocityTarget,)
    assert SampledTarget not in VelocityKL().accepts
    assert not VelocityKL.takes_advantage_offset
    assert VelocityKL().requirements.behaviour == 0
    assert VelocityKL(teacher="behaviour").requirements.behaviour == 1
    assert (VelocityKL().teacher, VelocityKL().coef, VelocityKL().scale, VelocityKL().weight) == (
        "main",
        1.0,
        "nats",
        "kl",
    )
    with pytest.raises(ValueError, match="coef must be a finite number"):
        VelocityKL(coef=math.inf)
    with pytest.raises(ValueError, match="remove scale"):
        VelocityKL(scale="released", weight="mse")
