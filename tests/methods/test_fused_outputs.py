"""What fused kernels answer, and the gradients they write, against `loss.divergences` in float64 and against
plain numpy, on a GPU or through Triton's interpreter.
"""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from device import DEVICE
from interpreted import interpreted
from reflux.kernels import triton_launch
from reflux.kernels.head import Bare, Head
from reflux.kernels.raw_table import RawTable
from reflux.kernels.triton_rows import top_ids
from reflux.loss import fused_gradient
from reflux.loss.baselines import gradient_variance, kl_value, minimum_variance_value, topk_kl_value
from reflux.loss.divergences import DIVERGENCES, with_tail
from reflux.loss.fused_outputs import FusedStudent, FusedTeacher
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


def table(n: int, v: int, seed: int, spread: float = 2.0, zeros: float = 0.0, pad: int = 0):
    """Random logits, not normalised, cut out of a wider table whose padding is NaN; a share `zeros` is -inf,
    never a whole row.
    """
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((n, v)) + rng.normal()
    gone = rng.random((n, v)) < zeros
    gone[:, rng.integers(v)] = False
    wide = torch.full((n, v + pad), math.nan, device=DEVICE)
    wide[:, :v] = torch.tensor(np.where(gone, -INF, logits)).float()
    return wide[:, :v]


def raw(logits: torch.Tensor, scale: float = 1.0, cap: float | None = None) -> RawTable:
    return RawTable(logits, Head(lambda: Bare(logits), logits.shape[1], scale, cap))


def pair(
    student: torch.Tensor, teacher: torch.Tensor, ids: list[int] | None = None
) -> tuple[FusedStudent, FusedTeacher]:
    """A student and its teacher from plain logits. ids: the sampled tokens."""
    ids_N = torch.tensor(ids or [0] * len(student), device=DEVICE, dtype=torch.long)
    made = FusedStudent(raw(student), {"main": raw(teacher)}, ids_N, trained=True)
    return made, made.teachers["main"]


