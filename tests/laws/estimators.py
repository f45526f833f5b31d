"""A world small enough to enumerate: a tabular student and teacher, every sequence they can write, exact gradients.

The student is a table of logits, one row per prefix; token 0 ends a sequence. `SETTINGS` says, per registered objective, what the law tests
run it with; a newcomer to the registry adds its line here and inherits all of them.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from reflux.objectives.base import FullSays, ListedSays, Rows, SampledSays
from reflux.objectives.divergence import MIXED, Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.outcome import Outcome
from reflux.objectives.sampled_kl import SampledKL


class World:
    """Every sequence of up to `horizon` tokens over `vocabulary`, packed: one row per (sequence, position)."""

    def __init__(self, vocabulary: int = 5, horizon: int = 3, seed: int = 0, spread: float = 1.0):
        self.prefixes: dict[tuple[int, ...], int] = {}
        self.sequences: list[tuple[int, ...]] = []
        self._grow((), vocabulary, horizon)
        torch.manual_seed(seed)
        shape = (len(self.prefixes), vocabulary)
        self.student = (spread * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        self.teacher = spread * torch.randn(shape, dtype=torch.float64)
        self.lagged = self.student.detach() + 0.3 * torch.randn(shape, dtype=torch.float64)
        self.reward = torch.randn(len(self.sequences), dtype=torch.float64)
        rows = [(s, self.prefixes[y[:t]], y[t]) for s, y in enumerate(self.sequences) for t in range(len(y))]
        self.sequence_N, self.prefix_N, self.ids_N = (torch.tensor(column) for column in zip(*rows, strict=True))

    def _grow(self, prefix: tuple[int, ...], vocabulary: int, horizon: int) -> None:
        self.prefixes[prefix] = len(self.prefixes)
        for token in range(vocabulary):
            sequence = (*prefix, token)
            if token == 0 or len(sequence) == horizon:
                self.sequences.append(sequence)
            else:
                self._grow(sequence, vocabulary, horizon)

    def log_probability(self, policy: torch.Tensor) -> torch.Tensor:
        """Log-probability of every sequence under a table of logits."""
        logp_N = policy.log_softmax(-1)[self.prefix_N, self.ids_N]
        return torch.zeros(len(self.sequences), dtype=logp_N.dtype).index_add(0, self.sequence_N, logp_N)

    def rows(self, behaviour: torch.Tensor, teacher: torch.Tensor, says: str = "full", shift_N: torch.Tensor | None = None) -> Rows:
        teacher_says = FullSays(teacher[self.prefix_N], self.ids_N)
        if says == "sampled":
            teacher_says = SampledSays(teacher_says.logp_N)
        elif says == "listed":
            top = teacher_says.logp_NV.topk(3, dim=-1)
            teacher_says = ListedSays(top.indices, top.values, teacher_says.logp_N)
        return Rows(
            ids_N=self.ids_N,
            student=FullSays(self.student[self.prefix_N], self.ids_N),
            teachers={"main": teacher_says},
            behaviour_logp_N=behaviour.detach().log_softmax(-1)[self.prefix_N, self.ids_N],
            shift_N=torch.zeros(len(self.ids_N), dtype=torch.float64) if shift_N is None else shift_N,
        )

    def expected_gradient(self, objective: Callable[[Rows], torch.Tensor], behaviour: torch.Tensor, rows: Rows) -> np.ndarray:
        """E over sequences ~ behaviour of sum_t grad cost_t. The sampling distribution itself is not differentiated."""
        weight_N = self.log_probability(behaviour.detach()).exp()[self.sequence_N]
        cost_N = objective(rows)
        assert cost_N.shape == self.ids_N.shape
        (gradient,) = torch.autograd.grad((weight_N * cost_N).sum(), self.student, retain_graph=True)
        return gradient.numpy()

    def exact_gradient(self, divergence: Callable[[np.ndarray, np.ndarray], float], behaviour: torch.Tensor) -> np.ndarray:
        """sum over prefixes of P(prefix) * grad divergence there, by central differences of a numpy function of two distributions."""
        logp = behaviour.detach().log_softmax(-1).numpy()
        reach = np.exp([sum(logp[self.prefixes[y[:t]], y[t]] for t in range(len(y))) for y in self.prefixes])  # P(the prefix occurs)
        student, teacher = self.student.detach().numpy(), softmax(self.teacher.numpy())
        gradient = np.zeros_like(student)
        for index, token in np.ndindex(*student.shape):
            ends = []
            for epsilon in (1e-5, -1e-5):
                logits = student[index].copy()
                logits[token] += epsilon
                ends.append(divergence(softmax(logits), teacher[index]))
            gradient[index, token] = reach[index] * (ends[0] - ends[1]) / 2e-5
        return gradient

    def policy_gradient(self) -> np.ndarray:
        """Minus the gradient of the expected reward, differentiated through the probability of whole sequences."""
        (gradient,) = torch.autograd.grad(-(self.log_probability(self.student).exp() * self.reward).sum(), self.student)
        return gradient.numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_kl(p: np.ndarray, q: np.ndarray) -> float:
    """sum p log(p / q) from the definition; tokens with p = 0 contribute 0."""
    with np.errstate(divide="ignore"):
        return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def np_divergence(name: str, beta: float | None = None) -> Callable[[np.ndarray, np.ndarray], float]:
    """The definitions of the method page over two distributions p (student) and q (teacher), in numpy."""

    def jsd(p: np.ndarray, q: np.ndarray) -> float:
        b = 0.5 if beta is None else beta
        m = (1 - b) * p + b * q
        return np_kl(q, p) if b == 0 else np_kl(p, q) if b == 1 else b * np_kl(q, m) + (1 - b) * np_kl(p, m)

    def alpha(p: np.ndarray, q: np.ndarray) -> float:
        a = 0.5 if beta is None else beta
        return np_kl(q, p) if a == 0 else np_kl(p, q) if a == 1 else (1 - float((p**a * q ** (1 - a)).sum())) / (a * (1 - a))

    skew = 0.1 if beta is None else beta
    return {
        "reverse": np_kl,
        "forward": lambda p, q: np_kl(q, p),
        "jsd": jsd,
        "skew_reverse": lambda p, q: np_kl(p, (1 - skew) * q + skew * p),
        "skew_forward": lambda p, q: np_kl(q, skew * q + (1 - skew) * p),
        "alpha": alpha,
        "tv": lambda p, q: 0.5 * float(np.abs(p - q).sum()),
    }[name]


@dataclass(frozen=True)
class Setting:
    """One objective as the laws run it: what it must estimate, whether exactly, and what it is at home."""

    objective: typing.Any
    target: str  # a divergence of np_divergence, or "reward"
    unbiased: bool = True
    home: typing.Literal["divergence", "score", "exempt"] = "divergence"
    says: str = "full"
    policy: typing.Literal["student", "teacher"] = "student"  # who wrote the sequences

    @property
    def exact(self) -> Callable[[np.ndarray, np.ndarray], float]:
        return np_divergence(self.target, getattr(self.objective, "beta", None))


def choices(cls: type, name: str) -> tuple[str, ...]:
    """The allowed values of a Literal field, so a new one joins the laws by itself."""
    return typing.get_args(typing.get_type_hints(cls)[name])


def _divergences() -> list[Setting]:
    kinds, supports = choices(Divergence, "divergence"), choices(Divergence, "support")
    settings = [
        Setting(Divergence(divergence=kind, support=support, k=3), kind, unbiased=support == "full")
        for kind in kinds
        for support in supports
    ]
    settings += [Setting(Divergence(divergence=kind, beta=beta), kind) for kind in MIXED for beta in (0.0, 0.25)]
    settings += [Setting(Divergence(divergence=kind, support=support, k=99), kind) for kind in kinds for support in supports]
    listed = [Setting(Divergence(divergence=kind, support="teacher"), kind, unbiased=False, says="listed") for kind in kinds]
    return settings + listed


SETTINGS: dict[str, list[Setting]] = {
    "sampled_kl": [
        *(
            Setting(SampledKL(baseline=baseline, baseline_k=k, ratio=ratio), "reverse", home="score")
            for baseline in choices(SampledKL, "baseline")
            for k in ((1, 3, 99) if baseline == "topk_kl" else (20,))
            for ratio in choices(SampledKL, "ratio")
        ),
        Setting(SampledKL(), "reverse", home="score", says="sampled"),
        Setting(SampledKL(), "reverse", home="score", says="listed"),
        Setting(SampledKL(max_gap_nats=1.0), "reverse", unbiased=False, home="score"),
    ],
    "divergence": _divergences(),
    "nll": [Setting(NLL(), "forward", home="exempt", policy="teacher")],
    "outcome": [Setting(Outcome(ratio=ratio), "reward", home="exempt") for ratio in choices(Outcome, "ratio")],
}


def settings_of(registry: typing.Iterable[str]) -> list[tuple[str, Setting | None]]:
    """Every registered kind with its settings; a kind without any is kept, with None, so that its test fails."""
    return [(kind, setting) for kind in registry for setting in SETTINGS.get(kind, [None])]


def compare(expected: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """(cosine, relative norm) of an expected gradient against the exact one; (0, 0) where it vanishes."""
    size, exact_size = np.linalg.norm(expected), np.linalg.norm(exact)
    assert exact_size > 1e-3, "the world must give something to learn"
    if size < 1e-8 * exact_size:
        return 0.0, 0.0
    return float((expected * exact).sum() / (size * exact_size)), float(size / exact_size)


def assert_alive(expected: np.ndarray, exact: np.ndarray, unbiased: bool) -> tuple[float, float]:
    """Law 1: not dead, pointing with the exact gradient, and equal to it where unbiased."""
    cosine, norm = compare(expected, exact)
    assert norm > 0, "dead: the expected gradient vanishes, nothing is learnt"
    assert cosine > 0.1, f"the expected gradient points away from the exact one: cosine {cosine:.3f}"
    if unbiased:
        gap = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
        assert gap < 1e-6, f"said to be unbiased, but the expected gradient is off by {gap:.2e} of the exact one"
    return cosine, norm
