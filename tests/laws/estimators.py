"""A world small enough to enumerate: a tabular student and teacher, every sequence that they can generate,
and exact gradients.

The student is a table of logits with one row per prefix. Token 0 ends a sequence. `SETTINGS` holds, per
registered objective, the settings that the law tests use. A new objective adds its line here and is tested by
all law tests.
"""

from __future__ import annotations

import functools
import itertools
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from reflux.config.registry import part
from reflux.loss.group_values import group_values
from reflux.loss.outputs import FullLogits, SampledLogprobs, TopKLogprobs
from reflux.loss.term import Rows
from reflux.objectives.divergence import MIXED, Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL
from reflux.types import VelocityTarget


class World:
    """Every sequence of up to `horizon` tokens over `vocabulary`, packed: a row per (sequence, position)."""

    def __init__(self, vocabulary: int = 5, horizon: int = 3, seed: int = 0, spread: float = 1.0):
        self.prefixes: dict[tuple[int, ...], int] = {}
        self.sequences: list[tuple[int, ...]] = []
        self._grow((), vocabulary, horizon)
        rng = np.random.default_rng(seed)
        shape = (len(self.prefixes), vocabulary)
        self.student = torch.tensor(spread * rng.standard_normal(shape)).requires_grad_()
        self.teacher = torch.tensor(spread * rng.standard_normal(shape))
        self.lagged = self.student.detach() + torch.tensor(0.3 * rng.standard_normal(shape))
        self.reward = torch.tensor(rng.standard_normal(len(self.sequences)))
        rows = [(s, self.prefixes[y[:t]], y[t]) for s, y in enumerate(self.sequences) for t in range(len(y))]
        self.sequence_N, self.prefix_N, self.ids_N = (
            torch.tensor(column) for column in zip(*rows, strict=True)
        )

    def _grow(self, prefix: tuple[int, ...], vocabulary: int, horizon: int) -> None:
        self.prefixes[prefix] = len(self.prefixes)
        for token in range(vocabulary):
            sequence = (*prefix, token)
            if token == 0 or len(sequence) == horizon:
                self.sequences.append(sequence)
            else:
                self._grow(sequence, vocabulary, horizon)

    def policy(self, name: str) -> torch.Tensor:
        """The logits of "student", "teacher" or "lagged" (an older student)."""
        return {"student": self.student, "teacher": self.teacher, "lagged": self.lagged}[name]

    def log_probability(self, policy: torch.Tensor) -> torch.Tensor:
        """The log-probability of every sequence under a table of logits."""
        logp_N = policy.log_softmax(-1)[self.prefix_N, self.ids_N]
        return torch.zeros(len(self.sequences), dtype=logp_N.dtype).index_add(0, self.sequence_N, logp_N)

    def rows(
        self,
        behaviour: torch.Tensor,
        teacher: torch.Tensor,
        outputs: str = "full",
        advantage_offset_N: torch.Tensor | None = None,
        copies: int = 1,
    ) -> Rows:
        """All rows, repeated `copies` times."""
        prefix_N, ids_N = self.prefix_N.repeat(copies), self.ids_N.repeat(copies)
        teacher_says = FullLogits(teacher[prefix_N], ids_N)
        if outputs == "sampled":
            teacher_says = SampledLogprobs(teacher_says.logp_N)
        elif outputs == "listed":
            top = teacher_says.logp_NV.topk(3, dim=-1)
            teacher_says = TopKLogprobs(top.indices, top.values, teacher_says.logp_N)
        return Rows(
            student=FullLogits(self.student[prefix_N], ids_N),
            teachers={"main": teacher_says},
            behaviour_logp_N=behaviour.detach().log_softmax(-1)[prefix_N, ids_N],
            advantage_offset_N=torch.zeros(len(ids_N), dtype=torch.float64)
            if advantage_offset_N is None
            else advantage_offset_N,
        )

    def expected_gradient(
        self, objective: Callable[[Rows], torch.Tensor], behaviour: torch.Tensor, rows: Rows
    ) -> np.ndarray:
        """E over sequences ~ behaviour of sum_t grad cost_t. The sampling distribution is not
        differentiated.
        """
        weight_N = self.log_probability(behaviour.detach()).exp()[self.sequence_N]
        cost_N = objective(rows)
        assert cost_N.shape == self.ids_N.shape
        (gradient,) = torch.autograd.grad((weight_N * cost_N).sum(), self.student, retain_graph=True)
        return gradient.numpy()

    def group_gradient(
        self, objective: SampledKL, behaviour: torch.Tensor, size: int, outputs: str = "full"
    ) -> np.ndarray:
        """The expected gradient over whole groups of `size` independent attempts: every sequence with every
        choice of siblings.

        All members of a group have the same distribution, so the gradient of one member is computed. There is
        one copy of all rows per choice of siblings.
        """
        one = self.rows(behaviour, self.teacher, outputs)
        reward_N = (one.teachers[objective.teacher].logp_N - one.behaviour_logp_N).detach().numpy()
        rewards = [reward_N[self.sequence_N.numpy() == s] for s in range(len(self.sequences))]
        probability = self.log_probability(behaviour.detach()).exp().numpy()
        choices = list(itertools.product(range(len(rewards)), repeat=size - 1))
        alone = objective.baseline == "leave_one_out"
        value_CS = [
            [group_values([own, *(rewards[s] for s in siblings)], alone)[0] for own in rewards]
            for siblings in choices
        ]
        weight_CS = [np.prod(probability[list(siblings)]) * probability for siblings in choices]
        rows = self.rows(behaviour, self.teacher, outputs, copies=len(choices))
        rows.group_value_N, weight_N = (
            torch.tensor(np.array(table))[:, self.sequence_N].flatten() for table in (value_CS, weight_CS)
        )
        return torch.autograd.grad((weight_N * objective(rows)).sum(), self.student)[0].numpy()

    def exact_gradient(
        self, divergence: Callable[[np.ndarray, np.ndarray], float], behaviour: torch.Tensor
    ) -> np.ndarray:
        """sum over prefixes of P(prefix) * grad divergence there, by central differences of a numpy function
        of two distributions.
        """
        logp = behaviour.detach().log_softmax(-1).numpy()
        # P(the prefix occurs)
        reach = np.exp([sum(logp[self.prefixes[y[:t]], y[t]] for t in range(len(y))) for y in self.prefixes])
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
        """Minus the gradient of the expected reward, differentiated through the probability of whole
        sequences.
        """
        (gradient,) = torch.autograd.grad(
            -(self.log_probability(self.student).exp() * self.reward).sum(), self.student
        )
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
        return (
            np_kl(q, p)
            if a == 0
            else np_kl(p, q)
            if a == 1
            else (1 - float((p**a * q ** (1 - a)).sum())) / (a * (1 - a))
        )

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
    """One objective as the laws run it: what it estimates, whether exactly, and its value at identity."""

    objective: typing.Any
    # a divergence of np_divergence, or "reward"
    target: str
    unbiased: bool = True
    # False if the gradient is known to point away from the exact one in some worlds. Then the law only
    # requires that it is not zero.
    points: bool = True
    home: typing.Literal["divergence", "score", "exempt"] = "divergence"
    outputs: str = "full"
    # the policy that sampled the sequences
    policy: typing.Literal["student", "teacher"] = "student"
    # the number of attempts per prompt if siblings matter, else 0
    group: int = 0

    @property
    def name(self) -> str:
        """The fields that differ from their defaults, as in a recipe."""
        values = {f.name: getattr(self.objective, f.name) for f in fields(self.objective)}
        changed = [(f.name, values[f.name]) for f in fields(self.objective) if values[f.name] != f.default]
        words = [
            f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
            for name, value in changed
        ]
        return ", ".join(words + ([f"group_size = {self.group}"] if self.group else []))


