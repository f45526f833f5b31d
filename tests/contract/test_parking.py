"""A teacher whose weights are on the CPU between uses answers as before, and its head stays where it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from torch import Tensor

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.recipe import load_recipe
from reflux.config.requirements import Requirements
from reflux.contexts.base import TeacherPrompt
from reflux.errors import ConfigError
from reflux.inspection.plan import plan
from reflux.models.parking import Parked
from reflux.models.text import as_model
from reflux.teachers.base import TeacherRequest
from reflux.teachers.local import Local
from reflux.teachers.local_engine import LocalTeacher
from reflux.types import Attempt
from tiny import ask, rollout, same


class Device:
    """A device on the CPU: a weight is on it if it is a copy that this object made and that still lives."""

    def __init__(self) -> None:
        self.moved: list[Tensor] = []

    def __call__(self, kept: Tensor) -> Tensor:
        self.moved.append(kept.clone())
        return self.moved[-1]

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == one.data_ptr() for one in self.moved)


def test_weights_are_on_the_device_only_while_they_are_used() -> None:
    net, device = tiny.net(1, layers=2).requires_grad_(False), Device()
    (head,) = net.get_output_embeddings().parameters()
    place, values = head.data_ptr(), {name: p.clone() for name, p in net.named_parameters()}
    parked = Parked(net, [head], device)
    others = [p for p in net.parameters() if p is not head]
    assert not any(map(device.holds, others))
    for times in (1, 2):
        with parked.here():
            assert all(map(device.holds, others))
            assert len(device.moved) == times * len(others)
            assert same(values, dict(net.named_parameters()))
        assert not any(map(device.holds, others))
        assert head.data_ptr() == place
    with pytest.raises(RuntimeError), parked.here():
        raise RuntimeError
    assert not any(map(device.holds, others))


def test_a_model_that_reading_changes_reads_for_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told, services = tiny.context(Requirements(logp=True)), tiny.services()
    teacher = LocalTeacher(Local("m"), told, services, as_model(tiny.net(2), character_tokenizer()))
    inside, most = [], []

    @contextmanager
    def here() -> Iterator[None]:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        yield
        inside.pop()

    monkeypatch.setattr(teacher, "here", here)
    request = TeacherRequest(
        rollout(5, seed=1), TeacherPrompt(rollout(5, seed=1).prompt.messages), told.requirements
    )
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(teacher.answer, [[request], [request]])
    assert most == [1, 1]
    np.testing.assert_array_equal(one[0].target.logp_T, other[0].target.logp_T)  # type: ignore[union-attr]


def test_a_parked_teacher_answers_as_before() -> None:
    told, services = tiny.context(Requirements(logp=True)), tiny.services()
    teacher = LocalTeacher(Local("m"), told, services, as_model(tiny.net(2), character_tokenizer()))
    attempts = [[Attempt(rollout(n, seed=n)) for n in (5, 3)] for _ in range(2)]

    def logp(group: list[Attempt]) -> list[np.ndarray]:
        asyncio.run(ask(teacher, *((a, TeacherPrompt(a.rollout.prompt.messages)) for a in group)))
        return [a.target("main").logp_T for a in group]  # type: ignore[union-attr]

    plain = logp(attempts[0])
    device, net = Device(), teacher.model.net
    teacher.parked = Parked(net, list(net.get_output_embeddings().parameters()), device)
    for one, other in zip(plain, logp(attempts[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    # one score call moves each weight once, whatever the number of texts
    assert len(device.moved) == sum(1 for _ in net.parameters()) - 1
    assert not any(device.holds(p) for p in net.parameters())


def test_on_a_cpu_it_has_no_effect_and_this_is_said() -> None:
    heard = tiny.Heard()
    model = as_model(tiny.net(2), character_tokenizer())
    if model.device.type == "cpu":
        teacher = LocalTeacher(Local("m", offload=True), tiny.context(), tiny.services(listener=heard), model)
        assert teacher.parked is None
        assert heard.notes == ["teachers.main.offload has no effect, because the teacher is on the CPU"]
    on_cpu = {"teachers.main.offload": True, "teachers.main.device": "cpu"}
    assert any("offload has no effect" in text for text in plan(load_recipe("full", on_cpu)).warnings)


def test_two_places_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="device_map already says"):
        load_recipe("full", {"teachers.main.offload": True, "teachers.main.device_map": "auto"})