def written(
    student: FusedStudent,
    loss: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    silent_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient that the kernels write; nothing of what stood there before is left."""
    n, v = student.table.raw_NV.shape
    d_NV = torch.full((n, v), math.nan, dtype=dtype, device=DEVICE)
    fused_gradient.write(student, loss, d_NV, silent_N)
    return d_NV


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
storage = {"dtype": st.sampled_from([torch.float32, torch.bfloat16]), "pad": st.sampled_from([0, 5, 70])}
few = settings(deadline=None, max_examples=4, derandomize=True, phases=(Phase.explicit, Phase.generate))


@few
@given(**shapes, **storage, spread=st.sampled_from([0.1, 2.0, 8.0]), zeros=st.sampled_from([0.0, 0.4]))
@example(n=3, v=75, seed=0, dtype=torch.float32, pad=5, spread=2.0, zeros=0.4)
@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_divergences_and_gradients_are_those_of_the_reference(
    kind, weight, n, v, seed, dtype, pad, spread, zeros
):
    logits, others = table(n, v, seed, spread, zeros, pad), table(n, v, seed + 1, spread, zeros, 2 * pad)
    student, teacher = pair(logits, others)
    leaf = logits.double().requires_grad_()
    cost, expected = student.divergence(teacher, kind, weight), exact(kind, leaf, others, weight)
    assert cost.dtype == torch.float32
    assert_close(cost.detach(), expected.detach(), 5e-6)
    finite = expected.isfinite()
    made = written(student, (coefficients(n) * cost).sum(), dtype)
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
    logits, others = table(2, 37, 5), table(2, 37, 6)
    x, y = (z.double().cpu().numpy() for z in (logits, others))
    student, teacher = pair(logits, others)
    cost = student.divergence(teacher, kind, weight)
    np.testing.assert_allclose(cost.detach().cpu(), by_hand(kind, x, y, 0.3), rtol=3e-6)
    made, slopes = written(student, cost.sum()), np.zeros_like(x)
    for v in range(37):
        step = np.eye(37)[v] * 1e-5
        slopes[:, v] = (by_hand(kind, x + step, y, 0.3) - by_hand(kind, x - step, y, 0.3)) / 2e-5
    np.testing.assert_allclose(made.cpu(), slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_equal_models_cost_zero_to_the_bit_with_no_gradient(kind, weight):
    logits = table(1, 50, 0, 3.0, 0.2)
    student, teacher = pair(logits, logits.clone())
    cost = student.divergence(teacher, kind, weight)
    assert (cost == 0).all()
    assert (student.kl(teacher) == 0).all()
    assert (written(student, cost.sum()) == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_coefficient_of_zero_gives_exactly_no_gradient_also_where_the_cost_is_infinite(kind):
    logits, others = table(3, 40, 0), table(3, 40, 1)
    # reverse: infinite; forward: infinite
    others[1, 3] = logits[1, 5] = -INF
    student, teacher = pair(logits, others)
    cost = student.divergence(teacher, kind)
    assert (cost[1] == INF).item() == (kind in ("reverse", "forward"))
    coef = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    made = written(student, (coef * cost).nan_to_num(0.0).sum())
    assert (made[1] == 0).all()
    assert (made[[0, 2]] != 0).any(-1).all()


def test_a_silent_row_has_no_gradient_even_if_its_logits_and_its_derivatives_are_nan():
    logits, others = table(3, 40, 0), table(3, 40, 1)
    logits[1, 3] = math.nan
    student, teacher = pair(logits, others, [5, 3, 0])
    silent_N = torch.tensor([False, True, False], device=DEVICE)
    ids = torch.tensor([[5, 3]] * 3, device=DEVICE)
    answers = (
        student.logp_N,
        student.divergence(teacher, "jsd"),
        student.with_tail(ids).sum(-1),
        student.logp_NV.square().sum(-1),
    )
    made = written(student, torch.stack([answer.sum() for answer in answers]).sum(), silent_N=silent_N)
    assert (made[1] == 0).all()
    assert made.isfinite().all()
    assert (made[[0, 2]] != 0).any(-1).all()


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_huge_logits_and_underflowing_probabilities(kind, weight):
    logits, others = (table(2, 70, seed, 1e4) for seed in (0, 1))
    logits[1], others[1] = logits[1] / 100, others[1] / 100
    student, teacher = pair(logits, others)
    leaf = logits.double().requires_grad_()
    cost, expected = student.divergence(teacher, kind, weight), exact(kind, leaf, others, weight)
    torch.testing.assert_close(cost.detach().double(), expected.detach(), rtol=1e-6, atol=1e-4)
    made = written(student, (coefficients(2) * cost).sum())
    torch.testing.assert_close(made.double(), gradient(expected, leaf, coefficients(2)), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind != "tv"])
def test_a_small_divergence_keeps_its_digits(kind):
    logits = table(3, 60, 0) + 40
    others = logits + 1e-3 * table(3, 60, 1)
    student, teacher = pair(logits, others)
    made = student.divergence(teacher, kind).detach().double()
    torch.testing.assert_close(made, exact(kind, logits, others, None), rtol=0.02, atol=0)


def test_nan_is_passed_on_and_stays_in_its_row():
    one, other = table(2, 40, 0), table(2, 40, 1)
    one[0, 33] = math.nan
    for kind in DIVERGENCES:
        for logits, others in ((one, other), (other, one)):
            student, teacher = pair(logits, others)
            assert student.divergence(teacher, kind).isnan().tolist() == [True, False]


@few
@given(
    **shapes,
    pad=st.sampled_from([0, 5]),
    zeros=st.sampled_from([0.0, 0.4]),
    spread=st.sampled_from([2.0, 1e4]),
)
@example(n=3, v=75, seed=0, pad=5, zeros=0.4, spread=1e4)
def test_every_statistic_follows_its_definition(n, v, seed, pad, zeros, spread):
    logits, others = table(n, v, seed, spread, zeros, pad), table(n, v, seed + 1, spread, 0.0, pad)
    ids = [int(place) for place in np.random.default_rng(seed).integers(v, size=n)]
    student, teacher = pair(logits, others, ids)
    s, t = (z.double().log_softmax(-1) for z in (logits, others))
    at = torch.tensor(ids, device=DEVICE, dtype=torch.long)[:, None]
    near = 5e-6 if spread < 1e3 else 1e-3
    assert_close(student.any_sums["student_lse"], logits.double().logsumexp(-1), 1e-6 * spread)
    assert_close(student.logp_N.detach(), s.gather(-1, at)[:, 0], near)
    assert_close(teacher.logp_N, t.gather(-1, at)[:, 0], near)
    assert_close(student.kl(teacher), exact("reverse", logits, others, None), near)
    assert_close(student.entropy(), -(s.exp() * s.masked_fill(s == -INF, 0)).sum(-1), near)
    assert_close(student.minimum_variance_value(teacher), minimum_variance_value(s, t), 10 * near)
    assert_close(student.topk_kl_value(teacher, min(4, v)), topk_kl_value(s, t, min(4, v)), near)
    alone = FusedStudent(student.table, {}, student.ids_N, trained=False)
    assert torch.equal(alone.logp_N, student.logp_N)
    assert_close(alone.entropy(), student.entropy(), 1e-7)
    constants = teacher.logp_N, student.kl(teacher), student.entropy(), alone.logp_N
    assert not any(constant.requires_grad for constant in constants)


def test_the_value_of_least_variance_has_the_least_variance():
    """Also for a student that is nearly certain, and -inf where the teacher excludes a likely token."""
    logits, others = table(3, 50, 0), table(3, 50, 1)
    logits[1, 7] = 14.0
    others[2, 9] = -INF
    student, teacher = pair(logits, others)
    value_N = student.minimum_variance_value(teacher).double()
    s, t = (z.double().log_softmax(-1) for z in (logits, others))
    least_N = gradient_variance(s, t, value_N)
    for other_N in (value_N - 0.1, value_N + 0.1, -kl_value(s, t), torch.zeros_like(value_N)):
        assert (gradient_variance(s, t, other_N)[:2] >= least_N[:2]).all()
    assert value_N[2] == -INF


@few
@given(**shapes, **storage, zeros=st.sampled_from([0.0, 0.4]), data=st.data())
def test_listed_log_probs_and_their_tail_are_those_of_the_reference(n, v, seed, dtype, pad, zeros, data):
    k, rng = data.draw(st.integers(1, v)), np.random.default_rng(seed)
    logits = table(n, v, seed, 2.0, zeros, pad)
    ids = torch.tensor(
        np.array([rng.permutation(v)[:k] for _ in range(n)], dtype=np.int64).reshape(n, k), device=DEVICE
    )
    leaf = logits.double().requires_grad_()
    expected = with_tail(leaf.log_softmax(-1), ids)
    coef = torch.tensor(rng.standard_normal((n, k + 1)), device=DEVICE)
    # no coefficient where the log-prob is -inf: 0 * inf
    coef = coef.where(expected > -INF, 0)
    for end in (k + 1, k):
        student, _ = pair(logits, logits.clone())
        before = logits.clone()
        made = student.with_tail(ids) if end > k else student.at(ids)
        assert torch.equal(logits, before)
        assert_close(made.detach(), expected[:, :end].detach(), 3e-6)
        got = written(student, (coef[:, :end].float() * made).nan_to_num(0, 0, 0).sum(), dtype)
        wanted = torch.autograd.grad(
            (coef[:, :end] * expected[:, :end]).nan_to_num(0, 0, 0).sum(), leaf, retain_graph=True
        )[0]
        assert_close(got, wanted, 5e-6)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_everything_asked_together_adds_up_also_scaled_and_capped(cap):
    """Two divergences to two teachers, two lists with tails, the sampled token (listed too) and the matrix of
    log-probs.
    """
    logits, others, thirds = (table(3, 40, seed, 3.0) for seed in (0, 1, 2))
    ids_N = torch.tensor([4, 7, 9], device=DEVICE)
    tables = {"main": raw(others, 0.5, cap), "anchor": raw(thirds)}
    student = FusedStudent(raw(logits, 2.0, cap), tables, ids_N, trained=True)
    first, second = (torch.tensor(ids, device=DEVICE).expand(3, -1) for ids in ([4, 1, 7], [9, 3, 4, 30]))

    def finish(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale if cap is None else cap * torch.tanh(x * scale / cap)

    leaf = logits.double().requires_grad_()
    x, y = finish(leaf, 2.0), finish(others.double(), 0.5)
    s = x.log_softmax(-1)
    parts = [
        (student.divergence(student.teachers["main"], "jsd"), exact("jsd", x, y, None)),
        (student.divergence(student.teachers["anchor"], "forward"), exact("forward", x, thirds, None)),
        (student.with_tail(first)[:, 1:].sum(-1), with_tail(s, first)[:, 1:].sum(-1)),
        (student.with_tail(second).square().sum(-1), with_tail(s, second).square().sum(-1)),
        (3 * student.logp_N, 3 * s.gather(-1, ids_N[:, None])[:, 0]),
        (student.logp_NV.square().mean(-1), s.square().mean(-1)),
    ]
    for made, expected in parts:
        assert_close(made.detach(), expected.detach(), 2e-5)
    coef = coefficients(3)
    got = written(student, torch.stack([(coef * made).sum() for made, _ in parts]).sum())
    wanted = gradient(torch.stack([expected for _, expected in parts]).sum(0), leaf, coef)
    assert_close(got, wanted, 5e-5)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that torch makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


def test_long_lists_need_no_matrix_of_all_pairs_of_their_tokens():
    n, v, k = 2, 64, 50
    logits, rng = table(n, v, 0), np.random.default_rng(0)
    one, other = (
        torch.tensor(np.array([rng.permutation(v)[:k] for _ in range(n)]), device=DEVICE) for _ in range(2)
    )
    student, _ = pair(logits, logits.clone())
    leaf = logits.double().requires_grad_()
    s = leaf.log_softmax(-1)
    loss = student.with_tail(one).square().sum() + student.at(other).square().sum()
    expected = with_tail(s, one).square().sum() + s.gather(-1, other).square().sum()
    with Largest() as seen:
        made = written(student, loss)
    assert seen.most < n * k * k
    torch.testing.assert_close(made.double(), torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-3)


def test_a_tail_of_capped_logits_leaves_the_listed_tokens_out():
    logits = table(2, 40, 0, 5.0)
    student = FusedStudent(raw(logits, 1.5, 3.0), {}, torch.zeros(2, dtype=torch.long, device=DEVICE), False)
    ids = torch.tensor([[3, 8], [0, 39]], device=DEVICE)
    s = (3 * torch.tanh(logits.double() * 1.5 / 3)).log_softmax(-1)
    assert_close(student.with_tail(ids), with_tail(s, ids), 3e-6)


@few
@given(
    n=st.sampled_from([0, 1, 3]),
    v=st.sampled_from([4, 31, 64, 75, 300]),
    k=st.sampled_from([1, 4, 8, 30]),
    seed=st.integers(0, 999),
    levels=st.sampled_from([0, 1, 3]),
    zeros=st.sampled_from([0.0, 0.9]),
)
@example(n=3, v=600, k=8, seed=0, levels=1, zeros=0.0)
@example(n=3, v=600, k=8, seed=0, levels=3, zeros=0.0)
@example(n=3, v=300, k=4, seed=1, levels=0, zeros=0.99)
def test_the_most_likely_tokens_and_of_equal_ones_as_many_as_asked(n, v, k, seed, levels, zeros):
    """levels: the number of different logits; 0: all differ. With equal logits the list of candidates
    overflows.
    """
    logits = table(n, v, seed, 2.0, zeros, pad=70)
    if levels:
        logits = (logits.clamp(-1, 1) * (levels - 1)).round()
    k = min(k, v)
    made = top_ids(logits, k, ordered=True)
    assert made.shape == (n, k)
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < v for row in made.tolist())
    assert torch.equal(logits.gather(-1, made), logits.topk(k, dim=-1).values)


def test_many_large_tokens_in_few_lanes_raise_the_bound_until_the_list_has_room():
    """Seven of 32 lanes hold 280 large logits, so the eighth lane's maximum is a bound that many reach."""
    logits = table(2, 1280, 0)
    logits[:, torch.arange(1280, device=DEVICE) % 32 < 7] += 100
    made = top_ids(logits, 8, ordered=True)
    assert torch.equal(made, logits.topk(8, dim=-1).indices)


@pytest.fixture(params=["first lane first", "last lane first"])
def order_of_additions(request, monkeypatch):
    """The order in which the lanes of a block come to a counter. A GPU has any order; the interpreter has
    this one.
    """
    from triton.runtime.interpreter import _interpreter

    class LastFirst:
        def __getattr__(self, name):
            return getattr(_interpreter, name)

        def atomic_rmw(self, kind, pointers, values, mask, order):
            turned = (np.ascontiguousarray(array[::-1]) for array in (pointers, values, mask))
            return np.ascontiguousarray(_interpreter.atomic_rmw(kind, *turned, order)[::-1])

    if request.param == "last lane first":
        monkeypatch.setattr("triton.runtime.interpreter._interpreter", LastFirst())


def test_of_many_equal_tokens_the_first_ones_in_one_order(order_of_additions, monkeypatch):
    monkeypatch.setattr(triton_launch, "BLOCK", 1024)
    logits = torch.zeros(2, 900, device=DEVICE)
    logits[0, 700], logits[0, 600] = 1, 2
    for ordered in (True, False):
        made = top_ids(logits, 8, ordered).tolist()
        assert made == [[600, 700, 0, 1, 2, 3, 4, 5], list(range(8))]


def test_negative_numbers_nan_and_the_first_of_equal_tokens():
    logits = torch.full((1, 40), -3.0, device=DEVICE)
    logits[0, 30], logits[0, 20], logits[0, 10], logits[0, 5] = math.nan, -0.5, INF, -INF
    assert top_ids(logits, 5, ordered=True).tolist() == [[30, 10, 20, 0, 1]]


def test_tokens_that_are_a_column_of_a_matrix():
    """Ids that lie apart in memory, as `labels[:, 1]` does."""
    logits, ids_N = table(3, 40, 0), torch.tensor([[1, 5, 2], [3, 7, 8], [4, 39, 0]], device=DEVICE)[:, 1]
    student = FusedStudent(raw(logits), {}, ids_N, trained=True)
    leaf = logits.double().requires_grad_()
    expected = leaf.log_softmax(-1).gather(-1, ids_N[:, None])[:, 0]
    assert_close(student.logp_N.detach(), expected.detach(), 3e-6)
    got = written(student, (coefficients(3) * student.logp_N).sum())
    assert_close(got, gradient(expected, leaf, coefficients(3)), 3e-6)


def test_token_log_probs_of_a_sure_model_keep_their_small_gradient_in_bfloat16():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, -INF]], device=DEVICE)
    student, _ = pair(logits, logits.clone(), [0, 1])
    leaf = logits.double().requires_grad_()
    expected = leaf.log_softmax(-1).gather(-1, student.ids_N[:, None])[:, 0]
    assert_close(student.logp_N.detach(), expected.detach(), 1e-6)
    got = written(student, (coefficients(2) * student.logp_N).sum(), torch.bfloat16)
    # one unit of bfloat16
    torch.testing.assert_close(got.double(), gradient(expected, leaf, coefficients(2)), rtol=2**-7, atol=0)


