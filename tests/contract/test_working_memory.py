"""The plan's estimate of the memory that a run takes while it works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reflux.cli.show import show_plan
from reflux.config.recipe import load_recipe
from reflux.inspection.plan import plan
from reflux.inspection.working_memory import working_memory

# the embedded student: 16 attempts x 4 of at most 64 tokens, prompts as long as answers
TOKENS = 64 * 2 * 64


def test_a_micro_batch_holds_what_it_may_and_at_most_the_whole_step() -> None:
    found = plan(load_recipe("quickstart"))
    assert [each.device for each in found.working] == ["GPU", "CPU"]
    shape = found.student.shape
    assert shape is not None
    gpu, cpu = found.working
    assert gpu.activations == TOKENS * shape.activation_bytes(narrow=True, recomputed=False)
    assert cpu.activations == TOKENS * shape.activation_bytes(narrow=False, recomputed=False)
    assert gpu.cache == cpu.cache == TOKENS * shape.cache_bytes(4)
    assert gpu.peak == max(gpu.cache, gpu.activations + gpu.loss)


@pytest.mark.parametrize(("key", "value"), [("micro_batch_tokens", 512), ("gradient_checkpointing", True)])
def test_the_keys_that_save_memory_are_counted(key: str, value: object) -> None:
    whole = plan(load_recipe("quickstart")).working
    less = plan(load_recipe("quickstart", {f"learner.{key}": value})).working
    assert all(one.activations < other.activations for one, other in zip(less, whole, strict=True))


def test_a_cpu_may_keep_a_cache_in_float32_for_weights_of_16_bits() -> None:
    cfg = load_recipe("quickstart")
    student = plan(cfg).student
    assert student.parameters is not None
    narrow = replace(student, stored_bytes=2 * student.parameters)
    gpu, cpu = (working_memory(cfg, narrow, 64, on_gpu) for on_gpu in (True, False))
    assert gpu is not None
    assert cpu is not None
    assert cpu.cache == 2 * gpu.cache


def test_images_have_no_estimate() -> None:
    assert plan(load_recipe("flow")).working == []


def test_the_command_prints_one_line_for_each_device(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan("quickstart", [])
    text = " ".join(capsys.readouterr().out.split())
    assert "working, GPU at most about" in text
    assert "working, CPU at most about" in text


@pytest.mark.parametrize("recipe", ["quickstart", "sft"])
def test_a_server_takes_memory_of_its_own_and_no_cache_here(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sampler" if recipe == "quickstart" else "sampler.generate"
    show_plan(recipe, [f"{key}.kind=vllm", f"{key}.cache_gib=3"])
    text = " ".join(capsys.readouterr().out.split())
    assert "server vLLM takes 90% of a GPU (sampler.gpu_memory)" in text
    assert "3 GiB of key-value cache" in text
    assert "while sampling" not in text
    show_plan(recipe, [f"{key}.kind=vllm", f"{key}.mode=url", f"{key}.url=http://host:8000"])
    assert "vLLM takes" not in capsys.readouterr().out
    show_plan(recipe, [])
    assert "while sampling a key-value cache of" in " ".join(capsys.readouterr().out.split())