def choices(cls: type, name: str) -> tuple[str, ...]:
    """The allowed values of a Literal field, so that a new value joins the laws automatically."""
    return typing.get_args(typing.get_type_hints(cls)[name])


def _divergences() -> list[Setting]:
    kinds, supports, tails, ratios = (
        choices(Divergence, name) for name in ("divergence", "support", "tail", "ratio")
    )
    bounded = [(support, tail) for support in supports for tail in tails if support != "full"]
    settings = [Setting(Divergence(divergence=kind, ratio=ratio), kind) for kind in kinds for ratio in ratios]
    settings += [
        Setting(Divergence(divergence=kind, beta=beta), kind) for kind in MIXED for beta in (0.0, 0.25)
    ]
    for kind, (support, tail) in itertools.product(kinds, bounded):
        settings.append(
            Setting(
                Divergence(divergence=kind, support=support, tail=tail, k=3), kind, False, tail == "bucket"
            )
        )
        settings.append(Setting(Divergence(divergence=kind, support=support, tail=tail, k=99), kind))
    for kind, tail in itertools.product(kinds, tails):
        settings.append(
            Setting(
                Divergence(divergence=kind, support="teacher", tail=tail),
                kind,
                False,
                tail == "bucket",
                outputs="listed",
            )
        )
    return settings


