"""Law 1 for flows: the expected gradient of each form of the loss, over ALL steps that can be sampled.

Expectations over Gaussian noise are sums over Gauss-Hermite nodes. They are exact for the polynomials of
linear students. The printed form of Flow-OPD, its released code and the gradient of the whole trajectory are
only here: the library has only the direct form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laws.estimators import assert_alive
from reflux.config.registry import kinds, part
from reflux.loss.flow_outputs import VelocityOutputs
from reflux.loss.term import Rows
from reflux.models.flow.sde import kl_weight, sde_step, step_logp
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.ratio import score_cost
from reflux.objectives.velocity_kl import VelocityKL
from reflux.types import VelocityTarget

Objective = Callable[[Rows[Any]], Tensor]
GRID = np.array([1.0, 0.7, 0.4, 0.15, 0.0])
LEVEL = 0.7


@dataclass
class Linear:
    """v(x, t) = W x + t u + b, in D dimensions; parameters [D, D + 2]."""

    parameters: Tensor

    @classmethod
    def drawn(cls, seed: int, size: int) -> Linear:
        return cls(
            torch.tensor(0.6 * np.random.default_rng(seed).standard_normal((size, size + 2))).requires_grad_()
        )

    def __call__(self, x_ND: Tensor, t_N: Tensor) -> Tensor:
        return features(x_ND, t_N) @ self.parameters.T


def features(x_ND: Tensor, t_N: Tensor) -> Tensor:
    return torch.cat([x_ND, t_N[:, None], torch.ones_like(t_N)[:, None]], dim=1)


def nodes(dimensions: int, each: int = 4) -> tuple[Tensor, Tensor]:
    """(noise [M, dimensions], weight [M]): sum of weight * f(noise) is E f, exactly for degrees up to 2 *
    each - 1.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(each)
    noise = np.array(list(itertools.product(points, repeat=dimensions)))
    weight = np.array(
        [np.prod(choice) for choice in itertools.product(weights / weights.sum(), repeat=dimensions)]
    )
    return torch.tensor(noise), torch.tensor(weight)


def rows(
    student: Linear, teacher: Linear, x_ND: Tensor, step_N: Tensor, noise_ND: Tensor
) -> Rows[VelocityOutputs]:
    """Steps sampled by the student from given states. Everything except its velocity is constant."""
    grid = torch.tensor(GRID)
    x_ND, columns = (
        x_ND.detach(),
        (grid[step_N], grid[step_N + 1] - grid[step_N], torch.full((len(x_ND),), LEVEL, dtype=torch.float64)),
    )
    v_ND, v_T_ND = student(x_ND, columns[0]), teacher(x_ND, columns[0]).detach()
    made = sde_step(x_ND, v_ND.detach(), *(column[:, None] for column in columns), noise_ND)[0]
    outputs = [VelocityOutputs(v, x_ND, made, *columns) for v in (v_ND, v_T_ND)]
    return Rows(
        outputs[0],
        {"main": outputs[1]},
        outputs[0].logp_N.detach(),
        torch.zeros(len(x_ND), dtype=torch.float64),
    )


def kl_N(at: Rows[VelocityOutputs]) -> Tensor:
    return VelocityKL()(at)


def score_function(at: Rows[VelocityOutputs]) -> Tensor:
    """A cost whose gradient ascends log pi_T(x') - log pi_s(x') through the student's log-density."""
    return (at.student.logp_N - at.teachers["main"].logp_N).detach() * at.student.logp_N


def printed(at: Rows[VelocityOutputs]) -> Tensor:
    """The paper: reward -w |sg(v_s) - v_T|^2, clipped importance weights, gradient only through the ratio."""
    return score_cost(-kl_N(at), at.student.logp_N, at.behaviour_logp_N, "clip", (1e-4, 1e-4), 1.0)


def released(at: Rows[VelocityOutputs]) -> Tensor:
    """The paper's code: the same, but the advantage -KL keeps its graph."""
    return kl_N(at) * (at.student.logp_N - at.behaviour_logp_N).exp()


