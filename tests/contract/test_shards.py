"""The learner `fsdp` in one process: what it refuses, and its precision. Several ranks:
`tests/laws/test_sharded_runs.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from contract.test_learner import batch
from device import ON_GPU
from reflux.config.step_context import StepContext
from reflux.errors import ConfigError, ModelError
from reflux.learners import shards
from reflux.learners.fsdp import FSDP
from reflux.learners.fsdp_engine import FSDPLearner
from reflux.learners.hf_engine import HFLearner
from reflux.learners.rank_group import RankGroup
from reflux.learners.shards import Shards
from reflux.loss.step import StepRequest
from reflux.models.dtensors import divided, gathered
from reflux.objectives.divergence import Divergence

pytestmark = pytest.mark.skipif(ON_GPU, reason="docs/gpu.md says what a first run on GPUs has to confirm")


@pytest.fixture
def group() -> Iterator[RankGroup]:
    group = RankGroup.join("cpu")
    yield group
    group.leave()


def sharded(group: RankGroup, **fields: Any) -> HFLearner:
    plain = tiny.learner(tiny.net(1, layers=2), **fields)
    return HFLearner(plain.cfg, plain.context, plain.services, plain.model, Shards(group))


def test_a_process_that_has_a_group_is_refused(group: RankGroup) -> None:
    with pytest.raises(ConfigError, match="this process has one already"):
        RankGroup.join("cpu")


def test_a_model_whose_layers_are_not_known_is_refused(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "layers_of", lambda net: [])
    with pytest.raises(ModelError, match=r"the layers of Qwen3ForCausalLM are not of the class"):
        sharded(group)


def test_a_micro_batch_that_exceeds_the_memory_is_no_reason_to_try_again(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks would wait in the middle of a pass."""

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError

    learner = sharded(group)
    monkeypatch.setattr(learner, "backward", full)
    with pytest.raises(ModelError, match=r"Lower learner.micro_batch_tokens \(now 16,384\)"):
        tiny.move(learner, batch(), [Divergence()])


def test_with_bfloat16_products_weights_gradients_and_moments_stay_float32(group: RankGroup) -> None:
    """The precision of a GPU, on the CPU."""
    wide, narrow = tiny.learner(tiny.net(1, layers=2), lr=1e-3), sharded(group, lr=1e-3)
    exact = tiny.move(wide, batch(), [Divergence()])
    plain = tiny.learner(tiny.net(1, layers=2), lr=1e-3)
    ranks = Shards(group)
    ranks.divide(plain.model, narrow=True)
    narrow.ranks, narrow.net, narrow.model = ranks, plain.model.net, plain.model
    narrow.trained = dict(plain.model.net.named_parameters())
    narrow.optimiser = torch.optim.AdamW(list(narrow.trained.values()), lr=0.0)
    rounded = tiny.move(narrow, batch(), [Divergence()])
    assert rounded["loss"].value == pytest.approx(exact["loss"].value, rel=0.02)
    assert rounded["loss"].value != exact["loss"].value
    assert rounded["grad_norm"].value == pytest.approx(exact["grad_norm"].value, rel=0.05)
    for parameter in narrow.trained.values():
        moments = narrow.optimiser.state[parameter]
        assert {parameter.dtype, moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {torch.float32}
        assert divided(parameter) is not None


def test_a_closed_learner_frees_the_process_for_the_next(student: str, tmp_path: Path) -> None:
    """Also after an error in a step, in one process."""
    services = tiny.services()
    context = tiny.context(name="learner", model=student)
    part = FSDP(student, lr=1e-3)

    async def steps(bad: bool) -> dict[str, torch.Tensor]:
        async with part.open(context, services) as learner:
            groups = batch()
            if bad:
                learner.local.ranks.passes = None
            await learner.step(StepRequest(groups, [Divergence()], StepContext(0, 0)))
            return {name: gathered(value).clone() for name, value in learner.weights.items()}

    once = asyncio.run(steps(False))
    with pytest.raises(TypeError):
        asyncio.run(steps(True))
    assert tiny.same(once, asyncio.run(steps(False)))


def test_orders_of_two_threads_reach_the_ranks_one_after_the_other(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With staleness the sampler asks for weights while a step is made."""
    sent: list[Any] = []
    monkeypatch.setattr(group, "scatter", sent.append)
    learner = FSDPLearner(sharded(group), group)
    started, over = threading.Event(), threading.Event()

    def slow(local: HFLearner) -> None:
        started.set()
        assert over.wait(20)

    threads = [
        threading.Thread(target=learner.everywhere, args=(work,)) for work in (slow, lambda local: None)
    ]
    threads[0].start()
    assert started.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    assert len(sent) == 1
    over.set()
    for thread in threads:
        thread.join(20)
    assert len(sent) == 2
    monkeypatch.undo()


def test_the_part_refuses_compiled_layers_and_keeps_the_rest(student: str, teacher: str) -> None:
    part = FSDP(student, compile=True)
    cfg = tiny.config("opd", student, teacher)
    (text,) = part.refusals("learner", cfg)
    assert text.startswith("learner.compile")
    assert list(replace(part, compile=False).refusals("learner", cfg)) == []
