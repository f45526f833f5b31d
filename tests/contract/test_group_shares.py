"""Which rank gets which groups, and the heads that the ranks get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from reflux.errors import ModelError
from reflux.kernels.head import Head
from reflux.learners.group_shares import places, shares
from reflux.learners.sent_heads import HeadSender, take
from reflux.models.heads import Heads
from reflux.runtime.even_shares import even_shares
from reflux.types import Attempt, TeacherAnswer


def batch(*lengths: tuple[int, ...]) -> list[list[Attempt]]:
    return [
        [Attempt(tiny.rollout(n, seed=i, sample=s)) for s, n in enumerate(group)]
        for i, group in enumerate(lengths)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_group_goes_to_one_rank_whole_and_in_order(ranks: int) -> None:
    groups = batch((3, 9), (1,), (20, 20), (4, 4, 4), (2,))
    split = shares(groups, ranks)
    assert len(split) == ranks
    assert sorted(index for share in split for index in share) == list(range(len(groups)))
    assert all(share == sorted(share) for share in split)
    found = [place for share in split for place in places(groups, share)]
    assert sorted(found) == list(range(sum(map(len, groups))))
    flat = [attempt for group in groups for attempt in group]
    for share in split:
        mine = [attempt for index in share for attempt in groups[index]]
        assert all(flat[place] is attempt for place, attempt in zip(places(groups, share), mine, strict=True))


def test_the_ranks_have_about_as_many_positions() -> None:
    """No rank has more than the mean and the largest group."""
    groups = batch(*((1 + 7 * i % 40, 5) for i in range(20)))
    costs = [sum(a.rollout.prompt_length + a.rollout.length for a in group) for group in groups]
    for ranks in (2, 3, 5):
        loads = [sum(costs[index] for index in share) for share in shares(groups, ranks)]
        assert max(loads) <= sum(costs) / ranks + max(costs)
        assert max(loads) - min(loads) <= max(costs)


def test_shares_are_even_and_ascending() -> None:
    assert even_shares([5, 1, 1, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert even_shares([1], 3) == [[0], [], []]


def asked(key: str) -> list[Attempt]:
    attempt = Attempt(tiny.rollout(2))
    hidden = SimpleNamespace(head_key=key)
    attempt.answers = {
        "main": TeacherAnswer(target=hidden),  # type: ignore[arg-type]
        "none": TeacherAnswer(),
        "plain": TeacherAnswer(target=SimpleNamespace(head_key=None)),  # type: ignore[arg-type]
    }
    return [attempt]


def test_a_head_is_sent_once_and_again_when_a_value_has_changed() -> None:
    heads, weight_VH = Heads(), torch.randn(5, 3)
    heads.add("teachers.a", Head.of(weight_VH, torch.randn(5), scale=0.5, cap=30.0))
    sender = HeadSender(heads)
    first = sender.news(asked("teachers.a"))
    assert sender.news(asked("teachers.a")) == {}
    weight_VH[4, 2] += 1e-3
    again = sender.news(asked("teachers.a"))
    assert not torch.equal(first["teachers.a"].weight_VH, again["teachers.a"].weight_VH)

    other = Heads()
    learner: Any = SimpleNamespace(
        ranks=SimpleNamespace(leads=False),
        services=SimpleNamespace(heads=other),
        model=SimpleNamespace(device=torch.device("cpu")),
    )
    h_NH = torch.randn(4, 3)
    for news in (first, again):
        take(learner, news)
    assert torch.equal(other["teachers.a"].logits(h_NH), heads["teachers.a"].logits(h_NH))


def test_a_head_that_is_no_plain_matrix_is_refused_by_name() -> None:
    class Quantised(nn.Linear): ...

    heads = Heads()
    heads.add("teachers.a", Head(lambda: Quantised(3, 5), 5))
    with pytest.raises(ModelError, match=r"the output head of teachers.a is quantised or has an adapter"):
        HeadSender(heads).news(asked("teachers.a"))
