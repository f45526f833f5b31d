"""The Bradley-Terry loss over pairs of a teacher's answer and an attempt, from its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from device import here
from reflux.rewards.bradley_terry import Pairs, bradley_terry, pair_accuracy, slopes

# for each prompt the numbers of teacher's answers and of attempts
SIZES = [(2, 3), (1, 1), (3, 2)]


def scores(seed: int = 0, count: int = 12) -> torch.Tensor:
    return here(np.random.default_rng(seed).normal(0, 2, count))


def by_definition(values: np.ndarray) -> float:
    """The mean over prompts' pairs of -log sigmoid(D(teacher) - D(student)), one pair after another."""
    losses, start = [], 0
    for answers, attempts in SIZES:
        teachers = values[start : start + answers]
        students = values[start + answers : start + answers + attempts]
        losses += [-math.log(1 / (1 + math.exp(s - t))) for t in teachers for s in students]
        start += answers + attempts
    return sum(losses) / len(losses)


def test_pairs_are_all_pairs_within_a_prompt_and_no_other() -> None:
    pairs = Pairs.of(SIZES)
    found = set(zip(pairs.teacher_M, pairs.student_M, strict=True))
    first = {(t, s) for t in (0, 1) for s in (2, 3, 4)}
    assert found == first | {(5, 6)} | {(t, s) for t in (7, 8, 9) for s in (10, 11)}
    assert len(pairs.teacher_M) == len(found) == 13
    assert Pairs.of([]) == ([], [])
    assert Pairs.of([(2, 0), (1, 1)]) == ([2], [3])


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_and_its_slopes_are_those_of_the_definition(seed: int) -> None:
    values_N, step = scores(seed), 1e-6
    loss, slopes_N = slopes(values_N, Pairs.of(SIZES))
    known = values_N.cpu().numpy()
    assert float(loss) == pytest.approx(by_definition(known), rel=1e-12)
    assert float(bradley_terry(values_N, Pairs.of(SIZES))) == float(loss)
    for place in range(len(known)):
        moved = np.eye(len(known))[place] * step
        slope = (by_definition(known + moved) - by_definition(known - moved)) / (2 * step)
        assert float(slopes_N[place]) == pytest.approx(slope, abs=1e-9)
    # Teachers' answers go up, attempts go down, and a shift of all scores changes nothing.
    signs = [sign for answers, attempts in SIZES for sign in [-1] * answers + [1] * attempts]
    assert slopes_N.sign().tolist() == signs
    assert float(slopes_N.sum()) == pytest.approx(0, abs=1e-15)


def test_large_gaps_neither_overflow_nor_vanish() -> None:
    loss, slopes_2 = slopes(here(torch.tensor([-1e4, 1e4], dtype=torch.float64)), Pairs.of([(1, 1)]))
    assert float(loss) == pytest.approx(2e4)
    assert slopes_2.tolist() == [-1.0, 1.0]
    loss, slopes_2 = slopes(here(torch.tensor([1e4, -1e4], dtype=torch.float64)), Pairs.of([(1, 1)]))
    assert (float(loss), slopes_2.abs().tolist()) == (0.0, [0.0, 0.0])


def test_where_teacher_and_student_give_the_same_texts_nothing_is_learnt() -> None:
    """Enumerated: both give each of three texts. Where D gives all the same score, the loss is log 2 and the
    slopes of a text as answer and as attempt add up to 0. Other scores cost more and are drawn together.
    """
    pairs = Pairs.of([(3, 3)])
    loss, slopes_6 = slopes(here(torch.full((6,), 0.7, dtype=torch.float64)), pairs)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-15)
    assert slopes_6.tolist() == pytest.approx([-1 / 6] * 3 + [1 / 6] * 3)
    values_3 = here(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    loss, slopes_6 = slopes(torch.cat([values_3, values_3]), pairs)
    assert float(loss) > math.log(2)
    assert (slopes_6[:3] + slopes_6[3:]).round(decimals=12).sign().tolist() == [-1, 0, 1]


def test_accuracy_counts_pairs_and_equal_scores_half() -> None:
    pairs = Pairs.of([(1, 4)])
    assert pair_accuracy(here(torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0])), pairs) == (1 + 1 + 0.5 + 0) / 4
    assert pair_accuracy(here(torch.zeros(5)), pairs) == 0.5
