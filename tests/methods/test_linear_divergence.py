"""`linear_divergence` against the formula by plain autograd, and its manners. Precision, memory:
`test_row_pass.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflux.kernels import products, row_pass
from reflux.kernels.head import Bare, Head
from reflux.loss.linear_divergence import Answer, linear_divergence
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL

close = torch.testing.assert_close
TOP = 4


@dataclass
class Case:
    """Inputs of every kind. Leaves: hidden, weight, bias; the teacher's tensors ask for gradients too, and
    must never get any.
    """

    n: int
    v: int
    seed: int = 0
    pad: int = 0
    bias: bool = True
    scale: float = 1.0
    cap: float | None = None
    coefs: tuple[float, ...] = (1.0, 0.5, -2.0, 0.0, 0.25)
    dtype: torch.dtype = torch.float64
    leaves: dict[str, Tensor] = field(default_factory=dict)
    constants: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(self.dtype).requires_grad_()

        rows = self.v + self.pad
        self.leaves = {"hidden": random(self.n, 5), "weight": random(rows, 5)} | (
            {"bias": random(rows)} if self.bias else {}
        )
        self.constants = [random(self.n, 3), random(rows + 2, 3), random(rows + 2)]
        self.ids_N = torch.randint(self.v, (self.n,), generator=rng)
        self.coef_N = torch.tensor(self.coefs, dtype=self.dtype)[
            torch.randint(len(self.coefs), (self.n,), generator=rng)
        ]

    @property
    def heads(self) -> tuple[Head, Head]:
        student, teacher = Bare(self.leaves["weight"], self.leaves.get("bias")), Bare(*self.constants[1:])
        return Head(lambda: student, self.v, self.scale, self.cap), Head(lambda: teacher, self.v)

    def answer(self, objective: Any = None, **options: Any) -> Answer:
        student, teacher = self.heads
        return linear_divergence(
            self.leaves["hidden"],
            student,
            self.constants[0],
            teacher,
            self.ids_N,
            self.coef_N,
            objective,
            top_k=TOP,
            **options,
        )

    def logp(self) -> tuple[Tensor, Tensor]:
        """Student and teacher, from the formula, at least float64."""
        leaves, (g_NG, weight_VG, bias_V) = (
            {k: x.double() for k, x in self.leaves.items()},
            (x.detach().double() for x in self.constants),
        )
        student_NV = (leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", torch.zeros(1)))[
            :, : self.v
        ] * self.scale
        student_NV = student_NV if self.cap is None else self.cap * torch.tanh(student_NV / self.cap)
        return student_NV.log_softmax(-1), (g_NG @ weight_VG.T + bias_V)[:, : self.v].log_softmax(-1)

    def loss(self, cost: Callable[..., Tensor]) -> Tensor:
        """sum_n coef_n cost_n over the rows whose coefficient is not 0."""
        s, t = self.logp()
        loud = self.coef_N != 0
        return (self.coef_N[loud].double() * cost(s[loud], t[loud], self.ids_N[loud])).sum()

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.leaves, torch.autograd.grad(loss, list(self.leaves.values())), strict=True))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q), 0 log 0 = 0."""
    return torch.where(p == -torch.inf, 0, p.exp() * (p - q).masked_fill(p == -torch.inf, 0)).sum(-1)