def test_a_tiny_tail_is_exact_and_an_empty_one_has_no_gradient():
    student, _ = pair(torch.tensor([[0.0, -200.0, -201.0]], device=DEVICE), torch.zeros(1, 3, device=DEVICE))
    made = student.with_tail(torch.tensor([[0]], device=DEVICE))
    assert made[0, 1].item() == pytest.approx(-200 + math.log1p(math.exp(-1)), rel=1e-6)
    got = written(student, made[0, 1])
    sure = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(got.cpu(), torch.tensor([[-1.0, sure, 1 - sure]]), rtol=1e-5, atol=1e-6)
    nothing_left = torch.tensor([[0.0, 1.0, -INF], [3.0, 1.0, -INF]], device=DEVICE)
    for ids in ([[1, 0], [0, 1]], [[2, 0, 1], [0, 1, 2]]):
        student, _ = pair(nothing_left.clone(), torch.zeros(2, 3, device=DEVICE))
        made = student.with_tail(torch.tensor(ids, device=DEVICE))
        assert (made[:, -1] == -INF).all()
        assert (written(student, made[:, -1].sum()) == 0).all()


def test_the_shipped_block(monkeypatch):
    logits, others = table(2, 300, 0), table(2, 300, 1)
    costs, gradients = [], []
    for block in (32, 1024):
        monkeypatch.setattr(triton_launch, "BLOCK", block)
        student, teacher = pair(logits, others)
        costs.append(student.divergence(teacher, "jsd"))
        gradients.append(written(student, costs[-1].sum()))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "weight", "sentence"),
    [
        ("kl", None, "reverse, forward"),
        ("reverse", 0.5, "no mixture weight"),
        ("jsd", 1.5, r"\[0, 1\]"),
        ("jsd", math.nan, r"\[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(kind, weight, sentence):
    student, teacher = pair(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=sentence):
        student.divergence(teacher, kind, weight)


def test_usable_where_triton_can_run(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_launch.usable(device)
    with monkeypatch.context() as missing:
        missing.setattr(triton_launch, "_INSTALLED", False)
        assert not triton_launch.usable(device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton_launch.usable(device)


def test_a_gpu_where_triton_has_no_compiler_is_not_usable(monkeypatch):
    def draw_rows(*args):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    device = torch.device(DEVICE)
    triton_launch.unusable_because.cache_clear()
    assert triton_launch.unusable_because(device) is None
    triton_launch.unusable_because.cache_clear()
    monkeypatch.setattr("reflux.kernels.triton_draw.draw_rows", draw_rows)
    assert triton_launch.unusable_because(device) == "one could not be run: Failed to find C compiler."
    assert not triton_launch.usable(torch.device("cuda"))
    triton_launch.unusable_because.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a table of more than 2^31 logits")
def test_tables_of_more_than_two_billion_logits():
    logits = torch.zeros(36_000, 60_000, device=DEVICE)
    logits[-1, -1] = 5
    teacher = torch.zeros(1, 60_000, device=DEVICE).expand(36_000, -1)
    student, other = pair(logits, teacher)
    cost = student.divergence(other, "reverse").detach()
    assert (cost[:-1] == 0).all()
    torch.testing.assert_close(
        cost[-1:].double(), exact("reverse", logits[-1:], teacher[-1:], None), rtol=1e-4, atol=1e-7
    )
