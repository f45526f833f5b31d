"""How a sampler decodes, and what doctor and the user are told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from laws.test_own_rng import PROMPTS, ask, sampled
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.evals.text_findings import sampling
from reflux.models import sampling_way
from reflux.models.sampling_way import Way, static_decoder
from reflux.models.static_decoder import StaticDecoder
from reflux.samplers import hf_engine
from reflux.samplers.flow import Flow
from reflux.samplers.hf import HF
from reflux.samplers.references import References


def drawn(student: str, teacher: str, folder: Path) -> tuple[list[Any], list[str], list[Any]]:
    """(rollouts of a training batch, notes to the user, findings of doctor)."""
    heard = tiny.Heard()

    async def script(acting: Any) -> Any:
        acting.services.listener = heard
        draw = SamplingParams(0, "train", 40, temperature=0.8)
        for purpose in ("eval", "train", "train"):
            groups = await ask(acting, PROMPTS, 3, replace(draw, purpose=purpose))
        return [attempt.rollout for group in groups for attempt in group], list(sampling(HF(), acting))

    rollouts, findings = sampled(
        tiny.config("opd", student, teacher, task={"kind": "outside:Chat"}), folder, script
    )
    return rollouts, heard.notes, findings


def test_a_sampler_over_a_static_cache_draws_the_same_attempts(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, notes, (found,) = drawn(student, teacher, tmp_path / "plain")
    assert notes == []
    assert (found.verdict, found.check, found.text) == ("ok", "sampling", "the library's decoder for a CPU")

    def static(model: Any) -> Way:
        decoder = static_decoder(model)
        assert isinstance(decoder, StaticDecoder)
        return Way(decoder, "CUDA graphs")

    monkeypatch.setattr(hf_engine, "sampling_way", static)
    rollouts, notes, (found,) = drawn(student, teacher, tmp_path / "static")
    assert [r.tokens_T.tolist() for r in rollouts] == [r.tokens_T.tolist() for r in plain]
    # told once, after the first batch for training
    assert notes == ["sampling: CUDA graphs, 0 captured in 0.0 s"]
    assert (found.verdict, found.text) == ("ok", "CUDA graphs")


def test_where_the_memory_is_exceeded_fewer_rows_are_sampled_together(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, _ = drawn(student, teacher, tmp_path / "plain")
    rows, most, decode = list[int](), 4, hf_engine.decode

    def limited(model: Any, asks: Any, *rest: Any) -> Any:
        rows.append(len(asks))
        if len(asks) > most:
            raise torch.OutOfMemoryError("out of memory")
        return decode(model, asks, *rest)

    monkeypatch.setattr(hf_engine, "decode", limited)
    rollouts, _, _ = drawn(student, teacher, tmp_path / "halved")
    assert [r.tokens_T.tolist() for r in rollouts] == [r.tokens_T.tolist() for r in plain]
    assert max(rows) > most
    # what was found holds for the batches that follow
    assert max(rows[-9:]) <= most
    most = 0
    with pytest.raises(ModelError, match=r"Lower sampler\.max_tokens"):
        drawn(student, teacher, tmp_path / "none")


def test_a_gpu_without_triton_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_way, "static_decoder", lambda model: "it waits")
    monkeypatch.setattr(sampling_way, "unusable_because", lambda device: "there is no C compiler")
    model: Any = SimpleNamespace(device=torch.device("cuda"))
    way = sampling_way.sampling_way(model)
    assert way.slow
    assert way.text == (
        "eager, because it waits. Draws and losses take more time and memory without Triton's kernels: "
        "there is no C compiler"
    )


def test_the_slower_way_on_a_gpu_is_told_with_its_reason(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "eager, because the state of this architecture is no key-value cache of transformers"
    monkeypatch.setattr(hf_engine, "sampling_way", lambda model: Way(None, why))
    _, notes, (found,) = drawn(student, teacher, tmp_path / "run")
    assert notes == [f"sampling: {why}"]
    assert (found.verdict, found.text) == ("warning", why)


def test_a_wrapping_sampler_tells_of_the_one_inside_and_others_have_nothing_to_tell() -> None:
    inner = SimpleNamespace(way=Way(None, "transformers, one token at a time"))
    (found,) = sampling(References(), SimpleNamespace(inner=inner))
    assert found.verdict == "ok"
    assert list(sampling(Flow(), SimpleNamespace())) == []
