"""What goes between processes, and what the loop holds in place of a sampler and a teacher."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from reflux.cluster.actors import NoteBuffer, Reply, TeacherInfo
from reflux.cluster.wire import packed
from reflux.config.recipe import load_recipe
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError, ServerRefused, StepRefused
from reflux.learners.sent_heads import SentHead
from reflux.runtime.services import Services
from reflux.runtime.weights import AdapterWeights, InMemory
from reflux.teachers.base import plain_requests
from reflux.types import HiddenTarget, Prompt, TeacherAnswer

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

# --- values on their way


def test_tensors_and_arrays_arrive_as_they_were_in_memory_of_their_own() -> None:
    whole = torch.randn(5000, 8)
    sent = {
        "view": whole[3:5],
        "narrow": torch.randn(3, 2).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "array": np.arange(6).reshape(2, 3),
        "target": HiddenTarget(teacher="main", h_TH=torch.randn(4, 8), head="teachers.main"),
        "text": "x",
    }
    on_its_way = packed(sent)
    # Only the rows of the view, and no array inside the pickle.
    assert sum(each.nbytes for each in on_its_way.arrays) == 64 + 12 + 4 + 0 + 48 + 128
    assert len(on_its_way.data) < 2000
    again = packed(on_its_way.value()).value()
    for key in ("view", "narrow", "scalar", "none"):
        assert torch.equal(again[key], sent[key])
        assert again[key].dtype == sent[key].dtype  # type: ignore[attr-defined]
    assert torch.equal(again["target"].h_TH, sent["target"].h_TH)  # type: ignore[attr-defined]
    again["array"][0, 0] = 9
    again["view"].zero_()
    assert on_its_way.value()["array"][0, 0] == 0
    assert torch.equal(on_its_way.value()["view"], whole[3:5])


@pytest.mark.parametrize("error", [ServerRefused("no", 400, "why"), StepRefused("no", "nan", [None])])
def test_errors_with_fields_arrive_as_they_were(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_messages_are_given_once() -> None:
    buffer = NoteBuffer()
    buffer.noted("a")
    assert (buffer.take(), buffer.take()) == (("a",), ())


# --- what the loop holds


class Reference:
    """What `ray.put` gives: it is awaited."""

    def __init__(self, value: Any):
        self.value = value

    def __await__(self) -> Iterator[None]:
        yield from ()
        return self.value


class Called:
    """An actor whose methods note their calls. answer: from the arguments of a call."""

    def __init__(self, answer: Callable[..., Any]):
        self.calls: list[tuple[Any, ...]] = []
        self._answer = answer

    @property
    def remote(self) -> Callable[..., Reference]:
        def call(*arguments: Any) -> Reference:
            self.calls.append(arguments)
            return Reference(
                Reply(packed(self._answer(*arguments)), {"sample": 1.0 + len(self.calls)}, ("x",))
            )

        return call

    @property
    def open(self) -> Called:
        return self

    publish = sample = score = open


class Front:
    """A pool of two such actors that are asked in turns."""

    def __init__(self, answer: Callable[..., Any]):
        self.members = [Called(answer), Called(answer)]
        self.sizes: list[int] = []

    async def least(self, size: int, call: Any) -> Reply:
        self.sizes.append(size)
        return await call(self.members[len(self.sizes) % 2])

    async def each(self, call: Any) -> list[Reply]:
        return [await call(member) for member in self.members]


@pytest.fixture
def services() -> tuple[Services, tiny.Heard]:
    heard = tiny.Heard()
    return Services(load_recipe("full").learner.student, listener=heard), heard


def fronted(
    monkeypatch: pytest.MonkeyPatch, services: Services, front: Front, precision: str = "auto"
) -> Any:
    from reflux.cluster import remote_sampler

    monkeypatch.setattr(ray, "put", Reference)
    return remote_sampler.RemoteSampler(services, precision, lambda opening: front)  # type: ignore[arg-type]


def test_weights_are_put_once_a_version_and_a_new_actor_gets_the_current_ones(
    monkeypatch: pytest.MonkeyPatch, services: tuple[Services, tiny.Heard]
) -> None:
    sampler = fronted(monkeypatch, services[0], Front(lambda *arguments: None))
    first, second = (InMemory.of({"w": torch.full((2,), float(version))}, version) for version in (1, 2))
    fresh = Called(lambda *arguments: None)

    async def all_of_it() -> tuple[Any, Any]:
        assert len(list(sampler.opening())) == 1
        await sampler.publish(first, 3)
        sent = sampler.sent
        await sampler.publish(first, 4)
        assert sampler.sent is sent
        await sampler.publish(second, 5)
        for call in sampler.opening():
            await call(fresh)
        return sent[0], await fresh.calls[1][0].fetched()

    old, weights = asyncio.run(all_of_it())
    assert [call[0].version for call in sampler.pool.members[1].calls] == [1, 1, 2]
    assert (fresh.calls[0], fresh.calls[1][1]) == ((), 5)
    assert (old.version, weights.version) == (1, 2)
    assert torch.equal(dict(weights.tensors())["w"], torch.full((2,), 2.0))
    assert weights.adapter is None


def test_weights_travel_in_pieces_in_the_type_of_the_sampler_with_their_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from reflux.cluster import sent_weights

    monkeypatch.setattr(ray, "put", Reference)
    monkeypatch.setattr(sent_weights, "PIECE_BYTES", 100)
    tensors = {f"w{index}": torch.randn(20) for index in range(5)} | {"count": torch.arange(3)}
    adapter = AdapterWeights({"r": 4}, lambda: [("a", torch.ones(2))])
    sent = sent_weights.SentWeights.put(InMemory(7, tensors.items, adapter=adapter), "bfloat16")
    assert [len(piece.value.value()) for piece in sent.pieces] == [2, 2, 2]
    weights = asyncio.run(sent.fetched())
    found = dict(weights.tensors())
    assert found["w0"].dtype == torch.bfloat16
    assert torch.equal(found["w0"], tensors["w0"].bfloat16())
    assert torch.equal(found["count"], tensors["count"])
    assert weights.adapter is not None
    assert (weights.adapter.config["r"], [name for name, _ in weights.adapter.read()]) == (4, ["a"])
    plain = sent_weights.SentWeights.put(InMemory(7, tensors.items), "auto")
    assert torch.equal(dict(asyncio.run(plain.fetched()).tensors())["w0"], tensors["w0"])


def test_a_step_is_dealt_out_and_comes_back_in_order(
    monkeypatch: pytest.MonkeyPatch, services: tuple[Services, tiny.Heard]
) -> None:
    """The shares do not depend on the order in which prompts are asked for. Seconds are those of the slowest
    actor.
    """
    front = Front(lambda share: [f"group of {prompt.id}" for prompt, _, _ in share.value()])
    sampler = fronted(monkeypatch, services[0], front)
    draw = SamplingParams(0, "train", 10, cohort=3)
    prompts = [Prompt(f"p{index}", ()) for index in range(3)]

    async def all_of_it() -> list[Any]:
        return await asyncio.gather(*(sampler.sample(prompt, 2, draw) for prompt in reversed(prompts)))

    assert asyncio.run(all_of_it()) == ["group of p2", "group of p1", "group of p0"]
    assert front.sizes == [40, 20]
    dealt = [[prompt.id for prompt, _, _ in member.calls[0][0].value()] for member in front.members]
    assert dealt == [["p1"], ["p0", "p2"]]
    assert services[0].clock.take()["sample"] == 2.0


def remote_teacher(services: Services, pool: Any, heads: dict[str, SentHead]) -> Any:
    from reflux.cluster.remote_teacher import RemoteTeacher

    info = TeacherInfo(5, "off", 64, "teachers.main", heads)
    return RemoteTeacher(load_recipe("full").teachers["main"], tiny.context(), services, pool, info)


def test_requests_are_divided_by_length_and_answered_in_order(services: tuple[Services, tiny.Heard]) -> None:
    front = Front(
        lambda share: [
            TeacherAnswer(positions_read=request.rollout.length, seconds=1.0) for request in share.value()
        ]
    )
    teacher = remote_teacher(
        services[0], front, {"teachers.main": SentHead(torch.randn(7, 4), None, 2.0, None)}
    )
    rollouts = [tiny.rollout(length, seed=length) for length in (3, 9, 4, 5)]
    answers = asyncio.run(teacher.score(plain_requests(rollouts)))
    assert [answer.positions_read for answer in answers] == [3, 9, 4, 5]
    # The slowest actor has read two of the four.
    assert [answer.seconds for answer in answers] == [0.5] * 4
    assert sum(front.sizes) == sum(rollout.prompt_length + rollout.length for rollout in rollouts)
    # Fewer requests than actors: nobody is asked for nothing.
    front.sizes.clear()
    assert len(asyncio.run(teacher.score(plain_requests(rollouts[:1])))) == len(front.sizes) == 1


def test_the_head_of_a_placed_teacher_is_here_until_it_is_closed(
    services: tuple[Services, tiny.Heard],
) -> None:
    weight_VH, h_NH = torch.randn(7, 4), torch.randn(3, 4)
    teacher = remote_teacher(services[0], None, {"teachers.main": SentHead(weight_VH, None, 2.0, None)})
    assert (teacher.macs, teacher.autocast, teacher.model.context_tokens) == (5, "off", 64)
    head = services[0].heads[teacher.head]
    assert torch.allclose(head.logits(h_NH.to(head.device)).cpu(), 2 * h_NH @ weight_VH.T, atol=1e-6)
    teacher.close()
    assert services[0].heads.items() == []
    with pytest.raises(ModelError, match="its output head is quantised or has an adapter"):
        remote_teacher(services[0], None, {})
