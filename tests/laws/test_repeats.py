"""Law 7, a run that is made again. With `deterministic` it is the same bit for bit on one device, also under
autocast; without it the first step is the same up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from laws.test_resume import told
from reflux.errors import ConfigError
from reflux.models.torch_settings import ONE_WAY, WORKSPACE, prepare_torch
from tiny import same

# What a run on a GPU has by default: bfloat16 autocast.
AUTOCAST = {"learner__autocast": "auto"}
# Two runs differ at most so much in the loss and the gradient norm of their first step, as a share.
BFLOAT16 = 1e-2


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("full", {}),
        ("vopd", {"learner__lora": {"rank": 2}}),
        # sampling from the most likely tokens sums their probabilities
        ("opd", {"sampler__top_p": 0.9, "sampler__allow_biased": True}),
        ("sft", {}),
        ("peers", {"teachers__main__autocast": "auto"}),
    ],
)
def test_with_deterministic_a_run_repeats_bit_for_bit(
    tiny_run: Callable[..., Any], recipe: str, more: dict[str, Any]
) -> None:
    one, other = (tiny_run(recipe, deterministic=True, **AUTOCAST, **more) for _ in range(2))
    assert torch.are_deterministic_algorithms_enabled()
    assert same(one.state, other.state)
    assert told(one) == told(other)


def test_without_deterministic_the_first_step_repeats_up_to_rounding(tiny_run: Callable[..., Any]) -> None:
    one, other = (tiny_run("full", steps=1, deterministic=False, **AUTOCAST) for _ in range(2))
    assert not torch.are_deterministic_algorithms_enabled()
    (first,), (again,) = one.rows("metrics"), other.rows("metrics")
    assert first["tokens_sampled"] == again["tokens_sampled"]
    for name in ("loss", "grad_norm"):
        assert first[name] == pytest.approx(again[name], rel=BFLOAT16)


def test_the_workspace_of_cublas_is_set_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    prepare_torch(0, deterministic=False)
    assert WORKSPACE not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    prepare_torch(0, deterministic=True)
    assert os.environ[WORKSPACE] == ONE_WAY
    # A GPU that is in use already is no obstacle where the variable is there.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare_torch(0, deterministic=True)


def test_a_gpu_that_was_used_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"has used the GPU before this run.* before Python starts"):
        prepare_torch(0, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
