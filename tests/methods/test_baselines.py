"""Baselines and their variance, by enumerating every action of one position in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import rel_entr

from reflux.loss.baselines import (
    gradient_variance,
    kl_value,
    minimum_variance_value,
    topk_kl_value,
    variance_ratio,
)
from reflux.objectives.sampled_kl import advantage

VALUES = ["zero", "kl", "top-1", "top-3", "top-all", "five", "minimum"]


def pair(n: int = 3, v: int = 7, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    student, teacher = (torch.tensor(spread * rng.standard_normal((n, v))).log_softmax(-1) for _ in range(2))
    return student, teacher


def value_of(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor | float:
    if name.startswith("top"):
        return topk_kl_value(student, teacher, {"top-1": 1, "top-3": 3, "top-all": student.shape[1]}[name])
    return {
        "zero": 0.0,
        "kl": kl_value(student, teacher),
        "five": 5.0,
        "minimum": minimum_variance_value(student, teacher),
    }[name]


def kl_of(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    return rel_entr(p.numpy(), q.numpy()).sum(-1)


def advantages(student: torch.Tensor, teacher: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    """[N, V]: the advantage of every action."""
    columns = [advantage(student[:, a], teacher[:, a], value) for a in range(student.shape[1])]
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("name", VALUES)
def test_expected_gradient_is_the_kl_gradient_under_every_value(name):
    _, teacher = pair()
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.manual_seed(2), requires_grad=True)
    student = logits.log_softmax(-1)
    value = value_of(name, student.detach(), teacher)
    (made,) = torch.autograd.grad(
        (student.detach().exp() * -advantages(student, teacher, value) * student).sum(),
        logits,
        retain_graph=True,
    )
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits)
    torch.testing.assert_close(made, exact, rtol=1e-6, atol=1e-10)


@given(seed=st.integers(0, 10**6), v=st.integers(1, 9), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_mean_and_second_moment_of_the_advantage_fix_the_sign_of_the_value(seed, v, spread):
    student, teacher = pair(2, v, seed, spread)
    p, kl = student.exp(), torch.tensor(kl_of(student.exp(), teacher.exp()))
    raw, based = advantages(student, teacher, 0.0), advantages(student, teacher, kl_value(student, teacher))
    torch.testing.assert_close((p * based).sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((p * based**2).sum(-1), (p * raw**2).sum(-1) - kl**2, rtol=1e-9, atol=1e-11)


@given(seed=st.integers(0, 10**6), v=st.integers(2, 9), k=st.integers(1, 12))
def test_top_k_value_renormalises_both_on_the_students_ids(seed, v, k):
    student, teacher = pair(3, v, seed)
    ids = np.argsort(-student.numpy(), axis=-1)[:, :k]
    p_s, q_s = (np.take_along_axis(x.exp().numpy(), ids, -1) for x in (student, teacher))
    expected = -rel_entr(p_s / p_s.sum(-1, keepdims=True), q_s / q_s.sum(-1, keepdims=True)).sum(-1)
    value = topk_kl_value(student, teacher, k)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-12)
    # E_p[A] = KL(p_S || q_S) - KL(p || q)
    left_over = (student.exp() * advantages(student, teacher, value)).sum(-1)
    np.testing.assert_allclose(
        left_over.numpy(), -expected - kl_of(student.exp(), teacher.exp()), rtol=1e-9, atol=1e-11
    )


def test_top_k_ends_are_the_full_value_and_zero_exactly():
    student, teacher = pair()
    assert torch.equal(topk_kl_value(student, teacher, 7), kl_value(student, teacher))
    assert torch.equal(topk_kl_value(student, teacher, 100), kl_value(student, teacher))
    assert (topk_kl_value(student, teacher, 1) == 0).all()
    with pytest.raises(ValueError, match="k >= 1"):
        topk_kl_value(student, teacher, 0)


def test_scaling_the_teacher_on_the_list_gives_zero_where_a_partial_sum_would_not():
    student = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.15, 0.6]], dtype=torch.float64).log()
    assert topk_kl_value(student, teacher, 2).item() == pytest.approx(0, abs=1e-12)


def test_values_are_detached_never_positive_and_zero_at_home():
    student = pair(200, 30)[0].float().requires_grad_()
    # so near that float32 rounds a KL below 0
    teacher = (student.detach() * (1 + 1e-6)).log_softmax(-1)
    assert (student.exp() * (student - teacher)).sum(-1).min() < 0
    for value in (kl_value(student, teacher), topk_kl_value(student, teacher, 5), kl_value(student, student)):
        assert not value.requires_grad
        assert (value <= 0).all()
    assert (kl_value(student, student) == 0).all()
    assert (topk_kl_value(student, student, 5) == 0).all()


def enumerated_variance(student: torch.Tensor, teacher: torch.Tensor, value: np.ndarray) -> np.ndarray:
    """E|g|^2 - |E g|^2 over every action a, g = (r - value) (e_a - p)."""
    p, r = student.exp().numpy(), (teacher - student).numpy()
    eye = np.eye(p.shape[1])
    # [N, a, v]
    g = (r - value[:, None])[:, :, None] * (eye[None] - p[:, None, :])
    mean = (p[:, :, None] * g).sum(1)
    return (p * (g**2).sum(-1)).sum(-1) - (mean**2).sum(-1)


@given(
    seed=st.integers(0, 10**6),
    v=st.integers(1, 8),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
    name=st.sampled_from(VALUES),
)
def test_variance_formula_agrees_with_enumeration(seed, v, spread, name):
    student, teacher = pair(4, v, seed, spread)
    if name == "top-3" and v < 3:
        name = "top-1"
    value = torch.as_tensor(value_of(name, student, teacher), dtype=torch.float64).expand(4)
    expected, plain = (
        enumerated_variance(student, teacher, value.numpy()),
        enumerated_variance(student, teacher, np.zeros(4)),
    )
    np.testing.assert_allclose(
        gradient_variance(student, teacher, value).numpy(), expected, rtol=1e-8, atol=1e-10
    )
    if plain.sum() > 1e-6:
        assert variance_ratio(student, teacher, value) == pytest.approx(
            expected.sum() / plain.sum(), rel=1e-6
        )


def test_ratio_is_one_for_no_value_and_where_there_is_no_variance():
    student, teacher = pair()
    assert variance_ratio(student, teacher, 0.0) == 1.0
    assert variance_ratio(student, student, kl_value(student, student)) == 1.0


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_kl_value_lowers_the_summed_variance_though_not_at_every_prefix(spread):
    student, teacher = pair(500, 20, 0, spread)
    assert variance_ratio(student, teacher, kl_value(student, teacher)) < 1
    sure, flat = torch.tensor([[0.999, 0.0005, 0.0005]]).log(), torch.tensor([[0.4, 0.3, 0.3]]).log()
    # the page's counterexample: never assert a drop per prefix
    assert variance_ratio(sure, flat, kl_value(sure, flat)) > 1


def test_tokens_the_student_never_says_count_nothing():
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.3, 0.7, 0.0]]).log()
    short = (student[:, :2], teacher[:, :2])
    assert kl_value(student, teacher).item() == pytest.approx(kl_value(*short).item())
    assert gradient_variance(student, teacher, 0.1).item() == pytest.approx(
        gradient_variance(*short, 0.1).item()
    )


# --------------------------------------------------------------------------------------------------
# the value of least variance


def moments(student: torch.Tensor, teacher: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, r and w = |e_a - p|^2 of every action, [N, V], the norm taken entry by entry."""
    p, r = student.exp().numpy(), (teacher - student).numpy()
    eye = np.eye(p.shape[1])
    return p, r, ((eye[None] - p[:, None, :]) ** 2).sum(-1)


