"""Compiled layers compute the same, padded, packed and recomputed; names of weights stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.errors import ModelError
from reflux.models.compiled import compile_layers
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from tiny import attempt, gradients, rollout


def groups() -> list[Any]:
    teacher = as_model(tiny.net(2).double(), character_tokenizer())
    return [[attempt(rollout(n, seed=n), teacher)] for n in (9, 4, 6)]


@pytest.mark.parametrize(("pack", "recomputed"), [(False, False), (True, False), (True, True)])
def test_gradients_are_those_of_the_plain_model(pack: bool, recomputed: bool) -> None:
    """aot_eager traces and differentiates as the compiler does, and needs no C++ compiler."""
    torch._dynamo.reset()
    whole = gradients(tiny.learner(tiny.net(1, layers=2).double()), groups(), [Divergence()])
    opened = tiny.learner(tiny.net(1, layers=2).double(), gradient_checkpointing=recomputed)
    names = list(opened.net.state_dict())
    assert compile_layers(opened.net, "aot_eager") == 2
    if pack:
        opened.padded_because = ""
    for name, one in gradients(opened, groups(), [Divergence()]).items():
        torch.testing.assert_close(one, whole[name], rtol=1e-6, atol=1e-9)
    assert list(opened.net.state_dict()) == names


def test_layers_and_lengths_share_one_program() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    programs, net = CompileCounter(), tiny.net(1, layers=4)
    compile_layers(net, programs)
    for length in (5, 9):
        net.model(input_ids=torch.arange(length)[None], use_cache=False)
    assert programs.frame_count == 1


def test_layers_of_an_unknown_class_are_refused() -> None:
    with pytest.raises(ModelError, match=r"learner\.compile: the layers of Linear"):
        compile_layers(torch.nn.Linear(2, 2))
