"""The Triton kernels against `objectives.divergences` in float64 and against plain numpy, on a GPU or through
Triton's interpreter.
"""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from device import DEVICE, ON_GPU
from interpreted import interpreted
from reflux.kernels import triton_divergence as fused
from reflux.kernels import triton_launch
from reflux.loss.divergences import DIVERGENCES, with_tail
from reflux.objectives.divergence import MIXED

if find_spec("triton") is None:
    pytest.skip(
        "Triton is not installed: pip install triton, and these tests run without a GPU",
        allow_module_level=True,
    )

# numpy's word on inf - inf inside the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
INF = math.inf
WEIGHTS = (0.0, 0.03, 0.5, 0.9, 1.0)
# None: the default
CASES = [
    (kind, weight) for kind in DIVERGENCES for weight in ((None, *WEIGHTS) if kind in MIXED else (None,))
]


@pytest.fixture(scope="module", autouse=True)
def small_blocks_and_no_compiler():
    with interpreted():
        yield


def table(
    n: int,
    v: int,
    seed: int,
    spread: float = 2.0,
    zeros: float = 0.0,
    dtype: torch.dtype = torch.float32,
    pad: int = 0,
):
    """Random logits, not normalised, cut out of a wider table whose padding is NaN; a share `zeros` is -inf,
    never a whole row.
    """
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((n, v)) + rng.normal()
    gone = rng.random((n, v)) < zeros
    gone[:, rng.integers(v)] = False
    wide = torch.full((n, v + pad), math.nan, dtype=dtype, device=DEVICE)
    wide[:, :v] = torch.tensor(np.where(gone, -INF, logits)).to(dtype)
    return wide[:, :v]


def exact(kind: str, student: torch.Tensor, teacher: torch.Tensor, weight: float | None) -> torch.Tensor:
    """The library's own divergence of raw logits, in float64."""
    extra = () if weight is None else (weight,)
    return DIVERGENCES[kind](student.double().log_softmax(-1), teacher.double().log_softmax(-1), *extra)