# --- one step: states that are given


@pytest.fixture(scope="module")
def pair() -> tuple[Linear, Linear]:
    return Linear.drawn(0, 2), Linear.drawn(1, 2)


def states() -> tuple[Tensor, Tensor]:
    """Twelve states in two dimensions, three at each step of the grid."""
    return torch.tensor(np.random.default_rng(2).standard_normal((12, 2))), torch.arange(12) % 4


def expected_gradient(objective: Objective, student: Linear, teacher: Linear) -> np.ndarray:
    """E over the sampled steps of the gradient of the summed cost, for given states."""
    x_ND, step_N = states()
    noise_MD, weight_M = nodes(2)
    copies = (len(noise_MD), 1)
    at = rows(
        student,
        teacher,
        x_ND.repeat(*copies),
        step_N.repeat(len(noise_MD)),
        noise_MD.repeat_interleave(12, dim=0),
    )
    loss = (weight_M.repeat_interleave(12) * objective(at)).sum()
    return torch.autograd.grad(loss, student.parameters)[0].numpy()


# (v, v_T, mean, mean_T, std, dt)
Loss = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def exact_gradient(student: Linear, teacher: Linear, loss: Loss | None = None) -> np.ndarray:
    """Central differences, in numpy, of a loss summed over the states: by default the KL, squared means over
    twice the variance.
    """
    x_ND, step_N = (column.numpy() for column in states())
    t, dt = GRID[step_N][:, None], (GRID[1:] - GRID[:-1])[step_N][:, None]
    sigma = np.where(t < 1, LEVEL * np.sqrt(t / np.where(t < 1, 1 - t, 1)), LEVEL / np.sqrt(-dt))
    features_NF = np.concatenate([x_ND, t, np.ones_like(t)], axis=1)

    def total(parameters: np.ndarray) -> float:
        v_ND, v_T_ND = (features_NF @ p.T for p in (parameters, teacher.parameters.detach().numpy()))
        means = [
            x_ND * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
            for v in (v_ND, v_T_ND)
        ]
        return float((loss or by_means)(v_ND, v_T_ND, *means, sigma * np.sqrt(-dt), dt).sum())

    return differences(total, student.parameters.detach().numpy())


def by_means(
    v: np.ndarray, v_T: np.ndarray, mean: np.ndarray, mean_T: np.ndarray, std: np.ndarray, dt: np.ndarray
) -> np.ndarray:
    return (mean - mean_T) ** 2 / (2 * std**2)


