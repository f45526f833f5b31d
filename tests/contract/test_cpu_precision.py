"""On a CPU, a model stored in 16 bits is computed in float32, unless the CPU multiplies 16 bits natively."""

from __future__ import annotations

import asyncio
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from reflux.evals.parity import is_narrow
from reflux.loop import train
from reflux.models.cpu.precision import multiplies_natively
from reflux.models.text import Model, load_model
from reflux.training import Options


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """A CPU of Intel with or without the tiles of AMX."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)
    return request.param


def narrow(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> str:
    return tiny.save(tiny.net(seed).to(dtype), folder)


def load(folder: str, **more: str) -> Model:
    return load_model(folder, "teachers.main.model", device="cpu", **more)


@pytest.mark.parametrize(("native", "dtype"), [(False, "float32"), (True, "bfloat16")], indirect=["native"])
def test_auto_is_the_precision_in_which_the_cpu_is_fast(tmp_path: Path, native: bool, dtype: str) -> None:
    model = load(narrow(tmp_path))
    assert model.net.dtype == getattr(torch, dtype)
    assert model.stored_dtype == torch.bfloat16
    told = (
        f"{tmp_path} is stored in bfloat16 and computed in float32, because this CPU is slower in bfloat16."
    )
    assert model.notes == (() if native else (told,))
    learner = SimpleNamespace(model=model, cfg=SimpleNamespace(autocast="auto"))
    assert is_narrow(learner, "auto") is native


@pytest.mark.parametrize("there", [False, True])
def test_an_arm_processor_is_asked_only_if_torch_has_onednn(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without oneDNN this namespace has no operators.
    operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True) if there else SimpleNamespace()
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert multiplies_natively(torch.bfloat16) is there
    assert not multiplies_natively(torch.float16)


@pytest.mark.parametrize("native", [False], indirect=True)
def test_the_weights_are_those_of_the_files(tmp_path: Path, native: bool) -> None:
    asked = load(narrow(tmp_path), dtype="float32").net.state_dict()
    for name, value in load(str(tmp_path)).net.state_dict().items():
        assert torch.equal(value, asked[name]), name
        assert torch.equal(value, value.bfloat16().float()), name


@pytest.mark.parametrize("native", [False, True], indirect=True)
def test_float16_is_never_native_and_a_dtype_of_the_recipe_is_kept(tmp_path: Path, native: bool) -> None:
    assert not multiplies_natively(torch.float16)
    assert multiplies_natively(torch.float32)
    assert load(narrow(tmp_path / "half", torch.float16)).net.dtype == torch.float32
    asked = load(str(tmp_path / "half"), dtype="float16")
    assert (asked.net.dtype, asked.notes) == (torch.float16, ())
    wide = load(tiny.save(tiny.net(1), tmp_path / "wide"))
    assert (wide.net.dtype, wide.notes) == (torch.float32, ())


@pytest.mark.parametrize("native", [False], indirect=True)
def test_a_run_says_it_once_for_each_model(tmp_path: Path, native: bool) -> None:
    student, teacher = narrow(tmp_path / "student"), narrow(tmp_path / "teacher", seed=2)
    heard = tiny.Heard()
    run = tiny.config("full", student, teacher, steps=1)
    asyncio.run(train(run, Options(tmp_path / "run", watch=heard)))
    said = [note.split(" is stored")[0] for note in heard.notes if "is stored in" in note]
    assert sorted(said) == sorted([student, teacher])