def gradient(cost: torch.Tensor, leaf: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((coef * cost).sum(), leaf)[0] if cost.requires_grad else torch.zeros_like(leaf)


def assert_close(made: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    # one unit of bfloat16: Triton's interpreter truncates
    rtol = max(tolerance, 2**-7) if made.dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(made.double(), expected.double(), rtol=rtol, atol=tolerance)


def coefficients(n: int) -> torch.Tensor:
    return torch.tensor([1.0, -0.5, 2.0, 0.25][:n], device=DEVICE)


shapes = {
    "n": st.sampled_from([0, 1, 3]),
    "v": st.sampled_from([1, 2, 7, 31, 32, 33, 64, 75]),
    "seed": st.integers(0, 10**6),
}
storage = {"dtype": st.sampled_from([torch.float32, torch.bfloat16]), "pad": st.sampled_from([0, 5])}
few = settings(deadline=None, max_examples=4, derandomize=True, phases=(Phase.explicit, Phase.generate))


@few
@given(**shapes, **storage, spread=st.sampled_from([0.1, 2.0, 8.0]), zeros=st.sampled_from([0.0, 0.4]))
@example(n=3, v=75, seed=0, dtype=torch.float32, pad=5, spread=2.0, zeros=0.4)
@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_divergences_and_gradients_are_those_of_the_reference(
    kind, weight, n, v, seed, dtype, pad, spread, zeros
):
    student = table(n, v, seed, spread, zeros, dtype, pad).requires_grad_()
    teacher = table(n, v, seed + 1, spread, zeros, dtype, 2 * pad)
    leaf = student.detach().double().requires_grad_()
    cost, expected = fused.divergence(student, teacher, kind, weight), exact(kind, leaf, teacher, weight)
    assert cost.dtype == torch.float32
    assert_close(cost.detach(), expected.detach(), 5e-6)
    finite = expected.isfinite()
    made = gradient(cost, student, coefficients(n))
    assert made.dtype == dtype
    # the gradient is a difference of terms as large as the cost
    size = 1 + expected.detach()[finite].sum().item()
    wanted = gradient(expected, leaf, coefficients(n))
    assert_close(made[finite], wanted[finite], 2e-6 * size)


def by_hand(kind: str, x: np.ndarray, y: np.ndarray, weight: float) -> np.ndarray:
    """The method page's formulas over probabilities in numpy, float64."""
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * np.log(a / b)).sum(-1)

    return {
        "reverse": lambda: kl(p, q),
        "forward": lambda: kl(q, p),
        "jsd": lambda: (
            weight * kl(q, (1 - weight) * p + weight * q)
            + (1 - weight) * kl(p, (1 - weight) * p + weight * q)
        ),
        "skew_reverse": lambda: kl(p, (1 - weight) * q + weight * p),
        "skew_forward": lambda: kl(q, weight * q + (1 - weight) * p),
        "alpha": lambda: (1 - (p**weight * q ** (1 - weight)).sum(-1)) / (weight * (1 - weight)),
        "tv": lambda: 0.5 * np.abs(p - q).sum(-1),
    }[kind]()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_and_finite_differences_of_the_definition_in_numpy(kind):
    weight = 0.3 if kind in MIXED else None
    student, teacher = table(2, 37, 5).requires_grad_(), table(2, 37, 6)
    x, y = (z.detach().double().cpu().numpy() for z in (student, teacher))
    cost = fused.divergence(student, teacher, kind, weight)
    np.testing.assert_allclose(cost.detach().cpu(), by_hand(kind, x, y, 0.3), rtol=3e-6)
    made, slopes = gradient(cost, student, torch.ones(2, device=DEVICE)), np.zeros_like(x)
    for v in range(37):
        step = np.eye(37)[v] * 1e-5
        slopes[:, v] = (by_hand(kind, x + step, y, 0.3) - by_hand(kind, x - step, y, 0.3)) / 2e-5
    np.testing.assert_allclose(made.cpu(), slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "weight"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_cost_zero_to_the_bit_with_no_gradient(kind, weight, dtype):
    student = table(1, 50, 0, 3.0, 0.2, dtype).requires_grad_()
    cost = fused.divergence(student, student.detach().clone(), kind, weight)
    assert (cost == 0).all()
    assert (gradient(cost, student, coefficients(1)) == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_coefficient_of_zero_gives_exactly_no_gradient_also_where_the_cost_is_infinite(kind):
    student, teacher = table(3, 40, 0).requires_grad_(), table(3, 40, 1)
    # reverse: infinite
    teacher[1, 3] = -INF
    with torch.no_grad():
        # forward: infinite
        student[1, 5] = -INF
    cost = fused.divergence(student, teacher, kind)
    assert (cost[1] == INF).item() == (kind in ("reverse", "forward"))
    coef = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    made = torch.autograd.grad(cost, student, coef)[0]
    assert (made[1] == 0).all()
    assert (made[[0, 2]] != 0).any(-1).all()
    with torch.no_grad():
        student[1, 3] = math.nan
    logp = fused.with_tail(student, torch.tensor([[5, 3]] * 3, device=DEVICE))
    made = torch.autograd.grad(logp, student, coef[:, None].expand(-1, 3))[0]
    assert (made[1] == 0).all()
    assert (made[[0, 2]] != 0).any(-1).all()


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_huge_logits_and_underflowing_probabilities(kind, weight):
    student, teacher = (table(2, 70, seed, 1e4) for seed in (0, 1))
    student[1], teacher[1] = student[1] / 100, teacher[1] / 100
    student.requires_grad_()
    leaf = student.detach().double().requires_grad_()
    cost, expected = fused.divergence(student, teacher, kind, weight), exact(kind, leaf, teacher, weight)
    torch.testing.assert_close(cost.detach().double(), expected.detach(), rtol=1e-6, atol=1e-4)
    made = gradient(cost, student, coefficients(2))
    torch.testing.assert_close(made.double(), gradient(expected, leaf, coefficients(2)), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind != "tv"])
def test_a_small_divergence_keeps_its_digits(kind):
    student = table(3, 60, 0) + 40
    teacher = student + 1e-3 * table(3, 60, 1)
    torch.testing.assert_close(
        fused.divergence(student, teacher, kind).double(),
        exact(kind, student, teacher, None),
        rtol=0.02,
        atol=0,
    )


def test_nan_is_passed_on_and_stays_in_its_row():
    student, teacher = table(2, 40, 0), table(2, 40, 1)
    student[0, 33] = math.nan
    for kind in DIVERGENCES:
        assert fused.divergence(student, teacher, kind).isnan().tolist() == [True, False]
        assert fused.divergence(teacher, student, kind).isnan().tolist() == [True, False]


@few
@given(**shapes, **storage, zeros=st.sampled_from([0.0, 0.4]), spread=st.sampled_from([2.0, 1e4]))
@example(n=3, v=75, seed=0, dtype=torch.float32, pad=5, zeros=0.4, spread=1e4)
def test_logsumexp_and_summary_follow_their_definition(n, v, seed, dtype, pad, zeros, spread):
    student, teacher = (
        table(n, v, seed, spread, zeros, dtype, pad),
        table(n, v, seed + 1, spread, 0.0, dtype, pad),
    )
    made = fused.logsumexp(student.requires_grad_())
    assert not made.requires_grad
    torch.testing.assert_close(made.double(), student.detach().double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    logp = student.detach().double().log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -INF, 0)).sum(-1)
    kl, own = fused.summary(student, teacher, student_lse_N=made)
    assert_close(own, entropy, 5e-6 if spread < 1e3 else 1e-3)
    assert_close(kl, exact("reverse", student.detach(), teacher, None), 5e-6 if spread < 1e3 else 1e-3)
    nothing, alone = fused.summary(student, None)
    assert nothing is None
    assert torch.equal(alone, own)
    assert not kl.requires_grad
    assert not own.requires_grad


@few
@given(**shapes, **storage, zeros=st.sampled_from([0.0, 0.4]), data=st.data())
def test_listed_log_probs_and_their_tail_are_those_of_the_reference(n, v, seed, dtype, pad, zeros, data):
    k, rng = data.draw(st.integers(0, v)), np.random.default_rng(seed)
    logits = table(n, v, seed, 2.0, zeros, dtype, pad).requires_grad_()
    ids = torch.tensor(
        np.array([rng.permutation(v)[:k] for _ in range(n)], dtype=np.int64).reshape(n, k), device=DEVICE
    )
    leaf = logits.detach().double().requires_grad_()
    expected = with_tail(leaf.log_softmax(-1), ids)
    coef = torch.tensor(rng.standard_normal((n, k + 1)), device=DEVICE)
    # no coefficient where the log-prob is -inf: 0 * inf
    coef = coef.where(expected > -INF, 0)
    for made, end in ((fused.with_tail(logits, ids), k + 1), (fused.gather_logp(logits, ids), k)):
        assert_close(made.detach(), expected[:, :end].detach(), 3e-6)
        got = torch.autograd.grad((coef[:, :end] * made).nan_to_num(0, 0, 0).sum(), logits)[0]
        wanted = torch.autograd.grad(
            (coef[:, :end] * expected[:, :end]).nan_to_num(0, 0, 0).sum(), leaf, retain_graph=True
        )[0]
        assert_close(got, wanted, 5e-6)


def test_token_log_probs_of_a_sure_model_keep_their_small_gradient_in_bfloat16():
    logits = torch.tensor(
        [[9.0, 0.0, 0.0], [0.0, 1.0, -INF]], dtype=torch.bfloat16, device=DEVICE, requires_grad=True
    )
    ids = torch.tensor([0, 1], device=DEVICE)
    made = fused.token_logp(logits, ids, fused.logsumexp(logits))
    leaf = logits.detach().double().requires_grad_()
    expected = leaf.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert_close(made.detach(), expected.detach(), 1e-6)
    got, wanted = gradient(made, logits, coefficients(2)), gradient(expected, leaf, coefficients(2))
    # one unit of bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=0)


def test_a_tiny_tail_is_exact_and_an_empty_one_has_no_gradient():
    logits = torch.tensor([[0.0, -200.0, -201.0]], device=DEVICE, requires_grad=True)
    made = fused.with_tail(logits, torch.tensor([[0]], device=DEVICE))
    assert made[0, 1].item() == pytest.approx(-200 + math.log1p(math.exp(-1)), rel=1e-6)
    got = torch.autograd.grad(made[0, 1], logits)[0]
    sure = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(got.cpu(), torch.tensor([[-1.0, sure, 1 - sure]]), rtol=1e-5, atol=1e-6)
    nothing_left = torch.tensor([[0.0, 1.0, -INF], [3.0, 1.0, -INF]], device=DEVICE, requires_grad=True)
    for ids in ([[1, 0], [0, 1]], [[2, 0, 1], [0, 1, 2]]):
        made = fused.with_tail(nothing_left, torch.tensor(ids, device=DEVICE))
        assert (made[:, -1] == -INF).all()
        assert (torch.autograd.grad(made[:, -1], nothing_left, torch.ones(2, device=DEVICE))[0] == 0).all()


def test_given_constants_replace_their_passes_and_the_teacher_has_no_gradient():
    student, teacher = table(3, 40, 0).requires_grad_(), table(3, 40, 1).requires_grad_()
    lses = fused.logsumexp(student), fused.logsumexp(teacher)
    cost = fused.divergence(student, teacher, "jsd", 0.3, *lses)
    assert torch.equal(cost, fused.divergence(student, teacher, "jsd", 0.3))
    cost.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    shifted = fused.divergence(student, teacher, "reverse", None, lses[0] + 1)
    assert not torch.equal(shifted, fused.divergence(student, teacher, "reverse"))


def test_the_shipped_block_and_columns_that_lie_apart(monkeypatch):
    student, teacher = table(2, 300, 0), table(2, 300, 1)
    small = fused.divergence(student, teacher, "jsd")
    monkeypatch.setattr(triton_launch, "BLOCK", 2048)
    torch.testing.assert_close(fused.divergence(student, teacher, "jsd"), small, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        fused.divergence(student.t().contiguous().t(), teacher, "jsd"), small, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "weight", "lse", "sentence"),
    [
        ((2, 3), (2, 4), "reverse", None, None, "shape"),
        ((3,), (3,), "reverse", None, None, "shape"),
        ((2, 0), (2, 0), "reverse", None, None, "shape"),
        ((2, 3), (2, 3), "kl", None, None, "reverse, forward"),
        ((2, 3), (2, 3), "reverse", 0.5, None, "no mixture weight"),
        ((2, 3), (2, 3), "jsd", 1.5, None, r"\[0, 1\]"),
        ((2, 3), (2, 3), "jsd", math.nan, None, r"\[0, 1\]"),
        ((2, 3), (2, 3), "jsd", 0.5, (1,), "one number per row"),
    ],
)
def test_bad_arguments_are_refused(student, teacher, kind, weight, lse, sentence):
    given_lse = None if lse is None else torch.zeros(lse)
    with pytest.raises(ValueError, match=sentence):
        fused.divergence(torch.zeros(student), torch.zeros(teacher), kind, weight, given_lse)


def test_usable_where_triton_can_run(monkeypatch):
    logits = torch.zeros(1, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.usable(logits)
    with monkeypatch.context() as missing:
        missing.setattr(fused, "_INSTALLED", False)
        assert not fused.usable(logits)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not fused.usable(logits)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: a table of more than 2^31 logits")
def test_tables_of_more_than_two_billion_logits():
    logits = torch.zeros(36_000, 60_000, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, -1] = 5
    teacher = torch.zeros(1, 60_000, device=DEVICE).expand(36_000, -1)
    cost = fused.divergence(logits, teacher, "reverse")
    assert (cost[:-1] == 0).all()
    torch.testing.assert_close(
        cost[-1:].double(), exact("reverse", logits[-1:], teacher[-1:], None), rtol=1e-4, atol=1e-7
    )