def jsd(s: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    m = (0.7 * s.exp() + 0.3 * t.exp()).log()
    return 0.3 * kl(t, m) + 0.7 * kl(s, m)


def sampled(s: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    logp, teacher_logp = (x.gather(-1, ids[:, None])[:, 0] for x in (s, t))
    return -(teacher_logp - logp + kl(s, t)).detach() * logp


def listed(s: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    mask = torch.zeros_like(s).scatter(-1, s.topk(min(2, s.shape[1])).indices, 1)
    rest_s, rest_t = (1 - mask) * s.exp(), (1 - mask) * t.exp()
    inside = (mask * s.exp() * (s - t)).sum(-1)
    return inside if s.shape[1] <= 2 else inside + rest_s.sum(-1) * (rest_s.sum(-1) / rest_t.sum(-1)).log()


COSTS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "reverse": (None, lambda s, t, ids: kl(s, t)),
    "forward": (Divergence(divergence="forward"), lambda s, t, ids: kl(t, s)),
    "jsd": (Divergence(divergence="jsd", beta=0.3), jsd),
    "tv": (Divergence(divergence="tv"), lambda s, t, ids: (s.exp() - t.exp()).abs().sum(-1) / 2),
    "sampled": (SampledKL(baseline="kl"), sampled),
    "listed": (Divergence(support="student", k=2), listed),
}


@contextmanager
def slices(chunk: int, block: int) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_pass, "chunk_rows", lambda vocabulary, device, tables: chunk)
        patch.setattr(row_pass, "block_rows", lambda vocabulary, device: block)
        yield patch


# --- the formula


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(list(COSTS)),
    case=st.builds(
        Case,
        n=st.integers(0, 40),
        v=st.integers(2, 60),
        seed=st.integers(0, 999),
        pad=st.sampled_from([0, 3]),
        bias=st.booleans(),
        scale=st.sampled_from([1.0, 0.25, 2.0]),
        cap=st.sampled_from([None, 4.0]),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    ),
    chunk=st.integers(1, 41),
    block=st.integers(1, 41),
    factor=st.sampled_from([1.0, -0.5]),
)
def test_everything_is_as_defined(name: str, case: Case, chunk: int, block: int, factor: float) -> None:
    # float32 may choose the other one of two near ties
    assume(case.dtype == torch.float64 or name not in ("listed", "tv"))
    objective, cost = COSTS[name]
    near: Any = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 1e-3, "atol": 1e-4}}[
        case.dtype
    ] | {"check_dtype": False}
    with slices(chunk, block) as patch:
        # small as these are, float32 takes the fast path, in blocks of the vocabulary
        patch.setattr(products, "_WORTH_FLOPS", 0)
        patch.setattr(products, "_BLOCK", 16)
        answer = case.answer(objective)
        made = case.gradients(factor * answer.loss)
    expected, (s, t) = case.loss(cost), (x.detach() for x in case.logp())
    close(answer.loss, expected, **near)
    for leaf, gradient in case.gradients(factor * expected).items():
        close(made[leaf], gradient, msg=lambda text, leaf=leaf: f"{leaf}: {text}", **near)
    top = s.topk(min(TOP, case.v), dim=-1)
    close(answer.cost_N, torch.where(case.coef_N == 0, 0, cost(s, t, case.ids_N)), **near)
    pages = (answer.logp_N, answer.teacher_logp_N, answer.kl_N, answer.entropy_N)
    at = case.ids_N[:, None]
    for page, right in zip(
        pages, (s.gather(-1, at)[:, 0], t.gather(-1, at)[:, 0], kl(s, t), -(s.exp() * s).sum(-1)), strict=True
    ):
        close(page, right, **near)
    close(answer.top_logp_NK, top.values, **near)
    assert case.n == 0 or case.dtype == torch.float32 or torch.equal(answer.top_ids_NK, top.indices)
    assert not any(page.requires_grad for page in (answer.cost_N, *pages, answer.top_logp_NK))


