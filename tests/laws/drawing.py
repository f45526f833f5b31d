"""Attempts of a small world as a sampler records them at a temperature, with top-p, by the current or an
older student, and the gradients that they give.

`logp_T` is of the distribution that was sampled from, `logp_raw_T` of the student at temperature 1. Batch,
loss and objective are those of the library.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laws.estimators import World, world_of
from reflux.kernels.head import Head
from reflux.loss.batch import micro_batches, plan
from reflux.loss.token_loss import TokenMicroBatch, backward
from reflux.models.heads import Heads
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.types import Attempt, Credit, Group, HiddenTarget, Prompt, TeacherAnswer, TokenRollout


def drawn_from(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probs, [prefixes, V], at a temperature: the smallest set of most likely tokens that holds top_p,
    renormalised.
    """
    probability = np.exp(logits.detach().numpy() / temperature)
    probability /= probability.sum(-1, keepdims=True)
    for row in probability:
        order = np.argsort(-row)
        kept = 1 + int(np.searchsorted(np.cumsum(row[order]), top_p - 1e-12))
        row[order[kept:]] = 0
    with np.errstate(divide="ignore"):
        return torch.tensor(np.log(probability / probability.sum(-1, keepdims=True)))


class Drawing:
    """A world whose answers are sampled at a temperature, with top-p, from the current or an older
    student.
    """

    def __init__(
        self, shape: tuple[int, int, int], temperature: float, top_p: float, policy: str = "student"
    ):
        self.world: World = world_of(*shape)
        acting = self.world.policy(policy).detach()
        self.raw, self.behaviour = acting.log_softmax(-1), drawn_from(acting, temperature, top_p)
        self.inside = torch.isfinite(self.behaviour)
        self.probability_S = self.world.log_probability(self.behaviour).exp().numpy()
        self.reach = np.exp(
            [
                sum(self.behaviour[self.world.prefixes[y[:t]], y[t]] for t in range(len(y)))
                for y in self.world.prefixes
            ]
        )
        self.head, self.heads = Head.of(torch.eye(shape[0], dtype=torch.float64)), Heads()
        self.key = self.heads.add("drawing", self.head)

    def prefixes(self, sequence: tuple[int, ...]) -> list[int]:
        return [self.world.prefixes[sequence[:t]] for t in range(len(sequence))]

    def attempt(self, index: int, weight: float, shift: float = 0.0) -> Attempt:
        """The answer as the sampler records it."""
        sequence = self.world.sequences[index]
        places, tokens_T = self.prefixes(sequence), np.array(sequence)
        rollout = TokenRollout(
            prompt=Prompt("p", ()),
            sample=0,
            version=0,
            finish="stop",
            mask_T=np.ones(len(sequence), dtype=bool),
            logp_T=self.behaviour[places, sequence].numpy(),
            logp_raw_T=self.raw[places, sequence].numpy(),
            prompt_tokens=np.zeros(1, dtype=np.int64),
            tokens_T=tokens_T,
            text="",
            messages=(),
        )
        logp_T = self.world.teacher.log_softmax(-1)[places, sequence].numpy()
        target = HiddenTarget(teacher="main", h_TH=self.world.teacher[places], head=self.key, logp_T=logp_T)
        made = Attempt(rollout, answers={"main": TeacherAnswer(target=target)})
        made.credits["drawn"] = Credit(weight_T=weight, advantage_offset_T=shift)
        return made

    def groups(self, size: int, reward: bool = False) -> list[Group]:
        """Every choice of `size` answers, weighted by its probability. Each member counts 1 / size."""
        found = []
        for indices in itertools.product(np.flatnonzero(self.probability_S), repeat=size):
            weight = float(np.prod(self.probability_S[list(indices)])) / size
            found.append(
                [self.attempt(i, weight, float(self.world.reward[i]) if reward else 0.0) for i in indices]
            )
        return found

    def expected_gradient(self, objective: Any, size: int = 1) -> np.ndarray:
        """The gradient of the library's loss, summed over all answers."""
        groups = self.groups(size, reward=isinstance(objective, PolicyGradient))
        items = plan(groups, [objective], "token-mean-weighted")
        # the loss is divided by the number of rows; this undoes the division
        rows = sum(len(item.rows_N) for item in items)
        student = self.world.student.detach().clone().requires_grad_()
        for part in micro_batches(items, lambda: 1 << 20):
            places = [
                place for item in part for place in self.prefixes(tuple(item.rollout.tokens_T.tolist()))
            ]
            backward(
                TokenMicroBatch(part, [objective], torch.device("cpu"), self.heads),
                student[places],
                self.head,
            )
        return rows * student.grad.numpy()

    def exact_gradient(self, cost: Any) -> np.ndarray:
        """sum over prefixes of P(prefix is visited) * gradient of cost(p, q, inside) there."""
        student = self.world.student.detach().clone().requires_grad_()
        cost_P = cost(student.log_softmax(-1), self.world.teacher.log_softmax(-1), self.inside)
        (torch.tensor(self.reach) * cost_P).sum().backward()
        return student.grad.numpy()

    def onward_reward(self) -> Tensor:
        """Q [prefixes, V]: the mean reward of the answers that continue a prefix and a token."""
        total, mass = (torch.zeros_like(self.raw) for _ in range(2))
        for sequence, probability, reward in zip(
            self.world.sequences, self.probability_S, self.world.reward, strict=True
        ):
            for place, token in zip(self.prefixes(sequence), sequence, strict=True):
                total[place, token] += probability * reward
                mass[place, token] += probability
        return total / mass.clamp_min(1e-300)


def reverse_kl_inside(p: Tensor, q: Tensor, inside: Tensor) -> Tensor:
    """The sum of p log(p / q) - p + q over the tokens that can be sampled. It is the reverse KL if all tokens
    can be sampled, else the part of it inside the set.
    """
    return (p.exp() * (p - q) - p.exp() + q.exp()).where(inside, 0.0).sum(-1)