@given(seed=st.integers(0, 10**6), v=st.integers(2, 9), spread=st.sampled_from([0.1, 1.0, 4.0]))
def test_minimum_variance_value_is_its_definition_and_centres_the_weighted_advantage(seed, v, spread):
    student, teacher = pair(3, v, seed, spread)
    p, r, w = moments(student, teacher)
    value = minimum_variance_value(student, teacher).numpy()
    # a sure student: w loses digits HERE
    np.testing.assert_allclose(value, (p * r * w).sum(-1) / (p * w).sum(-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose((p * w * (r - value[:, None])).sum(-1), 0, atol=1e-11)
    np.testing.assert_allclose((p * w).sum(-1), 1 - (p**2).sum(-1), rtol=0, atol=1e-14)


@given(seed=st.integers(0, 10**6), v=st.integers(2, 8), spread=st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=30)
def test_no_other_value_of_the_prefix_has_less_variance(seed, v, spread):
    """Against a search over the enumerated variance, which knows no formula."""
    student, teacher = pair(1, v, seed, spread)
    found = minimize_scalar(
        lambda b: float(enumerated_variance(student, teacher, np.array([b]))[0]), method="brent", tol=1e-12
    )
    value = minimum_variance_value(student, teacher)
    assert value.item() == pytest.approx(found.x, rel=1e-5, abs=1e-5)
    least = gradient_variance(student, teacher, value).item()
    assert least <= found.fun + 1e-12
    for name in VALUES[:1] + VALUES[1:3] + ["five"]:
        assert least <= gradient_variance(student, teacher, value_of(name, student, teacher)).item() + 1e-12


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_it_lowers_the_variance_at_every_prefix_unlike_the_kl_value(spread):
    student, teacher = pair(500, 20, 0, spread)
    least, kl, none = (
        gradient_variance(student, teacher, value_of(name, student, teacher))
        for name in ("minimum", "kl", "zero")
    )
    assert (least <= torch.minimum(kl, none) + 1e-12).all()
    sure, flat = torch.tensor([[0.999, 0.0005, 0.0005]]).log(), torch.tensor([[0.4, 0.3, 0.3]]).log()
    assert (
        variance_ratio(sure, flat, minimum_variance_value(sure, flat))
        < 1
        < variance_ratio(sure, flat, kl_value(sure, flat))
    )
    # of the other sign than the reward's mean
    assert minimum_variance_value(sure, flat).item() > 0


def test_minimum_variance_value_at_its_edges():
    student, teacher = pair()
    assert not minimum_variance_value(student.requires_grad_(), teacher).requires_grad
    student = student.detach()
    assert (minimum_variance_value(student, student) == 0).all()
    inf = torch.inf
    sure = torch.tensor([[0.0, -inf, -inf]])
    # no noise to lower
    assert minimum_variance_value(sure, torch.tensor([[-1.0, -1.5, -1.2]])).tolist() == [0]
    assert minimum_variance_value(sure, torch.tensor([[-inf, -1.0, -0.5]])).tolist() == [0]
    padded, told = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log(), torch.tensor([[0.2, 0.3, 0.5, 0.0]]).log()
    assert minimum_variance_value(padded, told).item() == pytest.approx(
        minimum_variance_value(padded[:, :3], told[:, :3]).item()
    )
    # as kl_value
    assert minimum_variance_value(padded[:, :3], torch.tensor([[0.5, 0.5, 0.0]]).log()).tolist() == [-inf]
    assert minimum_variance_value(torch.full((1, 3), torch.nan), told[:, :3]).isnan().all()


def test_a_nearly_sure_token_the_teacher_never_says_makes_minus_infinity_whatever_the_rounding():
    """Its w is about (1 - p)^2, which float32 often makes negative; -inf times that would be +inf."""
    logits = torch.randn(500, 4, generator=torch.manual_seed(0))
    logits[:, 0] += torch.linspace(5, 40, 500)
    student, teacher = (
        logits.log_softmax(-1),
        torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]]).log_softmax(-1).expand(500, 4),
    )
    assert (minimum_variance_value(student, teacher) == -torch.inf).all()
    assert minimum_variance_value(student, student.roll(1, 0)).isfinite().all()


def test_a_sure_student_loses_no_digits_in_float32():
    logits = torch.tensor([[12.0, 0.0, -1.0, 0.5], [15.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, 0.0, 1.0, 0.5], [1.0, 1.5, 0.0, 3.0]], dtype=torch.float64).log_softmax(-1)
    student = logits.log_softmax(-1)
    exact = minimum_variance_value(student, teacher)
    torch.testing.assert_close(
        minimum_variance_value(student.float(), teacher.float()).double(), exact, rtol=2e-4, atol=0
    )
