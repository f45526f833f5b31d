"""The preflight refuses, before the first step, what would go wrong silently."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from reflux.errors import ModelError
from reflux.evals.gaps import Gaps
from reflux.evals.parity import is_narrow
from reflux.evals.text_findings import early_stop
from reflux.inspection.doctor import examine
from reflux.learners.hf_engine import HFLearner
from reflux.models import lora, token_steps
from reflux.models.chat.renderer import Renderer
from reflux.models.written import Written
from reflux.teachers.in_process_teacher import InProcessTeacher
from tiny import END

ON: dict[str, Any] = {"task": {"kind": "outside:Chat"}, "steps": 2, "skip_checks": []}


def forgets_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new token is read without the tokens before it."""
    step = token_steps.DecoderSteps.step

    def alone(self: Any, tokens_B: Any) -> Any:
        self.memory.bias_BKL[:, :, : self.memory.written] = -1e9
        return step(self, tokens_B)

    monkeypatch.setattr(token_steps.DecoderSteps, "step", alone)


def mixes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows change places when one of them ends."""
    keep = token_steps.DecoderSteps.keep
    monkeypatch.setattr(token_steps.DecoderSteps, "keep", lambda self, index: keep(self, index.flip(0)))


def reads_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's states depend on the other rows of the batch."""
    hidden = HFLearner.hidden_rows

    def mixed(self: Any, batch: Any) -> Any:
        h_NH = hidden(self, batch)
        return h_NH + 0.1 * h_NH.mean(0)

    monkeypatch.setattr(HFLearner, "hidden_rows", mixed)


def teaches_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's states depend on the number of texts that it reads at once."""
    read = InProcessTeacher._answers

    def shifted(self: Any, requests: Any, states: Any) -> Any:
        return read(self, requests, [h_TH * (1 + 0.1 * len(states)) for h_TH in states])

    monkeypatch.setattr(InProcessTeacher, "_answers", shifted)


def ends_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Renderer.ids
    monkeypatch.setattr(Renderer, "ids", lambda self, messages: [*ids(self, messages), END])