def test_tokens_that_cannot_be_said_count_nothing() -> None:
    """Whether the student or both rule them out: KL, entropy and gradients stay finite, and equal the
    definition.
    """
    behaviour = [i for i in range(12) if not 3 <= i < 6]

    def said_only(s: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return kl(s[:, behaviour], t[:, behaviour])

    for both in (False, True):
        case = Case(30, 12)
        with torch.no_grad():
            case.leaves["bias"][3:6] = -torch.inf
            case.constants[2][3 : 5 if both else 3] = -torch.inf
        with slices(7, 3):
            answer = case.answer()
        s, t = case.logp()
        finite = s.detach().masked_fill(s == -torch.inf, 0)
        close(answer.entropy_N, -(s.exp() * finite).sum(-1).detach(), rtol=1e-10, atol=0)
        close(answer.kl_N, kl(s, t.masked_fill(s == -torch.inf, 0)).detach(), rtol=1e-10, atol=0)
        expected = case.gradients(case.loss(said_only))
        for leaf, gradient in case.gradients(answer.loss).items():
            rows = slice(None) if leaf == "hidden" else behaviour
            close(gradient[rows], expected[leaf][rows], rtol=1e-9, atol=1e-12)
            assert gradient.isfinite().all()
            assert leaf == "hidden" or (gradient[3:6] == 0).all()


@pytest.mark.parametrize("name", ["reverse", "sampled"])
def test_rows_of_coefficient_zero_are_silent_even_if_infinite(name: str) -> None:
    case = Case(24, 9, coefs=(1.0, -0.5))
    hard = torch.arange(24) % 3 == 1
    with torch.no_grad():
        # at hard rows the teacher says token 4 with probability 0
        case.constants[1][:, 0], case.constants[1][4, 0] = 0, -1e300
        case.constants[0][:, 0] = torch.where(hard, 1e10, 0.0)
    case.ids_N[hard] = 4
    with slices(5, 2):
        assert not case.answer(COSTS[name][0]).loss.isfinite()
        case.coef_N[hard] = 0
        answer = case.answer(COSTS[name][0])
    close(answer.loss, case.loss(COSTS[name][1]))
    expected, made = case.gradients(case.loss(COSTS[name][1])), case.gradients(answer.loss)
    for leaf in case.leaves:
        close(made[leaf], expected[leaf])
    assert (made["hidden"][hard] == 0).all()
    assert (answer.cost_N[hard] == 0).all()
    assert (answer.kl_N[hard] == torch.inf).all()
    assert answer.entropy_N.isfinite().all()


# --- manners of autograd


def test_factors_sums_and_accumulation() -> None:
    one = Case(20, 11)
    other = Case(13, 11, seed=1)
    other.leaves = {**other.leaves, "weight": one.leaves["weight"], "bias": one.leaves["bias"]}
    costs = one.loss(COSTS["reverse"][1]), other.loss(COSTS["jsd"][1])
    expected = one.gradients(3 * costs[0]), other.gradients(costs[1] / 7)
    with slices(4, 3):
        (3 * one.answer().loss + other.answer(COSTS["jsd"][0]).loss / 7).backward()
        sums = {leaf: tensor.grad.clone() for leaf, tensor in one.leaves.items()}  # type: ignore[union-attr]
        (3 * one.answer().loss).backward()
    for leaf in ("weight", "bias"):
        close(sums[leaf], expected[0][leaf] + expected[1][leaf])
        close(one.leaves[leaf].grad, 2 * expected[0][leaf] + expected[1][leaf])
    close(other.leaves["hidden"].grad, expected[1]["hidden"])
    close(one.leaves["hidden"].grad, 2 * expected[0]["hidden"])
    assert [tensor.grad for tensor in (*one.constants, *other.constants)] == [None] * 6


def test_a_second_backward_says_why_not() -> None:
    loss = Case(5, 6).answer().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can be called only once"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_loss_and_no_work_for_them(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(20, 11)
    loss = case.answer().loss
    work: list[str] = []
    for name in ("pull_back", "add_outer"):
        monkeypatch.setattr(products, name, lambda *factors, name=name: work.append(name))
    with mode():
        answer = case.answer()
        pages = case.answer(COSTS["sampled"][0]).logp_N
    assert (float(answer.loss), answer.loss.requires_grad, work) == (float(loss.detach()), False, [])
    assert len(pages) == 20


@pytest.mark.parametrize("frozen", [{"hidden"}, {"weight"}, {"bias"}, {"weight", "bias"}])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen: set[str]) -> None:
    case = Case(20, 11)
    expected = case.gradients(case.loss(COSTS["reverse"][1]))
    for leaf in frozen:
        case.leaves[leaf].requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        for leaf, product in (("hidden", "pull_back"), ("weight", "add_outer")):
            if leaf in frozen:
                patch.setattr(products, product, lambda *factors: pytest.fail("nobody needs this product"))
        case.answer().loss.backward()
    for leaf, tensor in case.leaves.items():
        if leaf in frozen:
            assert tensor.grad is None
        else:
            close(tensor.grad, expected[leaf])


def test_a_weight_that_is_tied_or_made_of_others_gets_its_whole_gradient() -> None:
    tokens, (a, b) = (
        torch.arange(20) % 11,
        (torch.randn(11, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)),
    )
    leaves = [a.requires_grad_(), b.requires_grad_()]
    grads = []
    for run in (lambda case: case.loss(COSTS["reverse"][1]), lambda case: case.answer().loss):
        case = Case(20, 11)
        # the input embedding is the same table
        weight_VH = a @ b
        case.leaves |= {"weight": weight_VH, "hidden": torch.tanh(weight_VH[tokens] * 1.7)}
        grads.append(torch.autograd.grad(run(case), leaves))
    close(grads[1], grads[0])