def differences(f: Callable[[np.ndarray], float], at: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        shift = np.zeros_like(at)
        shift[index] = epsilon
        gradient[index] = (f(at + shift) - f(at - shift)) / (2 * epsilon)
    return gradient


# every objective on velocities that is registered, in every form it has
SETTINGS: dict[str, list[tuple[Any, Loss]]] = {
    "velocity_kl": [
        (VelocityKL(), by_means),
        (
            VelocityKL(scale="released"),
            lambda v, v_T, mean, mean_T, std, dt: (mean - mean_T) ** 2 / (2 * std**2) * -dt / v.shape[1],
        ),
        (VelocityKL(weight="mse"), lambda v, v_T, mean, mean_T, std, dt: (v - v_T) ** 2 / v.shape[1]),
    ]
}


def test_every_objective_on_velocities_is_here() -> None:
    on_velocities = [
        kind for kind in kinds("objectives") if VelocityTarget in part("objectives", kind)().accepts
    ]
    assert sorted(on_velocities) == sorted(SETTINGS)


@pytest.mark.parametrize(
    ("objective", "loss"), [setting for settings in SETTINGS.values() for setting in settings]
)
def test_expected_gradient_is_alive_and_exact(objective: Objective, loss: Loss, pair) -> None:
    assert_alive(expected_gradient(objective, *pair), exact_gradient(*pair, loss), unbiased=True)


@pytest.mark.parametrize("ratio", ["clip", "none"])
def test_an_outcome_of_the_drawn_step_has_the_expected_rewards_gradient(ratio, pair) -> None:
    """Flow-GRPO: the reward of the sampled state x' is x'_0 + |x'|^2. Its expectation is
    mean_0 + |mean|^2 + D std^2.
    """

    def outcome(at: Rows[VelocityOutputs]) -> Tensor:
        at.advantage_offset_N = at.student.next_ND[:, 0] + at.student.next_ND.square().sum(1)
        return PolicyGradient(ratio=ratio)(at)

    def loss(
        v: np.ndarray, v_T: np.ndarray, mean: np.ndarray, mean_T: np.ndarray, std: np.ndarray, dt: np.ndarray
    ) -> np.ndarray:
        return -(mean[:, 0] + (mean**2).sum(1))

    assert_alive(expected_gradient(outcome, *pair), exact_gradient(*pair, loss), unbiased=True)


@pytest.mark.parametrize("form", [kl_N, score_function, released])
def test_direct_score_and_released_forms_are_alive_and_have_the_exact_gradient(form, pair) -> None:
    assert_alive(expected_gradient(form, *pair), exact_gradient(*pair), unbiased=True)


def test_law_1_flags_the_printed_form_as_dead(pair) -> None:
    expected, exact = expected_gradient(printed, *pair), exact_gradient(*pair)
    assert np.abs(expected).max() < 1e-10 * np.abs(exact).max()
    with pytest.raises(AssertionError, match="dead"):
        assert_alive(expected, exact, unbiased=False)


def test_detaching_the_direct_form_would_stop_learning_altogether(pair) -> None:
    """A misplaced detach() in the library's loss leaves no graph, which law 1 detects."""

    def detached(at: Rows[VelocityOutputs]) -> Tensor:
        return kl_N(at).detach() + 0 * at.student.logp_N

    with pytest.raises(AssertionError, match="dead"):
        assert_alive(expected_gradient(detached, *pair), exact_gradient(*pair), unbiased=False)


def test_at_identity_the_direct_form_has_no_gradient_and_the_score_function_none_in_expectation() -> None:
    student = Linear.drawn(0, 2)
    home = Linear(student.parameters.detach().clone())
    assert np.abs(expected_gradient(kl_N, student, home)).max() == 0
    # the log-ratio is 0 for every sample
    assert np.abs(expected_gradient(score_function, student, home)).max() == 0


# --- one step: drawn, as a run would


def drawn_gradients(
    objective: Objective, student: Linear, teacher: Linear, count: int = 40_000
) -> np.ndarray:
    """One gradient per sampled (state, step): [count, parameters]. For a linear student it is (d cost / d v)
    times the features.
    """
    rng = np.random.default_rng(3)
    x_ND, noise_ND = (torch.tensor(rng.standard_normal((count, 2))) for _ in range(2))
    at = rows(student, teacher, x_ND, torch.tensor(rng.integers(0, 4, count)), noise_ND)
    (slope_ND,) = torch.autograd.grad(objective(at).sum(), at.student.v_ND)
    return (slope_ND[:, :, None] * features(x_ND, at.student.t_N)[:, None, :]).flatten(1).numpy()


def error_of(gradients: np.ndarray) -> np.ndarray:
    return gradients.std(0) / np.sqrt(len(gradients))


def test_drawn_means_agree_within_their_error_and_the_direct_form_is_least_noisy(pair) -> None:
    direct, score, code, dead = (
        drawn_gradients(form, *pair) for form in (kl_N, score_function, released, printed)
    )
    for other in (score, code):
        # on the same samples the difference is noise with mean 0
        assert (np.abs((other - direct).mean(0)) < 4.5 * error_of(other - direct)).all()
        assert (other.var(0) > 2 * direct.var(0)).all()
    assert (np.abs(dead.mean(0)) < 4.5 * error_of(dead)).all()
    # a gradient of the direct form's size would have been detected
    assert (np.abs(direct.mean(0)) > 4.5 * error_of(dead)).any()
    # it consists only of noise, which Adam scales up to full steps
    assert (dead.var(0) > direct.var(0)).all()


# --- a whole trajectory


def trajectory_kl(parameters: np.ndarray, teacher: np.ndarray) -> float:
    """The sum over steps of E KL, by moments: with a linear student on a line, Gaussian states stay Gaussian.
    In plain Python, from the formulas of the method page.
    """
    mean, variance, total = 0.0, 1.0, 0.0
    for t, stop in itertools.pairwise(GRID):
        dt = stop - t
        sigma = LEVEL * (t / (1 - t)) ** 0.5 if t < 1 else LEVEL / (-dt) ** 0.5
        pull, push = 1 + sigma**2 / (2 * t) * dt, (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        slope, offset = parameters[0, 0] - teacher[0, 0], (parameters - teacher)[0] @ [0, t, 1]
        total += push**2 / (2 * sigma**2 * -dt) * (slope**2 * variance + (slope * mean + offset) ** 2)
        gain = pull + push * parameters[0, 0]
        mean, variance = gain * mean + push * (parameters[0] @ [0, t, 1]), gain**2 * variance + sigma**2 * -dt
    return float(total)


def trajectory(
    student: Linear, teacher: Linear, noise_MS: Tensor, through_states: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """KL and log-density of every step along trajectories with given noise, [M] each, and the states that the
    steps start from, [M, 1].
    """
    teacher = Linear(teacher.parameters.detach())
    x_M1 = noise_MS[:, :1]
    kl, logp, starts = [], [], []
    for step, (t, stop) in enumerate(itertools.pairwise(GRID)):
        t_M = torch.full((len(noise_MS),), t, dtype=torch.float64)
        v_M1 = student(x_M1, t_M)
        kl.append(kl_weight(t, stop - t, LEVEL) * (v_M1 - teacher(x_M1, t_M)).square()[:, 0])
        made_M1, mean_M1, std = sde_step(x_M1, v_M1, t, stop - t, LEVEL, noise_MS[:, step + 1 : step + 2])
        logp.append(step_logp(made_M1.detach(), mean_M1, std))
        starts.append(x_M1.detach())
        x_M1 = made_M1 if through_states else made_M1.detach()
    return kl, logp, starts


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_trajectorys_gradient_is_the_direct_one_and_the_cost_of_later_steps(seed) -> None:
    """The library leaves out sum_t grad log pi_t * (KL of later steps) on purpose. With this term the
    gradient equals the pathwise gradient.
    """
    student, teacher = Linear.drawn(seed, 1), Linear.drawn(seed + 10, 1)
    # noise of the start and of every step except the last, because no cost depends on its end
    noise_MS, weight_M = nodes(len(GRID) - 1)
    noise_MS = torch.cat([noise_MS, torch.zeros(len(noise_MS), 1)], dim=1)

    def gradient(loss_M: Any) -> np.ndarray:
        return torch.autograd.grad((weight_M * loss_M).sum(), student.parameters, retain_graph=True)[
            0
        ].numpy()

    pathwise = gradient(sum(trajectory(student, teacher, noise_MS, through_states=True)[0]))
    kl, logp, starts = trajectory(student, teacher, noise_MS, through_states=False)
    direct = gradient(sum(kl))
    later = gradient(sum(logp[t] * sum(kl[t + 1 :], torch.zeros(())).detach() for t in range(len(kl))))

    exact = differences(
        lambda p: trajectory_kl(p, teacher.parameters.detach().numpy()), student.parameters.detach().numpy()
    )
    # a check of the reference
    np.testing.assert_allclose(pathwise, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(direct + later, pathwise, rtol=1e-9, atol=1e-9)
    assert np.linalg.norm(direct - pathwise) > 0.03 * np.linalg.norm(pathwise)
    ours = [
        gradient(kl_N(rows(student, teacher, x_M1, torch.full((len(x_M1),), t), noise_MS[:, :1])))
        for t, x_M1 in enumerate(starts)
    ]
    np.testing.assert_allclose(sum(ours), direct, rtol=1e-12, atol=1e-12)
