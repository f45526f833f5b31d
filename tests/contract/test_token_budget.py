"""The size of micro-batches: found from measured memory, halved where memory is exceeded, and never a part of
the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.errors import ModelError
from reflux.learners.hf_engine import HFLearner
from reflux.models.text import as_model
from reflux.models.token_budget import FIXED, TokenBudget, busy_tokens
from reflux.objectives.divergence import Divergence
from tiny import attempt, gradients, rollout


class Device:
    """A device of some bytes, on which n tokens take `fixed + each * n` bytes."""

    def __init__(self, capacity: int, each: int = 10, fixed: int = 0):
        self.capacity, self.each, self.fixed = capacity, each, fixed
        self.tokens = 0

    def free_bytes(self) -> int:
        return self.capacity

    def begin(self) -> None: ...

    def taken_bytes(self) -> int:
        return self.fixed + self.each * self.tokens


def grown(device: Device, first: int, most: int, steps: int = 12) -> tuple[list[int], list[str]]:
    """The budgets of some micro-batches, each as large as the budget lets it be, and the notes."""
    notes: list[str] = []
    budget, sizes = TokenBudget("learner.micro_batch_tokens", notes.append, first, most, device), []
    for _ in range(steps):
        sizes.append(budget.tokens)
        device.tokens = budget.tokens
        with budget.measuring(budget.tokens):
            assert device.taken_bytes() <= device.capacity
    return sizes, notes


def test_the_size_is_doubled_up_to_where_more_are_not_faster() -> None:
    sizes, notes = grown(Device(10**9), 1024, 5000)
    assert sizes[:5] == [1024, 2048, 4096, 5000, 5000]
    assert len(notes) == 1
    assert "5,000 (more are not faster)" in notes[0]


@pytest.mark.parametrize("fixed", [0, 5_000])
def test_what_does_not_fit_is_never_tried(fixed: int) -> None:
    """Of 100,000 bytes at most 80 % are given away; n tokens take fixed + 10 n."""
    sizes, notes = grown(Device(100_000, fixed=fixed), 1024, 1 << 20)
    assert sizes[-1] == sizes[-2]
    assert fixed + 10 * sizes[-1] <= 80_000
    assert sizes[-1] == 8_000 if not fixed else sizes[-1] >= 4096
    assert len(notes) == 1
    assert "more do not fit" in notes[0]


def test_the_first_passes_and_small_parts_are_no_limit() -> None:
    """The first passes allocate the gradients. A part of few tokens takes much a token, for fixed reasons."""
    device, notes = Device(100_000), list[str]()
    budget = TokenBudget("", notes.append, 1024, 4096, device)
    device.tokens = 9_000
    with budget.measuring(1024):
        pass
    assert (budget.tokens, budget.settled) == (1024, False)
    with budget.measuring(3):
        pass
    assert (budget.tokens, budget.settled) == (1024, False)
    device.tokens = 1024
    with budget.measuring(1024):
        pass
    assert (budget.tokens, notes) == (2048, [])


def test_small_models_have_larger_micro_batches() -> None:
    assert [busy_tokens(width) for width in (256, 1024, 4096)] == [16384, 4096, 4096]


def learner(device: Device, tokens: int, most: int) -> tuple[HFLearner, list[int]]:
    """A learner on that device, and the sizes of the micro-batches that it finishes. One that exceeds the
    memory has made its gradient before.
    """
    opened, sizes = tiny.learner(tiny.net(1).double()), []
    passes = opened.backward

    def backward(part: list[Any], *rest: Any) -> Any:
        device.tokens = opened.batch(part, rest[0]).texts.ids_BL.numel()
        result = passes(part, *rest)
        if device.taken_bytes() > device.capacity:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(device.tokens)
        return result

    opened.backward = backward  # type: ignore[method-assign]
    opened.budget = TokenBudget("", lambda text: None, tokens, most, device)
    return opened, sizes


def groups() -> list[Any]:
    teacher = as_model(tiny.net(2).double(), character_tokenizer())
    return [[attempt(rollout(n, seed=n), teacher)] for n in (12, 9, 7, 5, 3, 2, 2, 1)]


def whole() -> dict[str, torch.Tensor]:
    return gradients(tiny.learner(tiny.net(1).double()), groups(), [Divergence()])


def close(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    for name, one in ones.items():
        torch.testing.assert_close(others[name], one, rtol=1e-6, atol=1e-9)


def test_growing_micro_batches_give_the_same_gradient() -> None:
    opened, sizes = learner(Device(10**6), 16, 64)
    close(whole(), gradients(opened, groups(), [Divergence()]))
    assert sizes[0] <= 16 < max(sizes) <= 64


def test_after_memory_is_exceeded_the_whole_batch_begins_again() -> None:
    """Each micro-batch that exceeds the memory has left its gradient, which must not be counted twice."""
    device = Device(400)
    opened, sizes = learner(device, 200, 200)
    close(whole(), gradients(opened, groups(), [Divergence()]))
    assert opened.budget.tokens == 25
    assert max(sizes) * 10 <= 400
    stats = tiny.move(opened, groups(), [Divergence()])
    assert stats["tokens_trained"].value == 41


def test_one_text_that_does_not_fit_is_refused_in_words() -> None:
    opened, _ = learner(Device(100), 200, 200)
    with pytest.raises(ModelError, match=r"learner\.gradient_checkpointing = true"):
        gradients(opened, groups(), [Divergence()])


def test_a_chosen_number_is_kept_and_a_cpu_is_not_measured() -> None:
    assert tiny.learner(tiny.net(1)).budget.tokens == FIXED
    chosen = tiny.learner(tiny.net(1), micro_batch_tokens=77).budget
    assert (chosen.tokens, chosen.settled) == (77, True)


def test_the_measured_size_is_in_the_checkpoint(tmp_path: Path) -> None:
    opened, _ = learner(Device(10**6), 16, 64)
    gradients(opened, groups(), [Divergence()])
    opened.save(tmp_path)
    other, _ = learner(Device(10**6), 16, 64)
    other.load(tmp_path)
    assert other.budget.tokens == opened.budget.tokens == 64
    # A size that was halved after the memory was exceeded does not grow again.
    assert other.budget.settled
    plain = tiny.learner(tiny.net(1).double())
    assert "micro_batch_tokens" not in plain.state()
    plain.load(tmp_path)
    assert plain.budget.tokens == FIXED