def goes_on_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler does not know the end token."""
    init = Written.__init__

    def deaf(self: Any, model: Any, *rest: Any) -> None:
        init(self, model, *rest)
        self.ends = np.asarray([-1])

    monkeypatch.setattr(Written, "__init__", deaf)


def is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = HFLearner.__init__

    def broken(self: Any, *known: Any) -> None:
        opened(self, *known)
        with torch.no_grad():
            next(iter(self.trained.values())).fill_(torch.nan)

    monkeypatch.setattr(HFLearner, "__init__", broken)


FAULTS = {
    forgets_the_cache: "parity, measured before the first step: the log-probs of sampler and learner differ",
    mixes_rows: "parity, measured before the first step: the log-probs of sampler and learner differ",
    reads_its_neighbours: "parity, measured before the first step",
    teaches_by_batch: "teacher, measured before the first step: the log-probs of teacher 'main' in a batch",
    ends_its_prompts: "prompts, measured before the first step: prompt .* ends with the end token '<end>'",
    goes_on_after_the_end: "ends, measured before the first step: .* goes on after an end token",
    is_not_finite: "parity, measured before the first step",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_refused_before_the_first_step(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any, fault: Callable[..., None]
) -> None:
    fault(monkeypatch)
    with pytest.raises(ModelError, match=FAULTS[fault]):
        tiny_run("full", out=tmp_path / "run", sampler__max_tokens=24, **ON)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    # The corrected command may use the same folder.
    tiny_run("full", out=tmp_path / "run", sampler__max_tokens=24, **ON)


def test_weights_that_are_published_in_part_are_refused_after_the_first_update(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    full = lora.full_weights
    monkeypatch.setattr(
        lora,
        "full_weights",
        lambda net, only=None: (pair for pair in full(net, only) if "mlp" not in pair[0]),
    )
    with pytest.raises(ModelError, match=r"parity, measured after the first update: .* sampler and learner"):
        tiny_run("full", out=tmp_path / "run", **ON, learner__lr=0.05)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_check_is_left_out_by_its_name(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teaches_by_batch(monkeypatch)
    tiny_run("full", **{**ON, "skip_checks": ["teacher", "identity"]})


def test_a_run_says_in_one_line_what_was_measured(student: str, teacher: str, tmp_path: Any) -> None:
    import asyncio

    from reflux.loop import train
    from reflux.training import Options

    heard = tiny.Heard()
    asyncio.run(train(tiny.config("full", student, teacher, **ON), Options(tmp_path / "run", watch=heard)))
    (line,) = heard.notes
    assert line.startswith("preflight: disk, answers, parity, teacher, gradient, identity measured in ")


@pytest.mark.parametrize("recipe", ["sft", "peers", "rl", "vopd", "gkd", "topk", "release", "everything"])
def test_every_kind_of_text_recipe_passes(tiny_run: Callable[..., Any], recipe: str) -> None:
    groups = {"group_size": 3} if recipe in ("peers", "rl", "everything") else {}
    tiny_run(recipe, **{**ON, "steps": 1}, **groups)


def test_lora_passes_before_and_after_the_first_update(tiny_run: Callable[..., Any]) -> None:
    tiny_run("full", **ON, learner__lora={"rank": 2, "alpha": 4.0}, learner__lr=0.05)


@pytest.mark.parametrize(
    ("gaps", "narrow", "verdict"),
    [
        ([0.0, 9e-4], False, "ok"),
        ([0.0, 1.1e-3], False, "failed"),
        ([np.nan], False, "failed"),
        ([0.001] * 2000 + [0.2], True, "ok"),
        ([0.03] * 50, True, "warning"),
        ([0.001] * 50 + [1.0], True, "warning"),
        ([0.2] * 50, True, "failed"),
        ([0.001] * 50 + [9.0], True, "failed"),
        ([np.inf], True, "failed"),
    ],
)
def test_bounds_go_by_the_precision(gaps: list[float], narrow: bool, verdict: str) -> None:
    assert Gaps("a and b", [np.asarray(gaps)], narrow).verdict == verdict


@pytest.mark.parametrize(
    ("device", "autocast", "stored", "sampler", "narrow"),
    [
        ("cpu", "auto", "float32", "auto", False),
        ("cuda", "off", "bfloat16", "auto", True),
        ("cpu", "auto", "bfloat16", "float32", False),
        ("cpu", "auto", "float32", "float16", True),
        # float32 weights, and products in bfloat16
        ("cuda", "auto", "float32", "float32", True),
        ("cuda", "off", "float32", "float32", False),
        ("cuda", "off", "float32", "bfloat16", True),
    ],
)
def test_16_bits_are_those_of_the_sampler_or_of_autocast(
    device: str, autocast: str, stored: str, sampler: str, narrow: bool
) -> None:
    model = SimpleNamespace(device=torch.device(device), stored_dtype=getattr(torch, stored))
    assert is_narrow(SimpleNamespace(model=model, cfg=SimpleNamespace(autocast=autocast)), sampler) == narrow


def test_the_doctor_prints_the_median_and_the_tail_in_16_bits(student: str, teacher: str) -> None:
    async def texts(**more: Any) -> list[str]:
        found = examine(tiny.config("full", student, teacher, **more), prompts=2)
        return [finding.text async for finding in found if finding.check == "parity"]

    (narrow,) = asyncio.run(texts(sampler__dtype="bfloat16"))
    assert re.search(r"median [\d.e-]+ \(bound 0.02\), 99.9 % quantile [\d.e-]+ \(bound 0.3\)", narrow)
    (wide,) = asyncio.run(texts())
    assert "median" not in wide
    assert wide.count("(bound 0.001)") == 2


def test_a_stop_text_ends_one_answer_early(student: str, teacher: str, tmp_path: Any) -> None:
    """With it sampled again, one row ends in its first half and another one goes on."""
    from laws.test_own_rng import PROMPTS, ask, sampled
    from reflux.config.step_context import SamplingParams

    cfg = tiny.config("opd", student, teacher, task={"kind": "outside:Chat"})

    def rollouts(name: str, draw: SamplingParams) -> list[Any]:
        return sampled(cfg, tmp_path / name, lambda acting: ask(acting, PROMPTS, 2, draw))

    first = rollouts("first", SamplingParams(0, "preflight", 24))
    stop = early_stop(first)
    assert stop
    again = rollouts("again", SamplingParams(0, "preflight", 24, stop=(stop,)))
    lengths = [
        (a.rollout.length, b.rollout.length)
        for one, other in zip(first, again, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    assert any(after < before for before, after in lengths)
    assert any(after == before for before, after in lengths)


def without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = HFLearner.hidden_rows
    monkeypatch.setattr(HFLearner, "hidden_rows", lambda self, batch: hidden(self, batch).detach())


def test_trained_weights_without_a_gradient_are_refused(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The head is the embedding, which would still get a gradient.
    without_a_gradient(monkeypatch)
    with pytest.raises(ModelError, match="gradient, measured before the first step"):
        tiny_run("full", **ON, learner__lora={"rank": 2, "alpha": 4.0})