def _sampled() -> list[Setting]:
    """Every baseline with every ratio. Baselines that compare siblings are in groups of two and three."""
    return [
        Setting(
            SampledKL(baseline=baseline, baseline_k=k, ratio=ratio),
            "reverse",
            unbiased=baseline != "group_mean",
            home="score",
            group=group,
            outputs="sampled" if group else "full",
        )
        for baseline in choices(SampledKL, "baseline")
        for k in ((1, 3, 99) if baseline == "topk_kl" else (20,))
        for ratio in choices(SampledKL, "ratio")
        for group in ((2, 3) if baseline in GROUP_BASELINES else (0,))
    ]


SETTINGS: dict[str, list[Setting]] = {
    "sampled_kl": [
        *_sampled(),
        Setting(SampledKL(), "reverse", home="score", outputs="sampled"),
        Setting(SampledKL(), "reverse", home="score", outputs="listed"),
        Setting(SampledKL(max_gap_nats=1.0), "reverse", unbiased=False, points=False, home="score"),
    ],
    "divergence": _divergences(),
    "nll": [Setting(NLL(), "forward", home="exempt", policy="teacher")],
    "policy_gradient": [
        Setting(PolicyGradient(ratio=ratio), "reward", home="exempt")
        for ratio in choices(PolicyGradient, "ratio")
    ],
}


def settings_of(registry: typing.Iterable[str]) -> list[tuple[str, Setting | None]]:
    """Every registered kind with its settings. A kind without settings has None, so that its test fails."""
    return [
        (kind, setting) for kind in registry if not _of_flows(kind) for setting in SETTINGS.get(kind, [None])
    ]


def _of_flows(kind: str) -> bool:
    """True for objectives on velocities, which are tested in test_flow_gradients.py."""
    return VelocityTarget in part("objectives", kind)().accepts


@functools.cache
def world_of(vocabulary: int, horizon: int, seed: int, spread: float = 1.0) -> World:
    return World(vocabulary, horizon, seed, spread)


@functools.cache
def _exact(world: World, target: str, beta: float | None, policy: str) -> np.ndarray:
    return world.exact_gradient(np_divergence(target, beta), world.policy(policy))


def expected_and_exact(
    world: World, setting: Setting, policy: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A setting's expected gradient and the exact one, for sequences of its policy or of "lagged"."""
    who = policy or setting.policy
    behaviour, beta = (
        world.policy(who),
        setting.objective.beta if isinstance(setting.objective, Divergence) else None,
    )
    if setting.target == "reward":
        rows = world.rows(
            behaviour, world.teacher, setting.outputs, advantage_offset_N=world.reward[world.sequence_N] - 0.7
        )
        return world.expected_gradient(setting.objective, behaviour, rows), world.policy_gradient()
    exact = _exact(world, setting.target, beta, who)
    if setting.group:
        return world.group_gradient(setting.objective, behaviour, setting.group, setting.outputs), exact
    return world.expected_gradient(
        setting.objective, behaviour, world.rows(behaviour, world.teacher, setting.outputs)
    ), exact


def compare(expected: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """(cosine, relative norm) of an expected gradient against the exact one. (0, 0) if it is zero."""
    size, exact_size = np.linalg.norm(expected), np.linalg.norm(exact)
    assert exact_size > 1e-3, "the world must give something to learn"
    if size < 1e-8 * exact_size:
        return 0.0, 0.0
    return float((expected * exact).sum() / (size * exact_size)), float(size / exact_size)


def assert_alive(
    expected: np.ndarray, exact: np.ndarray, unbiased: bool, points: bool = True
) -> tuple[float, float]:
    """Law 1: not zero, with a positive cosine to the exact gradient, and equal to it where unbiased."""
    cosine, norm = compare(expected, exact)
    assert norm > 0, "dead: the expected gradient vanishes, nothing is learnt"
    assert cosine > 0.1 or not points, (
        f"the expected gradient points away from the exact one: cosine {cosine:.3f}"
    )
    if unbiased:
        gap = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
        assert gap < 1e-6, (
            f"said to be unbiased, but the expected gradient is off by {gap:.2e} of the exact one"
        )
    return cosine, norm
