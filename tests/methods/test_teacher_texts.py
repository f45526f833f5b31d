"""The forward KL of studies/teacher_texts.py is its definition, at the tokens of the answer alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import entropy

# scripts import their neighbours
sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from teacher_texts import forward_kl, logp_of

import tiny


def test_it_is_the_sum_over_the_vocabulary_at_each_token_of_the_answer():
    teacher, student = tiny.net(1), tiny.net(2)
    answers = [(torch.arange(6, 17), 4), (torch.arange(40, 43), 2)]
    found = forward_kl(logp_of(teacher, answers), logp_of(student, answers))
    assert [len(kl_N) for kl_N in found] == [7, 1]
    for (ids, begin), kl_N in zip(answers, found, strict=True):
        for place, kl in enumerate(kl_N):
            # what is before the token, read alone
            before = ids[None, : begin + place]
            with torch.inference_mode():
                q, p = (net(before).logits[0, -1].double().softmax(-1).numpy() for net in (teacher, student))
            assert np.isclose(kl, entropy(q, p), rtol=1e-4)


def test_it_is_0_for_the_teacher_itself_and_not_symmetric():
    teacher, student = tiny.net(1), tiny.net(2)
    answers = [(torch.arange(6, 17), 4)]
    logq, logp = logp_of(teacher, answers), logp_of(student, answers)
    assert np.allclose(forward_kl(logq, logq)[0], 0)
    assert not np.allclose(forward_kl(logq, logp)[0], forward_kl(logp, logq)[0], rtol=0.01)
