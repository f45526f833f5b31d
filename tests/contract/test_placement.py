"""The words of a recipe for devices and precisions: short names are accepted, unknown ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError, ModelError
from reflux.models.placement import pick_device


def opd(**changes: Any) -> Any:
    return load_recipe("opd", {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("float", "float32"),
        ("float32", "float32"),
        ("auto", "auto"),
    ],
)
def test_short_names_of_a_dtype_become_the_long_ones(short: str, long: str) -> None:
    cfg = opd(sampler__dtype=short)
    assert cfg.sampler.dtype == long
    assert cfg == opd(sampler__dtype=long)


def test_an_unknown_dtype_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.dtype: .*'bfloat16'.*, got 'int8'"):
        opd(sampler__dtype="int8")


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", 'Write "cuda"'), ("GPU:1", 'Write "cuda:1"'), ("cuda 1", '"cuda:1" for the second GPU')],
)
def test_devices_that_torch_does_not_know_are_refused(device: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"learner\.device: .*{words}"):
        opd(learner__device=device)


def test_devices_are_written_as_torch_writes_them() -> None:
    assert opd(learner__device="CPU").learner.device == "cpu"


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == "cpu"
    with pytest.raises(ModelError, match=r'device = "nonsense" cannot be used'):
        pick_device("nonsense")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match=r'device = "cuda:7" cannot be used: .* There are 2 GPUs here'):
        pick_device("cuda:7")
